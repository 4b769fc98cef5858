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
