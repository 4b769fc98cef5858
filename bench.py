"""
What each idea buys, measured: whole GRPO steps on one long video, from its pixels to the optimizer's update.

  naive       per completion: encode the video, prefill, decode (all in one batch), encode again, one full pass
  reuse       the video is encoded once and kept; prefill and full pass still per completion
  shared      encode once, prefill once, one packed forward and backward over [prefix | completion 1 | ... | completion G]
  shared+sp   the same over --sp ranks: each encodes its frames, samples its completions, holds its part of the sequence

    python bench.py                                                        the tiny model, 64 frames
    python bench.py --model=DIR --frames=64,128,256 --size=168 --plot=bench.png

Cold: the video is encoded inside every timed step; warm: its vision tokens are there already. naive and reuse run at the
smallest --sp, each rank with its part of the completions; shared at every --sp (above 1: stage 1 alone), shared+sp above 1.
All use the same attention, head and random numbers, and end with the same gradient: they differ in what they compute twice.
Every row has processes of its own, so that its peak memory is its own. One JSON line a row, then a table.

  --model=3b, 7b    Qwen2.5-VL in its real shapes, random weights made on the device: for speed and memory, no download
  --memory=7b       no step: what each part of it takes on a GPU, in bfloat16, by --frames and --sp; also 9b (GLM-4.1V), or a directory

    python bench.py --model=3b --frames=64,256 --size=308 --completion=512 --checkpointing=1 --variant=shared --sp=1
    python bench.py --memory=3b --frames=64,256,512,1024,3600 --size=308 --completion=512 --sp=1,8 --checkpointing=1

Two frames share a temporal patch and a vision token covers 28 x 28 pixels: (size / 28)^2 / 2 tokens a frame, 60.5 at 308 pixels.
"""
import json
import os
import resource
import socket
import statistics
import sys
import tempfile
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModelForImageTextToText, Glm4vConfig, Qwen2_5_VLConfig

import data
import encode
import model as vlm
import rollout
import train
from plumbing.ranks import leave

VARIANTS = ("naive", "reuse", "shared", "shared+sp")
KEYS = ("variant", "cache", "frames", "size", "group", "completion", "sp", "rollout", "prompt_tokens", "lm_tokens", "encodes",
        "seconds", "encode_s", "rollout_s", "train_s", "saved_mb", "peak_mb", "device", "train_tflop", "peak_share")
SETTINGS = {                         # a list takes several, with commas between
    "model": "tiny",                 # 3b, 7b, a checkpoint directory, or a hub name
    "frames": [64],                  # of the video; several, with commas, for --plot
    "size": 112,                     # pixels, both sides of a frame
    "group": 8, "completion": 32,    # G completions of exactly L tokens
    "sp": [1, 2],                    # ranks that share the video, started from here
    "variant": list(VARIANTS),
    "cache": ["cold", "warm"],
    "checkpointing": 0,              # 1: decoder layers are computed again in the backward
    "compile": 0,                    # 1: decoder layers through torch.compile in training, once in warmup
    "dtype": "",                     # float32 or bfloat16; empty: float32 on CPUs, bfloat16 on GPUs
    "rollout": ["torch"],            # the engine; vllm too, where it is installed, for shared
    "threads": 1,                    # of each rank
    "steps": 3, "warmup": 1,         # timed (seconds are their median), and before; none of these warms the cache
    "seed": 0, "plot": "",           # plot: a file, seconds a step against frames
    "memory": "", "shards": 1,       # the memory table of a model alone; shards: ranks that share its parameters (train.py --fsdp=true)
}
# Qwen2.5-VL as published: of its config.json what is not transformers' default.
SHAPES = {name: {"text_config": dict(hidden_size=D, intermediate_size=F, num_hidden_layers=n, num_attention_heads=heads,
                                     num_key_value_heads=kv, vocab_size=V, tie_word_embeddings=tie, max_position_embeddings=128000,
                                     rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
                 "vision_config": dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=D, tokens_per_second=2),
                 "tie_word_embeddings": tie}
          for name, D, F, n, heads, kv, V, tie in (("3b", 2048, 11008, 36, 16, 2, 151936, True), ("7b", 3584, 18944, 28, 28, 4, 152064, False))}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}     # bfloat16, dense, of the SXM boards


def noise_video(frames, size, seed=0):
    """A video whose frames are made when they are read, each from its own number: an hour of it costs no memory."""
    def read(lo, hi):
        return np.stack([np.random.default_rng((seed, t)).integers(0, 256, (size, size, 3), np.uint8) for t in range(lo, hi)])
    return data.Video("noise", frames, size, size, 1.0, read)


def load(name, device, dtype, seed):
    """As `model.load`, and for 3b and 7b random weights, made where and as they stay; with the tiny model's tokenizer, whose ids are
    the first of theirs: the others are banned, at the same cost."""
    if name not in SHAPES:
        return vlm.load(name, device, dtype, seed=seed)
    tiny, tokenizer, pixels = vlm.build_tiny(seed)
    ids = {k: v for k, v in tiny.config.to_dict().items() if k.endswith("_token_id")}
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(**SHAPES[name], **ids)
    config.text_config.max_position_embeddings = 1 << 20   # random weights were made for no length
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.set_attn_implementation(vlm.ATTENTION)
    model.generation_config, model.pixels = tiny.generation_config, pixels
    return model.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# counted from the shapes

def sizes(config):
    """What the counts below need of a model. D: features, F: the MLP's, n: layers, d: of a head, V: vocabulary."""
    c = config.text_config
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return SimpleNamespace(D=c.hidden_size, F=c.intermediate_size, n=c.num_hidden_layers, H=c.num_attention_heads,
                           kv=c.num_key_value_heads, d=d, V=c.vocab_size, norms=4 if config.model_type == "glm4v" else 2)


def train_flops(config, prompt, group, completion):
    """Of forward and backward of a group's packed sequence, what cannot be left out: pairs that see each other, no layer twice."""
    m, C = sizes(config), completion - 1
    weights = m.D * m.d * (2 * m.H + 2 * m.kv) + 3 * m.D * m.F                 # of one layer's matrices
    pairs = prompt ** 2 / 2 + group * (C * prompt + C ** 2 / 2)
    once = m.n * ((prompt + group * C) * weights + 2 * m.H * m.d * pairs) + group * completion * m.D * m.V
    return 3 * 2 * once                                    # a multiplication and an addition; the backward is two such products


def memory(config, frames, size, group, completion, dtype=torch.bfloat16, sp=1, checkpointing=0, shards=1, text=64):
    """Bytes on one rank in a GRPO step on one video, as `Work` does it by shared, with sp > 1 by shared+sp. Pure arithmetic.

    text: tokens of the prompt besides the vision tokens; shards: ranks over which FSDP2 spreads what trains, in float32.
    -> {part: bytes}; the last are the most at once: in the rollout, in forward and backward, in the update, in any of them
    """
    m, see, b, up = sizes(config), config.vision_config, dtype.itemsize, lambda n: -(-n // sp) * sp
    with torch.device("meta"):                             # shapes without numbers: every parameter is counted, none is made
        model = AutoModelForImageTextToText.from_config(type(config).from_dict(config.to_dict()))
    count = lambda part: sum(p.numel() for p in part.parameters())
    tower, N, layer = (count(x) for x in (model.model.visual, model, model.model.language_model.layers[0]))
    N -= tower
    vision = -(-frames // see.temporal_patch_size) * (size // (see.patch_size * see.spatial_merge_size)) ** 2
    P, C = up(vision + text), up(group * (completion - 1))
    S, head = (P + C) // sp, min(2048, -(-group * completion // sp))           # positions of this rank; rows of a chunk of its head
    own = 4 / shards if shards > 1 else b                  # of a parameter
    r = {"weights": tower * b + N * own, "gradients": N * own, "optimizer": N * (8 / shards + 4 * (b < 4 and shards == 1)),
         "vision": vision * m.D * b, "prefix_kv": 2 * m.n * m.kv * m.d * P * b,
         "completion_kv": 2 * m.n * m.kv * m.d * group // sp * completion * b}
    # Saved by a layer: each norm its input in float32, its scale and its normalised input; what goes into projections; queries,
    # keys, values and outcome of attention; four of the MLP. Stage 2 repeats keys and values that are fewer heads than ranks.
    norm = 4 * m.D + 4 + b * m.D
    saved = S * (m.norms * norm + b * (2 * m.D + 3 * m.H * m.d + 2 * max(m.kv, sp) * m.d + 4 * m.F) + 4 * m.H)
    r["activations"] = m.n * (S * m.D * b if checkpointing else saved) + S * norm + group * completion * m.D * b // sp
    r["activations"] += 0 if checkpointing else 2 * S * m.d * b                # cosines and sines: of all layers once
    step = max(1, (1 << 24) // (P + C))                                        # as model.Packed cuts them; the whole on every rank
    r["masks"] = sum((min(lo + step, C) - lo) * (P + min(lo + step, C)) for lo in range(0, C, step)) * b
    # Made and dropped again: one layer's MLP in the prefill, or a decoding step's probabilities; three float32 copies of a chunk's
    # logits; under checkpointing one layer as without it. Of sharded parameters, all gathered to sample; to train embeddings, head and
    # its gradient, and beside them this layer, the next, and a gradient in float32 on its way; at the end those of embeddings and head.
    r["sampling"] = max(P // sp * (3 * m.F + 4 * m.D + 2 * m.d) * b, 28 * group // sp * m.V)
    r["head"], r["layer"] = 12 * head * m.V, (saved if checkpointing else 0) + S * 2 * (m.F - m.D) * b
    if config.tie_word_embeddings and shards == 1:         # the head's gradient waits for the embeddings'
        r["layer"] += m.V * m.D * b
    ends = N - m.n * layer
    every, head, one, last = (N * b, (ends + m.V * m.D) * b, layer * (2 * b + 4), ends * (2 * b + 4)) if shards > 1 else (0, 0, 0, 0)
    always = r["weights"] + r["optimizer"] + r["vision"]
    r["in_rollout"] = always + every + r["prefix_kv"] + r["completion_kv"] + r["sampling"]
    r["in_training"] = always + r["gradients"] + max(last, r["activations"] + r["masks"] + head + max(r["head"], r["layer"] + one))
    r["in_update"] = always + N * 4 / shards               # gradients in float32, which replace the others one by one
    return {k: int(v) for k, v in r.items()} | {"most": int(max(r["in_rollout"], r["in_training"], r["in_update"]))}


def memory_table(a):
    """Text: `memory` of a.memory in GB, a line for each of a.frames and a.sp."""
    config = (Glm4vConfig() if a.memory == "9b" else vlm.build_tiny()[0].config if a.memory == "tiny" else
              Qwen2_5_VLConfig(**SHAPES[a.memory]) if a.memory in SHAPES else AutoConfig.from_pretrained(a.memory))
    lines, see = [], config.vision_config
    for sp, frames in product(a.sp, a.frames):
        r = memory(config, frames, a.size, a.group, a.completion, sp=sp, checkpointing=a.checkpointing, shards=a.shards)
        line = f"{frames:>6} {sp:>2} " + " ".join(f"{r[k] / 1e9:>{len(k)}.2f}" for k in r)
        over = r["vision"] // (2 * see.out_hidden_size) + a.completion > config.text_config.max_position_embeddings
        lines.append(line + " more tokens than the model was made for" * over)
    return "\n".join([f"GB on a rank, bfloat16, G = {a.group}, L = {a.completion}, shards = {a.shards}, checkpointing = {a.checkpointing}",
                      "frames sp " + " ".join(r), *lines])


# ---------------------------------------------------------------------------------------------------------------------
# measured

class Work:
    """A model, a video, and one GRPO step on it by the variant of a, the settings of a row."""

    def __init__(self, a, ranks):
        self.a, self.ranks, self.alone = a, ranks, encode.Ranks(device=ranks.device)
        dtype = a.dtype or ("float32" if ranks.device == "cpu" else "bfloat16")
        self.model, self.tokenizer = load(a.model, ranks.device, getattr(torch, dtype), a.seed)
        px, inner, text = self.model.pixels, self.model.model, self.model.config.text_config
        if a.size % (px.patch * px.merge):
            raise ValueError(f"--size={a.size}: a side must be a multiple of {px.patch * px.merge} pixels, one vision token")
        px.min_pixels = px.max_pixels = a.size ** 2        # frames stay as they are
        if a.variant == "shared+sp":
            encode.check_heads(text.num_attention_heads, text.num_key_value_heads, ranks)
        inner.visual.requires_grad_(False)
        if a.checkpointing:
            vlm.recompute_layers(self.model)
        if a.compile:
            vlm.compile_layers(self.model)
        self.optimizer = train.make_optimizer(self.model, 1e-6)
        self.banned = vlm.banned_ids(self.model, self.tokenizer)
        self.banned[vlm.stop_ids(self.model, self.tokenizer)] = True           # so that a completion has exactly L tokens
        self.cache, self.count, self.engine = encode.Cache(), Counter(), None
        if a.rollout == "vllm":                            # it starts from a directory; its room: vision tokens, question, answer
            length = -(-a.frames // px.temporal) * (a.size // (px.patch * px.merge)) ** 2 + 512 + a.completion
            with tempfile.TemporaryDirectory() as folder:
                vlm.save(self.model, self.tokenizer, folder)
                self.engine = rollout.start_engine(folder, self.model, self.tokenizer, ranks, length)
        count = self.count.update                          # adds
        for module, hook in ((inner.language_model, lambda m, a, x: count(lm=x["inputs_embeds"].shape[:2].numel())),
                             (inner.visual, lambda m, a, x: count(temporal=int(x["grid_thw"][:, 0].sum())))):
            module.register_forward_pre_hook(hook, with_kwargs=True)

    def see(self):
        """The prompt: from the video anew (naive), or from what is kept."""
        look = lambda ranks: vlm.encode_video(self.model, lambda: noise_video(self.a.frames, self.a.size, self.a.seed), ranks)
        seen = look(self.alone) if self.a.variant == "naive" else self.cache.get("noise", lambda: look(self.ranks))
        prompt = vlm.make_prompt(self.model, self.tokenizer, "What is seen, and when?", *seen, key="noise")
        vlm.check_length(self.model, prompt, self.a.completion)
        return prompt

    def step(self, number, clock, watched=lambda work: work()):
        """One GRPO step. watched(work) is called to do each forward and backward. -> {prompt_tokens, norm, gap}"""
        a, G, banned, gap = self.a, self.a.group, self.banned, 0.0
        keys = [(a.seed, "bench", number, n) for n in range(G)]
        advantages = 1.0 - 2.0 * (torch.arange(G) % 2)                         # fixed, so that G = 1 runs too
        if a.cache == "cold":
            self.cache = encode.Cache()
        parts, ranks = [list(range(G))], self.ranks                            # of the group: all of it at once, or ...
        if a.variant in ("naive", "reuse"):                                    # ... each completion for itself
            parts, ranks = [[n] for n in range(*encode.shard(G, self.ranks.sp_rank, self.ranks.sp))], self.alone
        with clock("encode"):
            prompts = [self.see() for _ in parts]
        with clock("rollout"):                                                 # each prompt with keys and values of its own
            answers = rollout.rollout(self.model, self.tokenizer, prompts, [[keys[n] for n in part] for part in parts], ranks,
                                      sum(len(p.ids) for p in prompts), a.variant == "shared+sp", self.engine, think_budget=0,
                                      answer_budget=a.completion, banned=banned, forced="")
        for part, prompt, completions in zip(parts, prompts, answers):
            with clock("encode"):
                prompt = self.see() if a.variant == "naive" else prompt
            with clock("train"):
                c = train.Config(group_size=len(part), stage2=a.variant == "shared+sp")
                group = train.Group(0, None, prompt, completions, None, advantages[part])
                gap = max(gap, watched(lambda: train.grpo_step(self.model, [group], c, ranks, banned, G))["gap_max"])
        with clock("train"):
            norm = train.update(self.model, self.optimizer, 1e-6, self.ranks)
        return {"prompt_tokens": len(prompts[0].ids), "norm": norm, "gap": gap}

    def saved_bytes(self):
        """What a forward keeps for its backward, each storage once, parameters excluded; the most of a step's forwards."""
        own, passes = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, []

        def watched(work):
            kept = {}

            def pack(x):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x.detach()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = work()
            passes.append(sum(n for at, n in kept.items() if at not in own))
            return result

        self.step(-1, train.Clock(), watched)
        return max(passes)


def measure(a):
    """One row, in this process and the other ranks of its own. -> the row, and what the table says beside it"""
    torch.set_num_threads(a.threads)
    ranks = encode.start(a.sp)
    work, steps, cuda = Work(a, ranks), [], ranks.device != "cpu"
    if a.cache == "warm":
        work.see()
    for number in range(a.warmup + a.steps):
        work.count.clear()
        if ranks.world > 1:
            dist.barrier()
        clock, whole = train.Clock(), train.Clock()
        with whole("seconds"):
            result = work.step(number, clock)
        steps.append(Counter(result | work.count | whole.seconds | {k + "_s": v for k, v in clock.seconds.items()}))
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps[-1].update(gap_max=max(s["gap"] for s in steps), peak=peak / 2 ** 20, saved=work.saved_bytes() / 2 ** 20)
    every = train.gather(steps[-1], ranks)
    of = lambda key: [r[key] for r in every]
    medians = {k: statistics.median(s[k] for s in steps[a.warmup:]) for k in KEYS[11:15]}        # seconds
    flops = train_flops(work.model.config, result["prompt_tokens"], a.group, a.completion)         # however often a variant makes them
    best = next((v for k, v in PEAK_FLOPS.items() if cuda and k in torch.cuda.get_device_name()), None)
    return {**{k: getattr(a, k) for k in KEYS[:8]}, "prompt_tokens": result["prompt_tokens"], "lm_tokens": sum(of("lm")),
            "encodes": round(sum(of("temporal")) / -(-a.frames // work.model.pixels.temporal), 3),
            **{k: round(seconds, 4) for k, seconds in medians.items()},
            "saved_mb": round(max(of("saved")), 1), "peak_mb": round(max(of("peak")), 1),
            "device": torch.cuda.get_device_name() if cuda else "cpu", "train_tflop": round(flops / 1e12, 4),
            "peak_share": best and round(flops / medians["train_s"] / best / a.sp, 4),
            "norm": steps[0]["norm"], "gap": max(of("gap_max")), "lm_by_rank": of("lm"), "peak_by_rank": of("peak")}


def one_rank(rank, a, port, results):
    """A process of one row."""
    if a.sp > 1:                                           # what torchrun would say
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(a.sp), LOCAL_WORLD_SIZE=str(a.sp),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        row = measure(a)
        if rank == 0:
            results.put(row)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        results.put(str(e))
        os._exit(1)                                        # as train.py does
    leave()


def run_row(a):
    """Start one row's ranks and wait. -> what `measure` returned; raises ValueError with what stopped it"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(one_rank, (a, port, results), nprocs=a.sp)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as e:
        if results.empty():                                # none could say why: a bug, or killed, for memory most likely
            if isinstance(e, mp.ProcessRaisedException):
                raise
            raise ValueError(f"{a.variant} on {a.frames} frames, sp = {a.sp}: {e}") from e
    if isinstance(row := results.get(), str):
        raise ValueError(row)
    return row


def table(rows):
    """Text, one line a row, with ratios to the first row of the same frames."""
    line = "{:>6}  {:9}  {:5} {:6} {:>2} {:>7} {:>8} {:>6} {:>7} {:>7} {:>6} {:>7} {:>7} {:>15} {:>5} {:>7} {:>9} {:>5} {:>11} {:>6}  {}".format
    head = "frames variant cache engine sp P s/step faster encode rollout tok/s train of_peak LM_tokens fewer encodes saved_MB less peak_MB gap norm"
    lines, base = [line(*head.split())], {}
    for r in rows:
        b = base.setdefault(r["frames"], r)
        faster, fewer, less = (f"{b[k] / r[k]:.1f}x" for k in ("seconds", "lm_tokens", "saved_mb"))
        lines.append(line(r["frames"], r["variant"], r["cache"], r["rollout"], r["sp"], r["prompt_tokens"], f"{r['seconds']:.3f}", faster,
                          f"{r['encode_s']:.3f}", f"{r['rollout_s']:.3f}", f"{r['group'] * r['completion'] / r['rollout_s']:.0f}",
                          f"{r['train_s']:.3f}", f"{r['peak_share']:.0%}" if r["peak_share"] else "-", "+".join(map(str, r["lm_by_rank"])),
                          fewer, f"{r['encodes']:g}", f"{r['saved_mb']:.1f}", less,
                          " ".join(f"{x:.0f}" for x in r["peak_by_rank"]), f"{r['gap']:.0e}", f"{r['norm']:.6g}"))
    return "\n".join(lines) + """
faster, fewer, less: than the first row of these frames. tok/s: sampled in the rollout. of_peak: the FLOPs of a packed
forward and backward, over train (the update included), as a share of a GPU's bf16 peak. LM_tokens: of our model, not of
vLLM's copy. saved_MB: for the backward. gap: the largest between sampler and trainer, in log-prob. norm: of the gradient in the
first step, from the same weights: the same completions give the same."""


def plot(rows, path):
    """Seconds a step against frames, a line a variant."""
    from matplotlib.figure import Figure
    lines, r, axis = {}, rows[0], Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for row in sorted(rows, key=lambda row: row["frames"]):
        label = f"{row['variant']}, {row['cache']}" + (f", {row['sp']} ranks" if row["sp"] > 1 else "") + ", vllm" * (row["rollout"] == "vllm")
        lines.setdefault(label, []).append(row)
    for label, points in lines.items():
        x, y, p = [p["frames"] for p in points], [p["seconds"] for p in points], points[0]
        axis.plot(x, y, "--" if p["cache"] == "warm" else "-", marker="os^v"[min(p["sp"], 4) - 1],
                  color=f"C{VARIANTS.index(p['variant'])}", label=label)
    axis.set(title=f"one GRPO step, {r['size']} x {r['size']} pixels, {r['group']} completions of {r['completion']} tokens",
             xlabel="frames", ylabel="seconds a step", xscale="log", yscale="log")
    frames = sorted({row["frames"] for row in rows})
    axis.set_xticks(frames, frames)
    axis.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.figure.savefig(path, dpi=120)


def parse(arguments):
    """--key=value arguments over SETTINGS. Raises ValueError, in one sentence, for what cannot be run."""
    a = SimpleNamespace(**SETTINGS)
    if {"-h", "--help"} & {*arguments}:
        print(__doc__ + "\n" + "\n".join(f"  --{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in SETTINGS.items()))
        sys.exit()
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or key not in SETTINGS:
            raise ValueError(f"unknown argument {argument!r}; there are " + ", ".join(f"--{k}=" for k in SETTINGS))
        old = SETTINGS[key]
        try:
            setattr(a, key, [type(old[0])(x) for x in text.split(",")] if isinstance(old, list) else type(old)(text))
        except ValueError:
            raise ValueError(f"--{key}={text}: whole numbers are expected") from None
    for key, known in {"variant": VARIANTS, "cache": ("cold", "warm"), "rollout": ("torch", "vllm"), "checkpointing": (0, 1),
                       "compile": (0, 1), "dtype": ("", "float32", "bfloat16")}.items():
        for wrong in set(np.atleast_1d(getattr(a, key)).tolist()) - set(known):
            raise ValueError(f"--{key}={wrong}: it is {' or '.join(map(str, known))}")
    for key in ("frames", "size", "group", "completion", "sp", "threads", "steps", "warmup", "shards"):
        if np.min(getattr(a, key)) < (key != "warmup"):
            raise ValueError(f"--{key} must be at least {int(key != 'warmup')}")
    if a.compile and "shared+sp" in a.variant and max(a.sp) > 1:
        raise ValueError("--compile=1 and --variant=shared+sp do not go together; name other variants")
    if a.memory and a.memory not in (*SHAPES, "9b", "tiny") and not os.path.isdir(a.memory):
        raise ValueError(f"--memory={a.memory}: it is {', '.join(SHAPES)}, 9b, tiny or a checkpoint directory")
    if any(a.group % sp for sp in a.sp):
        raise ValueError(f"--group={a.group} is not divisible by every --sp: each rank samples its share")
    if not a.memory and 0 < torch.cuda.device_count() < max(a.sp):
        raise ValueError(f"--sp={max(a.sp)} needs as many GPUs, and there are {torch.cuda.device_count()}")
    return a


def main(a):
    if a.memory:
        return print(memory_table(a))
    rows = []
    try:
        for frames, variant, sp, cache, engine in product(a.frames, a.variant, a.sp, a.cache, a.rollout):
            senseless = sp == 1 if variant == "shared+sp" else sp > min(a.sp) and variant != "shared"
            if senseless or (variant, cache) == ("naive", "warm") or (engine == "vllm" and variant in ("naive", "reuse")):
                continue
            rows.append(run_row(SimpleNamespace(**vars(a) | dict(frames=frames, variant=variant, sp=sp, cache=cache, rollout=engine))))
            print(json.dumps({k: rows[-1][k] for k in KEYS}), flush=True)
    finally:                                               # what was measured is shown, whatever came after it
        if rows:
            print("\n" + table(rows), flush=True)
    if not rows:
        raise ValueError("nothing to run: naive has no warm cache, and shared+sp needs --sp above 1")
    if a.plot:
        plot(rows, a.plot)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except (ValueError, OSError) as e:
        sys.exit(f"bench.py: {e}")
