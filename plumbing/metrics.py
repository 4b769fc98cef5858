"""
What a run measures: seconds per phase, sums over trained tokens, one line of JSON per step.
"""
import glob
import json
import math
import os
import resource
import time
from collections import Counter
from contextlib import contextmanager

import torch

from plumbing.page import NEEDED, read_line
from plumbing.ranks import gather, on_rank_0


def mean(xs):
    return sum(xs) / len(xs) if xs else 0.0


class Clock:
    """Seconds per phase: `with clock("encode"): ...`"""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Meter:
    """Sums over the tokens that an RL step trains on, for each of its updates.

    Gap: the absolute difference of the sampler's and the trainer's log-prob of a sampled token.
    """
    KEYS = ("tokens", "entropy", "clip_low", "clip_high", "gap", "gap_max")

    def __init__(self):
        self.mine = dict.fromkeys(self.KEYS, 0.0)      # of this rank, in this update so far
        self.updates = []                              # of all ranks, one dict per update

    def add(self, batch, logprobs, entropy, counts):
        """Add a micro-batch. logprobs, entropy: [N, L]; counts: those of `grpo.policy_loss`"""
        gap = (logprobs.detach() - batch.old_logprobs)[batch.sampled].abs()            # [tokens]
        for key, value in counts.items():
            self.mine[key] += value
        self.mine["entropy"] += float(entropy[batch.sampled].sum())
        self.mine["gap"] += float(gap.sum())
        if len(gap):
            self.mine["gap_max"] = max(self.mine["gap_max"], float(gap.max()))

    def end_update(self, ranks, stage2):
        """Sum over all ranks. With stage 2 all sp ranks have the same tokens: only one counts."""
        if stage2 and ranks.sp_rank:
            self.mine = dict.fromkeys(self.KEYS, 0.0)
        of_rank = gather(self.mine, ranks)
        total = {key: sum(m[key] for m in of_rank) for key in self.KEYS}
        total["gap_max"] = max(m["gap_max"] for m in of_rank)
        self.updates.append(total)
        self.mine = dict.fromkeys(self.KEYS, 0.0)

    def mean(self, key):
        """The mean over all trained tokens; 0 if there were none."""
        tokens = sum(total["tokens"] for total in self.updates)
        return sum(total[key] for total in self.updates) / max(1.0, tokens)

    def sampler_gap(self):
        """-> (mean, largest) before the first update, when both have the same weights."""
        if not self.updates:
            return 0.0, 0.0
        first = self.updates[0]
        return first["gap"] / max(1.0, first["tokens"]), first["gap_max"]


# Largest mean difference in log-prob between sampler and trainer that rounding explains.
MOST_GAP = {"float32": 1e-3, "bfloat16": 0.1}


def check_gap(gap, dtype):
    """gap: mean difference in log-prob between sampler and trainer. Raises ValueError if it is
    larger than rounding explains."""
    if not gap <= MOST_GAP[dtype]:
        raise ValueError(
            f"sampler and trainer differ by {gap:.2g} in log-prob on average, more than "
            f"{MOST_GAP[dtype]:g}: they are not one model. Likely causes: positions computed in "
            "two ways, weights that were not reloaded after an update, two lists of banned ids, or "
            "another precision in the sampler")


class Log:
    """metrics.jsonl: one line per step, written by rank 0."""

    def __init__(self, path, ranks, count=0, tensorboard=False):
        """count: lines to keep of a run that resumes, see `first_lines`; later lines will be logged
        again.
        tensorboard: write the same numbers to the folder `tensorboard` beside it."""
        self.path, self.ranks, self.count, self.lines = path, ranks, count, []
        self.board = None
        on_rank_0(lambda: self.begin(tensorboard), ranks)

    def begin(self, tensorboard):
        self.lines = first_lines(self.path, self.count)
        with open(self.path + ".tmp", "w") as f:
            f.writelines(self.lines)
        os.replace(self.path + ".tmp", self.path)
        if tensorboard:
            self.board = Board(os.path.join(os.path.dirname(self.path), "tensorboard"))
            self.board.add(map(json.loads, self.lines))

    def write(self, stage, step, **values):
        self.count += 1
        if self.ranks.rank:
            return
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None                     # JSON has no nan
        row = {"step": step, "stage": stage, **values, "peak_mb": round(peak_bytes() / 2 ** 20)}
        self.lines.append(json.dumps(row) + "\n")
        with open(self.path, "a") as f:
            f.write(self.lines[-1])
        if self.board:
            self.board.add([row])

    def sync(self):
        """On rank 0, see that all lines are on the disk: a machine may lose its power."""
        with open(self.path, "rb") as f:
            os.fsync(f.fileno())


def first_lines(path, count):
    """The first `count` lines of metrics.jsonl, which a checkpoint counted. -> list of text

    Raises ValueError that names the file if it lacks one of them, or if one is damaged. What comes
    after them is not looked at: a killed run may have left half a line.
    """
    lines = []
    if not count:
        return lines
    try:
        with open(path, "rb") as f:
            found = f.read().split(b"\n")
        if len(found) <= count:            # the last piece is empty, or has no end
            raise ValueError(f"it has {len(found) - 1}")
        for number, line in enumerate(found[:count], 1):
            text = line.decode("utf-8", errors="replace")
            try:
                read_line(text, NEEDED["metrics.jsonl"])
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None
            lines.append(text + "\n")
    except (OSError, ValueError) as e:
        folder = os.path.dirname(path)
        cause = e.strerror if isinstance(e, OSError) else e
        raise ValueError(f"{path}: not whole up to the checkpoint, which counted {count} lines "
                         f"({cause}). Bring the file back, point the link {folder}/model to an "
                         "older ckpt-N, or choose another --out_dir") from e
    return lines


class Board:
    """The numbers of metrics.jsonl as scalars of TensorBoard: `rl/reward`, by step."""

    def __init__(self, folder):
        """What an earlier process wrote is removed, and all that is kept is written again: a step
        is counted within its stage, so SummaryWriter's purge_step, which knows no stages, would
        also cut a stage that is complete."""
        from torch.utils.tensorboard import SummaryWriter
        for path in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
            os.remove(path)
        self.writer = SummaryWriter(folder, purge_step=0)  # a TensorBoard that is open forgets too

    def add(self, rows):
        for row in rows:
            for key in row.keys() - {"step", "stage"}:
                if row[key] is not None:
                    self.writer.add_scalar(f"{row['stage']}/{key}", row[key], row["step"])
        self.writer.flush()


def peak_bytes():
    """Peak memory so far: of this rank's GPU, or else of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------
# what is printed and logged of an RL step

def summary(facts, drawn, meter, clock):
    """What is logged about all completions of a step. facts: {slot: `describe`} of all teams"""
    rows = [row for slot in facts for row in facts[slot]]
    record = {}
    for key in ("reward", "accuracy", "format", "length", "forced", "truncated"):
        record[key] = mean([float(row[key]) for row in rows])
    for key in ("entropy", "clip_low", "clip_high"):
        record[key] = meter.mean(key)
    for domain in sorted({drawn[slot].domain for slot in facts}):
        own = [row for slot in facts if drawn[slot].domain == domain for row in facts[slot]]
        answers = Counter(row["answer"] for row in own if row["answer"] is not None)
        record[f"accuracy_{domain}"] = mean([row["accuracy"] for row in own])
        record[f"length_{domain}"] = mean([row["length"] for row in own])
        # Near 1, a verifier is fooled by one answer to everything.
        record[f"same_answer_{domain}"] = max(answers.values(), default=0) / len(own)
    for domain, count in sorted(Counter(sample.domain for sample in drawn).items()):
        record[f"drawn_{domain}"] = count / len(drawn)
    for phase, seconds in clock.seconds.items():
        record[f"{phase}_s"] = round(seconds, 4)
    return record


def one_line(record, asked):
    """What is said of each step. record: what is logged of it; asked: questions drawn"""
    return (f"reward {record['reward']:.2f}  accuracy {record['accuracy']:.2f}  "
            f"kept {record['valid_groups']} of {asked}  length {record['length']:.0f}  "
            f"entropy {record['entropy']:.2f}")


def warn_of_shortage(run, step, kept, signal, graded, capped):
    """Print a line if a step has clearly fewer groups to learn from than it wants."""
    c = run.config
    if not kept:
        run.say(f"RL {step + 1}: no group has answers that differ in accuracy; nothing to learn "
                "from, step skipped")
    few = 4 * kept < 3 * c.prompts_per_step                # a small shortage is chance
    if c.oversample_cap > 1 and (capped or few):
        why = ""
        if capped:
            why = (f": at that rate more than oversample_cap = {c.oversample_cap:g} times as many "
                   "would have to be asked")
        run.say(f"RL {step + 1}: {kept} groups to learn from, {c.prompts_per_step} wanted; "
                f"{signal} of {graded} had signal{why}")


def show(run, step, groups, ungraded):
    """Print the groups that were not graded and, every show_every steps, one completion."""
    c = run.config
    for id, why in ungraded.items():
        run.say(f"RL {step + 1}: not graded {id}: {why}")
    if not groups or not c.show_every or step % c.show_every:
        return
    group = groups[0]
    totals = " ".join(f"{reward.total:.1f}" for reward in group.rewards)
    run.say(f"\n--- RL {step + 1}, {group.sample.id}: {group.sample.question}\n"
            f"{group.completions[0].text}\n"
            f"--- right: {group.sample.answer}; reward {group.rewards[0].total:.2f}; "
            f"the group's rewards {totals}\n")
