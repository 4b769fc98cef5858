"""
MR-SP (LongVILA-R1, section 5): one long video shared out over the ranks.

    stage 1   encode: each rank of a sequence-parallel group runs its own frames through its own
              copy of the vision tower; after one all-gather every rank holds all vision tokens
    reuse     Cache: the tokens are kept, for all G rollouts of a question and for training
    stage 2   Ulysses: the packed sequence itself is sharded over the ranks, for the policy's
              prefill, forward and backward

The calls from a question to its vision tokens, each made by the one above it:

    data.vision_tokens    called by data.make_prompts, and by data.fetch when they are needed
    Cache.get             returns the tokens from memory or disk, or has them made:
    model.encode_video    says how the video's frames become patches
    encode                has each sp rank encode its own frames, and gathers all of them
    encode_own_frames     opens the video, and runs a few patches at a time through the tower

Without torchrun one rank does all of it.
"""
import json
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from flow import Ranks
from plumbing.families import vision_width
from plumbing.ranks import on_first, shard, start, together  # noqa: F401  scripts call start
from plumbing.store import Disk, sha256

# --------------------------------------------------------------------------------------------------
# stage 1: frames over the ranks

ALONE = Ranks()
AT_ONCE = 64             # temporal patches that go through the tower at once
ENCODING_VERSION = "1"   # bump it when the same tower and pixels would give different tokens


def spans(t, ranks, at_once=AT_ONCE):
    """The temporal patches (lo, hi) of t that this rank encodes, at most `at_once` in a span."""
    lo, hi = shard(t, ranks.sp_rank, ranks.sp)
    return [(first, min(first + at_once, hi)) for first in range(lo, hi, at_once)]


@torch.no_grad()
def encode(tower, open_patches, ranks, at_once=AT_ONCE):
    """One video through the vision tower, its frames sharded over the sp ranks (section 5.1).

    tower: the vision tower; open_patches() -> ((t,h,w) in patches, merge, read), where read(lo, hi)
    gives the patches of temporal patches lo to hi, float32 [n,C]; at_once: temporal patches that go
    through the tower at once, so that an hour of video is never in memory as pixels.
    Returns (vision [V,D], (t,h,w)) on every rank.

    Each rank reads its own frames only. Frames do not attend to one another in the tower, so the
    result depends neither on the sharding nor on at_once. t may be any number, also less than sp.
    An error that open_patches or read raises on one rank is raised on all sp ranks.
    """
    grid, tokens_per_t, parts = together(
        partial(encode_own_frames, tower, open_patches, ranks, at_once), ranks)
    if ranks.sp == 1:
        return torch.cat(parts), grid
    sizes = []                                             # vision tokens of each rank
    for rank in range(ranks.sp):
        lo, hi = shard(grid[0], rank, ranks.sp)
        sizes.append((hi - lo) * tokens_per_t)
    # An all-gather takes equal parts: each is padded to the largest, and cut afterwards.
    width = vision_width(tower.config)
    padded = torch.zeros(max(sizes), width, dtype=tower.dtype, device=ranks.device)
    if parts:
        padded[:sizes[ranks.sp_rank]] = torch.cat(parts)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=ranks.group)
    vision = torch.cat([x[:n] for x, n in zip(gathered, sizes)])       # [V, D], in order
    return vision, grid


def encode_own_frames(tower, open_patches, ranks, at_once):
    """This rank's share of `encode`. -> ((t,h,w), vision tokens of one temporal patch, the tower's
    outputs [n,D] in order; no output where there are more ranks than temporal patches)"""
    (t, h, w), merge, read = open_patches()
    parts = []
    for first, last in spans(t, ranks, at_once):
        patches = read(first, last).to(ranks.device, tower.dtype)
        # A grid for each temporal patch: the same result as one for all, and the only form
        # that GLM-4.1V's tower takes.
        grids = torch.tensor([[1, h, w]] * (last - first), device=ranks.device)
        out = tower(patches, grid_thw=grids)
        deepstack = getattr(out, "deepstack_features", ())             # see families.deepstack
        parts.append(torch.cat([out.pooler_output, *deepstack], dim=1))
    return (t, h, w), h * w // merge ** 2, parts


class Cache:
    """Reuse: vision tokens by the content of their video. Each frame goes through the tower once in
    a run, and once in all runs that share a folder.

    In the host's memory, so that a step of hundreds of videos takes no more of a GPU than one does.
    Above `most` bytes the least recently used are removed; the newest stays, however large it is.
    With a folder also on disk (`plumbing.store.Disk`).
    """

    def __init__(self, most=4 << 30, folder="", say=print):
        """say(line) is called on one rank of a group. Raises ValueError if the folder cannot be
        made or written to."""
        self.kept = OrderedDict()          # {key: (vision, (t,h,w), ...)}, last used last
        self.bytes = 0                     # of the vision tokens kept
        self.most = most
        self.disk = Disk(folder, say) if folder else None
        self.tower = None                  # the tower that was hashed last,
        self.tower_version = None          # how often its weights had been written to by then,
        self.tower_hash = None             # and its hash

    def key(self, tower, *what):
        """The name of an entry: a hash of the tower and of what it is given.

        what: everything that determines the pixels (content, sampling, preprocessing), of types
        that JSON has. The weights are hashed again only if they were written to: once a run, since
        the tower is frozen.
        """
        version = sum(parameter._version for parameter in tower.parameters())
        if tower is not self.tower or version != self.tower_version:
            config = tower.config.to_dict()
            config.pop("dtype", None)      # it is None until there is a checkpoint
            weights = tower.state_dict()
            shapes = [(name, str(w.dtype), w.shape) for name, w in weights.items()]
            about = json.dumps([config, shapes], sort_keys=True, default=str)
            # First the hash: threads that read ahead use it once they find tower and version.
            self.tower_hash = sha256(about, *weights.values())
            self.tower = tower
            self.tower_version = version
        return sha256(json.dumps([*what, self.tower_hash, ENCODING_VERSION]))

    def has(self, key):
        """Whether `get` would find this key. A guess: another rank or run may be at work on it."""
        return key in self.kept or (self.disk is not None and self.disk.has(key))

    def get(self, key, make, ranks=ALONE):
        """What make() -> (vision [V,D], (t,h,w), seconds, frames) returned for this key: earlier,
        in another run, or now. vision is on the CPU.

        All sp ranks call this with the same keys in the same order: then their memories hold the
        same. What make raises passes through, and nothing is kept of it.
        """
        if key not in self.kept:
            if self.disk is None:
                entry = make()
            else:
                entry = self.read_or_make(key, make, ranks)
            self.keep(key, *entry)
        self.kept.move_to_end(key)
        return self.kept[key]

    def keep(self, key, vision, *about):
        """Keep an entry, as make() returns it, in memory."""
        if key in self.kept:
            return
        self.kept[key] = (vision.cpu(), *about)
        self.bytes += vision.nbytes
        while self.bytes > self.most and len(self.kept) > 1:
            _, oldest = self.kept.popitem(last=False)
            self.bytes -= oldest[0].nbytes

    def read_or_make(self, key, make, ranks):
        """sp rank 0 reads for all; where the disk has no such entry, all make it and rank 0 writes
        it. Meanwhile it holds the entry's lock: nobody encodes what another is encoding."""
        is_first = ranks.sp_rank == 0
        with self.disk.lock(key) if is_first else nullcontext():
            entry = on_first(lambda: self.disk.read(key), ranks)
            if entry is None:
                entry = make()
                if is_first:
                    self.disk.write(key, *entry)
            return entry


# --------------------------------------------------------------------------------------------------
# stage 2: the sequence over the ranks

class Ulysses:
    """The packed sequence sharded over the sp ranks (section 5.2), around the same attention.

    Each rank holds 1/sp of the prefix and 1/sp of the completions. They are split separately so
    that every rank has an equal share of the head's work, which is only in the completions. In
    each layer an all-to-all trades sequence for heads: each rank attends over the whole sequence
    with its share of the heads. A second one trades back. Gradients take the same way.
    """

    def __init__(self, attention, prefix, ranks):
        """attention: over the whole sequence, called as `model.call_attention` does; prefix: how
        many positions of the prefix each rank holds."""
        self.attention = attention
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
        return self.gather_heads(self.attention(layer, q, k, v, scale))    # [B, heads, S/sp, d]

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
