"""
The other sampler: vLLM, in this process, given the vision tokens that are already encoded.

Its own vision tower is not loaded. vLLM batches by itself. A completion is one request for its
thought and one for its answer; the second finds the keys and values of the first in vLLM's prefix
cache, as all completions find those of their prompt. The weights are a copy, updated by
`VLLM.load`.
"""
import os
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch.distributed.fsdp import FSDPModule

from flow import Completion, Prompt
from plumbing.checkpoints import published
from plumbing.families import (
    banned_ids,
    decode,
    deepstack_levels,
    family_of,
    stop_ids,
    vision_pad,
)
from plumbing.optimizer import updates
from plumbing.sharding import kept_buffers, weights
from plumbing.store import sha256
from plumbing.streams import stream

VERSION = "0.32.0"
MOST_BANNED = 1024        # ids with a bias of their own, in vLLM's second model runner
# What vLLM's errors advise to change, and its name here.
OUR_NAMES = {"gpu_memory_utilization": "vllm_memory", "GPU memory utilization": "vllm_memory",
             "max_model_len": "vllm_length"}
# A model type that vLLM knows under another name.
SAME_MODEL = {"glm46v": {"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"]}}
LEAST_BATCH = 8192        # tokens; a video with more vision tokens than vLLM's batch is refused


def import_vllm():
    """The module vllm, in the version that this file is written for. Raises ValueError, with what
    to install, if vLLM is missing or has another version."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")     # run in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")     # else it binds ours too
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")             # GiB, used without a GPU
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    needs = f"rollout = vllm needs vLLM {VERSION}"
    install = "pip install -r requirements-gpu.txt"
    try:
        import vllm
    except ImportError as e:
        raise ValueError(f"{needs}: {install} ({e})") from e
    if vllm.__version__.partition("+")[0] != VERSION:
        raise ValueError(f"{needs}, and {vllm.__version__} is installed: {install}")
    return vllm


@dataclass
class Writing:
    """A completion while vLLM writes it: thought, forced text, answer, as ids and log-probs."""
    prompt: Prompt
    key: tuple               # of its random numbers
    thought: list = field(default_factory=list)
    thought_logprobs: list = field(default_factory=list)
    forced_ids: list = field(default_factory=list)
    answer: list = field(default_factory=list)
    answer_logprobs: list = field(default_factory=list)
    forced: bool = False     # the thinking budget ran out, and the answer tag was forced
    truncated: bool = False
    done: bool = False       # it ended with its thought

    def ids(self):
        return self.thought + self.forced_ids + self.answer

    def request(self, part):
        """The request for the next part. -> (prompt, ids so far, key of the random numbers)"""
        return self.prompt, self.ids(), (*self.key, part)

    def sampled(self):
        """One bool for each id: forced text is not sampled."""
        forced = [False] * len(self.forced_ids)
        return [True] * len(self.thought) + forced + [True] * len(self.answer)

    def logprobs(self):
        """One for each id, 0 if it is forced."""
        return self.thought_logprobs + [0.0] * len(self.forced_ids) + self.answer_logprobs


class VLLM:
    """vLLM's engine as a sampler: `load` the weights, `sample`, `rest`."""

    def __init__(self, name, model, tokenizer, ranks, length, banned, memory=0.5, share=False):
        """name: of the checkpoint that model was loaded from; length: the most tokens of a prompt
        and its completion; banned: bool [vocabulary], ids that are never sampled; memory: vLLM's
        share of the GPU's; share: one engine over the sp ranks (tensor parallelism), else one on
        each rank.
        Raises ValueError if vLLM is not installed or does not start on this checkpoint."""
        vllm = import_vllm()
        self.SamplingParams = vllm.SamplingParams
        self.tokenizer = tokenizer
        self.stops = stop_ids(model, tokenizer)
        self.banned = banned
        self.pad = vision_pad(model.config)
        self.shared = share and ranks.sp > 1
        self.cuda = ranks.device != "cpu"
        self.memory = memory
        self.version = None                # `optimizer.updates` when vLLM got the weights
        self.asleep = False
        # A video whose times stand between its temporal patches goes to vLLM as pictures.
        self.modality = "image" if family_of(model).clock else "video"
        self.picture_pad = model.config.image_token_id
        self.buffers = kept_buffers(model)
        levels = deepstack_levels(model.config.vision_config)
        if levels:
            keep_deepstack()
        options = self.options(model, ranks, length, memory)
        torch.cuda.empty_cache()                           # see load
        try:
            self.llm = vllm.LLM(name, **options)
        except (ValueError, NotImplementedError) as e:
            raise ValueError(f"vLLM does not start on {name}: {in_our_words(e)}") from e
        # vLLM's GLM models take embeddings, but their reader of requests does not. Qwen's does.
        from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
        processor_info = self.llm.renderer.mm_processor.info
        if not isinstance(processor_info.data_parser, Qwen2VLMultiModalDataParser):
            processor_info.data_parser = Qwen2VLMultiModalDataParser(model.pixels.merge)
        self.llm.apply_model(refuse_missing_weights)
        if self.llm.apply_model(deepstack_of)[0] != levels:
            raise ValueError(f"vLLM does not start on {name}: it would drop the deepstack features")

    def options(self, model, ranks, length, memory):
        """The arguments of vllm.LLM."""
        length = min(length, model.config.text_config.max_position_embeddings)   # the most it takes
        options = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": length,
            "max_num_batched_tokens": max(length, LEAST_BATCH),
            "logprobs_mode": "processed_logprobs",         # of what is sampled from: bans included
            "seed": 0,
            "enable_mm_embeds": True,                      # videos come only as embeddings
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "mm_processor_cache_gb": 0,
            "tensor_parallel_size": ranks.sp if self.shared else 1,
            "gpu_memory_utilization": memory,
            "enable_sleep_mode": self.cuda,
            "enforce_eager": not self.cuda,
        }
        if ranks.world > 1:
            options["distributed_executor_backend"] = "external_launcher"        # torchrun
        # vLLM looks for keys that a config need not have: without the first it drops the biases of
        # GLM-4.1V silently, without the others GLM-4.5V and Qwen3-VL-MoE do not start.
        attention = model.model.language_model.layers[0].self_attn
        facts = {"attention_bias": attention.q_proj.bias is not None,
                 "head_dim": attention.head_dim,
                 "use_qk_norm": hasattr(attention, "q_norm"),
                 "norm_topk_prob": True}                   # transformers' always does
        text = model.config.text_config
        missing = {key: fact for key, fact in facts.items() if not hasattr(text, key)}
        options["hf_overrides"] = {"text_config": missing}
        options["hf_overrides"] |= SAME_MODEL.get(model.config.model_type, {})
        if not self.cuda:
            # On the CPU vLLM cannot split the prefill of a prompt with random numbers of its own,
            # and would share blocks of 128 tokens, more than some prompts have.
            options["enable_chunked_prefill"] = False
            options["block_size"] = 32
        return options

    def load(self, model):
        """Give vLLM the model's weights as they are now, and drop keys and values of older ones."""
        if self.asleep:
            # torch keeps the memory that training freed, and vLLM takes its own from the driver.
            torch.cuda.empty_cache()
            self.wake_up()
        elif updates(model) == self.version:
            return
        self.asleep = False
        if not self.cuda:
            self.llm.apply_model(forget_expert_kernels)
        to_load = self.published_weights(model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": to_load})
        self.llm.reset_prefix_cache()
        # reload_weights empties the worker's cache of embeddings; the scheduler must know of it.
        self.llm.llm_engine.reset_encoder_cache()
        self.version = updates(model)

    def wake_up(self):
        """Raises ValueError if the GPU has too little memory beside the trainer's."""
        try:
            self.llm.wake_up()
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            raise ValueError("vLLM does not wake up, the GPU's memory is full: lower vllm_memory "
                             f"({self.memory:g} of it now). It said: {in_our_words(e)}") from e

    def published_weights(self, model):
        """Yields the name and the tensor of each weight of the language model, as vLLM reads them.
        """
        # A head that is tied to the embeddings is given under its own name too: else vLLM has none.
        every = chain(weights(model, tied=True), self.buffers.items())
        for name, weight in every:
            if ".mlp.experts." in name:
                yield from published(model, {name: weight}).items()
            elif ".visual." not in name:
                yield name, weight

    def rest(self):
        """Give the GPU's memory to the training that follows. At level 2 vLLM forgets its weights:
        level 1 would copy them to the host's memory, and `load` hands over new ones anyway."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep = True

    @torch.no_grad()
    def sample(self, prompts, keys, think_budget, answer_budget, forced, greedy=False, banned=None,
               think_least=0):
        """As `rollout.sample`, with vLLM's own random numbers: a generator for the thought and one
        for the answer of each completion. Raises ValueError if think_least is given."""
        if think_least:
            raise ValueError("think_least is the torch engine's alone")
        if banned is None:
            banned = self.banned
        forced_ids = self.tokenizer(forced or "", add_special_tokens=False).input_ids
        writings = []
        for prompt, group in zip(prompts, keys):
            writings += [Writing(prompt, key) for key in group]

        if think_budget:
            requests = [writing.request("thinks") for writing in writings]
            thoughts = self.generate(requests, think_budget, banned, greedy, stop=["</think>"])
            for writing, (ids, logprobs) in zip(writings, thoughts):
                writing.thought, writing.thought_logprobs = ids, logprobs

        for writing in writings:
            if self.ends_with_stop(writing.thought):
                writing.done = True
            elif not self.closes_thought(writing.thought):           # out of thinking tokens
                if forced is None:
                    writing.done = writing.truncated = True
                else:
                    writing.forced = True
                    writing.forced_ids = forced_ids

        answering = [writing for writing in writings if not writing.done]
        requests = [writing.request("answers") for writing in answering]
        answers = self.generate(requests, answer_budget, banned, greedy)
        for writing, (ids, logprobs) in zip(answering, answers):
            writing.answer, writing.answer_logprobs = ids, logprobs
            writing.truncated = not self.ends_with_stop(ids)

        completions = iter([self.completion(writing) for writing in writings])
        return [list(islice(completions, len(group))) for group in keys]

    def completion(self, writing):
        text = decode(self.tokenizer, writing.ids(), self.stops)
        return Completion(torch.tensor(writing.ids()), torch.tensor(writing.sampled()),
                          torch.tensor(writing.logprobs()), text, writing.forced,
                          writing.truncated)

    def ends_with_stop(self, ids):
        return bool(ids) and ids[-1] in self.stops

    def closes_thought(self, ids):
        return "</think>" in "".join(self.tokenizer.decode([i]) for i in ids)

    def generate(self, requests, most, banned, greedy, stop=None):
        """Up to `most` tokens for each request.

        requests: (prompt, ids written so far, key of the random numbers) each; banned: bool
        [vocabulary]; stop: texts that also end it. -> (ids, log-probs), two lists, for each
        """
        if not requests:
            return []
        banned_ids = banned.nonzero()[:, 0].tolist()
        if len(banned_ids) > MOST_BANNED:
            raise ValueError(f"{len(banned_ids)} ids are banned, and vLLM takes at most "
                             f"{MOST_BANNED} on a GPU: sample with --rollout=torch")
        bias = dict.fromkeys(banned_ids, -100.0)
        inputs, params = [], []
        for prompt, written, key in requests:
            inputs.append(self.input(prompt, written))
            params.append(self.SamplingParams(
                temperature=0.0 if greedy else 1.0, seed=int(stream(*key).integers(1 << 62)),
                max_tokens=most, logprobs=0, logit_bias=bias, stop_token_ids=self.stops,
                stop=stop, include_stop_str_in_output=True, skip_special_tokens=False,
                detokenize=bool(stop)))
        results = []
        for output in self.llm.generate(inputs, params, use_tqdm=False):
            [written] = output.outputs
            ids = list(written.token_ids)
            logprobs = [at[i].logprob for i, at in zip(ids, written.logprobs)]
            results.append((ids, logprobs))
        return results

    def input(self, prompt, written):
        """A prompt and the ids written after it, as vLLM reads them."""
        pads = prompt.ids == self.pad
        first_pads = pads & ~pads.roll(1)                  # one of each run: vLLM makes the others
        ids = prompt.ids
        if self.modality == "image":
            ids = ids.masked_fill(pads, self.picture_pad)
        ids = ids[~pads | first_pads].tolist()
        name = prompt.key or sha256("", prompt.vision)
        embeddings = {                                     # seconds are read only for videos
            f"{self.modality}_embeds": prompt.vision,
            f"{self.modality}_grid_thw": torch.tensor(prompt.grids),
            "second_per_grid_ts": torch.tensor([prompt.seconds], dtype=torch.float64),
        }
        names = [f"{name} {i}" for i in range(len(prompt.grids))]
        return {"prompt_token_ids": ids + written,
                "multi_modal_data": {self.modality: embeddings},
                "multi_modal_uuids": {self.modality: names}}


def in_our_words(error):
    """The first line of an error of vLLM's, with the names that its options have here."""
    line = str(error).strip().splitlines()[0]
    for theirs, ours in OUR_NAMES.items():
        line = line.replace(theirs, ours)
    return line


def keep_deepstack():
    """Let vLLM add deepstack's features although it has no vision tower. It asks for the tower by
    the class that stands in its place, which is the only use of that name in these files."""
    from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
    qwen3_vl.StageMissingLayer = qwen3_vl_moe.StageMissingLayer = ()


def deepstack_of(inner):
    """How many layers of vLLM's model get features of deepstack."""
    return getattr(inner, "deepstack_num_level", 0)


def forget_expert_kernels(inner):
    """vLLM's CPU build packs the weights of experts only when it makes their kernel, and would
    leave new ones unpacked: after this it makes the kernel again."""
    for module in inner.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def refuse_missing_weights(inner):
    """vLLM only warns if a weight of its model is missing; after this it raises."""
    load_weights = inner.load_weights
    names = {name for name, _ in inner.named_parameters()}

    def load_all(weights):
        given = load_weights(weights)
        missing = sorted(names - given)
        if missing:
            some = ", ".join(missing[:5])
            raise RuntimeError(f"vLLM was not given {some} ({len(missing)} in all)")
        return given

    inner.load_weights = load_all


def start_engine(name, model, tokenizer, ranks, length, memory=0.5, share=False):
    """The vLLM engine of the checkpoint `name` that model was loaded from: see `VLLM`."""
    banned = banned_ids(model, tokenizer)
    return VLLM(name, model, tokenizer, ranks, length, banned, memory, share)


def engine_of(c, name, model, tokenizer, ranks):
    """`start_engine` if a run's configuration asks for vLLM, else None."""
    if c.rollout != "vllm":
        return None
    return start_engine(name, model, tokenizer, ranks, c.vllm_length, c.vllm_memory, c.vllm_share)


def vllm_rollout(engine, model, prompts, keys, how):
    """`VLLM.sample` with the model's weights as they are now. Then the engine rests."""
    if not prompts and not isinstance(model, FSDPModule):  # all ranks gather sharded weights
        return []
    engine.load(model)
    completions = engine.sample(prompts, keys, **how)
    engine.rest()
    return completions
