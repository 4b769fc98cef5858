"""python -m pytest tests/test_lora.py -q

LoRA: its gradients and updates against arithmetic, one policy merged and unmerged, its files, and
what is refused.
"""
import copy
import json
import os
import shutil
import sys
from dataclasses import replace

import peft
import pytest
import torch
from runs import (
    ALONE,
    SHORT,
    alone,
    close,
    config,
    ended,
    fingerprint,
    flags,
    group_of,
    launched,
    learn,
    metrics,
    refused,
    run_of,
    same,
    state,
    weights,
)
from small import shake, shaken_tiny
from tiny_families import tiny_qwen3
from transformers import AutoModelForImageTextToText

import bench
import model as vlm
from flow import Ranks
from plumbing import command_line, lora
from plumbing.optimizer import make_optimizer, update
from plumbing.sharding import weights as merged_weights

SLOTS = (1, 3, 5)


def adapted(rank, alpha=32, dtype=torch.float32, shaken=True):
    """A tiny model with adapters whose B is not 0 any more, and its tokenizer."""
    model, tokenizer = vlm.load("tiny", dtype=dtype)
    shake(model)
    lora.adapt(model, config(model="base", lora_rank=rank, lora_alpha=alpha), None)
    noise = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad and shaken:
            p.data += 0.02 * torch.randn(p.shape, generator=noise)
    return model, tokenizer


def with_merged_weights(model):
    """A model without adapters, with the merged weights of an adapted one."""
    plain, _ = vlm.load("tiny", dtype=model.dtype)
    missing, unexpected = plain.load_state_dict(dict(merged_weights(model)), strict=False)
    assert not unexpected and not missing
    return plain


def backward(model, tokenizer):
    """The gradients of a GRPO loss on a few groups are left in the model."""
    groups = [group_of(slot, model, tokenizer) for slot in SLOTS]
    learn(run_of(model, tokenizer), groups, divisor=len(groups) * 4)


def layers(model):
    """[(name, peft's layer)] of the adapted layers"""
    return [(name, x) for name, x in model.named_modules() if hasattr(x, "base_layer")]


def logprobs(model, tokenizer):
    groups = [group_of(slot, model, tokenizer) for slot in SLOTS]
    with torch.no_grad():
        return vlm.logprobs(model, [group.prompt for group in groups],
                            [[x.tokens for x in group.completions] for group in groups],
                            vlm.banned_ids(model, tokenizer))[0]


# --------------------------------------------------------------------------------------------------
# against arithmetic

@pytest.mark.method
def test_the_gradients_are_those_of_the_merged_weight_projected():
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    model, tokenizer = adapted(rank=4, alpha=12)
    plain = with_merged_weights(model)
    plain.model.visual.requires_grad_(False)
    backward(model, tokenizer)
    backward(plain, tokenizer)
    assert len(layers(model)) == 4 * 7
    for name, layer in layers(model):
        A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
        dW = plain.get_submodule(name).weight.grad
        for grad, projected in ((B.grad, 3 * dW @ A.T), (A.grad, 3 * B.T @ dW)):
            error = (grad - projected).norm() / projected.norm()
            assert float(error.detach()) < 1e-4, name


@pytest.mark.method
def test_an_update_moves_the_merged_weight_as_computed_by_hand():
    """At the largest rank, which is the full one for keys and values. Plain gradient descent, with
    the norm of all gradients clipped at 1."""
    model, tokenizer = adapted(rank=64, alpha=128)
    plain = with_merged_weights(model)
    plain.model.visual.requires_grad_(False)
    backward(plain, tokenizer)
    before = {name: (layer.lora_A.default.weight.detach().clone(),
                     layer.lora_B.default.weight.detach().clone()) for name, layer in layers(model)}
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    backward(model, tokenizer)
    norm = update(model, sgd, 0.1, ALONE)
    after, lr, s = dict(merged_weights(model)), 0.1 / max(1.0, norm), 2.0
    for name, (A, B) in before.items():
        W, dW = plain.get_submodule(name).weight.detach(), plain.get_submodule(name).weight.grad
        moved = (B - lr * s * dW @ A.T) @ (A - lr * s * B.T @ dW) - B @ A
        got = after[name + ".weight"] - W
        assert float(got.norm()) > 1e-4, name
        assert float((got - s * moved).norm() / got.norm()) < 2e-3, name


@pytest.mark.method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_adapters_trains(dtype):
    """Counted; and the frozen weights are the tensors that were loaded, bit for bit."""
    model, tokenizer = vlm.load("tiny", dtype=dtype)
    old = dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in old.items()}
    before = copy.deepcopy({name: p.detach() for name, p in old.items()})
    lora.adapt(model, config(model="base", lora_rank=4), None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 4 and all(".language_model.layers." in name for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    wide = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256)          # q, o; k, v; the MLP
    assert sum(p.numel() for p in trained.values()) == 4 * 4 * wide
    adam = make_optimizer(model, 1e-2)
    assert {id(p) for p in adam.param_groups[0]["params"]} == {id(p) for p in trained.values()}
    for _ in range(2):                                     # A has no gradient while B is 0
        backward(model, tokenizer)
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == trained.keys()
        assert update(model, adam, 1e-2, ALONE) > 0
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()
              if name not in trained}
    assert {name: p.data_ptr() for name, p in frozen.items()} == places
    assert same({name: p.detach() for name, p in frozen.items()}, before)
    after = dict(merged_weights(model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == 7 * 4 and after.keys() == before.keys()


@pytest.mark.method
def test_new_adapters_change_nothing_and_depend_on_the_seed_alone():
    model, tokenizer = adapted(rank=8, shaken=False)
    plain, _ = shaken_tiny()
    assert same(dict(merged_weights(model)), {n: p.detach() for n, p in plain.named_parameters()})
    assert torch.equal(logprobs(model, tokenizer), logprobs(plain, tokenizer))
    torch.rand(3)
    again, other = [vlm.load("tiny")[0] for _ in range(2)]
    lora.adapt(again, config(model="base", lora_rank=8), None)
    lora.adapt(other, config(model="base", lora_rank=8, seed=1), None)
    first = lora.adapter_weights(model)
    assert same(dict(first), lora.adapter_weights(again))
    assert not same(dict(first), lora.adapter_weights(other))


# --------------------------------------------------------------------------------------------------
# one policy

@pytest.mark.method
def test_merged_and_unmerged_are_one_policy_in_float32():
    model, tokenizer = adapted(rank=16)
    plain = with_merged_weights(model)
    gap = (logprobs(model, tokenizer) - logprobs(plain, tokenizer)).abs()
    assert float(gap.mean()) < 1e-6 and float(gap.max()) < 1e-5
    start, _ = shaken_tiny()
    assert float((logprobs(model, tokenizer) - logprobs(start, tokenizer)).abs().mean()) > 1e-2


@pytest.mark.method
def test_a_bfloat16_weight_is_rounded_once():
    model, _ = adapted(rank=16, dtype=torch.bfloat16)
    after = dict(merged_weights(model))
    for name, layer in layers(model):
        A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
        exact = layer.base_layer.weight.double() + 2 * B.double() @ A.double()
        error = (after[name + ".weight"].double() - exact).abs()
        assert bool((error <= exact.abs() * 2.0 ** -8 + 1e-7).all()), name
        assert after[name + ".weight"].dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------
# runs

@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    """A run with adapters on the shared run's model: two steps of cold start, three of RL."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(os.path.realpath(run.model), folder / "base")
    how = {**run.how, **SHORT, "model": str(folder / "base"), "lora_rank": 4, "rl_steps": 3}
    out = str(folder / "out")
    alone(**how, out_dir=out)
    return how, out


def test_the_checkpoint_is_merged_and_loads_anywhere(tuned):
    how, out = tuned
    model = AutoModelForImageTextToText.from_pretrained(f"{out}/model", dtype=torch.float32)
    start = AutoModelForImageTextToText.from_pretrained(how["model"], dtype=torch.float32)
    assert type(model) is type(start)
    assert model.state_dict().keys() == start.state_dict().keys()
    with_adapter = peft.PeftModel.from_pretrained(start, f"{out}/model/adapter")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected = with_adapter(input_ids=ids).logits
        unadapted = AutoModelForImageTextToText.from_pretrained(
            how["model"], dtype=torch.float32)(input_ids=ids).logits
        got = model(input_ids=ids).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert float((got - unadapted).abs().max()) > 1e-2
    with open(f"{out}/model/adapter/adapter_config.json") as f:
        options = json.load(f)
    assert options["r"] == 4 and options["base_model_name_or_path"] == how["model"]
    merged_by_peft = with_adapter.merge_and_unload().state_dict()
    for name, w in model.state_dict().items():
        assert torch.allclose(w, merged_by_peft[name], atol=1e-6), name
    assert len(state(out)["optimizer"]["state"]) == 2 * 7 * 4
    assert not vlm.load(f"{out}/model")[0].training


def test_a_stopped_run_goes_on_bit_for_bit(tuned, tmp_path):
    how, out = tuned
    for rl_steps in (1, 3):
        alone(**{**how, "rl_steps": rl_steps, "eval_every": 0}, out_dir=str(tmp_path / "out"))
    assert same(weights(tmp_path / "out"), weights(out))
    adapters = [f"{folder}/model/adapter" for folder in (out, tmp_path / "out")]
    assert fingerprint(adapters[0]) == fingerprint(adapters[1])


def test_ranks_that_share_videos_and_layers_that_are_recomputed_learn_the_same(tuned, tmp_path):
    how, out = tuned
    result = ended(launched(*flags(**how, stage2=True, checkpointing=True, out_dir=tmp_path)))
    assert result.code == 0, result.err
    close(metrics(out), metrics(tmp_path), within=5e-3)
    got, expected = weights(tmp_path), weights(out)
    for name, w in expected.items():
        assert torch.allclose(got[name], w, atol=2e-4), name


# --------------------------------------------------------------------------------------------------
# what is refused

def test_a_model_made_from_nothing_has_nothing_to_adapt():
    refused(dict(lora_rank=4), "made from nothing", "--model=out/model --sft_steps=0")


@pytest.mark.method
def test_fsdp_is_refused_where_it_would_shard():
    c = config(model="base", lora_rank=4, fsdp=True)
    command_line.check_training(c, ALONE)
    with pytest.raises(ValueError, match="lora_rank = 4 with fsdp.*--fsdp=false"):
        command_line.check_training(c, Ranks(world=2, sp=2))
    for wrong in ({"lora_rank": -1}, {"lora_alpha": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            command_line.check_training(replace(c, fsdp=False, **wrong), ALONE)


def test_a_rank_larger_than_a_layer_is_refused(run, tmp_path):
    refused({**run.how, "model": run.model, "lora_rank": 65, "out_dir": tmp_path},
            "lora_rank = 65 is larger than", "k_proj", "128 -> 64", "at most 64")


def test_an_adapter_is_no_model(tuned, tmp_path):
    """transformers would load its base, wherever that is, and put the adapter into it."""
    how, out = tuned
    for name in (f"{out}/model/adapter", f"{out}/model/adapter/"):
        with pytest.raises(ValueError, match="an adapter of .*/base, not a model.*out/model$"):
            vlm.load(name)
    shutil.copytree(os.path.realpath(f"{out}/model"), tmp_path / "both")
    shutil.copy(f"{out}/model/adapter/adapter_config.json", tmp_path / "both")
    refused({**how, "model": str(tmp_path / "both"), "out_dir": tmp_path}, "is an adapter of")
    with pytest.raises(ValueError, match="an adapter of .*/base, not a model"):
        bench.run(bench.parse([f"--memory={out}/model/adapter"]))
    (tmp_path / "both" / "adapter_config.json").write_text("{")
    refused({**how, "model": str(tmp_path / "both"), "out_dir": tmp_path}, "is an adapter of")


def test_a_run_goes_on_with_the_same_flags_alone(tuned):
    how, out = tuned
    for other, words in (({"lora_rank": 0}, "lora_rank = 4 there, 0 here"),
                         ({"lora_rank": 8}, "lora_rank = 4 there, 8 here"),
                         ({"lora_alpha": 8}, "lora_alpha = 32 there, 8 here")):
        refused({**how, **other, "out_dir": out}, words)


def test_a_base_that_is_gone_or_changed_is_named(tuned, tmp_path):
    """A link like out/model moves when its own run goes on: the adapter would be added to other
    weights without a word."""
    how, out = tuned
    here = {**how, "out_dir": str(tmp_path / "out"), "model": str(tmp_path / "base")}
    shutil.copytree(how["model"], tmp_path / "base")
    alone(**{**here, "rl_steps": 0})
    more = {**here, "rl_steps": 1}
    newest = os.path.realpath(tmp_path / "out" / "model")
    remedy = f"--model={newest}"
    shutil.move(tmp_path / "base", tmp_path / "moved")
    refused(more, f"an adapter of {tmp_path}/base", "gone", remedy)
    model, tokenizer = vlm.load(str(tmp_path / "moved"))
    with torch.no_grad():
        model.model.language_model.layers[2].mlp.up_proj.weight[3, 5] += 0.01
    vlm.save(model, tokenizer, str(tmp_path / "base"))
    refused(more, f"an adapter of {tmp_path}/base", "other weights now", remedy)
    shutil.rmtree(tmp_path / "base")
    shutil.move(tmp_path / "moved", tmp_path / "base")
    path = os.path.join(newest, "adapter", "adapter_model.safetensors")
    with open(path, "r+b") as f:
        f.truncate(1000)
    refused(more, path, "missing or damaged")
    os.remove(path)
    refused(more, path, "missing or damaged")
    os.remove(os.path.join(newest, "adapter", "base.json"))
    refused(more, "base.json: missing or damaged")


def test_a_mixture_of_experts_is_refused():
    model, _ = tiny_qwen3("qwen3_vl_moe")
    with pytest.raises(ValueError, match="lora_rank = 4: a mixture of experts"):
        lora.adapt(model, config(model="base", lora_rank=4), None)


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model, _ = vlm.load("tiny")
    with pytest.raises(ValueError, match="lora_rank needs peft: pip install -r requirements.txt"):
        lora.adapt(model, config(model="base", lora_rank=4), None)


@pytest.mark.method
def test_the_memory_table_takes_adapters_alone(capsys):
    bench.run(bench.parse(["--memory=3b", "--lora_rank=32", "--frames=64", "--sp=1"]))
    assert "LoRA rank = 32" in capsys.readouterr().out
    for wrong in (["--lora_rank=32"], ["--memory=3b", "--lora_rank=32", "--shards=2"]):
        with pytest.raises(ValueError, match="--lora_rank is for --memory, without --shards"):
            bench.parse(wrong)
    with pytest.raises(ValueError, match="lora_rank = 65 is larger than"):
        bench.run(bench.parse(["--memory=tiny", "--lora_rank=65"]))
