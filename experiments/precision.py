"""
What rounding does between sampler and trainer, and what the importance weights do about it.

    python experiments/precision.py out/model           a trained checkpoint, videos of noise
    python experiments/precision.py out/model vllm      vLLM samples, where it is installed

For each dtype and length one group of 16 completions of 64 tokens is sampled, and trained on with
the same weights. The columns of the table:

  gap        of the trainer's and the sampler's log-prob of a token
  clipped    tokens whose importance weight, 1 but for rounding, is beyond the clip
  entropy    of a token
  weights    by how much of its norm the gradient changes where the importance weights are left out,
             which means that the old log-probs are the trainer's own
  rounding   by how much the gradient without the weights differs from that of a float32 model which
             has the same weights and reads the same tokens
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench  # noqa: E402
import grpo  # noqa: E402
import model as vlm  # noqa: E402
import rollout  # noqa: E402
from flow import Group  # noqa: E402
from plumbing.ranks import run_command, start  # noqa: E402

G, L = 16, 64
FRAMES = (16, 64, 256, 1024)
HEADER = ("| sampler | dtype | prompt, tokens | gap, mean | gap, largest | clipped | entropy "
          "| weights | rounding |\n|" + "---|" * 9)


def gradient(model, group, banned, weighted):
    """The gradient of the GRPO objective on a group, as one vector, and metrics of its tokens.

    weighted: the old log-probs are the sampler's; else the trainer's own.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    model.zero_grad()
    tokens = [completion.tokens for completion in group.completions]
    logprobs, entropy = vlm.logprobs(model, [group.prompt], [tokens], banned)              # [G, L]
    sampled = pad([x.sampled for x in group.completions], batch_first=True).to(model.device)
    if weighted:
        old_logprobs = pad([x.logprobs for x in group.completions], batch_first=True)
    else:
        old_logprobs = logprobs.detach()
    old_logprobs = old_logprobs.to(model.device)                                           # [G, L]
    loss, clipped = grpo.policy_loss(
        logprobs, old_logprobs, group.advantages.to(model.device), sampled,
        clip_low=0.2, clip_high=0.28, average="sample", divisor=G)
    loss.backward()
    gap = (logprobs.detach() - old_logprobs)[sampled].abs()                               # [tokens]
    tokens = len(gap)
    metrics = {
        "gap": float(gap.sum()) / tokens, "gap_max": float(gap.max()),
        "clipped": (clipped["clip_low"] + clipped["clip_high"]) / tokens,
        "entropy": float(entropy[sampled].sum()) / tokens}
    parts = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts), metrics


def difference(x, y):
    """Of two vectors, relative to the second."""
    return float((x - y).norm() / y.norm())


def measure(name, dtype, frames, engine):
    """One row of the table. name: of a checkpoint; engine: "torch" or "vllm". -> dict"""
    options = bench.Options(model=name, dtype=dtype, completion=L)
    row = replace(options, frames=frames, variant="shared", rollout=engine)
    ranks = start()
    work = bench.Workload(row, ranks)
    model, banned, prompt = work.model, work.banned, work.prompt()
    keys = [[(0, "precision", n) for n in range(G)]]
    [completions] = rollout.rollout(
        model, work.tokenizer, [prompt], keys, ranks, engine=work.engine, think_budget=0,
        answer_budget=L, banned=banned, forced="")
    advantages = 1.0 - 2.0 * (torch.arange(G) % 2)
    group = Group(0, None, prompt, completions, None, advantages)
    weighted, metrics = gradient(model, group, banned, weighted=True)
    unweighted, _ = gradient(model, group, banned, weighted=False)

    # A float32 model with the weights as they were rounded.
    exact_model = vlm.load(name, ranks.device)[0]
    exact_model.load_state_dict(model.state_dict())
    exact_model.model.visual.requires_grad_(False)
    exact_group = replace(group, prompt=replace(prompt, vision=prompt.vision.float()))
    exact, _ = gradient(exact_model, exact_group, banned, weighted=False)
    return {"prompt_tokens": len(prompt.ids), **metrics,
            "weights": difference(weighted, unweighted),
            "rounding": difference(unweighted, exact)}


def main():
    name, *engines = sys.argv[1:]
    engine = engines[0] if engines else "torch"
    if engine not in ("torch", "vllm") or len(engines) > 1:
        raise ValueError(f"the sampler is torch or vllm, not {' '.join(engines)!r}")
    print(HEADER)
    for dtype in ("float32", "bfloat16"):
        for frames in FRAMES:
            m = measure(name, dtype, frames, engine)
            print(f"| {engine} | {dtype} | {m['prompt_tokens']:,} | {m['gap']:.1e} "
                  f"| {m['gap_max']:.1e} | {m['clipped']:.2%} | {m['entropy']:.2f} "
                  f"| {m['weights']:.2%} | {m['rounding']:.2%} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    run_command("precision.py", main)
