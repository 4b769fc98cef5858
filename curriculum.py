"""
Which questions to ask next, and which answers are worth learning from. So far: a shuffled walk, and the signal test.
"""
import random


class Curriculum:
    """Draws sample ids: every id once an epoch, in an order that depends on seed and epoch alone."""

    def __init__(self, ids, seed):
        self.ids, self.seed = sorted(ids), seed
        self.epoch, self.queue = 0, []     # epochs begun; ids still to be drawn, in order
        self.dropped = {}                  # id -> why it cannot be used
        self.history = {}                  # id -> [sum of accuracies, completions]

    def draw(self, n):
        """The next n ids, no id twice unless there are fewer than n. Raises ValueError if every one was dropped."""
        usable, drawn, at = len(self.ids) - len(self.dropped), [], 0
        if not usable:
            raise ValueError("no sample is left to draw: every one was dropped")
        while len(drawn) < n:
            if at == len(self.queue):
                epoch = list(self.ids)
                random.Random(f"{self.seed} epoch {self.epoch}").shuffle(epoch)
                self.queue, self.epoch = self.queue + epoch, self.epoch + 1
            if self.queue[at] in self.dropped:
                self.queue.pop(at)
            elif self.queue[at] in drawn[len(drawn) // usable * usable:]:      # at an epoch's end: wait for the next draw
                at += 1
            else:
                drawn.append(self.queue.pop(at))
                at = 0 if len(drawn) % usable == 0 else at
        return drawn

    def peek(self, n):
        """What draw(n) would give now, without drawing; nothing if nothing is left. A sample dropped later changes it."""
        epoch, queue = self.epoch, list(self.queue)
        ids = self.draw(n) if len(self.dropped) < len(self.ids) else []
        self.epoch, self.queue = epoch, queue
        return ids

    def update(self, id, correct, total):
        """Note what a group of `total` completions earned: correct is the sum of their accuracies."""
        before = self.history.get(id, [0.0, 0])
        self.history[id] = [before[0] + correct, before[1] + total]

    def drop(self, id, why):
        self.dropped[id] = why

    def state_dict(self):
        return {"epoch": self.epoch, "queue": list(self.queue), "dropped": dict(self.dropped), "history": dict(self.history)}

    def load_state_dict(self, state):
        self.epoch, self.queue = state["epoch"], list(state["queue"])
        self.dropped, self.history = dict(state["dropped"]), dict(state["history"])


def has_signal(accuracies):
    """True where a group's accuracies differ. Format alone is no signal: it cannot hide a group without any."""
    return len(set(accuracies)) > 1
