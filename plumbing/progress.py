"""
What a command prints while it runs: a completion as it is written; of a training run the plan, each
step with an estimate of the time left, and at the end what to do next.
"""
import json
import os
import re
import shlex
import sys
import time
from dataclasses import fields

import numpy as np
from tqdm import tqdm

from plumbing.pictures import folder_and_fps

FEW = 3        # measured steps before the time left is estimated
TREND = 5      # measured steps before a trend is fitted to them
RECENT = 40    # an estimate uses so many of the last steps, or half of all if that is more
LINES = 10     # of align and of the cold start in a log file, where there is no progress bar


# --------------------------------------------------------------------------------------------------
# before

def plan(c, ranks, progress, taught):
    """-> text: what is done, and what is still to do in each stage. How long it takes is known only
    of a stage that has been interrupted; the others say it after their first steps.

    progress: `stages.Progress`; taught: samples with a thought for the cold start.
    """
    stages = []
    if c.model == "tiny":
        stages.append(("align", c.align_steps, f"{c.sft_batch} videos each"))
    if taught:
        stages.append(("sft", c.sft_steps, f"{c.sft_batch} samples each"))
    of_rl = f"{c.prompts_per_step} questions x {c.group_size} completions each"
    if c.oversample_cap > 1:
        of_rl += ", more if some groups have no signal"
    stages.append(("rl", c.rl_steps, of_rl))
    text, lines = "", []
    if progress.checkpoint:
        done = ", ".join(f"{n} {stage} steps" for stage, n in progress.done.items())
        text = f"going on from {progress.checkpoint}: {done} done\n"
    for name, steps, each in stages:
        left = steps - progress.done[name]
        if left <= 0:
            continue
        line = f"  {name:6}{steps} steps, {each}"
        if progress.done[name]:
            line = f"  {name:6}{left} of {steps} steps, {each}"
            seconds = Pace(left, seconds_of_steps(progress.log.lines, name)).seconds_left()
            if seconds is not None:
                line += f": {about(seconds)}, as the steps before went"
        lines.append(line)
    if not lines:
        return text + "nothing is left to do"
    where = f"on {ranks.world} ranks (sp {ranks.sp} x dp {ranks.dp})"
    if ranks.world == 1:
        where = "on one rank"
    return "\n".join([f"{text}to do {where}, results in {c.out_dir}:", *lines,
                      "each stage says how long it will take after its first steps"])


# --------------------------------------------------------------------------------------------------
# meanwhile

def write_now(text):
    print(text, end="", flush=True)


class Screen:
    """Shows a completion while it is being written."""

    def __init__(self, text_of, write=write_now):
        """text_of(tokens) -> text; write(text) is called with each new piece."""
        self.text_of = text_of
        self.write = write
        self.shown = 0                                     # characters

    def show(self, writing):
        """writing: `rollout.Writing`. No letter is shown before all of its tokens are there."""
        text = self.text_of(writing.tokens)
        if len(text) > self.shown and (text[-1] != "\ufffd" or writing.done):
            self.write(text[self.shown:])
            self.shown = len(text)


class Report:
    """Tells of a stage's steps, on rank 0: in a progress bar on a terminal, and in lines, one for
    each RL step. Without a terminal there is no bar, and the other stages have a few lines."""

    def __init__(self, name, first, steps, earlier, run):
        """first: steps that are done already; earlier: their seconds; steps: of the whole stage."""
        self.name, self.first, self.steps, self.say = name, first, steps, run.say
        self.pace = Pace(steps - first, earlier)
        self.silent = run.ranks.rank != 0
        self.has_bar = sys.stderr.isatty()
        # The remaining time is in the postfix: tqdm's own falls short when steps grow longer.
        self.bar = tqdm(total=steps, initial=first, desc=name, dynamic_ncols=True,
                        disable=self.silent or not self.has_bar,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        self.time = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, step, note, row):
        """A step, counted from 1, is done. note: what happened in it; row: what is logged of it"""
        if self.silent:
            return
        now = time.perf_counter()
        seconds, self.time = now - self.time, now
        self.pace.add(seconds, sum(phases(row).values()))
        left, seconds_left = "", self.pace.seconds_left()
        if seconds_left:
            left = about(seconds_left) + " left"
        in_bar = [left] if self.name == "rl" else [note, left]
        self.bar.set_postfix_str(", ".join(filter(None, in_bar)), refresh=False)
        self.bar.update()
        if self.name == "rl":
            self.say(join(f"RL {self.count(step)}", note, took(seconds, phases(row)), left))
        elif left and step == self.first + FEW:
            self.say(f"{self.name}: {self.steps - step} more steps, {left}")
        elif not self.has_bar and is_due(step, self.steps):
            self.say(join(f"{self.name} {self.count(step)}", note, took(seconds, {}), left))

    def count(self, step):
        return f"{step:{len(str(self.steps))}}/{self.steps}"


def join(*parts):
    return "  ".join(part for part in parts if part)


def is_due(step, steps):
    """Whether a step is one of about LINES, evenly spread, of which the last is one."""
    return step * LINES // steps > (step - 1) * LINES // steps


def phases(row):
    """{phase: seconds} of a step's row in metrics.jsonl"""
    return {key.removesuffix("_s"): row[key] for key in row if key.endswith("_s")}


def took(seconds, of_phases):
    """seconds: since the step before, so evaluating and saving are in it. Phases that took less
    than a tenth are left out."""
    parts = {**of_phases, "other": seconds - sum(of_phases.values())} if of_phases else {}
    parts = [f"{name} {x:.1f}" for name, x in parts.items() if x >= seconds / 10]
    return f"{seconds:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def about(seconds):
    """
    >>> about(42), about(170), about(9000)
    ('about 40 s', 'about 3 min', 'about 2.5 h')
    """
    if seconds < 95:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 95 * 60:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


class Pace:
    """How long the steps of a stage take, and those that are still to do.

    Those before a restart count only until this process has measured a FEW of its own, since it may
    have other ranks or another machine.
    """

    def __init__(self, to_do, earlier=()):
        """to_do: steps; earlier: seconds of the steps before a restart"""
        self.to_do, self.earlier = to_do, list(earlier)
        self.work = []             # seconds of each step's own work
        self.other = 0.0           # seconds of all steps beside it: evaluating and saving

    def add(self, seconds, work):
        """A step took `seconds`, of which `work` were its own."""
        self.to_do -= 1
        self.work.append(work)
        self.other += seconds - work

    def seconds_left(self):
        """None if too few steps are known."""
        if len(self.work) >= FEW:          # the first also warms up
            other = self.to_do * self.other / len(self.work)
            return steps_to_come(self.work[1:], self.to_do) + other
        if len(self.earlier) >= FEW:
            return steps_to_come(self.earlier, self.to_do)
        return None


def steps_to_come(seconds, to_do):
    """Seconds of all steps that are still to do, if they go on as the last ones, which took
    `seconds` each.

    A straight line is fitted to these and followed for as many steps as it was fitted to; then it
    is level. No step is thought to take less than half or more than twice their mean.
    """
    recent = np.array(seconds[-max(RECENT, len(seconds) // 2):])                       # [n]
    n, mean = len(recent), recent.mean()
    slope = 0.0
    if n >= TREND:
        slope = np.polyfit(np.arange(n), recent, 1)[0]
    ahead = np.minimum(np.arange(to_do) + 1, n)                                        # [to_do]
    line = mean + slope * ((n - 1) / 2 + ahead)
    return float(line.clip(mean / 2, 2 * mean).sum())


def seconds_of_steps(lines, stage):
    """Seconds of a stage's steps, by lines of metrics.jsonl. -> a list, without evaluating"""
    rows = [json.loads(line) for line in lines]
    rows = [phases(row) for row in rows if row["stage"] == stage]
    return [sum(of_phases.values()) for of_phases in rows if of_phases]


# --------------------------------------------------------------------------------------------------
# after

def what_next(c, ranks, samples, ask, measure):
    """-> text: the files that a run has written, and commands that go on from them.

    samples: held-out ones, or else those trained on; ask: rollout.Options; measure: the options of
    evaluate.py for this run, None if no sample is held out.
    """
    page = os.path.join(c.out_dir, "watch.html")
    if not os.path.exists(page):
        page = os.path.join(c.out_dir, "curves.png")
    lines = [f"done: {c.out_dir}/model, {c.out_dir}/metrics.jsonl, {c.out_dir}/curves.png",
             f"  see what happened:       {page}"]
    model = os.path.join(c.out_dir, "model")
    sample = shortest(samples)
    if sample:
        about_it = {"model": model, "video": sample.video}
        if not has_own_question(c, sample.video):
            about_it["question"] = sample.question
        for name in ("frames", "max_pixels", "think_budget", "answer_budget"):
            about_it[name] = getattr(c, name)
        lines.append(f"  ask it, see it think:    {command('python rollout.py', ask, about_it)}")
    if measure:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        script = "python evaluate.py"
        if local > 1:
            script = f"torchrun --standalone --nproc_per_node={local} evaluate.py"
        options = {**vars(measure), "model": model}
        left_out = ["grade", "grades", "stage2", "prompts_per_step"]           # for grading
        if local % ranks.sp:
            left_out.append("sp")          # it spans machines; evaluate.py's default fits one
        for name in left_out:
            del options[name]
        lines.append(f"  measure it, held out:    {command(script, type(measure), options)}")
    return "\n".join(lines)


def has_own_question(c, video):
    """Whether rollout.py knows the question: of a built-in video it is the built-in one."""
    sources = (c.data, c.eval_data or c.data)
    built_in = all(source == "toy" or source.startswith("toy:") for source in sources)
    return built_in and bool(re.fullmatch(r"toy:\d+", video))


def shortest(samples):
    """The sample with the shortest question of those whose video is there; None if there is none"""
    there = []
    for sample in samples:
        path, _ = folder_and_fps(sample.video)
        if path.startswith("toy:") or os.path.exists(path):
            there.append(sample)
    return min(there, key=lambda sample: len(sample.question), default=None)


def command(script, options, values):
    """A command line with those values that differ from the defaults of `options`, a dataclass."""
    default = {field.name: field.default for field in fields(options)}
    given = [f"--{name}={value}" for name, value in values.items()
             if value != default[name] or name == "model"]
    return " ".join([script, *map(shlex.quote, given)])
