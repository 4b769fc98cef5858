"""python -m pytest tests/test_precision.py -q

The precision table (experiments/precision.py): what its columns say.
"""
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import model as vlm
import rollout
from flow import Group, Ranks
from plumbing.metrics import MOST_GAP

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_the_precision_table_measures_what_its_columns_say():
    """Without the weights the gradient is that of advantage times log-prob, averaged by hand. In
    float32 nothing is left to correct."""
    precision = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "precision.py")))
    model, tokenizer = vlm.load("tiny")
    model.model.visual.requires_grad_(False)
    encoded = vlm.encode_video(model, lambda: data.open_video("toy:3", 8), Ranks())
    prompt = vlm.make_prompt(model, tokenizer, "How many?", *encoded)
    banned, G = vlm.banned_ids(model, tokenizer), precision.G
    keys = [[(0, n) for n in range(G)]]
    [completions] = rollout.sample(model, tokenizer, [prompt], keys, 5, 3)
    group = Group(0, None, prompt, completions, None, torch.linspace(-1, 1, G))
    unweighted, _ = precision.gradient(model, group, banned, weighted=False)
    model.zero_grad()
    tokens = [completion.tokens for completion in completions]
    logprobs, _ = vlm.logprobs(model, [prompt], [tokens], banned)
    loss = 0.0
    for advantage, row, completion in zip(group.advantages, logprobs, completions):
        sampled = row[:len(completion.tokens)][completion.sampled]
        loss = loss - advantage * sampled.sum() / completion.sampled.sum()
    (loss / G).backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert precision.difference(unweighted, by_hand) < 1e-5

    exact = precision.measure("tiny", "float32", 4, "torch")
    assert exact["gap"] < 1e-5
    assert max(exact[key] for key in ("gap_max", "weights", "rounding")) < 1e-4
    rounded = precision.measure("tiny", "bfloat16", 4, "torch")
    assert 1e-4 < rounded["gap"] < MOST_GAP["bfloat16"]
    assert rounded["weights"] > 10 * exact["weights"]
    assert rounded["rounding"] > 10 * exact["rounding"]
