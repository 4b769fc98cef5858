"""
Which questions to ask next, and which answers are worth learning from. So far: a shuffled walk, and the signal test.
"""
import random


class Curriculum:
    """Draws sample ids: every id once an epoch, in an order that depends on seed and epoch alone."""

    def __init__(self, ids, seed):
        self.ids, self.seed = sorted(ids), seed
        self.drawn = 0                     # how many draws were ever made
        self.dropped = {}                  # id -> why it cannot be used
        self.history = {}                  # id -> [sum of accuracies, completions]

    def draw(self, n):
        """The next n ids; fewer than n distinct ones exist only if the data has fewer. Raises ValueError if none is left."""
        if len(self.dropped) == len(self.ids):
            raise ValueError("no sample is left to draw: every one was dropped")
        drawn = []
        while len(drawn) < n:
            epoch, at = divmod(self.drawn, len(self.ids))
            id = self.order(epoch)[at]
            self.drawn += 1
            if id not in self.dropped:
                drawn.append(id)
        return drawn

    def peek(self, n):
        """What draw(n) would give now, without drawing; nothing if nothing is left. A sample dropped later changes it."""
        drawn = self.drawn
        ids = self.draw(n) if len(self.dropped) < len(self.ids) else []
        self.drawn = drawn
        return ids

    def order(self, epoch):
        if getattr(self, "shuffled", (None,))[0] != epoch:
            ids = list(self.ids)
            random.Random(f"{self.seed} epoch {epoch}").shuffle(ids)
            self.shuffled = epoch, ids
        return self.shuffled[1]

    def update(self, id, correct, total):
        """Note what a group of `total` completions earned: correct is the sum of their accuracies."""
        before = self.history.get(id, [0.0, 0])
        self.history[id] = [before[0] + correct, before[1] + total]

    def drop(self, id, why):
        self.dropped[id] = why

    def state_dict(self):
        return {"drawn": self.drawn, "dropped": self.dropped, "history": self.history}

    def load_state_dict(self, state):
        self.drawn, self.dropped, self.history = state["drawn"], dict(state["dropped"]), dict(state["history"])


def has_signal(accuracies):
    """True where a group's accuracies differ. Format alone is no signal: it cannot hide a group without any."""
    return len(set(accuracies)) > 1
