"""
FSDP2: parameters, gradients and optimizer state sharded over all ranks. Also activation
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

from plumbing.lora import merged


def shard_parameters(model, ranks):
    """Each rank holds 1/world of every trained parameter, in float32, of its gradient and of its
    optimizer state.

    A layer is gathered when it runs, in the dtype that the model had; gradients are summed over
    the ranks in float32. The frozen vision tower is not sharded. The model may still be on the CPU:
    it is moved to the device one layer at a time.
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
        part.set_force_sum_reduction_for_comms(True)       # gloo supports nothing else
    model.run = lambda work: work()
    register_fsdp_forward_method(model, "run")             # FSDP treats run like forward


def one_forward(work):
    """Decorator: FSDP treats work(model, ...) as one forward of the model. The parameters outside
    the layers (embeddings, head) are gathered before it, and once for its backward, regardless of
    how often work uses them."""
    @wraps(work)
    def call(model, *args, **options):
        if isinstance(model, FSDPModule):
            return model.run(lambda: work(model, *args, **options))
        return work(model, *args, **options)
    return call


@contextmanager
def gathered(model):
    """For sampling: every rank holds all parameters unsharded and runs any number of forwards. All
    ranks enter and leave together."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    model.run(lambda: None)                    # FSDP takes the first module that runs as its root
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    try:
        yield
    finally:
        model.reset_iter_state()       # shards again, and forgets what ran, which differs by rank
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


def weights(model, tied=False):
    """Name and tensor of each parameter: once, or, with tied, under every name that it has. LoRA's
    are merged, and sharded ones gathered, one at a time while iterating: all ranks must iterate
    together."""
    for name, weight in merged(model, model.named_parameters(remove_duplicate=not tied)):
        weight = weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.to(model.dtype).full_tensor()
        yield name, weight


def kept_buffers(model):
    """The buffers that a checkpoint has, {name: tensor}. They are not trained and not sharded."""
    kept = model.state_dict().keys()
    return {name: x for name, x in model.named_buffers() if name in kept}


def like(x, parameter):
    """x, a tensor of a checkpoint, as its parameter needs it: this rank's part if the parameter is
    sharded and x has its shape, else x itself."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


def recompute_layers(model):
    """Activation checkpointing: only the input of each decoder layer is kept for the backward,
    which runs the layer again."""
    text = model.model.language_model
    text.gradient_checkpointing_enable({"use_reentrant": False})
    text.train()       # transformers checkpoints only in this mode; there is no dropout here


def check_heads(text_config, ranks):
    """Raises ValueError if stage 2 cannot share out the attention heads: heads must be a
    multiple of sp, and key-value heads a multiple or a divisor of it."""
    heads = text_config.num_attention_heads
    kv_heads = text_config.num_key_value_heads

    def fits(sp):
        return heads % sp == 0 and (kv_heads % sp == 0 or sp % kv_heads == 0)

    if not fits(ranks.sp):
        possible = ", ".join(str(sp) for sp in range(1, heads + 1) if fits(sp))
        raise ValueError(f"stage 2 with sp = {ranks.sp}: {heads} attention heads and {kv_heads} "
                         f"key-value heads cannot be shared out; sp can be {possible} for this "
                         "model, or switch stage2 off")
