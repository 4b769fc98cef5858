"""
Simulated learners for the curriculum: how well its estimates follow a policy that moves, and how
many groups have signal.

    python curriculum.py                    a learner that jumps, with both rules, step by step
    python experiments/learners.py all      every learner, 20 seeds each, a minute or two

128 questions of two domains, graded before training with 8 answers each; 16 groups of 8 per step.
"""
import math
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from curriculum import Curriculum, balanced, has_signal  # noqa: E402

QUESTIONS, GROUPS, ANSWERS = 128, 16, 8
SEEDS = range(20)


class Still(Curriculum):
    """As it was once: the estimate of a question that is not asked stands still."""

    def level(self, id):
        return 0.0


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --------------------------------------------------------------------------------------------------
# learners: what step, domain and visits add to the log-odds of a right answer

class Learner:
    """Its questions' log-odds have a standard deviation of 2. It does not move."""
    mean = 0.0

    def __init__(self, seed):
        self.random = random.Random(f"learner {seed}")
        self.ids = [f"q{i}" for i in range(QUESTIONS)]
        self.domains = {id: f"domain {i % 2}" for i, id in enumerate(self.ids)}
        self.start = {id: self.random.gauss(self.mean, 2.0) for id in self.ids}
        self.pace = {id: self.random.uniform(0, 2) for id in self.ids}
        self.learned = dict.fromkeys(self.ids, 0.0)        # from its own visits

    def gain(self, step, id):
        return 0.0

    def rate(self, step, id):
        """The true pass rate."""
        return sigmoid(self.start[id] + self.gain(step, id) + self.learned[id])

    def answer(self, step, id):
        """The accuracies of a group. -> [ANSWERS]"""
        rate = self.rate(step, id)
        return [float(self.random.random() < rate) for _ in range(ANSWERS)]

    def note(self, id, accuracies):
        """What this group teaches, beyond `gain`."""


class Slow(Learner):
    """All questions get easier: 0.23 becomes 0.94 in 100 steps."""
    mean = -1.2

    def gain(self, step, id):
        return 4 * step / 100


class Fast(Learner):
    """... in 20 steps."""
    mean = -1.2

    def gain(self, step, id):
        return 4 * min(1.0, step / 20)


class Jumps(Learner):
    """... at once, after ten steps."""
    mean = -1.2

    def gain(self, step, id):
        return 4.0 * (step >= 10)


class Forgets(Learner):
    """All questions get harder, in 15 steps."""
    mean = 1.2

    def gain(self, step, id):
        return -3 * min(1.0, max(0.0, (step - 5) / 15))


class Unequal(Fast):
    """Some questions get easier twice as fast as the mean, others not at all."""

    def gain(self, step, id):
        return super().gain(step, id) * self.pace[id]


class OneDomain(Fast):
    """One domain gets easier, the other a little harder."""

    def gain(self, step, id):
        factor = 1.0 if self.domains[id] == "domain 1" else -0.3
        return super().gain(step, id) * factor


class NoTransfer(Learner):
    """A question gets easier only when it is asked."""
    mean = -1.2

    def note(self, id, accuracies):
        self.learned[id] += 1.0 if has_signal(accuracies) else 0.1


class GradedLow(Learner):
    """All questions were graded 0 or 2 of 8, then all are right 4 times in 5."""

    def rate(self, step, id):
        return 0.8

    def grades(self):
        return {id: (2 * (i % 2), ANSWERS) for i, id in enumerate(self.ids)}


LEARNERS = [Learner, Slow, Fast, Jumps, Forgets, Unequal, OneDomain, NoTransfer, GradedLow]


# --------------------------------------------------------------------------------------------------
# what a curriculum makes of them

def follow(learner, make, seed, steps, tiers=True):
    """Yields (curriculum, groups with signal, mean |estimate - true pass rate|, mean estimate,
    questions asked so far) of each step. learner: a class; make: `Curriculum` or `Still`."""
    it = learner(seed)
    if learner is GradedLow:
        grades = it.grades()
    else:
        grades = {id: (sum(it.answer(0, id)), ANSWERS) for id in it.ids}
    curriculum = make(it.ids, seed, grades, tiers, it.domains)
    asked = set()
    for step in range(steps):
        drawn = curriculum.draw(GROUPS)
        signal = 0
        for id in drawn:
            accuracies = it.answer(step, id)
            curriculum.update(id, sum(accuracies), ANSWERS)
            it.note(id, accuracies)
            signal += has_signal(accuracies)
        curriculum.note_valid(signal, len(drawn))
        asked |= set(drawn)
        errors = [abs(curriculum.rate(id) - it.rate(step, id)) for id in it.ids]
        mean_rate = statistics.mean(map(curriculum.rate, it.ids))
        yield curriculum, signal, statistics.mean(errors), mean_rate, len(asked)


def measure(learner, make, seed, steps=40, tiers=True):
    """-> groups with signal of 100, mean error over the steps"""
    rows = list(follow(learner, make, seed, steps, tiers))
    signal = 100 * sum(row[1] for row in rows) / (steps * GROUPS)
    return signal, statistics.mean(row[2] for row in rows)


def low_grades(make, seed, steps=32):
    """`GradedLow` for four passes. -> the mean estimate after ten steps, questions never asked"""
    rows = list(follow(GradedLow, make, seed, steps))
    return rows[9][3], QUESTIONS - rows[-1][4]


def simulate(steps=200, ids=400, n=32, group=8, rlcs=True, seed=0):
    """A learner whose skill grows with every group it learns from, on questions easy to hard.
    Yields (curriculum, prompts drawn, groups with signal, groups kept, {id: pass rate}) per step.
    """
    difficulty = {f"q{i}": -4 + 8 * i / ids for i in range(ids)}
    rng = random.Random(seed)
    skill = -2.0
    curriculum = Curriculum(difficulty, seed, tiers=rlcs)
    for _ in range(steps):
        true = {id: sigmoid(2 * (skill - d)) for id, d in difficulty.items()}
        drawn = curriculum.draw(curriculum.expanded(n))
        groups = {}
        for slot, id in enumerate(drawn):
            groups[slot] = [float(rng.random() < true[id]) for _ in range(group)]
            curriculum.update(id, sum(groups[slot]), group)
        valid = sum(map(has_signal, groups.values()))
        curriculum.note_valid(valid, len(groups), cap=8.0 if rlcs else 1.0)
        kept = balanced(groups, n)
        skill += 0.001 * len(kept)
        yield curriculum, len(drawn), valid, len(kept), true


def drawn_per_wanted(wanted, valid_rate, seed, steps=1000, multiple=2):
    """-> prompts drawn and groups kept, of each that is wanted"""
    rng = random.Random(seed)
    curriculum = Curriculum(["q"], seed)
    drawn, kept = 0, 0
    for _ in range(steps):
        n = curriculum.expanded(wanted, multiple)
        valid = sum(rng.random() < valid_rate for _ in range(n))
        curriculum.note_valid(valid, n)
        drawn += n
        kept += min(valid, wanted)
    return drawn / steps / wanted, kept / steps / wanted


def seconds_a_draw(ids=1_000_000, n=32, draws=10, make=Curriculum):
    """From this many questions that were all graded. -> mean CPU seconds of a draw and its peek"""
    names = [f"q{i}" for i in range(ids)]
    curriculum = make(names, 0, {id: (i % 9, 8) for i, id in enumerate(names)})
    curriculum.draw(n)                                     # shuffles the first epoch
    start = time.process_time()
    for _ in range(draws):
        curriculum.peek(n)
        for id in curriculum.draw(n):
            curriculum.update(id, 4, 8)
    return (time.process_time() - start) / draws


# --------------------------------------------------------------------------------------------------
# tables

def show_jump(seed=0, steps=40):
    print("a learner that jumps after step 10: 16 groups a step, from 128 questions graded before\n"
          "         estimates of unasked questions stand still     they follow (this rule)\n"
          "         questions in each tier    error   signal       questions in each tier    error"
          "   signal")
    runs = zip(follow(Jumps, Still, seed, steps), follow(Jumps, Curriculum, seed, steps))
    signals = [0, 0]
    for step, pair in enumerate(runs, 1):
        cells = []
        for column, (curriculum, signal, error, _, _) in enumerate(pair):
            signals[column] += signal
            tiers = " ".join(f"{count:4d}" for count in curriculum.census()[0])
            cells.append(f"{tiers}    {error:.3f}   {signal:2d}/16")
        if step in (1, 5, 10, 11, 12, 13, 15, 20, 25, 30, 35, 40):
            print(f"step {step:2d}  {cells[0]}      {cells[1]}")
    print(f"groups with signal, of {steps * GROUPS}: {signals[0]} and {signals[1]}")


def spread(numbers, digits):
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def show_all():
    print("| learner | signal: uniform | still | follows | error: still | follows |")
    print("|---|---|---|---|---|---|")
    for learner in LEARNERS:
        cells = []
        uniform = [measure(learner, Still, seed, tiers=False) for seed in SEEDS]
        still = [measure(learner, Still, seed) for seed in SEEDS]
        follows = [measure(learner, Curriculum, seed) for seed in SEEDS]
        for rows in (uniform, still, follows):
            cells.append(spread([signal for signal, _ in rows], 1))
        for rows in (still, follows):
            cells.append(spread([error for _, error in rows], 3))
        print(f"| {learner.__name__} | " + " | ".join(cells) + " |", flush=True)
    print()
    for make in (Still, Curriculum):
        rows = [low_grades(make, seed) for seed in SEEDS]
        print(f"{make.__name__}: GradedLow, mean estimate after ten steps "
              f"{spread([rate for rate, _ in rows], 2)}, smallest {min(rows)[0]:.2f}; "
              f"never asked in four passes: {max(never for _, never in rows)} at most")
    for wanted in (2, 24):
        drawn, kept = drawn_per_wanted(wanted, 0.8, 0)
        print(f"{wanted} groups wanted, 4 in 5 have signal: {drawn:.2f} drawn and {kept:.2f} kept "
              "of each wanted")
    print(f"a million graded questions: {seconds_a_draw():.3f} CPU seconds a draw and its peek")


if __name__ == "__main__":
    if "all" in sys.argv[1:]:
        show_all()
    else:
        show_jump()
