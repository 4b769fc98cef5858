"""
RLCS, reinforcement learning with curriculum sampling (GLM-4.1V-Thinking §5.3). Rollouts take most
of a step's time, and a question that is always or never answered right teaches nothing. Four
remedies, in the order of an RL step:

  tiers            each question's pass rate is estimated from offline grades and from every group
  re-weighting     questions of medium difficulty are drawn more often, but no question never
  oversampling     more questions are drawn, by a ratio that is known before anything is sampled
  balance          of the groups with signal, those nearest to half right are trained on

The paper gives no numbers: none for tiers, the merging of labels, weights, the coefficient of the
moving average, or a cap on the unbounded ratio. Those below are ours, as is the rule of `update`.
Left out: labels of human experts. Proportions of domains are in plumbing/mixture.py.

  python curriculum.py     a learner that suddenly improves: fixed estimates, and this rule's
"""
import copy
import math
import random
import runpy
from bisect import bisect_left, bisect_right
from pathlib import Path

CUTS = [0.1, 0.35, 0.65, 0.9]   # pass rates between the five tiers
PRIOR = 0.5                     # right and wrong answers that every question starts with
DECAY = 0.7                     # factor on earlier answers at each visit: a tenth is left after 6
PACE = 0.1                      # how far a group's surprise moves the other estimates, in log-odds
FLOOR = 0.1                     # smallest weight of a tier, as a share of the largest
SMOOTH = 0.9                    # coefficient of the ratio's moving average: about ten steps
SAMPLE = 20_000                 # known questions that are counted, drawn at random from more
SAVED = ("epoch", "queue", "met", "dropped", "recent", "ratio")     # in a checkpoint
LATER = ("levels", "noted_at", "surplus")      # likewise, unless empty; older checkpoints lack them


class Curriculum:
    """Draws sample ids, and learns how hard they are from the accuracies of their groups.

    Draws walk through all ids in a shuffled order, epoch after epoch, and pass over an id with a
    probability that depends on its tier: no question is drawn again before the others had a
    chance. With equal weights (nothing is known yet, or tiers=False) every id comes once per epoch.
    A draw of nearly all ids has no choice: none comes twice in it, so the tiers hardly matter.
    Draws depend only on the seed, the place in the walk and the results noted so far: they are
    equal on all ranks, and after a restart.
    """

    def __init__(self, ids, seed, grades=None, tiers=True, domains=None):
        """grades: {id: (correct, total)}; tiers=False: equal weights; domains: {id: domain}"""
        self.ids = sorted(ids)
        self.seed = seed
        self.tiers = tiers
        self.domains = domains or {}
        self.epoch = 0       # epochs begun
        self.queue = []      # ids that are still to come, in order
        self.met = 0         # ids drawn or passed over so far; seeds the next accept/skip draw
        self.dropped = {}    # id -> why it cannot be used
        self.recent = {}     # id -> [sum of accuracies, completions], earlier ones decayed
        self.levels = {}     # "" (all questions) or domain -> how far its estimates were moved
        self.noted_at = {}   # id -> the sum of its two levels when its answers were noted
        self.ratio = 1.0     # prompts drawn per group wanted, averaged over the steps
        self.wanted = math.inf     # prompts that the step needs
        self.surplus = 0.0         # prompts that the step before drew beyond that
        for id in self.ids:
            if grades and id in grades:
                self.recent[id] = [float(x) for x in grades[id]]

    # ----- how hard is a question?

    def rate(self, id):
        """The estimated pass rate: the mean of a Beta posterior, 0.5 if nothing is known.

        Offline grades count like answers of an earlier visit. Graded 2 of 8: 2.5 / 9 = 0.28. Then
        a visit with 8 of 8 right: (0.5 + 0.7 * 2 + 8) / (1 + 0.7 * 8 + 8) = 0.68.
        """
        if id not in self.recent:
            return 0.5
        correct, total = self.recent[id]
        right, wrong = PRIOR + correct, PRIOR + total - correct
        moved = self.level(id) - self.noted_at.get(id, 0.0)
        right *= math.exp(min(moved, 30.0))                # odds are right / wrong
        return right / (right + wrong)

    def level(self, id):
        """How far `update` moved the estimates of the id's domain, in log-odds."""
        return self.levels.get("", 0.0) + self.levels.get(self.domains.get(id, "any"), 0.0)

    def tier(self, id):
        """0 (hardly ever right) to 4 (nearly always); a rate on a cut is in the outer tier."""
        rate = self.rate(id)
        return bisect_left(CUTS, rate) if rate < 0.5 else bisect_right(CUTS, rate)

    def census(self):
        """-> [5] ids in use in each tier (at most SAMPLE known), [5] mean of p(1-p) there, or 0"""
        unknown = len(self.ids) - len(self.recent) - sum(x not in self.recent for x in self.dropped)
        count = [0, 0, unknown, 0, 0]                      # often nearly all are unknown; p is 0.5
        variance = [0.0, 0.0, unknown / 4, 0.0, 0.0]       # of one answer
        known = list(self.recent)
        if len(known) > SAMPLE:            # every nth might be the first question of each video
            known = random.Random(f"{self.seed} census").sample(known, SAMPLE)
        for id in known:
            if id not in self.dropped:
                p, tier = self.rate(id), self.tier(id)
                count[tier] += 1
                variance[tier] += p * (1 - p)
        return count, [v / max(1, n) for v, n in zip(variance, count)]

    def weights(self):
        """How often an id of each tier is drawn, relative to the others. -> [5], of sum 1

        In proportion to the mean of p(1-p), the variance of one answer: what such a group can
        teach. At least FLOOR of the largest, so that what was too hard is tried again and what was
        forgotten is noticed. An empty tier has the largest.
        """
        count, variance = self.census()
        most = max(variance)
        floored = [max(v, FLOOR * most) if n else most for v, n in zip(variance, count)]
        if not self.tiers or not sum(floored):
            return [1 / 5] * 5
        return [w / sum(floored) for w in floored]

    def update(self, id, correct, total):
        """Note a group's result: `total` completions; correct is the sum of their accuracies.

        Training on some questions changes the answers to all. Estimates that stand still go stale,
        longest those of hard questions, which are asked least. So a group whose question had an
        estimate moves two levels by how much better or worse it did than that, as in Elo's rating:
        one of all questions and one of its domain. All other estimates move with them, in log-odds.
        Ten groups that do better by 0.5: 2 levels * 10 * 0.1 * 0.5 = 1, so from 0.27 to 0.5.
        """
        estimate, total_before = self.rate(id), self.recent.get(id, (0.0, 0.0))[1]
        correct_before = estimate * (2 * PRIOR + total_before) - PRIOR     # as if answered now
        if id in self.recent:
            for name in ("", self.domains.get(id, "any")):
                rise = PACE * (correct / total - estimate)
                self.levels[name] = self.levels.get(name, 0.0) + rise
        self.recent[id] = [correct_before * DECAY + correct, total_before * DECAY + total]
        self.noted_at[id] = self.level(id)

    # ----- which questions are drawn next?

    def draw(self, n):
        """The next n ids, none twice unless fewer are in use. ValueError if all were dropped."""
        usable = len(self.ids) - len(self.dropped)
        if not usable:
            raise ValueError("no sample is left to draw: every one was dropped")
        weights = self.weights()
        drawn = []
        while len(drawn) < n:
            drawn += self.draw_distinct(min(n - len(drawn), usable), weights)
        return drawn

    def draw_distinct(self, n, weights):
        """The next n ids, none twice. One that the next epoch brings again is put back in front."""
        drawn = {}                                         # as an ordered set
        met_again = {}                                     # likewise
        while len(drawn) < n:
            if not self.queue:
                self.queue = list(self.ids)
                random.Random(f"{self.seed} epoch {self.epoch}").shuffle(self.queue)
                self.epoch += 1
            id = self.queue.pop(0)
            if id in drawn:
                met_again[id] = True
            elif id not in self.dropped and self.accepts(id, weights):
                drawn[id] = True
        self.queue[:0] = met_again
        return list(drawn)

    def accepts(self, id, weights):
        """Whether an id that is met is drawn: with probability weight of its tier / largest weight;
        always if its estimate has drifted to the other side of 0.5 from its own answers, since it
        is then a guess."""
        self.met += 1
        chance = random.Random(f"{self.seed} met {self.met}").random()
        correct, total = self.recent.get(id, (0.0, 0.0))
        guess = (correct - total / 2) * (self.rate(id) - 0.5) < 0
        return guess or chance * max(weights) < weights[self.tier(id)]

    def peek(self, n):
        """What draw(n) would return if nothing is noted before it; [] if all are dropped."""
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
        """How many prompts to draw so that about n groups have signal, rounded up to a multiple.
        What rounding adds is deducted at the next step: otherwise a run that needs 2 prompts a step
        might draw 4 every time."""
        self.wanted = max(0.0, n * self.ratio - self.surplus)
        # The average never quite falls to 1: without 0.01 ceil would draw one too many for ever.
        return max(1, math.ceil((self.wanted - 0.01) / multiple)) * multiple

    def note_valid(self, valid, total, cap=8.0):
        """Adapt the ratio: of a step's `total` groups, `valid` had signal. -> True if capped"""
        if not total:                                      # a step without groups says nothing
            return False
        self.surplus = max(0.0, total - self.wanted)
        self.ratio += (1 - SMOOTH) * (expansion_ratio(1 - valid / total, cap) - self.ratio)
        return valid * cap < total

    def state_dict(self):
        later = [key for key in LATER if getattr(self, key)]
        return {key: copy.copy(getattr(self, key)) for key in (*SAVED, *later)}

    def load_state_dict(self, state):
        for key in state.keys() & {*SAVED, *LATER}:        # older checkpoints have other keys
            setattr(self, key, copy.copy(state[key]))
        # A question may have left the data file since.
        ids = set(self.ids)
        self.queue = [id for id in self.queue if id in ids]
        for about in (self.dropped, self.recent, self.noted_at):
            for id in about.keys() - ids:
                del about[id]


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
            distance[slot] = round(abs(math.fsum(group) / len(group) - 0.5), 9)    # 4/6 is as 2/6
    nearest = sorted(distance, key=lambda slot: (distance[slot], slot))
    return sorted(nearest[:n])


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "experiments" / "learners.py"), run_name="__main__")
