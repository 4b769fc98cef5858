"""python -m pytest tests/test_claims.py -q

The claims table: the KL term that was deleted, kept as a patch; the table's commands; how it
judges. The precision table: what its columns say.
"""
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import grpo
import model as vlm
import rollout
import toy
import train
from curriculum import Curriculum
from flow import Group, Ranks
from plumbing import command_line
from plumbing.metrics import MOST_GAP

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def experiment(name):
    """What a script of experiments/ defines."""
    return SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / name)))


@pytest.fixture(scope="module")
def claims():
    return experiment("claims.py")


@pytest.fixture(scope="module")
def code_with_kl(claims, tmp_path_factory):
    """The directory of the code with kl.diff applied, as the table's row has it."""
    folder = tmp_path_factory.mktemp("kl")
    claims.copy_code_with_kl(folder)
    return folder


def test_the_kl_term_is_the_k3_estimate_and_nothing_where_the_models_are_one(code_with_kl):
    """exp(d) - d - 1, d = reference - model: 0 and without gradient at equality, else positive, as
    finite differences say."""
    policy_loss = runpy.run_path(str(code_with_kl / "grpo.py"))["policy_loss"]
    torch.manual_seed(0)
    new, old, reference = [-torch.rand(3, 5, dtype=torch.double) for _ in range(3)]
    mask, advantages = torch.rand(3, 5) < 0.8, torch.randn(3, dtype=torch.double)
    settings = old, advantages, mask, 0.2, 0.28, "sample"

    def loss_of(logprobs, **how):
        return policy_loss(logprobs, *settings, **how)[0]

    assert torch.equal(loss_of(new), grpo.policy_loss(new, *settings)[0])
    same = new.clone().requires_grad_()
    kl_alone = loss_of(same, reference=new, kl=1.0) - loss_of(same)
    [gradient] = torch.autograd.grad(kl_alone, same)
    assert float(gradient.abs().max()) == 0
    assert policy_loss(new, *settings, reference=new, kl=1.0)[1]["kl"] == 0
    loss, metrics = policy_loss(new, *settings, reference=reference, kl=0.5)
    divergence = ((reference - new).exp() - (reference - new) - 1) * mask
    assert metrics["kl"] == pytest.approx(float(divergence.sum()))
    assert metrics["kl"] > 0
    per_sample = (divergence.sum(1) / mask.sum(1)).mean()
    assert float(loss - loss_of(new)) == pytest.approx(0.5 * float(per_sample))
    torch.autograd.gradcheck(lambda x: loss_of(x, reference=reference, kl=0.5) - loss_of(x),
                             (new.clone().requires_grad_(),))
    text = (code_with_kl / "train.py").read_text()
    assert "    kl: float = 0.04" in text
    assert "model.reference[0]" in text


def test_the_code_with_kl_runs_where_it_was_copied_to(code_with_kl):
    """It was copied without the folder that it imports."""
    check = "import train; assert train.parse(['--kl=0.5']).kl == 0.5; print(train.__file__)"
    result = subprocess.run([sys.executable, "-c", check], cwd=code_with_kl, check=True,
                            capture_output=True, text=True)
    assert Path(result.stdout.strip()).parent == code_with_kl


def test_every_row_of_the_claims_table_is_a_command_that_train_understands(claims):
    for name, run in claims.RUNS.items():
        for needed in run.needs:
            arguments = claims.RUNS[needed].arguments
            assert "--rl_steps=0" in arguments or "--mode=grade" in arguments, name
        for line in (run.arguments, claims.EVALUATIONS.get(name, "")):
            c = train.parse([x for x in line.split() if not x.startswith("--kl=")])
            command_line.check_training(c, Ranks())
            toy.parse_parts(c.data)
    for claim in claims.CLAIMS:
        others = [claim.b] if isinstance(claim.b, str) else claim.b
        assert {claim.a, *others} <= claims.RUNS.keys()
        assert claim.sign in "<>="


def test_tiers_can_matter_in_the_row_about_them(claims):
    """The first table compared runs in which no question came twice: with tiers and without they
    were one run."""
    ids = [f"q{i}" for i in range(128)]
    c = train.parse(claims.RUNS["tiered"].arguments.split())
    draws = []
    for tiers in (True, False):
        curriculum = Curriculum(ids, 0, {id: (i % 9, 8) for i, id in enumerate(ids)}, tiers)
        draws.append([curriculum.draw(c.prompts_per_step) for _ in range(c.rl_steps)])
    assert draws[0] != draws[1]
    assert c.prompts_per_step * c.rl_steps > len(ids)


@pytest.mark.parametrize("a, sign, b, least, said", [
    ([3, 3, 4], ">", [2, 2, 2], 0, "seen"), ([1, 1, 0], ">", [2, 2, 2], 0, "opposite"),
    ([3, 1, 3], ">", [2, 2, 2], 0, "not seen"), ([1, 1, 0], "<", [2, 2, 2], 0, "seen"),
    ([3, 2, 3], ">", [2, 2, 2], 0, "not seen"),
    ([1, 11, 22], ">", [0, 10, 20], 0, "seen"),            # pairs
    ([0, 10, 20], ">", [1, 11, 22], 0, "opposite"),
    ([1, 1, 9], ">", [0, 0, 0], 0, "not seen"),
    ([2, 2, 2], ">", [1.5, 1.5, 1.4], 1, "not seen"),
    ([1, 2, 3], "=", [2, 3, 4], 0, "seen"),
    ([1.0, 1.1, 1.2], "=", [5.0, 5.1, 5.2], 0, "not seen")])
def test_a_claim_is_seen_where_every_seed_agrees_by_more_than_seeds_differ(
        claims, a, sign, b, least, said):
    assert claims.verdict(a, sign, b, least) == said


def test_the_precision_table_measures_what_its_columns_say():
    """Without the weights the gradient is that of advantage times log-prob, averaged by hand. In
    float32 nothing is left to correct."""
    precision = experiment("precision.py")
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
