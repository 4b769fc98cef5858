"""
What rounding does between sampler and trainer, and what the importance weights do about it.

    python assets/precision.py out/model                     a trained checkpoint, videos of noise at 112 x 112 pixels
    python assets/precision.py out/model vllm                vLLM samples, where it is installed

For each dtype and length one group of 16 completions of 64 tokens is sampled, and trained on with the same weights. Gap: of the
trainer's log-prob and the sampler's, of a token. Clipped: tokens whose importance weight, 1 but for rounding, is beyond the clip.
Weights: by how much of its norm the gradient changes when the weights are left out, that is when the old log-probs are the
trainer's own. Rounding: by how much it differs from a float32 model's of the same weights on the same tokens, weights left out.
"""
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import bench
import encode
import model as vlm
import rollout
import train
from plumbing.ranks import leave

ALONE, G, L = encode.start(), 16, 64
FRAMES = (16, 64, 256, 1024)


def gradient(model, group, banned, weighted):
    """-> what `train.grpo_step` leaves, as one vector, and its metrics; weighted: the old log-probs are the sampler's"""
    model.zero_grad()
    if not weighted:
        with torch.no_grad():
            own, _ = vlm.logprobs(model, [group.prompt], [[x.tokens for x in group.completions]], banned)      # [G, L]
        group = replace(group, completions=[replace(x, logprobs=y) for x, y in zip(group.completions, own)])
    metrics = train.grpo_step(model, [group], train.Config(group_size=G), ALONE, banned, G)
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]), metrics


def measure(name, dtype, frames, engine):
    a = SimpleNamespace(**bench.SETTINGS | dict(model=name, dtype=dtype, frames=frames, variant="shared", rollout=engine, completion=L))
    work = bench.Work(a, ALONE)
    model, banned, prompt = work.model, work.banned, work.see()
    keys = [[(0, "precision", n) for n in range(G)]]
    [answers] = rollout.rollout(model, work.tokenizer, [prompt], keys, ALONE, engine=work.engine, think_budget=0, answer_budget=L,
                                banned=banned, forced="")
    group = train.Group(0, None, prompt, answers, None, 1.0 - 2.0 * (torch.arange(G) % 2))
    weighted, m = gradient(model, group, banned, True)
    plain, _ = gradient(model, group, banned, False)
    exact = vlm.load(name, ALONE.device)[0]                # float32, of the weights as they were rounded
    exact.load_state_dict(model.state_dict())
    exact.model.visual.requires_grad_(False)
    true, _ = gradient(exact, replace(group, prompt=replace(prompt, vision=prompt.vision.float())), banned, False)
    of = lambda x, y: float((x - y).norm() / y.norm())
    return [len(prompt.ids), m["gap"] / m["tokens"], m["gap_max"], (m["clip_low"] + m["clip_high"]) / m["tokens"], m["entropy"] / m["tokens"],
            of(weighted, plain), of(plain, true)]


def main(name, engine="torch"):
    if engine not in ("torch", "vllm"):
        raise ValueError(f"the sampler is torch or vllm, not {engine!r}")
    print("| sampler | dtype | prompt, tokens | gap, mean | gap, largest | clipped | entropy | weights | rounding |\n|" + "---|" * 9)
    for dtype in ("float32", "bfloat16"):
        for frames in FRAMES:
            P, gap, most, clipped, entropy, weights, rounding = measure(name, dtype, frames, engine)
            print(f"| {engine} | {dtype} | {P:,} | {gap:.1e} | {most:.1e} | {clipped:.2%} | {entropy:.2f} | {weights:.2%} | {rounding:.2%} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"precision.py: {e}")
    leave()
