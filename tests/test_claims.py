"""python -m pytest tests/test_claims.py -q

The claims table: the KL term that was deleted, kept as a patch; the table's commands; how it judges. The precision table: what its
columns say.
"""
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import encode
import grpo
import model as vlm
import rollout
import toy
import train
from curriculum import Curriculum

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def with_kl(tmp_path_factory):
    """grpo.py with assets/kl.diff applied, as the table's row does it."""
    folder = tmp_path_factory.mktemp("kl")
    for file in ("grpo.py", "train.py"):
        shutil.copy(ROOT / file, folder)
    subprocess.run(["git", "apply", str(ROOT / "assets" / "kl.diff")], cwd=folder, check=True, env={**os.environ, "GIT_DIR": str(folder / "none")})
    return SimpleNamespace(**runpy.run_path(str(folder / "grpo.py")), train=(folder / "train.py").read_text())


def test_the_kl_term_is_the_k3_estimate_and_nothing_where_the_models_are_one(with_kl):
    """exp(d) - d - 1, d = reference - model: 0 and without gradient at equality, else positive, as finite differences say."""
    torch.manual_seed(0)
    new, old, reference = (-torch.rand(3, 5, dtype=torch.double) for _ in range(3))
    mask, advantages = torch.rand(3, 5) < 0.8, torch.randn(3, dtype=torch.double)
    lose = lambda new, **how: with_kl.policy_loss(new, old, advantages, mask, 0.2, 0.28, "sample", **how)
    assert torch.equal(lose(new)[0], grpo.policy_loss(new, old, advantages, mask, 0.2, 0.28, "sample")[0])
    same = new.clone().requires_grad_()
    gradient = torch.autograd.grad(lose(same, reference=new, kl=1.0)[0] - lose(same)[0], same)[0]
    assert lose(new, reference=new, kl=1.0)[1]["kl"] == 0 == float(gradient.abs().max())
    loss, metrics = lose(new, reference=reference, kl=0.5)
    away = ((reference - new).exp() - (reference - new) - 1) * mask
    assert metrics["kl"] == pytest.approx(float(away.sum())) and metrics["kl"] > 0
    assert float(loss - lose(new)[0]) == pytest.approx(0.5 * float((away.sum(1) / mask.sum(1)).mean()))
    torch.autograd.gradcheck(lambda x: lose(x, reference=reference, kl=0.5)[0] - lose(x)[0], (new.clone().requires_grad_(),))
    assert "    kl: float = 0.04" in with_kl.train and "model.reference[0]" in with_kl.train


def test_every_row_of_the_claims_table_is_a_command_that_train_understands():
    claims = SimpleNamespace(**runpy.run_path(str(ROOT / "assets" / "claims.py")))
    for name, (before, arguments) in claims.RUNS.items():
        assert all("--rl_steps=0" in claims.RUNS[other][1] or "--mode=grade" in claims.RUNS[other][1] for other in before.split()), name
        for line in (arguments, claims.LOOKS.get(name, "")):
            c = train.parse([x for x in line.split() if not x.startswith("--kl=")])
            train.check(c, encode.Ranks())
            toy.parse_parts(c.data)
    for _, _, _, a, sign, b in claims.CLAIMS:
        assert {a, *([b] if isinstance(b, str) else b)} <= claims.RUNS.keys() and sign in "<>="


def test_tiers_can_matter_in_the_row_about_them():
    """The first table compared runs in which no question came twice: with tiers and without they were one run."""
    claims = SimpleNamespace(**runpy.run_path(str(ROOT / "assets" / "claims.py")))
    ids, how = [f"q{i}" for i in range(128)], train.parse(claims.RUNS["tiered"][1].split())
    draws = []
    for tiers in (True, False):
        curriculum = Curriculum(ids, 0, {id: (i % 9, 8) for i, id in enumerate(ids)}, tiers)
        draws.append([curriculum.draw(how.prompts_per_step) for _ in range(how.rl_steps)])
    assert draws[0] != draws[1] and how.prompts_per_step * how.rl_steps > len(ids)


def test_a_claim_is_seen_where_every_seed_agrees_by_more_than_seeds_differ():
    verdict = runpy.run_path(str(ROOT / "assets" / "claims.py"))["verdict"]
    assert [verdict(a, sign, [2, 2, 2]) for a, sign in (([3, 3, 4], ">"), ([1, 1, 0], ">"), ([3, 1, 3], ">"), ([1, 1, 0], "<"), ([3, 2, 3], ">"))] == [
        "seen", "opposite", "not seen", "seen", "not seen"]
    assert verdict([1, 11, 22], ">", [0, 10, 20]) == "seen" and verdict([0, 10, 20], ">", [1, 11, 22]) == "opposite"      # pairs
    assert verdict([1, 1, 9], ">", [0, 0, 0]) == verdict([2, 2, 2], ">", [1.5, 1.5, 1.4], least=1) == "not seen"
    assert verdict([1, 2, 3], "=", [2, 3, 4]) == "seen" and verdict([1.0, 1.1, 1.2], "=", [5.0, 5.1, 5.2]) == "not seen"


def test_the_precision_table_measures_what_its_columns_say():
    """Without the weights the gradient is that of advantage times log-prob, averaged by hand. In float32 nothing is left to correct."""
    precision = SimpleNamespace(**runpy.run_path(str(ROOT / "assets" / "precision.py")))
    model, tokenizer = vlm.load("tiny")
    model.model.visual.requires_grad_(False)
    prompt = vlm.make_prompt(model, tokenizer, "How many?", *vlm.encode_video(model, lambda: data.open_video("toy:3", 8), encode.Ranks()))
    banned, G = vlm.banned_ids(model, tokenizer), precision.G
    answers = rollout.sample(model, tokenizer, [prompt], [[(0, n) for n in range(G)]], 5, 3)[0]
    group = train.Group(0, None, prompt, answers, None, torch.linspace(-1, 1, G))
    plain, _ = precision.gradient(model, group, banned, False)
    model.zero_grad()
    logprobs, _ = vlm.logprobs(model, [prompt], [[x.tokens for x in answers]], banned)
    loss = sum(a * lp[:len(x.tokens)][x.sampled].sum() / x.sampled.sum() for a, lp, x in zip(group.advantages, logprobs, answers))
    (-loss / G).backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float((plain - by_hand).norm() / by_hand.norm()) < 1e-5

    [_, gap, most, _, _, weights, rounding], [_, gap16, _, _, _, weights16, rounding16] = (
        precision.measure("tiny", dtype, 4, "torch") for dtype in ("float32", "bfloat16"))
    assert gap < 1e-5 and most < 1e-4 and weights < 1e-4 and rounding < 1e-4
    assert 1e-4 < gap16 < train.MOST_GAP["bfloat16"] and weights16 > 10 * weights and rounding16 > 10 * rounding
