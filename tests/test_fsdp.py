"""python -m pytest tests/test_fsdp.py -q

Parameters, gradients and optimizer state sharded over all ranks (--fsdp=true), against one rank
that has them whole.
"""
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import (
    ALONE,
    SMALL,
    STEPS,
    alike,
    alone,
    close,
    ended,
    flags,
    group_of,
    launched,
    learn,
    metrics,
    rollouts,
    run_of,
    same,
    weights,
)
from test_bench import make_row
from test_memory import SMALL_SHAPE, Live
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForImageTextToText

import bench
import encode
import model as vlm
import rollout as rollout_file
import train
from plumbing import memory, sharding
from plumbing.metrics import Clock
from plumbing.optimizer import make_optimizer, update
from plumbing.ranks import gather, leave
from rollout import rollout

# ranks: (sp, stage2)
LAYOUTS = {2: [(1, False), (2, False), (2, True)], 4: [(2, False), (2, True), (1, False)]}
# from a model whose tower is frozen
HOW = {**SMALL, "sft_steps": 2, "rl_steps": 4, "eval_every": 2, "save_every": 100, "show_every": 0}
MEMORY = [
    {"frames": 64, "group": 8, "completion": 40, "checkpointing": 0},
    {"frames": 64, "group": 8, "completion": 40, "checkpointing": 1},
    {"frames": 256, "group": 4, "completion": 32, "checkpointing": 1}]
BFLOAT = dict(dtype="bfloat16", sp=1, lr=1e-5, rl_steps=2, eval_every=0)


# --------------------------------------------------------------------------------------------------
# what the ranks do

def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def nbytes(tensors):
    """Of the parts that this rank holds."""
    return sum(local(x).nbytes for x in tensors)


def moments(optimizer):
    """The tensors of its state that are as large as parameters."""
    return [x for of in optimizer.state.values() for x in of.values() if x.ndim]


def some_steps(ranks, stage2, fsdp):
    """Three optimizer steps of RL on what was sampled before them, in some of which a team has
    nothing to do; one of cold start; one without a finite gradient; one of no group at all. Several
    micro-steps each, more on some ranks than on others."""
    model, tokenizer = vlm.load("tiny", seed=3)
    model.model.visual.requires_grad_(False)
    if fsdp:
        sharding.shard_parameters(model, ranks)
    run = run_of(model, tokenizer, ranks, stage2=stage2, max_tokens=150)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9)

    def mine(xs):
        return xs[ranks.dp_rank::ranks.dp]

    def whole():
        return torch.cat([w.flatten() for _, w in sharding.weights(model)])

    sampled, sums, norms, after = {}, {}, {}, {"start": whole()}

    def step(name, optimizer=optimizer):
        norms[name] = update(model, optimizer, 0.1, ranks)
        after[name] = whole()

    for name, slots in STEPS.items():
        groups = mine([group_of(slot, model, tokenizer) for slot in slots])
        keys = [[(name, g.slot, n) for n in range(4)] for g in groups]
        prompts = [g.prompt for g in groups]
        answers = rollout(model, tokenizer, prompts, keys, ranks, 100, stage2, think_budget=4,
                          answer_budget=3)
        for g, xs in zip(groups, answers):
            sampled[name, g.slot] = [x.tokens.tolist() for x in xs]
        sums[name] = learn(run, groups, len(slots) * 4)
        step(name)
    prompts = mine([(None, group_of(slot, model, tokenizer).prompt) for slot in (0, 2, 3)])
    if not stage2:
        prompts = prompts[ranks.sp_rank::ranks.sp]
    texts = ["so" + " red" * len(p.ids) for _, p in prompts]
    sums["sft"] = train.teach(run, prompts, texts, stage2)
    step("sft")
    bad = group_of(1, model, tokenizer)
    bad.completions = [replace(x, logprobs=x.logprobs * math.nan) for x in bad.completions]
    last = ranks.dp_rank == ranks.dp - 1
    learn(run, [bad] if last else [], 4)
    step("bad")
    learn(run, [], 4)
    adam = make_optimizer(model, 1e-3)
    step("none", adam)
    held = sum(local(x).numel() for x in [*adam.param_groups[0]["params"], *moments(adam)])
    sampled, norms, held = (gather(x, ranks) for x in (sampled, norms, held))
    return SimpleNamespace(sampled={k: v for part in sampled for k, v in part.items()}, sums=sums,
                           norms=norms, after=after, held=held)


class Reader:
    """An engine that takes the weights, as vLLM does, and says nothing."""
    shared = False

    def load(self, model):
        self.weights = dict(sharding.weights(model))

    def sample(self, prompts, keys, **how):
        return [[] for _ in prompts]

    def rest(self):
        pass


def tied(ranks, folder):
    """A model with one matrix for embeddings and head, as the smaller Qwen2.5-VL: sharded, changed,
    saved."""
    model, tokenizer = vlm.load("tiny", seed=3)
    model.lm_head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    sharding.shard_parameters(model, ranks)
    learn(run_of(model, tokenizer, ranks), [group_of(ranks.rank, model, tokenizer)], 4)
    norm = update(model, make_optimizer(model, 1e-2), 1e-2, ranks)
    engine = Reader()                                      # on the rank with nothing to sample too
    prompt = group_of(0, model, tokenizer).prompt
    rollout(model, tokenizer, [prompt], [[(0,)]], ranks, engine=engine)
    found = dict(sharding.weights(model))
    assert same(engine.weights, found)
    if ranks.rank == 0:
        vlm.save(model, tokenizer, f"{folder}/tied", dict(found))
        torch.save((norm, found), f"{folder}/tied.pt")


def peaks(ranks, **how):
    """-> `memory.memory` of a sharded step, sizes, and what it takes at once, per phase."""
    row = make_row("shared+sp", model="small", cache="warm", size=112, dtype="bfloat16", sp=2,
                   **how)
    work, most, live = bench.Workload(row, ranks), {}, Live()
    sharding.shard_parameters(work.model, ranks)
    work.optimizer = make_optimizer(work.model, 1e-6)
    prompt = work.prompt()
    with pytest.MonkeyPatch.context() as patch, live:
        patch.setattr(bench, "update", lambda *_: 0.0)
        work.step(0, Clock())                              # leaves gradients: the next step adds
        patch.setattr(rollout_file, "rollout", live.watch("rollout", rollout_file.rollout, most))
        patch.setattr(bench, "forward_backward",
                      live.watch("training", bench.forward_backward, most))
        work.step(1, Clock())
    update(work.model, work.optimizer, 1e-6, ranks)
    sizes = {"weights": nbytes(work.model.parameters()),
             "optimizer": nbytes(moments(work.optimizer))}
    computed = memory.memory(
        work.model.config, row.frames, row.size, row.group, row.completion, torch.bfloat16, sp=2,
        checkpointing=row.checkpointing, shards=2, text=len(prompt.ids) - len(prompt.vision))
    return computed, sizes, most


def worker(world, folder, data, eval_data):
    """What each of 2 or 4 ranks does."""
    steps = {}
    for sp, stage2 in LAYOUTS[world]:
        ranks = encode.start(sp)
        steps[sp, stage2] = some_steps(ranks, stage2, True)
    if ranks.rank == 0:
        torch.save(steps, f"{folder}/steps{world}.pt")

    def go(out, **how):
        options = {**HOW, "model": f"{folder}/base/model", "data": data, "eval_data": eval_data,
                   "fsdp": True, "out_dir": f"{folder}/{out}", **how}
        train.main(train.parse(flags(**options)))

    if world == 2:
        tied(ranks, folder)
        text = SMALL_SHAPE["text_config"] | {"num_key_value_heads": 2}
        memory.SHAPES["small"] = SMALL_SHAPE | {"text_config": text}
        found = [peaks(ranks, **how) for how in MEMORY]
        untied = {"tie_word_embeddings": False}
        memory.SHAPES["small"] = SMALL_SHAPE | {"text_config": text | untied} | untied
        found.append(peaks(ranks, **MEMORY[0]))
        if ranks.rank == 0:
            torch.save(found, f"{folder}/memory.pt")
        go("two", rl_steps=2)
        go("bfloat", **BFLOAT)
        go("parts", **BFLOAT | {"rl_steps": 1})
        go("parts", **BFLOAT)
        go("plain", **BFLOAT, fsdp=False)
        go("made", model="tiny", align_steps=1, sft_steps=1, rl_steps=1, eval_every=0)
    else:
        go("four", sp=2, stage2=True, checkpointing=True)
    leave()


@pytest.fixture(scope="module")
def ran(files, tmp_path_factory):  # noqa: F811
    """Two ranks; then of a run of theirs the rest by four, and by one without fsdp; and all of it
    by one without, never stopped."""
    folder = tmp_path_factory.mktemp("fsdp")
    how = {"data": files.data, "eval_data": files.eval_data}
    alone(**{**SMALL, **how, "rl_steps": 0, "eval_every": 0, "out_dir": folder / "base"})
    for world in (2, 4):
        result = ended(launched(str(world), str(folder), files.data, files.eval_data,
                                script=os.path.abspath(__file__), world=world))
        assert result.code == 0, result.err
        if world == 2:
            shutil.copytree(folder / "two", folder / "four", symlinks=True)
    for out in ("two", "one"):
        alone(**{**HOW, **how, "model": folder / "base" / "model", "out_dir": folder / out})
    steps = {}
    for world in (2, 4):
        for layout, x in torch.load(folder / f"steps{world}.pt", weights_only=False).items():
            steps[world, *layout] = x
    return SimpleNamespace(folder=folder, alone=some_steps(ALONE, False, False), steps=steps)


def state(folder):
    return torch.load(folder / "model" / "training_state.pt", weights_only=False)


# --------------------------------------------------------------------------------------------------
# what must come of it

def test_steps_are_those_of_one_rank_that_holds_everything(ran):
    """Gradients averaged instead of summed, or summed over the sp ranks of stage 2 once too often,
    are off by 2."""
    one = ran.alone
    for how, got in ran.steps.items():
        assert got.sampled == one.sampled and len(got.sampled) == sum(map(len, STEPS.values())), how
        for name in (*STEPS, "sft"):
            right = one.norms[0][name]
            assert right > 1, (how, name)
            assert all(n[name] == pytest.approx(right, rel=2e-5) for n in got.norms), (how, name)
            assert got.sums[name] == pytest.approx(one.sums[name], rel=1e-4, abs=1e-4), (how, name)
            moved = one.after[name] - one.after["start"]
            error = float((got.after[name] - one.after[name]).norm() / moved.norm())
            assert error < 1e-5, (how, name, error)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(ran):
    for how, got in ran.steps.items():
        assert all(math.isnan(norms["bad"]) and norms["none"] == 0 for norms in got.norms), how
        assert torch.equal(got.after["bad"], got.after["sft"]), how
        assert torch.equal(got.after["none"], got.after["sft"]), how


def test_each_rank_holds_its_part_of_weights_and_optimizer_state(ran):
    [whole] = ran.alone.held
    for (world, *_), got in ran.steps.items():
        assert len(got.held) == world and sum(got.held) == whole, got.held
        assert max(got.held) < 1.01 * whole / world, got.held


@pytest.mark.parametrize("out", ["two", "four"])
def test_a_run_goes_on_with_other_ranks_and_without_fsdp(ran, out):
    """Two ranks stop after two steps of RL. Four go on, sequence sharded and layers computed again;
    or one, without fsdp."""
    rows, got = metrics(ran.folder / "one"), metrics(ran.folder / out)
    assert sum(r["valid_groups"] for r in rows if r["stage"] == "rl") > 4
    close(rows[:1], got[:1], 1e-5)
    close(rows, got, 1e-3)
    assert all(r["sampler_gap"] < 1e-5 for r in got if r["stage"] == "rl")
    recorded = [rollouts(ran.folder / name) for name in ("one", out)]
    for row in recorded[0] + recorded[1]:                  # rank 0 of dp = 2 shows the even slots
        del row["shown"]
    alike(*recorded, 1e-3)
    start, end, ours = (weights(ran.folder / x) for x in ("base", "one", out))
    assert start.keys() == end.keys() == ours.keys()

    def difference(x, y):
        return torch.cat([(x[k] - y[k]).flatten() for k in x]).norm()

    assert difference(ours, end) < 1e-3 * difference(end, start)


def test_transformers_loads_the_checkpoint(ran):
    for name in ("four", "bfloat", "made"):
        path = ran.folder / name / "model"
        theirs = AutoModelForImageTextToText.from_pretrained(path)
        kind = type(theirs).__name__
        assert kind == "Qwen2_5_VLForConditionalGeneration"
        assert json.loads((path / "config.json").read_text())["architectures"] == [kind]
        ours, _ = vlm.load(str(path), dtype=theirs.dtype)
        assert same(dict(theirs.state_dict()), dict(ours.state_dict()))


def test_a_bfloat16_run_samples_what_it_trains_and_goes_on_bit_for_bit(ran):
    """Float32 weights, of which each forward sees the bfloat16: in the sampler, in the trainer and
    in the checkpoint the same."""
    whole, parts, plain = (state(ran.folder / x) for x in ("bfloat", "parts", "plain"))
    assert same(weights(ran.folder / "bfloat"), weights(ran.folder / "parts"))
    assert same(whole["copies"], parts["copies"])
    assert same(whole["optimizer"], parts["optimizer"])
    theirs = AutoModelForImageTextToText.from_pretrained(ran.folder / "bfloat" / "model")
    saved = [p for k, p in theirs.named_parameters() if ".visual." not in k]
    for p, copy in zip(saved, whole["copies"], strict=True):
        assert torch.equal(p, copy.bfloat16()) and copy.dtype == torch.float32
    assert any(not torch.equal(p.float(), copy) for p, copy in zip(saved, whole["copies"]))

    def shapes(s):
        of_state = {}
        for i, of in s["optimizer"]["state"].items():
            of_state[i] = {key: x.shape for key, x in of.items()}
        return [x.shape for x in s["copies"]], of_state

    assert shapes(whole) == shapes(plain)                  # so that a run may go on with or without
    a, b = metrics(ran.folder / "bfloat"), metrics(ran.folder / "plain")
    gaps = [r["sampler_gap"] for r in a if r["stage"] == "rl"]
    assert 0 < max(gaps) < 0.01
    losses, right = ([r["loss"] for r in rows if "loss" in r] for rows in (a, b))
    assert losses == pytest.approx(right, rel=0.01)


def test_memory_is_what_a_sharded_step_takes(ran):
    """Weights and optimizer state to the byte, the most at once within 5%."""
    found = torch.load(ran.folder / "memory.pt")
    assert len(found) == 4
    for computed, sizes, most in found:
        assert {k: computed[k] for k in sizes} == sizes
        always = computed["weights"] + computed["optimizer"] + computed["vision"]
        assert computed["in_rollout"] - always == pytest.approx(most["rollout"], rel=0.05)
        in_training = computed["in_training"] - always - computed["gradients"]
        assert in_training == pytest.approx(most["training"], rel=0.05)


def test_a_model_made_from_nothing_is_sharded_once_its_tower_is_frozen(ran):
    steps = [(r["stage"], r["step"]) for r in metrics(ran.folder / "made")]
    assert steps == [("align", 1), ("sft", 1), ("rl", 1)]


def test_tied_weights_are_sharded_trained_and_saved_once(ran):
    norm, found = torch.load(ran.folder / "tied.pt")
    assert norm > 0 and "lm_head.weight" not in found
    loaded = vlm.load(str(ran.folder / "tied"))[0]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert same(dict(loaded.named_parameters()), found)
    before = vlm.load("tiny", seed=3)[0].get_input_embeddings().weight
    assert not torch.equal(found["model.language_model.embed_tokens.weight"], before)


def test_a_tensor_of_a_checkpoint_becomes_like_its_parameter():
    """Sharded as the parameter is, where it has its shape; a step count, and all where nothing is
    sharded, stay as they are. A mesh of one rank, without other processes."""
    x, count = torch.arange(6.0).view(3, 2), torch.tensor(4.0)
    whole = torch.nn.Parameter(torch.zeros(3, 2))
    assert sharding.like(x, whole) is x and sharding.like(count, whole) is count
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
        got = sharding.like(x, sharded)
        assert isinstance(got, DTensor) and got.placements == sharded.placements
        assert torch.equal(got.to_local(), x) and sharding.like(count, sharded) is count
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
