"""
One parser for all commands: a dataclass of options, each field with a comment that explains it.

    python train.py --lr=1e-5 --frames 64

The field's type is the option's, its default the default, and its comment the help text.
"""
import argparse
import difflib
import inspect
import re
import sys
from dataclasses import MISSING, fields
from typing import get_args, get_origin

# What other trainers call it -> what we call it.
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
}


def true_or_false(text):
    return {"true": True, "false": False}[text.lower()]


WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def convert(key, kind, text):
    """text as the field `key` of type kind; a list[kind] takes several values with commas."""
    if get_origin(kind) is list:
        [one] = get_args(kind)
        return [convert(key, one, part) for part in text.split(",")]
    try:
        return true_or_false(text) if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{key}={text}: {key} must be {WORDS[kind]}") from None


class Parser(argparse.ArgumentParser):
    """argparse, but what it cannot read is a ValueError: our commands end with one line."""

    def error(self, message):
        raise ValueError(message)


def parse(options, about, arguments):
    """--key=value and --key value over the fields of a dataclass. -> an instance of it

    options: the dataclass; about: text shown by --help, after the options. Raises ValueError for
    an unknown key, with the nearest known one, for a value of another type, and for a field
    without a default that is not given.
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
    """What to say of a key that there is not."""
    if OTHER_NAMES.get(key) in known:
        return f"unknown option {key!r}; here it is called {OTHER_NAMES[key]!r}"
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"unknown option {key!r}; did you mean {near[0]!r}?"
    return f"unknown option {key!r}; --help lists those there are"


def describe(options):
    """The options with their defaults and comments, as they stand in the source."""
    lines = inspect.getsource(options).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class "))
    text = []
    for line in lines[first + 1:]:
        line = re.sub(r"^    (\w+): [\w\[\]]+( = )?", r"    --\1=", line)
        text.append(line.replace("field(default_factory=lambda: ", "").replace("])", "]"))
    return "\n".join(text) + "\n"
