"""
MR-SP (LongVILA-R1, section 5): one long video shared out over the ranks.

    stage 1   encode: each rank of a sequence-parallel group runs its own frames through its own
              copy of the vision tower; after one all-gather every rank holds all vision tokens
    reuse     Cache: the tokens are kept, for all G rollouts of a question and for training
    stage 2   Ulysses: the packed sequence itself is sharded over the ranks, for the policy's
              prefill, forward and backward

Without torchrun everything here is a no-op.
"""
import fcntl
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from contextlib import ExitStack, suppress

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import AttentionInterface

from flow import Ranks
from plumbing.ranks import PATIENCE, deal, meet, start, versions  # noqa: F401  found here as before
from plumbing.ranks import on_first as led
from plumbing.ranks import shard, together

# --------------------------------------------------------------------------------------------------
# stage 1: frames over the ranks

AT_ONCE = 64           # temporal patches that go through the tower at once


def frames_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """Attention within each of many short segments: a frame, or a window of one.

    query, key, value: [1,heads,S,d]; cu_seq_lens_q: int [segments+1], where the segments start.
    -> ([1,S,heads,d], None). Segments of one length share one call; transformers' own path makes
    one call a segment, which is thousands for a long video.
    """
    starts = cu_seq_lens_q[:-1].long()
    lengths = cu_seq_lens_q.diff().long()
    out = torch.empty_like(query.transpose(1, 2))                      # [1, S, heads, d]
    for n in lengths.unique().tolist():
        offsets = torch.arange(n, device=starts.device)
        at = (starts[lengths == n, None] + offsets).flatten()          # [segments*n]
        y = F.scaled_dot_product_attention(
            as_batch(query, at, n), as_batch(key, at, n), as_batch(value, at, n), scale=scaling)
        out = out.index_copy(1, at, y.transpose(1, 2).flatten(0, 1)[None])
    return out, None


def as_batch(x, at, n):
    """The segments of n positions that stand at `at`. [1,heads,S,d] -> [segments,heads,n,d]"""
    return x[0, :, at].unflatten(1, (-1, n)).transpose(0, 1)


# transformers hands over the segments to an attention with "flash" in its name.
AttentionInterface.register("frames_flash", frames_attention)


def spans(t, ranks, group=AT_ONCE):
    """The temporal patches (lo, hi) of t that this rank encodes, at most `group` at once."""
    lo, hi = shard(t, ranks.sp_rank, ranks.sp)
    return [(first, min(first + group, hi)) for first in range(lo, hi, group)]


@torch.no_grad()
def encode(tower, open_patches, ranks, group=AT_ONCE):
    """One video through the vision tower, its frames sharded over the sp ranks (section 5.1).

    tower: the vision tower; open_patches() -> ((t,h,w) in patches, merge, read), where read(lo, hi)
    gives the patches of temporal patches lo to hi, float32 [n,C]; group: temporal patches that go
    through the tower at once, so that an hour of video is never in memory as pixels.
    Returns (vision [V,D], (t,h,w)) on every rank.

    Each rank reads its own frames only. Frames do not attend to one another in the tower, so shards
    and groups change nothing. Any t will do, also fewer than ranks. An error of open_patches or
    read on one rank is raised on all.
    """
    def encode_own_frames():
        (t, h, w), merge, read = open_patches()
        parts = []
        for first, last in spans(t, ranks, group):
            patches = read(first, last).to(ranks.device, tower.dtype)
            # A grid for each temporal patch: the same result as one for all, and the only form
            # that GLM-4.1V's tower takes.
            grids = torch.tensor([[1, h, w]] * (last - first), device=ranks.device)
            parts.append(tower(patches, grid_thw=grids).pooler_output)
        return (t, h, w), h * w // merge ** 2, parts

    (t, h, w), tokens, parts = together(encode_own_frames, ranks)      # tokens a temporal patch
    if ranks.sp == 1:
        return torch.cat(parts), (t, h, w)
    sizes = []
    for rank in range(ranks.sp):
        lo, hi = shard(t, rank, ranks.sp)
        sizes.append((hi - lo) * tokens)
    # An all-gather takes equal parts: each is padded to the largest, and cut afterwards.
    width = tower.config.out_hidden_size
    padded = torch.zeros(max(sizes), width, dtype=tower.dtype, device=ranks.device)
    if parts:
        padded[:sizes[ranks.sp_rank]] = torch.cat(parts)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=ranks.group)
    vision = torch.cat([x[:n] for x, n in zip(gathered, sizes)])       # [V, D], in order
    return vision, (t, h, w)


def sha256(text, *tensors):
    """Of a text and the bytes of tensors. -> 64 hexadecimal digits"""
    whole = hashlib.sha256(text.encode())
    for x in tensors:
        whole.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


class Cache:
    """Vision tokens by the content of the video: every frame goes through the tower once in a run, restarts included.

    In the host's memory, so that a step of hundreds of videos takes no more of a GPU than one; the least recently used go first
    when `most` bytes are reached (the last one used stays, however large). With a folder also on disk: a file an entry, never
    deleted by us, for any number of ranks and runs at once. Nobody encodes what another is encoding: a lock on a file beside
    the entry is held meanwhile. The system takes it from a process that dies.
    """

    def __init__(self, most=4 << 30, folder="", say=print):
        """say(line) is called on one rank of a group. Raises ValueError where the folder cannot be made or written to."""
        self.kept, self.bytes, self.most = OrderedDict(), 0, most
        self.folder, self.say, self.tower = folder, say, (None, None, None)
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:      # permission bits do not tell: root, read-only disks
                    fcntl.flock(probe, fcntl.LOCK_EX)
            except OSError as e:
                raise ValueError(f"cache_dir {folder}: not a folder that can be written to ({e.strerror})") from e

    def key(self, tower, *what):
        """The name of an entry: a hash of `what` (content, sampling, preprocessing: anything that JSON can write) and of
        the tower. Its weights are hashed again only if they were written to: once a run, since it is frozen."""
        version = sum(p._version for p in tower.parameters())
        if self.tower[:2] != (tower, version):
            config = {k: v for k, v in tower.config.to_dict().items() if k != "dtype"}         # None before a checkpoint
            weights = tower.state_dict()
            shapes = [(name, str(w.dtype), w.shape) for name, w in weights.items()]
            self.tower = tower, version, sha256(json.dumps([config, shapes], sort_keys=True, default=str), *weights.values())
        return sha256(json.dumps([*what, self.tower[2], "1"]))                 # "2" once a tower's tokens come out otherwise

    def has(self, key):
        """Whether a get would find this key: a guess, since another rank or run may be at work on it."""
        return key in self.kept or bool(self.folder) and os.path.exists(self.path(key))

    def get(self, key, make, ranks=Ranks()):
        """What make() -> (vision [V,D], (t,h,w), seconds) returned for this key: earlier, in another run, or now. vision on the CPU.

        All sp ranks call this alike, with one key: then memory holds the same on each, and sp_rank 0 decides for the disk.
        What make raises passes through; nothing is kept of it. A damaged entry, or a disk that is full, costs a line
        and the work of make, never the run.
        """
        if key not in self.kept:
            vision, *about = self.through_disk(key, make, ranks) if self.folder else make()
            entry = self.kept[key] = (vision.cpu(), *about)
            self.bytes += entry[0].nbytes
            while self.bytes > self.most and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1][0].nbytes
        self.kept.move_to_end(key)
        return self.kept[key]

    def path(self, key):
        return os.path.join(self.folder, key + ".safetensors")

    def through_disk(self, key, make, ranks):
        with ExitStack() as held:                          # the lock, on sp_rank 0, until the entry is written
            def look():
                try:
                    lock = held.enter_context(open(self.path(key) + ".lock", "w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError as e:                       # a full disk may not hold even this; write() will say so
                    self.say(f"{self.path(key)}: no lock ({e.strerror}); another run may encode the same video")
                return self.read(key)

            entry = led(look, ranks)
            if entry:
                return entry
            entry = make()
            if ranks.sp_rank == 0:
                self.write(key, *entry)
            return entry

    def read(self, key):
        """-> (vision on the CPU, (t,h,w), seconds), bit for bit as written; None where there is no whole entry."""
        try:
            with safe_open(self.path(key), "pt") as f:
                about, vision = f.metadata(), f.get_tensor("vision").clone()       # else it would change with the file
            if about["sha256"] != self.seal(key, about["video"], vision):
                raise ValueError("its sha256 is another")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            self.say(f"{self.path(key)}: a damaged cache entry ({e}); the video is encoded again")
            return None
        grid, seconds = json.loads(about["video"])
        return vision, tuple(grid), seconds

    def write(self, key, vision, grid, seconds):
        """Under another name first, so that a file under its own name is whole. The lock sees to it that we are alone."""
        path, video = self.path(key), json.dumps([grid, seconds])
        vision = vision.cpu().contiguous()
        try:
            with open(path + ".tmp", "wb") as f:
                f.write(save({"vision": vision}, {"video": video, "sha256": self.seal(key, video, vision)}))
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        except OSError as e:
            with suppress(OSError):
                os.remove(path + ".tmp")
            self.say(f"{path}: not written ({e.strerror}); the run goes on without this entry")

    def seal(self, key, video, vision):
        """What an entry must hash to: the tokens, and all that says what they are."""
        return sha256(f"{key} {video} {vision.dtype} {tuple(vision.shape)}", vision)


# --------------------------------------------------------------------------------------------------
# stage 2: the sequence over the ranks

def check_heads(heads, kv_heads, ranks):
    """Raises ValueError where stage 2 cannot share out the attention heads: heads must be a
    multiple of sp, and key-value heads a multiple or a divisor of it."""
    def fits(sp):
        return heads % sp == 0 and (kv_heads % sp == 0 or sp % kv_heads == 0)

    if not fits(ranks.sp):
        possible = ", ".join(str(sp) for sp in range(1, heads + 1) if fits(sp))
        raise ValueError(f"stage 2 with sp = {ranks.sp}: {heads} attention heads and {kv_heads} "
                         f"key-value heads cannot be shared out; sp can be {possible} for this "
                         "model, or switch stage2 off")


class Ulysses:
    """The packed sequence sharded over the sp ranks (section 5.2), around the same attention.

    Each rank holds 1/sp of the prefix and 1/sp of the completions. They are split separately so
    that every rank has an equal share of the head's work, which is in the completions alone. In
    each layer an all-to-all trades sequence for heads: each rank attends over the whole sequence
    with its share of the heads. A second one trades back. Gradients take the same way.
    """

    def __init__(self, layout, prefix, ranks):
        """layout: attention over the whole sequence, see `model.layout_attention`; prefix: how
        many positions of the prefix each rank holds."""
        self.layout = layout
        self.prefix = prefix
        self.sp = ranks.sp
        self.group = ranks.group

    def __call__(self, layer, q, k, v, scale):
        kv_heads = k.shape[1]
        if kv_heads < self.sp:                             # sp / kv_heads ranks share each of them
            k = k.repeat_interleave(self.sp // kv_heads, 1)
            v = v.repeat_interleave(self.sp // kv_heads, 1)
        q = self.gather_sequence(q)                                    # [B, heads/sp, S, d]
        k = self.gather_sequence(k)
        v = self.gather_sequence(v)
        return self.gather_heads(self.layout(layer, q, k, v, scale))   # [B, heads, S/sp, d]

    def all_to_all(self, x):
        """[sp, ...], one part for each rank -> [sp, ...], one part from each."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def gather_sequence(self, x):
        """[B,heads,S/sp,d] -> [B,heads/sp,S,d]"""
        x = self.all_to_all(torch.stack(x.chunk(self.sp, dim=1)))      # [sp, B, heads/sp, S/sp, d]
        prefixes = x[:, :, :, :self.prefix]
        completions = x[:, :, :, self.prefix:]
        return torch.cat([*prefixes, *completions], dim=2)             # prefix of all ranks first

    def gather_heads(self, x):
        """[B,heads/sp,S,d] -> [B,heads,S/sp,d]"""
        whole_prefix = self.prefix * self.sp
        prefix, completions = x.split([whole_prefix, x.shape[2] - whole_prefix], dim=2)
        parts = []                                                     # one for each rank
        for pair in zip(prefix.chunk(self.sp, dim=2), completions.chunk(self.sp, dim=2)):
            parts.append(torch.cat(pair, dim=2))
        return torch.cat(list(self.all_to_all(torch.stack(parts))), dim=1)


def all_heads(x, kv_heads, ranks):
    """Keys or values of all heads on every rank, from the shares that Ulysses left with each.
    [B,heads/sp,S,d] -> [B,kv_heads,S,d]"""
    if ranks.sp == 1:
        return x
    gathered = [torch.empty_like(x) for _ in range(ranks.sp)]
    dist.all_gather(gathered, x, group=ranks.group)
    copies = max(1, ranks.sp // kv_heads)                  # ranks that hold the same head
    return torch.cat(gathered[::copies], dim=1)


def columns(prefix, completions, ranks):
    """The places of a packed sequence that this rank holds: 1/sp of its prefix and 1/sp of its
    completions, two numbers of places that sp divides. -> long [S/sp]"""
    p0, p1 = shard(prefix, ranks.sp_rank, ranks.sp)
    c0, c1 = shard(completions, ranks.sp_rank, ranks.sp)
    return torch.cat([torch.arange(p0, p1), torch.arange(prefix + c0, prefix + c1)])


class SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def sum_forward(x, ranks):
    """x summed over the sp ranks. The gradient goes unsummed to each rank's own x: all ranks make
    the same loss of the sum, and their gradients are summed once, later."""
    return SumForward.apply(x, ranks.group)
