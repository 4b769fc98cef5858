"""python -m pytest tests/test_rollout.py -q

Sampling: the torch engine against transformers, against the trainer, and against itself in other
batches, parts of a group and processes; forced answering, on tokens that the tests choose; the
command line. The model is the tiny one, its head made three times as sharp so that a wrong
log-prob shows.
"""
import copy
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ended, launched, two_ranks
from transformers import DynamicCache

import data
import model as vlm
import rewards
import rollout
import toy
from flow import Ranks
from plumbing import families
from plumbing.progress import Screen
from plumbing.ranks import start

pytestmark = pytest.mark.method

ROOT = Path(__file__).parent.parent
ALONE = Ranks()


# --------------------------------------------------------------------------------------------------
# a model, some prompts, and transformers' own way to the same numbers

def sharp_tiny():
    model, tokenizer = vlm.load("tiny")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model, tokenizer


@torch.no_grad()
def ask(model, tokenizer, frames, question):
    """-> (prompt, what transformers needs to see the same). frames: uint8 [T,H,W,3]"""
    pixels, grid = vlm.patchify(frames, model.pixels)
    vision = model.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    prompt = vlm.make_prompt(model, tokenizer, question, vision, grid, seconds=1.5)
    return prompt, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}


def three_prompts(model, tokenizer):
    """Prompts of three lengths, on videos of three sizes. 5 frames end in half a temporal patch."""
    def noise(*shape):
        return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    long_question = "Which colour comes right after the last red circle? Where is it?"
    return [ask(model, tokenizer, noise(4, 56, 84), "How many?"),
            ask(model, tokenizer, noise(5, 112, 84), long_question),
            ask(model, tokenizer, noise(8, 28, 56), "When is it done?")]


@pytest.fixture(scope="module")
def tiny():
    return sharp_tiny()


@pytest.fixture(scope="module")
def asked(tiny):
    return three_prompts(*tiny)


@pytest.fixture(scope="module")
def prompts(asked):
    lengths = [len(prompt.ids) for prompt, _ in asked]
    assert len(set(lengths)) == 3, lengths
    return [prompt for prompt, _ in asked]


@pytest.fixture
def endings(tiny, monkeypatch):
    """Every ninth id ends a completion too, so that completions end by themselves, at many
    lengths."""
    model, tokenizer = tiny
    ends = [tokenizer.eos_token_id, *range(1, 680, 9)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    return ends


@contextmanager
def stock(model):
    """transformers' own attention, in the language model and in the vision tower."""
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    yield
    model.set_attn_implementation(vlm.ATTENTION)


@torch.no_grad()
def recomputed(model, prompt, inputs, tokens, banned):
    """Log-probs of a completion's tokens by one forward of transformers over prompt and
    completion, without a cache."""
    ids = torch.cat([prompt.ids, tokens])
    more = prompt.positions.max() + 1 + torch.arange(len(tokens)).expand(3, -1)
    positions = torch.cat([prompt.positions, more], dim=1)
    with stock(model):
        output = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None],
                       position_ids=positions[:, None], use_cache=False, **inputs)
    logits = output.logits[0, len(prompt.ids) - 1:-1]
    logp = logits.masked_fill(banned, -torch.inf).log_softmax(1)
    return logp.gather(1, tokens[:, None])[:, 0]


def keys(N, G, name="k"):
    return [[(name, n, g) for g in range(G)] for n in range(N)]


def flat(groups):
    return [completion for group in groups for completion in group]


def same(a, b):
    """The same tokens, and log-probs that differ by no more than the arithmetic of another batch
    shape."""
    assert [x.tokens.tolist() for x in a] == [x.tokens.tolist() for x in b]
    for x, y in zip(a, b):
        assert torch.equal(x.sampled, y.sampled)
        assert (x.text, x.forced, x.truncated) == (y.text, y.forced, y.truncated)
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# the torch engine against transformers and against the trainer

def by_generate(model, prompt, inputs, tokens, banned):
    ids = model.generate(
        input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids)[None],
        position_ids=prompt.positions[:, None], max_new_tokens=tokens, do_sample=False,
        suppress_tokens=banned.nonzero().flatten().tolist(), **inputs)
    return ids[0, len(prompt.ids):].tolist()


@torch.no_grad()
def by_hand(model, prompt, inputs, tokens, banned):
    cache = DynamicCache(config=model.config.text_config)
    ids, positions, written = prompt.ids, prompt.positions, []
    first = int(positions.max()) + 1
    ends = model.generation_config.eos_token_id
    while len(written) < tokens and (not written or written[-1] not in ends):
        output = model(input_ids=ids[None], position_ids=positions[:, None],
                       past_key_values=cache, use_cache=True, **inputs)
        written.append(int(output.logits[0, -1].masked_fill(banned, -torch.inf).argmax()))
        ids = torch.tensor(written[-1:])
        positions = torch.full((3, 1), first + len(written) - 1)
        inputs = {}
    return written


@pytest.mark.parametrize("reference", [by_generate, by_hand])
def test_greedy_is_what_transformers_writes_under_our_positions(
        tiny, asked, monkeypatch, reference):
    """Ragged prompts in one batch; one completion is made to end in its middle, the others run to
    their budget."""
    model, tokenizer = tiny
    [[plain]] = rollout.sample(
        model, tokenizer, [asked[0][0]], keys(1, 1), 30, 0, greedy=True)
    end = next(t for i, t in enumerate(plain.tokens[:30].tolist())
               if i > 8 and t not in plain.tokens[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])

    prompts = [prompt for prompt, _ in asked]
    ours = flat(rollout.sample(model, tokenizer, prompts, keys(3, 1), 30, 0, greedy=True))
    banned = vlm.banned_ids(model, tokenizer)
    with stock(model):
        theirs = [reference(model, prompt, inputs, 30, banned) for prompt, inputs in asked]
    assert [x.tokens[:30].tolist() for x in ours] == theirs
    assert 9 < len(ours[0].tokens) < 30 and ours[0].tokens[-1] == end and len(ours[1].tokens) > 30


def test_sampler_and_trainer_give_the_same_logprobs(tiny, prompts, endings):
    """Three lengths of prompt in a batch, G = 4: completions that ended, were forced, were
    truncated, to 1e-5."""
    model, tokenizer = tiny
    groups = rollout.sample(model, tokenizer, prompts, keys(3, 4), 10, 6)
    xs = flat(groups)
    assert len({len(x.tokens) for x in xs}) > 3
    assert {x.forced for x in xs} == {x.truncated for x in xs} == {True, False}
    tokens = [[x.tokens for x in group] for group in groups]
    with torch.no_grad():
        trained, _ = vlm.logprobs(model, prompts, tokens, vlm.banned_ids(model, tokenizer))
    for x, logp in zip(xs, trained):
        assert x.logprobs.dtype == torch.float32
        expected = logp[:len(x.tokens)] * x.sampled
        torch.testing.assert_close(x.logprobs, expected, atol=1e-5, rtol=0)


def test_decoding_equals_recomputing_from_scratch(tiny, asked, endings):
    """Each sampled token's log-prob is that of transformers' whole forward, forced tokens in their
    places."""
    model, tokenizer = tiny
    groups = rollout.sample(model, tokenizer, [p for p, _ in asked], keys(3, 2), 10, 6)
    assert any(x.forced and len(x.tokens) > 15 for x in flat(groups))
    banned = vlm.banned_ids(model, tokenizer)
    for (prompt, inputs), group in zip(asked, groups):
        for x in group:
            slow = recomputed(model, prompt, inputs, x.tokens, banned)
            torch.testing.assert_close(x.logprobs, slow * x.sampled, atol=1e-5, rtol=0)


def test_the_prefix_keys_and_values_exist_once(tiny, prompts, monkeypatch):
    """N prefixes are kept, not N * G; and each layer writes its completions' keys into the same
    memory at every step."""
    model, tokenizer = tiny
    attentions, places = [], set()

    class Watched(rollout.SharedPrefix):
        def __call__(self, layer, *qkv):
            attentions.append(self)
            out = super().__call__(layer, *qkv)
            for pair in (*self.prefix.values(), *self.completions.values()):
                places.update(x.data_ptr() for x in pair)
            return out

    monkeypatch.setattr(rollout, "SharedPrefix", Watched)
    rollout.sample(model, tokenizer, prompts, keys(3, 5), 4, 3)
    layers = model.config.text_config.num_hidden_layers
    longest = max(len(p.ids) for p in prompts)
    [attention] = set(attentions)
    assert len(attentions) > 5 * layers and len(attention.prefix) == layers
    assert {x.shape[0] for pair in attention.prefix.values() for x in pair} == {3}
    assert {x.shape[2] for pair in attention.prefix.values() for x in pair} == {longest}
    assert {x.shape[0] for pair in attention.completions.values() for x in pair} == {15}
    assert len(places) == 4 * layers


def test_rows_that_have_ended_leave_the_batch(tiny, prompts, endings, monkeypatch):
    """All rows were decoded until the last one had ended: 7 times the tokens that were written, if
    one is long. Now at most 1.1 times, with the same tokens and log-probs."""
    model, tokenizer = tiny
    how = {"think_budget": 40, "answer_budget": 10}
    decoded = []

    def count(module, arguments, options):
        if options["inputs_embeds"].shape[1] == 1:
            decoded.append(len(options["inputs_embeds"]))

    K = keys(3, 16)
    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    groups = rollout.sample(model, tokenizer, prompts, K, **how)
    written = sum(len(x.tokens) for x in flat(groups))
    assert sum(decoded) <= 1.1 * written
    decoded.clear()
    monkeypatch.setattr(rollout, "MOST_SPARE", torch.inf)
    never_left = rollout.sample(model, tokenizer, prompts, K, **how)
    hook.remove()
    assert sum(decoded) > 2 * written
    same(flat(groups), flat(never_left))


def test_a_prefix_that_no_row_follows_leaves_too(tiny, prompts, monkeypatch):
    """The completions of one prompt end long before the others': attention no longer reads its
    prefix, and what the others see is unchanged, log-probs included."""
    model, tokenizer = tiny
    lengths = torch.tensor([len(p.ids) for p in prompts])
    with torch.no_grad():
        attention, _, first = rollout.prefill(model, prompts, 3, 4, ALONE)
    rows = torch.tensor([1, 6, 7])                         # one of prompt 0, two of prompt 2
    tokens = torch.arange(20, 29)

    def decode(step, rows):
        attention.step = step
        return model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(tokens[rows] + step)[:, None],
            position_ids=(first[rows] + step).expand(3, -1)[..., None], use_cache=False,
            attention=attention).last_hidden_state[:, 0]

    with torch.no_grad():
        decode(0, torch.arange(9))
        expected = decode(1, torch.arange(9))[rows]
        attention.keep(rows)
        torch.testing.assert_close(decode(1, rows), expected, atol=1e-5, rtol=0)
    assert {len(x) for pair in attention.prefix.values() for x in pair} == {2}
    assert {len(x) for pair in attention.completions.values() for x in pair} == {3}
    assert (attention.mask[:, 0, 0] == 0).sum(1).tolist() == lengths[[0, 2]].tolist()


# --------------------------------------------------------------------------------------------------
# which tokens are sampled

def test_the_keys_decide_whatever_the_batch_and_the_part_of_the_group(tiny, prompts, endings):
    """All at once, prompt by prompt, in another order, half a group, and through rollout() in
    batches of any size."""
    model, tokenizer = tiny
    how = {"think_budget": 9, "answer_budget": 5}
    K = keys(3, 4)
    everything = rollout.sample(model, tokenizer, prompts, K, **how)
    different = {tuple(x.tokens.tolist()) for x in flat(everything)}
    assert len(different) == 12, "different keys, different completions"
    for n in range(3):
        [alone] = rollout.sample(model, tokenizer, prompts[n:n + 1], K[n:n + 1], **how)
        same(alone, everything[n])
        [part] = rollout.sample(model, tokenizer, prompts[n:n + 1], [K[n][1:3]], **how)
        same(part, everything[n][1:3])
    turned = rollout.sample(model, tokenizer, prompts[::-1], K[::-1], **how)
    same(flat(turned[::-1]), flat(everything))
    for max_tokens in (1, 2 * max(len(p.ids) for p in prompts), 10 ** 6):
        rolled = rollout.rollout(
            model, tokenizer, prompts, K, ALONE, max_tokens=max_tokens, **how)
        same(flat(rolled), flat(everything))


def test_rollout_keeps_its_batches_within_max_tokens(tiny, prompts, monkeypatch):
    """max_tokens counts the padding; a prompt that is longer alone still goes, by itself."""
    model, tokenizer = tiny
    sizes = []

    def sample(model, tokenizer, prompts, keys, **_):
        sizes.append(len(prompts))
        return [list(row) for row in keys]

    monkeypatch.setattr(rollout, "sample", sample)
    K = keys(3, 2)
    _, middle, long = sorted(len(p.ids) for p in prompts)  # the longest goes first
    assert middle < long
    for most, expected in ((1, [1, 1, 1]), (2 * middle - 1, [1, 1, 1]), (2 * middle, [1, 2]),
                           (2 * long, [2, 1]), (3 * long, [3])):
        sizes.clear()
        assert rollout.rollout(model, tokenizer, prompts, K, ALONE, max_tokens=most) == K
        assert sizes == expected, most
    assert rollout.rollout(model, tokenizer, [], [], ALONE) == []


def chi_square(counts, p):
    """-> (the statistic, the value it stays below but for once in millions of honest samples).
    Rare tokens are pooled."""
    p, order = p.sort(descending=True)
    pools = int(counts.sum()) // 25
    pool = (p.cumsum(0) * pools).floor().clamp(max=pools - 1)      # about 25 expected, or one token
    _, pool = pool.unique(return_inverse=True)
    expected = torch.zeros(int(pool.max()) + 1, dtype=p.dtype).index_add_(0, pool, p)
    expected = expected * counts.sum()
    seen = torch.zeros_like(expected).index_add_(0, pool, counts[order].to(p.dtype))
    free = len(expected) - 1
    return float(((seen - expected) ** 2 / expected).sum()), free + 6 * (2 * free) ** 0.5


@torch.no_grad()
def first_distribution(model, prompt, banned):
    """The log-probs of a completion's first token, by one forward of the prompt."""
    attention = rollout.SharedPrefix(
        torch.tensor([len(prompt.ids)]), len(prompt.ids), 1, 1, 2, ALONE)
    hidden = model.model.language_model(
        inputs_embeds=vlm.splice(model, prompt.ids[None], [prompt.vision]), use_cache=False,
        position_ids=prompt.positions[:, None], attention=attention).last_hidden_state[0, -1:]
    return vlm.token_distribution(model, hidden, banned)[0].double()


def test_first_tokens_come_as_often_as_their_probability_says(tiny, prompts):
    """2,500 keys, fixed, so that it cannot flake; the same check sees a temperature of 1.2 and a
    top-p of 0.95."""
    model, tokenizer = tiny
    banned = vlm.banned_ids(model, tokenizer)
    [group] = rollout.sample(model, tokenizer, prompts[:1], keys(1, 2500), 1, 0)
    first = torch.stack([x.tokens[0] for x in group])
    trainers = []                                          # to be sure of the reference
    with torch.no_grad():
        for token in first[:2]:
            logp, _ = vlm.logprobs(model, prompts[:1], [[token[None]]], banned)
            trainers.append(logp[0, 0])
    logp = first_distribution(model, prompts[0], banned)
    torch.testing.assert_close(
        logp[first[:2]].float(), torch.stack(trainers), atol=1e-5, rtol=0)
    counts = torch.bincount(first, minlength=len(logp))
    statistic, bound = chi_square(counts, logp.exp())
    assert statistic < bound
    warm, _ = chi_square(counts, (logp / 1.2).softmax(0))
    nucleus, order = logp.exp().sort(descending=True)
    nucleus = (nucleus * (nucleus.cumsum(0) - nucleus < 0.95) + 1e-6)[order.argsort()]
    cut, _ = chi_square(counts, nucleus / nucleus.sum())
    assert warm > bound and cut > bound


def equally_likely(ids):
    """In the place of `model.token_distribution`: these ids, and no other."""
    def distribution(model, hidden, banned):
        logp = torch.full((len(hidden), len(banned)), -torch.inf)
        logp[:, ids] = -torch.tensor(float(len(ids))).log()
        return logp
    return distribution


def test_one_token_says_nothing_about_the_next(tiny, prompts, monkeypatch):
    """Four tokens, equally likely at each step: all 16 pairs of neighbours come equally often.
    (1,600 fixed keys.)"""
    model, tokenizer = tiny
    monkeypatch.setattr(vlm, "token_distribution", equally_likely([20, 21, 22, 23]))
    [group] = rollout.sample(model, tokenizer, prompts[:1], keys(1, 1600), 3, 0)
    tokens = torch.stack([x.tokens[:3] for x in group]) - 20
    for pair in (tokens[:, :2], tokens[:, 1:], tokens[:, ::2]):
        counts = torch.bincount(pair @ torch.tensor([4, 1]), minlength=16)
        statistic, bound = chi_square(counts, torch.full((16,), 1 / 16.0))
        assert statistic < bound


@pytest.mark.parametrize("number, chosen", [(0.0, 20), (0.5, 30), (1 - 2 ** -53, 30)])
def test_the_outermost_random_numbers_choose_no_impossible_token(
        tiny, prompts, monkeypatch, number, chosen):
    """0 is not the first token of the vocabulary, if that one cannot be, and the largest number
    below 1 is not the last. A number on the border of two tokens (0.5) is the second's."""
    model, tokenizer = tiny
    monkeypatch.setattr(vlm, "token_distribution", equally_likely([20, 30]))
    monkeypatch.setattr(rollout, "uniform", lambda keys, n: np.full((len(keys), n), number))
    [[x]] = rollout.sample(model, tokenizer, prompts[:1], keys(1, 1), 3, 0)
    assert x.tokens[:3].tolist() == [chosen] * 3


@pytest.fixture(scope="module")
def wide(tiny):
    """A vocabulary with rows that no token owns, and tags that are ordinary added tokens, as in
    some tokenizers."""
    model, tokenizer = copy.deepcopy(tiny)
    tokenizer.add_tokens(["</think>", "nk></ans", "think>,"])
    model.resize_token_embeddings(len(tokenizer) + 10, mean_resizing=False)
    return model, tokenizer


def test_banned_ids_are_never_sampled_even_when_most_likely(wide, asked):
    """A vision pad sampled as text broke the next forward: it has one pad more than there are
    vision tokens.

    Half of the banned rows of the head get +1000 times one direction, half of them -1000 times it:
    whatever the hidden state, a banned id has the largest logit. Rows that no token owns count: to
    decode one is an error or an empty text.
    """
    model, tokenizer = copy.deepcopy(wide)
    banned = vlm.banned_ids(model, tokenizer)
    controls = ["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    unowned = list(range(len(tokenizer), len(tokenizer) + 10))
    expected = tokenizer.convert_tokens_to_ids(controls) + unowned
    assert banned.nonzero().flatten().tolist() == sorted(expected)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[banned] = 1000 * head[5] / head[5].norm()
        head[banned.nonzero().flatten()[::2]] *= -1
        (prompt, inputs), most_likely = asked[0], []

        def note_most_likely(module, args, logits):
            most_likely.append(logits.argmax(-1).flatten())

        hook = model.get_output_embeddings().register_forward_hook(note_most_likely)
        [sampled] = rollout.sample(model, tokenizer, [prompt], keys(1, 20), 12, 4)
        [greedy] = rollout.sample(model, tokenizer, [prompt], keys(1, 1), 12, 4, greedy=True)
        hook.remove()
    often = banned[torch.cat(most_likely)].float().mean()
    assert often > 0.9, "a banned id was the most likely one, nearly everywhere"
    for x in sampled + greedy:
        assert not banned[x.tokens].any() and bool(x.logprobs.isfinite().all())
        recomputed(model, prompt, inputs, x.tokens, banned)         # raises where pads were sampled


# --------------------------------------------------------------------------------------------------
# forced answering, on tokens that the tests choose

WORDS = ["so", "the", "red", "circle", "is", "left", "right", "top"]


def ids_of(tokenizer, tokens):
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert None not in ids and len(set(ids)) == len(set(tokens)), tokens
    return ids


def forced_ids(tokenizer, text=rollout.FORCED_TEXT):
    return tokenizer(text, add_special_tokens=False).input_ids


def play(monkeypatch, tiny, prompts, rows, think, answer, **how):
    """The completions of a model that picks rows[r][step] at each step; after a row's end it picks
    "top" for ever."""
    model, tokenizer = tiny
    active = [ids_of(tokenizer, row) for row in rows]
    [top] = ids_of(tokenizer, ["top"])
    step = itertools.count()

    class Followed(rollout.SharedPrefix):
        """Rows that have ended leave."""

        def keep(self, kept):
            active[:] = [active[i] for i in kept.tolist()]
            super().keep(kept)

    def scripted(model, hidden, banned):
        s, logp = next(step), torch.full((len(hidden), len(banned)), -torch.inf)
        for r, row in enumerate(active):
            logp[r, row[s] if s < len(row) else top] = 0.0
        return logp

    with monkeypatch.context() as patch:
        patch.setattr(vlm, "token_distribution", scripted)
        patch.setattr(rollout, "SharedPrefix", Followed)
        [group] = rollout.sample(
            model, tokenizer, prompts[:1], keys(1, len(rows)), think, answer, **how)
    return group


def test_a_thinker_out_of_time_is_made_to_answer(tiny, prompts, monkeypatch):
    """Exactly the ids of "</think><answer>" after think_budget tokens, marked, worth 0; then
    answer_budget tokens."""
    _, tokenizer = tiny
    forced = forced_ids(tokenizer, "</think><answer>")
    for think, answer in ((7, 4), (1, 1), (7, 0), (0, 4), (0, 0)):
        [x] = play(monkeypatch, tiny, prompts, [WORDS[:think]], think, answer)
        thought, top = ids_of(tokenizer, WORDS[:think]), ids_of(tokenizer, ["top"])
        assert x.forced and x.truncated
        assert x.tokens.tolist() == thought + forced + top * answer
        assert x.sampled.tolist() == [True] * think + [False] * len(forced) + [True] * answer
        certain = "certain where sampled, 0 by definition where forced"
        assert x.logprobs.tolist() == [0.0] * len(x.tokens), certain
        assert x.text == "".join(WORDS[:think]) + "</think><answer>" + "top" * answer


def test_forced_tokens_are_worth_0_even_where_banned_or_unlikely(tiny, prompts, monkeypatch):
    """The sampler's log-prob of a forced token may be -inf; 0 is kept, or a difference with it
    would be NaN."""
    model, tokenizer = tiny
    banned = vlm.banned_ids(model, tokenizer)
    banned[forced_ids(tokenizer)] = True
    monkeypatch.setattr(vlm, "banned_ids", lambda *_: banned)
    [group] = rollout.sample(model, tokenizer, prompts[:1], keys(1, 3), 5, 3)
    for x in group:
        assert x.forced and x.sampled.tolist() == [True] * 5 + [False] * 5 + [True] * 3
        assert (x.logprobs == 0).tolist() == (~x.sampled).tolist()
        assert bool(x.logprobs.isfinite().all())


def test_a_forced_answer_may_end_by_itself(tiny, prompts, monkeypatch):
    """Forced, and not truncated; the rows of one batch do not disturb one another."""
    answer = ["?"] * 5 + ["red", "</", "answer", ">", "<|im_end|>"]  # "?": where forced tokens go
    rows = [WORDS[:3] + answer, ["so", "<|im_end|>"], WORDS]
    xs = play(monkeypatch, tiny, prompts, rows, 3, 6)
    assert [(x.forced, x.truncated, len(x.tokens)) for x in xs] == [
        (True, False, 13), (False, False, 2), (True, True, 14)]
    assert xs[0].text == "sothered</think><answer>red</answer>"
    assert xs[0].sampled.tolist() == [True] * 3 + [False] * 5 + [True] * 5


# How </think> may come: in tokens of the tiny tokenizer, in bytes, and joined with its neighbours.
CUTS = {
    "three tokens": ["</", "think", ">"],
    "letter by letter": list("</think>"),
    "joined before": ["></", "think", ">"],
    "joined with a comma after": ["</", "think", ">,"],
    "joined with the next tag": ["</", "think", "><"],
    "after a space": ["Ġ</", "think", ">"],
    "two halves": ["<", "/", "think", ">."],
}
WIDE_CUTS = {
    "one added token": ["</think>"],
    "an added token over both tags": ["</", "t", "h", "i", "nk></ans"],
    "an added token that ends it": ["</", "think>,"],
}


def closes(monkeypatch, model, prompts, cut):
    """After this </think> comes the answer: of answer_budget tokens from there, with no force,
    though think_budget ends."""
    _, tokenizer = model
    thought = WORDS[:5] + cut
    for think in (len(thought), len(thought) + 1, 40):
        [x] = play(monkeypatch, model, prompts, [thought], think, 4)
        assert x.tokens.tolist() == ids_of(tokenizer, thought + ["top"] * 4), think
        assert x.truncated and not x.forced and bool(x.sampled.all())
    think = len(thought) - 1
    [x] = play(monkeypatch, model, prompts, [thought], think, 4)
    forced = len(forced_ids(tokenizer))
    assert x.forced and x.sampled.tolist() == [True] * think + [False] * forced + [True] * 4


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_end_of_thinking_is_found_however_it_is_cut_into_tokens(
        tiny, prompts, monkeypatch, cut):
    closes(monkeypatch, tiny, prompts, cut)


@pytest.mark.parametrize("cut", WIDE_CUTS.values(), ids=WIDE_CUTS)
def test_the_end_of_thinking_is_found_in_added_tokens(wide, prompts, monkeypatch, cut):
    closes(monkeypatch, wide, prompts, cut)


def test_a_tag_that_is_a_special_token_stays_in_the_text(tiny, prompts, monkeypatch):
    """banned_ids lets special tokens that spell a tag be sampled; a text without them would be
    graded as badly formed.

    The first version decoded with skip_special_tokens and lost them, while the search for </think>
    saw them.
    """
    model, tokenizer = copy.deepcopy(tiny)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    row = ["<think>", "so", "</think>", "red", "<|im_end|>"]
    [x] = play(monkeypatch, (model, tokenizer), prompts, [row], 9, 9)
    assert not x.forced and x.text == "<think>so</think>red"


@pytest.mark.parametrize("almost", [
    ["</", "think"], ["think", ">"], ["</", "Ġ", "think", ">"], ["<", "think", ">"],
    ["</", "answer", ">"]], ids="".join)
def test_what_only_resembles_the_end_of_thinking_does_not_end_it(
        tiny, prompts, monkeypatch, almost):
    [x] = play(monkeypatch, tiny, prompts, [almost], 12, 4)
    assert x.forced and len(x.tokens) == 12 + 5 + 4


def test_the_answer_budget_is_given_once(tiny, prompts, monkeypatch):
    """A second </think>, in the answer, gives no second budget: neither to a completion that ended
    its thought nor to a forced one."""
    close = ["</", "think", ">"]
    rows = [["so", *close] + close * 9, WORDS[:8] + close * 9]
    natural, forced = play(monkeypatch, tiny, prompts, rows, 8, 7)
    assert (len(natural.tokens), natural.forced, natural.truncated) == (4 + 7, False, True)
    assert (len(forced.tokens), forced.forced, forced.truncated) == (8 + 5 + 7, True, True)


def test_without_force_a_thinker_out_of_time_ends_unanswered(tiny, prompts, monkeypatch):
    """Nothing is written, every token is sampled; a completion that ends its thought in time is
    what it is with force."""
    rows = [["so", "</", "think", ">", "red", "<|im_end|>"], ["so", "<|im_end|>"]]
    for think in (7, 1):
        x, *others = play(monkeypatch, tiny, prompts, [WORDS] + rows, think, 4, forced=None)
        assert x.tokens.tolist() == ids_of(tiny[1], WORDS[:think]) and bool(x.sampled.all())
        assert x.truncated and not x.forced
    for a, b in zip(others, play(monkeypatch, tiny, prompts, [WORDS] + rows, 1, 4)[1:]):
        assert a.truncated and b.forced                    # one token is too short for both
    unforced = play(monkeypatch, tiny, prompts, rows, 7, 4, forced=None)
    forced = play(monkeypatch, tiny, prompts, rows, 7, 4, forced=rollout.FORCED_TEXT)
    for a, b in zip(unforced, forced):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.forced, a.truncated, a.text) == (b.forced, b.truncated, b.text)
    assert rollout.room(tiny[1], **rollout.limits(7, 4, force=False)) == 11


def test_no_time_at_all_is_an_empty_thought_written_whole(tiny, prompts, monkeypatch):
    """What the cold start of think_budget = 0 teaches, and a form that `rewards` accepts."""
    written = rollout.limits(0, 9)["forced"]
    forced = forced_ids(tiny[1], written)
    row = ["?"] * len(forced) + ["red", "</", "answer", ">", "<|im_end|>"]
    [x] = play(monkeypatch, tiny, prompts, [row], 0, 9, forced=written)
    taught = data.taught_text(data.Sample("", "", "red", "", "", "a thought"), False)
    assert x.text == "<think></think><answer>red</answer>" == taught
    assert rewards.score(x.text, "red", "open").total == 1 and x.forced and not x.truncated
    assert written == "<think></think><answer>"
    assert x.sampled.tolist() == [False] * len(forced) + [True] * 5
    assert len(x.tokens) <= rollout.room(tiny[1], **rollout.limits(0, 9))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_thought_that_would_end_too_early_goes_on(tiny, prompts, monkeypatch, cut):
    """Where the tag begins WAIT_TEXT is written, not sampled, and it counts as thinking; from
    think_least tokens on the thought may end."""
    wait = forced_ids(tiny[1], rollout.WAIT_TEXT)
    at = next(i for i in range(len(cut))                   # the first token that shows the tag
              if "</" in "".join(cut[:i + 1]).replace("Ġ", " "))
    after, close = 2 + at + len(wait), ["</", "think", ">", "red", "<|im_end|>"]
    row = ["so", "the", *cut[:at], *["?"] * len(wait), "is", *close]
    row[2 + at] = cut[at]
    x, natural = play(
        monkeypatch, tiny, prompts, [row, ["so", *close]], 40, 4, think_least=after + 1)
    expected = ids_of(tiny[1], row)
    expected[2 + at:after] = wait
    assert x.tokens.tolist() == expected and not x.forced and not x.truncated
    assert x.sampled.tolist() == [True] * (2 + at) + [False] * len(wait) + [True] * 6
    assert bool((x.logprobs[~x.sampled] == 0).all()) and x.text.count("</think>") == 1
    assert natural.text.startswith("so" + rollout.WAIT_TEXT) and natural.text.count("</think>") <= 1


def test_thinking_made_longer_ends_with_its_budget(tiny, prompts, monkeypatch):
    """A model that wants to stop at every step, by the tag or by the end of its turn: never more
    than think_budget tokens, then the forced answer. Without think_least nothing changes."""
    for stop in ("</", "<|im_end|>"):
        for think in (5, 6, 7, 20):
            [x] = play(monkeypatch, tiny, prompts, [[stop] * 40], think, 4, think_least=think)
            assert x.forced and x.tokens[think:think + 5].tolist() == forced_ids(tiny[1])
            assert not x.sampled[:think + 5].any() and len(x.tokens) <= think + 5 + 4
    plain = flat(rollout.sample(*tiny, prompts, keys(3, 4), 7, 12))
    for a, b in zip(plain, flat(rollout.sample(*tiny, prompts, keys(3, 4), 7, 12, think_least=0))):
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("row, think, answer", [
    (["so", "<|im_end|>"], 2, 3),                                    # the last token of the thought
    (["so", "</", "think", ">", "red", "<|im_end|>"], 9, 2),         # the last token of the answer
    (["<|im_end|>"], 1, 0), (["so", "</", "think", ">", "<|im_end|>"], 4, 1)])
def test_an_end_within_the_budget_is_not_cut_short(tiny, prompts, monkeypatch, row, think, answer):
    """... nor forced, while others of its batch go on; the end token is the last one, sampled, and
    no part of the text."""
    x, other = play(monkeypatch, tiny, prompts, [row, WORDS], think, answer)
    assert len(other.tokens) > len(x.tokens)
    assert x.tokens.tolist() == ids_of(tiny[1], row) and bool(x.sampled.all())
    assert not x.forced and not x.truncated and x.text == "".join(row[:-1])


def test_a_completion_that_ends_by_itself_is_untouched_by_the_budgets(tiny, prompts, endings):
    """The same tokens as with larger budgets; one that is forced is the same up to there; none
    exceeds its total."""
    model, tokenizer = tiny
    tight = flat(rollout.sample(model, tokenizer, prompts, keys(3, 8), 7, 12))
    loose = flat(rollout.sample(model, tokenizer, prompts, keys(3, 8), 60, 30))
    kinds = [(x.forced, x.truncated) for x in tight]
    assert {(False, False), (True, False), (True, True)} <= set(kinds)
    for x, y in zip(tight, loose):
        assert len(x.tokens) <= 7 + 5 + 12 and bool((~x.sampled).sum() == 5 * x.forced)
        if x.forced:
            assert torch.equal(x.tokens[:7], y.tokens[:7]) and len(y.tokens) > 7
            ended_by_itself = int(x.tokens[-1]) in endings
            assert (x.truncated, bool(x.sampled[-1])) == (not ended_by_itself, True)
        else:
            same([x], [y])
            assert int(x.tokens[-1]) in endings
            assert not set(x.tokens[:-1].tolist()) & set(endings)


# the rules alone, without a model: a token's id is its place in this list
PIECES = ["a", "</", "think", ">", "stop"]


def write(text, think_budget, answer_budget, think_least=0, force=True):
    """-> (the `Writing`, what it wrote). text: the pieces that the model picks, step by step;
    "F" is the forced text, "w" is WAIT_TEXT."""
    pieces = PIECES + ["F", "w"]
    rules = rollout.Rules(think_budget, answer_budget, think_least, stop_ids={4}, wait_ids=[6, 6],
                          forced_ids=[5] if force else [], forces_answer=force)
    writing = rollout.Writing(rules, think_budget)
    written = [writing.write(pieces.index(piece), piece) for piece in text.split()]
    assert writing.tokens == written[:len(writing.tokens)]
    return writing, " ".join(pieces[i] for i in writing.tokens)


@pytest.mark.parametrize("picked, limits, written, forced, truncated", [
    ("a </ think > a stop", dict(think_budget=9, answer_budget=3), "a </ think > a stop", 0, 0),
    ("a a a a a", dict(think_budget=2, answer_budget=2), "a a F a a", 1, 1),
    ("a a a stop a", dict(think_budget=2, answer_budget=2), "a a F stop", 1, 0),
    ("a a a", dict(think_budget=2, answer_budget=0), "a a F", 1, 1),
    ("a a a", dict(think_budget=2, answer_budget=2, force=False), "a a", 0, 1),
    ("a a", dict(think_budget=0, answer_budget=1, force=False), "a", 1, 1),
    ("a stop a a </ think >", dict(think_budget=9, answer_budget=3, think_least=4),
     "a w w a </ think >", 0, None),
    ("stop a a a a", dict(think_budget=1, answer_budget=2, think_least=1), "w F a a", 1, 1),
    ("stop a", dict(think_budget=1, answer_budget=2, think_least=1, force=False), "w", 0, 1),
], ids=["ends", "forced", "forced, ends", "no answer", "not forced", "not forced, no thought",
        "waits", "its time is up while it waits", "... and nothing is forced"])
def test_a_completion_is_written_by_its_rules(picked, limits, written, forced, truncated):
    """truncated None: it is not done yet."""
    writing, text = write(picked, **limits)
    assert text == written
    assert writing.forced == bool(forced) and writing.truncated == bool(truncated)
    assert writing.done == (truncated is not None)
    assert writing.sampled == [piece not in ("F", "w") for piece in written.split()]


# --------------------------------------------------------------------------------------------------
# watching

def screen(tiny):
    """-> the pieces of text that a `Screen` prints, and what sample is given to watch"""
    model, tokenizer = tiny
    seen = []
    text_of = partial(families.decode, tokenizer, stops=vlm.stop_ids(model, tokenizer))
    return seen, Screen(text_of, seen.append).show


@pytest.mark.parametrize("row, think", [
    (["so", "</", "think", ">", "<", "answer", ">", "red", "</", "answer", ">", "<|im_end|>"], 20),
    (["so", "the"], 2), (["<|im_end|>"], 9), ([], 0)],
    ids=["ends", "forced", "no text", "cannot think"])
def test_the_watched_pieces_are_the_text(tiny, prompts, monkeypatch, row, think):
    """Of the first completion alone, which ends before the second, and piece by piece."""
    seen, watch = screen(tiny)
    x, other = play(monkeypatch, tiny, prompts, [row, WORDS], think, 9, watch=watch)
    ended = row[-1:] == ["<|im_end|>"]
    assert "".join(seen) == x.text and len(seen) == len(x.tokens) - ended
    assert len(other.tokens) >= len(x.tokens)


def test_letters_of_several_bytes_are_watched_whole(tiny, prompts, monkeypatch):
    """A letter may be cut into tokens that are no text by themselves: the first version showed one
    "\\ufffd" for each."""
    _, tokenizer = tiny
    seen, watch = screen(tiny)
    snow = tokenizer.convert_ids_to_tokens(forced_ids(tokenizer, "ein Käfer, 雪"))
    assert len(snow) > 8
    row = [*snow, "so", "<|im_end|>"]
    [x] = play(monkeypatch, tiny, prompts, [row], 40, 9, watch=watch)
    assert x.text == "ein Käfer, 雪so"
    assert "".join(seen) == x.text
    seen, watch = screen(tiny)
    row = [*snow[:-1], "<|im_end|>"]
    [x] = play(monkeypatch, tiny, prompts, [row], 40, 9, watch=watch)
    assert x.text.startswith("ein Käfer, \ufffd")
    assert "".join(seen) == x.text, "half a letter at the very end is shown too"


# --------------------------------------------------------------------------------------------------
# two processes

HOW = {"think_budget": 8, "answer_budget": 4}


CASES = [(3, 3), (3, 1), (1, 3), (1, 1), (0, 0)]           # prompts, and completions of each


def worker(out):
    """What one of two processes runs: rollout() of more prompts than ranks, of fewer (with 1
    completion one rank has none to sample), and of none."""
    ranks = start(2)
    model, tokenizer = sharp_tiny()
    prompts = [prompt for prompt, _ in three_prompts(model, tokenizer)]
    prefilled = []

    def count(module, arguments, options):
        rows, length = options["inputs_embeds"].shape[:2]
        if length > 1:
            prefilled[-1] += rows * length

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    results = []
    for N, G in CASES:
        prefilled.append(0)
        groups = rollout.rollout(
            model, tokenizer, prompts[:N], keys(N, G), ranks, max_tokens=150, **HOW)
        results.append([[vars(x) for x in group] for group in groups])
    torch.save((results, prefilled), f"{out}/{ranks.rank}.pt")
    torch.distributed.destroy_process_group()              # else gloo's threads may abort the exit


def test_two_ranks_share_the_sampling_and_both_get_the_whole_groups(tiny, prompts, tmp_path):
    """Equal to what one rank samples alone, in real processes over gloo.

    Each rank prefilled all prompts, for its part of each group. Now a prompt is prefilled once, but
    where there are fewer prompts than ranks."""
    model, tokenizer = tiny
    processes = two_ranks([str(tmp_path)], os.path.abspath(__file__), {"CUDA_VISIBLE_DEVICES": ""})
    for result in map(ended, processes):
        assert result.code == 0, result.err
    alone = [rollout.rollout(model, tokenizer, prompts[:N], keys(N, G), ALONE, **HOW)
             for N, G in CASES]
    prefilled = torch.zeros(len(CASES))
    for rank in range(2):
        saved, of_rank = torch.load(tmp_path / f"{rank}.pt")
        prefilled += torch.tensor(of_rank)
        for as_dicts, expected in zip(saved, alone, strict=True):
            groups = [[rollout.Completion(**x) for x in group] for group in as_dicts]
            assert [len(group) for group in groups] == [len(group) for group in expected]
            same(flat(groups), flat(expected))
    lengths = [len(prompt.ids) for prompt in prompts]
    for tokens in prefilled[:2]:
        assert sum(lengths) <= tokens <= 1.1 * sum(lengths)
    assert prefilled[2:].tolist() == [2 * lengths[0], lengths[0], 0]


# --------------------------------------------------------------------------------------------------
# the command line

@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    vlm.save(*tiny, path)
    return str(path)


def command(*arguments):
    """rollout.py in a process of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "rollout.py", *arguments], cwd=ROOT, env=env,
                          capture_output=True, text=True)


def in_here(monkeypatch, *arguments):
    """rollout.py run as a script in this process, which saves the imports; SystemExit is how it
    reports."""
    monkeypatch.setattr(sys, "argv", ["rollout.py", *arguments])
    runpy.run_path(str(ROOT / "rollout.py"), run_name="__main__")


def test_asking_a_checkpoint_prints_its_greedy_answer(tiny, checkpoint):
    """A saved checkpoint answers toy:3 as the model in memory does; the forced piece is
    announced."""
    model, tokenizer = tiny
    question = "How many circles?"
    vision, *where = vlm.encode_video(model, lambda: data.open_video("toy:3", 8), ALONE)
    prompt = vlm.make_prompt(model, tokenizer, question, vision, *where)
    [[x]] = rollout.sample(model, tokenizer, [prompt], keys(1, 1), 12, 5, greedy=True)
    done = command(f"--model={checkpoint}", "--video=toy:3", "--frames=8",
                   f"--question={question}", "--think_budget=12", "--answer_budget=5")
    assert done.returncode == 0, done.stderr
    assert f"{len(prompt.vision)} vision tokens" in done.stdout and question in done.stdout
    assert done.stdout.rstrip().endswith(
        f"{len(x.tokens)} tokens; thinking budget ran out: answer forced; answer budget ran out")
    text, output = (t.encode().decode("ascii", "ignore") for t in (x.text, done.stdout))
    assert text in output


def test_a_failing_command_says_why_in_one_line(checkpoint, tmp_path):
    """In a process of its own: exit status 1, the cause on standard error, no traceback."""
    done = ended(launched(
        f"--model={checkpoint}", f"--video={tmp_path / 'nope.mp4'}", "--question=How many?",
        script=str(ROOT / "rollout.py"), world=0))
    assert done.code == 1 and "nope.mp4" in done.err and "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1].startswith("rollout.py: ")


@pytest.mark.parametrize("wrong, named", [
    ({"model": "{tmp}/nope"}, "nope is no checkpoint"),
    ({"model": "{tmp}"}, "no config.json"),
    ({"video": "{tmp}/nope.mp4"}, "nope.mp4"),
    ({"video": "{tmp}"}, "{tmp}"),
    ({"video": "toy:x"}, "toy:x"),
    ({"question": "", "video": "{tmp}/a.mp4"}, "--question"),
    ({"frames": "0"}, "frames"),
    ({"think_budget": "-1"}, "think_budget"),
    ({"dtype": "float16"}, 'dtype is "float32" or "bfloat16", not'),
    ({"frame": "8"}, "did you mean 'frames'?"),
    ({"model": "{short}"}, "do not fit")],
    ids=["no model", "a folder that is no model", "no video", "an empty folder for a video",
         "a toy without a seed", "no question", "no frames", "a negative budget", "another dtype",
         "an unknown option", "a prompt too long"])
def test_wrong_arguments_are_named(checkpoint, tmp_path, monkeypatch, wrong, named):
    """Each ends in SystemExit with one sentence, which Python prints without a traceback, exit
    status 1."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short = shutil.copytree(checkpoint, tmp_path.parent / f"{tmp_path.name}-short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (short / "config.json").write_text(json.dumps(config))
    given = {"model": checkpoint, "video": "toy:3", "question": "How many?", "think_budget": "4",
             "answer_budget": "2", **wrong}
    arguments = [f"--{k}={v.format(tmp=tmp_path, short=short)}" for k, v in given.items()]
    with pytest.raises(SystemExit) as stopped:
        in_here(monkeypatch, *arguments)
    message = str(stopped.value.code)
    assert message.startswith("rollout.py: ") and "Traceback" not in message
    assert named.format(tmp=tmp_path) in message


def test_a_default_checkpoint_that_is_not_there_yet_says_to_train(tmp_path, monkeypatch):
    """The README's first line to ask a checkpoint, before train.py has made it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        in_here(monkeypatch, "--model=out/model", "--video=toy:3")
    message = str(stopped.value.code)
    assert message.startswith("rollout.py: out/model") and "run train.py first" in message


def test_the_seed_of_the_command_decides(checkpoint, monkeypatch, capsys):
    """--sample=SEED: the same twice, another with another seed, another than the greedy one. toy:
    brings its question."""
    printed = []
    for seed in ("--sample=1", "--sample=1", "--sample=2", "--sample=-1"):
        in_here(monkeypatch, f"--model={checkpoint}", "--video=toy:3", "--frames=4",
                "--think_budget=9", "--answer_budget=3", seed)
        printed.append(capsys.readouterr().out)
    assert toy.make_sample(3).question in printed[0]
    assert printed[0] == printed[1] and len(set(printed)) == 3


@pytest.mark.parametrize("greedy", [False, True])
def test_a_model_that_gives_no_numbers_is_named(prompts, greedy):
    """Damaged weights wrote "!!!!" greedily, and a sampled token had an index beyond the
    vocabulary."""
    model, tokenizer = vlm.load("tiny")
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the model's output is not a number: its weights"):
        rollout.sample(model, tokenizer, prompts[:1], keys(1, 2), 4, 3, greedy=greedy)


def test_the_right_answer_is_that_of_the_film_that_is_shown(checkpoint, monkeypatch, capsys):
    """toy:7:1, the first event of seven, was said to have the answer of all seven."""
    for video, is_said in (("toy:7", True), ("toy:007", True), ("toy:7:1", False)):
        in_here(monkeypatch, f"--model={checkpoint}", f"--video={video}", "--frames=4",
                "--think_budget=1", "--answer_budget=1")
        assert (f"right: {toy.make_sample(7).answer}" in capsys.readouterr().out) == is_said


if __name__ == "__main__":
    worker(sys.argv[1])
