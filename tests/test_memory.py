"""python -m pytest tests/test_memory.py -q

The computed memory is what a real step takes, and the computed FLOPs are what torch counts.
"""
import weakref

import pytest
import torch
from runs import config
from test_bench import SMALL, make_row
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as vlm
import rollout
from flow import Ranks
from plumbing import flops, lora, memory
from plumbing.optimizer import make_optimizer
from plumbing.vllm_engine import MOST_BANNED

SMALL_SHAPE = {
    "text_config": dict(
        hidden_size=192, intermediate_size=640, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, vocab_size=3000, tie_word_embeddings=True,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}),
    "vision_config": dict(
        depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=192),
    "tie_word_embeddings": True}


class Live(TorchDispatchMode):
    """How many bytes the tensors made inside it take, and the most they took at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = weakref.WeakSet(), 0

    def now(self):
        """Their sizes now, not those they were made with: FSDP empties and fills storages."""
        return sum(storage.nbytes() for storage in self.storages)

    def watch(self, phase, call, most):
        """call, but most[phase] is set to the most bytes that it took at once."""
        def watched(*args, **how):
            self.most = before = self.now()
            result = call(*args, **how)
            most[phase] = self.most - before
            return result

        return watched

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        new = [storage for storage in storages_of(out) if storage not in self.storages]
        if new:                                            # not views, nor what is written in place
            known = {storage._cdata for storage in storages_of((args, kwargs))}
            self.storages.update(storage for storage in new if storage._cdata not in known)
            self.most = max(self.most, self.now())
        return out


def storages_of(tree):
    """Those of the tensors in a tree; a DTensor's are those of the tensors in it."""
    storages = set()
    for x in tree_leaves(tree):
        if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
            storages.add(x.untyped_storage())
    return storages


def nbytes(tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("name, dtype, other", [
    ("tiny", "float32", {"frames": 64, "size": 112, "group": 8, "completion": 32}),
    ("tiny", "bfloat16",
     {"frames": 256, "size": 112, "group": 4, "completion": 32, "checkpointing": 1}),
    ("small", "bfloat16", {"frames": 16, "size": 112, "group": 16, "completion": 100}),
    ("small", "float32",
     {"frames": 64, "size": 112, "group": 4, "completion": 40, "checkpointing": 1}),
    ("glm", "float32", {"frames": 8, "size": 56, "group": 8, "completion": 64}),
    ("qwen3", "float32", {"frames": 64, "size": 64, "group": 8, "completion": 64}),
    ("qwen3", "float32",
     {"frames": 64, "size": 64, "group": 8, "completion": 64, "checkpointing": 1}),
    ("tiny", "float32", {"frames": 64, "size": 112, "group": 8, "completion": 32, "lora_rank": 8}),
    ("small", "bfloat16",
     {"frames": 16, "size": 112, "group": 16, "completion": 100, "lora_rank": 32}),
    ("tiny", "bfloat16", {"frames": 256, "size": 112, "group": 4, "completion": 32,
                          "checkpointing": 1, "lora_rank": 8})])
def test_memory_is_what_a_step_takes(name, dtype, other, monkeypatch, tmp_path):
    """Tensors to the byte, what is kept for the backward within 2%, the most at once within 5%."""
    if name in ("glm", "qwen3"):
        from tiny_families import tiny_glm, tiny_qwen3
        model, tokenizer = tiny_glm() if name == "glm" else tiny_qwen3()
        model.pixels.video_pixels = (1, 10 ** 9)
        name = str(tmp_path)
        vlm.save(model, tokenizer, name)
    monkeypatch.setitem(memory.SHAPES, "small", SMALL_SHAPE)
    row = make_row("shared", model=name, cache="warm", dtype=dtype, **other)
    work, live, most, attentions = bench.Workload(row, Ranks()), Live(), {}, []
    if row.lora_rank:
        lora.adapt(work.model, config(model="base", lora_rank=row.lora_rank), None)
        work.optimizer = make_optimizer(work.model, bench.LR)
    prompt = work.prompt()
    computed = memory.memory(
        work.model.config, row.frames, row.size, row.group, row.completion, getattr(torch, dtype),
        checkpointing=row.checkpointing, text=len(prompt.ids) - len(prompt.vision),
        lora_rank=row.lora_rank)

    class Kept(rollout.SharedPrefix):
        def __init__(self, *args):
            super().__init__(*args)
            attentions.append(self)

    update = bench.update
    monkeypatch.setattr(rollout, "SharedPrefix", Kept)
    monkeypatch.setattr(rollout, "rollout", live.watch("rollout", rollout.rollout, most))
    monkeypatch.setattr(bench, "forward_backward",
                        live.watch("training", bench.forward_backward, most))
    monkeypatch.setattr(bench, "update", lambda *args: 0.0)
    work.step(0, bench.Clock())                            # leaves gradients: the next adds to them
    monkeypatch.setattr(bench, "update", update)
    with live:
        work.step(1, bench.Clock())

    assert computed["vision"] == prompt.vision.nbytes
    assert computed["weights"] == nbytes(work.model.parameters())
    copies = work.optimizer.param_groups[0]["params"]
    moments = []
    for state in work.optimizer.state.values():
        moments += [x for x in state.values() if x.ndim]
    copied = dtype != "float32" and not row.lora_rank
    in_float32 = nbytes(copies) if copied else 0
    assert computed["optimizer"] == nbytes(moments) + in_float32
    trained = [p for p in work.model.parameters() if p.requires_grad]
    assert computed["gradients"] == nbytes(trained)
    prefix = [x for pair in attentions[-1].prefix.values() for x in pair]
    completions = [x for pair in attentions[-1].completions.values() for x in pair]
    assert computed["prefix_kv"] == nbytes(prefix)
    assert computed["completion_kv"] == nbytes(completions)
    always = computed["weights"] + computed["optimizer"] + computed["vision"]
    in_rollout = computed["in_rollout"] - always
    in_training = computed["in_training"] - always - computed["gradients"]
    assert in_rollout == pytest.approx(most["rollout"], rel=0.05)
    assert in_training == pytest.approx(most["training"], rel=0.05)
    assert computed["activations"] == pytest.approx(work.saved_bytes(), rel=0.02)


def test_named_shapes_have_the_published_number_of_weights(capsys):
    """Of the total_size in their model.safetensors.index.json."""
    for name, weights in (("2b", 2_127_532_032), ("4b", 4_437_815_808), ("8b", 8_767_123_696),
                          ("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        config = memory.read_config(name)
        parameters = memory.count_parameters(config)
        assert parameters.tower + parameters.trained == weights
    assert memory.memory(config, 64, 308, 8, 512)["weights"] == 2 * weights
    few, many = [memory.memory(config, frames, 308, 8, 512, sp=4, checkpointing=1, shards=8)
                 for frames in (64, 1024)]
    assert few["optimizer"] == many["optimizer"]
    assert 15.9 < many["vision"] / few["vision"] < 16.1
    assert few["most"] < many["most"]
    bench.run(bench.parse(["--memory=7b", "--frames=64,3600", "--size=308", "--sp=1,4"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[3].endswith("made for")
    assert not lines[2].endswith("made for")


def test_the_table_of_a_checkpoint_directory_is_that_of_its_config(capsys, tmp_path):
    vlm.save(*vlm.load("tiny"), str(tmp_path))
    tables = []
    for name in ("tiny", str(tmp_path)):
        bench.run(bench.parse([f"--memory={name}", "--frames=8", "--sp=1"]))
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_random_weights_in_a_named_shape_are_made_in_their_dtype(monkeypatch):
    """And alike in two processes: all ranks must have one model."""
    monkeypatch.setitem(memory.SHAPES, "small", SMALL_SHAPE)
    a, b = [bench.load("small", "cpu", torch.bfloat16, 3)[0] for _ in range(2)]
    for x, y in zip(a.parameters(), b.parameters()):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, y)
    assert a.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_few_enough_ids_are_banned_for_vllm(monkeypatch):
    """On a GPU it takes a bias for at most 1,024 ids. In the shape of 3b all ids that the tiny
    model's tokenizer does not have were banned, some 151,000 of them."""
    text = SMALL_SHAPE["text_config"] | {"vocab_size": 5000}
    monkeypatch.setitem(memory.SHAPES, "small", SMALL_SHAPE | {"text_config": text})
    for name in ("tiny", "small"):
        work = bench.Workload(make_row("shared", model=name), Ranks())
        stops = vlm.stop_ids(work.model, work.tokenizer)
        assert work.banned[stops].all() and 0 < int(work.banned.sum()) <= MOST_BANNED


def test_train_flops_are_those_of_the_matrices():
    """As torch counts them, which counts the head's forward twice. Without attention, where it also
    counts pairs that do not see each other."""
    work = bench.Workload(make_row("shared", frames=32), Ranks())
    counter = FlopCounterMode(display=False)
    P = len(work.prompt().ids)
    work.step(0, bench.Clock(), lambda: counter)
    counted = 0
    for operation, n in counter.get_flop_counts()["Global"].items():
        if "attention" not in str(operation):
            counted += n
    m, G, L = memory.sizes(work.model.config), SMALL["group"], SMALL["completion"]
    pairs = P ** 2 / 2 + G * ((L - 1) * P + (L - 1) ** 2 / 2)
    attention = 3 * 2 * m.layers * 2 * m.heads * m.head_dim * pairs
    head_again = 2 * G * L * m.hidden * m.vocabulary
    flop = flops.train_flops(work.model.config, P, G, L)
    assert flop - attention + head_again == pytest.approx(counted, rel=0.01)


def test_the_share_of_a_peak_is_known_for_named_gpus_alone():
    assert flops.peak_share(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert flops.peak_share(989e12, 2.0, "cpu") is None
