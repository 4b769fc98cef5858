"""
AdamW over the trained weights, and one update: sum the gradients over all ranks, clip, step.
"""
import math

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plumbing.sharding import like

BUCKET = 1 << 24       # gradients that are summed over the ranks in one message


def make_optimizer(model, lr):
    """AdamW over the trained weights. For bfloat16 weights it updates float32 copies, since the 8
    bits of a bfloat16 would round an update of 1e-6 away."""
    weights = []
    for p in model.parameters():
        if p.requires_grad:
            weights.append(p if p.dtype == torch.float32 else p.detach().float())
    # One kernel on a GPU: the default there would allocate another copy of all weights.
    fused = True if weights[0].is_cuda else None
    return torch.optim.AdamW(weights, lr, (0.9, 0.95), weight_decay=0.0, fused=fused)


def restore(optimizer, moments, copies):
    """Load the saved state of an optimizer. Each rank takes its part of sharded weights.

    moments: its state_dict; copies: the float32 copies of bfloat16 weights, empty for float32.
    """
    [group] = optimizer.param_groups
    weights = group["params"]
    state = {}
    for i, of_weight in moments["state"].items():
        state[i] = {name: like(x, weights[i]) for name, x in of_weight.items()}
    optimizer.load_state_dict(moments | {"state": state})
    with torch.no_grad():
        for weight, copy in zip(group["params"], copies):
            weight.copy_(like(copy, weight))


def sum_gradients(gradients):
    """Sum each gradient over all ranks, in place. A few large messages cost less than many small
    ones. The sum is in float32, since bfloat16 would round it at every rank."""
    for bucket in buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket]).float()
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in bucket])
        for g, summed in zip(bucket, parts):
            g.copy_(summed.view_as(g))


def buckets(gradients):
    """Runs of gradients with at most BUCKET numbers in total, or of a single larger one."""
    bucket, size = [], 0
    for g in gradients:
        if bucket and size + g.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(g)
        size += g.numel()
    if bucket:
        yield bucket


def update(model, optimizer, lr, ranks):
    """Sum the gradients over all ranks, clip their norm at 1, step, and clear them.

    -> the norm before clipping. If it is not finite, the step was skipped. A parameter without a
    gradient counts as zero: AdamW's moments still move it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if ranks.world > 1 and not isinstance(model, FSDPModule):          # FSDP has summed its own
        sum_gradients([p.grad for p in parameters])
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    norm = float(norm)
    if math.isfinite(norm):
        [group] = optimizer.param_groups
        group["lr"] = lr
        copies = [(p, copy) for p, copy in zip(parameters, group["params"]) if copy is not p]
        for p, copy in copies:
            copy.grad = p.grad.float()
            p.grad = None              # one at a time: never two gradients of all weights
        optimizer.step()
        with torch.no_grad():
            for p, copy in copies:
                p.copy_(copy)
        count_update(model)
    optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    return norm


def count_update(model):
    """Note that the weights of a model have changed, for whoever keeps a copy or a hash of them.

    The tensors' own versions are raised here too: a fused optimizer, which GPUs have, does not
    raise them.
    """
    model.updates = updates(model) + 1
    torch.autograd.graph.increment_version([p for p in model.parameters() if p.requires_grad])


def updates(model):
    """How many updates a model has had in this process: a number that changes with its weights."""
    return getattr(model, "updates", 0)


def warmed_up(n, warmup):
    """The factor of the learning rate at update n, counted from 0: it rises linearly to 1."""
    return min(1, (n + 1) / max(1, warmup))


def falling(step, steps):
    """The factor of the learning rate: over the steps of a stage it falls linearly towards 0, but
    not below a tenth."""
    return max(0.1, 1 - step / steps)
