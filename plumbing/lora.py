"""
LoRA: the weights of a checkpoint stay as they are, and low-rank updates of them are trained.

    W x  becomes  W x + (alpha / rank) B A x       A [rank, in], B [out, rank], B = 0 at first

peft puts these adapters beside every linear layer of the language model; the vision tower, the
embeddings and the head have none. The frozen W keeps the dtype of the run and is never copied; A
and B are float32. Whoever reads the weights (vLLM, a checkpoint) gets the merged ones.
"""
import json
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = "adapter"         # in a checkpoint
NAME = "default"           # peft's name of the only adapter
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."         # peft's, before the names of a file
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
CHUNK = 1 << 24            # weights that are summed at once


def import_peft():
    """The module peft. Raises ValueError, with what to install, if it is missing."""
    try:
        import peft
    except ImportError as e:
        raise ValueError(f"lora_rank needs peft: pip install -r requirements.txt ({e})") from e
    return peft


# --------------------------------------------------------------------------------------------------
# adapting a model

def initial_weights(c, checkpoint):
    """The checkpoint whose weights a run loads first: with LoRA always c.model, without which the
    adapter of its newest checkpoint means nothing. checkpoint: the newest one, or None.

    Raises ValueError if the run goes on and the directory c.model is gone.
    """
    if not c.lora_rank or not checkpoint:
        return checkpoint or c.model
    if read_base(checkpoint)["is_directory"] and not os.path.isdir(c.model):
        raise ValueError(f"{checkpoint} has an adapter of {c.model}, and that directory is gone: "
                         f"put it back, or begin a new run from the merged weights with "
                         f"--model={checkpoint} and another --out_dir")
    return c.model


def adapt(model, c, checkpoint):
    """Put adapters of rank c.lora_rank into a model, in place: those of the run's newest checkpoint
    or, if it has none yet, new ones that depend on the seed alone. Nothing else trains then. Does
    nothing if c.lora_rank is 0.

    Raises ValueError for a mixture of experts, for a rank larger than a layer, and if the model is
    not the one that the checkpoint's adapter was trained on.
    """
    if not c.lora_rank:
        return
    peft = import_peft()
    check_layers(model, c.lora_rank)
    kinds = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    options = peft.LoraConfig(
        r=c.lora_rank, lora_alpha=c.lora_alpha, base_model_name_or_path=c.model,
        target_modules=rf"model\.language_model\.layers\..*\.({'|'.join(kinds)})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        peft.inject_adapter_in_model(options, model, NAME)
    for p in model.parameters():
        if p.requires_grad:                                # peft made them in the model's dtype
            p.data = p.data.float()
    model.base = {"model": c.model, "is_directory": os.path.isdir(c.model),
                  "sum_of_bits": sum_of_bits(model)}
    if checkpoint:
        check_base(model, checkpoint)
        load_adapter(model, checkpoint)


def linear_layers(model):
    """Those of the language model. -> {name: layer}"""
    layers = {}
    for name, module in model.named_modules():
        if name.startswith("model.language_model.layers.") and isinstance(module, nn.Linear):
            layers[name] = module
    return layers


def check_layers(model, rank):
    """Raises ValueError if a linear layer is too small for the rank, or if the model has experts,
    whose stacked weights are no linear layers."""
    if any(".mlp.experts." in name for name, _ in model.named_parameters()):
        raise ValueError(f"lora_rank = {rank}: a mixture of experts has most of its weights in the "
                         "experts, which LoRA does not adapt here; train all with --lora_rank=0")
    for name, layer in linear_layers(model).items():
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise ValueError(f"lora_rank = {rank} is larger than {name}, {layer.in_features} -> "
                             f"{layer.out_features} features: it can be at most {most}")


def is_adapted(model):
    return hasattr(model, "base")


def sum_of_bits(model):
    """A number that tells one set of frozen weights from another."""
    total = 0
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            bits = p.detach().reshape(-1).view(INTEGER[p.dtype])
            total += sum(int(part.sum(dtype=torch.int64)) for part in bits.split(CHUNK))
    return total


# --------------------------------------------------------------------------------------------------
# merged weights

def merged(model, named_parameters):
    """The parameters of a model as if it had been trained without adapters, one at a time: each
    adapted weight is W + (alpha / rank) B A, summed in float32 and rounded once.

    named_parameters: (name, tensor) pairs of the model; those without adapters pass unchanged.
    """
    for name, weight in named_parameters:
        layer_name, adapted, kind = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if adapted:
            name = f"{layer_name}.{kind}"
        if adapted and kind == "weight":
            with torch.no_grad():
                update = model.get_submodule(layer_name).get_delta_weight(NAME)
                weight = (weight.float() + update).to(weight.dtype)
        yield name, weight


# --------------------------------------------------------------------------------------------------
# an adapter's files

def adapter_weights(model):
    """{name in peft's files: parameter}"""
    found = {}
    for name, p in model.named_parameters():
        if ".lora_" in name:
            found[PREFIX + name.replace(f".{NAME}.", ".")] = p
    return found


def save_adapter(model, checkpoint):
    """Write the adapter beside a checkpoint's merged weights, in peft's own form, and base.json,
    which says what it was trained on."""
    folder = os.path.join(checkpoint, FOLDER)
    os.makedirs(folder)
    model.peft_config[NAME].save_pretrained(folder)        # adapter_config.json
    weights = {name: p.detach().cpu().contiguous() for name, p in adapter_weights(model).items()}
    save_file(weights, os.path.join(folder, FILE), {"format": "pt"})
    with open(os.path.join(folder, "base.json"), "w") as f:
        json.dump(model.base, f, indent=1)


def read_base(checkpoint):
    """What base.json says. Raises ValueError if it is missing or damaged."""
    path = os.path.join(checkpoint, FOLDER, "base.json")
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: missing or damaged ({e})") from e


def check_base(model, checkpoint):
    """Raises ValueError if the adapter of a checkpoint was trained on other weights than those of
    an adapted model: a link like out/model moves when its own run goes on."""
    base = read_base(checkpoint)
    if base["sum_of_bits"] != model.base["sum_of_bits"]:
        raise ValueError(f"{checkpoint} has an adapter of {model.base['model']}, which has other "
                         "weights now: put the old ones back, or begin a new run from the merged "
                         f"weights with --model={checkpoint} and another --out_dir")


def load_adapter(model, checkpoint):
    """The adapter of a checkpoint into an adapted model. Raises ValueError if its file is missing
    or damaged."""
    path = os.path.join(checkpoint, FOLDER, FILE)
    try:
        saved = load_file(path)
        with torch.no_grad():
            for name, p in adapter_weights(model).items():
                p.copy_(saved[name])
    except (OSError, SafetensorError, KeyError, RuntimeError) as e:
        raise ValueError(f"{path}: missing or damaged ({e})") from e


def refuse_adapter(name):
    """Raises ValueError if a directory that is given as a model is peft's adapter of one."""
    path = os.path.join(name, "adapter_config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path) as f:
            base = json.load(f)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "a model that its adapter_config.json does not name"
    above = os.path.dirname(os.path.normpath(name))
    here = f", {above}" if os.path.exists(os.path.join(above, "config.json")) else ""
    raise ValueError(f"{name} is an adapter of {base}, not a model: give the checkpoint with the "
                     f"merged weights{here}")
