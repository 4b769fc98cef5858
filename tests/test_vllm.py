"""tests/vllm_cpu.sh DIR && DIR/bin/python -m pytest tests/test_vllm.py -q

vLLM's real engine on the CPU, against the torch engine and the trainer. Where vLLM is not installed
this file is not collected (conftest.py); .ci/run installs it and runs it.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import as_published
from tiny_families import tiny

import data
import encode
import evaluate
import model as vlm
import rollout
from flow import Ranks, Run
from plumbing import lora, sharding
from plumbing.families import vision_width
from plumbing.metrics import check_gap
from plumbing.optimizer import count_update, update
from plumbing.ranks import leave, start
from plumbing.vllm_engine import MOST_BANNED, start_engine

ROOT = Path(__file__).parent.parent
ALONE = Ranks()
HOW = {"think_budget": 12, "answer_budget": 6}
KEPT = []               # an engine that is collected ends all others of its process
# (t, h, w) in patches, seconds between frames
VIDEOS = [(4, 4, 4, 0.5), (9, 2, 6, 1 / 3), (21, 4, 2, 2.7), (1, 6, 6, 1.0)]


def sharp_model(folder, family):
    """A checkpoint whose every weight counts, and whose next token is neither certain nor equally
    likely to be any other."""
    model, tokenizer = tiny(family)
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.05)
        model.lm_head.weight.mul_(2)
        model.get_input_embeddings().weight.mul_(1 if family == "qwen2_5_vl" else 8)
    vlm.save(model, tokenizer, folder)
    return vlm.load(folder)


def make_prompts(model, tokenizer):
    noise = torch.Generator().manual_seed(3)
    prompts = []
    for n, (t, h, w, seconds) in enumerate(VIDEOS):
        question = "How many are there?" + " red" * n
        width = vision_width(model.config.vision_config)
        vision = torch.randn(t * h * w // 4, width, generator=noise)
        prompts.append(vlm.make_prompt(
            model, tokenizer, question, vision, (t, h, w), seconds, key=f"video {n}"))
    return prompts


def keys(n, G, name="k"):
    return [[(name, p, g) for g in range(G)] for p in range(n)]


def flat(groups):
    return [completion for group in groups for completion in group]


def as_lists(groups):
    return [[x.tokens.tolist() for x in group] for group in groups]


def ending(x):
    return x.text, x.forced, x.truncated


def largest_gap(model, prompts, groups, banned):
    """Sampler against trainer, in log-prob, on the tokens that were sampled."""
    tokens = [[x.tokens for x in group] for group in groups]
    with torch.no_grad():
        logprobs, _ = vlm.logprobs(model, prompts, tokens, banned)
    gaps = []
    for row, x in zip(logprobs, flat(groups)):
        if x.sampled.any():
            gaps.append(float((row[:len(x.tokens)] - x.logprobs)[x.sampled].abs().max()))
    return max(gaps)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "glm4v", "qwen3_vl"])
def family(request):
    return request.param


# For tests of what differs between families. Mixtures of experts come first: vLLM makes a group of
# ranks for experts only with the first model of a process.
every_family = pytest.mark.parametrize(
    "family", ["glm4v_moe", "qwen3_vl_moe", "qwen2_5_vl", "glm4v", "glm46v", "qwen3_vl"],
    indirect=True)


# For tests that start engines of their own.
one_family = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    return str(tmp_path_factory.mktemp(family.replace(" ", "_")))


@pytest.fixture(scope="module")
def ours(folder, family):
    return sharp_model(folder, family)


@pytest.fixture(scope="module")
def prompts(ours):
    return make_prompts(*ours)


@pytest.fixture(scope="module")
def engine(folder, ours):
    # 5,000 is more than the tiny GLM has positions: it is started with those.
    KEPT.append(start_engine(folder, *ours, ALONE, 5000))
    return KEPT[-1]


def both(engine, ours, prompts, **how):
    """-> the greedy completions of vLLM and of the torch engine, one a prompt."""
    for sampler in (engine, None):
        groups = rollout.rollout(*ours, prompts, keys(len(prompts), 1), ALONE, engine=sampler,
                                 greedy=True, **how)
        yield flat(groups)


@every_family
def test_logprobs_are_the_trainers(engine, ours, prompts):
    """Decision 3: videos of several shapes and clocks, forced halves included."""
    groups = rollout.rollout(*ours, prompts, keys(4, 8), ALONE, engine=engine, **HOW)
    assert [len(g) for g in groups] == [8] * 4
    xs = flat(groups)
    assert largest_gap(ours[0], prompts, groups, vlm.banned_ids(*ours)) < 1e-4
    assert any(x.forced for x in xs) and len({tuple(x.tokens.tolist()) for x in xs}) > 16
    for x in xs:
        assert len(x.tokens) == len(x.sampled) == len(x.logprobs)
        assert not x.logprobs[~x.sampled].any()


@pytest.mark.parametrize("think, answer", [(12, 6), (0, 6), (1, 1), (40, 3)])
def test_greedy_is_the_torch_engines_forced_answers_too(engine, ours, prompts, think, answer):
    theirs, torchs = both(engine, ours, prompts, think_budget=think, answer_budget=answer)
    for a, b in zip(theirs, torchs):
        assert a.tokens.tolist() == b.tokens.tolist() and a.sampled.tolist() == b.sampled.tolist()
        assert ending(a) == ending(b)
        assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_without_force_the_same_end_unanswered(engine, ours, prompts):
    """The greedy thoughts that ran out of time, by both engines."""
    a, b = both(engine, ours, prompts, think_budget=4, answer_budget=6, forced=None)
    for x, y in zip(a, b):
        assert x.tokens.tolist() == y.tokens.tolist() and ending(x) == ending(y)
    assert any(x.truncated and len(x.tokens) == 4 for x in a) and not any(x.forced for x in a)
    with pytest.raises(ValueError, match="torch engine"):
        list(both(engine, ours, prompts, think_budget=4, answer_budget=6, think_least=2))


def test_banned_ids_are_never_sampled_and_the_rest_share_their_probability(engine, ours, prompts):
    """The 20 likeliest first tokens are banned, in both engines and in the trainer."""
    model, tokenizer = ours
    banned = vlm.banned_ids(model, tokenizer)
    free = rollout.rollout(model, tokenizer, prompts, keys(4, 16), ALONE, engine=engine, **HOW)
    sampled = torch.cat([x.tokens[x.sampled] for x in flat(free)])
    likely = sampled.bincount(minlength=len(banned)).topk(20).indices
    banned[likely[[int(i) not in engine.stops for i in likely]]] = True
    groups = rollout.rollout(
        model, tokenizer, prompts, keys(4, 16), ALONE, engine=engine, banned=banned, **HOW)
    assert not any(banned[x.tokens[x.sampled]].any() for x in flat(groups))
    assert largest_gap(model, prompts, groups, banned) < 1e-4
    with_all = vlm.banned_ids(model, tokenizer)
    assert largest_gap(model, prompts, groups, with_all) > 1e-3, "the ban has an effect"


def test_the_key_decides_whatever_the_batch(engine, ours, prompts):
    def sample(prompts, keys):
        return as_lists(rollout.rollout(*ours, prompts, keys, ALONE, engine=engine, **HOW))

    everything = sample(prompts, keys(4, 4))
    assert sample(prompts[1:2], keys(4, 4)[1:2]) == everything[1:2]
    assert sample(prompts[:1], [keys(4, 4)[0][2:]]) == [everything[0][2:]]
    assert sample(prompts, keys(4, 4, "other")) != everything


def test_a_rank_without_keys_gets_empty_groups(engine, ours, prompts):
    """Where the weights are sharded a rank loads them though its part of the groups is empty."""
    assert engine.sample(prompts, [[]] * 4, **HOW, forced=None) == [[]] * 4
    assert engine.sample([], [], **HOW, forced=None) == []


def test_the_vision_tower_is_not_there_and_the_prompt_is_prefilled_once(
        engine, ours, prompts, monkeypatch):
    """The tower has no weights inside vLLM, so it cannot run. All G completions and their second
    halves find the prompt."""
    def tower_size(inner):
        return sum(p.numel() for p in inner.visual.parameters())

    assert engine.llm.apply_model(tower_size) == [0]
    seen, generate = [], engine.llm.generate

    def noted(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        seen.append([(x.num_cached_tokens, x.prompt_token_ids) for x in outputs])
        return outputs

    monkeypatch.setattr(engine.llm, "generate", noted)
    with torch.no_grad():
        ours[0].lm_head.weight.add_(0.0)                   # new weights, though equal: no cache
    count_update(ours[0])
    rollout.rollout(*ours, prompts[2:3], keys(1, 8), ALONE, engine=engine, **HOW)
    (first, *others), again = seen
    shared = len(prompts[2].ids) // 32 * 32                # vLLM shares blocks of 32
    assert shared >= 64 and first[0] == 0, (shared, seen)
    assert all(cached >= shared for cached, _ in others + again), (shared, seen)
    prompt = prompts[2].ids
    if engine.modality == "image":                         # Qwen3-VL has another pad for pictures
        prompt = prompt.masked_fill(prompt == engine.pad, ours[0].config.image_token_id)
    prompt = prompt.tolist()
    assert all(ids[:len(prompt)] == prompt for _, ids in [first, *others, *again])


@every_family
def test_new_weights_take_effect_and_nothing_of_the_old_ones_serves(engine, ours, prompts):
    model, tokenizer = ours
    banned = vlm.banned_ids(model, tokenizer)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    noise = torch.Generator().manual_seed(5)
    old = rollout.rollout(model, tokenizer, prompts, keys(4, 4), ALONE, engine=engine, **HOW)
    with torch.no_grad():
        for p in [*model.model.language_model.parameters(), model.lm_head.weight]:
            p.add_(torch.randn(p.shape, generator=noise) * 0.03)
    count_update(model)
    for _ in range(2):
        groups = rollout.rollout(
            model, tokenizer, prompts, keys(4, 4), ALONE, engine=engine, **HOW)
        assert largest_gap(model, prompts, groups, banned) < 1e-4
    assert largest_gap(model, prompts, old, banned) > 1e-2
    for a, b in zip(*both(engine, ours, prompts, **HOW)):
        assert a.tokens.tolist() == b.tokens.tolist()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    count_update(model)


def test_adapters_reach_vllm_merged(engine, ours, folder, prompts):
    """LoRA: vLLM has the weights' own names alone. A layer is merged when vLLM asks for it."""
    model, tokenizer = vlm.load(folder)
    adapters = SimpleNamespace(model=folder, lora_rank=4, lora_alpha=8, seed=0)
    lora.adapt(model, adapters, None)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=noise) * 0.05)
    engine.version = None                                  # another model's weights
    groups = rollout.rollout(model, tokenizer, prompts, keys(4, 4), ALONE, engine=engine, **HOW)
    engine.version = None
    banned = vlm.banned_ids(model, tokenizer)
    assert largest_gap(model, prompts, groups, banned) < 1e-4
    assert largest_gap(ours[0], prompts, groups, banned) > 1e-2


def test_every_fused_update_reaches_vllm_once(engine, ours, monkeypatch):
    """A fused optimizer, which GPUs have, does not raise the tensors' versions. Weights were handed
    over where these had changed: on a GPU vLLM kept the first policy for the whole run."""
    model = ours[0]
    model.model.visual.requires_grad_(False)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    handed_over, real = [], engine.llm.collective_rpc
    monkeypatch.setattr(engine.llm, "collective_rpc",
                        lambda name, **how: handed_over.append(name) or real(name, **how))
    engine.load(model)
    handed_over.clear()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
    for number in range(1, 4):
        for p in trained:
            p.grad = torch.ones_like(p)
        update(model, optimizer, 1e-2, ALONE)
        engine.load(model)
        engine.load(model)                                 # nothing new
        assert handed_over == ["reload_weights"] * number
        [theirs] = engine.llm.apply_model(
            lambda inner: inner.language_model.model.norm.weight.detach().clone())
        assert torch.equal(theirs, model.model.language_model.norm.weight)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    count_update(model)
    model.model.visual.requires_grad_(True)


def test_asleep_it_forgets_its_weights_and_gets_them_at_every_wake(engine, ours, monkeypatch):
    """What only a GPU does, through its switch: level 2, which keeps no copy in the host's memory;
    so weights that have not changed are handed over too."""
    called, real = [], engine.llm.collective_rpc
    monkeypatch.setattr(engine.llm, "sleep", lambda level: called.append(f"sleep {level}"))
    monkeypatch.setattr(engine.llm, "wake_up", lambda: called.append("wake"))
    monkeypatch.setattr(engine.llm, "collective_rpc",
                        lambda name, **how: called.append(name) or real(name, **how))
    engine.load(ours[0])
    called.clear()
    monkeypatch.setattr(engine, "cuda", True)
    for _ in range(2):
        engine.rest()
        engine.load(ours[0])
    assert called == ["sleep 2", "wake", "reload_weights"] * 2


def test_the_options_of_a_gpu_are_ones_that_vllm_has(engine, ours, folder, monkeypatch):
    """What only a GPU is given, through its switch: sleep mode, CUDA graphs, its share of the
    memory; chunked prefill and the size of blocks are vLLM's own choice there."""
    from vllm import EngineArgs
    monkeypatch.setattr(engine, "cuda", True)
    options = engine.options(ours[0], ALONE, 5000, 0.4)
    given, chosen = EngineArgs(model=folder, **options), EngineArgs(model=folder)
    assert given.enable_sleep_mode and not given.enforce_eager
    assert given.gpu_memory_utilization == 0.4
    assert given.enable_chunked_prefill == chosen.enable_chunked_prefill
    assert given.block_size == chosen.block_size


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 GiB")])
def test_no_memory_to_wake_up_is_one_line_that_names_the_option(engine, ours, monkeypatch, error):
    """Both kinds of error that vLLM's allocator and torch's raise; other errors are bugs, and stay
    as they are."""
    errors = [error, RuntimeError("invalid argument")]

    def wake_up():
        raise errors.pop(0)

    monkeypatch.setattr(engine.llm, "wake_up", wake_up)
    monkeypatch.setattr(engine, "asleep", True)
    with pytest.raises(ValueError, match=r"lower vllm_memory \(0.5 of it now\)") as e:
        engine.load(ours[0])
    assert "out of memory" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(RuntimeError, match="^invalid argument$"):
        engine.load(ours[0])


def test_a_weight_that_is_damaged_inside_vllm_is_seen_and_named(engine, ours, prompts):
    """A sampler that is not the trainer: its mean gap ends a run with the line that says why."""
    def damage(inner):
        inner.language_model.model.norm.weight.data.mul_(1.3)

    def mean_gap():
        groups = engine.sample(prompts, keys(4, 4), **HOW, forced=None)
        tokens = [[x.tokens for x in group] for group in groups]
        with torch.no_grad():
            logprobs, _ = vlm.logprobs(ours[0], prompts, tokens, engine.banned)
        gaps = [row[:len(x.tokens)] - x.logprobs for row, x in zip(logprobs, flat(groups))]
        return float(torch.cat(gaps).abs().mean())

    engine.load(ours[0])
    check_gap(mean_gap(), "float32")
    engine.llm.apply_model(damage)
    with pytest.raises(ValueError, match="weights that were not reloaded after an update"):
        check_gap(mean_gap(), "float32")
    engine.version = None
    engine.load(ours[0])
    check_gap(mean_gap(), "float32")


def test_more_banned_ids_than_vllm_takes_are_refused(engine, ours, prompts):
    many = torch.ones(MOST_BANNED + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="1025 ids are banned, and vLLM takes at most 1024"):
        rollout.rollout(*ours, prompts[:1], keys(1, 2), ALONE, engine=engine, banned=many, **HOW)


def test_a_weight_that_does_not_arrive_ends_the_run(engine, ours):
    model = ours[0]

    class Less:
        def parameters(self):
            return iter([torch.zeros(1)])

        def named_parameters(self, **how):
            for name, weight in model.named_parameters(**how):
                if "layers.2.mlp.down" not in name:
                    yield name, weight

    with pytest.raises(RuntimeError, match="vLLM was not given .*layers.2.mlp.down_proj"):
        engine.load(Less())
    engine.version = None
    engine.load(model)


def test_positions_are_vllms_own(engine, ours):
    """Decision 2, bit for bit: any clip, any clock, through vLLM's own function."""
    from vllm.multimodal.inputs import PlaceholderRange
    (model, tokenizer), kind = ours, engine.modality
    draw = torch.Generator().manual_seed(0)

    def positions_of(prompt):
        pads = prompt.ids == vlm.vision_pad(model.config)
        starts = (pads & ~pads.roll(1)).nonzero()[:, 0].tolist()
        clock = SimpleNamespace(data=torch.tensor(prompt.seconds, dtype=torch.float64))
        features = []
        for at, grid in zip(starts, prompt.grids, strict=True):
            run = PlaceholderRange(offset=at, length=math.prod(grid) // 4)
            size = SimpleNamespace(data=torch.tensor(grid))
            features.append(SimpleNamespace(
                modality=kind, mm_position=run,
                data={f"{kind}_grid_thw": size, "second_per_grid_ts": clock}))
        ids = prompt.ids.tolist()
        [positions] = engine.llm.apply_model(
            lambda inner: inner.get_mrope_input_positions(ids, features))
        return positions

    for n in range(60):
        t, h, w = (int(torch.randint(1, most, (), generator=draw)) for most in (60, 4, 4))
        clock = [1 / 3, 0.1, 1 / 30, 2.0, 29.97 / 1001][n % 5]
        seconds = clock * float(torch.randint(1, 9, (), generator=draw))
        vision = torch.zeros(t * h * w, vision_width(model.config.vision_config))
        prompt = vlm.make_prompt(model, tokenizer, "so" * n, vision, (t, 2 * h, 2 * w), seconds)
        theirs, delta = positions_of(prompt)
        assert theirs.tolist() == prompt.positions.tolist(), (t, h, w, seconds)
        assert delta == int(prompt.positions.max()) + 1 - len(prompt.ids)


@one_family
def test_tied_embeddings_as_the_3b_has_them(ours, tmp_path):
    """Its head has no weights of its own, and none may be missed; after an update both sides have
    the new ones. As it is published."""
    saved = tmp_path / "saved"
    vlm.save(*ours, saved)
    config = json.loads((saved / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (saved / "config.json").write_text(json.dumps(config))
    weights = load_file(saved / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    path = as_published(saved, tmp_path / "published")
    model, tokenizer = vlm.load(path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    engine = start_engine(path, model, tokenizer, ALONE, 512)
    prompts = make_prompts(model, tokenizer)
    KEPT.append(engine)
    for _ in range(2):
        groups = rollout.rollout(
            model, tokenizer, prompts, keys(4, 4), ALONE, engine=engine, **HOW)
        assert largest_gap(model, prompts, groups, vlm.banned_ids(model, tokenizer)) < 1e-4
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
        count_update(model)


@one_family
def test_an_architecture_that_vllm_lacks_is_one_line(ours, tmp_path):
    vlm.save(*ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["NobodyForConditionalGeneration"], "model_type": "nobody"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vLLM does not start on") as error:
        start_engine(str(tmp_path), *ours, ALONE, 512)
    assert "\n" not in str(error.value)


@one_family
def test_what_vllm_advises_is_said_in_the_names_of_our_options(ours, tmp_path):
    """Its own error about a cache that is too small, for a checkpoint with more positions."""
    vlm.save(*ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokenizer = vlm.load(str(tmp_path))
    with pytest.raises(ValueError, match="increasing `vllm_memory`.*decreasing `vllm_length`") as e:
        start_engine(str(tmp_path), model, tokenizer, ALONE, 1_000_000)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# two ranks: this file, run by torchrun

def worker(folder, out, share):
    ranks = start(2)
    model, tokenizer = vlm.load(folder)
    if "sharded" in share:
        sharding.shard_parameters(model, ranks)
    prompts, result = make_prompts(model, tokenizer), []
    engine = start_engine(
        folder, model, tokenizer, ranks, 512, share="one over both" in share)
    model.model.visual.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
    for number in range(2):                                # before and after an update
        if number:
            for p in trained:
                p.grad = torch.ones_like(p)
            update(model, optimizer, 1e-2, ranks)
        groups = rollout.rollout(model, tokenizer, prompts, keys(4, 4), ranks, engine=engine, **HOW)
        with sharding.gathered(model):
            gap = largest_gap(model, prompts, groups, vlm.banned_ids(model, tokenizer))
        result.append([as_lists(groups), gap])
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(result))
    leave()


def torchrun(*command, timeout=900):
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=timeout)


@one_family
@pytest.mark.parametrize("share", [
    "one each", "one over both", "one over both, weights sharded"])
def test_two_ranks_end_with_the_same_groups(engine, ours, folder, prompts, tmp_path, share):
    """An engine each samples what one rank would have sampled alone. Both are the trainer, after an
    update too."""
    run = torchrun(__file__, folder, tmp_path, share)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [groups for groups, _ in first] == [groups for groups, _ in second]
    assert [len(g) for groups, _ in first for g in groups] == [4] * 8
    assert max(gap for _, gap in first + second) < 1e-4
    alone = rollout.rollout(*ours, prompts, keys(4, 4), ALONE, engine=engine, **HOW)
    assert first[0][0] == as_lists(alone) and first[1][0] != first[0][0]


def test_a_run_with_vllm_learns(tmp_path):
    """The default run on two ranks, but for half of its cold start and of its RL: from what the
    cold start leaves to well above it, without a gap. Then it thinks, and ends its thinking by
    itself: greedily both engines write the same, whatever the budgets."""
    run = torchrun("train.py", "--rollout=vllm", "--sft_steps=190", "--rl_steps=20",
                   "--eval_samples=128", f"--out_dir={tmp_path}/out")
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-3000:]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    before, after = [r["eval_accuracy"] for r in rows if "eval_accuracy" in r]
    rl = [r for r in rows if r["stage"] == "rl"]
    assert len(rl) == 20 and max(r["sampler_gap_max"] for r in rl) < 1e-4
    assert after > before + 0.1, (before, after)

    path = f"{tmp_path}/out/model"
    ours = vlm.load(path)
    engine = start_engine(path, *ours, ALONE, 512)
    KEPT.append(engine)
    run = Run(evaluate.Config(), ALONE, print, *ours, vlm.banned_ids(*ours), encode.Cache())
    room = rollout.room(ours[1], **rollout.budgets(run.config))
    made, _ = data.make_prompts(run, data.load("toy")[:8], room)
    prompts = data.fetch(run, [prompt for _, prompt in made])
    for think, answer in ((96, 16), (40, 16), (96, 2)):
        a, b = both(engine, ours, prompts, think_budget=think, answer_budget=answer)
        assert as_lists([a]) == as_lists([b])
        assert [ending(x) for x in a] == [ending(x) for x in b]


if __name__ == "__main__":
    worker(*sys.argv[1:])
