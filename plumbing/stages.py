"""
A run has three stages: align, cold start ("sft") and RL. What they have in common: an optimizer, a
curriculum, a progress bar, lines in the log, checkpoints, and a place where a stopped run goes on.
"""
import math
import os
from dataclasses import asdict

from tqdm import tqdm

from plumbing import resume
from plumbing.metrics import Log
from plumbing.optimizer import make_optimizer, restore
from plumbing.plots import draw_curves

BAD_STEPS = 10         # optimizer steps in a row without a finite gradient that end a run


class Progress:
    """How far a run has come, and what its checkpoints hold besides the weights."""

    def __init__(self, config, ranks, mmap):
        """The state of the newest checkpoint in config.out_dir, or else of a run's beginning.
        mmap: see `resume.read_state`."""
        os.makedirs(config.out_dir, exist_ok=True)
        self.out_dir = config.out_dir
        self.checkpoint = resume.find(config.out_dir, ranks)       # a directory, or None
        self.done = {"align": 0, "sft": 0, "rl": 0}        # steps of each stage
        self.step, self.previous = 0, 0                    # of the newest checkpoint, and before it
        self.config = asdict(config)
        self.saved = {}                                    # what the stage that was saved left
        lines = 0
        if self.checkpoint:
            state = resume.read_state(self.checkpoint, config, mmap)
            self.done, self.step, self.previous = state["done"], state["step"], state["previous"]
            self.config, lines = state["config"], state["lines"]
            self.saved = {key: state.get(key) for key in ("optimizer", "copies", "curriculum")}
        self.bad_steps = 0
        self.log = Log(os.path.join(config.out_dir, "metrics.jsonl"), ranks, lines)

    def save(self, run, stage, step):
        """A checkpoint after `step` steps of a stage."""
        self.done[stage.name] = step
        self.previous, self.step = self.step, sum(self.done.values())
        copies = []
        if run.config.dtype != "float32":
            copies = stage.optimizer.param_groups[0]["params"]
        if run.ranks.rank == 0:
            draw_curves(self.log.lines, os.path.join(self.out_dir, "curves.png"))
        resume.save(run, {
            "step": self.step, "previous": self.previous, "lines": self.log.count,
            "done": self.done, "config": self.config, "stage": stage.name,
            "optimizer": stage.optimizer.state_dict(), "copies": copies,
            "curriculum": stage.curriculum.state_dict()})


class Stage:
    """Iterate over it for the steps of a stage that are still to do."""

    def __init__(self, name, steps, lr, curriculum, run, progress):
        self.name, self.steps, self.curriculum = name, steps, curriculum
        self.run, self.progress = run, progress
        self.optimizer = make_optimizer(run.model, lr)
        self.first = progress.done[name]
        saved, progress.saved = progress.saved, {}         # of one stage: kept no longer than it
        if self.first:
            restore(self.optimizer, saved["optimizer"], saved["copies"])
            curriculum.load_state_dict(saved["curriculum"])

    def __iter__(self):
        with tqdm(total=self.steps, initial=self.first, desc=self.name, dynamic_ncols=True,
                  disable=self.run.ranks.rank != 0) as self.bar:
            yield from range(self.first, self.steps)

    def count_skipped(self, norm):
        """1 where a gradient norm is not finite, so that its update was skipped; else 0. Raises
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
        """Samples that cannot be used are named, counted, and not drawn again. reasons: {id: why},
        those of all ranks."""
        dropped = self.curriculum.dropped
        for id, why in reasons.items():
            if id not in dropped:
                self.curriculum.drop(id, why)
                self.run.say(f"dropped {id}: {why} ({len(dropped)} dropped so far)")

    def log(self, step, note, **values):
        """Log one step, counted from 0, and show it in the bar with a note."""
        self.progress.log.write(self.name, step + 1, **values)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()

    def save_if_due(self, step):
        """A checkpoint every save_every steps, and after the stage's last."""
        if step + 1 == self.steps or (step + 1) % self.run.config.save_every == 0:
            self.progress.save(self.run, self, step + 1)
