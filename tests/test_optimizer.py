"""python -m pytest tests/test_optimizer.py -q

One update: gradients summed and clipped, a step that is not finite, bfloat16 weights.
"""
import math

import pytest
import torch
from runs import ALONE, same

import encode
import model as vlm
from plumbing import optimizer
from plumbing.optimizer import falling, make_optimizer, update, updates, warmed_up


@pytest.mark.method
def test_update_clips_the_norm_at_one_and_steps():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    start = model.weight.detach().clone()
    sgd = torch.optim.SGD([model.weight], 9.0)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert update(model, sgd, 0.5, ALONE) == pytest.approx(5.0)
    clipped = torch.tensor([[0.3, 0.0], [0.0, 0.4]])
    assert torch.allclose(start - model.weight, clipped, atol=1e-6)
    assert model.weight.grad is None
    start = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[0.3, 0.0], [0.0, 0.4]])         # below one: as it is
    assert update(model, sgd, 0.5, ALONE) == pytest.approx(0.5)
    half = torch.tensor([[0.15, 0.0], [0.0, 0.2]])
    assert torch.allclose(start - model.weight, half, atol=1e-6)
    assert update(model, sgd, 0.5, ALONE) == 0.0           # a rank without work has no gradients


@pytest.mark.method
def test_bfloat16_weights_follow_updates_smaller_than_their_own_steps():
    """AdamW on bfloat16 weights at lr 1e-6 moved 2 weights in 100: the rest of every update was
    rounded away."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.normal_(model.weight, std=0.02)
        model.weight.data = model.weight.data.to(torch.bfloat16).to(dtype)
        start = model.weight.detach().float().clone()
        adam = make_optimizer(model, 1e-6)
        for _ in range(300):
            model.weight.grad = torch.full_like(model.weight, 0.01)
            update(model, adam, 1e-6, ALONE)
        ends.append(model.weight.detach().float() - start)
        assert model.weight.grad is None
        assert updates(model) == 300, "vLLM is told by their number"
    right, got = (float(x.mean()) for x in ends)
    assert right < -2e-4
    assert got == pytest.approx(right, rel=0.4)            # to the half step of its last rounding


@pytest.mark.method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_update_is_counted_like_any_other(dtype):
    """A fused optimizer, which GPUs have, does not raise the tensors' versions. By these vLLM was
    told of new weights, and the cache of a new tower: both kept the old ones for ever."""
    model, _ = vlm.load("tiny", dtype=dtype)
    tower = model.model.visual
    parameters = list(model.parameters())
    weights = [p if dtype == torch.float32 else p.detach().float() for p in parameters]
    adam = torch.optim.AdamW(weights, 1e-2, fused=True)
    cache, keys = encode.Cache(), set()
    for number in range(1, 4):
        for p in parameters:
            p.grad = torch.ones_like(p)
        update(model, adam, 1e-2, ALONE)
        keys.add(cache.key(tower))
        assert updates(model) == number and len(keys) == number
    parameters[0].grad = torch.full_like(parameters[0], math.nan)
    update(model, adam, 1e-2, ALONE)                       # skipped
    assert updates(model) == 3 and cache.key(tower) in keys


@pytest.mark.method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    model = torch.nn.Linear(3, 3)
    adam = torch.optim.AdamW(model.parameters(), 0.1)

    def moments():
        return [v.clone() for s in adam.state.values() for v in s.values()]

    model(torch.ones(1, 3)).sum().backward()
    update(model, adam, 0.1, ALONE)
    before = {k: v.clone() for k, v in model.state_dict().items()}, moments()
    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad[1, 2] = bad
    assert not math.isfinite(update(model, adam, 0.1, ALONE))
    assert same(before, (dict(model.state_dict()), moments()))
    assert all(p.grad is None for p in model.parameters())   # nor does it leak into the next step


@pytest.mark.method
def test_gradients_are_summed_in_order_in_messages_of_at_most_so_many_numbers(monkeypatch):
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    gradients = [torch.zeros(n) for n in sizes]
    for most in (1, 5, 8, 12, 100):
        monkeypatch.setattr(optimizer, "BUCKET", most)
        found = [[g.numel() for g in bucket] for bucket in optimizer.buckets(gradients)]
        assert sum(found, []) == sizes
        assert all(len(bucket) == 1 or sum(bucket) <= most for bucket in found)
        for bucket, after in zip(found, found[1:]):        # none could have taken one more
            assert sum(bucket) + after[0] > most
    assert list(optimizer.buckets([])) == []


@pytest.mark.method
def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_a_tenth():
    assert [warmed_up(n, 4) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [warmed_up(n, 0) for n in range(2)] == [1, 1]
    assert [falling(step, 20) for step in (0, 10, 15, 19)] == [1.0, 0.5, 0.25, 0.1]
