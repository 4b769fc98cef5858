"""
Sampling G completions of one prompt, and making a model answer when its time to think is up.

The plain torch engine. A prompt is run once; its keys and values exist once, whatever G is, and every completion's
decoding step reads them where they are. Sampler and trainer share one distribution: temperature 1, top-p 1, the same
banned ids (`model.banned_ids`), the same positions.

    python rollout.py --model=out/model --video=clip.mp4 --question="How many birds are there?"
"""
import argparse
import hashlib
import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import encode
import model as vlm

FORCED = "</think><answer>"    # what is written for a model whose thinking budget ran out


@dataclass
class Completion:
    """One answer to one prompt, L tokens, the end token included."""
    tokens: torch.Tensor       # [L] long
    sampled: torch.Tensor      # [L] bool, False where forced: such a token carries no loss
    logprobs: torch.Tensor     # [L] float32, under the sampler; 0 where forced
    text: str
    forced: bool               # the thinking budget ran out
    truncated: bool            # the answer budget ran out too


class SharedPrefix:
    """Keys and values of N prefixes, once each, and of their N*G completions beside them. A layout for attention.

    The first forward is the prefill, [N,P] padded on the right; every later one is one token of all N*G rows.
    """

    def __init__(self, lengths, padded, group, room, kv_heads, ranks):
        """lengths: long [N]; padded: P; group: G; room: the most tokens a completion can have; ranks: these share the prefill,
        its kv_heads heads of keys and values dealt out by `encode.Ulysses`; all have all of them afterwards."""
        self.N, self.G, self.room, self.kv_heads, self.ranks, self.step = len(lengths), group, room, kv_heads, ranks, -1
        hidden = torch.arange(padded, device=lengths.device) >= lengths[:, None]                   # [N, P]
        self.hidden = torch.zeros(hidden.shape, device=lengths.device).masked_fill_(hidden, -math.inf)[:, None, None]
        self.prefix, self.own = {}, {}

    def __call__(self, layer, q, k, v, scale):
        if self.step < 0:
            self.prefix[layer] = [encode.all_heads(x, self.kv_heads, self.ranks) for x in (k, v)]  # [N, kv, P, d] each
            room = (self.N * self.G, self.kv_heads, self.room, k.shape[3])
            self.own[layer] = k.new_empty(room), v.new_empty(room)             # written in place, never grown
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        N, G, (rows, heads, _, d), kv, t = self.N, self.G, q.shape, self.kv_heads, self.step + 1
        R = heads // kv                                                        # query heads that share a kv head
        kp, vp = self.prefix[layer]
        ko, vo = self.own[layer]
        ko[:, :, self.step], vo[:, :, self.step] = k[:, :, 0], v[:, :, 0]
        ko, vo = ko[:, :, :t], vo[:, :, :t]                                    # [N*G, kv, t, d]

        def by_prompt(x):                                                      # [N*G, kv, R, n] -> [N, kv, G*R, n]
            return x.view(N, G, kv, R, -1).transpose(1, 2).reshape(N, kv, G * R, -1)

        q = q.view(rows, kv, R, d)
        on_prefix = (by_prompt(q) @ kp.mT).float() * scale + self.hidden       # [N, kv, G*R, P]
        on_own = by_prompt(q @ ko.mT).float() * scale                          # [N, kv, G*R, t]
        weights = torch.cat([on_prefix, on_own], dim=-1).softmax(-1).to(q.dtype)
        P = kp.shape[2]
        own = weights[..., P:].view(N, kv, G, R, t).transpose(1, 2).reshape(rows, kv, R, t)
        return (by_prompt(own @ vo) + weights[..., :P] @ vp).view(N, kv, G, R, d).transpose(1, 2).reshape(rows, heads, 1, d)


def stream(*key):
    """The random numbers that belong to a key: the same on any rank, in any batch, after any restart."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32))


@torch.no_grad()
def sample(model, tokenizer, prompts, keys, think_budget, answer_budget, greedy=False, watch=None, banned=None, forced=FORCED,
           ranks=encode.Ranks()):
    """Completions of N prompts. keys: N lists of G keys for `stream`, one a completion. -> N lists of G `Completion`s

    Thinking ends by itself with </think>, or after think_budget tokens, when </think><answer> is written for the model;
    from there it may sample answer_budget tokens. The forced text is tokenized by itself and marked as not sampled.
    watch(text), if given, is called with each new piece of the first completion; banned: bool [vocabulary], None for
    `model.banned_ids`; forced: what is written when time is up; ranks: their sp ranks share the prefill of these prompts.
    """
    N, G, device = len(prompts), len(keys[0]), prompts[0].ids.device
    banned = vlm.banned_ids(model, tokenizer) if banned is None else banned
    stops = set(vlm.stop_ids(model, tokenizer))
    forced_ids = tokenizer(forced, add_special_tokens=False).input_ids
    room = think_budget + len(forced_ids) + answer_budget

    @lru_cache(maxsize=None)
    def piece(token):
        return tokenizer.decode([token])

    uniform = None if greedy else torch.tensor(np.stack([stream(*key).random(room) for row in keys for key in row]), device=device)

    ids, positions, lengths = vlm.pad_prefixes(prompts, ranks)                 # [N, P], [3, N, P], [N]
    P = ids.shape[1]
    layout = SharedPrefix(lengths, P, G, room, model.config.text_config.num_key_value_heads, ranks)
    hidden, place = vlm.forward(model, layout, ids, positions, [p.vision for p in prompts], P, ranks)          # [N, P/sp, D], [P]
    last = place[lengths - 1]                                                  # [N], -1 where it is on another rank
    hidden = hidden[torch.arange(N, device=device), last].masked_fill(last[:, None] < 0, 0.0)
    if ranks.sp > 1:
        hidden = encode.sum_forward(hidden, ranks)
    hidden = hidden.repeat_interleave(G, 0)                                    # [N*G, D]
    first = torch.stack([p.positions.max() + 1 for p in prompts]).repeat_interleave(G)             # [N*G]

    @dataclass
    class Row:
        left: int = think_budget       # tokens it may still sample in the part it is in
        thinking: bool = True
        queue: tuple = ()              # forced tokens still to be written
        length: int = 0
        forced: bool = False
        truncated: bool = False
        done: bool = False
        tail: str = ""                 # the last few characters, to find </think> however it is cut into tokens

    rows = [Row() for _ in range(N * G)]
    tokens, sampled, chosen, shown = [], [], [], 0
    for step in range(room):
        logp = vlm.token_distribution(model, hidden, banned)                   # [N*G, vocabulary]
        if greedy:
            token = logp.argmax(1)
        else:                                                                  # inverse of the distribution function
            cdf = logp.double().exp().cumsum(1)
            token = torch.searchsorted(cdf, uniform[:, step, None] * cdf[:, -1:], right=True)[:, 0]
        picked, own = token.tolist(), []
        for r, row in enumerate(rows):
            if row.thinking and row.left == 0 and not row.done:                # time is up
                row.thinking, row.forced, row.queue, row.left = False, True, tuple(forced_ids), answer_budget
            own.append(not row.queue and not row.done)
            if row.done:
                continue
            row.length += 1
            if row.queue:
                picked[r], row.queue = row.queue[0], row.queue[1:]
            else:
                row.left -= 1
                row.done = picked[r] in stops
                if row.thinking:
                    row.tail = row.tail[-40:] + piece(picked[r])
                    if "</think>" in row.tail:
                        row.thinking, row.left = False, answer_budget
            if not (row.thinking or row.queue or row.left or row.done):
                row.done = row.truncated = True
        tokens.append(picked)
        sampled.append(own)
        token = torch.tensor(picked, device=device)
        chosen.append(logp.gather(1, token[:, None])[:, 0])
        if watch and rows[0].length == step + 1:
            text = tokenizer.decode([row[0] for row in tokens if row[0] not in stops])
            if len(text) > shown and (text[-1] != "\ufffd" or rows[0].done):  # a letter of several tokens: when it is whole
                watch(text[shown:])
                shown = len(text)
        if all(row.done for row in rows):
            break
        layout.step = step
        hidden = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token)[:, None], position_ids=(first + step).expand(3, -1)[..., None],
            use_cache=False, layout=layout).last_hidden_state[:, 0]

    tokens, sampled, chosen = torch.tensor(tokens).T, torch.tensor(sampled).T, torch.stack(chosen, 1).cpu()    # [N*G, L]
    completions = []
    for row, ids, own, logp in zip(rows, tokens, sampled, chosen):
        ids, own, logp = (x[:row.length].clone() for x in (ids, own, logp))
        text = tokenizer.decode([i for i in ids.tolist() if i not in stops])       # tags may be special tokens: kept
        completions.append(Completion(ids, own, logp.masked_fill(~own, 0.0), text, row.forced, row.truncated))
    return [completions[n * G:(n + 1) * G] for n in range(N)]


def rollout(model, tokenizer, prompts, keys, ranks, max_tokens=32768, stage2=False, **how):
    """`sample`, shared out: each sp rank samples its part of every group, and all ranks end with the whole groups.

    prompts: N; keys: N lists of G; max_tokens: the most prefix tokens, padding included, that are decoded at once;
    stage2: the prefill is shared out too (every rank must have completions to sample), else each does it for itself; how: `sample`'s think_budget, answer_budget, greedy. -> N lists of G `Completion`s
    """
    lo, hi = encode.shard(len(keys[0]), ranks.sp_rank, ranks.sp) if keys else (0, 0)
    mine, at = [], 0
    while at < len(prompts) and hi > lo:
        n, longest = 0, 0
        while at + n < len(prompts):
            longest = max(longest, len(prompts[at + n].ids))
            if n and (n + 1) * longest > max_tokens:
                break
            n += 1
        mine += sample(model, tokenizer, prompts[at:at + n], [row[lo:hi] for row in keys[at:at + n]],
                       ranks=ranks if stage2 else encode.Ranks(), **how)
        at += n
    if ranks.sp == 1:
        return mine
    every = [None] * ranks.sp
    dist.all_gather_object(every, mine or [[] for _ in prompts], group=ranks.group)
    return [sum(parts, []) for parts in zip(*every)]


def main():
    """Ask a checkpoint one question about one video, and see it think."""
    args = argparse.ArgumentParser(description=main.__doc__)
    args.add_argument("--model", required=True, help="a checkpoint directory or hub name")
    args.add_argument("--video", required=True, help="a file, a folder of pictures, a picture, or toy:SEED")
    args.add_argument("--question", default="", help="optional for toy:SEED, which brings its own")
    args.add_argument("--frames", type=int, default=32)
    args.add_argument("--max_pixels", type=int, default=0, help="of one frame; 0: the checkpoint's own bound")
    args.add_argument("--think_budget", type=int, default=512, help="tokens, then an answer is forced")
    args.add_argument("--answer_budget", type=int, default=64)
    args.add_argument("--sample", type=int, default=-1, metavar="SEED", help="sample with this seed instead of greedily")
    args = args.parse_args()
    question = args.question
    if not question and args.video.startswith("toy:"):
        question = data.toy_sample(int(args.video.split(":")[1])).question
    if not question:
        raise ValueError("--question is missing")
    for name, least in (("frames", 1), ("max_pixels", 0), ("think_budget", 0), ("answer_budget", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
    ranks = encode.start(1)
    model, tokenizer = vlm.load(args.model, ranks.device, max_pixels=args.max_pixels)
    vision, grid, seconds = vlm.encode_video(model, lambda: data.open_video(args.video, args.frames), ranks)
    prompt = vlm.make_prompt(model, tokenizer, question, vision, grid, seconds)
    vlm.check_length(model, prompt, args.think_budget + args.answer_budget)
    print(f"{args.video}: {grid[0]} x {grid[1]} x {grid[2]} patches, {len(vision)} vision tokens\n{question}\n")
    [[completion]] = sample(model, tokenizer, [prompt], [[("ask", args.sample)]], args.think_budget, args.answer_budget,
                            greedy=args.sample < 0, watch=lambda piece: print(piece, end="", flush=True))
    notes = [note for note, is_so in (("thinking budget ran out: answer forced", completion.forced),
                                      ("answer budget ran out", completion.truncated)) if is_so]
    print(f"\n\n{len(completion.tokens)} tokens" + "".join(f"; {note}" for note in notes))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"rollout.py: {e}")
