"""
RLCS, reinforcement learning with curriculum sampling (GLM-4.1V-Thinking §5.3): rollouts cost most of a step, and a question
that is always or never answered right teaches nothing. Four answers to that, in the order of a step:

  tiers            each question's pass rate is estimated from offline grades and from every group that it was asked for
  re-weighting     questions of the tiers in the middle are asked more often, the easy and the hopeless less, none never
  oversampling     as many more are asked as the last steps say are needed, known before anything is sampled
  balance          of the groups that came back, those nearest to half right are trained on

The paper gives no number for any of it: not the tiers, how labels merge, the weights, the coefficient of the average, nor a
cap for a ratio that has no bound. The numbers below are ours. Left out: the labels of human experts, and one sampling ratio
for each domain.

  python curriculum.py     a simulated learner, and how the tiers move
"""
import hashlib
import json
import math
import os
import random
from bisect import bisect_left, bisect_right

CUTS = [0.1, 0.35, 0.65, 0.9]    # between the five tiers, in pass rate
PRIOR = 0.5                      # of a Beta, for right and for wrong: a question never asked is in the middle; all of 8 right: 0.94
DECAY = 0.7                      # of what is known of a question, at each visit: after 6 visits a tenth of it is left
FLOOR = 0.1                      # a tier's least weight, as a part of the largest one
SMOOTH = 0.9                     # of the expansion ratio's average: it follows in about ten steps


class Curriculum:
    """Draws sample ids, and learns from what comes back how hard they are.

    The draws walk through all the ids in a shuffled order, epoch after epoch, and pass over an id with a probability that its
    tier sets. So a question is never asked again before the others had their turn, with equal weights (nothing is known, or
    tiers=False) every id comes once an epoch, and few ids in a tier are not asked over and over. Draws are a function of seed,
    place in the walk, and what was noted so far: equal on all ranks, and after any restart.
    """

    def __init__(self, ids, seed, grades=None, tiers=True):
        """grades: {id: (correct, total)} of answers sampled before training; tiers: False draws all ids equally often."""
        self.ids, self.seed, self.tiers = sorted(ids), seed, tiers
        self.epoch, self.queue = 0, []     # epochs begun; ids still to be met, in order
        self.met = 0                       # ids met in the walk, drawn or passed over: what the next one's chance is keyed by
        self.dropped = {}                  # id -> why it cannot be used
        self.history = {}                  # id -> [sum of accuracies, completions], of the whole run
        self.recent = {id: list(map(float, grades[id])) for id in self.ids if id in (grades or {})}      # likewise, old ones decayed
        self.ratio = 1.0                   # prompts asked for each group wanted, averaged over the steps

    # --- how hard is a question?

    def rate(self, id):
        """Its estimated pass rate: the mean of a Beta posterior. Offline grades count as answers seen before the first visit.

        8 graded, 2 right: 2.5 / 9 = 0.28. Then a visit with 8 of 8: (0.5 + 0.7 * 2 + 8) / (1 + 0.7 * 8 + 8) = 0.68.
        """
        correct, total = self.recent.get(id, (0.0, 0.0))
        return (PRIOR + correct) / (2 * PRIOR + total)

    def tier(self, id):
        """0: hardly ever right, to 4: nearly always; a rate on a cut is in the outer of the two."""
        rate = self.rate(id)
        return bisect_left(CUTS, rate) if rate < 0.5 else bisect_right(CUTS, rate)

    def census(self):
        """How many ids in use are in each tier, and the mean of p(1-p) there. -> [5], [5]; an empty tier has mean 0"""
        known = [id for id in self.recent if id not in self.dropped]
        unknown = len(self.ids) - len(self.dropped.keys() | known)             # often nearly all: counted, not looked at
        count, signal = [0, 0, unknown, 0, 0], [0.0, 0.0, unknown / 4, 0.0, 0.0]
        for id in known:
            p, t = self.rate(id), self.tier(id)
            count[t], signal[t] = count[t] + 1, signal[t] + p * (1 - p)
        return count, [s / max(1, n) for s, n in zip(signal, count)]

    def weights(self):
        """How often an id of each tier is drawn, relative to the others; they sum to 1. -> [5]

        In proportion to the mean of p(1-p), the variance of one answer: what a group of such answers can teach. Never below
        FLOOR of the largest, so that what was too hard is tried again, and what was mastered is noticed when it is forgotten.
        """
        if not self.tiers:
            return [1 / 5] * 5
        signal = self.census()[1]
        floored = [max(s, FLOOR * max(signal)) for s in signal]
        return [w / sum(floored) for w in floored] if sum(floored) else [1 / 5] * 5

    def update(self, id, correct, total):
        """Note what a group of `total` completions earned: correct is the sum of their accuracies."""
        for table, decay in ((self.history, 1.0), (self.recent, DECAY)):
            before = table.get(id, [0.0, 0])
            table[id] = [before[0] * decay + correct, before[1] * decay + total]

    # --- what is asked next

    def draw(self, n):
        """The next n ids, no id twice unless there are fewer than n. Raises ValueError if every one was dropped."""
        usable, drawn, at = len(self.ids) - len(self.dropped), [], 0
        if not usable:
            raise ValueError("no sample is left to draw: every one was dropped")
        weights = self.weights()
        most = max(w for w, count in zip(weights, self.census()[0]) if count)
        while len(drawn) < n:
            if at == len(self.queue):
                epoch = list(self.ids)
                random.Random(f"{self.seed} epoch {self.epoch}").shuffle(epoch)
                self.queue, self.epoch = self.queue + epoch, self.epoch + 1
            id = self.queue[at]
            if id in self.dropped or id in self.queue[:at]:                    # one turn at most is kept for later
                self.queue.pop(at)
            elif id in drawn[len(drawn) // usable * usable:]:                  # at an epoch's end: wait for the next draw
                at += 1
            else:
                self.queue.pop(at)
                self.met += 1
                if random.Random(f"{self.seed} met {self.met}").random() * most < weights[self.tier(id)]:
                    drawn.append(id)
                    at = 0 if len(drawn) % usable == 0 else at
        return drawn

    def peek(self, n):
        """What draw(n) would give now, without drawing; nothing if nothing is left.

        A guess where it reads ahead: a sample dropped before the draw, or an estimate that moves, changes some of it.
        """
        epoch, queue, met = self.epoch, list(self.queue), self.met
        ids = self.draw(n) if len(self.dropped) < len(self.ids) else []
        self.epoch, self.queue, self.met = epoch, queue, met
        return ids

    def drop(self, id, why):
        self.dropped[id] = why

    # --- how many are asked

    def expanded(self, n, multiple=1):
        """How many prompts to ask so that about n groups have signal, rounded up to a multiple. -> int, known before sampling"""
        return math.ceil((n * self.ratio - 0.01) / multiple) * multiple        # an average never quite returns to 1

    def note_valid(self, valid, total, cap=8.0):
        """Of a step's `total` groups, `valid` had signal: the next step's ratio follows. -> True where the cap binds"""
        if not total:                      # an empty step says nothing
            return False
        now = expansion_ratio(1 - valid / total, cap)
        self.ratio += (1 - SMOOTH) * (now - self.ratio)
        return valid * cap < total

    def state_dict(self):
        return {"epoch": self.epoch, "queue": list(self.queue), "dropped": dict(self.dropped), "history": dict(self.history),
                "met": self.met, "recent": dict(self.recent), "ratio": self.ratio}

    def load_state_dict(self, state):
        self.epoch, self.queue, self.met, self.ratio = state["epoch"], list(state["queue"]), state["met"], state["ratio"]
        self.dropped, self.history, self.recent = (dict(state[k]) for k in ("dropped", "history", "recent"))


def expansion_ratio(invalid_rate, cap=8.0):
    """Prompts to ask for each group wanted, if that part of the groups is all right or all wrong (GLM-4.1V §5.3.1). -> float

    0 -> 1, 0.5 -> 2, 0.8 -> 5; at most cap, for at 1 there is no bound.
    """
    return cap if invalid_rate >= 1 else min(cap, 1 / (1 - invalid_rate))


def has_signal(accuracies):
    """True where a group's accuracies differ. Format alone is no signal: it cannot hide a group without any."""
    return len(set(accuracies)) > 1


def balanced(accuracies, n):
    """Of a step's groups, the n with signal whose mean accuracy is nearest to a half; all of them if there are fewer.

    accuracies: {slot: [G]}. -> slots in their order; of two as near the one that was drawn first is taken.
    """
    off = {slot: abs(sum(a) / len(a) - 0.5) for slot, a in accuracies.items() if has_signal(a)}
    return sorted(sorted(off, key=lambda slot: (off[slot], slot))[:n])


# ---------------------------------------------------------------------------------------------------------------------
# offline grades: a line for each question, {"id": ..., "correct": ..., "total": ...} and what it is of

def about(sample):
    """What a grade is of: it tells the same id in other data."""
    return hashlib.sha256(json.dumps([sample.question, sample.answer]).encode()).hexdigest()[:12]


def read_grades(path, samples, model=None):
    """A grades.jsonl -> {id: [sum of accuracies, answers]}; an id's lines, of several models, are added up.

    Raises ValueError that names the line which is no grade, is of other data, or, if model is given, of another model.
    """
    by_id, grades = {s.id: s for s in samples}, {}
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; --mode=grade writes one")
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")[:-1]                  # a last line without its end was being written
    for where, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            id, correct, total = str(row["id"]), float(row["correct"]), float(row["total"])
            if not 0 <= correct <= total < math.inf:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {where}: expected {{"id": ..., "correct": ..., "total": ...}}, found {line[:80]!r}') from None
        if id not in by_id or row.get("about", about(by_id[id])) != about(by_id[id]):
            raise ValueError(f"{path}, line {where}: these grades are of other data, whose sample {id!r} is not this data's")
        if model and row.get("model") != model:
            raise ValueError(f"{path}, line {where}: graded by {row.get('model')!r}, not {model!r}; choose another --out_dir")
        before = grades.get(id, [0.0, 0.0])
        grades[id] = [before[0] + correct, before[1] + total]
    return grades


def grade_line(sample, correct, total, model):
    """A line of grades.jsonl."""
    return json.dumps({"id": sample.id, "correct": correct, "total": total, "model": model, "about": about(sample)}) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# a simulation

def simulate(steps=200, ids=400, n=32, group=8, rlcs=True, seed=0):
    """A learner whose skill grows with every group it learns from; questions have difficulties from -4 to 4.

    Yields (curriculum, prompts asked, groups with signal, groups kept, {id: true pass rate}) at each step.
    """
    hard, rng, skill = {f"q{i}": -4 + 8 * i / ids for i in range(ids)}, random.Random(seed), -2.0
    curriculum = Curriculum(hard, seed, tiers=rlcs)
    for _ in range(steps):
        true = {id: 1 / (1 + math.exp(2 * (d - skill))) for id, d in hard.items()}
        drawn = curriculum.draw(curriculum.expanded(n))
        groups = {slot: [float(rng.random() < true[id]) for _ in range(group)] for slot, id in enumerate(drawn)}
        for slot, a in groups.items():
            curriculum.update(drawn[slot], sum(a), len(a))
        valid = sum(map(has_signal, groups.values()))
        curriculum.note_valid(valid, len(groups), 8.0 if rlcs else 1.0)
        kept = balanced(groups, n)
        skill += 0.001 * len(kept)
        yield curriculum, len(drawn), valid, len(kept), true


if __name__ == "__main__":
    print("32 groups wanted a step, of 400 questions; the learner's skill grows with every group it learns from\n"
          "        questions in each tier, hard to easy    asked  with signal  kept    uniform: asked  with signal")
    for step, (rlcs, plain) in enumerate(zip(simulate(), simulate(rlcs=False)), 1):
        if step == 1 or step % 25 == 0:
            (curriculum, asked, valid, kept, _), (_, asked_plain, valid_plain, _, _) = rlcs, plain
            print(f"step {step:3d}  " + " ".join(f"{n:6d}" for n in curriculum.census()[0])
                  + f"  {asked:9d} {valid / asked:11.0%} {kept:6d} {asked_plain:17d} {valid_plain / asked_plain:11.0%}")
