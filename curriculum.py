"""
RLCS, reinforcement learning with curriculum sampling (GLM-4.1V-Thinking §5.3). Rollouts take most
of a step's time, and a question that is always or never answered right teaches nothing. Four
remedies, in the order of an RL step:

  tiers            each question's pass rate is estimated from offline grades and from every group
  re-weighting     questions of medium difficulty are drawn more often, but no question never
  oversampling     more questions are drawn, by a ratio that is known before anything is sampled
  balance          of the groups with signal, those nearest to half right are trained on

The paper gives no numbers: not for the tiers, the merging of labels, the weights, the coefficient
of the moving average, or a cap on the unbounded ratio. The numbers below are ours. Left out: the
labels of human experts, and a sampling ratio per domain.

  python curriculum.py     a simulated learner, and how the tiers move
"""
import copy
import math
import random
from bisect import bisect_left, bisect_right

CUTS = [0.1, 0.35, 0.65, 0.9]   # pass rates between the five tiers
PRIOR = 0.5                     # right and wrong answers that every question starts with
DECAY = 0.7                     # factor on earlier answers at each visit: a tenth is left after 6
FLOOR = 0.1                     # smallest weight of a tier, as a share of the largest
SMOOTH = 0.9                    # coefficient of the ratio's moving average: about ten steps
SAVED = ("epoch", "queue", "met", "dropped", "recent", "ratio")     # in a checkpoint


class Curriculum:
    """Draws sample ids, and learns how hard they are from the accuracies of their groups.

    Draws walk through all ids in a shuffled order, epoch after epoch, and pass over an id with a
    probability that depends on its tier: no question is drawn again before the others had a
    chance. With equal weights (nothing is known yet, or tiers=False) every id comes once per epoch.
    Draws depend only on the seed, the place in the walk and the results noted so far: they are
    equal on all ranks, and after a restart.
    """

    def __init__(self, ids, seed, grades=None, tiers=True):
        """grades: {id: (correct, total)} of answers before training; tiers=False: equal weights."""
        self.ids = sorted(ids)
        self.seed = seed
        self.tiers = tiers
        self.epoch = 0       # epochs begun
        self.queue = []      # ids that are still to come, in order
        self.met = 0         # ids drawn or passed over so far; seeds the next accept/skip draw
        self.dropped = {}    # id -> why it cannot be used
        self.recent = {}     # id -> [sum of accuracies, completions], earlier ones decayed
        self.ratio = 1.0     # prompts drawn per group wanted, averaged over the steps
        for id in self.ids:
            if grades and id in grades:
                self.recent[id] = [float(x) for x in grades[id]]

    # ----- how hard is a question?

    def rate(self, id):
        """The estimated pass rate: the mean of a Beta posterior, 0.5 if nothing is known.

        Offline grades count like answers of an earlier visit. Graded 2 of 8: 2.5 / 9 = 0.28. Then
        a visit with 8 of 8 right: (0.5 + 0.7 * 2 + 8) / (1 + 0.7 * 8 + 8) = 0.68.
        """
        correct, total = self.recent.get(id, (0.0, 0.0))
        return (PRIOR + correct) / (2 * PRIOR + total)

    def tier(self, id):
        """0 (hardly ever right) to 4 (nearly always); a rate on a cut is in the outer tier."""
        rate = self.rate(id)
        return bisect_left(CUTS, rate) if rate < 0.5 else bisect_right(CUTS, rate)

    def census(self):
        """-> [5] ids in use in each tier, [5] mean of p(1-p) there, 0 in an empty tier"""
        known = [id for id in self.recent if id not in self.dropped]
        unknown = len(self.ids) - len(self.dropped.keys() | known)   # often nearly all; p is 0.5
        count = [0, 0, unknown, 0, 0]
        signal = [0.0, 0.0, unknown / 4, 0.0, 0.0]
        for id in known:
            p, tier = self.rate(id), self.tier(id)
            count[tier] += 1
            signal[tier] += p * (1 - p)
        return count, [s / max(1, n) for s, n in zip(signal, count)]

    def weights(self):
        """How often an id of each tier is drawn, relative to the others. -> [5], of sum 1

        In proportion to the mean of p(1-p), the variance of one answer: what such a group can
        teach. At least FLOOR of the largest, so that a question that was too hard is tried again,
        and a mastered one that is forgotten is noticed.
        """
        _, signal = self.census()
        floored = [max(s, FLOOR * max(signal)) for s in signal]
        if not self.tiers or not sum(floored):
            return [1 / 5] * 5
        return [w / sum(floored) for w in floored]

    def update(self, id, correct, total):
        """Note a group's result: `total` completions; correct is the sum of their accuracies."""
        correct_before, total_before = self.recent.get(id, (0.0, 0.0))
        self.recent[id] = [correct_before * DECAY + correct, total_before * DECAY + total]

    # ----- which questions are drawn next?

    def draw(self, n):
        """The next n ids, none twice unless fewer are in use. ValueError if all were dropped."""
        usable = len(self.ids) - len(self.dropped)
        if not usable:
            raise ValueError("no sample is left to draw: every one was dropped")
        weights = self.weights()
        count, _ = self.census()
        largest = max(weight for weight, ids in zip(weights, count) if ids)
        drawn = []
        this_round = set()   # ids drawn since all usable ones were drawn
        waiting = []         # of these, the ids met again: their turn comes after this round
        while len(drawn) < n:
            if not self.queue:
                self.refill()
            id = self.queue.pop(0)
            if id in self.dropped or id in waiting:        # an id waits for one turn only
                continue
            if id in this_round:                           # drawn at the end of the last epoch
                waiting.append(id)
            elif self.accepts(id, weights, largest):
                drawn.append(id)
                this_round.add(id)
            if len(this_round) == usable:
                this_round = set()
                self.queue = waiting + self.queue
                waiting = []
        self.queue = waiting + self.queue
        return drawn

    def refill(self):
        self.queue = list(self.ids)
        random.Random(f"{self.seed} epoch {self.epoch}").shuffle(self.queue)
        self.epoch += 1

    def accepts(self, id, weights, largest):
        """Whether an id that is met is drawn: with a chance of its tier's weight / the largest."""
        self.met += 1
        chance = random.Random(f"{self.seed} met {self.met}").random()
        return chance * largest < weights[self.tier(id)]

    def peek(self, n):
        """What draw(n) would return now, without drawing; [] if every id was dropped.

        A guess, for reading ahead: a drop or an update before the draw may change some of it.
        """
        if len(self.dropped) >= len(self.ids):
            return []
        ahead = copy.copy(self)
        ahead.queue = list(self.queue)
        return ahead.draw(n)

    def drop(self, id, why):
        """Never draw this id again."""
        self.dropped[id] = why

    # ----- how many questions are drawn?

    def expanded(self, n, multiple=1):
        """How many prompts to draw so that about n groups have signal, rounded up to a multiple."""
        # The average falls towards 1 but never reaches it: without 0.01 ceil would draw one prompt
        # too many for ever.
        prompts = n * self.ratio - 0.01
        return math.ceil(prompts / multiple) * multiple

    def note_valid(self, valid, total, cap=8.0):
        """Adapt the ratio: of a step's `total` groups, `valid` had signal. -> True if capped"""
        if not total:                                      # a step without groups says nothing
            return False
        ratio_now = expansion_ratio(1 - valid / total, cap)
        self.ratio += (1 - SMOOTH) * (ratio_now - self.ratio)
        return valid * cap < total

    def state_dict(self):
        return {key: copy.copy(getattr(self, key)) for key in SAVED}

    def load_state_dict(self, state):
        for key in SAVED:                                  # older checkpoints have more keys
            setattr(self, key, copy.copy(state[key]))


def expansion_ratio(invalid_rate, cap=8.0):
    """Prompts to draw per group wanted, if a share of the groups has no signal. -> float

    0 -> 1, 0.5 -> 2, 0.8 -> 5; at most cap, since there is no bound near 1. (GLM-4.1V §5.3.1)
    """
    return cap if invalid_rate >= 1 else min(cap, 1 / (1 - invalid_rate))


def has_signal(accuracies):
    """True if a group's accuracies differ. Rewards that differ only by format are no signal."""
    return len(set(accuracies)) > 1


def balanced(accuracies, n):
    """Of a step's groups, up to n that have signal, those with mean accuracy nearest to a half.

    accuracies: {slot: [G]}. -> slots in ascending order. Of two equally near, the lower is taken.
    """
    distance = {}
    for slot, group in accuracies.items():
        if has_signal(group):
            distance[slot] = abs(sum(group) / len(group) - 0.5)
    nearest = sorted(distance, key=lambda slot: (distance[slot], slot))
    return sorted(nearest[:n])


def simulate(steps=200, ids=400, n=32, group=8, rlcs=True, seed=0):
    """A learner whose skill grows with every group it learns from, on questions easy to hard.
    Yields (curriculum, prompts drawn, groups with signal, groups kept, {id: pass rate}) per step.
    """
    difficulty = {f"q{i}": -4 + 8 * i / ids for i in range(ids)}
    rng = random.Random(seed)
    skill = -2.0
    curriculum = Curriculum(difficulty, seed, tiers=rlcs)
    for _ in range(steps):
        true = {id: 1 / (1 + math.exp(2 * (d - skill))) for id, d in difficulty.items()}
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


if __name__ == "__main__":
    print("32 groups wanted per step, from 400 questions; "
          "the learner's skill grows with every group it learns from\n"
          "        questions in each tier, hard to easy    asked  with signal  kept"
          "    uniform: asked  with signal")
    for step, runs in enumerate(zip(simulate(), simulate(rlcs=False)), 1):
        if step == 1 or step % 25 == 0:
            (curriculum, asked, valid, kept, _), (_, asked_plain, valid_plain, _, _) = runs
            tiers = " ".join(f"{count:6d}" for count in curriculum.census()[0])
            print(f"step {step:3d}  {tiers}  {asked:9d} {valid / asked:11.0%} {kept:6d}"
                  f" {asked_plain:17d} {valid_plain / asked_plain:11.0%}")
