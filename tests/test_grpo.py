"""python -m pytest tests/test_grpo.py -q

Advantages and the clipped objective, against arithmetic done by hand and a slow double loop.
"""
import itertools
import math

import pytest
import torch

from grpo import advantages, policy_loss

LOW, HIGH = 0.2, 0.28


def step(rows=8, length=11, seed=0):
    """A ragged step: log-probs off the sampler's by up to 0.5, holes in the masks, one row of a single token."""
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
    total, tokens, low, high = 0.0, 0, 0, 0
    for b in range(len(new)):
        row, n = 0.0, 0
        for t in range(new.shape[1]):
            if mask[b, t]:
                ratio, A = math.exp(float(new[b, t]) - float(old[b, t])), float(advantage[b])
                row -= min(ratio * A, min(max(ratio, 1 - LOW), 1 + HIGH) * A)
                low, high = low + (A < 0 and ratio < 1 - LOW), high + (A > 0 and ratio > 1 + HIGH)
                n += 1
        total, tokens = total + (row / n if average == "sample" else row), tokens + n
    return total / (len(new) if average == "sample" else tokens), {"tokens": tokens, "clip_low": low, "clip_high": high}


def one_token(log_ratio, advantage):
    """-> (loss, its gradient, metrics) of a single sampled token"""
    logp = torch.full((1, 1), -1.0 + log_ratio, dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(logp, torch.full((1, 1), -1.0, dtype=torch.float64), torch.tensor([advantage]),
                                torch.ones(1, 1, dtype=torch.bool), LOW, HIGH, "sample")
    loss.backward()
    return float(loss.detach()), float(logp.grad), metrics


# ---------------------------------------------------------------------------------------------------------------------
# advantages

def test_equal_rewards_give_exactly_zero_whatever_the_number():
    """[0.1] * 7: the mean of equal float32 numbers may differ from them, and that error divided by 1e-6 was trained on.

    Hundreds of numbers and group sizes, so that for many the naive difference is not 0: it is counted.
    """
    naive = 0
    for value, G in itertools.product([0.9 * i / 10 + 0.1 * f for i in range(11) for f in (0, 1)] + [1 / 3, 1e-8, -0.7], range(2, 17)):
        rewards = torch.tensor([value] * G)
        naive += bool((rewards - rewards.mean()).abs().max() > 0)
        found = advantages(rewards)
        assert found.tolist() == [0.0] * G, (value, G)
    assert naive > 20


def test_a_group_of_equal_rewards_moves_nothing():
    new, old, _, mask = step(7)
    loss, metrics = policy_loss(new, old, advantages(torch.tensor([0.1] * 7)), mask, LOW, HIGH, "sample")
    loss.backward()
    assert float(loss.detach()) == 0 and bool((new.grad == 0).all())
    assert metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize("rewards", [[1, 0], [1, 0, 0, 0], [0.1, 1.0, 0.9, 0.0, 0.1], [0.5, 0.5, 0.5, 0.6], [1.0] * 15 + [0.0]])
def test_a_mixed_group_has_mean_zero_and_unit_std_with_g_minus_1(rewards):
    a = advantages(torch.tensor(rewards))
    assert a.dtype == torch.float32 and abs(float(a.mean())) < 1e-6
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    assert a.tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=2e-6)
    assert float(a.std()) == pytest.approx(1, abs=1e-4) and float(a.std(unbiased=False)) < 0.98


def test_a_tiny_difference_of_rewards_is_not_blown_up():
    """1e-6 is added to the std: rewards 1e-7 apart make advantages far below 1."""
    assert float(advantages(torch.tensor([0.0, 1e-7])).abs().max()) == pytest.approx(0.05 / (0.0707 + 1), rel=1e-2)


@pytest.mark.parametrize("shift", [1.0, -0.5, 8.0])
def test_advantages_do_not_change_when_a_constant_is_added(shift):
    rewards = torch.tensor([0.25, 1.0, 0.0, 0.5])                              # sums that are exact in float32
    assert torch.equal(advantages(rewards + shift), advantages(rewards))


def test_advantages_do_not_change_when_rewards_are_scaled():
    rewards = torch.tensor([0.3, 1.0, 0.0, 0.5])
    torch.testing.assert_close(advantages(rewards * 7), advantages(rewards), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rewards", [[1.0], []])
def test_a_group_of_one_raises(rewards):
    with pytest.raises(ValueError, match="group_size"):
        advantages(torch.tensor(rewards))


# ---------------------------------------------------------------------------------------------------------------------
# the objective

@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_the_slow_double_loop(average, seed):
    """Ragged, with holes: value and metrics; a step in which both clips act, as the counts show."""
    new, old, A, mask = step(seed=seed)
    loss, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    expected, counted = slowly(new.detach(), old, A, mask, average)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert metrics == counted and counted["clip_low"] > 1 and counted["clip_high"] > 1


@pytest.mark.parametrize("average, expected", [("sample", -(6 / 4 + 2 / 1 - 1 * 2 / 2) / 3), ("token", -(6 + 2 - 2) / 7)])
def test_the_two_averages_by_hand(average, expected):
    """Rows of 4, 1 and 2 tokens, advantages 1.5, 2 and -1, ratio 1: the short rows weigh more in the average by sample."""
    logp = torch.zeros(3, 4)
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    loss, metrics = policy_loss(logp, logp, torch.tensor([1.5, 2.0, -1.0]), mask, LOW, HIGH, average)
    assert float(loss) == pytest.approx(expected) and metrics == {"tokens": 7, "clip_low": 0, "clip_high": 0}


@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.25, 1.0, False), (1.29, 1.0, True), (0.5, 1.0, False),                  # better: held back above 1.28 alone
    (0.79, -1.0, True), (0.81, -1.0, False), (1.25, -1.0, False), (5.0, -1.0, False)])
def test_the_clip_is_higher_above_than_below(ratio, advantage, clipped):
    """A clipped token has no gradient and is counted; an unclipped one has -ratio * advantage, and is not."""
    loss, gradient, metrics = one_token(math.log(ratio), advantage)
    bound = (1 + HIGH if advantage > 0 else 1 - LOW) if clipped else ratio
    assert loss == pytest.approx(-bound * advantage)
    assert gradient == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-12)
    assert metrics == {"tokens": 1, "clip_low": clipped * (advantage < 0), "clip_high": clipped * (advantage > 0)}


@pytest.mark.parametrize("average", ["sample", "token"])
def test_the_first_step_on_policy_is_the_plain_policy_gradient(average):
    """Model = sampler: ratio 1, nothing clipped, and the gradient that of the mean of -advantage * log-prob."""
    new, _, A, mask = step()
    loss, metrics = policy_loss(new, new.detach().clone(), A, mask, LOW, HIGH, average)
    loss.backward()
    plain = new.detach().clone().requires_grad_()
    per_row = -(A[:, None] * plain * mask).sum(1)
    (per_row / mask.sum(1) / len(mask) if average == "sample" else per_row / mask.sum()).sum().backward()
    torch.testing.assert_close(new.grad, plain.grad, atol=1e-7, rtol=0)
    assert metrics == {"tokens": int(mask.sum()), "clip_low": 0, "clip_high": 0}
    assert bool((new.grad[mask] != 0).all())


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_how_a_step_is_cut_changes_nothing(average, parts):
    """The losses, gradients and metrics of the parts, given the step's lengths and divisor, add up to the whole's.

    A cut is by rows, padding trimmed, as micro-batches are; the double loop of the whole step says what is right.
    """
    new, old, A, mask = step()
    lengths, divisor = mask.sum(1), (len(mask) if average == "sample" else int(mask.sum()))
    whole, metrics = policy_loss(new, old, A, mask, LOW, HIGH, average)
    whole.backward()
    gradient, new.grad = new.grad, None
    total, counted = 0.0, {k: 0.0 for k in metrics}
    for at in torch.arange(len(mask)).tensor_split(parts):
        longest = int(mask[at].any(0).nonzero().max()) + 1
        loss, m = policy_loss(new[at, :longest], old[at, :longest], A[at], mask[at, :longest], LOW, HIGH, average, lengths[at], divisor)
        loss.backward()
        total, counted = total + float(loss.detach()), {k: counted[k] + m[k] for k in m}
    assert total == pytest.approx(float(whole.detach()), abs=1e-6) == pytest.approx(slowly(new.detach(), old, A, mask, average)[0], abs=1e-6)
    torch.testing.assert_close(new.grad, gradient, atol=1e-7, rtol=0)
    assert counted == metrics


def test_a_row_cut_in_two_adds_up_by_its_whole_length():
    """A slice of a completion (stage 2) is weighed by the whole completion's length, not by its own."""
    new, old, A, mask = step()
    whole, _ = policy_loss(new, old, A, mask, LOW, HIGH, "sample")
    halves = [policy_loss(new[:, s], old[:, s], A, mask[:, s], LOW, HIGH, "sample", mask.sum(1), len(mask))[0]
              for s in (slice(0, 4), slice(4, None))]
    assert float(sum(halves).detach()) == pytest.approx(float(whole.detach()), abs=1e-6)


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("junk", [(-math.inf, 0.0), (-math.inf, -math.inf), (-2.0, -math.inf), (-300.0, 0.0), (0.0, -300.0)])
def test_what_was_not_sampled_costs_nothing(average, junk):
    """Forced tokens may be banned ones, of log-prob -inf in the trainer: no NaN, no gradient, and no change elsewhere."""
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
    loss, _ = policy_loss(logp, logp.detach().clone(), torch.tensor([2.0]), mask, LOW, HIGH, "sample")
    loss.backward()
    assert logp.grad.tolist() == [pytest.approx([-2 / 3, 0, 0, -2 / 3, -2 / 3])]


@pytest.mark.parametrize("average", ["sample", "token"])
def test_a_row_without_sampled_tokens_is_worth_nothing(average):
    """All of it forced (no budget to think or to answer): 0, not 0 / 0; also where the whole call is such."""
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
