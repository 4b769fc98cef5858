"""
One parser for all commands: a dataclass of options, each field with a comment that explains it.

    python train.py --lr=1e-5 --frames 64

The field's type is the option's, its default the default, and its comment the help text.
"""
import argparse
import difflib
import inspect
import math
import os
import re
import sys
from dataclasses import MISSING, asdict, fields
from importlib.util import find_spec
from typing import get_args, get_origin

from plumbing.sweep import sweep

# The name in other trainers -> our name.
OTHER_NAMES = {
    "learning_rate": "lr", "batch_size": "prompts_per_step", "train_batch_size": "prompts_per_step",
    "num_generations": "group_size", "n": "group_size", "rollout_n": "group_size",
    "max_completion_length": "think_budget", "max_new_tokens": "answer_budget",
    "max_tokens_per_batch": "max_tokens", "max_steps": "rl_steps", "steps": "rl_steps",
    "epsilon": "clip_low", "epsilon_high": "clip_high", "clip_ratio_low": "clip_low",
    "clip_ratio_high": "clip_high", "clip_ratio": "clip_low", "output_dir": "out_dir",
    "model_name_or_path": "model", "model_path": "model", "dataset": "data", "train_data": "data",
    "num_frames": "frames", "nframes": "frames", "gradient_checkpointing": "checkpointing",
    "warmup_steps": "warmup", "eval_steps": "eval_every", "save_steps": "save_every",
    "use_vllm": "rollout", "loss_type": "loss_average", "gpu_memory_utilization": "vllm_memory",
    "max_model_len": "vllm_length", "bf16": "dtype", "tensor_parallel_size": "sp",
    "lora_r": "lora_rank", "use_peft": "lora_rank",
}


def true_or_false(text):
    return {"true": True, "false": False}[text.lower()]


WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def convert(key, kind, text):
    """text as the field `key` of type kind; a list[kind] takes comma-separated values."""
    if get_origin(kind) is list:
        [one] = get_args(kind)
        return [convert(key, one, part) for part in text.split(",")]
    try:
        return true_or_false(text) if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{key}={text}: {key} must be {WORDS[kind]}") from None


class Parser(argparse.ArgumentParser):
    """argparse, but errors raise ValueError, so that our commands end with one line."""

    def error(self, message):
        raise ValueError(message)


def parse(options, about, arguments):
    """--key=value and --key value over the fields of a dataclass. -> an instance of it

    options: the dataclass; about: text shown by --help, after the options. Raises ValueError for
    an unknown key (naming the nearest known one), for a value of another type, and for a missing
    field that has no default.
    """
    known = {field.name: field for field in fields(options)}
    if {"-h", "--help"} & {*arguments}:
        print(describe(options) + "\n" + about.strip())
        sys.exit()
    for argument in arguments:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key not in known:
            raise ValueError(unknown(key, known))
    parser = Parser(allow_abbrev=False, add_help=False)
    for field in known.values():
        parser.add_argument("--" + field.name)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        raise ValueError(f"{rest[0]!r}: options are given as --key=value")
    values = {}
    for name, field in known.items():
        text = getattr(given, name)
        if text is not None:
            values[name] = convert(name, field.type, text)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"--{name} is missing")
    return options(**values)


def unknown(key, known):
    """The text of the error for an unknown key."""
    if OTHER_NAMES.get(key) in known:
        return f"unknown option {key!r}; here it is called {OTHER_NAMES[key]!r}"
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"unknown option {key!r}; did you mean {near[0]!r}?"
    return f"unknown option {key!r}; --help lists those there are"


def describe(options):
    """The options with their defaults and comments, in the order of the source."""
    lines = inspect.getsource(options).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class "))
    text = []
    for line in lines[first + 1:]:
        code, _, comment = line.strip().partition("#")
        found = re.match(r"(\w+): \S+?(?: = (.*))?$", code.strip())
        if found:
            default = (found[2] or "").replace("field(default_factory=lambda: ", "")
            option = f"--{found[1]}={default.rstrip(')')}"
            text.append(f"    {option:34}{comment}".rstrip())
        elif line.strip():                                 # a heading
            text.append("  " + line.strip())
    return "\n".join(text) + "\n"


# What may differ when a run resumes: it changes no step, or (sp to max_tokens) only its rounding.
MAY_CHANGE = {"eval_data", "video_dir", "cache_dir", "cache_gb", "out_dir", "mode", "sp", "stage2",
              "fsdp", "checkpointing", "max_tokens", "vllm_memory", "vllm_share", "rl_steps",
              "eval_every", "eval_samples", "eval_frames", "eval_budgets", "pass_k", "show_every",
              "save_every", "judges", "judge_seconds", "tensorboard"}
# Options that may differ between the machines of a run. The ranks that share a video look it up
# together, so their caches must have the same size, and all must have a folder or none.
OF_MACHINE = {"video_dir", "cache_dir", "out_dir", "vllm_memory"}


def to_compare(c):
    """{name: value} of what must be equal on all ranks."""
    compared = {key: value for key, value in asdict(c).items() if key not in OF_MACHINE}
    return compared | {"a cache_dir": bool(c.cache_dir)}


def check_choice(c, key, choices):
    """Raises ValueError if c.key is none of the choices."""
    if getattr(c, key) not in choices:
        names = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{key} is {names}, not {getattr(c, key)!r}")


def check_range(c, least, most, *keys):
    """Raises ValueError if one of the options is not a finite number from least to most."""
    for key in keys:
        value = getattr(c, key)
        if not (math.isfinite(value) and least <= value <= most):
            bound = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
            raise ValueError(f"{key} = {value} must be a number {bound}")


def make_folder(out_dir):
    """Make out_dir. Raises ValueError, which names the option, if it cannot be made."""
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out_dir={out_dir}: this folder cannot be made ({e.strerror}); choose "
                         "another --out_dir") from e


def check_sampling(c, ranks):
    """Raises ValueError if options that train.Config and evaluate.Config share cannot work."""
    check_choice(c, "rollout", ("torch", "vllm"))
    check_choice(c, "dtype", ("float32", "bfloat16"))
    check_range(c, 1, math.inf, "frames", "max_tokens", "vllm_length", "prompts_per_step",
                "answer_budget", "judges")
    check_range(c, 0.001, 1e6, "judge_seconds")
    check_range(c, 0, 2 ** 64 - 1, "seed")                 # what torch's generators take
    check_range(c, 0, math.inf, "max_pixels", "think_budget", "eval_samples", "pass_k")
    check_range(c, 0, 1, "format_weight", "vllm_memory")
    if not c.cache_gb >= 0:                # inf is no bound; nan is refused
        raise ValueError(f"cache_gb = {c.cache_gb} must be a number of at least 0")
    if c.group_size < 2:
        raise ValueError(f"group_size = {c.group_size}: a group needs at least 2 completions to "
                         "compare")
    if c.group_size % ranks.sp:
        raise ValueError(f"group_size = {c.group_size} is not divisible by sp = {ranks.sp}: each "
                         "sp rank samples its share")
    if c.pass_k > c.group_size:
        raise ValueError(f"pass_k = {c.pass_k} is more than group_size = {c.group_size}: pass@k is "
                         "estimated from group_size answers")
    if not c.force_answer and not c.think_budget:
        raise ValueError("think_budget = 0 and force_answer = false leave no answer: no thought, "
                         "and nothing written after it")


def check_lora(c, ranks):
    """Raises ValueError if a train.Config asks for LoRA where there is none."""
    check_range(c, 0, math.inf, "lora_rank")
    if c.lora_rank and c.model == "tiny":
        raise ValueError(f"lora_rank = {c.lora_rank}: a model made from nothing has no weights to "
                         "adapt; train it first, then give --model=out/model --sft_steps=0 "
                         f"--lora_rank={c.lora_rank} --out_dir=out-lora")
    if c.lora_rank and c.fsdp and ranks.world > 1:
        raise ValueError(f"lora_rank = {c.lora_rank} with fsdp: the frozen weights of LoRA are not "
                         "sharded; give --fsdp=false, or train all weights with --lora_rank=0")


def check_training(c, ranks):
    """Raises ValueError if a train.Config cannot work."""
    check_sampling(c, ranks)
    sweep(c)                               # for --mode=eval: raises if it cannot be run
    check_choice(c, "mode", ("train", "eval", "grade"))
    check_choice(c, "loss_average", ("sample", "token"))
    check_range(c, 1, math.inf, "sft_batch", "updates_per_rollout", "save_every")
    check_range(c, 0, math.inf, "align_steps", "sft_steps", "rl_steps", "warmup",
                "eval_every", "show_every", "lr", "sft_lr", "clip_high")
    check_range(c, 0, 1, "clip_low")
    check_range(c, 1, math.inf, "oversample_cap", "lora_alpha")
    check_lora(c, ranks)
    if c.tensorboard and not find_spec("tensorboard"):
        raise ValueError("tensorboard = true needs a package that is not installed: "
                         "pip install tensorboard")
    if c.prompts_per_step % ranks.dp:
        raise ValueError(f"prompts_per_step = {c.prompts_per_step} is not divisible by the "
                         f"{ranks.dp} dp teams")
