"""
A run's own checkpoints: written atomically, found again, and refused if they belong to another run.
"""
import os
import pickle
import re
import shutil
import struct
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from plumbing import checkpoints
from plumbing.command_line import MAY_CHANGE
from plumbing.ranks import gather, on_rank_0
from plumbing.sharding import kept_buffers, weights

# What a checkpoint's training state holds: {key: type}.
STATE = {"step": int, "previous": int, "lines": int, "done": dict, "config": dict,
         "optimizer": dict, "copies": list, "curriculum": dict}
# What torch's reader raises for a file of other bytes, beside UnpicklingError.
DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
           AssertionError, struct.error)
FILES = ("metrics.jsonl", "rollouts.jsonl", "curves.png", "watch.html")    # that a run writes


def newest(out_dir):
    """The directory of the newest complete checkpoint in out_dir, or None. Raises ValueError if
    `model` is no link, or a link that is broken."""
    link = os.path.join(out_dir, "model")
    if not os.path.lexists(link):
        return None
    if not os.path.islink(link):
        raise ValueError(f"{link} is no link to a ckpt-N, as a run makes it (a copy that follows "
                         "links, cp -rL, makes it a folder): put a link to the newest ckpt-N in "
                         "its place, or choose another --out_dir")
    found = os.path.realpath(link)
    if not os.path.exists(link):
        raise ValueError(f"{link} leads to a checkpoint that is gone, {found}: point it to an "
                         "older ckpt-N, or remove it to begin anew")
    return found


def find(out_dir, ranks):
    """`newest`. Raises ValueError unless all ranks find the same, and all names that a run writes
    to are free. Removes what a run that was killed while it saved has left."""
    def prepare():
        check_names(out_dir)
        remove_unfinished(out_dir)

    on_rank_0(prepare, ranks)
    found = newest(out_dir)
    if len(set(gather(found and os.path.basename(found), ranks))) > 1:
        raise ValueError(f"not all ranks find the same checkpoint in {out_dir}: "
                         "several machines need one that they share")
    return found


def check_names(out_dir):
    """Raises ValueError if there is a folder in the place of a file that a run writes, or a file in
    that of a checkpoint: else the first save would fail, after all steps before it."""
    for name in sorted(os.listdir(out_dir)) if os.path.isdir(out_dir) else []:
        path = os.path.join(out_dir, name)
        if name in FILES and os.path.isdir(path):
            taken = "is a folder, where a run writes a file"
        elif re.fullmatch(r"ckpt-(\d+|(\d+|trial-\w+)\.tmp)", name) and not os.path.isdir(path):
            taken = "is no folder, where a run saves a checkpoint"
        else:
            continue
        raise ValueError(f"{path} {taken}: move it away, or choose another --out_dir")


def read_state(checkpoint, config, mmap):
    """The training state of a checkpoint of this run. mmap: read tensors when they are used.

    Only tensors and plain values are read: a checkpoint from elsewhere cannot run code here.
    Raises ValueError if it holds anything else, is missing or damaged, or has another
    configuration.
    """
    path = os.path.join(checkpoint, "training_state.pt")
    remedy = (f"Point the link {config.out_dir}/model to an older ckpt-N, or choose another "
              "--out_dir")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        check_state(state)
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}). {remedy}") from e
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path}: damaged, or it holds more than tensors and plain values, which "
                         f"could run code: it is not read. {remedy}") from e
    except DAMAGED as e:
        cause = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path}: damaged ({cause}). {remedy}") from e
    check_same_run(config, state["config"], checkpoint)
    return state


def check_state(state):
    """Raises ValueError if what was read of a training_state.pt is not what `save` was given."""
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__}, not a dict")
    state.setdefault("copies", [])         # checkpoints of older commits have none
    for key, kind in STATE.items():
        if key not in state:
            raise ValueError(f"it has no {key!r}")
        if type(state[key]) is not kind:                   # True would pass as an int
            raise ValueError(f"{key!r} is a {type(state[key]).__name__}, not a {kind.__name__}")
    counts = {key: state[key] for key in ("step", "previous", "lines")}
    for stage in ("align", "sft", "rl"):
        counts[f"done[{stage!r}]"] = state["done"].get(stage)
    for key, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} = {str(value)[:40]} is not a number of steps or lines")
    for key in ("state", "param_groups"):
        if key not in state["optimizer"]:
            raise ValueError(f"its optimizer has no {key!r}")


def check_same_run(config, saved, where):
    """A run resumes only with the configuration that it was started with, except for the keys in
    MAY_CHANGE. A key that an older commit did not have has its default value."""
    mine, default = asdict(config), asdict(type(config)())
    differ = []
    for key, value in mine.items():
        if key not in MAY_CHANGE and saved.get(key, default[key]) != value:
            differ.append(key)
    # Without eval_data a part of data is held out; with eval_data that part is trained on.
    if bool(config.eval_data) != bool(saved.get("eval_data", "")):
        differ.append("eval_data")
    if differ:
        values = [f"{key} = {saved.get(key, default[key])!r} there, {mine[key]!r} here"
                  for key in differ]
        raise ValueError(f"{where} belongs to another configuration: {', '.join(values)}. "
                         "Choose another --out_dir, or give the same values")


def try_saving(run):
    """`checkpoints.try_saving` on rank 0. Raises its ValueError or OSError on all ranks."""
    on_rank_0(lambda: checkpoints.try_saving(run.model, run.tokenizer, run.config.out_dir),
              run.ranks)


def save(run, state):
    """Write a checkpoint: rank 0 writes, and all ranks raise OSError if it could not.

    state: the training state, which all ranks have. Sharded tensors are gathered to rank 0's CPU
    one at a time.
    """
    whole_weights = None
    if isinstance(run.model, FSDPModule):
        def to_rank_0(x):
            return x.cpu() if run.ranks.rank == 0 else None

        state = tree_map_only(DTensor, lambda x: to_rank_0(x.full_tensor()), state)
        whole_weights = {name: to_rank_0(w) for name, w in weights(run.model)}
        whole_weights |= kept_buffers(run.model)
    on_rank_0(lambda: write(run.config.out_dir, run.model, run.tokenizer, state, whole_weights),
              run.ranks)


def write(out_dir, model, tokenizer, state, whole_weights=None):
    """Write ckpt-N under another name, sync it, rename it; then move the link `model`. There is a
    complete checkpoint at any time.

    whole_weights: {name: tensor} if the model's own are sharded. Raises OSError if the disk is
    full, after removing the incomplete directory.
    """
    name = f"ckpt-{state['step']}"
    half = os.path.join(out_dir, name + ".tmp")
    whole = os.path.join(out_dir, name)
    link = os.path.join(out_dir, "model")
    shutil.rmtree(half, ignore_errors=True)
    try:
        os.makedirs(half)
        checkpoints.save_pretrained(model, tokenizer, half, whole_weights)
        torch.save(state, os.path.join(half, "training_state.pt"))
        sync(half)
        shutil.rmtree(whole, ignore_errors=True)           # a leftover that was never linked
        os.rename(half, whole)
        if os.path.lexists(link + ".tmp"):                 # a run was killed between these lines
            os.remove(link + ".tmp")
        os.symlink(name, link + ".tmp")
        os.replace(link + ".tmp", link)
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:
        # torch.save raises RuntimeError if the disk is full, transformers ValueError for what it
        # does not save: rank 0 must tell the other ranks, which wait for it.
        shutil.rmtree(half, ignore_errors=True)
        cause = " ".join(str(e).split())
        raise OSError(f"could not write checkpoint {whole}: {cause}. The last good one is "
                      f"{newest(out_dir) or 'none'}; make room and start again with the same "
                      "out_dir") from e
    remove_older(out_dir, keep=(state["step"], state["previous"]))
    remove_unfinished(out_dir)


def sync(folder):
    """Wait until all files of a folder, and the folder itself, are on the disk."""
    for parent, _, files in os.walk(folder):
        for path in [*(os.path.join(parent, file) for file in files), parent]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def remove_unfinished(out_dir):
    """Remove checkpoints that were never completed, and `checkpoints.try_saving`'s folder."""
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else []:
        if re.fullmatch(r"ckpt-(\d+|trial-\w+)\.tmp", name):
            shutil.rmtree(os.path.join(out_dir, name))


def remove_older(out_dir, keep):
    """Remove all checkpoints except those of the two steps in keep: the previous one stays, in case
    the newest is damaged."""
    for name in os.listdir(out_dir):
        step = name.removeprefix("ckpt-")
        if name.startswith("ckpt-") and step.isdigit() and int(step) not in keep:
            shutil.rmtree(os.path.join(out_dir, name))
