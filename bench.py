"""
What each idea of the method buys, measured: whole GRPO steps on one long video, from its pixels
to the optimizer's update.

  naive       each completion encodes the video, prefills it, encodes it again, and has a forward
              and backward of its own; only decoding is one batch
  reuse       the video is encoded once and kept; the rest is still done per completion
  shared      encode once, prefill once, and one forward and backward over the packed sequence
              [prefix | completion 1 | ... | completion G]
  shared+sp   the same over --sp ranks: each encodes its frames, samples its completions, and
              holds its part of the packed sequence

    python bench.py                                               the tiny model, 64 frames
    python bench.py --model=DIR --frames=64,128,256 --size=168 --plot=bench.png

With a cold cache the video is encoded in every timed step; with a warm one its vision tokens are
there already. naive and reuse run at the smallest --sp, each rank with its part of the completions;
shared runs at every --sp (above 1: only stage 1), shared+sp at those above 1. All variants use the
same attention, head and random numbers and end with the same gradient: they differ in what they
compute twice. A row is one JSON line, at the end a table shows all; each is run in processes of its
own, so that its peak memory is its own.

  --model=3b, 7b    Qwen2.5-VL in its real shapes, with random weights made on the device: for
                    speed and memory, without a download
  --memory=7b       no step: the memory that each part of one takes on a GPU, in bfloat16, by
                    --frames and --sp; also 2b, 4b, 8b (Qwen3-VL), 9b (GLM), tiny, a directory

    python bench.py --model=3b --frames=64,256 --size=308 --completion=512 --checkpointing=1 \\
        --variant=shared --sp=1
    python bench.py --memory=3b --frames=64,256,512,1024,3600 --size=308 --completion=512 \\
        --sp=1,8 --checkpointing=1

Two frames share vision tokens of 28 x 28 pixels: a frame of 308 x 308 pixels is 60.5 of them.
"""
import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.distributed as dist

import encode
import grpo
import model as vlm
import rollout
from flow import Ranks, Video
from plumbing import command_line, flops, memory
from plumbing.metrics import Clock, peak_bytes
from plumbing.optimizer import make_optimizer, update
from plumbing.plots import bench_table, draw_bench
from plumbing.ranks import gather, run_command, shard, spawn, start
from plumbing.sharding import check_heads, recompute_layers
from plumbing.tiny import build_tiny
from plumbing.vllm_engine import start_engine

VARIANTS = ("naive", "reuse", "shared", "shared+sp")
KEYS = ("variant", "cache", "frames", "size", "group", "completion", "sp", "rollout",
        "prompt_tokens", "lm_tokens", "encodes", "seconds", "encode_s", "rollout_s", "train_s",
        "saved_mb", "peak_mb", "device", "train_tflop", "peak_share")              # of a JSON line
LR = 1e-6                                                  # of the update at the end of a step


@dataclass
class Options:
    model: str = "tiny"            # tiny, 3b, 7b, a checkpoint directory, or a hub name
    frames: list[int] = field(default_factory=lambda: [64])  # of the video; comma-separated
    size: int = 112                # pixels, both sides of a frame
    group: int = 8                 # G completions
    completion: int = 32           # L, the exact number of tokens of each completion
    sp: list[int] = field(default_factory=lambda: [1, 2])  # ranks per video, started here
    variant: list[str] = field(default_factory=lambda: ["naive", "reuse", "shared", "shared+sp"])
    cache: list[str] = field(default_factory=lambda: ["cold", "warm"])
    checkpointing: int = 0         # 1: recompute decoder layers in the backward
    dtype: str = ""                # float32 or bfloat16; empty: float32 on CPUs, bfloat16 on GPUs
    rollout: list[str] = field(default_factory=lambda: ["torch"])  # also vllm, for shared
    threads: int = 1               # CPU threads per rank
    steps: int = 3                 # timed steps; seconds are their median
    warmup: int = 1                # untimed steps before those; they do not fill the cache
    seed: int = 0
    plot: str = ""                 # draw seconds per step against frames to this file
    memory: str = ""               # compute the memory of this model instead of running steps
    shards: int = 1                # for --memory: ranks that FSDP shards over (train.py --fsdp)
    lora_rank: int = 0             # for --memory: train only adapters of this rank


ALLOWED = {"variant": VARIANTS, "cache": ("cold", "warm"), "rollout": ("torch", "vllm"),
           "checkpointing": (0, 1), "dtype": ("", "float32", "bfloat16")}
AT_LEAST = {"frames": 1, "size": 1, "group": 1, "completion": 1, "sp": 1, "threads": 1,
            "steps": 1, "warmup": 0, "shards": 1, "lora_rank": 0}


def values_of(options, name):
    """The values of an option, as a list also where it takes only one."""
    value = getattr(options, name)
    return value if isinstance(value, list) else [value]


def parse(arguments):
    """--key=value arguments. -> `Options`. Raises ValueError for what cannot be run."""
    options = command_line.parse(Options, __doc__, arguments)
    for name, allowed in ALLOWED.items():
        for value in values_of(options, name):
            if value not in allowed:
                raise ValueError(f"--{name}={value}: it is {' or '.join(map(str, allowed))}")
    for name, least in AT_LEAST.items():
        if min(values_of(options, name)) < least:
            raise ValueError(f"--{name} must be at least {least}")
    known = options.memory in memory.NAMES or os.path.isdir(options.memory)
    if options.memory and not known:
        raise ValueError(f"--memory={options.memory}: it is {', '.join(memory.NAMES)} "
                         "or a checkpoint directory")
    if options.lora_rank and (options.shards > 1 or not options.memory):
        raise ValueError("--lora_rank is for --memory, without --shards")
    if any(options.group % sp for sp in options.sp):
        raise ValueError(f"--group={options.group} is not divisible by every --sp: "
                         "each rank samples its share")
    gpus, most = torch.cuda.device_count(), max(options.sp)
    if not options.memory and 0 < gpus < most:
        raise ValueError(f"--sp={most} needs as many GPUs, and there are {gpus}")
    return options


def rows_to_run(options):
    """The `Options` of each row: one value in the place of each list."""
    for frames, variant, sp, cache, engine in product(
            options.frames, options.variant, options.sp, options.cache, options.rollout):
        per_completion = variant in ("naive", "reuse")
        if variant == "shared+sp" and sp == 1:             # that is shared
            continue
        if per_completion and (sp > min(options.sp) or engine == "vllm"):
            continue
        if variant == "naive" and cache == "warm":         # naive keeps nothing
            continue
        yield replace(options, frames=frames, variant=variant, sp=sp, cache=cache, rollout=engine)


# --------------------------------------------------------------------------------------------------
# one GRPO step

def noise_video(frames, size, seed=0):
    """A `Video` of noise. A frame is made when it is read, from its own number: an hour of video
    costs no memory."""
    def read(lo, hi):
        numbers = [np.random.default_rng((seed, t)) for t in range(lo, hi)]
        return np.stack([rng.integers(0, 256, (size, size, 3), np.uint8) for rng in numbers])

    return Video("noise", frames, size, size, 1.0, read)


def load(name, device, dtype, seed):
    """As `model.load`; 3b and 7b have random weights, made where and as they stay. Their tokenizer
    is the tiny model's, whose ids are the first of theirs."""
    if name not in memory.SHAPES:
        return vlm.load(name, device, dtype, seed=seed)
    tiny, tokenizer, pixels = build_tiny(seed)
    config = tiny.config.to_dict()
    special_ids = {key: config[key] for key in config if key.endswith("_token_id")}
    model = memory.random_model(name, special_ids, device, dtype, seed)
    model.set_attn_implementation(vlm.ATTENTION)
    model.generation_config, model.pixels = tiny.generation_config, pixels
    return model.eval(), tokenizer


def start_vllm(row, model, tokenizer, ranks):
    """The vLLM engine, with room for the video, the question and a completion."""
    with tempfile.TemporaryDirectory() as folder:          # it starts from a directory
        vlm.save(model, tokenizer, folder)
        length = memory.vision_tokens(model.config, row.frames, row.size) + 512 + row.completion
        return start_engine(folder, model, tokenizer, ranks, length)


def forward_backward(model, prompt, completions, advantages, ranks, banned, divisor, stage2):
    """Forward and backward of the GRPO objective over this rank's share of a group: G / sp of its
    completions, or with stage 2 1 / sp of the packed sequence of all. Gradients are left to be
    summed over the ranks. -> the largest gap between sampler and trainer, in log-prob

    completions: G of L tokens each; advantages: float32 [G]; divisor: of the whole step.
    """
    if not stage2:
        lo, hi = shard(len(completions), ranks.sp_rank, ranks.sp)
        completions, advantages = completions[lo:hi], advantages[lo:hi]
        ranks = Ranks(device=ranks.device)
    tokens = [completion.tokens for completion in completions]
    logprobs, _ = vlm.logprobs(model, [prompt], [tokens], banned, ranks=ranks)           # [G, L]
    sampler_logprobs = torch.stack([c.logprobs for c in completions]).to(ranks.device)   # [G, L]
    sampled = torch.stack([c.sampled for c in completions]).to(ranks.device)             # [G, L]
    loss, _ = grpo.policy_loss(logprobs, sampler_logprobs, advantages.to(ranks.device), sampled,
                               clip_low=0.2, clip_high=0.28, average="sample", divisor=divisor)
    loss.backward()
    return float((logprobs.detach() - sampler_logprobs)[sampled].abs().max())


def count_forwards(model, counts):
    """Add to counts the positions and the temporal patches that the model computes, from now on."""
    def count_positions(module, args, inputs):
        counts["lm_tokens"] += inputs["inputs_embeds"].shape[:2].numel()

    def count_temporal_patches(module, args, inputs):
        counts["temporal_patches"] += int(inputs["grid_thw"][:, 0].sum())

    language_model, tower = model.model.language_model, model.model.visual
    language_model.register_forward_pre_hook(count_positions, with_kwargs=True)
    tower.register_forward_pre_hook(count_temporal_patches, with_kwargs=True)


class Workload:
    """A model, a video, and one GRPO step on it by the variant of a row."""

    def __init__(self, row, ranks):
        self.row, self.ranks = row, ranks
        self.alone = Ranks(device=ranks.device)            # to do something without the others
        self.stage2 = row.variant == "shared+sp"
        self.advantages = 1.0 - 2.0 * (torch.arange(row.group) % 2)    # fixed: G = 1 trains too
        dtype = row.dtype or ("float32" if ranks.device == "cpu" else "bfloat16")
        self.model, self.tokenizer = load(row.model, ranks.device, getattr(torch, dtype), row.seed)
        pixels = self.model.pixels
        side = pixels.patch * pixels.merge
        if row.size % side:
            raise ValueError(f"--size={row.size}: a side must be a multiple of {side} pixels, "
                             "one vision token")
        pixels.min_pixels = pixels.max_pixels = row.size ** 2      # frames are not resized
        if self.stage2:
            check_heads(self.model.config.text_config, ranks)
        self.model.model.visual.requires_grad_(False)
        if row.checkpointing:
            recompute_layers(self.model)
        self.optimizer = make_optimizer(self.model, LR)
        self.banned = vlm.banned_ids(self.model, self.tokenizer)
        # No completion may end before it has L tokens. Ids beyond the tokenizer's have no text, and
        # need none here: to ban a named shape's 150,000 is more than vLLM takes.
        self.banned[vlm.stop_ids(self.model, self.tokenizer)] = True
        self.banned[len(self.tokenizer):] = False
        self.cache = encode.Cache()
        self.engine = None
        if row.rollout == "vllm":
            self.engine = start_vllm(row, self.model, self.tokenizer, ranks)
        self.counts = {"lm_tokens": 0, "temporal_patches": 0}      # what the model has computed
        count_forwards(self.model, self.counts)

    def encode_video(self, ranks):
        """The video's vision tokens, computed. -> as `model.encode_video`"""
        video = noise_video(self.row.frames, self.row.size, self.row.seed)
        return vlm.encode_video(self.model, lambda: video, ranks)

    def prompt(self):
        """The `Prompt`. naive encodes the video for it; the others do so once and keep it."""
        if self.row.variant == "naive":
            encoded = self.encode_video(self.alone)
        else:
            encoded = self.cache.get("noise", lambda: self.encode_video(self.ranks))
        question = "What is seen, and when?"
        prompt = vlm.make_prompt(self.model, self.tokenizer, question, *encoded, key="noise")
        vlm.check_length(self.model, prompt, self.row.completion)
        return prompt

    def parts(self):
        """The completions that share a prompt, by their numbers in the group. -> (parts, ranks
        that work on each of them together)"""
        G = self.row.group
        if self.row.variant in ("shared", "shared+sp"):
            return [list(range(G))], self.ranks
        lo, hi = shard(G, self.ranks.sp_rank, self.ranks.sp)
        return [[n] for n in range(lo, hi)], self.alone

    def step(self, number, clock, watch=nullcontext):
        """One GRPO step. -> {prompt_tokens, norm, gap}

        number: the step's, for its random numbers; clock: a `Clock`, for the seconds of each
        phase; watch(): a context in which each forward and backward runs.
        """
        row = self.row
        if row.cache == "cold":
            self.cache = encode.Cache()
        parts, ranks = self.parts()
        with clock("encode"):
            prompts = [self.prompt() for _ in parts]
        with clock("rollout"):
            keys = []
            for part in parts:
                keys.append([(row.seed, "bench", number, n) for n in part])
            one_batch = sum(len(prompt.ids) for prompt in prompts)
            groups = rollout.rollout(
                self.model, self.tokenizer, prompts, keys, ranks, one_batch, self.stage2,
                self.engine, think_budget=0, answer_budget=row.completion, banned=self.banned,
                forced="")
        gaps = []
        for part, prompt, completions in zip(parts, prompts, groups):
            if row.variant == "naive":
                with clock("encode"):
                    prompt = self.prompt()
            with clock("train"), watch():
                gaps.append(forward_backward(
                    self.model, prompt, completions, self.advantages[part], ranks, self.banned,
                    row.group, self.stage2))
        with clock("train"):
            norm = update(self.model, self.optimizer, LR, self.ranks)
        return {"prompt_tokens": len(prompts[0].ids), "norm": norm, "gap": max(gaps)}

    def saved_bytes(self):
        """Bytes that a forward keeps for its backward, the most of a step's forwards."""
        totals = []
        self.step(-1, Clock(), partial(memory.saved_for_backward, self.model, totals))
        return max(totals)


# --------------------------------------------------------------------------------------------------
# one row

def timed_step(work, number):
    """A step, with this rank's seconds by phase and what its model computed. -> dict"""
    work.counts.update(lm_tokens=0, temporal_patches=0)
    if work.ranks.world > 1:
        dist.barrier()
    phases, whole = Clock(), Clock()
    with whole("seconds"):
        result = work.step(number, phases)
    for phase, seconds in phases.seconds.items():
        result[phase + "_s"] = seconds
    return {**result, **whole.seconds, **work.counts}


def measure(row):
    """One row, in this process and the other ranks of its own. -> {key: value}: those of KEYS,
    and norm, gap, lm_by_rank and peak_by_rank for the table"""
    torch.set_num_threads(row.threads)
    ranks = start(row.sp)
    work = Workload(row, ranks)
    if row.cache == "warm":
        work.prompt()
    steps = [timed_step(work, number) for number in range(row.warmup + row.steps)]
    last = steps[-1]
    own = {"lm_tokens": last["lm_tokens"], "temporal_patches": last["temporal_patches"],
           "gap": max(step["gap"] for step in steps),
           "peak": peak_bytes() / 2 ** 20, "saved": work.saved_bytes() / 2 ** 20}
    every = gather(own, ranks)
    by_rank = {key: [values[key] for values in every] for key in own}
    seconds = {}
    for key in ("seconds", "encode_s", "rollout_s", "train_s"):
        seconds[key] = statistics.median(step[key] for step in steps[row.warmup:])
    # The FLOPs of the shared variants, however often another one makes them.
    flop = flops.train_flops(work.model.config, last["prompt_tokens"], row.group, row.completion)
    device = torch.cuda.get_device_name() if ranks.device != "cpu" else "cpu"
    temporal_patches = -(-row.frames // work.model.pixels.temporal)
    return {
        "variant": row.variant, "cache": row.cache, "frames": row.frames, "size": row.size,
        "group": row.group, "completion": row.completion, "sp": row.sp, "rollout": row.rollout,
        "prompt_tokens": last["prompt_tokens"], "lm_tokens": sum(by_rank["lm_tokens"]),
        "encodes": round(sum(by_rank["temporal_patches"]) / temporal_patches, 3),
        **{key: round(value, 4) for key, value in seconds.items()},
        "saved_mb": round(max(by_rank["saved"]), 1), "peak_mb": round(max(by_rank["peak"]), 1),
        "device": device, "train_tflop": round(flop / 1e12, 4),
        "peak_share": flops.peak_share(flop / row.sp, seconds["train_s"], device),
        "norm": steps[0]["norm"], "gap": max(by_rank["gap"]),
        "lm_by_rank": by_rank["lm_tokens"], "peak_by_rank": by_rank["peak"]}


def run_row(row):
    """One row, in processes of its own. -> what `measure` returned. Raises ValueError with what
    ended it."""
    try:
        return spawn(row.sp, measure, row)
    except ValueError as e:
        raise ValueError(f"{row.variant} on {row.frames} frames, sp = {row.sp}: {e}") from e


def run(options):
    """What options ask for: the memory table, or the measured rows."""
    if options.memory:
        print(memory.memory_table(memory.read_config(options.memory), options.frames, options.sp,
                                  options.size, options.group, options.completion,
                                  options.checkpointing, options.shards, options.lora_rank))
        return
    rows = []
    try:
        for row in rows_to_run(options):
            rows.append(run_row(row))
            print(json.dumps({key: rows[-1][key] for key in KEYS}), flush=True)
    finally:                                               # what was measured is always shown
        if rows:
            print("\n" + bench_table(rows), flush=True)
    if not rows:
        raise ValueError("nothing to run: naive has no warm cache, "
                         "and shared+sp needs --sp above 1")
    if options.plot:
        draw_bench(rows, options.plot)


def main():
    run(parse(sys.argv[1:]))


if __name__ == "__main__":
    run_command("bench.py", main)
