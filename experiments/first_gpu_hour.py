"""
The first hour on a GPU: the checks that no CPU can make, the most telling first.

    python experiments/first_gpu_hour.py                        all parts, on one GPU of 80 GB
    python experiments/first_gpu_hour.py --parts=memory,sleep   some of them
    python experiments/first_gpu_hour.py --size=tiny            a dry run on a CPU

The model has random weights in the shape of Qwen2.5-VL-3B, and the video is noise. Each part runs
in a process of its own: it has the whole GPU, and its crash ends no other. Its verdict is printed
when it ends, and its figures are added to --out. A verdict is ok, look (it ran, and something is
not as expected), skipped (with the reason) or failed (with the error). The parts:

  attention      which kernels `model.Packed` gets, and whether their gradients are right
  memory         the peak memory of each phase of a GRPO step, against the computed one
  kernels        which kernels take the time of decoding and of training
  weights        whether vLLM gets the weights of each update
  first_runner   the same with vLLM's first model runner; CUDA has the second by default
  sleep          what vLLM frees in both levels of sleep, and whether it wakes as it was
  two_gpus, eight_gpus         the commands to run by hand, and what to look at
  bench64, bench256, bench512  rows of bench.py, at so many frames
"""
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import first_gpu_kernels  # noqa: E402
import first_gpu_vllm  # noqa: E402

import bench  # noqa: E402
from plumbing import command_line, memory  # noqa: E402
from plumbing.metrics import Clock  # noqa: E402
from plumbing.ranks import run_command, spawn, start  # noqa: E402


@dataclass
class Options:
    parts: list[str] = field(default_factory=lambda: [*PARTS])  # comma-separated; default: all
    size: str = "3b"                       # tiny: a dry run, in seconds on a CPU
    out: str = "first_gpu_hour.jsonl"      # figures are added to it, a line for each part


def row_of(size, frames):
    """The row of bench.py that a part measures: one group on one video of noise."""
    row = bench.Options(model=size, frames=frames, size=308, group=8, completion=512, sp=1, steps=1,
                        variant="shared", cache="cold", rollout="torch", checkpointing=1)
    if size == "tiny":
        return replace(row, frames=frames // 32, size=56, group=4, completion=8)
    return row


# --------------------------------------------------------------------------------------------------
# memory

class PeakClock(Clock):
    """Also notes the GPU's peak memory in each phase, in the order of the phases."""

    def __init__(self):
        super().__init__()
        self.peaks = []                                    # (phase, bytes)

    @contextmanager
    def __call__(self, phase):
        torch.cuda.reset_peak_memory_stats()
        with super().__call__(phase):
            yield
        self.peaks.append((phase, torch.cuda.max_memory_allocated()))


def memory_part(row):
    """One GRPO step on one group: measured memory over the computed one, by phase."""
    work = bench.Workload(row, start(1))
    tokens = work.step(0, Clock())["prompt_tokens"]        # the first update allocates the moments
    config = work.model.config
    text = tokens - memory.vision_tokens(config, row.frames, row.size)
    table = memory.memory(config, row.frames, row.size, row.group, row.completion,
                          work.model.dtype, checkpointing=row.checkpointing, text=text)
    figures = {"prompt_tokens": tokens}
    if work.ranks.device == "cpu":                         # a CPU does not count its allocations
        measured = {"kept_for_backward": work.saved_bytes()}
        table["kept_for_backward"] = table["activations"]
    else:
        clock = PeakClock()
        work.step(1, clock)
        peaks = [peak for phase, peak in clock.peaks if phase != "encode"]
        measured = dict(zip(("in_rollout", "in_training", "in_update"), peaks))
        figures.update(seconds_by_phase=clock.seconds)
    ratios = {name: round(measured[name] / table[name], 3) for name in measured}
    figures.update(measured=measured, computed=table, ratios=ratios)
    good = all(0.9 <= ratio <= 1.1 for ratio in ratios.values())
    return figures, f"{'ok' if good else 'look'}: measured over computed {ratios}"


# --------------------------------------------------------------------------------------------------
# several GPUs, and bench.py

TORCHRUN = "torchrun --standalone --nproc_per_node="
TWO = [
    TORCHRUN + "2 train.py --sp=1 --dtype=bfloat16 --out_dir=out-dp",
    TORCHRUN + "2 train.py --stage2=true --fsdp=true --dtype=bfloat16 --out_dir=out-stage2",
    "python bench.py --model=3b --frames=256 --size=308 --completion=512 --checkpointing=1 --sp=2 "
    "--variant=shared,shared+sp --cache=warm"]
EIGHT = [TORCHRUN + "8 train.py --model=Qwen/Qwen2.5-VL-7B-Instruct --sp=4 --stage2=true "
         "--fsdp=true --frames=256 --dtype=bfloat16 --lr=1e-6 --sft_lr=1e-5 --sft_steps=2 "
         "--rl_steps=4 --save_every=2 --checkpointing=true --rollout=vllm --out_dir=out-7b"]
BY_HAND = {
    "two_gpus": (2, TWO, "accuracy and sampler_gap are as on one GPU; stage 2 has the gradient "
                         "norms of shared; kill a rank: the other ends with one line"),
    "eight_gpus": (8, EIGHT, "seconds by phase in metrics.jsonl; seconds of saving; whether the "
                             "same command resumes after it was killed")}


def bench_row(row):
    """A row of bench.py: a step from the video's pixels to the update."""
    measured = bench.measure(row)
    return measured, (f"ok: {measured['seconds']} s a step; training reaches "
                      f"{measured['peak_share']} of the GPU's peak; {measured['peak_mb']} MB")


# --------------------------------------------------------------------------------------------------
# all parts

# The function of each part, and the frames of its video.
PARTS = {
    "attention": (first_gpu_kernels.attention, 64), "memory": (memory_part, 256),
    "kernels": (first_gpu_kernels.kernels, 256),
    "weights": (first_gpu_vllm.weights, 64), "first_runner": (first_gpu_vllm.first_runner, 64),
    "sleep": (first_gpu_vllm.sleep, 64), "two_gpus": None, "eight_gpus": None,
    "bench64": (bench_row, 64), "bench256": (bench_row, 256), "bench512": (bench_row, 512)}


def why_not(name, size):
    """Why a part cannot run here; empty if it can."""
    if name in ("weights", "first_runner", "sleep") and not find_spec("vllm"):
        return "vLLM is not installed"
    if not torch.cuda.is_available() and (size != "tiny" or name in ("first_runner", "sleep")):
        return "there is no GPU"
    return ""


def run_part(name, options):
    """-> (figures, verdict) of a part, run in a process of its own."""
    if name in BY_HAND:
        needed, commands, look_at = BY_HAND[name]
        text = "\n    ".join([*commands, f"look at: {look_at}"])
        gpus = torch.cuda.device_count()
        reason = "run by hand" if gpus >= needed else f"it needs {needed} GPUs, and {gpus} are here"
        return {"commands": commands}, f"skipped: {reason}:\n    {text}"
    reason = why_not(name, options.size)
    if reason:
        return {}, f"skipped: {reason}"
    try:
        part, frames = PARTS[name]
        return spawn(1, part, row_of(options.size, frames))
    except (ValueError, mp.ProcessRaisedException) as e:
        return {"error": str(e)}, f"failed: {str(e).strip().splitlines()[-1]}"


def main():
    options = command_line.parse(Options, __doc__, sys.argv[1:])
    if options.size not in ("3b", "tiny"):
        raise ValueError(f"--size={options.size}: it is 3b or tiny")
    for name in options.parts:
        if name not in PARTS:
            raise ValueError(f"--parts={name}: it is {', '.join(PARTS)}")
    failed = []
    for name in options.parts:
        begin = time.perf_counter()
        figures, verdict = run_part(name, options)
        seconds = round(time.perf_counter() - begin, 1)
        print(f"{name}, {seconds} s: {verdict}", flush=True)
        line = {"part": name, "size": options.size, "verdict": verdict, "took_s": seconds}
        with open(options.out, "a") as f:
            f.write(json.dumps({**figures, **line}) + "\n")
        if verdict.startswith("failed"):
            failed.append(name)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_command("first_gpu_hour.py", main)
