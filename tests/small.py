"""Small models, videos and completions that several test files use."""
import copy
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import AddedToken

import model as vlm
from flow import Video


def shake(model, seed=7):
    """Every weight off its initial value: with biases 0 and norms 1 a test would not notice that
    they are left out."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.03)
    return model


def text_config(heads, kv_heads):
    """What `plumbing.sharding.check_heads` reads of a model's config."""
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)


def shaken_tiny():
    """-> (the tiny model, its tokenizer)"""
    model, tokenizer = vlm.load("tiny")
    return shake(model), tokenizer


def frames(n, height, width, seed=0):
    """Noise. -> uint8 [n, height, width, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def film(n, height=56, width=84, seconds=1.5, seed=0, reads=None):
    """A `Video` of noise; reads: a list that notes each (lo, hi) that is read."""
    pixels = frames(n, height, width, seed)

    def read(lo, hi):
        if reads is not None:
            reads.append((lo, hi))
        return pixels[lo:hi]
    return Video("noise", n, height, width, seconds, read)


def answers(banned, lengths, seed=0):
    """Random completions that contain no banned id."""
    free = (~banned).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    return [free[torch.randint(len(free), (n,), generator=generator)] for n in lengths]


def thinker(tokenizer):
    """A tokenizer to which the tags are tokens of their own (GLM-4.1V, Qwen3), one of them not
    marked special."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True),
                      AddedToken("<answer>", special=False),
                      AddedToken("<|im_end|>\n", special=True)])
    return other
