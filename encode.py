"""
MR-SP (LongVILA-R1, section 5): one long video shared out over the ranks.

Stage 1, encode: each rank of a sequence-parallel group runs its own frames through its own copy of the vision tower;
one all-gather later every rank holds all the vision tokens. They are kept and reused by all G rollouts and by training.
Stage 2, sequence parallel: the packed sequence itself is sharded for the policy's forward and backward (Ulysses).
Without torchrun everything here is a no-op.
"""
import json
import sys
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import AttentionInterface

from flow import Ranks
from plumbing.ranks import PATIENCE, deal, meet, on_first as led, shard, start, together, versions
from plumbing.store import Disk, sha256


def frames_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """Attention inside each of many short segments (a frame, or a window of it), all of one length in one call.

    query, key, value: [1,heads,S,d]; cu_seq_lens_q: [segments+1]. transformers' own path calls attention once a
    segment, thousands of times for a long video. Its name has "flash" in it: so transformers hands over the segments.
    """
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff().long()
    out = torch.empty_like(query.transpose(1, 2))                              # [1, S, heads, d]
    for n in lengths.unique().tolist():
        at = (starts[lengths == n, None] + torch.arange(n, device=starts.device)).flatten()        # [segments*n]
        q, k, v = (x[0, :, at].unflatten(1, (-1, n)).transpose(0, 1) for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, scale=scaling)             # [segments, heads, n, d]
        out = out.index_copy(1, at, y.transpose(1, 2).flatten(0, 1)[None])
    return out, None


AttentionInterface.register("frames_flash", frames_attention)


# ---------------------------------------------------------------------------------------------------------------------
# stage 1

AT_ONCE = 64                   # temporal patches that go through the tower at once


def spans(t, ranks, group=AT_ONCE):
    """The temporal patches (lo, hi) of t that a rank encodes, at most `group` at once, in order."""
    lo, hi = shard(t, ranks.sp_rank, ranks.sp)
    return [(first, min(first + group, hi)) for first in range(lo, hi, group)]


@torch.no_grad()
def encode(tower, open_patches, ranks, group=AT_ONCE):
    """One video through the tower, its frames shared out over the sp ranks. -> (vision [V,D], (t,h,w)) on every rank.

    tower: the vision tower; open_patches() -> ((t,h,w), merge, read), where read(lo, hi) gives the patches of temporal
    patches lo to hi, float32 [n,C]: each rank reads only its own. group: temporal patches that go through the tower at
    once, so that an hour of video never sits in memory as pixels. Frames do not look at one another in the tower, so
    that shards and groups change nothing. Any t will do, fewer than ranks included. What a rank's reading raises is
    raised on all.
    """
    def own():
        (t, h, w), merge, read = open_patches()
        parts = []
        for first, last in spans(t, ranks, group):
            patches = read(first, last).to(ranks.device, tower.dtype)
            grids = [[last - first, h, w]]
            if tower.config.model_type.startswith("glm4v"):                    # it takes one temporal patch at a time
                grids = [[1, h, w]] * (last - first)
            parts.append(tower(patches, grid_thw=torch.tensor(grids, device=ranks.device)).pooler_output)
        return (t, h, w), h * w // merge ** 2, parts       # a temporal patch is so many vision tokens

    (t, h, w), tokens, parts = together(own, ranks)
    if ranks.sp == 1:
        return torch.cat(parts), (t, h, w)
    sizes = [(hi - lo) * tokens for lo, hi in (shard(t, r, ranks.sp) for r in range(ranks.sp))]
    width = tower.config.out_hidden_size
    mine = torch.zeros(max(sizes), width, dtype=tower.dtype, device=ranks.device)                  # [padded, D]
    if parts:
        mine[:sizes[ranks.sp_rank]] = torch.cat(parts)
    every = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(every, mine, group=ranks.group)
    return torch.cat([x[:n] for x, n in zip(every, sizes)]), (t, h, w)                             # [V, D], in order


class Cache:
    """Reuse: vision tokens by the content of their video. Each frame goes through the tower once in
    a run, and once in all runs that share a folder.

    In the host's memory, so that a step of hundreds of videos takes no more of a GPU than one does.
    At `most` bytes the least recently used go first; the last one used stays, however large it is.
    With a folder also on disk (`plumbing.store.Disk`).
    """

    def __init__(self, most=4 << 30, folder="", say=print):
        """say(line) is called on one rank of a group. Raises ValueError where the folder cannot be
        made or written to."""
        self.kept = OrderedDict()          # {key: (vision, (t,h,w), seconds)}, last used last
        self.bytes = 0                     # of the vision tokens kept
        self.most = most
        self.disk = Disk(folder, say) if folder else None
        self.tower = None                  # the tower that was hashed last,
        self.tower_version = None          # how often its weights had been written to by then,
        self.tower_hash = None             # and its hash

    def key(self, tower, *what):
        """The name of an entry: a hash of the tower and of what it is given.

        what: all that decides about the pixels (content, sampling, preprocessing), as JSON can
        write it. The weights are hashed again only if they were written to: once a run, since the
        tower is frozen.
        """
        version = sum(parameter._version for parameter in tower.parameters())
        if tower is not self.tower or version != self.tower_version:
            config = tower.config.to_dict()
            config.pop("dtype", None)      # it is None until there is a checkpoint
            weights = tower.state_dict()
            shapes = [(name, str(w.dtype), w.shape) for name, w in weights.items()]
            about = json.dumps([config, shapes], sort_keys=True, default=str)
            self.tower = tower
            self.tower_version = version
            self.tower_hash = sha256(about, *weights.values())
        # The last item is to be "2" once a tower's tokens come out otherwise.
        return sha256(json.dumps([*what, self.tower_hash, "1"]))

    def has(self, key):
        """Whether `get` would find this key. A guess: another rank or run may be at work on it."""
        return key in self.kept or (self.disk is not None and self.disk.has(key))

    def get(self, key, make, ranks=Ranks()):
        """What make() -> (vision [V,D], (t,h,w), seconds) returned for this key: earlier, in
        another run, or now. vision is on the CPU.

        All sp ranks call this with the same keys in the same order: then their memories hold the
        same. What make raises passes through, and nothing is kept of it.
        """
        if key not in self.kept:
            if self.disk is None:
                entry = make()
            else:
                entry = self.read_or_make(key, make, ranks)
            vision, *about = entry
            self.kept[key] = (vision.cpu(), *about)
            self.bytes += vision.nbytes
            while self.bytes > self.most and len(self.kept) > 1:
                _, oldest = self.kept.popitem(last=False)
                self.bytes -= oldest[0].nbytes
        self.kept.move_to_end(key)
        return self.kept[key]

    def read_or_make(self, key, make, ranks):
        """sp rank 0 reads for all; where the disk has no such entry, all make it and rank 0 writes
        it. Meanwhile it holds the entry's lock: nobody encodes what another is encoding."""
        is_first = ranks.sp_rank == 0
        with self.disk.lock(key) if is_first else nullcontext():
            entry = led(lambda: self.disk.read(key), ranks)
            if entry is None:
                entry = make()
                if is_first:
                    self.disk.write(key, *entry)
            return entry


# ---------------------------------------------------------------------------------------------------------------------
# stage 2

def check_heads(heads, kv_heads, ranks):
    """Raises ValueError where attention heads cannot be shared out: heads must be a multiple of sp; kv heads a multiple
    or a divisor of it. (The number of heads matters to stage 2 alone.)"""
    if heads % ranks.sp or (kv_heads % ranks.sp and ranks.sp % kv_heads):
        fit = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ValueError(f"stage 2 with sp = {ranks.sp}: {heads} attention heads and {kv_heads} key-value heads cannot be "
                         f"shared out; sp can be {', '.join(map(str, fit))} for this model, or switch stage2 off")


class Ulysses:
    """Stage 2: the packed sequence sharded over the sp ranks, around the same attention. A layout for attention.

    Each rank holds 1/sp of the prefix and 1/sp of the completions, split separately, so that no rank gets all of the
    head's work. In every layer an all-to-all trades them: heads out, sequence in; each rank attends over the whole
    sequence with its share of the heads; a second all-to-all trades back. Gradients go the same way.
    """

    def __init__(self, whole, prefix, ranks):
        """whole: the layout of the whole sequence; prefix: positions of the prefix on each rank."""
        self.whole, self.prefix, self.sp, self.group = whole, prefix, ranks.sp, ranks.group

    def __call__(self, layer, q, k, v, scale):
        kv = k.shape[1]
        if kv < self.sp:                                   # every rank needs a kv head: sp/kv ranks share one
            k, v = (x.repeat_interleave(self.sp // kv, 1) for x in (k, v))
        q, k, v = (self.gather_sequence(x) for x in (q, k, v))                 # [B, heads/sp, S, d]
        return self.gather_heads(self.whole(layer, q, k, v, scale))            # [B, heads, S/sp, d]

    def trade(self, x):
        """[sp, ...], one part for each rank -> [sp, ...], one part from each."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def gather_sequence(self, x):                                              # [B, heads, S/sp, d]
        x = self.trade(torch.stack(x.chunk(self.sp, dim=1)))                   # [sp, B, heads/sp, S/sp, d]
        prefix, own = x[:, :, :, :self.prefix], x[:, :, :, self.prefix:]
        return torch.cat([part for x in (prefix, own) for part in x], dim=2)   # prefix of all ranks, then completions

    def gather_heads(self, x):                                                 # [B, heads/sp, S, d]
        prefix, own = x.split([self.prefix * self.sp, x.shape[2] - self.prefix * self.sp], dim=2)
        x = torch.stack([torch.cat(pair, dim=2) for pair in zip(prefix.chunk(self.sp, 2), own.chunk(self.sp, 2))])
        return torch.cat(list(self.trade(x)), dim=1)                           # [B, heads, S/sp, d]


def all_heads(x, kv_heads, ranks):
    """Keys or values of all heads on every rank, from those that Ulysses dealt out. [B,heads/sp,S,d] -> [B,kv heads,S,d]"""
    if ranks.sp == 1:
        return x
    every = [torch.empty_like(x) for _ in range(ranks.sp)]
    dist.all_gather(every, x, group=ranks.group)
    return torch.cat(every[::max(1, ranks.sp // kv_heads)], dim=1)             # fewer kv heads than ranks: several hold the same


def columns(prefix, completions, ranks):
    """The places of a packed sequence that a rank holds: 1/sp of the prefix, 1/sp of the completions. -> long [S/sp]"""
    (p0, p1), (c0, c1) = (shard(n, ranks.sp_rank, ranks.sp) for n in (prefix, completions))
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
    """x summed over the sp ranks; the gradient goes to a rank's own x alone, unsummed: every rank makes the same loss
    of the sum, and the ranks' gradients are summed later, once."""
    return SumForward.apply(x, ranks.group)
