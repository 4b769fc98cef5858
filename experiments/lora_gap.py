"""
What merging does to a policy that was trained with LoRA: the frozen weight plus its update is
rounded to the dtype of the run, and vLLM and the checkpoint have the rounded sum.

    python experiments/lora_gap.py out/model          a checkpoint with an adapter beside it

Built-in videos that no run trains on; completions are sampled by the torch engine from the model
with its adapters beside the frozen weights. The columns: the mean and the largest difference of a
sampled token's log-prob

  merging    between the model with adapters and the merged one, both as the trainer computes them
  rounding   between sampler and trainer of the same model, adapters beside: what the dtype does
  both       between the trainer with adapters and a sampler with the merged weights
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import encode  # noqa: E402
import model as vlm  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from flow import Ranks, Run  # noqa: E402
from plumbing import lora  # noqa: E402
from plumbing.sharding import weights  # noqa: E402

VIDEOS, G = 32, 8


def trainer_logprobs(model, prompts, groups, banned):
    """-> one [L] for each completion"""
    found = []
    with torch.no_grad():
        for prompt, group in zip(prompts, groups):
            tokens = [x.tokens for x in group]
            rows, _ = vlm.logprobs(model, [prompt], [tokens], banned)
            found += [row[:len(x)] for row, x in zip(rows, tokens)]
    return found


def difference(a, b, completions):
    """-> mean and largest, over the sampled tokens"""
    gaps = torch.cat([(x - y)[z.sampled].abs() for x, y, z in zip(a, b, completions)])
    return f"{float(gaps.mean()):.1e} | {float(gaps.max()):.1e}"


def measure(checkpoint, dtype):
    """One row of the table."""
    with open(Path(checkpoint) / "adapter" / "adapter_config.json") as f:
        options = json.load(f)
    base = options["base_model_name_or_path"]
    c = train.Config(model=base, lora_rank=options["r"], lora_alpha=options["lora_alpha"])
    model, tokenizer = vlm.load(base, dtype=dtype)
    lora.adapt(model, c, None)
    lora.load_adapter(model, checkpoint)
    merged, _ = vlm.load(base, dtype=dtype)
    merged.load_state_dict(dict(weights(model)), strict=False)
    banned = vlm.banned_ids(model, tokenizer)
    run = Run(c, Ranks(), print, model, tokenizer, banned, encode.Cache())
    budgets = rollout.budgets(c)
    samples = [replace(x, video=f"toy:{10 ** 6 + n}")
               for n, x in enumerate(data.load("toy")[:VIDEOS])]
    made, _ = data.make_prompts(run, samples, rollout.room(tokenizer, **budgets))
    prompts = data.fetch(run, [prompt for _, prompt in made])
    keys = [[(0, "lora", n, g) for g in range(G)] for n in range(len(prompts))]
    columns = []
    for sampler in (model, merged):
        groups = rollout.rollout(sampler, tokenizer, prompts, keys, Ranks(), **budgets)
        completions = [x for group in groups for x in group]
        sampled = [x.logprobs for x in completions]
        beside = trainer_logprobs(model, prompts, groups, banned)
        if sampler is model:
            without = trainer_logprobs(merged, prompts, groups, banned)
            columns.append(difference(beside, without, completions))
        columns.append(difference(beside, sampled, completions))
    return f"| {str(dtype).removeprefix('torch.')} | " + " | ".join(columns) + " |"


if __name__ == "__main__":
    print("| dtype | merging | largest | rounding | largest | both | largest |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        print(measure(sys.argv[1], dtype), flush=True)
