"""python -m pytest tests/test_batches.py -q

Micro-batches: which groups make a forward, and that the size of a forward changes nothing.
"""
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import (
    ALONE,
    SHORT,
    STEPS,
    alone,
    close,
    config,
    group_of,
    learn,
    metrics,
    run_of,
    summed_gradient,
)
from small import film
from tiny_families import KINDS, build

import data
import model as vlm
from flow import Ranks
from plumbing import batches
from plumbing.batches import cut, group_lengths, micro_batches, own_shares, rank_share, split


@pytest.fixture(scope="module")
def tiny():
    return vlm.load("tiny", seed=3)


def padded(batch):
    return len(batch) * max(batch)


# --------------------------------------------------------------------------------------------------
# how groups are cut into forwards

@pytest.mark.method
def test_micro_batches_keep_the_order_and_the_bound():
    items = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for most in (1, 5, 8, 12, 100):
        found = list(cut(items, lambda x: [x], most))
        assert sum(found, []) == items
        assert all(len(batch) == 1 or padded(batch) <= most for batch in found)
        for batch, after in zip(found, found[1:]):         # none could have taken one more
            assert padded(batch + after[:1]) > most
    assert list(cut([], lambda x: [x], 5)) == []


@pytest.mark.method
def test_longest_first_no_order_has_fewer_micro_batches():
    """Every cut is the greedy one of some order."""
    for items in ([3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 1, 6, 6, 6]):
        for most in (1, 6, 9, 12, 16, 24, 60):
            counts = [len(list(cut(order, lambda x: [x], most)))
                      for order in itertools.permutations(items)]
            assert len(list(cut(sorted(items, reverse=True), lambda x: [x], most))) == min(counts)


@pytest.mark.method
def test_each_group_is_in_one_micro_batch_whole(tiny):
    """The longest groups come first; inside a batch the groups stay in their order."""
    run = run_of(*tiny)
    groups = [group_of(slot, *tiny) for slot in STEPS["all"]]
    for most in (1, 150, 400, 1 << 20):
        found = list(micro_batches(groups, most, run))
        names = [[prompt.key for prompt in batch.prompts] for batch in found]
        assert sorted(sum(names, [])) == [f"video {slot}" for slot in STEPS["all"]]
        assert all(batch == sorted(batch) for batch in names)
        by_key = {group.prompt.key: group for group in groups}
        longest = [max(sum(group_lengths(by_key[key])) for key in batch) for batch in names]
        assert longest == sorted(longest, reverse=True)
        for batch, keys in zip(found, names):
            completions = [x for key in keys for x in by_key[key].completions]
            assert len(batch.advantages) == len(completions) == 4 * len(keys)
            for row, x in enumerate(completions):
                n = len(x.tokens)
                assert torch.equal(batch.old_logprobs[row, :n], x.logprobs)
                assert torch.equal(batch.sampled[row, :n], x.sampled)
                assert not batch.sampled[row, n:].any()    # what is padded carries no loss


@pytest.mark.method
def test_no_forward_has_more_positions_than_max_tokens(tiny, monkeypatch):
    """A long film with short answers and a short film with long ones were one batch of nearly twice
    max_tokens: prefixes and completions are padded apart, each to the longest of its kind."""
    run, places = run_of(*tiny), []
    forward = vlm.forward
    monkeypatch.setattr(vlm, "forward", lambda model, attention, ids, *rest:
                        places.append(ids.numel()) or forward(model, attention, ids, *rest))
    long_prompt, long_answers = group_of(1, *tiny), group_of(2, *tiny)
    end = long_prompt.prompt.ids[-1:]
    long_prompt.prompt = vlm.make_prompt(*tiny, "Which" + " red" * 150, long_prompt.prompt.vision,
                                         long_prompt.prompt.grids[0], 0.5)
    for x in long_prompt.completions:
        x.tokens, x.sampled, x.logprobs = x.tokens[:2], x.sampled[:2], x.logprobs[:2]
    for x in long_answers.completions:
        x.tokens = end.expand(40)
        x.sampled, x.logprobs = torch.ones(40, dtype=torch.bool), torch.zeros(40)
    groups = [long_prompt, long_answers, long_prompt, long_answers]
    most = 2 * max(sum(group_lengths(group)) for group in groups)
    for batch in micro_batches(groups, most, run):
        vlm.logprobs(run.model, batch.prompts, batch.tokens, run.banned)
    for batch in batches.taught_batches(groups, most, run):
        vlm.logprobs(run.model, batch.prompts, batch.tokens, run.banned)
    assert max(places) <= most and len(places) < 8


@pytest.mark.method
def test_the_groups_of_a_step_are_split_as_even_as_can_be():
    assert split([4, 7, 9, 2, 5], 2) == [[4, 7, 9], [2, 5]]
    assert split([4], 3) == [[4]]
    assert split([], 3) == []


@pytest.mark.method
def test_the_sp_ranks_share_out_each_group_and_with_stage_2_none_does(tiny):
    groups = [group_of(slot, *tiny) for slot in STEPS["even"]]
    for group in groups:
        first, second = (rank_share(group, config(), rank, 2) for rank in (0, 1))
        assert first.completions + second.completions == group.completions
        assert torch.equal(torch.cat([first.advantages, second.advantages]), group.advantages)
        assert len(first.completions) == 2
        assert rank_share(group, config(stage2=True), 1, 2) is group


# --------------------------------------------------------------------------------------------------
# what the cut must not change

@pytest.mark.method
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_cut(tiny):
    """One forward for each group, some groups together, all in one: equal to float error."""
    model, tokenizer = tiny
    model.model.visual.requires_grad_(False)
    groups = [group_of(slot, model, tokenizer) for slot in STEPS["all"]]
    for average, divisor in (("sample", 28), ("token", 100)):
        found = []
        for most in (1, 150, 1 << 20):
            run = run_of(model, tokenizer, max_tokens=most, loss_average=average)
            sums = learn(run, groups, divisor)
            found.append((sums, *summed_gradient(model, ALONE)))
        (sums, norm, expected), *others = found
        assert norm > 0.01
        assert sums["clip_low"] + sums["clip_high"] > 0
        for other_sums, other_norm, gradient in others:
            assert other_sums == pytest.approx(sums, rel=1e-4, abs=1e-4)
            assert other_norm == pytest.approx(norm, rel=1e-5)
            assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.method
@pytest.mark.parametrize("kind", KINDS)
def test_a_weightless_batch_has_no_loss_and_no_gradient(kind):
    """A rank without groups left takes part in it, where parameters are sharded. Qwen3-VL's vision
    tokens are wider: without that the batch was refused, and the run ended."""
    model, tokenizer = build(kind)
    model.model.visual.requires_grad_(False)
    run = run_of(model, tokenizer)
    sums = learn(run, [batches.weightless_group(run)], 1)
    assert sums == dict.fromkeys(sums, 0.0)
    norm, gradient = summed_gradient(model, ALONE)
    assert norm == 0
    assert not gradient.any()


def test_the_size_of_a_forward_changes_nothing(run, short, tmp_path):
    """max_tokens=1: every prompt is sampled alone and every group is its own backward. The step is
    the same to float error."""
    alone(**{**run.how, **SHORT, "model": run.model, "max_tokens": 1, "out_dir": tmp_path / "out"})
    rows = metrics(tmp_path / "out")
    close(short[:1], rows[:1], 1e-5)
    close(short, rows, 1e-3)


def test_the_size_of_a_forward_changes_nothing_while_the_tower_trains(files, tmp_path):
    """The whole batch goes through the tower in one call: the first micro-batch's backward freed
    the graph that the second needs."""
    rows = []
    for most in (300, 16384):
        out = tmp_path / f"{most}"
        alone(data=files.data, eval_data=files.eval_data, eval_every=0, align_steps=2, sft_steps=1,
              rl_steps=0, max_tokens=most, out_dir=out)
        rows.append(metrics(out))
    close(rows[0][:1], rows[1][:1], 1e-5)
    close(*rows, 1e-3)


# --------------------------------------------------------------------------------------------------
# what the cold start teaches

@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_in_a_thought_is_taught_as_letters(kind):
    """A vision pad in a thought ended the run, since there were more pads than vision tokens, and a
    banned token made the loss infinite. The tags stay what they are to each model."""
    model, tokenizer = build(kind)
    pad = tokenizer.convert_ids_to_tokens(vlm.vision_pad(model.config))
    sample = data.Sample("", "", "red", "", "", f"It shows {pad} and <|im_start|> here.")
    plain = replace(sample, thought="It shows blue and green here.")
    prompt = vlm.make_prompt(model, tokenizer, "Which?", *vlm.encode_video(model, lambda: film(2),
                                                                         ALONE))
    texts = [data.taught_text(sample), data.taught_text(plain)]
    odd, usual = batches.taught_groups(tokenizer, [(sample, prompt), (plain, prompt)], texts, [5])
    tokens = odd.completions[0].tokens
    assert not set(tokens.tolist()) & set(vlm.banned_ids(model, tokenizer).nonzero()[:, 0].tolist())
    assert tokenizer.decode(tokens[:-1]) == texts[0]
    right = tokenizer(texts[1], add_special_tokens=False).input_ids
    assert usual.completions[0].tokens.tolist() == [*right, 5]


# --------------------------------------------------------------------------------------------------
# which completions a rank samples

@pytest.mark.method
@pytest.mark.parametrize("N, G, sp", [
    *itertools.product((0, 1, 3, 8, 25), (1, 3, 8), (1, 2, 3, 8))])
def test_each_completion_is_sampled_by_one_rank(N, G, sp):
    """And no prompt is prefilled on two ranks, unless there are fewer prompts than ranks: each rank
    used to prefill all of them, for its part of every group."""
    prompts = [SimpleNamespace(ids=[0] * (7 * i % 11)) for i in range(N)]
    sampled, prefilled = [], []
    for sp_rank in range(sp):
        for i, lo, hi in own_shares(prompts, G, Ranks(sp=sp, sp_rank=sp_rank), False):
            sampled += [(i, g) for g in range(lo, hi)]
            prefilled.append(i)
    assert sorted(sampled) == [(i, g) for i in range(N) for g in range(G)]
    assert len(prefilled) <= max(N, min(sp, N * G))
    if N >= sp:
        assert sorted(prefilled) == list(range(N))


@pytest.mark.method
def test_ranks_that_share_a_prefill_share_each_group():
    """Stage 2 in the rollout: all ranks run every prompt together, in one order."""
    prompts = [SimpleNamespace(ids=[0] * n) for n in (3, 9, 5)]
    shares = [own_shares(prompts, 4, Ranks(sp=2, sp_rank=rank), True) for rank in range(2)]
    assert shares == [[(1, 0, 2), (2, 0, 2), (0, 0, 2)], [(1, 2, 4), (2, 2, 4), (0, 2, 4)]]
