"""
The parts of first_gpu_hour.py that need vLLM: whether it has the trainer's weights, and how it
sleeps.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench  # noqa: E402
import model as vlm  # noqa: E402
from plumbing import memory  # noqa: E402
from plumbing.metrics import MOST_GAP, Clock  # noqa: E402
from plumbing.optimizer import update  # noqa: E402
from plumbing.ranks import start  # noqa: E402
from plumbing.vllm_engine import VLLM  # noqa: E402

VLLM_MEMORY = 0.35         # its share: beside it the trainer of 3B has 45 GB while vLLM samples
WEIGHT = "embed_tokens.weight"     # under this name and in this form in both models
LR = 1e-4                  # large enough to change most bfloat16 weights


def vllm_work(row):
    """-> (a `bench.Workload`, a vLLM engine with its weights)"""
    work = bench.Workload(row, start(1))
    with tempfile.TemporaryDirectory() as folder:
        vlm.save(work.model, work.tokenizer, folder)
        vision = memory.vision_tokens(work.model.config, row.frames, row.size)
        engine = VLLM(folder, work.model, work.tokenizer, work.ranks, vision + 512 + row.completion,
                      work.banned, VLLM_MEMORY)
    return work, engine


def sampled_group(work, engine, number):
    """A group by vLLM, which is awake and has the weights. -> (prompt, completions)"""
    prompt = work.prompt()
    keys = [[(0, "first hour", number, n) for n in range(work.row.group)]]
    [completions] = engine.sample([prompt], keys, think_budget=0,
                                  answer_budget=work.row.completion, forced="")
    return prompt, completions


def sampler_gap(work, prompt, completions):
    """The mean difference between the sampler's and the trainer's log-probs."""
    tokens = [completion.tokens for completion in completions]
    with torch.no_grad():
        logprobs, _ = vlm.logprobs(work.model, [prompt], [tokens], work.banned)        # [G, L]
    of_sampler = torch.stack([c.logprobs for c in completions]).to(logprobs.device)    # [G, L]
    return float((logprobs - of_sampler).abs().mean())


def most_gap(work):
    """The largest such difference that rounding explains."""
    return MOST_GAP[str(work.model.dtype).removeprefix("torch.")]


def weight_of(model):
    """The first rows of WEIGHT, of the trainer's or of vLLM's model, copied to the CPU."""
    [weight] = [p for name, p in model.named_parameters() if name.endswith(WEIGHT)]
    return weight.detach()[:512].cpu().clone()


def weights(row):
    """After each of three updates one of vLLM's weights is compared with the trainer's."""
    work, engine = vllm_work(row)
    gaps, changed, differing = [], [], []
    for number in range(3):
        engine.load(work.model)
        prompt, completions = sampled_group(work, engine, number)
        engine.rest()
        gaps.append(sampler_gap(work, prompt, completions))
        bench.forward_backward(work.model, prompt, completions, work.advantages, work.ranks,
                               work.banned, work.row.group, stage2=False)
        before = weight_of(work.model)
        update(work.model, work.optimizer, LR, work.ranks)
        trained = weight_of(work.model)
        engine.load(work.model)
        [of_vllm] = engine.llm.apply_model(weight_of)
        engine.rest()
        changed.append(int((trained != before).sum()))
        differing.append(int((trained != of_vllm).sum()))
    figures = {"sampler_gap": gaps, "changed": changed, "differing": differing,
               "second_runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "vLLM's default")}
    handed_over = min(changed) > 0 and max(differing) == 0
    good = handed_over and max(gaps) <= most_gap(work)
    verdict = (f"{'ok' if good else 'look'}: sampler_gap {', '.join(f'{g:.1e}' for g in gaps)}; "
               f"numbers of a weight that each update changed: {changed}; that differ in vLLM "
               f"afterwards: {differing}")
    return figures, verdict


def first_runner(row):
    """`weights` with vLLM's first model runner."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"           # vllm is not imported yet
    return weights(row)


def host_gb():
    """Host memory that is still available."""
    [line] = [x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x]
    return int(line.split()[1]) / 1e6


def sleep(row):
    """What vLLM frees in both levels of sleep, in what time, and the sampler's gap after waking."""
    work, engine = vllm_work(row)
    engine.load(work.model)
    figures, good = {}, True
    for level in (1, 2):
        clock = Clock()
        torch.cuda.empty_cache()
        free, host = torch.cuda.mem_get_info()[0] / 1e9, host_gb()
        with clock("sleep"):
            engine.llm.sleep(level=level)
        freed, host = torch.cuda.mem_get_info()[0] / 1e9 - free, host - host_gb()
        engine.asleep = True
        with clock("wake"):
            engine.load(work.model)
        gap = sampler_gap(work, *sampled_group(work, engine, level))
        figures[f"level_{level}"] = {"freed_gb": round(freed, 2), "host_gb": round(host, 2),
                                     **clock.seconds, "sampler_gap": gap}
        share = VLLM_MEMORY * torch.cuda.mem_get_info()[1] / 1e9
        good = good and gap <= most_gap(work) and freed > 0.5 * share
    return figures, f"{'ok' if good else 'look'}: {json.dumps(figures)}"
