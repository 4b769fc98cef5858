"""python -m pytest tests/test_grpo.py -q

Advantages and the clipped objective, against arithmetic done by hand and a slow double loop.
"""
import doctest
import itertools
import math

import pytest
import torch

import grpo
from grpo import advantages, policy_loss

pytestmark = pytest.mark.method

LOW, HIGH = 0.2, 0.28


def test_the_examples_in_the_docstrings_are_right():
    result = doctest.testmod(grpo)
    assert result.attempted > 0 and result.failed == 0


def step(rows=8, length=11, seed=0):
    """A ragged step: log-probs up to 0.5 off the sampler's, holes in masks, a row of one token."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=g)
    new = old + torch.rand(rows, length, generator=g) - 0.5
    mask = torch.rand(rows, length, generator=g) < 0.8
    for row in range(rows):
        mask[row, 1 + (row * 5) % length:] = False
    mask[:, 0] = True
    return new.requires_grad_(), old, torch.randn(rows, generator=g), mask


def slowly(new, old, advantage, mask, average):
    """The objective as it is written: a sum over completions of a sum over tokens."""
    total, counts = 0.0, {"tokens": 0, "clip_low": 0, "clip_high": 0}
    for b in range(len(new)):
        row, A = 0.0, float(advantage[b])
        sampled = [t for t in range(new.shape[1]) if mask[b, t]]
        for t in sampled:
            ratio = math.exp(float(new[b, t]) - float(old[b, t]))
            row -= min(ratio * A, min(max(ratio, 1 - LOW), 1 + HIGH) * A)
            counts["tokens"] += 1
            counts["clip_low"] += A < 0 and ratio < 1 - LOW
            counts["clip_high"] += A > 0 and ratio > 1 + HIGH
        total += row / len(sampled) if average == "sample" else row
    return total / (len(new) if average == "sample" else counts["tokens"]), counts


def one_token(log_ratio, advantage):
    """-> (loss, its gradient, metrics) of a single sampled token"""
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    logp = torch.full((1, 1), -1.0 + log_ratio, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = policy_loss(logp, old, torch.tensor([advantage]), mask, LOW, HIGH, "sample")
    loss.backward()
    return float(loss.detach()), float(logp.grad), metrics


# --------------------------------------------------------------------------------------------------
# advantages

def test_equal_rewards_give_exactly_zero_whatever_the_number():
    """[0.1] * 7: the mean of equal float32 numbers may differ from them, and that error, divided by
    1e-6, was trained on.

    Hundreds of numbers and group sizes, so that for many the naive difference is not 0: that is
    counted.
    """
    naive = 0
    values = [0.9 * i / 10 + 0.1 * form for i in range(11) for form in (0, 1)] + [1 / 3, 1e-8, -0.7]
    for value, G in itertools.product(values, range(2, 17)):
        rewards = torch.tensor([value] * G)
        naive += bool((rewards - rewards.mean()).abs().max() > 0)
        found = advantages(rewards)
        assert found.tolist() == [0.0] * G, (value, G)
    assert naive > 20


def test_a_group_of_equal_rewards_moves_nothing():
    new, old, _, mask = step(7)
    A = advantages(torch.tensor([0.1] * 7))
    loss, metrics = policy_loss(new, old, A, mask, LOW, HIGH, "sample")
    loss.backward()
    assert float(loss.detach()) == 0 and bool((new.grad == 0).all())
    assert metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize("rewards", [
    [1, 0], [1, 0, 0, 0], [0.1, 1.0, 0.9, 0.0, 0.1], [0.5, 0.5, 0.5, 0.6], [1.0] * 15 + [0.0]])
def test_a_mixed_group_has_mean_zero_and_unit_std_with_g_minus_1(rewards):
    a = advantages(torch.tensor(rewards))
    assert a.dtype == torch.float32 and abs(float(a.mean())) < 1e-6
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    assert a.tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=2e-6)
    assert float(a.std()) == pytest.approx(1, abs=1e-4) and float(a.std(unbiased=False)) < 0.98


def test_a_tiny_difference_of_rewards_is_not_blown_up():
    """1e-6 is added to the std: rewards 1e-7 apart make advantages far below 1."""
    largest = float(advantages(torch.tensor([0.0, 1e-7])).abs().max())
    assert largest == pytest.approx(0.05 / (0.0707 + 1), rel=1e-2)


@pytest.mark.parametrize("shift", [1.0, -0.5, 8.0])
def test_advantages_do_not_change_when_a_constant_is_added(shift):
    rewards = torch.tensor([0.25, 1.0, 0.0, 0.5])          # sums that are exact in float32
    assert torch.equal(advantages(rewards + shift), advantages(rewards))


def test_advantages_do_not_change_when_rewards_are_scaled():
    rewards = torch.tensor([0.3, 1.0, 0.0, 0.5])
    torch.testing.assert_close(advantages(rewards * 7), advantages(rewards), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rewards", [[1.0], []])
def test_a_group_of_one_raises(rewards):
    with pytest.raises(ValueError, match="group_size"):
        advantages(torch.tensor(rewards))


# --------------------------------------------------------------------------------------------------
# the objective

@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_the_slow_double_loop(average, seed):
    """Value and metrics of a ragged step with holes; both clips act, as the counts show."""
    new, old, A, mask = step(seed=seed)
    loss, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    expected, counted = slowly(new.detach(), old, A, mask, average)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert metrics == counted and counted["clip_low"] > 1 and counted["clip_high"] > 1


@pytest.mark.parametrize("average, expected", [
    ("sample", -(6 / 4 + 2 / 1 - 1 * 2 / 2) / 3), ("token", -(6 + 2 - 2) / 7)])
def test_the_two_averages_by_hand(average, expected):
    """Rows of 4, 1 and 2 tokens, advantages 1.5, 2 and -1, ratio 1: in the average by sample the
    tokens of short rows weigh more."""
    logp = torch.zeros(3, 4)
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    A = torch.tensor([1.5, 2.0, -1.0])
    loss, metrics = policy_loss(logp, logp, A, mask, LOW, HIGH, average)
    assert float(loss) == pytest.approx(expected)
    assert metrics == {"tokens": 7, "clip_low": 0, "clip_high": 0}


@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.25, 1.0, False), (1.29, 1.0, True), (0.5, 1.0, False),      # better: clipped above 1.28 only
    (0.79, -1.0, True), (0.81, -1.0, False), (1.25, -1.0, False), (5.0, -1.0, False)])
def test_the_clip_is_higher_above_than_below(ratio, advantage, clipped):
    """A clipped token has no gradient and is counted; an unclipped one has the gradient -ratio *
    advantage, and is not."""
    loss, gradient, metrics = one_token(math.log(ratio), advantage)
    bound = 1 + HIGH if advantage > 0 else 1 - LOW
    assert loss == pytest.approx(-(bound if clipped else ratio) * advantage)
    assert gradient == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-12)
    assert metrics == {"tokens": 1, "clip_low": clipped and advantage < 0,
                       "clip_high": clipped and advantage > 0}


@pytest.mark.parametrize("average", ["sample", "token"])
def test_the_first_step_on_policy_is_the_plain_policy_gradient(average):
    """Model = sampler: the ratio is 1, nothing is clipped, and the gradient is that of the mean of
    -advantage * log-prob."""
    new, _, A, mask = step()
    loss, metrics = policy_loss(new, new.detach().clone(), A, mask, LOW, HIGH, average)
    loss.backward()
    plain = new.detach().clone().requires_grad_()
    per_row = -(A[:, None] * plain * mask).sum(1)
    if average == "sample":
        per_row = per_row / mask.sum(1) / len(mask)
    else:
        per_row = per_row / mask.sum()
    per_row.sum().backward()
    torch.testing.assert_close(new.grad, plain.grad, atol=1e-7, rtol=0)
    assert metrics == {"tokens": int(mask.sum()), "clip_low": 0, "clip_high": 0}
    assert bool((new.grad[mask] != 0).all())


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_how_a_step_is_cut_changes_nothing(average, parts):
    """Losses, gradients and metrics of the parts, given the step's divisor, add up to the step's.

    The cut is by rows, with their padding trimmed, as for micro-batches. The double loop over the
    whole step says what is right.
    """
    new, old, A, mask = step()
    divisor = len(mask) if average == "sample" else int(mask.sum())
    whole, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    whole.backward()
    gradient, new.grad = new.grad, None
    total, counted = 0.0, dict.fromkeys(metrics, 0.0)
    for rows in torch.arange(len(mask)).tensor_split(parts):
        longest = int(mask[rows].any(0).nonzero().max()) + 1
        loss, m = policy_loss(new[rows, :longest], old[rows, :longest], A[rows],
                              mask[rows, :longest], LOW, HIGH, average, divisor)
        loss.backward()
        total += float(loss.detach())
        counted = {key: counted[key] + m[key] for key in m}
    expected, _ = slowly(new.detach(), old, A, mask, average)
    assert total == pytest.approx(float(whole.detach()), abs=1e-6)
    assert total == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(new.grad, gradient, atol=1e-7, rtol=0)
    assert counted == metrics


@pytest.mark.parametrize("average", ["sample", "token"])
def test_rows_cut_in_two_add_up_by_their_whole_length(average):
    """Slices of a completion add up to it if the divisor is of the whole: for "token" all tokens of
    the step; for "sample" a slice of n of N tokens, which is averaged over its n, counts n / N."""
    new, old, A, mask = step()
    whole, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    total, counted = 0.0, dict.fromkeys(metrics, 0.0)
    for b in range(len(mask)):
        row = slice(b, b + 1)
        for cut in (slice(0, 4), slice(4, None)):
            divisor = int(mask.sum())
            if average == "sample":
                divisor = len(mask) * int(mask[b].sum()) / max(1, int(mask[b, cut].sum()))
            loss, m = policy_loss(new[row, cut], old[row, cut], A[row], mask[row, cut], LOW, HIGH,
                                  average, divisor)
            total += float(loss.detach())
            counted = {key: counted[key] + m[key] for key in m}
    assert total == pytest.approx(float(whole.detach()), abs=1e-6)
    assert counted == metrics


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("junk", [
    (-math.inf, 0.0), (-math.inf, -math.inf), (-2.0, -math.inf), (-300.0, 0.0), (0.0, -300.0)])
def test_what_was_not_sampled_costs_nothing(average, junk):
    """Forced tokens may be banned ones, with log-prob -inf in the trainer: no NaN, no gradient, and
    no change elsewhere."""
    new, old, A, mask = step()
    clean, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    clean.backward()
    dirty = torch.where(mask, new.detach(), junk[0]).requires_grad_()
    loss, same = policy_loss(dirty, torch.where(mask, old, junk[1]), A, mask, LOW, HIGH, average)
    loss.backward()
    assert torch.equal(loss, clean) and same == metrics
    assert torch.equal(dirty.grad, new.grad) and bool((dirty.grad[~mask] == 0).all())


def test_tokens_before_and_after_forced_ones_carry_loss():
    logp = torch.full((1, 5), -1.0, requires_grad=True)
    mask = torch.tensor([[True, False, False, True, True]])
    old, A = logp.detach().clone(), torch.tensor([2.0])
    loss, _ = policy_loss(logp, old, A, mask, LOW, HIGH, "sample")
    loss.backward()
    assert logp.grad.tolist() == [pytest.approx([-2 / 3, 0, 0, -2 / 3, -2 / 3])]


@pytest.mark.parametrize("average", ["sample", "token"])
def test_a_row_without_sampled_tokens_is_worth_nothing(average):
    """All of it forced (no budget to think or to answer): 0, not 0 / 0. Also where all rows are."""
    new, old, A, mask = step(3)
    mask[1] = False
    loss, _ = policy_loss(new, old, A, mask, LOW, HIGH, average)
    assert math.isfinite(loss.detach())
    loss, metrics = policy_loss(new, old, A, mask & False, LOW, HIGH, average)
    loss.backward()
    assert float(loss.detach()) == 0 and bool((new.grad == 0).all()) and metrics["tokens"] == 0


def test_a_misspelt_average_raises_and_is_named():
    new, old, A, mask = step(2)
    with pytest.raises(ValueError, match="'tokens'"):
        policy_loss(new, old, A, mask, LOW, HIGH, "tokens")
