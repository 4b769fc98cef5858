"""
The parts of first_gpu_hour.py about kernels: those of the packed sequence's attention, with their
gradients, and those in which a step spends its time.
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench  # noqa: E402
import model as vlm  # noqa: E402
import rollout  # noqa: E402
from plumbing.metrics import Clock  # noqa: E402
from plumbing.ranks import start  # noqa: E402

SHOWN = 8                  # kernels, those that take the most time
DECODED = 32               # tokens of each completion, for the time of a decoding step
NAME = 60                  # characters of a kernel's name that are kept
MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}    # of a gradient, by rounding


# --------------------------------------------------------------------------------------------------
# attention

def packed_qkv(name, device, dtype):
    """A group's `Packed`, who sees whom, and inputs. -> (packed, sees, q, k, v)"""
    P, L, G = (4096, 400, 4) if name == "3b" else (96, 25, 4)
    heads, kv_heads, head_dim = (16, 2, 128) if name == "3b" else (4, 2, 32)
    owner = torch.arange(G, device=device).repeat_interleave(L)        # [C]
    of_place = torch.cat([torch.full((P,), -1, device=device), owner])             # [P+C]
    sees = (of_place == -1) | (of_place[:, None] == of_place)          # prefix, or oneself
    sees = sees.tril()                                                 # [P+C, P+C]
    packed = vlm.Packed(torch.tensor([P], device=device), owner[None])
    generator = torch.Generator().manual_seed(0)

    def noise(heads):
        x = torch.randn(1, heads, P + G * L, head_dim, generator=generator)
        return x.to(device, dtype).requires_grad_()

    return packed, sees, noise(heads), noise(kv_heads), noise(kv_heads)


def dense(sees, q, k, v, scale):
    """The attention of `Packed` by definition."""
    R = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(R, dim=1) for x in (k, v))
    return (q @ k.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1) @ v


def gradients(attention, qkv):
    """-> those of q, k and v, of the sum of the output's squares"""
    out = attention(*qkv, qkv[0].shape[-1] ** -0.5)
    return torch.autograd.grad(out.float().square().sum(), qkv)


def largest_error(found, exact):
    return max(float((x.float() - y).norm() / y.norm()) for x, y in zip(found, exact))


def attention(row):
    """Which kernels `Packed` gets, and whether their gradients are right, in both dtypes."""
    device = start(1).device
    figures, good = {}, True
    for dtype in MOST_ERROR:
        packed, sees, *qkv = packed_qkv(row.model, device, dtype)
        forward_backward = partial(gradients, partial(packed, 0), qkv)
        found = forward_backward()
        kernels = [name for name in recorded(forward_backward, device)
                   if "flash" in name or "fmha" in name]
        in_float32 = [x.detach().float().requires_grad_() for x in qkv]
        exact = gradients(partial(dense, sees), in_float32)
        clock = Clock()
        with clock("seconds"):
            forward_backward()
        error = largest_error(found, exact)
        name = str(dtype).removeprefix("torch.")
        figures[name] = {"error": error, "kernels": kernels, **clock.seconds}
        good = good and error <= MOST_ERROR[dtype] and len(kernels) > 0
    text = "; ".join(f"{name}: gradients off by {x['error']:.1e}, {x['seconds'] * 1e3:.1f} ms"
                     for name, x in figures.items())
    return figures, f"{'ok' if good else 'look'}: {text}"


# --------------------------------------------------------------------------------------------------
# time

def recorded(call, device):
    """The kernels that call() runs, on a CPU the operators. -> {name: (seconds, calls)}"""
    on_gpu = device != "cpu"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = {}
    for event in found.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds > 0:                                    # names that are cut may be the same
            name = event.key[:NAME]
            before, calls = kernels.get(name, (0.0, 0))
            kernels[name] = round(before + seconds, 6), calls + event.count
    return dict(sorted(kernels.items(), key=lambda item: -item[1][0]))


def kernels(row):
    """Where the time of decoding, and of a group's forward and backward, goes."""
    work = bench.Workload(row, start(1))
    device = work.ranks.device
    prompt = work.prompt()
    keys = [[(0, "kernels", n) for n in range(row.group)]]

    def sample(tokens):
        return rollout.sample(work.model, work.tokenizer, [prompt], keys, think_budget=0,
                              answer_budget=tokens, banned=work.banned, forced="")

    def train():
        bench.forward_backward(work.model, prompt, group, work.advantages, work.ranks,
                               work.banned, row.group, stage2=False)

    sample(4)                                              # the first of all calls are slow
    few, many = Clock(), Clock()
    with few("seconds"):
        sample(4)
    with many("seconds"):
        [group] = sample(4 + DECODED)
    of_few = recorded(partial(sample, 4), device)
    of_many = recorded(partial(sample, 4 + DECODED), device)
    busy = (total(of_many) - total(of_few)) / DECODED
    token_s = (many.seconds["seconds"] - few.seconds["seconds"]) / DECODED

    repeats = -(-row.completion // (4 + DECODED))          # as many tokens as the row says
    for completion in group:
        for name in ("tokens", "sampled", "logprobs"):
            longer = getattr(completion, name).repeat(repeats)[:row.completion]
            setattr(completion, name, longer)
    train()
    clock = Clock()
    with clock("train_s"):
        train()
    of_training = recorded(train, device)
    figures = {"token_s": round(token_s, 5), "token_kernels_s": round(busy, 5), **clock.seconds,
               "train_kernels_s": round(total(of_training), 4),
               "kernels": dict(list(of_training.items())[:SHOWN])}
    most = "\n".join(f"    {seconds:8.4f} s  {calls:6} calls  {name}"
                     for name, (seconds, calls) in figures["kernels"].items())
    return figures, (f"ok: a decoded token takes {token_s * 1e3:.1f} ms, {busy * 1e3:.1f} of them "
                     f"in kernels; forward and backward {clock.seconds['train_s']:.2f} s, "
                     f"{total(of_training):.2f} of them in kernels:\n{most}")


def total(kernels):
    return sum(seconds for seconds, _ in kernels.values())
