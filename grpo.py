"""
GRPO: G answers to one question, graded, compared with one another. What was deleted from the papers' versions, and why:

1. The KL term, the reference model it needs, and the k3 estimate. LongVILA-R1's code has them (0.01); GLM-4.1V-Thinking
   found that a vision model's KL grows faster than a text model's, and that holding it back caps what is learned.
2. The entropy bonus. GLM: garbled text, then collapse. Raising only the upper clip keeps exploration alive (clip-higher).
3. The dual clip and the clamps on log-ratios. The trust region is the clip; a sampler that is exact needs no others.
4. The old policy's own forward pass. The old log-probs are the sampler's: one forward less, and the ratio corrects
   staleness and any difference between sampler and trainer at once.
5. The critic, as in every GRPO: the group's mean is the baseline.
"""
import torch


def advantages(rewards):
    """How much better than its group each completion is: (r - mean) / (std + 1e-6), std with G - 1. [G] -> float32 [G]

    Exactly 0 where all rewards are equal: tested before the division, since in floating point the mean of equal numbers
    may differ from them, and a rounding error divided by 1e-6 would be trained on. Raises ValueError for G = 1.
    (LongVILA-R1 eq. 2; GLM-4.1V uses the same.)

    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    rewards = rewards.float()
    if rewards.numel() < 2:
        raise ValueError("a group of one completion has nothing to be compared with; group_size must be at least 2")
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, average, lengths=None, divisor=None):
    """The clipped objective, to be minimised. (LongVILA-R1 eq. 1 per token, without its KL; clip-higher as in DAPO.)

    logprobs, old_logprobs: [B,L], under the model and under the sampler; advantages: [B]; mask: bool [B,L], True where a
    token was sampled: forced tokens and padding carry no loss.
    average: "sample" gives every completion the same weight, "token" every token (GLM: the first is more stable).
    lengths [B], each completion's number of sampled tokens, and divisor, the number of completions ("sample") or tokens
    ("token"), are those of the whole optimizer step over all ranks, so that how a step is cut changes nothing:
    the losses of its parts add up. None means of this call.
    Returns (scalar, metrics), the metrics being sums over the mask that add up likewise: tokens, clip_low, clip_high.
    """
    if average not in ("sample", "token"):
        raise ValueError(f'loss_average is "sample" or "token", not {average!r}')
    # Outside the mask a log-prob may be -inf (a forced token may be one that is banned): cut before exp, not after.
    log_ratio = (logprobs - old_logprobs.masked_fill(~mask, 0)).masked_fill(~mask, 0)              # [B, L]
    ratio, advantage = log_ratio.exp(), advantages[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)  # [B, L]
    loss = -(gain * mask)
    if average == "sample":
        lengths = mask.sum(1) if lengths is None else lengths
        loss = loss.sum(1) / lengths.clamp(min=1)                                                  # [B]
        divisor = len(mask) if divisor is None else divisor
    else:
        divisor = mask.sum().clamp(min=1) if divisor is None else divisor
    with torch.no_grad():
        low = mask & (advantage < 0) & (ratio < 1 - clip_low)
        high = mask & (advantage > 0) & (ratio > 1 + clip_high)
        metrics = {"tokens": float(mask.sum()), "clip_low": float(low.sum()), "clip_high": float(high.sum())}
    return loss.sum() / divisor, metrics
