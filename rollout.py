"""
Rollout: sample G completions of one prompt, and force an answer when the time to think is up.

This is the plain torch engine. It runs a prompt once and keeps its keys and values once, whatever
G is: in every decoding step all completions read them where they are. Sampler and trainer share
one distribution: temperature 1, top-p 1, the same banned ids and the same positions.

    python rollout.py --model=out/model --video=clip.mp4 --question="How many birds are there?"
"""
import math
import sys
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F

import data
import encode
import model as vlm
import toy
from flow import Completion
from plumbing.batches import cut, own_shares
from plumbing.command_line import check_choice, check_range, parse
from plumbing.families import decode, tokenize
from plumbing.progress import Screen
from plumbing.ranks import gather_sp, run_command, start
from plumbing.sharding import gathered
from plumbing.streams import uniform
from plumbing.vllm_engine import vllm_rollout

FORCED_TEXT = "</think><answer>"   # written when the thinking budget has run out
WAIT_TEXT = "\nWait,"              # written in place of a </think> that comes too early
MOST_SPARE = 1.1                   # rows decoded / rows unfinished; above it, finished ones leave


def limits(think_budget, answer_budget, force=True, think_least=0):
    """Arguments of `sample`: the budgets, and what is written where thinking ends: nothing if force
    is False; with a think_budget of 0 the opening <think> too, since nothing was sampled yet."""
    text = FORCED_TEXT if think_budget else "<think>" + FORCED_TEXT
    return {"think_budget": think_budget, "answer_budget": answer_budget,
            "forced": text if force else None, "think_least": think_least}


def budgets(c):
    """The `limits` of a run's configuration, for `rollout`."""
    return limits(c.think_budget, c.answer_budget, c.force_answer)


def room(tokenizer, think_budget, answer_budget, forced=FORCED_TEXT, **_):
    """The most tokens that a completion can have. forced: text, None if none is written"""
    return think_budget + len(tokenize(tokenizer, forced or "")) + answer_budget


@dataclass
class Rules:
    """When a thought and an answer end, and what is written for the model."""
    think_budget: int     # tokens
    answer_budget: int    # tokens, from the end of the thought
    think_least: int      # tokens; a thought that would end earlier goes on after WAIT_TEXT
    stop_ids: set         # those that end a completion
    wait_ids: list        # WAIT_TEXT, tokenized
    forced_ids: list      # the text that begins an answer when time is up, tokenized
    forces_answer: bool = True     # False: no answer is begun, the completion ends there


@dataclass
class Writing:
    """A completion while it is being written, one token a step. Its states:

    thinking       until </think>, a stop id, or the end of the thinking budget
    forced text    FORCED_TEXT is written, token by token, if that budget has run out
    answering      until a stop id or the end of the answer budget
    done
    """
    rules: Rules
    budget: int              # tokens left, of the thought or of the answer
    thinking: bool = True
    pending_ids: list = ()   # of forced text that is not written yet; of WAIT_TEXT while thinking
    tail: str = ""           # the thought's last characters: its </think> may be many tokens
    forced: bool = False     # the answer was begun for the model
    truncated: bool = False  # a budget ended it
    done: bool = False
    tokens: list = field(default_factory=list)
    sampled: list = field(default_factory=list)            # one bool a token

    def write(self, token, text):
        """One decoding step: the model picked token, which reads text. -> the id that is written"""
        if self.done:
            return token                                   # nothing reads it
        if self.thinking and self.budget == 0:
            self.start_answer()
            self.forced = True
            self.pending_ids = list(self.rules.forced_ids)
        if self.thinking:
            token = self.think(token, text)
        elif self.pending_ids:
            token = self.append_forced()
        else:
            self.append_sampled(token)
        if self.budget == 0 and not self.done:
            unanswered = self.thinking and not self.rules.forces_answer
            cut_off = not self.thinking and not self.pending_ids
            self.done = self.truncated = unanswered or cut_off
        return token

    def think(self, token, text):
        """-> the id that is written: token, or the next one of WAIT_TEXT"""
        if self.ends_too_early(token, text) and not self.pending_ids:
            self.tail = ""
            self.pending_ids = list(self.rules.wait_ids)
        if self.pending_ids:
            self.budget -= 1                               # WAIT_TEXT takes thinking time
            return self.append_forced()
        self.append_sampled(token)
        self.tail = self.tail[-40:] + text
        if "</think>" in self.tail:
            self.start_answer()
        return token

    def ends_too_early(self, token, text):
        """Whether a token ends, or begins to end, a thought of fewer than think_least tokens."""
        if len(self.tokens) >= self.rules.think_least:
            return False
        # "</" begins the tag: after the whole of it WAIT_TEXT would come too late. Its "<" may have
        # come with the token before.
        return token in self.rules.stop_ids or "</" in self.tail[-1:] + text

    def start_answer(self):
        self.thinking = False
        self.budget = self.rules.answer_budget

    def append_sampled(self, token):
        self.budget -= 1
        self.tokens.append(token)
        self.sampled.append(True)
        self.done = token in self.rules.stop_ids

    def append_forced(self):
        self.tokens.append(self.pending_ids.pop(0))
        self.sampled.append(False)                         # it carries no loss
        return self.tokens[-1]


class SharedPrefix:
    """Attention with the keys and values of N prefixes once each, and those of their completions
    beside them. The first forward is the prefill, [N,P] padded on the right; every later one is one
    token of each of the M completions that are still being written: N*G, until some have left."""

    def __init__(self, lengths, padded, G, room, kv_heads, ranks):
        """lengths: long [N]; padded: P; room: the most tokens a completion can have; ranks:
        `encode.Ulysses` deals out the kv_heads heads of the prefill over them."""
        self.room, self.kv_heads = room, kv_heads
        self.ranks = ranks
        self.step = -1                                     # of decoding; -1: the prefill
        padding = torch.arange(padded, device=lengths.device) >= lengths[:, None]    # [N, P]
        self.mask = torch.where(padding, -torch.inf, 0.0)[:, None, None]             # [N, 1, 1, P]
        self.prefix, self.completions = {}, {}             # {layer: (keys, values)}
        self.set_rows(torch.arange(len(lengths), device=lengths.device).repeat_interleave(G))

    def set_rows(self, prompts):
        """prompts: long [M], ascending: which of the N prefixes each row follows. Attention over
        the prefixes runs on N x m cells, m: the most rows of a prefix; some stay empty."""
        rows_of_prompt = torch.bincount(prompts)                               # [N]
        first_row = rows_of_prompt.cumsum(0) - rows_of_prompt
        self.prompts = prompts
        self.N, self.m = len(rows_of_prompt), int(rows_of_prompt.max())
        number = torch.arange(len(prompts), device=prompts.device) - first_row[prompts]
        self.cells = prompts * self.m + number                                 # [M]

    def keep(self, rows):
        """Rows that have ended leave, and prefixes that no row follows. rows: long [M'], those that
        stay, ascending"""
        read, prompts = self.prompts[rows].unique(return_inverse=True)
        self.set_rows(prompts)
        for layer, pair in self.completions.items():       # one at a time: little memory
            self.completions[layer] = [x[rows] for x in pair]
        if len(read) < len(self.mask):
            self.mask = self.mask[read]
            for layer, pair in self.prefix.items():
                self.prefix[layer] = [x[read] for x in pair]

    def __call__(self, layer, q, k, v, scale):
        """As `model.call_attention` calls it. q, k, v and result: [rows,heads,S,d]"""
        if self.step < 0:
            return self.prefill(layer, q, k, v, scale)
        return self.decode(layer, q, k, v, scale)

    def prefill(self, layer, q, k, v, scale):
        self.prefix[layer] = [encode.all_heads(x, self.kv_heads, self.ranks) for x in (k, v)]
        shape = (len(self.cells), self.kv_heads, self.room, k.shape[3])
        self.completions[layer] = k.new_empty(shape), v.new_empty(shape)       # never grown
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def decode(self, layer, q, k, v, scale):
        prefix_k, prefix_v = self.prefix[layer]                                # [N, kv, P, d]
        for kept, new in zip(self.completions[layer], (k, v)):
            kept[:, :, self.step] = new[:, :, 0]
        past_k, past_v = (x[:, :, :self.step + 1] for x in self.completions[layer])  # [M, kv, t, d]
        q = q[:, :, 0].unflatten(1, (self.kv_heads, -1))                       # [M, kv, R, d]
        prefix_scores = (self.by_prompt(q) @ prefix_k.mT).float() * scale      # [N, kv, m*R, P]
        past_scores = self.by_prompt(q @ past_k.mT).float() * scale            # [N, kv, m*R, t]
        scores = torch.cat([prefix_scores + self.mask, past_scores], dim=-1)   # [N, kv, m*R, P+t]
        weights, P = scores.softmax(-1).to(q.dtype), prefix_k.shape[2]
        past = self.by_row(weights[..., P:]) @ past_v                          # [M, kv, R, d]
        out = self.by_row(self.by_prompt(past) + weights[..., :P] @ prefix_v)
        return out.flatten(1, 2)[:, :, None]                                   # [M, heads, 1, d]

    def by_prompt(self, x):                                # [M, kv, R, n] -> [N, kv, m*R, n]
        cells = x.new_zeros(self.N * self.m, *x.shape[1:])
        cells[self.cells] = x
        return cells.unflatten(0, (self.N, self.m)).transpose(1, 2).flatten(2, 3)

    def by_row(self, x):                                   # [N, kv, m*R, n] -> [M, kv, R, n]
        return x.unflatten(2, (self.m, -1)).transpose(1, 2).flatten(0, 1)[self.cells]


def prefill(model, prompts, G, room, ranks):
    """Run N prompts once. -> (`SharedPrefix`, hidden [N*G,D], first [N*G]): hidden is where the
    first tokens are predicted, first are their positions. room: the most tokens of a completion."""
    ids, positions, lengths, first = vlm.pad_prefixes(prompts, model.device, ranks)
    N, P = ids.shape
    kv_heads = model.config.text_config.num_key_value_heads
    attention = SharedPrefix(lengths, P, G, room, kv_heads, ranks)
    visions = [prompt.vision for prompt in prompts]
    hidden, place = vlm.forward(model, attention, ids, positions, visions, P, ranks)  # [N,P/sp,D]
    last = place[lengths - 1]                              # [N], -1 where it is on another rank
    hidden = hidden[torch.arange(N, device=model.device), last].masked_fill(last[:, None] < 0, 0.0)
    if ranks.sp > 1:
        hidden = encode.sum_forward(hidden, ranks)
    if not hidden.isfinite().all():
        raise ValueError("the model's output is not a number: its weights are damaged, or training "
                         "has diverged (a lower lr or sft_lr helps)")
    return attention, hidden.repeat_interleave(G, 0), first.repeat_interleave(G)


def pick_tokens(logp, numbers):
    """A token for each row of logp [N*G,vocabulary]: by the inverse of the distribution function,
    at numbers [N*G] in [0, 1); the most likely one if numbers is None. -> long [N*G]"""
    if numbers is None:
        return logp.argmax(1)
    cdf = logp.double().exp().cumsum(1)
    return torch.searchsorted(cdf, numbers[:, None] * cdf[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample(model, tokenizer, prompts, keys, think_budget, answer_budget, greedy=False, watch=None,
           banned=None, forced=FORCED_TEXT, think_least=0, ranks=vlm.ALONE):
    """Completions of N prompts. -> N lists of G `Completion`s

    A thought ends with </think>, or after think_budget tokens, when the text `forced` is written
    (None: the completion ends there, truncated). Then answer_budget tokens may be sampled. Where a
    thought would end before think_least tokens, WAIT_TEXT is written (budget forcing of s1, arXiv
    2501.19393). What is written is tokenized by itself and marked as not sampled.
    keys: N lists of G, for `plumbing.streams`; watch(writing): called at each step with the first
    completion's `Writing`; banned: bool [vocabulary]; ranks: their sp ranks share this prefill.
    """
    G, device = len(keys[0]), model.device
    steps = room(tokenizer, think_budget, answer_budget, forced)
    banned = vlm.banned_ids(model, tokenizer) if banned is None else banned
    stops = set(vlm.stop_ids(model, tokenizer))
    rules = Rules(think_budget, answer_budget, think_least, stops, tokenize(tokenizer, WAIT_TEXT),
                  tokenize(tokenizer, forced or ""), forces_answer=forced is not None)
    writings = [Writing(rules, think_budget) for group in keys for _ in group]
    text_of = cache(lambda token: tokenizer.decode([token]))
    if not greedy:
        numbers = torch.tensor(uniform(sum(keys, []), steps), device=device)   # [N*G, steps]
    logprobs = torch.zeros(len(writings), steps, device=device)
    attention, hidden, first = prefill(model, prompts, G, steps, ranks)
    active = writings                                      # M of them, those that are decoded
    rows = torch.arange(len(writings), device=device)      # [M], their places among all
    for step in range(steps):
        logp = vlm.token_distribution(model, hidden, banned)                   # [M, vocabulary]
        picked = pick_tokens(logp, None if greedy else numbers[rows, step])
        written = [w.write(token, text_of(token)) for w, token in zip(active, picked.tolist())]
        tokens = torch.tensor(written, device=device)                          # [M]
        logprobs[rows, step] = logp.gather(1, tokens[:, None])[:, 0]
        if watch:
            watch(writings[0])
        unfinished = [i for i, w in enumerate(active) if not w.done]
        if not unfinished:
            break
        if len(active) > MOST_SPARE * len(unfinished):
            active = [active[i] for i in unfinished]
            keep = torch.tensor(unfinished, device=device)
            tokens, rows, first = tokens[keep], rows[keep], first[keep]
            attention.keep(keep)
        attention.step = step
        hidden = model.model.language_model(               # one token of each completion
            inputs_embeds=model.get_input_embeddings()(tokens)[:, None],
            position_ids=(first + step).expand(3, -1)[..., None], use_cache=False,
            attention=attention).last_hidden_state[:, 0]                       # [M, D]

    completions = []
    for w, logp in zip(writings, logprobs.cpu()):          # [steps]
        tokens, sampled = torch.tensor(w.tokens), torch.tensor(w.sampled)
        logp = logp[:len(tokens)].masked_fill(~sampled, 0.0)
        text = decode(tokenizer, w.tokens, stops)
        completions.append(Completion(tokens, sampled, logp, text, w.forced, w.truncated))
    return [completions[at:at + G] for at in range(0, len(completions), G)]


def all_at_once(prompts):
    yield range(len(prompts)), prompts


def rollout(model, tokenizer, prompts, keys, ranks, max_tokens=16384, stage2=False, engine=None,
            fetch=all_at_once, **how):
    """`sample`, shared out: each sp rank samples its share, and all ranks end with the whole
    groups. -> N lists of G `Completion`s

    max_tokens: the most prefix tokens, padding included, decoded at once; stage2: the prefill is
    shared out too (each rank must have completions to sample); engine: a
    `plumbing.vllm_engine.VLLM`, None: torch; fetch(prompts) yields (places, prompts with their
    vision tokens), as `plumbing.fetching.fetch_in_rounds`; how: further arguments of `sample`.
    """
    how = {"forced": FORCED_TEXT, **how}                   # vLLM's engine has no default
    if engine is not None and engine.shared:
        ranks = vlm.ALONE                                  # one engine samples for all sp ranks
    prefill_ranks = ranks if stage2 and engine is None else vlm.ALONE
    groups = [[] for _ in prompts]
    for places, fetched in fetch(prompts):
        shares = own_shares(fetched, len(keys[0]) if keys else 0, ranks, prefill_ranks.sp > 1)
        own_prompts = [fetched[i] for i, _, _ in shares]
        own_keys = [keys[places[i]][lo:hi] for i, lo, hi in shares]
        if engine is None:
            completions = torch_rollout(
                model, tokenizer, own_prompts, own_keys, max_tokens, prefill_ranks, how)
        else:
            completions = vllm_rollout(engine, model, own_prompts, own_keys, how)
        own_parts = {places[i]: part for (i, _, _), part in zip(shares, completions)}
        for parts in gather_sp(own_parts, ranks):
            for place, part in parts.items():
                groups[place] += part
        del fetched, own_prompts                           # before the next round's tokens come
    return groups


def torch_rollout(model, tokenizer, prompts, keys, max_tokens, ranks, how):
    """`sample` in batches of at most max_tokens prefix tokens. ranks: they share the prefill"""
    completions = []
    with gathered(model):                                  # on every rank, also with no prompts
        for batch in cut(range(len(prompts)), lambda i: [len(prompts[i].ids)], max_tokens):
            lo, hi = batch[0], batch[-1] + 1
            completions += sample(model, tokenizer, prompts[lo:hi], keys[lo:hi], ranks=ranks, **how)
    return completions


@dataclass
class Options:
    model: str               # a checkpoint directory or hub name
    video: str               # a file, a picture, a folder of them, toy:SEED, toy:reading-SEED, ...
    question: str = ""       # optional for toy:SEED, which has its own
    frames: int = 32         # frames per video, evenly spaced in time; fewer if it has fewer
    max_pixels: int = 0      # per frame; 0: the checkpoint's own bound
    think_budget: int = 512  # tokens, then an answer is forced
    think_least: int = 0     # tokens; a shorter thought is extended with "Wait,"
    answer_budget: int = 64  # tokens
    dtype: str = ""          # float32 or bfloat16; default: float32 on a CPU, bfloat16 on a GPU
    sample: int = -1         # sample with this seed; -1: decode greedily


def main():
    """Ask a checkpoint one question about one video, and see it think."""
    c = parse(Options, main.__doc__, sys.argv[1:])
    built_in = events = None
    if not c.question and c.video.startswith("toy:"):
        name, events = toy.parse_path(c.video)
        built_in = toy.make_sample(name)
        c.question = built_in.question
    if not c.question:
        raise ValueError("--question is missing")
    check_range(c, 1, math.inf, "frames", "answer_budget")
    check_range(c, 0, math.inf, "max_pixels", "think_budget", "think_least")
    ranks = start(1)
    c.dtype = c.dtype or ("float32" if ranks.device == "cpu" else "bfloat16")
    check_choice(c, "dtype", ("float32", "bfloat16"))
    model, tokenizer = vlm.load(c.model, ranks.device, getattr(torch, c.dtype), c.max_pixels)
    open_video = partial(data.open_video, c.video, c.frames)
    vision, (t, h, w), *about = vlm.encode_video(model, open_video, ranks)
    prompt = vlm.make_prompt(model, tokenizer, c.question, vision, (t, h, w), *about)
    how = limits(c.think_budget, c.answer_budget, think_least=c.think_least)
    vlm.check_length(model, prompt, room(tokenizer, **how))

    print(f"{c.video}: {t} x {h} x {w} patches, {len(vision)} vision tokens\n{c.question}\n")
    screen = Screen(partial(decode, tokenizer, stops=vlm.stop_ids(model, tokenizer)))
    [[completion]] = sample(model, tokenizer, [prompt], [[("ask", c.sample)]],
                            greedy=c.sample < 0, watch=screen.show, **how)
    forced = "; thinking budget ran out: answer forced" if completion.forced else ""
    truncated = "; answer budget ran out" if completion.truncated else ""
    print(f"\n\n{len(completion.tokens)} tokens{forced}{truncated}")
    if built_in and not events:                            # of its first events only: unknown
        print(f"right: {built_in.answer}")


if __name__ == "__main__":
    run_command("rollout.py", main)
