"""python -m pytest tests/test_tiny.py -q

The tiny model, made from nothing.
"""
import os
import random
import subprocess
import sys

import numpy as np
import torch

import model as vlm
from plumbing.tiny import build_tiny

FINGERPRINT = """
import hashlib, json
from plumbing.tiny import build_tiny
def fingerprint(seed):
    model, tokenizer, pixels = build_tiny(seed)
    words = [sorted(tokenizer.get_vocab().items()), str(pixels), tokenizer.chat_template]
    h = hashlib.sha256(json.dumps(words).encode())
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode() + tensor.numpy().tobytes())
    return h.hexdigest()
"""


def test_build_tiny_is_a_function_of_its_seed_and_leaves_the_generators_alone():
    """In this process and in another: a run with model=tiny must start from the same weights on
    every rank."""
    scope = {}
    exec(FINGERPRINT, scope)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = [scope["fingerprint"](seed) for seed in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    torch.manual_seed(123)                                 # nor does it depend on them
    assert first[0] == first[2] == scope["fingerprint"](0) and first[1] != first[0]
    torch.set_rng_state(states[0])
    root = os.path.dirname(os.path.abspath(vlm.__file__))
    command = [sys.executable, "-c", FINGERPRINT + "print(fingerprint(1))"]
    other = subprocess.run(command, cwd=root, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "77"})
    assert other.stdout.strip() == first[1], other.stderr


def test_the_seed_reaches_the_tiny_model():
    a, b = vlm.load("tiny", seed=1)[0].state_dict(), build_tiny(1)[0].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)
