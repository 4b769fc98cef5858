"""python -m pytest tests/test_bench.py -q

The variants do the same work by other ways: same completions, loss and gradient. The rows of two ranks are real runs.
"""
import json
import re
import shlex
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import encode
import grpo
import model as vlm
import rollout
import train

SMALL = {"frames": 5, "size": 56, "group": 4, "completion": 5, "steps": 1, "warmup": 0}


def settings(variant, **other):
    return SimpleNamespace(**bench.SETTINGS | SMALL | {"sp": 1, "variant": variant, "cache": "cold"} | other)


def one_step(variant, monkeypatch, **other):
    """-> (what step returned, loss, gradient, tokens, counts, phases) of the first step."""
    work, losses, tokens, kept = bench.Work(settings(variant, **other), encode.Ranks()), [], [], {}
    objective, update, one = grpo.policy_loss, train.update, train.grpo_step

    def noted_loss(logprobs, old, advantages, *rest, **more):                  # on-policy the loss is 0: make it speak
        loss, metrics = objective(logprobs, old - 0.1 * torch.arange(logprobs.shape[1]), advantages, *rest, **more)
        losses.append(float(loss.detach()))
        return loss, metrics

    def noted_step(model, groups, *rest, **more):
        tokens.extend(x.tokens.tolist() for g in groups for x in g.completions)
        return one(model, groups, *rest, **more)

    def noted_update(model, *rest):
        kept["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return update(model, *rest)

    monkeypatch.setattr(grpo, "policy_loss", noted_loss)
    monkeypatch.setattr(train, "grpo_step", noted_step)
    monkeypatch.setattr(train, "update", noted_update)
    clock = train.Clock()
    result = work.step(0, clock)
    monkeypatch.undo()
    return SimpleNamespace(**result, loss=sum(losses), tokens=tokens, count=dict(work.count), phases=set(clock.seconds), **kept)


def test_variants_are_the_same_step_and_the_hooks_count_what_each_computes(monkeypatch):
    naive, reuse, shared = (one_step(v, monkeypatch) for v in ("naive", "reuse", "shared"))
    for other in (reuse, shared):
        assert other.tokens == naive.tokens and abs(naive.loss) > 1e-3
        assert other.loss == pytest.approx(naive.loss, rel=1e-4)
        assert other.norm == pytest.approx(naive.norm, rel=1e-4)
        assert float((other.gradient - naive.gradient).norm() / naive.gradient.norm()) < 1e-4
    assert max(x.gap for x in (naive, reuse, shared)) < 1e-4
    assert all(len(t) == 5 for t in naive.tokens) and len(naive.tokens) == 4
    G, L, S = 4, 5, naive.prompt_tokens
    assert naive.count["lm"] == reuse.count["lm"] == G * S + G * (L - 1) + G * (S + L - 1)
    assert shared.count["lm"] == 2 * S + 2 * G * (L - 1)
    assert naive.count["temporal"] == 2 * G * 3                                # before the rollout, and before training
    assert reuse.count["temporal"] == shared.count["temporal"] == 3
    assert naive.phases == shared.phases == {"encode", "rollout", "train"}


def test_a_warm_cache_encodes_nothing_and_a_group_of_one_runs(monkeypatch):
    work = bench.Work(settings("shared", cache="warm", group=1), encode.Ranks())
    work.see()
    work.count.clear()
    norm = work.step(0, train.Clock())["norm"]
    assert work.count["temporal"] == 0 and norm > 0
    assert work.saved_bytes() > 0


def test_saved_bytes_grow_with_completions_by_less_than_the_prefix(monkeypatch):
    def saved(variant, group):
        work = bench.Work(settings(variant, frames=32, group=group), encode.Ranks())
        return work.saved_bytes()
    assert saved("shared", 4) < 1.7 * saved("shared", 1)
    assert saved("naive", 4) == saved("naive", 1)                              # it keeps one pass at a time


def test_checkpointing_keeps_less_and_gives_the_same_gradient(monkeypatch):
    plain, again = (one_step("shared", monkeypatch, frames=32, checkpointing=on) for on in (0, 1))
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)
    assert float((again.gradient - plain.gradient).norm() / plain.gradient.norm()) < 1e-6
    kept = [bench.Work(settings("shared", frames=32, checkpointing=on), encode.Ranks()).saved_bytes() for on in (0, 1)]
    assert kept[1] < kept[0] / 3


def test_compiled_layers_give_the_same_gradient_in_one_graph_and_keep_less(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (one_step("shared", monkeypatch, frames=32, compile=on) for on in (0, 1))
    assert compiled.tokens == plain.tokens and compiled.gap < 1e-5             # sampled by layers that are not compiled
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
    assert float((compiled.gradient - plain.gradient).norm() / plain.gradient.norm()) < 1e-5
    kept = [bench.Work(settings("shared", frames=48, compile=on), encode.Ranks()).saved_bytes() for on in (0, 1)]       # another length
    assert kept[1] < 0.85 * kept[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Live(TorchDispatchMode):
    """How many bytes the tensors made inside it take, and the most they took at once."""

    def __init__(self):
        super().__init__()
        self.made, self.most = weakref.WeakSet(), 0

    def now(self):
        return sum(s.nbytes() for s in self.made)          # not as they were made: FSDP empties storages and fills them again

    def watch(self, phase, call, most):
        """call, and most[phase]: the most bytes that it took at once."""
        def watched(*args, **how):
            self.most = before = self.now()
            result = call(*args, **how)
            most[phase] = self.most - before
            return result
        return watched

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        storages = lambda tree: {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)}
        known = {s._cdata for s in storages((args, kwargs))}                   # views and what is written in place
        out = operation(*args, **(kwargs or {}))
        self.made.update(s for s in storages(out) if s._cdata not in known)
        self.most = max(self.most, self.now())
        return out


SMALL_SHAPE = {"text_config": dict(hidden_size=192, intermediate_size=640, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3,
                                   vocab_size=3000, tie_word_embeddings=True, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None,
                                   rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}),
               "vision_config": dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=192), "tie_word_embeddings": True}


@pytest.mark.parametrize("name, dtype, other", [
    ("tiny", torch.float32, {"frames": 64, "size": 112, "group": 8, "completion": 32}),
    ("tiny", torch.bfloat16, {"frames": 256, "size": 112, "group": 4, "completion": 32, "checkpointing": 1}),
    ("small", torch.bfloat16, {"frames": 16, "size": 112, "group": 16, "completion": 100}),
    ("small", torch.float32, {"frames": 64, "size": 112, "group": 4, "completion": 40, "checkpointing": 1}),
    ("glm", torch.float32, {"frames": 8, "size": 56, "group": 8, "completion": 64})])
def test_memory_is_what_a_step_takes(name, dtype, other, monkeypatch, tmp_path):
    """Tensors to the byte, what is kept for the backward within 2%, the most at once within 5%."""
    if name == "glm":
        from test_families import tiny_glm
        name = str(tmp_path)
        vlm.save(*tiny_glm(), name)
    monkeypatch.setitem(bench.SHAPES, "small", SMALL_SHAPE)
    dtype_name = str(dtype).removeprefix("torch.")
    work, live, most, layouts = bench.Work(settings("shared", model=name, cache="warm", dtype=dtype_name, **other), encode.Ranks()), Live(), {}, []
    a, prompt = work.a, work.see()
    computed = bench.memory(work.model.config, a.frames, a.size, a.group, a.completion, dtype, checkpointing=a.checkpointing,
                            text=len(prompt.ids) - len(prompt.vision))

    class Kept(rollout.SharedPrefix):
        def __init__(self, *args):
            super().__init__(*args)
            layouts.append(self)

    monkeypatch.setattr(rollout, "SharedPrefix", Kept)
    monkeypatch.setattr(rollout, "rollout", live.watch("rollout", rollout.rollout, most))
    monkeypatch.setattr(train, "grpo_step", live.watch("training", train.grpo_step, most))
    update = train.update
    monkeypatch.setattr(train, "update", lambda *args: 0.0)
    with live:
        work.step(0, train.Clock())                        # leaves gradients: the next step adds to them
        monkeypatch.setattr(train, "update", update)
        work.step(1, train.Clock())
    size = lambda tensors: sum(x.nbytes for x in tensors)
    kept = work.optimizer.param_groups[0]["params"]
    state = [x for s in work.optimizer.state.values() for x in s.values() if x.ndim]
    assert computed["vision"] == prompt.vision.nbytes and computed["weights"] == size(work.model.parameters())
    assert computed["optimizer"] == size(state) + size(x for x in kept if dtype != torch.float32)
    assert computed["gradients"] == size(p for p in work.model.parameters() if p.requires_grad)
    assert computed["prefix_kv"] == size(x for pair in layouts[-1].prefix.values() for x in pair)
    assert computed["completion_kv"] == size(x for pair in layouts[-1].completions.values() for x in pair)
    always = computed["weights"] + computed["optimizer"] + computed["vision"]
    assert computed["in_rollout"] - always == pytest.approx(most["rollout"], rel=0.05)
    assert computed["in_training"] - always - computed["gradients"] == pytest.approx(most["training"], rel=0.05)
    saved = computed["activations"] + (0 if a.checkpointing else computed["masks"])        # under checkpointing no layer saves its mask
    assert saved == pytest.approx(work.saved_bytes(), rel=0.02)


def test_named_shapes_have_the_published_number_of_weights(capsys):
    for name, weights in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):       # of the total_size in their model.safetensors.index.json
        config = bench.Qwen2_5_VLConfig(**bench.SHAPES[name])
        with torch.device("meta"):
            model = bench.AutoModelForImageTextToText.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == weights
    assert bench.memory(config, 64, 308, 8, 512)["weights"] == 2 * weights
    few, many = (bench.memory(config, n, 308, 8, 512, sp=4, checkpointing=1, shards=8) for n in (64, 1024))
    assert few["optimizer"] == many["optimizer"] and 15.9 < many["vision"] / few["vision"] < 16.1 and few["most"] < many["most"]
    bench.main(bench.parse(["--memory=7b", "--frames=64,3600", "--size=308", "--sp=1,4"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3].endswith("made for") and not lines[2].endswith("made for")


def test_random_weights_in_a_named_shape_are_made_in_their_dtype(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL_SHAPE)
    a, b = (bench.load("small", "cpu", torch.bfloat16, 3)[0] for _ in range(2))
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))       # alike on all ranks
    assert a.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_train_flops_are_those_of_the_matrices():
    """As torch counts them, and it counts the head's forward twice. Attention apart, where it counts also pairs that do not see each other."""
    work, counter = bench.Work(settings("shared", frames=32), encode.Ranks()), FlopCounterMode(display=False)

    def counted(step):
        with counter:
            return step()
    prompt = len(work.see().ids)
    work.step(0, train.Clock(), counted)
    torchs = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation))
    m, G, L = bench.sizes(work.model.config), 4, 5
    attention = 3 * 2 * m.n * 2 * m.H * m.d * (prompt ** 2 / 2 + G * ((L - 1) * prompt + (L - 1) ** 2 / 2))
    assert bench.train_flops(work.model.config, prompt, G, L) - attention + 2 * G * L * m.D * m.V == pytest.approx(torchs, rel=0.01)


def commands(text, script):
    """The arguments of each command line of script in a page, or a docstring; what follows them is prose."""
    text = re.sub(r"\\+\s*\n[^\S\n]*", "", text)
    for launcher, line in re.findall(rf"^ +(?:.*?  )?((?:torchrun|python) .*?){script}((?: .*)?)$", text, re.M):
        ranks = int((re.search(r"--nproc_per_node=(\d+)", launcher) or [0, 1])[1])
        yield ranks, [word.strip(",") for word in shlex.split(re.match(r"(?: --\S+)*", line)[0])]


HEADS = {"Qwen/Qwen2.5-VL-3B-Instruct": (16, 2), "Qwen/Qwen2.5-VL-7B-Instruct": (28, 4), "zai-org/GLM-4.1V-9B-Thinking": (32, 2)}


@pytest.mark.parametrize("page, least", [("train.py", 8), ("README.md", 3), ("bench.py", 3), ("assets/speed.md", 3)])
def test_every_command_line_shown_can_be_parsed(page, least):
    """Those of train.py also pass its check for the ranks that they name, and stage 2 can share out the heads."""
    text, seen = (Path(bench.__file__).parent / page).read_text(), 0
    text = text.split('"""')[1] if page.endswith(".py") else text
    for world, given in commands(text, "train.py"):
        c = train.parse(given)
        sp = c.sp or world
        ranks = encode.Ranks(world=world, sp=sp, dp=world // sp)
        train.check(c, ranks)
        assert world % sp == 0
        if c.stage2:
            encode.check_heads(*HEADS[c.model], ranks)
        seen += 1
    for _, given in commands(text, "bench.py"):
        bench.parse(given)
        seen += 1
    assert seen >= least, f"{seen} commands found in {page}"


def test_noise_video_is_a_function_of_seed_and_frame_in_any_slices():
    video = bench.noise_video(6, 28, seed=3)
    whole = video.read(0, 6)
    assert whole.shape == (6, 28, 28, 3) and whole.dtype == np.uint8
    assert (np.concatenate([video.read(0, 1), video.read(1, 4), video.read(4, 6)]) == whole).all()
    assert (bench.noise_video(6, 28, seed=4).read(0, 6) != whole).any() and (whole[0] != whole[1]).any()


def test_rows_of_two_ranks(capsys, monkeypatch, tmp_path):
    """They are started, each row alone in its processes; one JSON line a row in the design's keys; the gradient of one."""
    given = [f"--{k}={v}" for k, v in SMALL.items()]
    bench.main(bench.parse([*given, "--sp=2", "--variant=shared,shared+sp", "--cache=cold", f"--plot={tmp_path}/plot.png"]))
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(r["variant"], r["sp"]) for r in rows] == [("shared", 2), ("shared+sp", 2)]
    for r in rows:
        assert tuple(r) == bench.KEYS
        assert r["encodes"] == 1 and 0 < r["encode_s"] + r["rollout_s"] + r["train_s"] <= r["seconds"] + 1e-3
        assert r["peak_mb"] > 100 and r["device"]
    assert 0 < rows[1]["saved_mb"] < rows[0]["saved_mb"]                       # stage 2 holds a part of the sequence
    P, G, L = rows[0]["prompt_tokens"], 4, 5
    assert rows[0]["lm_tokens"] == 2 * 2 * P + 2 * G * (L - 1)                 # each rank its own prefix
    computed = bench.memory(vlm.build_tiny()[0].config, 5, 56, G, L, torch.float32, sp=2, text=P - 12)         # 12 vision tokens
    assert computed["activations"] + computed["masks"] == pytest.approx(rows[1]["saved_mb"] * 2 ** 20, rel=0.05)
    table = [line.split() for line in out.splitlines() if line.split()[:1] == ["5"]]
    work = bench.Work(settings("shared"), encode.Ranks())
    alone = work.step(0, train.Clock())["norm"]
    assert [float(line[-1]) for line in table] == pytest.approx([alone, alone], rel=1e-4)
    assert max(float(line[-2]) for line in table) < 1e-4                       # sampler against trainer
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_cannot_be_run_is_said_in_one_sentence(capfd):
    for given, said in ((["--frame=8"], "unknown argument"), (["frames=8"], "unknown argument"), (["--frames=8,x"], "whole numbers"),
                        (["--frames=0"], "at least 1"), (["--warmup=-1"], "at least 0"), (["--variant=fast"], "fast"),
                        (["--cache=hot"], "hot"), (["--rollout=sglang"], "sglang"), (["--checkpointing=2"], "0 or 1"),
                        (["--group=3", "--sp=2"], "not divisible"), (["--compile=1"], "do not go together")):
        with pytest.raises(ValueError, match=said) as error:
            bench.parse(given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nothing to run"):
        bench.main(bench.parse(["--variant=naive", "--cache=warm"]))
    with pytest.raises(ValueError, match="multiple of 28"):
        bench.main(bench.parse(["--variant=shared", "--sp=1", "--size=50"]))       # said by the row's own process
    assert "frames" not in capfd.readouterr().out
