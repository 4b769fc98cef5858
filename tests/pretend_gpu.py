"""
A GPU that is only pretended: on a CPU it shows where tensors of two devices meet, as CUDA would.

Its tensors are on the device "meta" for all who ask, and hold their values on the CPU. So what is
decided by values runs too (lengths, masks, sampled tokens), forward and backward, with the numbers
of the CPU. (What the code itself puts on "meta" is on this GPU too, and keeps its values.)
"""
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("meta")
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default)


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=GPU)

    def __init__(self, values):
        self.values_on_cpu = values

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


class CheckDevices(TorchDispatchMode):
    """Sees every operation: also those that only make a tensor."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


class FromPython(TorchFunctionMode):
    """What torch does with Python's numbers before any operation is called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            return args[0].cpu().tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = args[0], tree_map(as_index, args[1], is_leaf=is_list), *args[2:]
        return function(*args, **kwargs)


def is_list(x):
    return isinstance(x, list)


def as_index(x):
    """torch would make the list a tensor of the GPU where no mode sees it."""
    return torch.tensor(x) if is_list(x) else x


@contextmanager
def pretended_gpu():
    with CheckDevices(), FromPython():
        yield GPU


def check(op, args, kwargs):
    """Raises RuntimeError if tensors of both devices are given where CUDA does not allow it. It
    allows single numbers of the CPU, and the CPU's indices of a tensor on the GPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    assert all(x.device == CPU or isinstance(x, OnGPU) for x in tensors), f"{op}: no values"
    if op in MOVES:
        return
    if op.namespace == "c10d" and any(x.device == CPU and x.is_floating_point() for x in tensors):
        raise RuntimeError(f"{op} of tensors on the CPU: NCCL sends none")     # objects are bytes
    if op in INDEXED and args[0].device == GPU:
        args = args[0], *args[2:]                          # without the indices
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    devices = {x.device for x in tensors if x.device == GPU or x.dim()}
    if len(devices) > 1:
        places = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{op} of tensors on two devices: {places}")


def compute(op, args, kwargs):
    """The result of an operation, on the device where CUDA would leave it."""
    check(op, args, kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if op == aten.copy_.default:
        device = args[0].device
    elif kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    else:
        device = GPU if any(x.device == GPU for x in tensors) else CPU
    on_cpu = kwargs | {"device": CPU} if "device" in kwargs else kwargs
    given, named = tree_map_only(OnGPU, lambda x: x.values_on_cpu, (args, on_cpu))
    result = op(*given, **named)
    if device != GPU:
        return result
    result = tree_map_only(torch.Tensor, OnGPU, result)
    return return_and_correct_aliasing(op, args, kwargs, result)
