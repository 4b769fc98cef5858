"""Random numbers that depend only on a key: not on rank, batch or earlier calls."""
import hashlib

import numpy as np


def stream(*key):
    """The random numbers of a key, as a numpy generator: the same on any rank, in any batch, and
    after any restart. key: anything whose repr is the same in every process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def uniform(keys, n):
    """n numbers in [0, 1) from the stream of each key. -> float64 [keys,n]"""
    return np.stack([stream(*key).random(n) for key in keys])


def completion_keys(c, step, groups, drawn):
    """The key of each completion's random numbers. A question that is drawn twice in a step gets
    other numbers the second time. -> a list of G keys for each group"""
    keys = []
    for group in groups:
        id = group.sample.id
        before = sum(sample.id == id for sample in drawn[:group.slot])
        keys.append([(c.seed, step, id, before * c.group_size + n) for n in range(c.group_size)])
    return keys
