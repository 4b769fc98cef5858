"""
The GPU memory that a GRPO step on one long video needs, computed from the shapes of a model.
Pure arithmetic: no weights are made and no step is run. The function at the end measures memory.

    python bench.py --memory=3b --frames=64,256,1024 --size=308 --completion=512 --sp=1,8

The step is bench.py's variant shared, or shared+sp if several ranks share the video.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Glm4vConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from plumbing.families import FAMILIES, vision_width
from plumbing.lora import check_layers, linear_layers, refuse_adapter
from plumbing.shapes import QWEN3_SHAPES, SHAPES
from plumbing.tiny import build_tiny

HEAD_CHUNK = 2048          # model.logprobs: positions that go through the head at once


# --------------------------------------------------------------------------------------------------
# shapes

NAMES = (*QWEN3_SHAPES, *SHAPES, "9b", "tiny")


def read_config(name):
    """The config of a model: 2b, 4b, 8b (Qwen3-VL), 3b, 7b (Qwen2.5-VL), 9b (GLM-4.1V and
    GLM-4.6V-Flash), tiny, or a checkpoint directory."""
    if name == "tiny":
        return build_tiny()[0].config
    refuse_adapter(name)
    if name == "9b":
        return Glm4vConfig()
    if name in QWEN3_SHAPES:
        return Qwen3VLConfig(**QWEN3_SHAPES[name])
    if name in SHAPES:
        return Qwen2_5_VLConfig(**SHAPES[name])
    return AutoConfig.from_pretrained(name)


def random_model(name, special_ids, device, dtype, seed):
    """A Qwen2.5-VL with random weights in the shape of 3b or 7b, created directly on the device and
    in the dtype.

    special_ids: {name of a config's field: id of that special token}.
    """
    config = Qwen2_5_VLConfig(**SHAPES[name], **special_ids)
    config.text_config.max_position_embeddings = 1 << 20   # random weights have no trained length
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


@dataclass
class Sizes:
    """The sizes of a language model that the counts below need."""
    hidden: int            # D, features of a position
    vision: int            # features of a vision token: D, more with deepstack
    mlp: int               # F, features inside the MLP, in a mixture those of a token's experts
    layers: int
    heads: int
    kv_heads: int
    head_dim: int          # d
    vocabulary: int
    norms: int             # per layer, over the D features of a position
    head_norms: bool       # whether queries and keys are normalised too, over the d of a head


def sizes(config):
    """The `Sizes` of a model's config."""
    c = config.text_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    names = [name for name, _ in empty_model(config).model.language_model.layers[-1].named_modules()
             if name.endswith("norm")]
    in_attention = [name for name in names if name.startswith("self_attn.")]
    mlp = c.intermediate_size
    if hasattr(c, "moe_intermediate_size"):
        experts = c.num_experts_per_tok + getattr(c, "n_shared_experts", 0)
        mlp = experts * c.moe_intermediate_size
    return Sizes(c.hidden_size, vision_width(config.vision_config), mlp, c.num_hidden_layers,
                 c.num_attention_heads, c.num_key_value_heads, head_dim, c.vocab_size,
                 norms=len(names) - len(in_attention), head_norms=bool(in_attention))


@dataclass
class Parameters:
    """How many parameters a model has."""
    tower: int             # the vision tower's: frozen
    others: int            # all others: they train, or with LoRA are frozen
    layer: int             # of one decoder layer
    inputs: int            # features that go into the linear layers of one decoder layer
    linear: int            # how many those are
    adapters: int          # of LoRA, in float32; 0 without

    @property
    def trained(self):
        return self.adapters or self.others

    def outside_layers(self, m):
        """Those of the embeddings, the head and the last norm."""
        return self.others - m.layers * self.layer


def empty_model(config):
    """A model of this config without memory for its weights."""
    copy = type(config).from_dict(config.to_dict())        # from_config writes to its argument
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(copy)


def count_parameters(config, lora_rank=0):
    """The `Parameters` of a model of this config, counted without allocating them. Raises
    ValueError if it cannot have adapters of that rank."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    model = empty_model(config)
    tower = count(model.model.visual)
    if lora_rank:
        check_layers(model, lora_rank)
    linear = linear_layers(model).values()
    layers = len(model.model.language_model.layers)
    inputs = sum(x.in_features for x in linear)
    outputs = sum(x.out_features for x in linear)
    return Parameters(tower, count(model) - tower, count(model.model.language_model.layers[0]),
                      inputs // layers, len(linear) // layers, lora_rank * (inputs + outputs))


# --------------------------------------------------------------------------------------------------
# memory, computed

@dataclass
class Step:
    """A GRPO step on one video, and what one rank holds of it."""
    vision: int            # V, vision tokens of the video
    text: int              # tokens of the prompt that are not vision tokens
    group: int             # G
    completion: int        # L, tokens of each completion
    itemsize: int          # bytes per weight and per activation
    sp: int                # ranks that share the video
    shards: int            # ranks over which FSDP2 shards what trains
    lora_rank: int         # 0: all but the tower trains
    checkpointing: bool    # decoder layers are recomputed in the backward

    @property
    def sharded(self):
        return self.shards > 1

    @property
    def prefix(self):
        """P, places of the prompt in the packed sequence."""
        return self.rounded_up(self.vision + self.text)

    @property
    def places(self):
        """C, places of all completions: L tokens take L - 1, since the last is never read."""
        return self.rounded_up(self.group * (self.completion - 1))

    @property
    def positions(self):
        """S, places of the packed sequence on this rank."""
        return (self.prefix + self.places) // self.sp

    @property
    def head_positions(self):
        """Positions of this rank that go through the head at once."""
        return min(HEAD_CHUNK, -(-self.group * self.completion // self.sp))

    def rounded_up(self, n):
        """The next multiple of sp: all ranks hold the same number of places."""
        return -(-n // self.sp) * self.sp


def vision_tokens(config, frames, size):
    """V, the vision tokens of a video of `frames` frames of size x size pixels."""
    tower = config.vision_config
    temporal_patches = -(-frames // tower.temporal_patch_size)
    tokens_a_side = size // (tower.patch_size * tower.spatial_merge_size)
    return temporal_patches * tokens_a_side ** 2


def text_tokens(config, frames):
    """About how many tokens of a prompt are not vision tokens: a question, and the times."""
    if not FAMILIES[config.model_type].clock:
        return 64
    return 64 + 10 * -(-frames // config.vision_config.temporal_patch_size)


def memory(config, frames, size, group, completion, dtype=torch.bfloat16, sp=1, checkpointing=0,
           shards=1, text=64, lora_rank=0):
    """Bytes on one rank in a GRPO step on one video. -> {part: bytes}

    frames: of size x size pixels; group: G; completion: L, tokens of each; dtype: of weights and
    activations; sp: ranks that share the video, with stage 2 if there are several;
    checkpointing: decoder layers are recomputed in the backward; shards: ranks over which FSDP2
    shards what trains, in float32; text: tokens of the prompt that are not vision tokens;
    lora_rank: of the adapters that train alone, 0 if all but the tower trains.
    The last parts are peaks: of the rollout, of forward and backward, of the update, and of the
    whole step.
    """
    m = sizes(config)
    parameters = count_parameters(config, lora_rank)
    step = Step(vision_tokens(config, frames, size), text, group, completion, dtype.itemsize, sp,
                shards, lora_rank, bool(checkpointing))
    part = {**parameter_bytes(parameters, step), **cache_bytes(m, step),
            **activation_bytes(m, parameters, step),
            **temporary_bytes(config, m, parameters, step)}
    gathered = gathered_bytes(m, parameters, step)

    always = part["weights"] + part["optimizer"] + part["vision"]
    part["in_rollout"] = (always + gathered["rollout"] + part["prefix_kv"] + part["completion_kv"]
                          + part["sampling"])
    saved = part["activations"] + gathered["ends"]
    largest_temporary = max(part["head"], part["layer"] + gathered["layer"])
    part["in_training"] = (always + part["gradients"]
                           + max(gathered["last_gradients"], saved + largest_temporary))
    # Gradients in float32 replace the others one by one.
    part["in_update"] = always + parameters.trained * 4 / shards

    part = {name: int(n) for name, n in part.items()}
    part["most"] = max(part["in_rollout"], part["in_training"], part["in_update"])
    return part


def parameter_bytes(parameters, step):
    """What exists as long as the run, and the gradients. FSDP2 keeps what trains in float32."""
    in_float32 = step.sharded or step.lora_rank
    a_parameter = 4 / step.shards if in_float32 else step.itemsize
    moments = 8 / step.shards                              # AdamW's two, in float32
    float32_copy = 4 if step.itemsize < 4 and not in_float32 else 0
    frozen = parameters.tower + (parameters.others if step.lora_rank else 0)
    return {
        "weights": frozen * step.itemsize + parameters.trained * a_parameter,
        "gradients": parameters.trained * a_parameter,
        "optimizer": parameters.trained * (moments + float32_copy),
    }


def cache_bytes(m, step):
    """The vision tokens, and the keys and values of the rollout. A rank samples G / sp of the
    completions, and each rank has the keys and values of the whole prefix."""
    a_position = 2 * m.layers * m.kv_heads * m.head_dim
    return {
        "vision": step.vision * m.vision * step.itemsize,
        "prefix_kv": a_position * step.prefix * step.itemsize,
        "completion_kv": a_position * step.group // step.sp * step.completion * step.itemsize,
    }


def norm_bytes(features, step):
    """Saved by a norm over some features: its input in float32, its scale, and, if its weight
    trains, its normalised input."""
    normalised = 0 if step.lora_rank else step.itemsize * features
    return 4 * features + 4 + normalised


def layer_bytes(m, parameters, step):
    """Saved for the backward by one decoder layer that is not recomputed."""
    into_projections = 2 * m.hidden
    queries_and_outcome = 3 * m.heads * m.head_dim
    # Stage 2 repeats keys and values that have fewer heads than there are ranks.
    keys_and_values = 2 * max(m.kv_heads, step.sp) * m.head_dim
    in_mlp = 4 * m.mlp
    numbers = into_projections + queries_and_outcome + keys_and_values + in_mlp
    adapters = 4 * step.lora_rank * parameters.linear      # what A gives to B, in float32
    if step.lora_rank and step.itemsize < 4:
        # Each A has its input in a float32 copy of its own, and nobody else keeps these inputs.
        numbers -= into_projections + m.heads * m.head_dim + m.mlp
        adapters += 4 * parameters.inputs
    softmax = 4 * m.heads                                  # its float32 normaliser
    norms = m.norms * norm_bytes(m.hidden, step)
    if m.head_norms:
        norms += (m.heads + m.kv_heads) * norm_bytes(m.head_dim, step)
    return step.positions * (norms + step.itemsize * numbers + adapters + softmax)


def activation_bytes(m, parameters, step):
    """What the forward keeps for the backward."""
    last_norm = step.positions * norm_bytes(m.hidden, step)
    into_head = step.group * step.completion * m.hidden * step.itemsize // step.sp
    if step.checkpointing:
        a_layer = step.positions * m.hidden * step.itemsize
        cosines_and_sines = 0
    else:
        a_layer = layer_bytes(m, parameters, step)
        cosines_and_sines = 2 * step.positions * m.head_dim * step.itemsize    # of all layers once
    activations = m.layers * a_layer + last_norm + into_head + cosines_and_sines
    if step.lora_rank and not step.checkpointing:          # no gradient goes through the first norm
        activations -= step.positions * norm_bytes(m.hidden, step)
    return {"activations": activations}


def temporary_bytes(config, m, parameters, step):
    """The peaks of temporary tensors."""
    # LoRA adds what B gives, in float32; in bfloat16 another time, to be scaled.
    of_adapters = 0
    if step.lora_rank:
        of_adapters = m.mlp * (4 if step.itemsize == 4 else 8)
    in_prefill = step.prefix // step.sp * (3 * m.mlp + 4 * m.hidden + 2 * m.head_dim)
    if m.vision > m.hidden:
        # Deepstack's features, and hidden states to which they are added.
        in_prefill += (step.vision * (m.vision - m.hidden) + step.prefix * m.hidden) // step.sp
    in_prefill = in_prefill * step.itemsize + step.prefix // step.sp * of_adapters
    probabilities = 20 * step.group // step.sp * m.vocabulary                  # of a decoding step
    in_backward = 2 * (m.mlp - m.hidden) * step.itemsize + of_adapters         # of the layer
    layer = step.positions * in_backward
    if step.checkpointing:
        layer += layer_bytes(m, parameters, step)
    if config.tie_word_embeddings and not step.sharded and not step.lora_rank:
        layer += m.vocabulary * m.hidden * step.itemsize   # head's gradient, until the embeddings'
    return {
        "sampling": max(in_prefill, probabilities),
        "head": 12 * step.head_positions * m.vocabulary,   # three float32 copies of the logits
        "layer": layer,
    }


def gathered_bytes(m, parameters, step):
    """Sharded parameters and gradients that are temporarily whole on a rank."""
    if not step.sharded:
        return {"rollout": 0, "ends": 0, "layer": 0, "last_gradients": 0}
    ends = parameters.outside_layers(m)
    layer_and_next = 2 * step.itemsize
    gradient = 4                                           # in float32, on its way to be summed
    return {
        "rollout": parameters.trained * step.itemsize,     # all of them, to sample
        "ends": (ends + m.vocabulary * m.hidden) * step.itemsize,    # and the head's gradient
        "layer": parameters.layer * (layer_and_next + gradient),
        "last_gradients": ends * (layer_and_next + gradient),        # at the end of the backward
    }


# --------------------------------------------------------------------------------------------------
# the table

def memory_table(config, frames, sp, size, group, completion, checkpointing, shards, lora_rank):
    """Text: `memory` in GB, a line for each of the lists sp and frames."""
    title = (f"GB on a rank, bfloat16, G = {group}, L = {completion}, shards = {shards}, "
             f"checkpointing = {checkpointing}, LoRA rank = {lora_rank}")
    longest = config.text_config.max_position_embeddings
    header, lines = "", []
    for ranks, n in product(sp, frames):
        part = memory(config, n, size, group, completion, sp=ranks, checkpointing=checkpointing,
                      shards=shards, text=text_tokens(config, n), lora_rank=lora_rank)
        header = "frames sp " + " ".join(part)
        line = f"{n:>6} {ranks:>2}"
        for name, number in part.items():
            line += f" {number / 1e9:>{len(name)}.2f}"
        if vision_tokens(config, n, size) + completion > longest:
            line += " more tokens than the model was made for"
        lines.append(line)
    return "\n".join([title, header, *lines])


# --------------------------------------------------------------------------------------------------
# memory, measured

@contextmanager
def saved_for_backward(model, totals):
    """Append to the list totals how many bytes the forwards inside the `with` keep for their
    backward: each storage once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size_by_pointer = {}

    def pack(x):
        storage = x.untyped_storage()
        size_by_pointer[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    def unpack(x):
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    totals.append(sum(n for at, n in size_by_pointer.items() if at not in parameters))
