"""python -m pytest tests/test_streams.py -q"""
import itertools

import numpy as np

from plumbing.streams import stream, uniform


def test_stream_is_a_function_of_its_whole_key():
    """The same in any process (the values are written down here), and another for each part of
    the key."""
    assert stream("id", 3, 0).random(2).tolist() == [0.1636301419138354, 0.5236305351326633]
    keys = itertools.product(("a", "b"), range(3), range(3))
    firsts = {stream(*key).random() for key in keys}
    assert len(firsts) == 18
    assert stream(1, "2").random() != stream("1", 2).random()


def test_uniform_is_the_beginning_of_each_keys_stream():
    keys = [("id", 3, 0), ("id", 3, 1)]
    numbers = uniform(keys, 5)
    assert numbers.dtype == np.float64 and numbers.shape == (2, 5)
    for key, row in zip(keys, numbers):
        assert row.tolist() == stream(*key).random(5).tolist()
    assert uniform(keys, 3).tolist() == numbers[:, :3].tolist()
