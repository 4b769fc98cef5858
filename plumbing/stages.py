"""
The three stages of a run are align, cold start ("sft") and RL. This is what they share: an
optimizer, a curriculum, a progress bar, lines in the log, checkpoints, and resuming.
"""
import math
import os
from dataclasses import asdict

from plumbing import record, resume
from plumbing.command_line import make_folder
from plumbing.metrics import Log
from plumbing.optimizer import make_optimizer, restore
from plumbing.page import write_page
from plumbing.plots import draw_curves
from plumbing.progress import Report, seconds_of_steps
from plumbing.ranks import on_rank_0

BAD_STEPS = 10         # updates in a row without a finite gradient that end a run (it says "ten")


class Progress:
    """How many steps of each stage are done, and what checkpoints hold besides the weights."""

    def __init__(self, config, ranks, mmap):
        """The state of the newest checkpoint in config.out_dir, or of a new run.
        mmap: see `resume.read_state`."""
        make_folder(config.out_dir)
        self.out_dir = config.out_dir
        self.checkpoint = resume.find(config.out_dir, ranks)       # a directory, or None
        self.done = {"align": 0, "sft": 0, "rl": 0}        # steps of each stage
        self.step, self.previous = 0, 0                    # of the newest checkpoint, one before
        self.config = asdict(config)
        self.saved = {}                                    # the saved stage's optimizer, curriculum
        lines = 0
        if self.checkpoint:
            state = resume.read_state(self.checkpoint, config, mmap)
            self.done, self.step, self.previous = state["done"], state["step"], state["previous"]
            self.config, lines = state["config"], state["lines"]
            self.saved = {key: state.get(key) for key in ("optimizer", "copies", "curriculum")}
        self.bad_steps = 0
        self.log = Log(os.path.join(config.out_dir, "metrics.jsonl"), ranks, lines,
                       config.tensorboard)
        self.rollouts = os.path.join(config.out_dir, "rollouts.jsonl")
        on_rank_0(lambda: record.cut_back(self.rollouts, self.done["rl"], config.rl_steps), ranks)

    def save(self, run, stage, step):
        """A checkpoint after `step` steps of a stage, with the pictures of the run so far."""
        self.done[stage.name] = step
        self.previous, self.step = self.step, sum(self.done.values())
        copies = []
        if run.config.dtype != "float32":
            copies = stage.optimizer.param_groups[0]["params"]
        if run.ranks.rank == 0:
            draw_curves(self.log.lines, os.path.join(self.out_dir, "curves.png"))
            self.log.sync()                # the checkpoint counts its lines
        resume.save(run, {
            "step": self.step, "previous": self.previous, "lines": self.log.count,
            "done": self.done, "config": self.config, "stage": stage.name,
            "optimizer": stage.optimizer.state_dict(), "copies": copies,
            "curriculum": stage.curriculum.state_dict()})
        if run.ranks.rank == 0:
            write_page(self.out_dir)


class Stage:
    """One stage of a run. Iterating over it yields the steps that are still to do."""

    def __init__(self, name, steps, lr, curriculum, run, progress):
        self.name, self.steps, self.curriculum = name, steps, curriculum
        self.run, self.progress = run, progress
        self.optimizer = make_optimizer(run.model, lr)
        self.first = progress.done[name]
        saved, progress.saved = progress.saved, {}         # of one stage only
        if self.first:
            restore(self.optimizer, saved["optimizer"], saved["copies"])
            curriculum.load_state_dict(saved["curriculum"])

    def __iter__(self):
        earlier = seconds_of_steps(self.progress.log.lines, self.name)
        with Report(self.name, self.first, self.steps, earlier, self.run) as self.report:
            yield from range(self.first, self.steps)

    def count_skipped(self, norm):
        """1 if a gradient norm is not finite, so that its update was skipped; else 0. Raises
        ValueError at BAD_STEPS in a row."""
        if math.isfinite(norm):
            self.progress.bad_steps = 0
            return 0
        self.progress.bad_steps += 1
        if self.progress.bad_steps == BAD_STEPS:
            raise ValueError("ten steps in a row had a gradient that is not finite; "
                             "lower lr or sft_lr")
        return 1

    def drop(self, reasons):
        """Name and count samples that cannot be used, and never draw them again.
        reasons: {id: why}, of all ranks."""
        dropped = self.curriculum.dropped
        for id, why in reasons.items():
            if id not in dropped:
                self.curriculum.drop(id, why)
                self.run.say(f"dropped {id}: {why} ({len(dropped)} dropped so far)")

    def recording(self, step, drawn):
        """What collects a line of rollouts.jsonl in this RL step, counted from 0."""
        return record.Recording(self.run, self.curriculum, self.progress.rollouts, step, drawn)

    def log(self, step, note, **values):
        """Log one step, counted from 0, and report it with a note."""
        self.progress.log.write(self.name, step + 1, **values)
        self.report.step(step + 1, note, values)

    def save_if_due(self, step):
        """Save a checkpoint every save_every steps, and after the last step of the stage."""
        if step + 1 == self.steps or (step + 1) % self.run.config.save_every == 0:
            self.progress.save(self.run, self, step + 1)
