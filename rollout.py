"""
Sampling G completions of one prompt, and making a model answer when its time to think is up.

The plain torch engine. A prompt is run once; its keys and values exist once, whatever G is, and every completion's
decoding step reads them where they are. Sampler and trainer share one distribution: temperature 1, top-p 1, the same
banned ids (`model.banned_ids`), the same positions.

    python rollout.py --model=out/model --video=clip.mp4 --question="How many birds are there?"
"""
import argparse
import gc
import hashlib
import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

import data
import encode
import model as vlm
import toy
from flow import Completion
from plumbing import sharding
from plumbing.ranks import leave

VLLM_VERSION = "0.32.0"
FORCED = "</think><answer>"    # what is written for a model whose thinking budget ran out
WAIT = "\nWait,"               # ... and in the place of a </think> that comes before the least thinking that is asked for


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


def limits(think_budget, answer_budget, force=True, think_least=0):
    """The budgets, and what happens at their ends, as `sample` takes them. With no time to think at all the empty thought is
    written whole; force=False: nothing is written, a completion that thinks too long ends unanswered."""
    forced = ("" if think_budget else "<think>") + FORCED if force else None
    return {"think_budget": think_budget, "answer_budget": answer_budget, "forced": forced, "think_least": think_least}


def room(tokenizer, think_budget, answer_budget, forced=FORCED, **_):
    """The most tokens that a completion can have."""
    return think_budget + len(tokenizer(forced or "", add_special_tokens=False).input_ids) + answer_budget


@torch.no_grad()
def sample(model, tokenizer, prompts, keys, think_budget, answer_budget, greedy=False, watch=None, banned=None, forced=FORCED,
           think_least=0, ranks=encode.Ranks()):
    """Completions of N prompts. keys: N lists of G keys for `stream`, one a completion. -> N lists of G `Completion`s

    Thinking ends by itself with </think>, or after think_budget tokens, when </think><answer> is written for the model;
    from there it may sample answer_budget tokens. The forced text is tokenized by itself and marked as not sampled.
    watch(text), if given, is called with each new piece of the first completion; banned: bool [vocabulary], None for
    `model.banned_ids`; forced: what is written when time is up, None: the completion ends there, truncated; think_least: where
    thinking would end before so many tokens, WAIT is written instead (the budget forcing of s1, arXiv 2501.19393), also not
    sampled; ranks: their sp ranks share the prefill of these prompts.
    """
    N, G, device = len(prompts), len(keys[0]), model.device
    banned = vlm.banned_ids(model, tokenizer) if banned is None else banned
    stops = set(vlm.stop_ids(model, tokenizer))
    forced_ids, wait_ids = (tokenizer(text or "", add_special_tokens=False).input_ids for text in (forced, WAIT))
    most = room(tokenizer, think_budget, answer_budget, forced)

    @lru_cache(maxsize=None)
    def piece(token):
        return tokenizer.decode([token])

    uniform = None if greedy else torch.tensor(np.stack([stream(*key).random(most) for row in keys for key in row]), device=device)

    ids, positions, lengths, first = vlm.pad_prefixes(prompts, device, ranks)  # [N, P], [3, N, P], [N], [N]
    P = ids.shape[1]
    layout = SharedPrefix(lengths, P, G, most, model.config.text_config.num_key_value_heads, ranks)
    hidden, place = vlm.forward(model, layout, ids, positions, [p.vision for p in prompts], P, ranks)          # [N, P/sp, D], [P]
    last = place[lengths - 1]                                                  # [N], -1 where it is on another rank
    hidden = hidden[torch.arange(N, device=device), last].masked_fill(last[:, None] < 0, 0.0)
    if ranks.sp > 1:
        hidden = encode.sum_forward(hidden, ranks)
    hidden = hidden.repeat_interleave(G, 0)                                    # [N*G, D]
    first = first.repeat_interleave(G)                     # [N*G], where completions start

    @dataclass
    class Row:
        left: int = think_budget       # tokens it may still sample in the part it is in
        thinking: bool = True
        queue: tuple = ()              # tokens still to be written for it
        length: int = 0
        forced: bool = False
        truncated: bool = False
        done: bool = False
        tail: str = ""                 # the last few characters, to find </think> however it is cut into tokens

    rows = [Row() for _ in range(N * G)]
    tokens, sampled, chosen, shown = [], [], [], 0
    for step in range(most):
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
            elif row.thinking and row.length < think_least and not row.queue:  # too early to stop: "</" betrays the tag
                if picked[r] in stops or "</" in row.tail[-1:] + piece(picked[r]):
                    row.queue, row.tail = tuple(wait_ids), ""
            own.append(not row.queue and not row.done)
            if row.done:
                continue
            row.length += 1
            if row.queue:
                picked[r], row.queue = row.queue[0], row.queue[1:]
                row.left -= row.thinking
            else:
                row.left -= 1
                row.done = picked[r] in stops
                if row.thinking:
                    row.tail = row.tail[-40:] + piece(picked[r])
                    if "</think>" in row.tail:
                        row.thinking, row.left = False, answer_budget
            over = forced is None if row.thinking else not row.queue
            if over and row.left == 0 and not row.done:
                row.done = row.truncated = True
        tokens.append(picked)
        sampled.append(own)
        token = torch.tensor(picked, device=device)
        chosen.append(logp.gather(1, token[:, None])[:, 0])
        if watch and rows[0].length == step + 1:
            text = vlm.decode(tokenizer, [row[0] for row in tokens], stops)
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
        text = vlm.decode(tokenizer, ids.tolist(), stops)                      # tags may be special tokens: kept
        completions.append(Completion(ids, own, logp.masked_fill(~own, 0.0), text, row.forced, row.truncated))
    return [completions[n * G:(n + 1) * G] for n in range(N)]


def import_vllm():
    """The module, where it is the version that this is written for; else a ValueError that says what to install."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")               # in this process, on this rank's device
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")               # it would bind the trainer's threads with its own
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")                       # GiB, where there is no GPU
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as e:
        raise ValueError(f"rollout = vllm needs vLLM {VLLM_VERSION}: pip install -r requirements-gpu.txt ({e})") from e
    if vllm.__version__.partition("+")[0] != VLLM_VERSION:
        raise ValueError(f"rollout = vllm needs vLLM {VLLM_VERSION}, and {vllm.__version__} is installed: pip install -r requirements-gpu.txt")
    return vllm


class VLLM:
    """The other engine: vLLM in this process, fed with the cached vision tokens; its own vision tower is not even loaded.

    What differs from above: vLLM batches by itself. A completion is one request for its thinking and one for its answer; the
    second finds the first's keys and values in vLLM's prefix cache, as all completions find their prompt's. The weights
    are a copy, and `load` brings them up to date.
    """

    def __init__(self, name, model, tokenizer, ranks, length, memory=0.5, share=False):
        """name: of the checkpoint that model was loaded from; length: the most tokens a prompt and its completion have; memory:
        vLLM's part of the GPU's; share: one engine over the sp ranks (tensor parallelism), else one a rank. Raises ValueError."""
        vllm, length = import_vllm(), min(length, model.config.text_config.max_position_embeddings)        # vLLM starts on no more
        self.params, self.tokenizer, self.shared, self.cuda = vllm.SamplingParams, tokenizer, share and ranks.sp > 1, ranks.device != "cpu"
        self.stops, self.banned, self.version = vlm.stop_ids(model, tokenizer), vlm.banned_ids(model, tokenizer), None
        self.pad, self.kind = vlm.vision_pad(model.config), "image" if model.config.model_type == "glm4v" else "video"
        # On the CPU it cannot cut up the prefill of a prompt that has random numbers of its own, and would share blocks of
        # 128 tokens, more than some prompts have.
        on_cpu = {"enable_chunked_prefill": False, "block_size": 32}
        # GLM-4.1V's attention always has biases; vLLM asks a key that a config need not have, and else drops them in silence.
        biases = {"hf_overrides": {"text_config": {"attention_bias": True}}} if self.kind == "image" else {}
        torch.cuda.empty_cache()                           # see load
        try:
            self.llm = vllm.LLM(
                name, dtype=str(model.dtype).removeprefix("torch."), max_model_len=length, logprobs_mode="processed_logprobs", seed=0,
                max_num_batched_tokens=max(length, 8192),                      # no video may have more vision tokens than this
                enable_mm_embeds=True, limit_mm_per_prompt={"image": 0, "video": 0}, mm_processor_cache_gb=0,  # embeddings alone
                distributed_executor_backend="external_launcher" if ranks.world > 1 else None,         # torchrun's processes
                tensor_parallel_size=ranks.sp if self.shared else 1, gpu_memory_utilization=memory,
                enable_sleep_mode=self.cuda, enforce_eager=not self.cuda, **biases, **({} if self.cuda else on_cpu))
        except (ValueError, NotImplementedError) as e:
            raise ValueError(f"vLLM does not start on {name}: {str(e).strip().splitlines()[0]}") from e
        if self.kind == "image":                           # its model takes embeddings, its reader of requests none: Qwen's does
            from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
            self.llm.renderer.mm_processor.info.data_parser = Qwen2VLMultiModalDataParser(model.pixels.merge)
        self.llm.apply_model(self.watch_weights)

    def watch_weights(self, inner):
        """vLLM only warns of a weight that it was not given; after this it raises."""
        load, names = inner.load_weights, {name for name, _ in inner.named_parameters()}

        def load_all(weights):
            given = load(weights)
            if missing := sorted(names - given):
                raise RuntimeError(f"vLLM was not given {', '.join(missing[:5])} ({len(missing)} in all)")
            return given
        inner.load_weights = load_all

    def load(self, model):
        """The model's weights as they are now; keys and values of older ones are dropped."""
        if self.cuda and self.version is not None:
            torch.cuda.empty_cache()                       # what training freed, torch keeps: vLLM takes from the driver
            self.llm.wake_up()
        version = sum(p._version for p in model.parameters())
        if version != self.version:
            weights = ((name, w) for name, w in sharding.weights(model, tied=True) if ".visual." not in name)      # vLLM misses a tied head
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()      # reload_weights empties the worker's; the scheduler must know
            self.version = version

    def rest(self):
        """Give the GPU's memory to the training that follows."""
        if self.cuda:
            self.llm.sleep()

    def write(self, rows, most, banned, greedy, stop=None):
        """Up to `most` tokens after each row's prompt and what it has written. rows: (prompt, ids, key) each.
        -> (ids, log-probs), lists, each"""
        bias, requests, params = dict.fromkeys(banned.nonzero()[:, 0].tolist(), -100.0), [], []
        for prompt, written, key in rows:
            pads = prompt.ids == self.pad                  # the first of each run alone: vLLM makes the others
            ids, name = prompt.ids[~(pads & pads.roll(1))].tolist(), prompt.key or encode.sha256("", prompt.vision)
            runs = {f"{self.kind}_embeds": prompt.vision, f"{self.kind}_grid_thw": torch.tensor(prompt.grids),
                    "second_per_grid_ts": torch.tensor([prompt.seconds], dtype=torch.float64)}     # not read where pictures are
            requests.append({"prompt_token_ids": ids + written, "multi_modal_data": {self.kind: runs},
                             "multi_modal_uuids": {self.kind: [f"{name} {i}" for i in range(len(prompt.grids))]}})
            params.append(self.params(
                temperature=0.0 if greedy else 1.0, max_tokens=most, logprobs=0, seed=int(stream(*key).integers(1 << 62)), logit_bias=bias,
                stop_token_ids=self.stops, stop=stop, include_stop_str_in_output=True, skip_special_tokens=False, detokenize=bool(stop)))
        said = [output.outputs[0] for output in self.llm.generate(requests, params, use_tqdm=False)]
        return [(list(x.token_ids), [at[i].logprob for i, at in zip(x.token_ids, x.logprobs)]) for x in said]

    @torch.no_grad()
    def sample(self, prompts, keys, think_budget, answer_budget, greedy=False, banned=None, forced=FORCED, think_least=0):
        """As `sample` above, with random numbers of vLLM's own, a generator for each half of each completion."""
        if think_least:
            raise ValueError("think_least is the torch engine's alone")
        banned, G = self.banned if banned is None else banned, len(keys[0])
        forced_ids = self.tokenizer(forced or "", add_special_tokens=False).input_ids
        rows = [(prompt, key) for prompt, row in zip(prompts, keys) for key in row]
        thoughts = [([], []) for _ in rows]
        if think_budget:
            thoughts = self.write([(p, [], (*key, "thinks")) for p, key in rows], think_budget, banned, greedy, ["</think>"])
        ended = [bool(ids) and ids[-1] in self.stops for ids, _ in thoughts]
        late = [not (end or "</think>" in "".join(self.tokenizer.decode([i]) for i in ids)) for end, (ids, _) in zip(ended, thoughts)]
        cut = [time_up and forced is None for time_up in late]
        ended, late = [end or no for end, no in zip(ended, cut)], [time_up and not no for time_up, no in zip(late, cut)]
        heads = [ids + forced_ids * time_up for (ids, _), time_up in zip(thoughts, late)]
        answers = iter(self.write([(p, head, (*key, "answers")) for (p, key), head, end in zip(rows, heads, ended) if not end],
                                  answer_budget, banned, greedy))
        completions = []
        for (own, logp), head, time_up, end, no in zip(thoughts, heads, late, ended, cut):
            answer, more = ([], []) if end else next(answers)
            ids, between = head + answer, len(head) - len(own)                 # between: what was forced
            text = vlm.decode(self.tokenizer, ids, self.stops)
            completions.append(Completion(
                torch.tensor(ids), torch.tensor([True] * len(own) + [False] * between + [True] * len(answer)),
                torch.tensor(logp + [0.0] * between + more), text, time_up,
                no or not end and answer[-1] not in self.stops))
        return [completions[n * G:(n + 1) * G] for n in range(len(prompts))]


def rollout(model, tokenizer, prompts, keys, ranks, max_tokens=32768, stage2=False, engine=None, **how):
    """`sample`, shared out: each sp rank samples its part of every group, and all ranks end with the whole groups.

    prompts: N; keys: N lists of G; max_tokens: the most prefix tokens, padding included, that are decoded at once;
    stage2: the prefill is shared out too (every rank must have completions to sample), else each does it for itself;
    engine: a `VLLM` to sample with; how: the rest of `sample`'s arguments. -> N lists of G `Completion`s
    """
    alone = ranks.sp == 1 or engine is not None and engine.shared              # an engine over all sp ranks says the same on each
    lo, hi = (0, None) if alone else encode.shard(len(keys[0]) if keys else 0, ranks.sp_rank, ranks.sp)
    mine, keys, at = [], [row[lo:hi] for row in keys], 0
    if engine and (any(keys) or isinstance(model, FSDPModule)):                # sharded weights are gathered by all ranks or none
        engine.load(model)
        mine = engine.sample(prompts, keys, **how) if any(keys) else []
        engine.rest()
    with sharding.gathered(model, unless=engine):
        while at < len(prompts) and any(keys) and not engine:
            n, longest = 0, 0
            while at + n < len(prompts):
                longest = max(longest, len(prompts[at + n].ids))
                if n and (n + 1) * longest > max_tokens:
                    break
                n += 1
            mine += sample(model, tokenizer, prompts[at:at + n], keys[at:at + n], ranks=ranks if stage2 else encode.Ranks(), **how)
            at += n
    if alone:
        return mine
    every = [None] * ranks.sp
    dist.all_gather_object(every, mine or [[] for _ in prompts], group=ranks.group)
    return [sum(parts, []) for parts in zip(*every)]


def main():
    """Ask a checkpoint one question about one video, and see it think."""
    args = argparse.ArgumentParser(description=main.__doc__)
    args.add_argument("--model", required=True, help="a checkpoint directory or hub name")
    args.add_argument("--video", required=True, help="a file, a folder of pictures, a picture, or toy:SEED, toy:reading-SEED, ...")
    args.add_argument("--question", default="", help="optional for toy:SEED, which brings its own")
    args.add_argument("--frames", type=int, default=32)
    args.add_argument("--max_pixels", type=int, default=0, help="of one frame; 0: the checkpoint's own bound")
    args.add_argument("--think_budget", type=int, default=512, help="tokens, then an answer is forced")
    args.add_argument("--think_least", type=int, default=0, help="tokens; a thought that ends before them goes on after a forced \"Wait,\"")
    args.add_argument("--answer_budget", type=int, default=64)
    args.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    args.add_argument("--sample", type=int, default=-1, metavar="SEED", help="sample with this seed instead of greedily")
    args = args.parse_args()
    question, built_in = args.question, None
    if not question and args.video.startswith("toy:"):
        built_in = toy.make_sample(toy.parse_path(args.video)[0])
        question = built_in.question
    if not question:
        raise ValueError("--question is missing")
    for name, least in (("frames", 1), ("max_pixels", 0), ("think_budget", 0), ("think_least", 0), ("answer_budget", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
    ranks = encode.start(1)
    dtype = args.dtype or ("float32" if ranks.device == "cpu" else "bfloat16")
    model, tokenizer = vlm.load(args.model, ranks.device, getattr(torch, dtype), args.max_pixels)
    vision, grid, seconds = vlm.encode_video(model, lambda: data.open_video(args.video, args.frames), ranks)
    prompt = vlm.make_prompt(model, tokenizer, question, vision, grid, seconds)
    how = limits(args.think_budget, args.answer_budget, think_least=args.think_least)
    vlm.check_length(model, prompt, room(tokenizer, **how))
    print(f"{args.video}: {grid[0]} x {grid[1]} x {grid[2]} patches, {len(vision)} vision tokens\n{question}\n")
    [[completion]] = sample(model, tokenizer, [prompt], [[("ask", args.sample)]], greedy=args.sample < 0,
                            watch=lambda piece: print(piece, end="", flush=True), **how)
    notes = [note for note, is_so in (("thinking budget ran out: answer forced", completion.forced),
                                      ("answer budget ran out", completion.truncated)) if is_so]
    print(f"\n\n{len(completion.tokens)} tokens" + "".join(f"; {note}" for note in notes))
    if built_in:
        print(f"right: {built_in.answer}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"rollout.py: {e}")
