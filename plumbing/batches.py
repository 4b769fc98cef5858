"""
Who works on what: micro-batches (the groups of an update, cut into forwards with a bounded number
of tokens), and the completions that each rank samples.
"""
import math
from dataclasses import dataclass, replace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from flow import Completion, Group, Prompt, Ranks
from plumbing.families import TAGS, tokenize_text, vision_width
from plumbing.ranks import gather, shard


@dataclass
class Batch:
    """The groups of one forward: B prompts, N completions in all, padded to L tokens."""
    slots: list                 # B places of their `Group`s; -1: without weight
    prompts: list               # B `Prompt`s
    tokens: list                # B lists of long tensors, one a completion, of its own length
    old_logprobs: torch.Tensor  # [N, L] float32, under the sampler
    sampled: torch.Tensor       # [N, L] bool; False where forced, and beyond a completion's end
    advantages: torch.Tensor    # [N] float32


def micro_batches(groups, max_tokens, run):
    """Yields this rank's share of the groups as `Batch`es of at most max_tokens positions, padding
    included. A group that has more by itself is a batch of its own.

    groups: those of this team. All its sp ranks get batches of the same prompts in the same
    order, since they fetch the vision tokens together. Longest first pads little. Inside a batch
    the groups stay in their order.
    """
    c, ranks = run.config, run.ranks
    lengths = [longest_share(group, c, ranks.sp) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: sum(lengths[i]), reverse=True)
    parts = []
    for part in cut(order, lambda i: lengths[i], max_tokens):
        parts.append([rank_share(groups[i], c, ranks.sp_rank, ranks.sp) for i in sorted(part)])
    return make_batches(parts, run)


def taught_batches(groups, max_tokens, run):
    """As `micro_batches`, of groups that are this rank's alone, in their order."""
    return make_batches(list(cut(groups, group_lengths, max_tokens)), run)


def make_batches(parts, run):
    """Yields a `Batch` of each list of groups; the last ones may have weight zero (`missing`)."""
    weightless = missing(parts, run)       # all ranks ask before the first forward, none within
    for part in parts:
        yield make_batch(part, run.ranks.device)
    for _ in range(weightless):
        yield make_batch([weightless_group(run)], run.ranks.device)


def missing(parts, run):
    """How many more parts this rank needs. Sharded parameters (FSDP) are gathered by all ranks
    together: then every rank must have as many as the rank with the most."""
    if not isinstance(run.model, FSDPModule):
        return 0
    return max(gather(len(parts), run.ranks)) - len(parts)


def cut(items, lengths, most):
    """Cut items, in order, into runs that take at most `most` positions each. An item is a row of
    parts, and each part is padded to the longest in the run. lengths(item) -> those of its parts"""
    run, longest = [], []
    for item in items:
        parts = lengths(item)
        longest = [max(pair) for pair in zip(longest or parts, parts)]
        if run and (len(run) + 1) * sum(longest) > most:
            yield run
            run, longest = [], parts
        run.append(item)
    if run:
        yield run


def group_lengths(group):
    """Positions of a group in the packed sequence: of its prefix, and of all its completions."""
    return len(group.prompt.ids), sum(len(x.tokens) for x in group.completions)


def make_batch(groups, device):
    completions = [x for group in groups for x in group.completions]
    old_logprobs = pad_sequence([x.logprobs for x in completions], batch_first=True)       # [N, L]
    sampled = pad_sequence([x.sampled for x in completions], batch_first=True)             # [N, L]
    return Batch(slots=[group.slot for group in groups],
                 prompts=[group.prompt for group in groups],
                 tokens=[[x.tokens for x in group.completions] for group in groups],
                 old_logprobs=old_logprobs.to(device),
                 sampled=sampled.to(device),
                 advantages=torch.cat([group.advantages for group in groups]).to(device))


def weightless_group(run):
    """One token after a prompt of one token, marked as not sampled: its loss and gradient are 0."""
    device, features = run.banned.device, vision_width(run.model.config.vision_config)
    token = run.banned.int().argmin()[None]        # one that is not banned: no log-prob of -inf
    prompt = Prompt(ids=token,
                    positions=token.new_zeros(3, 1),
                    vision=torch.zeros(0, features, device=device),
                    grids=[])
    return one_completion(None, prompt, token, torch.zeros(1, dtype=torch.bool, device=device))


def taught_groups(tokenizer, prompts, texts, end):
    """Each text that a teacher wrote, as the only completion of its prompt. prompts: [(`Sample`,
    `Prompt`)]; end: ids that follow every text"""
    groups = []
    for (sample, prompt), text in zip(prompts, texts):
        tokens = torch.tensor(tokenize_text(tokenizer, text, but=TAGS) + end)
        groups.append(one_completion(
            sample, prompt, tokens, torch.ones(len(tokens), dtype=torch.bool)))
    return groups


def one_completion(sample, prompt, tokens, sampled):
    completion = Completion(tokens, sampled, torch.zeros(len(tokens), device=tokens.device),
                            text="", forced=False, truncated=False)
    return Group(-1, sample, prompt, [completion], advantages=torch.ones(1))


def token_counts(slots, facts):
    """{slot: positions of its packed sequence}: what training on it costs."""
    counts = {}
    for slot in slots:
        counts[slot] = facts[slot][0]["prefix"] + sum(x["length"] for x in facts[slot])
    return counts


def rank_share(group, c, sp_rank, sp):
    """A group with the completions that an sp rank trains on: all of them if the sequence is
    sharded (stage 2), else 1/sp."""
    if c.stage2:
        return group
    lo, hi = shard(c.group_size, sp_rank, sp)
    return replace(group, completions=group.completions[lo:hi], advantages=group.advantages[lo:hi])


def longest_share(group, c, sp):
    """`group_lengths` on the sp rank that has the most."""
    return max(group_lengths(rank_share(group, c, rank, sp)) for rank in range(sp))


def sharers(c, ranks):
    """The ranks that share each packed sequence: those of the sp group with stage 2, else none."""
    return ranks if c.stage2 else Ranks()


def split(slots, n):
    """n runs of slots, as even as possible; fewer if there are fewer slots."""
    n = min(n, len(slots))
    return [slots[slice(*shard(len(slots), i, n))] for i in range(n)]


def own_shares(prompts, G, ranks, prefill_is_shared):
    """What this sp rank samples: (i, lo, hi), completions lo to hi of prompt i, longest prompt
    first, so that prompts of like lengths are decoded together.

    Each prompt goes to one rank, where it is prefilled once. The ranks share its completions only
    where there are fewer prompts than ranks, or where they share its prefill.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    shares = []
    for place, i in enumerate(order):
        if prefill_is_shared:
            samplers = range(ranks.sp)
        elif len(prompts) < ranks.sp:
            samplers = range(place, ranks.sp, len(prompts))
        else:
            samplers = [place % ranks.sp]
        if ranks.sp_rank in samplers:
            lo, hi = shard(G, samplers.index(ranks.sp_rank), len(samplers))
            if lo < hi:
                shares.append((i, lo, hi))
    return shares


def draw_multiple(c, ranks):
    """The number of questions drawn is rounded up to a multiple of this: of dp, so that every dp
    group gets equally many, and of 2 if prompts_per_step is even, so that runs with dp = 1 and
    dp = 2 draw the same questions."""
    even = 2 if c.prompts_per_step % 2 == 0 else 1
    return math.lcm(even, ranks.dp)
