"""
Hugging Face checkpoint directories, in and out.
"""
import json
import os
import pickle
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from plumbing.families import FAMILIES, family_of, read_family, template_ids
from plumbing.lora import is_adapted, refuse_adapter, save_adapter
from plumbing.preprocessing import read_file, read_pixels
from plumbing.sharding import kept_buffers
from plumbing.sharding import weights as merged_weights
from plumbing.tiny import build_tiny
from plumbing.tower_attention import FRAMES_ATTENTION

logging.disable_progress_bar()          # train.py's bar is enough


# Of the language model `model.call_attention`, of the vision tower `frames_attention`.
ATTENTION = {"text_config": "attention_object", "vision_config": FRAMES_ATTENTION}


# --------------------------------------------------------------------------------------------------
# loading

def load(name, device="cpu", dtype=torch.float32, max_pixels=0, seed=0):
    """A model and its tokenizer. -> (model, tokenizer)

    name: "tiny", a Hugging Face checkpoint directory or a hub name; max_pixels, if not 0: lowers
    the checkpoint's own bound on a frame; seed: of the tiny model's weights. The model gains
    `model.pixels`. Raises ValueError if the checkpoint cannot be read.
    """
    if name == "tiny":
        model, tokenizer, pixels = build_tiny(seed)
    else:
        model, tokenizer, pixels = load_pretrained(name, dtype)
    if max_pixels:
        pixels.max_pixels = min(max_pixels, pixels.max_pixels)
        pixels.min_pixels = min(max_pixels, pixels.min_pixels)
    model.pixels = pixels
    model.set_attn_implementation(ATTENTION)
    model.to(device).eval()                                # no dropout, in training either
    cast_parameters(model, dtype)
    return model, tokenizer


def load_pretrained(name, dtype):
    """A checkpoint of a known family. -> (model, tokenizer, `Pixels`)

    name: a Hugging Face directory or hub name. Raises ValueError, in one line that names the
    checkpoint, if a file is missing or damaged, if the family is unknown, or if a tensor is
    missing, unexpected or of another shape (which transformers only logs).
    """
    config, family, pixels = read_facts(name)
    tokenizer = read_tokenizer(name, config)
    with in_one_line(name):
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = []
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong += [str(tensor) for tensor in sorted(info[key])]
    if wrong:
        raise ValueError(f"{name}: tensors missing, not expected or of another shape: "
                         f"{', '.join(wrong[:5])} ({len(wrong)} in all)")
    check_rotary(name, model)
    model.family = family
    return model, tokenizer, pixels


def read_facts(name):
    """-> a checkpoint's configuration, `Family` and `Pixels`. Raises ValueError."""
    looks_local = name.startswith((".", "/", "out/")) or name.count("/") > 1
    if looks_local or os.path.exists(name):
        refuse_adapter(name)
        if not os.path.exists(os.path.join(name, "config.json")):
            hint = "; run train.py first" if os.path.normpath(name) == "out/model" else ""
            raise ValueError(f"{name} is no checkpoint: it has no config.json{hint}")
    with in_one_line(name):
        written, _ = PreTrainedConfig.get_config_dict(name)
    check_written(name, written)
    with in_one_line(name):
        config = AutoConfig.from_pretrained(name)
    check_config(name, config, written)
    check_stops(name, config, written)
    family = read_family(name, config.model_type)
    return config, family, read_pixels(name, family, config.vision_config)


def read_tokenizer(name, config):
    """-> a checkpoint's tokenizer. Raises ValueError if it does not go with the model, or if its
    chat template cannot write a prompt: else every question would be dropped for that."""
    with in_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"{name}: its tokenizer has {len(tokenizer)} tokens and its config.json a "
                         f"vocab_size of {rows}; copy both from one checkpoint")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no eos_token, which ends an answer; copy the "
                         "tokenizer_config.json that its authors publish")
    try:
        template_ids(config, tokenizer)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e
    return tokenizer


def load_without_weights(name):
    """What counts a prompt's tokens. -> an object with a model's config, family and pixels, and its
    tokenizer

    name: as for `load_pretrained`, or "tiny". Raises ValueError.
    """
    if name == "tiny":
        model, tokenizer, pixels = build_tiny()
        config, family = model.config, family_of(model)
    else:
        config, family, pixels = read_facts(name)
        tokenizer = read_tokenizer(name, config)
    return SimpleNamespace(config=config, family=family, pixels=pixels), tokenizer


@contextmanager
def in_one_line(name):
    """Turns the errors of transformers, of many types and lines, into one line that names the
    checkpoint."""
    try:
        yield
    except ImportError as e:
        raise ValueError(f"{name} needs a package: {' '.join(str(e).split())[:500]}") from e
    # AttributeError: of a dtype that torch does not have. AssertionError: of a vocabulary without
    # the pad's row. RuntimeError: of experts, to be stacked.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            AssertionError, RuntimeError, StrictDataclassError, SafetensorError,
            pickle.UnpicklingError) as e:
        if os.path.isdir(name):
            what = f"{name} has a file that is missing, damaged or of another kind"
        else:
            what = (f"{name} is no directory here and did not come from the hub: see whether the "
                    "name is right and the network there, or give the directory of a copy")
        text = " ".join(str(e).split())[:500]
        raise ValueError(f"{what}. transformers said: {type(e).__name__}: {text}") from e


def check_written(name, written):
    """Raises ValueError for a config.json that transformers would misread.

    written: its content.
    """
    parts = {part: written.get(part, {}) for part in ("text_config", "vision_config")}
    for part, content in parts.items():
        if not isinstance(content, dict):
            raise ValueError(f"{name}: the {part} in config.json is no JSON object; copy the file "
                             "its authors publish")
    for content in (written, *parts.values()):
        if content.get("quantization_config") is not None:
            raise ValueError(f"{name}: config.json has a quantization_config, and quantised "
                             "weights cannot be trained; give the checkpoint that is not quantised")


def check_config(name, config, written):
    """Raises ValueError for a model of an unknown family, or one that is not what its family is.

    config: as transformers understands it; written: the content of config.json.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a {kind} model; this code reads {', '.join(FAMILIES)} "
                         "checkpoints")
    # transformers ignores what is not where it looks, and fills in the sizes of another model.
    for part in ("text_config", "vision_config"):
        known = type(getattr(config, part)).model_type
        says = written.get(part, {}).get("model_type", known)
        if says not in (known, kind):                      # older files have the whole model's
            raise ValueError(f"{name}: the {part} of a {kind} model is a {known}, and config.json "
                             f"says {says}")
    text = config.text_config
    if "text_config" not in written and written.get("hidden_size") != text.hidden_size:
        raise ValueError(f"{name}: config.json has no text_config, where transformers expects the "
                         f"sizes of a {kind} model's layers")
    # Other layers read a packed row as one text, and ignore who may see whom.
    others = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
    if others:
        raise ValueError(f"{name} has layers of {', '.join(sorted(others))}; this code trains "
                         "models whose layers all have full attention")
    tower = config.vision_config
    heads, width = tower.num_heads, tower.hidden_size
    if heads < 1 or width % (4 * heads):       # height and width turn half of a head, in pairs
        raise ValueError(f"{name}: vision_config in config.json has {heads} heads, into which a "
                         f"hidden_size of {width} cannot be divided; copy the file its authors "
                         "publish")


def check_stops(name, config, written):
    """Raises ValueError if an id that ends an answer is none of the model's, or if
    generation_config.json is damaged, which transformers ignores in silence."""
    path, content = read_file(name, "generation_config.json")
    rows = config.text_config.vocab_size
    for where, part in ((path, content), (f"{name}/config.json", written),
                        (f"{name}/config.json", written.get("text_config", {}))):
        stops = part.get("eos_token_id")                   # an id, several, or None
        for stop in stops if isinstance(stops, list) else [stops]:
            known = type(stop) is int and 0 <= stop < rows
            if stop is not None and not known:
                raise ValueError(f"{where}: eos_token_id has {json.dumps(stop)[:100]}, which is no "
                                 f"id below the model's vocab_size of {rows}; copy the file its "
                                 "authors publish")


def check_rotary(name, model):
    """Raises ValueError if mrope_section does not share out the frequencies of a head: it has no
    tensor whose shape would show it."""
    rotary = model.model.language_model.rotary_emb
    sections, pairs = rotary.mrope_section, len(rotary.inv_freq)
    whole = isinstance(sections, list) and [type(n) for n in sections] == [int] * 3
    if not whole or min(sections) < 1 or sum(sections) != pairs:
        raise ValueError(f"{name}: mrope_section in config.json is {sections}, and must be three "
                         f"numbers from 1 with the sum {pairs}; copy the file its authors publish")


def cast_parameters(model, dtype):
    """Only parameters get the dtype: M-RoPE's frequencies, which are buffers, stay float32. In
    bfloat16 they would be off by a radian at position 1,000.

    The parameters are also copied: weights from a file may be unaligned in memory, and the rounding
    of matrix kernels depends on alignment. Without the copy a resumed run would differ in the last
    bit from one that never stopped.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype, copy=True)


# --------------------------------------------------------------------------------------------------
# saving

def has_experts(model):
    """Whether the model is a mixture of experts."""
    return any(".mlp.experts." in name for name, _ in model.named_parameters())


def published(model, weights):
    """Weights of a mixture of experts under the names and in the shapes of published checkpoints,
    which vLLM reads. transformers stacks the experts of a layer when it loads them.

    weights: {name: tensor}, any of the model's. -> {name: tensor}
    """
    weights = revert_weight_conversion(model, weights)
    for name, w in weights.items():
        # Qwen3-VL-MoE's are published as [experts, in, out]. transformers 5.19 transposes them when
        # it loads, but not back.
        stacked = name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
        if stacked and w.shape == model.get_parameter(name).shape:
            weights[name] = w.transpose(1, 2).contiguous()
    return weights


def try_saving(model, tokenizer, folder):
    """Save all but the weights into `folder` for a moment, and load it again.

    What cannot be saved is found before a run has computed anything: transformers loads a
    generation_config.json with a temperature but without sampling, and refuses to save it. Raises
    ValueError or OSError.
    """
    with TemporaryDirectory(".tmp", "ckpt-trial-", folder) as path:
        try:
            save_pretrained(model, tokenizer, path, weights={})
        except ValueError as e:
            reason = " ".join(str(e).split())[:300]
            raise ValueError("this model could not be saved again after training: correct its "
                             f"generation_config.json. transformers said: {reason}") from e
        load_without_weights(path)


def save_pretrained(model, tokenizer, path, weights=None):
    """A checkpoint that transformers and vLLM load as it is: weights, configs, tokenizer and
    preprocessing. weights: {name: tensor}, gathered, if those of the model are sharded."""
    if is_adapted(model):
        save_adapter(model, path)
        if weights is None:                # all merged weights, in host memory
            weights = {name: w.cpu() for name, w in merged_weights(model)} | kept_buffers(model)
    if has_experts(model):
        weights = published(model, model.state_dict() if weights is None else weights)
        model.save_pretrained(path, state_dict=weights, save_original_format=False)
    else:
        model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
    px = model.pixels
    family = family_of(model)
    shared = {"image_mean": px.mean, "image_std": px.std, "patch_size": px.patch,
              "temporal_patch_size": px.temporal, "merge_size": px.merge}
    least, most = px.video_pixels or (px.min_pixels, px.max_pixels)
    videos = {"size": {"shortest_edge": least, "longest_edge": most}}
    images = videos
    if px.video_pixels:
        # Pictures then have other bounds, which we do not read: write transformers' defaults, since
        # vLLM has none.
        least, most = family.image_bounds
        images = {"size": {"shortest_edge": least, "longest_edge": most}}
        if px.max_pixels < px.video_pixels[1]:
            videos = videos | {"max_frame_pixels": px.max_pixels}
    images = images | {"image_processor_type": family.image_processor}
    videos = videos | {"video_processor_type": family.video_processor}
    for file, content in (("preprocessor_config.json", images),
                          ("video_preprocessor_config.json", videos)):
        with open(os.path.join(path, file), "w") as f:
            json.dump({**shared, **content, "processor_class": family.processor}, f, indent=1)
