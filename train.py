"""
Teach a vision-language model to reason about long videos. One script, from one CPU to many GPUs.

  laptop, two cores       torchrun --standalone --nproc_per_node=2 train.py
  your own videos         torchrun --standalone --nproc_per_node=2 train.py --data=my/questions.jsonl --out_dir=out-my
  two boxes               the same command on each, with --nnodes=2 --node_rank=0 (1 on the other) --master_addr=FIRST_BOX
                              --master_port=29500 in place of --standalone, and an --out_dir that both see; if one dies,
                              the other ends: start both again
  too large for one GPU   --fsdp=true: weights, gradients and optimizer state sharded over all ranks
  look at a result        python train.py --mode=eval --model=out/model, and at other frames or thinking budgets with
                              --eval_frames=16,64,256 --eval_budgets=0,48,96
  know what is hard       python train.py --mode=grade --model=MODEL --data=DATA --out_dir=graded, and for the training after it
                              --model=MODEL --data=DATA --out_dir=out-my --grades=graded/grades.jsonl
  Qwen2.5-VL-3B on one GPU of 80 GB: 63 GB in training; 45 GB and vLLM's 28 in sampling
      python train.py --model=Qwen/Qwen2.5-VL-3B-Instruct --data=longvideo-reason/train.json --video_dir=longvideo-reason/videos \\
          --frames=256 --max_pixels=78400 --dtype=bfloat16 --lr=1e-6 --sft_lr=1e-5 --think_budget=2048 --answer_budget=256 \\
          --checkpointing=true --rollout=vllm --vllm_memory=0.35
  Qwen2.5-VL-7B on eight, 28 heads, so sp 4 x dp 2: 29 GB in training; 13 GB and vLLM's 40 in sampling
      torchrun --standalone --nproc_per_node=8 train.py --model=Qwen/Qwen2.5-VL-7B-Instruct --sp=4 --stage2=true --fsdp=true \\
          --data=longvideo-reason/train.json --video_dir=longvideo-reason/videos --frames=512 --max_pixels=78400 --dtype=bfloat16 \\
          --lr=1e-6 --sft_lr=1e-5 --think_budget=2048 --answer_budget=256 --checkpointing=true --rollout=vllm --vllm_length=32768
  GLM-4.1V-9B on eight: 31 GB in training; 16 GB and vLLM's 40 in sampling
      torchrun --standalone --nproc_per_node=8 train.py --model=zai-org/GLM-4.1V-9B-Thinking --sp=8 --stage2=true --fsdp=true \\
          --data=longvideo-reason/train.json --video_dir=longvideo-reason/videos --frames=256 --max_pixels=78400 --dtype=bfloat16 \\
          --lr=1e-6 --sft_lr=1e-5 --think_budget=2048 --answer_budget=256 --checkpointing=true --format_weight=0 \\
          --rollout=vllm --vllm_length=20480
  LongVideo-Reason with the batch, clip, average and budget of its released code, but no KL term; 512 frames of 60 tokens: 29 GB
      torchrun --standalone --nproc_per_node=8 train.py --model=Qwen/Qwen2.5-VL-7B-Instruct --sp=4 --stage2=true --fsdp=true \\
          --data=longvideo-reason/train.json --video_dir=longvideo-reason/videos --frames=512 --max_pixels=94864 --dtype=bfloat16 \\
          --lr=1e-6 --sft_lr=1e-5 --warmup=0 --prompts_per_step=512 --updates_per_rollout=4 --clip_high=0.3 --loss_average=token \\
          --tiers=false --oversample_cap=1 --force_answer=false --think_budget=1984 --answer_budget=64 --checkpointing=true \\
          --rollout=vllm --vllm_length=40960

Gigabytes are the most on a GPU with G = 8, as `python bench.py --memory=3b` computes them; no GPU has measured them yet.

Three stages, as in the papers: align (only for a model made from nothing: it learns to see, then its tower is frozen),
cold start (it learns to write its thinking down, from a teacher), RL (its own answers, verified, make it right).
Started again with the same out_dir, a run goes on where it stopped.
"""
import difflib
import gc
import inspect
import json
import math
import os
import pickle
import re
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import data
import encode
import grpo
import model as vlm
import rewards
from flow import Group
from plumbing.grades import grade_line, read_grades
from plumbing.ranks import explain as machine_error, gather, merged, send_groups as move
from curriculum import Curriculum, balanced, has_signal
from rollout import VLLM, import_vllm, leave, limits, rollout, room


@dataclass
class Config:
    # what
    model: str = "tiny"            # "tiny" (made from nothing), a Hugging Face directory, or a hub name
    data: str = "toy"              # "toy" (built-in videos) or its parts ("toy:plot,long"), a .jsonl, or a LongVideo-Reason .json
    eval_data: str = ""            # likewise; empty: the part of data whose videos are held out by a hash
    video_dir: str = ""            # where relative video paths begin; empty: beside the data file
    cache_dir: str = ""            # vision tokens on disk, for other runs and restarts; empty: in memory alone
    cache_gb: float = 4.0          # of vision tokens that each rank keeps in its machine's memory
    out_dir: str = "out"           # checkpoints, metrics.jsonl, curves.png; a run found here goes on
    mode: str = "train"            # "train"; "eval": greedy accuracy and pass@k of `model`, one JSON line last; or "grade": how many
                                   # of group_size answers of `model` are right, for each sample of data, to out_dir/grades.jsonl
    seed: int = 0                  # all randomness is a function of seed, step, sample and completion number
    # where
    sp: int = 0                    # ranks that share one video; 0: all of this machine; 1: none share
    stage2: bool = False           # shard the sequence over them too, in prefill and training: for videos too long for one
    fsdp: bool = False             # weights, gradients and optimizer state sharded over all ranks, from the freezing of the tower on
    checkpointing: bool = False    # decoder layers computed again in the backward: a tenth of the memory, a fifth more time
    compile: bool = False          # decoder layers through torch.compile in training: a minute once, then a fifth less memory
    dtype: str = "float32"         # of weights and activations; "bfloat16" on GPUs
    max_tokens: int = 16384        # the most positions in one forward, padding included, but for a group that alone has more
    # the video
    frames: int = 32               # a video, evenly spaced in time; fewer where the file has fewer
    max_pixels: int = 0            # of a frame, after resizing; 0: the checkpoint's own bound
    # align: describe every moment (a model made from nothing alone)
    align_steps: int = 300
    # cold start: the teacher's thoughts
    sft_steps: int = 380
    sft_batch: int = 32            # samples a step over all ranks, here and in align
    sft_lr: float = 1.5e-3         # for a pretrained model 1e-5
    # RL
    rl_steps: int = 40
    prompts_per_step: int = 24     # groups a step over all ranks
    group_size: int = 8            # G, completions a group
    oversample_cap: float = 8.0    # at most so many times prompts_per_step are asked, to train on that many groups with signal; 1: off
    tiers: bool = True             # questions half right are asked more often than the easy and the hopeless; false: all alike
    grades: str = ""               # a grades.jsonl of --mode=grade: how hard each question is, before it was ever asked
    updates_per_rollout: int = 2   # optimizer steps over disjoint groups of one rollout; with 1 the clip never acts
    think_budget: int = 96         # tokens; then </think><answer> is written for the model; 0: no thoughts, in the cold start neither
    answer_budget: int = 16        # tokens after that
    force_answer: bool = True      # false: nothing is written for it; a completion that thinks too long ends unanswered
    lr: float = 1e-4               # for a pretrained model 1e-6
    clip_low: float = 0.2
    clip_high: float = 0.28        # higher than clip_low: keeps rare tokens alive (DAPO; GLM-4.1V)
    loss_average: str = "sample"   # every completion the same weight, or "token": every token
    format_weight: float = 0.1     # LongVILA-R1's; 0: the answer alone, as GLM-4.1V
    verifiers: str = ""            # yours: "domain=my_file.py:function", several with commas; (predicted, answer) -> 0 to 1
    warmup: int = 10               # optimizer steps of every stage over which lr rises linearly
    # who samples: same distribution, other random numbers
    rollout: str = "torch"         # the engine in rollout.py, or "vllm": pip install -r requirements-gpu.txt
    vllm_length: int = 16384       # the most tokens that it makes room for, prompt and completion; longer ones are dropped
    vllm_memory: float = 0.5       # its part of a GPU's memory while it samples, weights included
    vllm_share: bool = False       # one engine over the sp ranks, for a model too large for one (tensor parallelism); else one each
    # looking and keeping
    eval_every: int = 20           # RL steps; also after the cold start and at the end; 0: never
    eval_samples: int = 256        # held-out samples, greedy
    eval_frames: str = ""          # mode eval: also at these numbers of frames, "16,64,256"
    eval_budgets: str = ""         # mode eval: also at these thinking budgets, "0,48,96"; "64-96": at least 64 tokens (s1's budget forcing)
    pass_k: int = 0                # mode eval: pass@k of group_size sampled answers; 0: k is all of them
    show_every: int = 20           # RL steps between two whole completions on the screen; 0: never
    save_every: int = 40           # steps; also at the end of each stage


MOST_GAP = {"float32": 1e-3, "bfloat16": 0.1}              # between sampler and trainer, in log-prob, on average over a step

# What may differ when a run goes on: none of these changes what a step computes (sp to max_tokens: to float error).
MAY_CHANGE = {"eval_data", "video_dir", "cache_dir", "cache_gb", "out_dir", "mode", "sp", "stage2", "fsdp", "checkpointing", "compile",
              "max_tokens", "vllm_memory", "vllm_share", "rl_steps", "eval_every", "eval_samples", "eval_frames", "eval_budgets",
              "pass_k", "show_every", "save_every"}
MACHINE = {"video_dir", "cache_dir", "cache_gb", "out_dir", "vllm_memory"}           # what may differ between the machines of a run


def parse(arguments):
    """--key=value arguments over the block above. Unknown keys and wrong types raise ValueError. -> Config"""
    kinds = {f.name: f.type for f in fields(Config)}
    if {"-h", "--help"} & {*arguments}:
        print(__doc__ + "\n" + inspect.getsource(Config))
        sys.exit()
    chosen = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not key.startswith("--") or not equals:
            raise ValueError(f"{argument!r}: hyperparameters are given as --key=value")
        key = key[2:]
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            raise ValueError(f"unknown hyperparameter {key!r}" + (f"; did you mean {near[0]!r}?" if near else
                             "; they are listed at the top of train.py"))
        try:
            chosen[key] = {"true": True, "false": False}[text.lower()] if kinds[key] is bool else kinds[key](text)
        except (ValueError, KeyError):
            what = {int: "an integer", float: "a number", bool: "true or false"}[kinds[key]]
            raise ValueError(f"--{key}={text}: {key} must be {what}") from None
    return Config(**chosen)


def check(c, ranks):
    """The combinations that cannot work, each named before anything is loaded."""
    if c.mode not in ("train", "eval", "grade"):
        raise ValueError(f'mode is "train", "eval" or "grade", not {c.mode!r}')
    if c.rollout not in ("torch", "vllm"):
        raise ValueError(f'rollout is "torch" or "vllm", not {c.rollout!r}')
    if c.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype is "float32" or "bfloat16", not {c.dtype!r}')
    if c.loss_average not in ("sample", "token"):
        raise ValueError(f'loss_average is "sample" or "token", not {c.loss_average!r}')
    if c.compile and c.stage2 and ranks.sp > 1:            # tried on gloo: two ranks wait for one another for ever
        raise ValueError("compile and stage2 do not go together over several sp ranks: switch one of them off")
    if c.compile and c.fsdp and ranks.world > 1:
        raise ValueError("compile and fsdp were never tried together: switch one of them off")
    if c.group_size < 2:
        raise ValueError(f"group_size = {c.group_size}: a group needs at least 2 completions to compare")
    if c.group_size % ranks.sp:
        raise ValueError(f"group_size = {c.group_size} is not divisible by sp = {ranks.sp}: each sp rank samples its share")
    if c.prompts_per_step % ranks.dp:
        raise ValueError(f"prompts_per_step = {c.prompts_per_step} is not divisible by the {ranks.dp} dp groups")
    for key in ("frames", "max_tokens", "vllm_length", "sft_batch", "prompts_per_step", "updates_per_rollout", "answer_budget", "save_every"):
        if getattr(c, key) < 1:
            raise ValueError(f"{key} = {getattr(c, key)} must be at least 1")
    for key in ("seed", "max_pixels", "think_budget", "align_steps", "sft_steps", "rl_steps", "warmup", "eval_every", "eval_samples", "pass_k", "show_every"):
        if getattr(c, key) < 0:
            raise ValueError(f"{key} = {getattr(c, key)} must not be negative")
    if c.pass_k > c.group_size:
        raise ValueError(f"pass_k = {c.pass_k} is more than group_size = {c.group_size}: pass@k is estimated from group_size answers")
    if not (c.force_answer or c.think_budget):
        raise ValueError("think_budget = 0 and force_answer = false leave no answer: no thought, and nothing written after it")
    for frames, least, most in sweep(c):
        if frames < 1 or least > most or not (most or c.force_answer):
            raise ValueError(f"--eval_frames={c.eval_frames} --eval_budgets={c.eval_budgets}: frames are at least 1, the least budget no larger "
                             "than the most, and a budget of 0 needs force_answer")
        if least and c.rollout != "torch":
            raise ValueError(f"--eval_budgets={c.eval_budgets}: a least budget is the torch engine's alone; leave out --rollout")
    if not 1 <= c.oversample_cap < math.inf:
        raise ValueError(f"oversample_cap = {c.oversample_cap} must be a number from 1 up")
    if not c.cache_gb >= 0:                                # not a number, too
        raise ValueError(f"cache_gb = {c.cache_gb} must not be negative")
    for key, most in (("lr", math.inf), ("sft_lr", math.inf), ("clip_low", 1), ("clip_high", math.inf), ("format_weight", 1),
                      ("vllm_memory", 1)):
        if not (0 <= getattr(c, key) <= most and math.isfinite(getattr(c, key))):
            raise ValueError(f"{key} = {getattr(c, key)} must be a number from 0" + (f" to {most}" if most == 1 else " up"))


def budgets(c):
    """How answers are sampled: what `rollout.sample` is given."""
    return limits(c.think_budget, c.answer_budget, c.force_answer)


def sweep(c):
    """What mode eval looks at besides the run's own setting. -> [(frames, least, most tokens of thinking)]. Raises ValueError"""
    frames = [re.fullmatch(r"(\d+)", x) for x in c.eval_frames.split(",") if x]
    spans = [re.fullmatch(r"(?:(\d+)-)?(\d+)", x) for x in c.eval_budgets.split(",") if x]
    if None in frames + spans:
        raise ValueError(f"--eval_frames={c.eval_frames} --eval_budgets={c.eval_budgets}: whole numbers with commas between, "
                         "a budget also as LEAST-MOST")
    frames, spans = [int(x[1]) for x in frames], [(int(x[1] or 0), int(x[2])) for x in spans]
    return [(f, *span) for f in frames or [c.frames] for span in spans or [(0, c.think_budget)]] if frames or spans else []


# ---------------------------------------------------------------------------------------------------------------------
# pieces of a step

class Clock:
    """Seconds by phase: `with clock("encode"): ...`"""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def video_key(model, path, c, cache):
    """What the cache calls a video. Raises data.VideoError."""
    return cache.key(model.model.visual, data.fingerprint(path, c.cache_dir), c.frames, asdict(model.pixels))


def see(model, path, key, c, ranks, cache, ahead=None):
    """A video's vision tokens, from the cache or new; ahead: a `data.Ahead` that may have read it. -> as `vlm.encode_video`

    key: its `video_key`, or the error there was instead. Raises data.VideoError, on all sp ranks alike.
    """
    if isinstance(key, data.VideoError):
        raise key

    def open_video():
        video = ahead.open(path, key) if ahead else data.open_video(path, c.frames)

        def read(lo, hi):
            frames = video.read(lo, hi)
            if video_key(model, path, c, cache) != key:
                raise data.VideoError(f"{path}: changed while it was read")
            return frames

        return replace(video, read=read)

    return cache.get(key, lambda: vlm.encode_video(model, open_video, ranks), ranks)


def read_ahead(ahead, model, samples, c, ranks, cache):
    """Begin to read the videos of samples, while others are computed with: not the built-in, nor what the cache has."""
    def name(path):
        key = video_key(model, path, c, cache)
        return None if cache.has(key) else key

    ahead.start([s.video for s in samples if not s.video.startswith("toy:")], name,
                lambda video: vlm.frames_to_read(model, video, ranks))


def make_prompts(model, tokenizer, samples, c, ranks, cache, ahead=None):
    """Prompts of samples, each video encoded once. -> (list of (Sample, Prompt), {id: why} of what had to be dropped)

    A video that does not decode and a prompt that is too long are dropped, never replaced and never cut.
    """
    def named(sample):
        try:
            return video_key(model, sample.video, c, cache)
        except data.VideoError as e:
            return e

    keys = encode.led(lambda: [named(s) for s in samples], ranks)               # one question a step: each costs as much as many frames
    made, dropped, most = [], {}, room(tokenizer, **budgets(c))
    for sample, key in zip(samples, keys):
        try:
            seen = see(model, sample.video, key, c, ranks, cache, ahead)
            prompt = vlm.make_prompt(model, tokenizer, sample.question, *seen, key)
            vlm.check_length(model, prompt, most, c.vllm_length if c.rollout == "vllm" else None)
            made.append((sample, prompt))
        except (data.VideoError, vlm.PromptError) as e:
            dropped[sample.id] = str(e)
    return made, dropped


def watched_prompts(model, tokenizer, samples, c, ranks):
    """The same for a tower that still trains: this rank's frames in one call, with gradient, nothing shared or kept."""
    read, dropped = [], {}
    for sample in samples:
        try:
            video = data.open_video(sample.video, c.frames)
            read.append((sample, video, *vlm.patchify(video.read(0, video.frames), model.pixels)))
        except data.VideoError as e:
            dropped[sample.id] = str(e)
    if not read:
        return [], dropped
    grids = [grid for *_, grid in read]
    patches, tower = torch.cat([patches for _, _, patches, _ in read]), model.model.visual
    vision = tower(patches.to(ranks.device, tower.dtype), grid_thw=torch.tensor(grids, device=ranks.device)).pooler_output
    visions = vision.split([math.prod(grid) // model.pixels.merge ** 2 for grid in grids])
    return [(s, vlm.make_prompt(model, tokenizer, s.question, x, grid, v.seconds))
            for (s, v, _, grid), x in zip(read, visions)], dropped


def micro_batches(items, cost, most, padded=True):
    """Cut items, in order, into runs that cost no more than most; padded: as many times the longest as there are items."""
    batch, total = [], 0
    for item in items:
        longer = (len(batch) + 1) * max([cost(x) for x in batch] + [cost(item)]) if padded else total + cost(item)
        if batch and longer > most:
            yield batch
            batch, longer = [], cost(item)
        batch.append(item)
        total = longer
    if batch:
        yield batch


def mean(xs):
    return sum(xs) / len(xs) if xs else 0.0


def evened(batches, model, ranks):
    """Micro-batches as a list. Sharded parameters are gathered by all ranks at once: then each rank has as many micro-batches as the
    one with the most, the last of them empty, for `idle`."""
    batches = list(batches)
    return batches + [[]] * (max(gather(len(batches), ranks)) - len(batches)) if isinstance(model, FSDPModule) else batches


def idle(model, banned, ranks):
    """A forward and backward of next to nothing, of weight zero: to take part in."""
    token = banned.int().argmin()[None]                    # one that may be answered with: no log-prob of -inf
    prompt = vlm.Prompt(token, token.new_zeros(3, 1), torch.zeros(0, model.config.text_config.hidden_size, device=token.device), [])
    (0 * vlm.logprobs(model, [prompt], [[token]], banned, ranks=ranks)[0].sum()).backward()


def like(x, p):
    """What belongs to weight p, from a checkpoint: of a tensor of its shape this rank's part, where p is sharded."""
    if not isinstance(p, DTensor) or x.shape != p.shape:
        return x
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def make_optimizer(model, lr):
    """AdamW over the weights that train; where they are bfloat16 over float32 copies: 8 bits would swallow an update of 1e-6."""
    weights = [p if p.dtype == torch.float32 else p.detach().float() for p in model.parameters() if p.requires_grad]
    fused = True if weights[0].is_cuda else None           # one kernel; the default there makes one more copy of all weights in between
    return torch.optim.AdamW(weights, lr, (0.9, 0.95), weight_decay=0.0, fused=fused)


def update(model, optimizer, lr, ranks):
    """Sum the gradients over all ranks, clip their norm at 1, step. -> the norm; not finite: the step was skipped."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if ranks.world > 1 and not isinstance(model, FSDPModule):          # a few large messages: many small ones cost more than the sums
        for bucket in micro_batches([p.grad for p in parameters], lambda g: g.numel(), 1 << 24, padded=False):
            flat = torch.cat([g.flatten() for g in bucket]).float()            # bfloat16 would round at every rank
            dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(summed.view_as(g))
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    norm = float(norm)
    if math.isfinite(norm):
        [group] = optimizer.param_groups
        group["lr"] = lr
        copies = [(p, copy) for p, copy in zip(parameters, group["params"]) if copy is not p]
        for p, copy in copies:
            copy.grad, p.grad = p.grad.float(), None       # not both of all weights at once
        optimizer.step()
        with torch.no_grad():
            for p, copy in copies:
                p.copy_(copy)
    optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    return norm


def sft_step(model, tokenizer, prompts, texts, c, ranks, banned, stage2=False):
    """Loss on each text's tokens alone, their mean over the whole step. Gradients are left to be summed over the ranks."""
    # Where the tower trains, all prompts hang on one graph of it: gradients stop at the vision tokens and go on from there
    # once, after the last micro-batch.
    visions = [p.vision for _, p in prompts if p.vision.requires_grad]
    leaves = [v.detach().requires_grad_() for v in visions]
    cut = [replace(p, vision=leaves[i]) if leaves else p for i, (_, p) in enumerate(prompts)]
    items = [(p, torch.tensor(tokenizer(text, add_special_tokens=False).input_ids + vlm.stop_ids(model, tokenizer)[:1]))
             for p, text in zip(cut, texts)]
    share = 1 / ranks.sp if stage2 else 1                  # with stage 2 every sp rank has the loss of all tokens
    total, loss = sum(gather(sum(len(tokens) for _, tokens in items), ranks)) * share, 0.0
    sharers = ranks if stage2 else encode.Ranks()
    for batch in evened(micro_batches(items, lambda x: len(x[0].ids) + len(x[1]), c.max_tokens), model, ranks):
        if not batch:
            idle(model, banned, sharers)
            continue
        logprobs, _ = vlm.logprobs(model, [p for p, _ in batch], [[t] for _, t in batch], banned, ranks=sharers)
        part = -logprobs.sum() / total
        part.backward()
        loss += float(part.detach()) * share
    if visions:
        torch.autograd.backward(visions, [leaf.grad for leaf in leaves])
    return sum(gather(loss, ranks))


def check_gap(gap, c):
    """gap: sampler against trainer, mean difference in log-prob. Raises ValueError where it is no rounding error."""
    if not gap <= MOST_GAP[c.dtype]:
        raise ValueError(f"sampler and trainer differ by {gap:.2g} in log-prob on average, more than {MOST_GAP[c.dtype]:g}: they are not one "
                         "model. Likely causes: positions computed in two ways, weights that were not reloaded after an update, "
                         "two lists of banned ids, or another precision in the sampler")


def verify(sample, completions, c):
    """-> the `rewards.Reward` of each completion; a text that says why, where the sample's verifier failed: that is not wrong."""
    try:
        return [rewards.score(x.text, sample.answer, sample.domain, c.format_weight) for x in completions]
    except rewards.VerifierError as e:
        return str(e)


def grpo_step(model, groups, c, ranks, banned, divisor):
    """Backward of the clipped objective over this rank's share of some groups. -> sums of metrics over its tokens.

    The sp ranks of one video each hold G/sp of its completions; with stage 2, 1/sp of the sequence of all of them.
    Gradients are left to be summed over all ranks.
    divisor: completions ("sample") or sampled tokens ("token") of the whole optimizer step.
    """
    lo, hi = (0, c.group_size) if c.stage2 else encode.shard(c.group_size, ranks.sp_rank, ranks.sp)
    sharers = ranks if c.stage2 else encode.Ranks()
    items = [(g.prompt, g.completions[lo:hi], g.advantages[lo:hi]) for g in groups]
    cost = lambda i: len(items[i][0].ids) + sum(len(x.tokens) for x in items[i][1])
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True).to(ranks.device)
    sums = {"entropy": 0.0, "gap": 0.0, "gap_max": 0.0, "tokens": 0.0, "clip_low": 0.0, "clip_high": 0.0}
    # The longest first, so that little is padded: no other cut has fewer batches. Inside a batch the order of groups stays.
    for batch in evened(micro_batches(sorted(range(len(items)), key=cost, reverse=True), cost, c.max_tokens), model, ranks):
        if not batch:
            idle(model, banned, sharers)
            continue
        prompts, completions, advantages = zip(*[items[i] for i in sorted(batch)])
        logprobs, entropy = vlm.logprobs(model, prompts, [[x.tokens for x in xs] for xs in completions], banned, ranks=sharers)
        flat = [x for xs in completions for x in xs]
        old, mask = pad([x.logprobs for x in flat]), pad([x.sampled for x in flat])                # [N, L]
        loss, metrics = grpo.policy_loss(logprobs, old, torch.cat(advantages).to(ranks.device), mask, c.clip_low,
                                         c.clip_high, c.loss_average, divisor=divisor)
        loss.backward()
        gap = (logprobs.detach() - old)[mask].abs()        # sampler against trainer, on the tokens that were sampled
        metrics |= {"entropy": float(entropy[mask].sum()), "gap": float(gap.sum()), "gap_max": float(gap.max()) if len(gap) else 0.0}
        sums = {k: max(v, metrics[k]) if k == "gap_max" else v + metrics[k] for k, v in sums.items()}
    once = not (c.stage2 and ranks.sp_rank)                # with stage 2 every sp rank has the metrics of all tokens
    return sums if once else dict.fromkeys(sums, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def pass_at(k, accuracies):
    """The best of k answers, on average over all ways to choose k of these n. Unbiased; of answers right or wrong it is
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374). Raises ValueError for k above n.

    >>> pass_at(1, [1, 0, 0, 0]), pass_at(2, [1, 0, 0, 0])
    (0.25, 0.5)
    """
    n = len(accuracies)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k is 1 to {n}")
    return sum(a * math.comb(i, k - 1) for i, a in enumerate(sorted(accuracies))) / math.comb(n, k)    # the i below it come with it


def evaluate(model, tokenizer, samples, c, ranks, cache, engine=None, k=0, grades=None, think_least=0):
    """Greedy accuracy and format on held-out samples, per domain too; with k, pass@1 and pass@k of group_size sampled answers.

    grades: {id: (correct, total)}, by which accuracy is told per tier of difficulty; none: the answers sampled here serve.
    Samples are dealt over the dp groups. One that cannot be read, or graded, is dropped and counted. -> dict on every rank
    """
    rows = []
    share = list(range(ranks.dp_rank, len(samples), ranks.dp))
    made, dropped = make_prompts(model, tokenizer, [samples[i] for i in share], c, ranks, cache)
    # Greedy decoding has nothing to share out in a group: each sp rank takes its own part of the prompts.
    alone, together = encode.Ranks(device=ranks.device), engine is not None and engine.shared
    mine = made if together else made[ranks.sp_rank::ranks.sp]
    prompts = [p for _, p in mine]
    greedy = rollout(model, tokenizer, prompts, [[("greedy",)] for _ in mine], alone, c.max_tokens, engine=engine, greedy=True,
                     **budgets(c) | {"think_least": think_least})
    keys = [[(c.seed, "eval", s.id, n) for n in range(c.group_size)] for s, _ in mine]
    sampled = rollout(model, tokenizer, prompts, keys, alone, c.max_tokens, engine=engine, **budgets(c)) if k else [[] for _ in mine]
    for (s, _), [x], xs in zip(mine, greedy, sampled) if not (together and ranks.sp_rank) else ():
        if isinstance(verified := verify(s, [x, *xs], c), str):
            dropped[s.id] = verified
            continue
        first, *others = verified
        rows.append((s.id, s.domain, first.accuracy, first.format, x.forced, x.truncated, len(x.tokens), [o.accuracy for o in others]))
    rows = [row for part in gather(rows, ranks) for row in part]
    lost = merged(dropped, ranks)
    if not rows:
        return {"samples": 0, "dropped": len(lost), "why": next(iter(lost.values()), "no samples are held out")}
    result = {"samples": len(rows), "dropped": len(lost), "frames": c.frames, "think_budget": c.think_budget, "think_least": think_least,
              **{name: mean([float(r[n]) for r in rows]) for n, name in
                 ((2, "accuracy"), (3, "format"), (4, "forced"), (5, "truncated"), (6, "length"))},
              "forced_accuracy": mean([r[2] for r in rows if r[4]]) if any(r[4] for r in rows) else None}
    if k:
        result |= {f"pass@{n}": mean([pass_at(n, r[7]) for r in rows]) for n in (1, k)}
    result["domains"] = {d: mean([r[2] for r in rows if r[1] == d]) for d in sorted({r[1] for r in rows})}
    known = Curriculum([r[0] for r in rows], c.seed, grades or {r[0]: (sum(r[7]), len(r[7])) for r in rows if r[7]})
    tiers = [[r[2] for r in rows if r[0] in known.recent and known.tier(r[0]) == t] for t in range(5)]
    return result | {"tiers": [{"samples": len(tier), "accuracy": mean(tier)} for tier in tiers]} if known.recent else result


def eval_table(result, rows):
    """Text: evaluate's result by domain and by tier, and a line for each of a sweep."""
    percent = lambda x, wide: f"{x:{wide}.1%}" if x is not None else "-".rjust(wide)
    parts = [(domain, "", accuracy) for domain, accuracy in result["domains"].items()]
    for i, (word, tier) in enumerate(zip((" (hard)", "", "", "", " (easy)"), result.get("tiers", []))):
        parts.append((f"tier {i}{word}", tier["samples"], tier["accuracy"] if tier["samples"] else None))
    parts.append(("all", result["samples"], result["accuracy"]))               # tiers: by the grades given, or else by its own answers
    lines = [f"{'':14} samples  accuracy"] + [f"{name:14} {n:>7} {percent(accuracy, 9)}" for name, n, accuracy in parts]
    lines[-1] += f"; {result['dropped']} dropped" * bool(result["dropped"])
    lines[-1] += f"; format {result['format']:.1%}, " + ", ".join(f"{k} {v:.1%}" for k, v in result.items() if k.startswith("pass@"))
    if rows:
        lines += ["", "frames  thinking tokens  samples  accuracy  format  forced  of these right  tokens an answer"]
    for r in rows:
        span = f"{r['think_least']}-{r['think_budget']}" if r["think_least"] else r["think_budget"]
        lines.append(f"{r['frames']:6d} {span:>16} {r['samples']:8d} {percent(r['accuracy'], 9)} {percent(r['format'], 7)} {percent(r['forced'], 7)} "
                     f"{percent(r['forced_accuracy'], 15)} {r['length']:17.1f}")
    return "\n".join(lines)


def draw_sweep(results, path):
    """Accuracy against thinking tokens, a line for each number of frames; or against frames, where these alone vary."""
    from matplotlib.figure import Figure
    axis, budgets = Figure(figsize=(6, 4), layout="constrained").subplots(), {(r["think_least"], r["think_budget"]) for r in results}
    if len(budgets) > 1:
        for i, frames in enumerate(sorted({r["frames"] for r in results})):
            for least, mark in ((False, "o-"), (True, "^:")):
                line = sorted((r["think_least"] or r["think_budget"], r["accuracy"]) for r in results
                              if r["frames"] == frames and bool(r["think_least"]) == least)
                if line:
                    axis.plot(*zip(*line), mark, color=f"C{i}", label=f"{frames} frames, " + ('forced on until so many, by "Wait,"' if least else "cut after so many"))
        axis.legend(frameon=False)
    else:
        axis.plot(*zip(*sorted((r["frames"], r["accuracy"]) for r in results)), "o-")
    axis.set(title="held-out accuracy, greedy", xlabel="tokens of thinking" if len(budgets) > 1 else "frames", ylim=(0, 1))
    axis.figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# grading: how hard is each question for a model, before training (GLM-4.1V §5.3: offline pass@k)

def grade(model, tokenizer, samples, c, ranks, cache, engine, say):
    """Sample group_size answers to every sample that out_dir/grades.jsonl does not have yet, and add a line for each. Those of data
    that are held out come first: training does not look at their grades, an evaluation tells accuracy by them.

    prompts_per_step samples at a time are dealt over the dp groups; one that cannot be read is named and gets no line.
    """
    path, name = os.path.join(c.out_dir, "grades.jsonl"), os.path.realpath(c.model) if os.path.isdir(c.model) else c.model
    done = read_grades(path, samples, name) if os.path.exists(path) else {}
    gather(None, ranks)                                    # all have read it before rank 0 writes
    if ranks.rank == 0:
        os.makedirs(c.out_dir, exist_ok=True)
        if os.path.exists(path):                           # a line that was being written when the last run was killed
            with open(path, "rb+") as f:
                f.truncate(f.read().rfind(b"\n") + 1)
    todo, lost = [s for s in samples if s.id not in done], 0
    bar = tqdm(total=len(samples), initial=len(done), desc="grade", disable=ranks.rank != 0, dynamic_ncols=True)
    for at in range(0, len(todo), c.prompts_per_step):
        part = todo[at:at + c.prompts_per_step]
        made, dropped = make_prompts(model, tokenizer, part[ranks.dp_rank::ranks.dp], c, ranks, cache)
        keys = [[(c.seed, "grade", s.id, n) for n in range(c.group_size)] for s, _ in made]
        answers = rollout(model, tokenizer, [p for _, p in made], keys, ranks, c.max_tokens, c.stage2, engine, **budgets(c))
        verified = encode.led(lambda: [verify(s, xs, c) for (s, _), xs in zip(made, answers)], ranks)
        dropped |= {s.id: why for (s, _), why in zip(made, verified) if isinstance(why, str)}
        right = {s.id: sum(x.accuracy for x in graded) for (s, _), graded in zip(made, verified) if not isinstance(graded, str)}
        right, dropped = merged(right, ranks), merged(dropped, ranks)
        for id, why in dropped.items():
            say(f"not graded {id}: {why}")
        lost += len(dropped)
        if ranks.rank == 0:
            with open(path, "a", encoding="utf-8") as f:
                f.writelines(grade_line(s, right[s.id], c.group_size, name) for s in part if s.id in right)
        done |= {id: [x, c.group_size] for id, x in right.items()}
        bar.update(len(part))
    bar.close()
    counts = Curriculum([s.id for s in samples if s.id in done], c.seed, done).census()[0]
    say(f"{path}: {len(done)} graded, {lost} not; hard to easy, in five tiers: {', '.join(map(str, counts))}")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def newest(out_dir):
    """The directory of the newest whole checkpoint in out_dir, or None. Raises ValueError where it is gone."""
    link = os.path.join(out_dir, "model")
    if os.path.lexists(link) and not os.path.exists(link):
        raise ValueError(f"{link} leads to a checkpoint that is gone, {os.path.realpath(link)}: point it to an older ckpt-N, or remove it "
                         "to begin anew")
    return os.path.realpath(link) if os.path.exists(link) else None


def save(out_dir, model, tokenizer, state, weights=None):
    """Write ckpt-N whole under another name, sync it, rename it; then move the link `model`. At no moment is the last
    good checkpoint gone. Raises OSError where the disk is full, the half-written directory removed."""
    name = f"ckpt-{state['step']}"
    half, whole, link = (os.path.join(out_dir, x) for x in (name + ".tmp", name, "model"))
    shutil.rmtree(half, ignore_errors=True)
    try:
        os.makedirs(half)
        vlm.save(model, tokenizer, half, weights)
        torch.save(state, os.path.join(half, "training_state.pt"))
        for folder, _, files in os.walk(half):
            for path in [os.path.join(folder, f) for f in files] + [folder]:
                with_fd = os.open(path, os.O_RDONLY)
                os.fsync(with_fd)
                os.close(with_fd)
        shutil.rmtree(whole, ignore_errors=True)           # a leftover that the link never pointed to
        os.rename(half, whole)
        if os.path.lexists(link + ".tmp"):                 # a run was killed between these two lines
            os.remove(link + ".tmp")
        os.symlink(name, link + ".tmp")
        os.replace(link + ".tmp", link)
    except (OSError, SafetensorError, RuntimeError) as e:  # torch.save says RuntimeError for a full disk
        shutil.rmtree(half, ignore_errors=True)
        raise OSError(f"could not write checkpoint {whole}: {e}. The last good one is {newest(out_dir) or 'none'}; "
                      "make room and start again with the same out_dir") from e
    for old in os.listdir(out_dir):                        # the one before stays, in case this one's disk dies
        number = old.removeprefix("ckpt-")
        if old.startswith("ckpt-") and number.isdigit() and int(number) not in (state["step"], state["previous"]):
            shutil.rmtree(os.path.join(out_dir, old))


def check_same_run(c, saved, where):
    """A run goes on only with the configuration it was started with, but for the keys in MAY_CHANGE."""
    differ = [k for k, v in asdict(c).items() if k not in MAY_CHANGE and saved.get(k) != v]
    if bool(c.eval_data) != bool(saved["eval_data"]):      # without it a part of data is held out, which was trained on with it
        differ.append("eval_data")
    if differ:
        what = ", ".join(f"{k} = {saved.get(k)!r} there, {getattr(c, k)!r} here" for k in differ)
        raise ValueError(f"{where} belongs to another configuration: {what}. Choose another --out_dir, or give the same values")


# ---------------------------------------------------------------------------------------------------------------------
# the run

def main(c):
    ranks = encode.start(c.sp, {k: v for k, v in asdict(c).items() if k not in MACHINE})
    check(c, ranks)
    if c.rollout == "vllm":
        import_vllm()                                      # not found: say so now, not after the cold start
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    for key, value in asdict(c).items():
        if value != getattr(Config(), key):
            say(f"{key} = {value}")

    own = dict(spec.partition("=")[::2] for spec in c.verifiers.split(",") if spec)            # domain -> my_file.py:function
    for domain, where in own.items():
        if not where:
            raise ValueError(f"--verifiers: {domain!r} is not domain=my_file.py:function")
        rewards.VERIFIERS[domain] = rewards.load_verifier(where)
    samples = data.load(c.data, c.video_dir)
    train, held = (samples, data.load(c.eval_data, c.video_dir)) if c.eval_data else data.split(samples)
    graded = (held if c.mode == "eval" else train) if c.eval_data else held + train            # what grades are of
    if c.mode == "train":
        if not train:
            raise ValueError(f"{c.data}: all {len(samples)} samples are held out, by a hash of their videos' names, and none is left to train "
                             "on: give more videos, or --eval_data, and none is held out")
        say(f"{len(train)} samples to train on, {len(held)} held out")
    held = held[:c.eval_samples]
    if not held:
        say("no sample is held out: nothing will be evaluated (give --eval_data, or more videos)")
    for s in train + held:
        if s.domain not in rewards.VERIFIERS:
            raise ValueError(f"sample {s.id}: no verifier for domain {s.domain!r}; there are: {', '.join(rewards.VERIFIERS)}")
    hopeless = [s.id for s in train + held if s.domain not in own and rewards.VERIFIERS[s.domain](s.answer, s.answer) < 1]
    if hopeless:
        say(f"{len(hopeless)} samples have an answer that their own verifier does not accept, so nobody can be right: "
            + ", ".join(hopeless[:5]) + (", ..." if len(hopeless) > 5 else ""))
    by_id = {s.id: s for s in train}
    grades = read_grades(c.grades, graded) if c.grades else {}
    made, sharded = c.model == "tiny", c.fsdp and ranks.world > 1
    cache, ahead = encode.Cache(c.cache_gb * 2 ** 30, c.cache_dir, tqdm.write), data.Ahead(c.frames)

    def load(name):
        now = c.mode == "train" and sharded and not made
        model, tokenizer = vlm.load(name, "cpu" if now else ranks.device, getattr(torch, c.dtype), c.max_pixels, c.seed)
        if c.stage2 and c.mode != "eval":                  # where nothing is sharded but frames
            encode.check_heads(model.config.text_config.num_attention_heads, model.config.text_config.num_key_value_heads, ranks)
        if now:
            vlm.shard(model, ranks)
        return model, tokenizer

    if c.mode == "eval":
        model, tokenizer = load(c.model)
        engine = start_engine(c, c.model, model, tokenizer, ranks)
        others = sweep(c)
        if others:
            os.makedirs(c.out_dir, exist_ok=True)
        result = evaluate(model, tokenizer, held, c, ranks, cache, engine, c.pass_k or c.group_size, grades)
        if not result["samples"]:
            raise ValueError(f"no sample could be evaluated: {result['why']}")
        rows = [evaluate(model, tokenizer, held, replace(c, frames=frames, think_budget=most), ranks, cache, engine, think_least=least)
                for frames, least, most in tqdm(others, desc="eval", disable=ranks.rank != 0 or not others)]
        if ranks.rank == 0:
            print(eval_table(result, rows))
            if rows:
                draw_sweep(rows, os.path.join(c.out_dir, "eval.png"))
                print(f"{c.out_dir}/eval.png")
            print(json.dumps(result | {"rows": rows} if rows else result), flush=True)
        return

    if c.mode == "grade":
        model, tokenizer = load(c.model)
        grade(model, tokenizer, graded, c, ranks, cache, start_engine(c, c.model, model, tokenizer, ranks), say)
        return

    # Load: from the newest checkpoint of this run, or else from the start.
    os.makedirs(c.out_dir, exist_ok=True)
    log_file, found = os.path.join(c.out_dir, "metrics.jsonl"), newest(c.out_dir)
    if len(set(gather(found and os.path.basename(found), ranks))) > 1:
        raise ValueError(f"not all ranks find the same checkpoint in {c.out_dir}: several machines need one that they share")
    state = {"step": 0, "previous": 0, "lines": 0, "done": {"align": 0, "sft": 0, "rl": 0}, "config": asdict(c)}
    if found:
        path = os.path.join(found, "training_state.pt")
        try:
            state = torch.load(path, weights_only=False, map_location="cpu", mmap=sharded)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise ValueError(f"{path}: damaged ({' '.join(str(e).split())[:200]}). Point the link {c.out_dir}/model to an older ckpt-N, or "
                             "choose another --out_dir") from e
        check_same_run(c, state["config"], found)
        say(f"going on from {found}: {', '.join(f'{n} {stage} steps' for stage, n in state['done'].items())} done")
    model, tokenizer = load(found or c.model)
    if c.checkpointing:
        vlm.recompute_layers(model)
    if c.compile:
        vlm.compile_layers(model)
    banned, tower = vlm.banned_ids(model, tokenizer), model.model.visual
    lines = []
    if ranks.rank == 0:                                    # what was logged after the checkpoint will be logged again
        if found:
            with open(log_file) as f:
                lines = f.readlines()[:state["lines"]]
        with open(log_file + ".tmp", "w") as f:
            f.writelines(lines)
        os.replace(log_file + ".tmp", log_file)

    def log(stage, step, **values):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state["lines"] += 1
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}      # JSON has no nan
        if ranks.rank == 0:
            lines.append(json.dumps({"step": step, "stage": stage, **values, "peak_mb": round(peak / 2 ** 20)}) + "\n")
            with open(log_file, "a") as f:
                f.write(lines[-1])

    def keep(stage, step, optimizer, curriculum):
        """A checkpoint: rank 0 writes, all hear whether it could."""
        state["done"][stage] = step
        state["previous"], state["step"] = state["step"], sum(state["done"].values())
        copies = [] if c.dtype == "float32" else optimizer.param_groups[0]["params"]
        whole = {**state, "optimizer": optimizer.state_dict(), "copies": copies, "curriculum": curriculum.state_dict(), "stage": stage}
        weights, error = None, None
        if isinstance(model, FSDPModule):                  # as without it, on rank 0's CPU; gathered one tensor at a time
            keeps = lambda x: x.cpu() if ranks.rank == 0 else None
            whole = tree_map_only(DTensor, lambda x: keeps(x.full_tensor()), whole)
            weights = {name: keeps(w) for name, w in vlm.weights(model)}
        if ranks.rank == 0:
            draw_curves(lines, os.path.join(c.out_dir, "curves.png"))
            try:
                save(c.out_dir, model, tokenizer, whole, weights)
            except OSError as e:
                error = e
        error = gather(error, ranks)[0]
        if error:
            raise error

    def drop(curriculum, dropped):
        """Samples that cannot be used are named, counted, and not drawn again."""
        for id, why in merged(dropped, ranks).items():
            if id not in curriculum.dropped:
                curriculum.drop(id, why)
                say(f"dropped {id}: {why} ({len(curriculum.dropped)} dropped so far)")

    def begin(stage, steps, lr, ids, why_none):
        """What every stage starts with: its optimizer, its curriculum, its bar, its first step."""
        if state["done"][stage] >= steps:
            return None
        if not ids:
            say(f"{stage}: skipped, {why_none}")
            return None
        optimizer = make_optimizer(model, lr)
        curriculum = Curriculum(ids, f"{c.seed} {stage}", *((grades, c.tiers) if stage == "rl" else ()))
        saved = {k: state.pop(k, None) for k in ("optimizer", "copies", "curriculum")}         # a stage's own: kept no longer than it
        if state["done"][stage]:
            [group], moments = optimizer.param_groups, saved["optimizer"]["state"]
            moments = {i: {k: like(x, group["params"][i]) for k, x in of.items()} for i, of in moments.items()}
            optimizer.load_state_dict(saved["optimizer"] | {"state": moments})
            with torch.no_grad():
                for copy, kept in zip(group["params"], saved["copies"]):
                    copy.copy_(like(kept, copy))
            curriculum.load_state_dict(saved["curriculum"])
        bar = tqdm(total=steps, initial=state["done"][stage], desc=stage, disable=ranks.rank != 0, dynamic_ncols=True)
        return optimizer, curriculum, bar, range(state["done"][stage], steps)

    bad_in_a_row, engine = 0, None

    def count_skipped(norm):
        nonlocal bad_in_a_row
        bad_in_a_row = 0 if math.isfinite(norm) else bad_in_a_row + 1
        if bad_in_a_row == 10:
            raise ValueError("ten steps in a row had a gradient that is not finite; lower lr or sft_lr")
        return int(not math.isfinite(norm))

    def look(stage, step):
        """Greedy accuracy on held-out samples, for the log."""
        if not (c.eval_every and held):
            return {}
        result = evaluate(model, tokenizer, held, c, ranks, cache, engine)
        if not result["samples"]:
            say(f"{stage} {step}: no held-out sample could be read ({result['why']})")
            return {}
        say(f"{stage} {step}: held-out accuracy {result['accuracy']:.1%}, format {result['format']:.1%}, "
            + ", ".join(f"{d} {a:.1%}" for d, a in result["domains"].items()) + f" ({result['samples']} samples)")
        return {"eval_accuracy": result["accuracy"], "eval_format": result["format"],
                **{f"eval_accuracy_{d}": a for d, a in result["domains"].items()}}

    # Align and cold start: next-token loss on given texts. Only a tower made from nothing trains, and only here.
    stage2 = c.stage2 and not made                         # a tower that trains is small, and sees other videos on each rank
    tower.requires_grad_(made)
    taught, parts = [s.id for s in train if s.thought], data.toy_parts(c.data)
    for stage, steps in (("align", c.align_steps if made else 0), ("sft", c.sft_steps)):
        started = begin(stage, steps, c.sft_lr, taught if stage == "sft" else ["any"], "no sample has a thought to learn from")
        if not started:
            continue
        optimizer, curriculum, bar, todo = started
        for step in todo:
            start = time.perf_counter()
            if stage == "align":
                batch = [data.toy_description(c.seed, step * c.sft_batch + i, step / steps, parts) for i in range(c.sft_batch)]
            else:
                batch = [by_id[id] for id in curriculum.draw(c.sft_batch)]
            if made:
                prompts, dropped = watched_prompts(model, tokenizer, batch[ranks.rank::ranks.world], c, ranks)
            else:                                          # the sp ranks encode together, then each trains on its part
                prompts, dropped = make_prompts(model, tokenizer, batch[ranks.dp_rank::ranks.dp], c, ranks, cache, ahead)
                prompts = prompts if stage2 else prompts[ranks.sp_rank::ranks.sp]
            texts = [s.thought if stage == "align" else data.taught_text(s, c.think_budget > 0) for s, _ in prompts]
            drop(curriculum, dropped)
            if not made and step + 1 < steps:
                coming = [by_id[id] for id in curriculum.peek(c.sft_batch)]
                read_ahead(ahead, model, coming[ranks.dp_rank::ranks.dp], c, ranks, cache)
            loss = sft_step(model, tokenizer, prompts, texts, c, ranks, banned, stage2)
            fall = max(0.1, 1 - step / steps)              # linearly to a tenth
            norm = update(model, optimizer, c.sft_lr * min(1, (step + 1) / max(1, c.warmup)) * fall, ranks)
            log(stage, step + 1, loss=loss, grad_norm=norm, skipped=count_skipped(norm), dropped=len(curriculum.dropped),
                train_s=time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if step + 1 == steps and stage == "sft":
                bar.close()
                tower.requires_grad_(False)
                log("sft", steps, **look("cold start", steps))
            if step + 1 == steps or (step + 1) % c.save_every == 0:
                keep(stage, step + 1, optimizer, curriculum)
        bar.close()
    tower.requires_grad_(False)
    if made and sharded:
        vlm.shard(model, ranks)

    # RL.
    started = begin("rl", c.rl_steps, c.lr, list(by_id), "no training sample is left")
    if started:
        optimizer, curriculum, bar, todo = started
        gc.collect()                                       # matplotlib leaves frames behind that hold the cold start's optimizer
        if c.rollout == "vllm" and made and not found and not any(state["done"].values()):
            keep("rl", 0, optimizer, curriculum)           # vLLM starts from a directory
        engine = start_engine(c, newest(c.out_dir) or c.model, model, tokenizer, ranks)
        for step in todo:
            record = rl_step(model, tokenizer, optimizer, curriculum, by_id, step, c, ranks, banned, cache, ahead, engine, drop,
                             count_skipped, say)
            if c.eval_every and ((step + 1) % c.eval_every == 0 or step + 1 == c.rl_steps):
                record |= look("RL", step + 1)
            log("rl", step + 1, **record)
            bar.set_postfix_str(f"reward {record['reward']:.2f} accuracy {record['accuracy']:.2f} "
                                f"valid {record['valid_groups']}/{c.prompts_per_step}", refresh=False)
            bar.update()
            if step + 1 == c.rl_steps or (step + 1) % c.save_every == 0:
                keep("rl", step + 1, optimizer, curriculum)
        bar.close()
    ahead.stop()
    say(f"done: {c.out_dir}/model, {c.out_dir}/metrics.jsonl, {c.out_dir}/curves.png")


def start_engine(c, name, model, tokenizer, ranks):
    """vLLM, if it is asked for, from the checkpoint that model was loaded from."""
    return VLLM(name, model, tokenizer, ranks, c.vllm_length, c.vllm_memory, c.vllm_share) if c.rollout == "vllm" else None


def rl_step(model, tokenizer, optimizer, curriculum, by_id, step, c, ranks, banned, cache, ahead, engine, drop, count_skipped, say):
    """One step of RL: draw, encode, roll out, grade, and updates_per_rollout optimizer steps. -> what is logged"""
    clock = Clock()

    # Draw, as many more as lately had no signal. Every rank knows all the draws; each dp group works on its own.
    multiple = math.lcm(math.gcd(2, c.prompts_per_step), ranks.dp)             # even, if it can be: one rank and two draw the same
    asked = curriculum.expanded(c.prompts_per_step, multiple)
    drawn = [by_id[id] for id in curriculum.draw(asked)]
    slots = range(ranks.dp_rank, len(drawn), ranks.dp)
    with clock("encode"):
        made, dropped = make_prompts(model, tokenizer, [drawn[i] for i in slots], c, ranks, cache, ahead)
    slots, made = [i for i in slots if drawn[i].id not in dropped], [x for x in made if x[0].id not in dropped]
    drop(curriculum, dropped)
    if step + 1 < c.rl_steps:
        coming = [by_id[id] for id in curriculum.peek(asked)]
        read_ahead(ahead, model, coming[ranks.dp_rank::ranks.dp], c, ranks, cache)

    # Roll out and grade. A sample drawn twice in a step gets other random numbers the second time.
    again = {i: sum(s.id == drawn[i].id for s in drawn[:i]) for i in slots}
    keys = [[(c.seed, step, drawn[i].id, again[i] * c.group_size + n) for n in range(c.group_size)] for i in slots]
    with clock("rollout"):
        answers = rollout(model, tokenizer, [p for _, p in made], keys, ranks, c.max_tokens, c.stage2, engine, **budgets(c))
    with clock("verify"):                                  # once for all sp ranks: a verifier may ask a model
        verified = encode.led(lambda: [verify(s, xs, c) for (s, _), xs in zip(made, answers)], ranks)
    groups, stats = [], {}
    unscored = {s.id: why for (s, _), why in zip(made, verified) if isinstance(why, str)}          # of this step: next time it may go well
    unscored = merged(unscored, ranks)
    for id, why in unscored.items():
        say(f"RL {step + 1}: not graded {id}: {why}")
    for i, (sample, prompt), xs, graded in zip(slots, made, answers, verified):
        if isinstance(graded, str):
            continue
        groups.append(Group(i, sample, prompt, xs, graded, grpo.advantages(torch.tensor([g.total for g in graded]))))
        stats[i] = [{"reward": g.total, "accuracy": g.accuracy, "format": g.format, "length": len(x.tokens), "forced": x.forced,
                     "truncated": x.truncated, "sampled": int(x.sampled.sum()), "answer": rewards.extract_answer(x.text),
                     "prefix": len(prompt.ids)} for g, x in zip(graded, xs)]
    stats = merged(stats, ranks)                           # of all dp groups
    accuracies = {i: [row["accuracy"] for row in rows] for i, rows in sorted(stats.items())}
    for i, a in accuracies.items():
        curriculum.update(drawn[i].id, sum(a), len(a))
    valid = balanced(accuracies, c.prompts_per_step)
    signal = sum(map(has_signal, accuracies.values()))
    capped = curriculum.note_valid(signal, len(accuracies), c.oversample_cap) and c.oversample_cap > 1
    if capped or c.oversample_cap > 1 and 4 * len(valid) < 3 * c.prompts_per_step:         # a few too few is chance
        say(f"RL {step + 1}: {len(valid)} groups to learn from, {c.prompts_per_step} wanted; {signal} of {len(accuracies)} had signal"
            + (f": at that rate more than oversample_cap = {c.oversample_cap:g} times as many would have to be asked" if capped else ""))

    # Learn: disjoint groups in each optimizer step, dealt over the dp groups by their length: who rolled out the long ones would
    # keep all waiting (GLM-4.1V §5.4). The divisors are those of the whole step over all ranks.
    sums, norms, skipped, first, balance = {}, [], 0, None, []
    updates = min(c.updates_per_rollout, len(valid))
    with clock("train"):
        for u in range(updates):
            lo, hi = encode.shard(len(valid), u, updates)
            part = valid[lo:hi]
            divisor = len(part) * c.group_size if c.loss_average == "sample" else sum(row["sampled"] for i in part for row in stats[i])
            costs = {i: stats[i][0]["prefix"] + sum(row["length"] for row in stats[i]) for i in part}
            goes = encode.deal(costs, {i: i % ranks.dp for i in part}, ranks.dp)
            loads = [sum(costs[i] for i in part if goes[i] == r) for r in range(ranks.dp)]
            balance.append(max(loads) * ranks.dp / sum(loads))
            mine = grpo_step(model, move(groups, goes, ranks), c, ranks, banned, divisor)
            every = gather(mine, ranks)
            total = {k: (max if k == "gap_max" else sum)(m[k] for m in every) for k in mine}
            if first is None:                              # before any update the sampler is the trainer
                first = total
                check_gap(first["gap"] / max(1.0, first["tokens"]), c)
            sums = {k: sums.get(k, 0.0) + v for k, v in total.items()}
            warm = min(1, (step * c.updates_per_rollout + u + 1) / max(1, c.warmup))
            norms.append(update(model, optimizer, c.lr * warm, ranks))
            skipped += count_skipped(norms[-1])
    if not updates:
        say(f"RL {step + 1}: no group has answers that differ in accuracy; nothing to learn from, step skipped")

    if c.show_every and step % c.show_every == 0 and groups:
        g = groups[0]
        say(f"\n--- RL {step + 1}, {g.sample.id}: {g.sample.question}\n{g.completions[0].text}\n"
            f"--- right: {g.sample.answer}; reward {g.rewards[0].total:.2f}; the group's rewards "
            + " ".join(f"{r.total:.1f}" for r in g.rewards) + "\n")
    rows = [row for i in stats for row in stats[i]]
    tokens = max(1.0, sums.get("tokens", 0.0))
    domains = {}
    for domain in sorted({drawn[i].domain for i in stats}):
        own = [row for i in stats if drawn[i].domain == domain for row in stats[i]]
        commonest = max(Counter(row["answer"] for row in own if row["answer"] is not None).values(), default=0)
        domains |= {f"{k}_{domain}": mean([row[k] for row in own]) for k in ("accuracy", "length")}
        domains[f"same_answer_{domain}"] = commonest / len(own)                # near 1: a verifier is fooled by one answer to everything
    return {**{k: mean([float(row[k]) for row in rows]) for k in ("reward", "accuracy", "format", "length", "forced", "truncated")},
            "entropy": sums.get("entropy", 0.0) / tokens, "clip_low": sums.get("clip_low", 0.0) / tokens,
            "clip_high": sums.get("clip_high", 0.0) / tokens, "valid_groups": len(valid),
            "oversample": asked / c.prompts_per_step, "invalid_rate": 1 - signal / len(accuracies) if accuracies else 0.0,
            "sampler_gap": first["gap"] / max(1.0, first["tokens"]) if first else 0.0,
            "sampler_gap_max": first["gap_max"] if first else 0.0, "skipped": skipped, "dropped": len(curriculum.dropped),
            "unscored": len(unscored), **domains, "balance": mean(balance) if balance else 1.0, "grad_norm": mean(norms),
            **{f"{k}_s": round(v, 4) for k, v in clock.seconds.items()}}


def draw_curves(lines, path):
    """metrics.jsonl as a picture."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in lines]
    rl = [r for r in rows if r["stage"] == "rl"]
    taught = [r for r in rows if r["stage"] != "rl" and "loss" in r]
    if not rows:
        return
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    x = [r["step"] for r in rl]

    def panel(axis, title, *keys):
        for key in keys:
            axis.plot(x, [r[key] for r in rl], label=key, linewidth=1)
        axis.set(title=title, xlabel="RL step")
        axis.legend(fontsize=8, frameon=False)

    for stage, name in (("align", "align"), ("sft", "cold start")):
        line = [(i, r["loss"]) for i, r in enumerate(taught) if r["stage"] == stage]
        axes[0, 0].plot(*zip(*line) if line else ([], []), linewidth=1, label=name)
    axes[0, 0].set(title="loss on what is taught", xlabel="step", yscale="log")
    axes[0, 0].legend(fontsize=8, frameon=False)
    panel(axes[0, 1], "sampled answers", "reward", "accuracy", "format")
    seen = [(0 if r["stage"] == "sft" else r["step"], r["eval_accuracy"]) for r in rows if "eval_accuracy" in r]
    axes[0, 2].plot(*zip(*seen) if seen else ([], []), "o-")
    axes[0, 2].set(title="held-out accuracy, greedy", xlabel="RL step (0: after the cold start)", ylim=(0, 1))
    panel(axes[1, 0], "tokens an answer", "length")
    panel(axes[1, 1], "entropy; forced answers", "entropy", "forced")
    if rl:
        axes[1, 2].stackplot(x, *([r.get(k, 0.0) for r in rl] for k in ("encode_s", "rollout_s", "train_s")),
                             labels=["encode", "rollout", "train"])
        axes[1, 2].legend(fontsize=8, frameon=False)
    axes[1, 2].set(title="seconds a step; later more are asked", xlabel="RL step")
    figure.savefig(path + ".tmp", dpi=100, format="png")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        known = (str(e), False) if isinstance(e, (ValueError, OSError)) else machine_error(e)
        if not known:
            raise
        line, wait = known                                 # one rank of a machine speaks, after any who knows more; torchrun then
        time.sleep(5 * (bool(int(os.environ.get("LOCAL_RANK", 0))) + wait))    # ends those who still sleep
        print(file=sys.stderr)                             # off the line of a progress bar
        if dist.is_initialized():
            print(f"train.py: {line}", file=sys.stderr, flush=True)
            os._exit(1)                                    # to close NCCL's groups is to wait for ranks that may be gone
        sys.exit(f"train.py: {line}")
    leave()
