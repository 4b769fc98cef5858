"""
MR-SP (LongVILA-R1, section 5): one long video shared out over the ranks.

Stage 1, encode: each rank of a sequence-parallel group runs its own frames through its own copy of the vision tower;
one all-gather later every rank holds all the vision tokens. They are kept and reused by all G rollouts and by training.
Stage 2, sequence parallel: the packed sequence itself is sharded for the policy's forward and backward (Ulysses).
Without torchrun everything here is a no-op.
"""
import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import AttentionInterface


def shard(n, rank, size):
    """The half-open range of n things that is `rank`'s: as even as can be, in order, nothing lost, nothing twice.

    >>> [shard(7, r, 3) for r in range(3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    whole, rest = divmod(n, size)
    lo = rank * whole + min(rank, rest)
    return lo, lo + whole + (rank < rest)


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
# ranks

@dataclass
class Ranks:
    """Who this process is. world = dp * sp: the sp ranks of one group share a video, the dp groups do not."""
    rank: int = 0
    world: int = 1
    sp: int = 1
    sp_rank: int = 0
    dp: int = 1
    dp_rank: int = 0
    device: str = "cpu"
    group: object = None       # the process group of my sp ranks; None without torchrun


def start(sp=0):
    """Join the other processes that torchrun started; without torchrun, be alone. sp = 0: all ranks of this machine.

    Raises ValueError on every rank where sp does not divide the number of ranks.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    sp = sp or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if sp < 1 or world % sp:
        raise ValueError(f"sp = {sp} does not divide the {world} ranks; choose an sp that does, or another --nproc_per_node")
    if "RANK" not in os.environ:
        return Ranks(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    groups = [dist.new_group(range(first, first + sp)) for first in range(0, world, sp)]           # all ranks make all
    return Ranks(rank, world, sp, rank % sp, world // sp, rank // sp, device, groups[rank // sp])


def together(work, ranks):
    """work() on each rank of the sp group. What it raises on one rank is raised on all: none is left waiting."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as e:                     # the errors of a bad input; a bug still ends the run at once
        error = e
    if ranks.sp > 1:
        errors = [None] * ranks.sp
        dist.all_gather_object(errors, error, group=ranks.group)
        error = next((e for e in errors if e is not None), None)
    if error is not None:
        raise error
    return result


# ---------------------------------------------------------------------------------------------------------------------
# stage 1

@torch.no_grad()
def encode(tower, open_patches, ranks, group=64):
    """One video through the tower, its frames shared out over the sp ranks. -> (vision [V,D], (t,h,w)) on every rank.

    tower: the vision tower; open_patches() -> ((t,h,w), merge, read), where read(lo, hi) gives the patches of temporal
    patches lo to hi, float32 [n,C]: each rank reads only its own. group: temporal patches that go through the tower at
    once, so that an hour of video never sits in memory as pixels. Frames do not look at one another in the tower, so
    that shards and groups change nothing. Any t will do, fewer than ranks included. What a rank's reading raises is
    raised on all.
    """
    def own():
        (t, h, w), merge, read = open_patches()
        lo, hi = shard(t, ranks.sp_rank, ranks.sp)
        parts = []
        for first in range(lo, hi, group):
            last = min(first + group, hi)
            patches = read(first, last).to(ranks.device, tower.dtype)
            parts.append(tower(patches, grid_thw=torch.tensor([[last - first, h, w]], device=ranks.device)).pooler_output)
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
    """Vision tokens by video, for as long as the tower is frozen: every frame is encoded once. The least recently used
    go first when `most` bytes are reached."""

    def __init__(self, most=4 << 30):
        self.kept, self.bytes, self.most = OrderedDict(), 0, most

    def get(self, key, make):
        """What make() -> (vision [V,D], ...) returned for this key, now or earlier."""
        if key not in self.kept:
            self.kept[key] = make()
            self.bytes += self.kept[key][0].nbytes
            while self.bytes > self.most and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1][0].nbytes
        self.kept.move_to_end(key)
        return self.kept[key]


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
