"""python -m pytest tests/test_send_groups.py -q

Groups dealt over the dp teams: each is trained on by one of them, and the step is that of a rank
that has them all. This file, run as a script by torchrun, is what each rank does.
"""
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch
from runs import (
    ALONE,
    STEPS,
    ended,
    group_of,
    launched,
    learn,
    run_of,
    same,
    summed_gradient,
)

import model as vlm
from plumbing.batches import group_lengths
from plumbing.ranks import deal_groups, gather, leave, send_groups, start

LAYOUTS = {2: [(1, False)], 4: [(2, False), (2, True), (1, False)]}    # ranks: (sp, stage2)


def contents(group):
    """All that must not part, as dicts and lists."""
    return [group.slot, asdict(group.sample), vars(group.prompt),
            [vars(x) for x in group.completions], group.advantages]


def unchanged(received, groups):
    """Whether groups came as they were. groups: {slot: group}"""
    return all(same(contents(group), contents(groups[group.slot])) for group in received)


def in_bfloat16(group):
    return replace(group, prompt=replace(group.prompt, vision=group.prompt.vision.bfloat16()))


def same_group(group):
    """These prompts hold their vision tokens: nothing is fetched or stored."""
    return group


def dealt_step(slots, ranks, stage2, most):
    """One optimizer step over slots. -> slots before and after on each rank, whether all came as
    they were, sums of metrics, norm, gradient"""
    model, tokenizer = vlm.load("tiny", seed=3)
    model.model.visual.requires_grad_(False)
    run = run_of(model, tokenizer, ranks, stage2=stage2, max_tokens=most)
    groups = {slot: group_of(slot, model, tokenizer) for slot in slots}
    tokens = {slot: sum(group_lengths(group)) for slot, group in groups.items()}
    destination, _ = deal_groups(tokens, ranks)
    own = [groups[slot] for slot in slots if slot % ranks.dp == ranks.dp_rank]
    mine = send_groups(own, destination, ranks, list, same_group)
    short = {slot: in_bfloat16(group) for slot, group in groups.items()}
    mine_short = send_groups(
        [short[group.slot] for group in own], destination, ranks, list, same_group)
    alike = unchanged(mine, groups) and unchanged(mine_short, short)
    sums = learn(run, mine, len(slots) * 4)
    before, after, alike = zip(*gather(
        ([group.slot for group in own], [group.slot for group in mine], alike), ranks))
    return before, after, all(alike), sums, *summed_gradient(model, ranks)


def worker(folder):
    """What each rank does: every step in every layout of so many ranks, in several micro-batches,
    more on some ranks than on others."""
    world, results = int(os.environ["WORLD_SIZE"]), {}
    for sp, stage2 in LAYOUTS[world]:
        ranks = start(sp)
        for name, slots in STEPS.items():
            results[sp, stage2, name] = dealt_step(slots, ranks, stage2, 150)
    if ranks.rank == 0:
        torch.save(results, os.path.join(folder, f"{world}.pt"))
    leave()


@pytest.fixture(scope="module")
def of_one_rank():
    return {name: dealt_step(slots, ALONE, False, 1 << 20) for name, slots in STEPS.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_groups_that_move_train_as_if_they_had_stayed(of_one_rank, world, tmp_path):
    """D16, D29: each group is trained on by one team, with its own video bit for bit, and the
    ranks' gradients sum to one rank's."""
    result = ended(launched(str(tmp_path), script=os.path.abspath(__file__), world=world))
    assert result.code == 0, result.err
    results = torch.load(tmp_path / f"{world}.pt")
    assert len(results) == len(LAYOUTS[world]) * len(STEPS)
    for (sp, stage2, name), (before, after, alike, sums, norm, gradient) in results.items():
        *_, expected_sums, expected_norm, expected = of_one_rank[name]
        case = (sp, stage2, name, before, after)
        assert alike and sorted(sum(after[::sp], [])) == STEPS[name], case
        # The sp ranks of a team hold the same groups.
        assert all(after[rank] == after[rank - rank % sp] for rank in range(world)), case
        assert (before != after) == (name != "one"), case  # a group alone has no cause to move
        assert (min(map(len, after)) == 0) == (name == "one"), case
        assert (min(map(len, before)) == 0) == (name != "all"), case
        error = float((gradient - expected).norm() / expected.norm())
        assert error < 1e-5, (case, error)
        assert norm == pytest.approx(expected_norm, rel=1e-5), case
        assert expected_norm > 0.01
        assert sums == pytest.approx(expected_sums, rel=1e-4, abs=1e-4), case
        assert sums["clip_low"] + sums["clip_high"] > 0, case


if __name__ == "__main__":
    worker(*sys.argv[1:])
