"""
FSDP2: parameters, gradients and optimizer state sharded over all ranks. And activation
checkpointing, the other way to fit a model into less memory.
"""
from contextlib import contextmanager
from functools import wraps

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_parameters(model, ranks):
    """Each rank holds 1/world of every trained parameter, in float32, of its gradient and of its
    optimizer state.

    A layer is gathered when it runs, in the dtype that the model had; gradients are summed over
    the ranks in float32. The vision tower, which is frozen, stays whole. The model may still be on
    the CPU: it comes to the device one layer at a time.
    """
    dtype = model.dtype
    tower = model.model.visual.requires_grad_(False).to(ranks.device)
    kind = ranks.device.partition(":")[0]
    mesh = init_device_mesh(kind, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*model.model.language_model.layers, model]:
        for p in part.parameters():                        # never the whole model in float32
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(tower.parameters()))
        part.set_gradient_divide_factor(1.0)               # summed, not averaged
        part.set_force_sum_reduction_for_comms(True)       # gloo can do no other
    model.run = lambda work: work()
    register_fsdp_forward_method(model, "run")             # work is to FSDP what the forward is


def one_forward(work):
    """Decorator: work(model, ...) is one forward of the model to FSDP. The parameters of no layer
    (embeddings, head) are gathered before it, and once for its backward, however often work uses
    them."""
    @wraps(work)
    def call(model, *args, **options):
        if isinstance(model, FSDPModule):
            return model.run(lambda: work(model, *args, **options))
        return work(model, *args, **options)
    return call


@contextmanager
def gathered(model):
    """For sampling: every rank holds all parameters whole and runs as many forwards as it needs.
    All ranks enter and leave together."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    model.run(lambda: None)                                # what runs first is taken for the root
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    try:
        yield
    finally:
        model.reset_iter_state()       # shards again, and forgets what ran: other ranks ran less
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


def weights(model, tied=False):
    """Name and tensor of each parameter: once, or with tied under every name that it has. Sharded
    ones are gathered one at a time, as they are asked for, so all ranks must ask alike."""
    for name, weight in model.named_parameters(remove_duplicate=not tied):
        weight = weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.to(model.dtype).full_tensor()
        yield name, weight


def like(x, parameter):
    """A tensor of a checkpoint that belongs to a parameter: this rank's part of it where the
    parameter is sharded and x has its shape, else x."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


def recompute_layers(model):
    """Activation checkpointing: of each decoder layer only the input is kept for the backward,
    which runs the layer again."""
    text = model.model.language_model
    text.gradient_checkpointing_enable({"use_reentrant": False})
    text.train()       # transformers checkpoints in this mode alone; there is no dropout here
