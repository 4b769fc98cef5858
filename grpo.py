"""
GRPO: G answers to one question are graded and compared with each other. What was left out of the
papers' versions, and why:

1. The KL term, with the reference model and the k3 estimate that it needs. LongVILA-R1's code has
   it, with weight 0.01. GLM-4.1V-Thinking found that the KL of a vision model grows faster than
   that of a text model, and that suppressing it limits what the model learns.
2. The entropy bonus. In GLM's runs it led to garbled text and then to collapse. Exploration is kept
   alive by raising only the upper clip bound (clip-higher).
3. The dual clip and the clamps on log-ratios. They bound what the clip does not: a ratio far above
   1 where the advantage is negative. With few updates after sampling, and a sampler whose log-probs
   are the trainer's but for rounding, such tokens are rare.
4. The forward pass of the old policy. The old log-probs are the sampler's. That saves one forward,
   and the ratio corrects both staleness and any difference between sampler and trainer.
5. The critic, as in every GRPO: the mean of the group is the baseline.
"""
import torch


def advantages(rewards):
    """How much better each completion is than its group. rewards: [G] -> float32 [G]

    (r - mean) / (std + 1e-6), where std divides by G - 1. (LongVILA-R1 eq. 2, as in GLM-4.1V.)
    Exactly 0 if all rewards are equal. This is tested before the division: in floating point the
    mean of equal numbers may differ from them, and a rounding error divided by 1e-6 would be
    trained on. Raises ValueError if G < 2.

    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    rewards = rewards.float()
    if rewards.numel() < 2:
        raise ValueError("a group of one completion has nothing to be compared with; "
                         "group_size must be at least 2")
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, average,
                divisor=None):
    """The clipped objective, to be minimised. -> (loss, metrics)

    LongVILA-R1 eq. 1 for each token, without its KL term and with clip-higher (DAPO).
    logprobs, old_logprobs: [B, L], under the model and under the sampler.
    advantages: [B].
    mask: bool [B, L], True where a token was sampled. Forced tokens and padding carry no loss.
    average: "sample" gives every completion the same weight, "token" every token. (GLM-4.1V found
        the first to be more stable.)
    divisor: the completions ("sample") or sampled tokens ("token") of the whole update, over all
        ranks. With it the losses of all micro-batches add up to the update's, however it is cut
        into rows. None: those of this call.
    metrics: sums over the mask, which add up likewise: tokens, clip_low, clip_high.
    """
    if average not in ("sample", "token"):
        raise ValueError(f'loss_average is "sample" or "token", not {average!r}')
    # Outside the mask a log-prob may be -inf, if a forced token is banned. It is masked before exp,
    # because masking afterwards would leave NaN in the gradient.
    old_logprobs = old_logprobs.masked_fill(~mask, 0)
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)                # [B, L]
    ratio = log_ratio.exp()
    advantage = advantages[:, None]                                            # [B, 1]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)               # [B, L]
    loss = -(gain * mask)
    if average == "sample":
        loss = loss.sum(1) / mask.sum(1).clamp(min=1)                          # [B]
    if divisor is None:
        divisor = len(mask) if average == "sample" else mask.sum().clamp(min=1)
    with torch.no_grad():
        low = mask & (advantage < 0) & (ratio < 1 - clip_low)
        high = mask & (advantage > 0) & (ratio > 1 + clip_high)
        metrics = {"tokens": float(mask.sum()), "clip_low": float(low.sum()),
                   "clip_high": float(high.sum())}
    return loss.sum() / divisor, metrics
