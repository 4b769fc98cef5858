"""python -m pytest tests/test_train.py -q

Whole runs, small enough for two cores: videos of one event, answers of a dozen tokens, the right one a coin toss, so that
sixteen steps of cold start give groups with signal. One run of two ranks under torchrun is shared by most tests.
"""
import hashlib
import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import encode
import grpo
import model as vlm
import toy
import train
from curriculum import DECAY
from rollout import Completion, rollout, room

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(ROOT, "train.py")
ALONE = encode.Ranks()
SMALL = dict(frames=2, align_steps=2, sft_steps=16, sft_batch=8, sft_lr=3e-3, rl_steps=7, prompts_per_step=4, group_size=4,
             think_budget=8, answer_budget=9, lr=3e-4, warmup=1, eval_samples=4, eval_every=3, save_every=3, show_every=4)
LAST = SMALL["align_steps"] + SMALL["sft_steps"] + SMALL["rl_steps"]                # the number of the last checkpoint
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
ENV |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BOUND = 600            # seconds within which every process must have ended: a hang in gloo would last 1800


# ---------------------------------------------------------------------------------------------------------------------
# ways to start a run

def flags(**how):
    return [f"--{k}={v}" for k, v in how.items()]


def torchrun(*arguments, script=TRAIN, world=2, **how):
    """Two ranks, or more, started. `ended` waits for them."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", script, *arguments],
                            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def ended(process):
    try:
        out, err = process.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        process.terminate()                                # torchrun ends its ranks
        out, err = process.communicate()
        pytest.fail(f"still running after {BOUND} s\n{out}\n{err}")
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def two_ranks(arguments, log):
    """Two ranks without torchrun, which starts each in a session of its own: so that SIGKILL reaches them all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, TRAIN, *arguments], stdout=log, stderr=log,
                             env={**ENV, **ranks, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]


def alone(**how):
    """A run of one rank, in this process."""
    train.main(train.parse(flags(**{**SMALL, **how})))


def script(monkeypatch, *arguments):
    """`python train.py ...` in this process. -> what it says as it exits"""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(TRAIN, run_name="__main__")
    return e.value.code


def refused(how, *says):
    """The run of these hyperparameters ends with one line that says all this."""
    with pytest.raises((ValueError, OSError)) as e:
        alone(**how)
    for words in says:
        assert words in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves

def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def metrics(out_dir, stage=None):
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        rows = [json.loads(line, parse_constant=no_constant) for line in f]
    return [r for r in rows if stage in (None, r["stage"])]


def timeless(rows):
    return [{k: v for k, v in r.items() if not k.endswith("_s") and k != "peak_mb"} for r in rows]


def weights(out_dir):
    return load_file(os.path.join(out_dir, "model", "model.safetensors"))


def same(a, b):
    """Bit for bit, through dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def fingerprint(folder):
    """Every file in it, by content; links by where they lead."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in files + folders:
            path = os.path.join(where, name)
            found[os.path.relpath(path, folder)] = (os.readlink(path) if os.path.islink(path) else
                                                    os.path.isdir(path) or hashlib.sha256(open(path, "rb").read()).hexdigest())
    return found


def close(a, b, within):
    """Rows of metrics, equal but for seconds and memory and a relative error."""
    a, b = timeless(a), timeless(b)
    assert [(r["stage"], r["step"], r.keys()) for r in a] == [(r["stage"], r["step"], r.keys()) for r in b]
    for x, y in zip(a, b):
        for key in x.keys() - {"stage", "sampler_gap", "sampler_gap_max", "balance"}:             # the gap is rounding error itself
            assert x[key] == pytest.approx(y[key], rel=within, abs=within), (x["stage"], x["step"], key)


# ---------------------------------------------------------------------------------------------------------------------
# the run that most tests share

def question(i, **other):
    return {"id": f"q{i}", "video": f"toy:{i}:1", "question": "Heads? A. yes B. no", "answer": "AB"[i % 2], "thought": "so", **other}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def write_text(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As torchrun has it. The models here are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions about twelve videos, one that is missing, and one that is no video; and four to evaluate on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "notes.txt").write_text("These are notes, not a video.\n" * 50)
    bad = [question(90, id="gone", video="missing.mp4"), question(91, id="text", video="notes.txt")]
    return SimpleNamespace(folder=folder, data=write(folder / "q.jsonl", *map(question, range(12)), *bad),
                           eval_data=write(folder / "e.jsonl", *map(question, range(50, 54))))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """From nothing to the end, never stopped: two ranks that share every video."""
    out = str(tmp_path_factory.mktemp("run") / "out")
    how = {**SMALL, "data": files.data, "eval_data": files.eval_data}
    result = ended(torchrun(*flags(**how, out_dir=out)))
    assert result.code == 0, result.err
    return SimpleNamespace(how=how, dir=out, model=os.path.join(out, "model"), **vars(result))


@pytest.fixture
def copied(run, tmp_path):
    """The shared run's directory, to go on from."""
    shutil.copytree(run.dir, tmp_path / "copied", symlinks=True)
    return str(tmp_path / "copied")


STAGE_KEYS = {"step", "stage", "loss", "grad_norm", "skipped", "dropped", "train_s", "peak_mb"}
RL_KEYS = {"step", "stage", "reward", "accuracy", "format", "length", "forced", "truncated", "entropy", "clip_low", "clip_high",
           "valid_groups", "oversample", "sampler_gap", "balance", "skipped", "grad_norm", "encode_s", "rollout_s", "train_s", "peak_mb"}


def test_a_run_logs_one_line_a_step_with_every_promised_key(run):
    rows = metrics(run.dir)
    steps = [(r["stage"], r["step"]) for r in rows]
    assert steps == ([("align", 1), ("align", 2)] + [("sft", i) for i in range(1, 17)] + [("sft", 16)]      # and its evaluation
                     + [("rl", i) for i in range(1, 8)])
    for row in rows:
        looked = row["stage"] == "sft" and "loss" not in row
        assert row.keys() >= (RL_KEYS if row["stage"] == "rl" else {"eval_accuracy"} if looked else STAGE_KEYS), row
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float))) and row["peak_mb"] > 0
    assert [(r["stage"], r["step"]) for r in rows if "eval_accuracy" in r] == [("sft", 16), ("rl", 3), ("rl", 6), ("rl", 7)]


def test_the_logged_numbers_mean_what_they_say(run):
    rows = metrics(run.dir)
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[0] > 5 and losses[-1] < 0.5                                       # it learned to write its thoughts
    for r in metrics(run.dir, "rl"):
        assert r["reward"] == pytest.approx(0.9 * r["accuracy"] + 0.1 * r["format"])
        assert 0 <= r["format"] <= 1 and 0 <= r["truncated"] <= 1 and 0 <= r["forced"] <= 1
        assert 8 < r["length"] <= SMALL["think_budget"] + 10 + SMALL["answer_budget"]
        assert 0 <= r["clip_low"] <= 1 and 0 <= r["clip_high"] <= 1 and 0 < r["entropy"] < 7
        assert r["sampler_gap"] < 1e-5 and r["sampler_gap_max"] < 1e-4              # sampler and trainer are one distribution
        assert 0 <= r["valid_groups"] <= SMALL["prompts_per_step"] and r["skipped"] == 0
        assert (r["grad_norm"] > 0) == (r["valid_groups"] > 0)
        assert r["accuracy_choice"] == r["accuracy"] and r["length_choice"] == r["length"] and 0.25 <= r["same_answer_choice"] <= 1
    assert sum(r["valid_groups"] for r in metrics(run.dir, "rl")) > 7               # or the tests below would test nothing
    assert all(r["eval_accuracy"] in (0, 0.25, 0.5, 0.75, 1) for r in rows if "eval_accuracy" in r)


def test_a_run_leaves_a_picture_and_the_two_newest_checkpoints(run):
    with Image.open(os.path.join(run.dir, "curves.png")) as image:
        image.load()
        assert image.format == "PNG" and image.width > 500 and len(np.unique(np.asarray(image.convert("L")))) > 10
    assert os.path.islink(run.model) and os.readlink(run.model) == f"ckpt-{LAST}"
    assert sorted(os.listdir(run.dir)) == [f"ckpt-{LAST - 1}", f"ckpt-{LAST}", "curves.png", "metrics.jsonl", "model"]
    state = torch.load(os.path.join(run.model, "training_state.pt"), weights_only=False)
    assert state["done"] == {"align": 2, "sft": 16, "rl": 7} and state["config"] == {**asdict(train.Config()), **run.how, "out_dir": run.dir}
    assert f"done: {run.model}" in run.out and "held-out accuracy" in run.out


def visits(curriculum):
    """How many groups a checkpoint's curriculum has noted, where all had group_size completions and no grades came before.

    Each visit decays what was noted before: n of them leave a total of group_size * (1 - DECAY^n) / (1 - DECAY).
    """
    left = [1 - (1 - DECAY) * total / SMALL["group_size"] for _, total in curriculum["recent"].values()]
    counts = [math.log(x) / math.log(DECAY) for x in left]
    assert counts == pytest.approx([round(n) for n in counts])
    return sum(round(n) for n in counts)


def test_bad_videos_are_dropped_named_counted_and_not_replaced(run, files):
    """A missing video and one that is none: each stage says which and why, goes on without, and puts nothing in their place."""
    for id, file in (("gone", "missing.mp4"), ("text", "notes.txt")):
        said = [line for line in run.out.splitlines() if line.startswith(f"dropped {id}: ")]
        assert len(said) == 2 and all(str(files.folder / file) in line for line in said)          # once a stage
    for stage in ("sft", "rl"):
        dropped = [r["dropped"] for r in metrics(run.dir, stage) if "dropped" in r]
        assert dropped == sorted(dropped) and dropped[-1] == 2
    curriculum = torch.load(os.path.join(run.model, "training_state.pt"), weights_only=False)["curriculum"]
    assert set(curriculum["dropped"]) == {"gone", "text"} and set(curriculum["recent"]) == {f"q{i}" for i in range(12)}
    asked = sum(r["oversample"] for r in metrics(run.dir, "rl")) * SMALL["prompts_per_step"]
    assert visits(curriculum) == asked - 2                                          # two draws bore nothing


def test_every_key_of_metrics_is_explained_in_the_readme(run):
    with open(os.path.join(ROOT, "README.md")) as f:
        told = {word for line in f if line.startswith("|") or "metrics.jsonl` says" in line for word in re.findall(r"`(\w+)`", line)}
    keys = {re.sub("_(count|open|choice)$", "_D", key) for row in metrics(run.dir) for key in row}
    assert keys - told == set()


def test_the_checkpoint_is_what_transformers_loads(run):
    """from_pretrained's own attention, tower and splicing, given pixels and our positions, against ours: same log-probs."""
    theirs, their_tokenizer = AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32), AutoTokenizer.from_pretrained(run.model)
    ours, tokenizer = vlm.load(run.model)
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert not same(dict(ours.state_dict()), dict(vlm.load("tiny")[0].state_dict()))
    video = data.open_video("toy:3", 7)
    seen = vlm.encode_video(ours, lambda: video, ALONE)
    prompt = vlm.make_prompt(ours, tokenizer, "Heads? é <|im_end|> A. yes B. no", *seen)
    text = "<think>so</think><answer>A</answer>"
    tokens = torch.tensor(their_tokenizer(text).input_ids)
    assert tokens.tolist() == tokenizer(text).input_ids
    banned = vlm.banned_ids(ours, tokenizer)
    with torch.no_grad():
        logprobs, _ = vlm.logprobs(ours, [prompt], [[tokens]], banned)
        patches, grid = vlm.patchify(video.read(0, 7), ours.pixels)
        steps = prompt.positions.max() + 1 + torch.arange(len(tokens))
        logits = theirs(input_ids=torch.cat([prompt.ids, tokens])[None], pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
                        position_ids=torch.cat([prompt.positions, steps.expand(3, -1)], 1)[:, None]).logits[0]
    expected = logits[len(prompt.ids) - 1:-1].masked_fill(banned, -math.inf).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs[0], expected, atol=2e-5)


def test_started_again_a_finished_run_does_nothing_more(run, copied, capsys):
    before = fingerprint(copied)
    alone(**run.how, out_dir=copied)
    said = capsys.readouterr().out
    assert "going on from" in said and "7 rl steps" in said and "done: " in said
    assert fingerprint(copied) == before


def test_with_more_steps_a_finished_run_goes_on(run, copied):
    with open(os.path.join(copied, "metrics.jsonl")) as f:
        before = f.read()
    alone(**{**run.how, "out_dir": copied, "rl_steps": 9, "eval_every": 0})
    with open(os.path.join(copied, "metrics.jsonl")) as f:
        assert f.read().startswith(before)
    assert [r["step"] for r in metrics(copied, "rl")] == list(range(1, 10))
    assert os.readlink(os.path.join(copied, "model")) == f"ckpt-{LAST + 2}" and not same(weights(copied), weights(run.dir))


def test_a_run_that_is_killed_and_started_again_is_as_if_never_stopped(run, tmp_path):
    """SIGKILL to all ranks between two checkpoints, once in the cold start, once in RL. What was logged after the
    checkpoint is logged again, once; every number and every bit of the weights is that of the run never stopped."""
    out = str(tmp_path / "out")
    arguments = flags(**run.how, out_dir=out)
    with open(tmp_path / "log", "w+") as log:
        for stage, step, kept in (("sft", 4, 5), ("rl", 4, LAST - 4)):              # checkpoints: sft 3 and 6, rl 3 and 6
            processes, seen, start = two_ranks(arguments, log), [], time.monotonic()
            while (stage, step) not in seen and time.monotonic() - start < BOUND and None in [p.poll() for p in processes]:
                time.sleep(0.005)
                if os.path.exists(os.path.join(out, "metrics.jsonl")):
                    with open(os.path.join(out, "metrics.jsonl")) as f:
                        seen = [(r["stage"], r["step"]) for r in map(json.loads, f.read().split("\n")[:-1])]
            for p in processes:
                p.send_signal(signal.SIGKILL)
            assert [p.wait() for p in processes] == [-signal.SIGKILL] * 2, log.seek(0) or log.read()
            state = torch.load(os.path.join(out, "model", "training_state.pt"), weights_only=False)
            assert state["step"] >= kept and len(metrics(out)) > state["lines"]     # else nothing would have to be cut back
            with open(os.path.join(out, "metrics.jsonl"), "a") as f:
                f.write('{"step": 5, "sta')                                         # killed while it wrote a line
        processes = two_ranks(arguments, log)
        assert [p.wait(BOUND) for p in processes] == [0, 0], log.seek(0) or log.read()
    assert timeless(metrics(out)) == timeless(metrics(run.dir))
    assert same(weights(out), weights(run.dir))
    a, b = (torch.load(os.path.join(d, "model", "training_state.pt"), weights_only=False) for d in (out, run.dir))
    assert all(same(a[k], b[k]) for k in ("optimizer", "curriculum", "done", "lines"))


# ---------------------------------------------------------------------------------------------------------------------
# one rank and two

class Catch(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given."""
    def step(self):
        self.caught = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def caught(model, ranks):
    """The gradients of all ranks, summed and clipped, as one vector. -> (their norm before the clip, the vector)"""
    catch = Catch([p for p in model.parameters() if p.requires_grad], 1.0)
    norm = train.update(model, catch, 1.0, ranks)
    return norm, torch.cat([g.flatten() for g in catch.caught])


def one_step_of_each_kind(ranks, checkpoint, questions):
    """Align, cold start and RL on batches that are the same whatever the ranks. -> {name: (number, ..., gradient)}"""
    c, out = train.parse(flags(**{**SMALL, "frames": 8})), {}
    for name in ("align", "sft", "sample", "token"):
        model, tokenizer = vlm.load("tiny" if name == "align" else checkpoint, seed=3)
        banned = vlm.banned_ids(model, tokenizer)
        if name == "align":
            batch = [toy.make_description(5, i, 1.0) for i in range(5)]             # five: the ranks' shares differ
            prompts, _ = train.watched_prompts(model, tokenizer, batch[ranks.rank::ranks.world], c, ranks)
            loss = train.sft_step(model, tokenizer, prompts, [s.thought for s, _ in prompts], c, ranks, banned)
            out[name] = loss, *caught(model, ranks)
            continue
        model.model.visual.requires_grad_(False)
        samples = data.load(questions)[:5]
        prompts, _ = train.make_prompts(model, tokenizer, samples[ranks.dp_rank::ranks.dp], c, ranks, encode.Cache())
        if name == "sft":
            share = prompts[ranks.sp_rank::ranks.sp]
            texts = [data.taught_text(s) + "so " * int(s.id[1:]) for s, _ in share]               # of different lengths
            out[name] = train.sft_step(model, tokenizer, share, texts, c, ranks, banned), *caught(model, ranks)
            continue
        keys = [[(0, 0, s.id, n) for n in range(c.group_size)] for s, _ in prompts]
        answers = rollout(model, tokenizer, [p for _, p in prompts], keys, ranks, think_budget=8, answer_budget=6)
        groups = [train.Group(i, s, p, xs, None, grpo.advantages(torch.tensor([1.0, 0, 0.1, 0.3])))
                  for i, ((s, p), xs) in enumerate(zip(prompts, answers))]
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():                                                       # off the sampler, so that the clip acts
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=noise) * 0.01)
        said = {g.sample.id: [x.tokens.tolist() for x in g.completions] for g in groups}
        said = {id: x for part in train.gather(said, ranks)[::ranks.sp] for id, x in part.items()}
        sampled = sum(train.gather(sum(int(x.sampled.sum()) for g in groups for x in g.completions), ranks)[::ranks.sp])
        c.loss_average = name
        sums = train.grpo_step(model, groups, c, ranks, banned, 5 * c.group_size if name == "sample" else sampled)
        every = train.gather(sums, ranks)
        sums = {k: (max if k == "gap_max" else sum)(s[k] for s in every) for k in sums}
        out[name] = {k: said[k] for k in sorted(said)}, sums, *caught(model, ranks)
    return out


def worker(checkpoint, questions, folder, *arguments):
    """What each of two ranks does, with sp = 2 and with sp = 1: the steps above, then two steps of RL by train.main, and grading.
    At last the sequence sharded too, in a run that begins with that checkpoint."""
    for sp in (2, 1):
        result = one_step_of_each_kind(encode.start(sp), checkpoint, questions)
        if int(os.environ["RANK"]) == 0:
            torch.save(result, os.path.join(folder, f"steps{sp}.pt"))
        train.main(train.parse([*arguments, f"--sp={sp}", f"--out_dir={folder}/out{sp}"]))
        train.main(train.parse([*arguments, *flags(mode="grade", model=checkpoint, sp=sp, out_dir=f"{folder}/graded{sp}")]))
    train.main(train.parse([*arguments, *flags(**SHORT, model=checkpoint, sp=2, stage2="true", out_dir=f"{folder}/sharded")]))
    torch.distributed.destroy_process_group()


SHORT = dict(sft_steps=2, rl_steps=2, eval_every=1)         # from a checkpoint whose tower is frozen


@pytest.fixture(scope="module")
def short(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "out"
    alone(**{**run.how, **SHORT, "model": run.model, "out_dir": out})
    rows = metrics(out)
    assert sum(r["valid_groups"] for r in rows if r["stage"] == "rl") > 1
    return rows


@pytest.fixture(scope="module")
def ranks(run, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("out0", "out1", "out2"):
        shutil.copytree(run.dir, folder / name, symlinks=True)
    more = flags(**{**run.how, "rl_steps": 9, "eval_every": 2})
    two = torchrun(run.model, files.data, str(folder), *more, script=os.path.abspath(__file__))
    steps = one_step_of_each_kind(ALONE, run.model, files.data)
    train.main(train.parse([*more, f"--out_dir={folder / 'out0'}"]))
    train.main(train.parse([*more, *flags(mode="grade", model=run.model, out_dir=folder / "graded0")]))
    two = ended(two)
    assert two.code == 0, two.err
    return SimpleNamespace(folder=folder, alone=steps, **{f"sp{sp}": torch.load(folder / f"steps{sp}.pt") for sp in (2, 1)})


@pytest.mark.parametrize("sp", [2, 1])
def test_two_ranks_have_the_gradient_of_one(ranks, sp):
    """sp = 2: both work on each video; sp = 1: each on its own. A missing or extra factor of sp or dp is off by 2."""
    for name, expected in ranks.alone.items():
        got = getattr(ranks, f"sp{sp}")[name]
        error = (got[-1] - expected[-1]).norm() / expected[-1].norm()
        assert error < 1e-5, (name, float(error))
        assert got[-2] == pytest.approx(expected[-2], rel=1e-5) and expected[-2] > 0.01           # the norm before the clip
        if name in ("align", "sft"):
            assert got[0] == pytest.approx(expected[0], rel=1e-5)
        else:
            assert got[0] == expected[0]                                            # token for token the same completions
            assert got[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5) and expected[1]["clip_low"] + expected[1]["clip_high"] > 0


@pytest.mark.parametrize("sp", [2, 1])
def test_a_run_goes_on_the_same_with_other_ranks(ranks, sp):
    """Two more steps of RL: the same draws, answers and rewards; gradients, and what follows from them, to float error."""
    one, two = (metrics(ranks.folder / f"out{n}")[-2:] for n in (0, sp))
    assert sum(r["valid_groups"] for r in one) > 1
    close(one[:1], two[:1], 1e-5)
    close(one[1:], two[1:], 1e-3)
    assert [r["balance"] for r in one] == [1, 1] and all(1 <= r["balance"] <= 2 / sp for r in two)


@pytest.mark.parametrize("sp", [2, 1])
def test_two_ranks_write_the_grades_of_one(ranks, sp):
    one, two = ((ranks.folder / f"graded{n}" / "grades.jsonl").read_text() for n in (0, sp))
    assert one == two and one.count("\n") == 12


def test_a_sharded_sequence_changes_nothing(ranks, short):
    """Stage 2: cold start and RL with the sequence of each group cut in two."""
    sharded = metrics(ranks.folder / "sharded")
    close(short[:1], sharded[:1], 1e-5)
    close(short, sharded, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# groups dealt over the dp groups

VISION = [60, 3, 30, 2, 45, 9, 12]                          # of each slot: one group is as long as several others together
STEPS = {"all": [0, 1, 2, 3, 4, 5, 6], "even": [0, 2, 4, 6], "one": [1]}           # home is slot % dp: some ranks have none, at first or at last


def group_of(slot, model, tokenizer):
    """A group that is a function of its slot alone."""
    noise, n = torch.Generator().manual_seed(slot), VISION[slot]
    vision = torch.randn(n, 128, generator=noise)
    prompt = vlm.make_prompt(model, tokenizer, "Which" + " red" * slot, vision, (n, 2, 2), 0.5, f"video {slot}")
    completions = []
    for length in torch.randint(2, 9 + 4 * slot, (4,), generator=noise).tolist():
        sampled = torch.rand(length, generator=noise) < 0.8
        logprobs = 0.3 * torch.randn(length, generator=noise) - math.log(model.config.text_config.vocab_size)
        tokens = torch.randint(0, 500, (length,), generator=noise)
        completions.append(Completion(tokens, sampled, logprobs * sampled, f"{slot}", False, False))
    sample, rewards = data.Sample(**question(slot, domain="choice")), torch.randn(4, generator=noise)
    return train.Group(slot, sample, prompt, completions, None, grpo.advantages(rewards))


def contents(group):
    """All that must not part, as dicts and lists."""
    return [group.slot, asdict(group.sample), vars(group.prompt), [vars(x) for x in group.completions], group.advantages]


def dealt_step(slots, ranks, stage2, most):
    """One optimizer step over slots. -> (slots before and after on each rank, whether all came as they were, metrics, norm, gradient)"""
    model, tokenizer = vlm.load("tiny", seed=3)
    model.model.visual.requires_grad_(False)
    c = train.parse(flags(**SMALL, stage2=stage2, max_tokens=most))
    groups = {slot: group_of(slot, model, tokenizer) for slot in slots}
    costs = {slot: len(g.prompt.ids) + sum(len(x.tokens) for x in g.completions) for slot, g in groups.items()}
    goes = encode.deal(costs, {slot: slot % ranks.dp for slot in slots}, ranks.dp)
    own = [groups[slot] for slot in slots if slot % ranks.dp == ranks.dp_rank]
    mine = train.move(own, goes, ranks)
    short = {slot: replace(g, prompt=replace(g.prompt, vision=g.prompt.vision.bfloat16())) for slot, g in groups.items()}
    came = mine + train.move([short[g.slot] for g in own], goes, ranks)
    alike = all(same(contents(g), contents(made[g.slot])) for g, made in zip(came, [groups] * len(mine) + [short] * len(mine)))
    sums = train.grpo_step(model, mine, c, ranks, vlm.banned_ids(model, tokenizer), len(slots) * 4)
    every = train.gather(([g.slot for g in own], [g.slot for g in mine], alike, sums), ranks)
    before, after, alike, sums = zip(*every)
    return before, after, all(alike), {k: (max if k == "gap_max" else sum)(s[k] for s in sums) for k in sums[0]}, *caught(model, ranks)


LAYOUTS = {2: [(1, False)], 4: [(2, False), (2, True), (1, False)]}                # ranks: (sp, stage2)


def deal_worker(folder):
    """What each rank does: every step in every layout of so many ranks. Several micro-steps each, more on some ranks than on others."""
    world, results = int(os.environ["WORLD_SIZE"]), {}
    for sp, stage2 in LAYOUTS[world]:
        ranks = encode.start(sp)
        results |= {(sp, stage2, name): dealt_step(slots, ranks, stage2, 150) for name, slots in STEPS.items()}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, os.path.join(folder, f"{world}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank_alone():
    return {name: dealt_step(slots, ALONE, False, 1 << 20) for name, slots in STEPS.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_groups_that_move_train_as_if_they_had_stayed(one_rank_alone, world, tmp_path):
    """D16, D29: each group is trained on by one dp group, with its own video bit for bit, and the ranks' gradients sum to one rank's."""
    ended_well = ended(torchrun("deal", str(tmp_path), script=os.path.abspath(__file__), world=world))
    assert ended_well.code == 0, ended_well.err
    results = torch.load(tmp_path / f"{world}.pt")
    assert len(results) == len(LAYOUTS[world]) * len(STEPS)
    for (sp, stage2, name), (before, after, alike, sums, norm, gradient) in results.items():
        *_, sums_alone, norm_alone, expected = one_rank_alone[name]
        case = (sp, stage2, name, before, after)
        assert alike and sorted(sum(after[::sp], [])) == STEPS[name], case
        assert all(after[r] == after[r - r % sp] for r in range(world)), case      # the sp ranks of a dp group hold the same
        assert (before != after) == (name != "one"), case                          # a group alone has no cause to move
        assert (min(map(len, after)) == 0) == (name == "one") and (min(map(len, before)) == 0) == (name != "all"), case
        error = (gradient - expected).norm() / expected.norm()
        assert error < 1e-5 and norm == pytest.approx(norm_alone, rel=1e-5) and norm_alone > 0.01, (case, float(error))
        assert sums == pytest.approx(sums_alone, rel=1e-4, abs=1e-4) and sums["clip_low"] + sums["clip_high"] > 0, case


# ---------------------------------------------------------------------------------------------------------------------
# one step

def test_sft_loss_is_the_mean_over_the_tokens_of_the_step_and_the_end_token_is_taught(run, files):
    model, tokenizer = vlm.load(run.model)
    banned, c = vlm.banned_ids(model, tokenizer), train.parse(flags(**SMALL))
    prompts, _ = train.make_prompts(model, tokenizer, data.load(files.data)[:3], c, ALONE, encode.Cache())
    texts = ["<think>so</think><answer>A</answer>", "<think>" + "so " * 9, "no"]
    sums, n = 0.0, 0
    for (_, prompt), text in zip(prompts, texts):
        tokens = torch.tensor(tokenizer(text).input_ids + [tokenizer.convert_tokens_to_ids("<|im_end|>")])
        with torch.no_grad():
            sums, n = sums - float(vlm.logprobs(model, [prompt], [[tokens]], banned)[0].sum()), n + len(tokens)
    assert train.sft_step(model, tokenizer, prompts, texts, c, ALONE, banned) == pytest.approx(sums / n, rel=1e-5)


def test_update_clips_the_norm_at_one_and_steps():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD([model.weight], 9.0)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert train.update(model, optimizer, 0.5, ALONE) == pytest.approx(5.0)
    assert torch.allclose(start - model.weight, torch.tensor([[0.3, 0.0], [0.0, 0.4]]), atol=1e-6) and model.weight.grad is None
    start = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[0.3, 0.0], [0.0, 0.4]])                     # below one: as it is
    assert train.update(model, optimizer, 0.5, ALONE) == pytest.approx(0.5)
    assert torch.allclose(start - model.weight, torch.tensor([[0.15, 0.0], [0.0, 0.2]]), atol=1e-6)
    assert train.update(model, optimizer, 0.5, ALONE) == 0.0                        # a rank without any work has no gradients


def test_bfloat16_weights_follow_updates_smaller_than_their_own_steps():
    """AdamW on bfloat16 weights at lr 1e-6 moved 2 weights in 100: the rest of every update was rounded away."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.normal_(model.weight, std=0.02).data = model.weight.data.to(torch.bfloat16).to(dtype)
        start, version, optimizer = model.weight.detach().float().clone(), model.weight._version, train.make_optimizer(model, 1e-6)
        for _ in range(300):
            model.weight.grad = torch.full_like(model.weight, 0.01)
            train.update(model, optimizer, 1e-6, ALONE)
        ends.append(model.weight.detach().float() - start)
        assert model.weight.grad is None and model.weight._version > version, "vLLM is told by the version"
    right, got = (float(x.mean()) for x in ends)
    assert right < -2e-4 and got == pytest.approx(right, rel=0.4)        # to the half step of its last rounding


def test_a_bfloat16_run_goes_on_bit_for_bit(run, tmp_path):
    """Also the part of its weights that bfloat16 does not hold."""
    how = {**run.how, "model": run.model, "sft_steps": 2, "eval_every": 0, "dtype": "bfloat16", "lr": 1e-5, "save_every": 1}
    alone(**{**how, "rl_steps": 4, "out_dir": str(tmp_path / "whole")})
    alone(**{**how, "rl_steps": 2, "out_dir": str(tmp_path / "parts")})
    alone(**{**how, "rl_steps": 4, "out_dir": str(tmp_path / "parts")})
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (torch.load(tmp_path / x / "model" / "training_state.pt", weights_only=False)["copies"] for x in ("whole", "parts"))
    assert whole and same(list(whole), list(parts)) and whole[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    train.update(model, optimizer, 0.1, ALONE)
    before = {k: v.clone() for k, v in model.state_dict().items()}, [v.clone() for s in optimizer.state.values() for v in s.values()]
    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad[1, 2] = bad
    assert not math.isfinite(train.update(model, optimizer, 0.1, ALONE))
    assert same(before, (dict(model.state_dict()), [v for s in optimizer.state.values() for v in s.values()]))
    assert all(p.grad is None for p in model.parameters())                          # nor does it leak into the next step


def test_steps_that_are_not_finite_are_counted_and_ten_in_a_row_end_the_run(files, tmp_path):
    """A learning rate that throws the weights away at the first step: all that follow have no finite gradient."""
    out = str(tmp_path / "out")
    refused(dict(data=files.data, eval_data=files.eval_data, out_dir=out, align_steps=0, sft_lr=1e30, sft_steps=14, save_every=50),
            "ten steps in a row", "lower lr or sft_lr")
    with open(os.path.join(out, "metrics.jsonl")) as f:
        skipped = [json.loads(line)["skipped"] for line in f]
    assert skipped[0] == 0 and sum(skipped) >= 9 and skipped[-9:] == [1] * 9


def test_metrics_stay_json_where_a_gradient_is_not_finite(files, tmp_path):
    """NaN, as Python spells it, is no JSON: jq, pandas and a browser refuse the whole file."""
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="ten steps"):
        alone(data=files.data, out_dir=out, eval_data=files.eval_data, align_steps=0, sft_lr=1e30, sft_steps=14, save_every=4)
    assert metrics(out)


def test_micro_batches_keep_the_order_and_the_bound():
    items = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for padded in (True, False):
        for most in (1, 5, 8, 12, 100):
            batches = list(train.micro_batches(items, lambda x: x, most, padded))
            assert sum(batches, []) == items
            assert all(len(b) == 1 or (len(b) * max(b) if padded else sum(b)) <= most for b in batches)
            for b, after in zip(batches, batches[1:]):                              # no batch could have taken one more
                b = b + after[:1]
                assert (len(b) * max(b) if padded else sum(b)) > most
    assert list(train.micro_batches([], len, 5)) == []


def test_longest_first_no_order_has_fewer_micro_batches():
    """Every cut is the greedy one of some order."""
    for items in ([3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 1, 6, 6, 6]):
        for most in (1, 6, 9, 12, 16, 24, 60):
            count = lambda order: len(list(train.micro_batches(order, lambda x: x, most)))
            assert count(sorted(items, reverse=True)) == min(map(count, itertools.permutations(items)))


def test_the_size_of_a_forward_changes_nothing(run, short, tmp_path):
    """max_tokens=1: every prompt is sampled alone and every group is its own backward. The step is the same to float error."""
    alone(**{**run.how, **SHORT, "model": run.model, "max_tokens": 1, "out_dir": tmp_path / "out"})
    rows = metrics(tmp_path / "out")
    close(short[:1], rows[:1], 1e-5)
    close(short, rows, 1e-3)


def test_the_size_of_a_forward_changes_nothing_while_the_tower_trains(files, tmp_path):
    """The whole batch goes through the tower in one call: the first micro-batch's backward freed the graph the second needs."""
    rows = []
    for most in (300, 16384):
        alone(data=files.data, eval_data=files.eval_data, eval_every=0, align_steps=2, sft_steps=1, rl_steps=0, max_tokens=most,
              out_dir=tmp_path / f"{most}")
        rows.append(metrics(tmp_path / f"{most}"))
    close(rows[0][:1], rows[1][:1], 1e-5)
    close(*rows, 1e-3)


def test_a_step_without_signal_is_skipped_and_says_so(run, tmp_path, capsys):
    """No answer is Z: all are equally wrong, some better in form. Form alone is no signal: no bit of the weights moves."""
    path = write(tmp_path / "q.jsonl", *[question(i, answer="Z") for i in range(6)])
    out = str(tmp_path / "out")
    alone(**{**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 2, "out_dir": out})
    assert same(weights(out), weights(run.dir))
    said = capsys.readouterr().out
    for r in metrics(out, "rl"):
        assert (r["valid_groups"], r["accuracy"], r["grad_norm"], r["skipped"]) == (0, 0, 0, 0)
        assert f"RL {r['step']}: no group has answers that differ in accuracy" in said
    assert len(metrics(out, "rl")) == 2 and 0 < sum(r["format"] for r in metrics(out, "rl")) < 2   # so that rewards did differ


def test_a_step_all_of_whose_videos_are_bad_is_empty_and_the_run_goes_on(run, tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", question(0), question(1, id="gone", video="missing.mp4"))
    out = str(tmp_path / "out")
    how = {**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 3, "prompts_per_step": 1, "oversample_cap": 1,
           "out_dir": out}
    alone(**how)
    rows, said = metrics(out, "rl"), capsys.readouterr().out
    assert [r["dropped"] for r in rows][-1] == 1 and sum(r["length"] == 0 for r in rows) == 1 and said.count("dropped gone: ") == 1
    write(tmp_path / "q.jsonl", question(1, id="gone", video="missing.mp4"))
    refused({**how, "out_dir": f"{out}-none"}, "no sample is left")


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers():
    """By counting, for right and wrong and for what is in between; 1 - C(n-c,k)/C(n,k) where it is right or wrong."""
    for accuracies in ([1, 0, 0, 1, 0], [0.0] * 4, [1.0] * 3, [0.2, 0.9, 0.0, 0.9, 1.0, 0.4]):
        n, right = len(accuracies), sum(a == 1 for a in accuracies)
        for k in range(1, n + 1):
            choices = [max(chosen) for chosen in itertools.combinations(accuracies, k)]
            assert train.pass_at(k, accuracies) == pytest.approx(sum(choices) / len(choices))
            if set(accuracies) <= {0, 1}:
                assert train.pass_at(k, accuracies) == pytest.approx(1 - math.comb(n - right, k) / math.comb(n, k))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"pass@{k} of 3 answers: k is 1 to 3"):
            train.pass_at(k, [1, 0, 1])


def test_eval_looks_at_every_budget_and_number_of_frames_asked_for(run, files, tmp_path, capsys):
    """A row each, what an evaluation with that setting alone says; a table, a picture; tiers by grades or by its own answers."""
    how = {**run.how, "mode": "eval", "model": run.model, "out_dir": tmp_path / "out"}

    def result(**more):
        alone(**{**how, **more})
        return json.loads(capsys.readouterr().out.strip().split("\n")[-1])

    whole = result(eval_frames="1,2", eval_budgets="0,3,5-8", pass_k=2)
    settings = [(f, least, most) for f in (1, 2) for least, most in ((0, 0), (0, 3), (5, 8))]
    assert [(r["frames"], r["think_least"], r["think_budget"]) for r in whole["rows"]] == settings
    with Image.open(tmp_path / "out" / "eval.png") as image:
        assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 10
    for row in whole["rows"]:
        if not row["think_least"]:
            single = result(frames=row["frames"], think_budget=row["think_budget"])
            assert {k: single[k] for k in row.keys() - {"rows", "tiers"}} == {k: row[k] for k in row.keys() - {"rows", "tiers"}}
    base = result()
    assert base["pass@1"] <= whole["pass@2"] <= base["pass@4"] and {k: whole[k] for k in ("accuracy", "pass@1")} == {k: base[k] for k in ("accuracy", "pass@1")}
    assert sum(t["samples"] for t in base["tiers"]) == 4 == base["samples"]
    assert sum(t["samples"] * t["accuracy"] for t in base["tiers"]) == pytest.approx(4 * base["accuracy"])
    held = [s.id for s in data.load(files.eval_data)]
    lines = "".join(json.dumps({"id": id, "correct": 8 * (i > 0), "total": 8}) + "\n" for i, id in enumerate(held[:3]))
    told = result(grades=write_text(tmp_path / "grades.jsonl", lines))
    assert [t["samples"] for t in told["tiers"]] == [1, 0, 0, 0, 2]            # the fourth has no grade
    assert all(r["forced"] == 1 and r["length"] > 8 for r in whole["rows"] if not r["think_budget"])


def test_without_force_no_thought_that_was_cut_earns_anything(run, tmp_path, capsys):
    """GLM-4.1V §5.3.1: with force the same cut thoughts are answered, and graded as any answer."""
    results = []
    for force in ("true", "false"):
        alone(**{**run.how, "mode": "eval", "model": run.model, "think_budget": 3, "force_answer": force, "out_dir": tmp_path / "out"})
        results.append(json.loads(capsys.readouterr().out.strip().split("\n")[-1]))
    forced, cut = results
    assert forced["forced"] == 1 and forced["accuracy"] == forced["forced_accuracy"] >= 0.25 and forced["truncated"] == 0
    assert cut["forced"] == 0 and cut["truncated"] == 1 and cut["accuracy"] == cut["format"] == cut["pass@4"] == 0


def test_eval_prints_one_line_of_json_last(run, files, tmp_path, capsys):
    path = write(tmp_path / "e.jsonl", *map(question, range(50, 53)), question(0, answer="7"), question(9, id="gone", video="missing.mp4"))
    alone(**{**run.how, "mode": "eval", "model": run.model, "eval_data": path, "eval_samples": 9, "out_dir": tmp_path / "out"})
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert {"accuracy", "format", "pass@1", "pass@4", "domains"} <= result.keys()
    assert (result["samples"], result["dropped"]) == (4, 1) and set(result["domains"]) == {"choice", "count"}
    assert result["domains"]["count"] == 0 and result["accuracy"] == pytest.approx(result["domains"]["choice"] * 3 / 4)
    assert result["pass@1"] <= result["pass@4"] <= 0.75 and not os.path.exists(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# curriculum sampling

def test_as_many_more_are_asked_as_the_last_steps_say(run):
    """The logged ratio is the average, as the invalid rates of the steps before set it, of an even number of prompts."""
    ratio, n = 1.0, SMALL["prompts_per_step"]
    for r in metrics(run.dir, "rl"):
        assert r["oversample"] == 2 * math.ceil((n * ratio - 0.01) / 2) / n
        assert r["valid_groups"] <= round((1 - r["invalid_rate"]) * n * r["oversample"])
        ratio += 0.1 * (min(8, 1 / max(1e-9, 1 - r["invalid_rate"])) - ratio)
    curriculum = torch.load(os.path.join(run.model, "training_state.pt"), weights_only=False)["curriculum"]
    assert curriculum["ratio"] == pytest.approx(ratio) and ratio > 1
    assert any(r["oversample"] > 1 for r in metrics(run.dir, "rl"))


@pytest.mark.parametrize("cap", [4.0, 1.0])
def test_a_step_trains_on_the_balanced_groups_and_notes_them_all(run, tmp_path, monkeypatch, capsys, cap):
    """Half of the questions have no right answer. Kept are at most prompts_per_step groups, all others are noted too; what
    the cap does to the ratio is said; with a cap of 1 nothing is asked beyond prompts_per_step, and nothing is said."""
    trained, out = [], str(tmp_path / "out")
    step = train.grpo_step
    monkeypatch.setattr(train, "grpo_step", lambda model, groups, *a: trained.append([g.sample.id for g in groups]) or step(model, groups, *a))
    path = write(tmp_path / "q.jsonl", *[question(i, answer="Z" if i < 9 else "A") for i in range(12)])
    alone(**{**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 6, "eval_every": 0, "prompts_per_step": 2,
             "updates_per_rollout": 1, "oversample_cap": cap, "out_dir": out})
    rows, said = metrics(out, "rl"), capsys.readouterr().out
    assert (max(r["oversample"] for r in rows) > 1) == (cap > 1) == ("groups to learn from, 2 wanted" in said)
    assert ("oversample_cap = 4 times as many" in said) == (cap > 1 and any(r["invalid_rate"] > 0.75 for r in rows))
    assert [len(ids) for ids in trained] == [r["valid_groups"] for r in rows if r["valid_groups"]] and max(map(len, trained)) <= 2
    assert not {f"q{i}" for i in range(9)} & {id for ids in trained for id in ids}
    curriculum = torch.load(os.path.join(out, "model", "training_state.pt"), weights_only=False)["curriculum"]
    assert visits(curriculum) == 2 * sum(r["oversample"] for r in rows)


def test_grades_are_written_once_and_set_the_tiers(run, files, tmp_path, capsys, monkeypatch):
    """Stopped in the middle of a line and started again, --mode=grade does what is missing, to the same file. In training it
    is what the curriculum knows at first; other data, another model, or a line that is no grade are refused."""
    folder, out = tmp_path / "grades", str(tmp_path / "out")
    path, how = str(folder / "grades.jsonl"), {**run.how, "mode": "grade", "model": run.model, "out_dir": folder}
    alone(**how)
    said = capsys.readouterr().out
    assert all(f"not graded {id}: " in said for id in ("gone", "text")) and "12 graded, 2 not" in said
    text = open(path).read()
    rows = {r["id"]: r for r in map(json.loads, text.splitlines())}
    assert set(rows) == {f"q{i}" for i in range(12)} and text.count("\n") == 12
    assert all(r["total"] == 4 and 0 <= r["correct"] <= 4 for r in rows.values()) and len({r["correct"] for r in rows.values()}) > 1
    with open(path, "w") as f:
        f.write("\n".join(text.split("\n")[:5]) + '\n{"id": "q')
    asked = []
    monkeypatch.setattr(train, "rollout", lambda m, t, prompts, *a, **k: asked.extend(prompts) or rollout(m, t, prompts, *a, **k))
    alone(**how)
    assert open(path).read() == text and len(asked) == 7

    monkeypatch.undo()
    train_on = {**run.how, "model": run.model, "sft_steps": 0, "rl_steps": 1, "eval_every": 0, "out_dir": out, "grades": path}
    given, real = [], train.Curriculum
    monkeypatch.setattr(train, "Curriculum", lambda *a: given.append(a) or real(*a))
    alone(**train_on)
    assert given[-1][2] == {id: [r["correct"], 4.0] for id, r in rows.items()} and given[-1][3] is True
    other = write(tmp_path / "other.jsonl", *[question(i, answer="B") for i in range(12)])
    refused({**train_on, "data": other, "out_dir": f"{out}-2"}, path, "line 1", "other data")
    refused({**train_on, "data": write(tmp_path / "few.jsonl", question(1)), "out_dir": f"{out}-2"}, path, "other data", "'q0'")
    refused({**train_on, "grades": str(tmp_path / "none.jsonl"), "out_dir": f"{out}-2"}, "none.jsonl: no such file")
    refused({**how, "model": "tiny"}, path, "line 1: graded by", "not 'tiny'")
    for bad in ('{"id": "q0", "correct": 5, "total": 4}', '{"id": "q0"}', "[]", '{"id": ["q0"], "correct": NaN, "total": 4}', "oops"):
        refused({**train_on, "grades": write_text(tmp_path / "bad.jsonl", bad + "\n"), "out_dir": f"{out}-2"}, "bad.jsonl, line 1: expected")
    plain = write_text(tmp_path / "plain.jsonl", '{"id": "q0", "correct": 1, "total": 8}\n{"id": "q0", "correct": 2.5, "total": 8}\n')
    assert train.read_grades(plain, data.load(files.data)) == {"q0": [3.5, 16.0]}                 # several models, by any other tool


# ---------------------------------------------------------------------------------------------------------------------
# hyperparameters

def test_every_hyperparameter_is_set_by_its_name_and_has_its_type():
    assert train.parse([]) == train.Config()
    c = train.parse(["--lr=1e-4", "--frames=7", "--data=a=b.jsonl", "--model=", "--clip_high=1", "--seed=-0", "--frames=8"])
    assert (c.lr, c.frames, c.data, c.model, c.clip_high, c.seed) == (1e-4, 8, "a=b.jsonl", "", 1.0, 0) and type(c.clip_high) is float
    for key, value in asdict(train.Config()).items():
        text, other = {"int": ("41", 41), "float": ("0.41", 0.41), "str": ("x41", "x41"), "bool": ("true", True)}[type(value).__name__]
        assert asdict(train.parse([f"--{key}={text}"])) == {**asdict(train.Config()), key: other}
    assert set("model data eval_data video_dir out_dir mode seed sp frames align_steps sft_steps sft_batch rl_steps prompts_per_step "
               "group_size updates_per_rollout think_budget answer_budget lr sft_lr clip_low clip_high loss_average format_weight "
               "eval_every eval_samples save_every".split()) <= asdict(train.Config()).keys()


@pytest.mark.parametrize("argument, says", [
    ("--group_sise=8", "unknown hyperparameter 'group_sise'; did you mean 'group_size'?"),
    ("--rl-steps=8", "unknown hyperparameter 'rl-steps'; did you mean 'rl_steps'?"),
    ("--zzzz=8", "unknown hyperparameter 'zzzz'; they are listed at the top of train.py"), ("--=8", "unknown hyperparameter ''"),
    ("--rl_steps=many", "--rl_steps=many: rl_steps must be an integer"), ("--rl_steps=4.0", "--rl_steps=4.0: rl_steps must be an integer"),
    ("--rl_steps=", "--rl_steps=: rl_steps must be an integer"), ("--lr=fast", "--lr=fast: lr must be a number"),
    ("--rl_steps", "'--rl_steps': hyperparameters are given as --key=value"), ("rl_steps=4", "'rl_steps=4': hyperparameters are given as"),
    ("-rl_steps=4", "'-rl_steps=4': hyperparameters are given as"), ("--stage2=yes", "--stage2=yes: stage2 must be true or false"), ("4", "'4': hyperparameters are given as --key=value")])
def test_a_bad_argument_is_named(argument, says):
    with pytest.raises(ValueError) as e:
        train.parse(["--seed=1", argument])
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("how, says", [
    (dict(mode="grad"), "mode is"), (dict(rollout="vLLM"), "rollout is"), (dict(dtype="float16"), "dtype is"), (dict(loss_average="mean"), "loss_average is"),
    (dict(group_size=1), "group_size = 1: a group needs at least 2"), (dict(group_size=0), "group_size = 0"),
    (dict(group_size=-4), "group_size = -4"), (dict(group_size=9), "group_size = 9 is not divisible by sp = 2"),
    (dict(prompts_per_step=5), "prompts_per_step = 5 is not divisible by the 3 dp groups"),
    (dict(pass_k=9), "pass_k = 9 is more than group_size = 8"), (dict(think_budget=0, force_answer=False), "leave no answer"),
    (dict(eval_frames="16,x"), "whole numbers"), (dict(eval_budgets="1-2-3"), "whole numbers"), (dict(eval_budgets="-4"), "whole numbers"),
    (dict(eval_budgets="9-4"), "--eval_budgets=9-4"), (dict(eval_budgets="8,0", force_answer=False), "a budget of 0 needs force_answer"), (dict(eval_frames="0"), "frames are at least 1"),
    (dict(eval_budgets="4-9", rollout="vllm"), "torch engine's alone"),
    *[(dict(oversample_cap=cap), "oversample_cap = ") for cap in (0.9, -1.0, math.nan, math.inf)],
    *[({key: 0}, f"{key} = 0 must be at least 1") for key in ("frames", "max_tokens", "vllm_length", "sft_batch", "prompts_per_step",
                                                              "updates_per_rollout", "answer_budget", "save_every")],
    *[({key: -1}, f"{key} = -1 must not be negative") for key in ("think_budget", "align_steps", "sft_steps", "rl_steps", "warmup",
                                                                  "eval_every", "eval_samples", "show_every")]])
def test_what_cannot_work_is_named(how, says):
    good = train.Config(prompts_per_step=6)
    train.check(good, encode.Ranks(sp=2, dp=3))
    with pytest.raises(ValueError) as e:
        train.check(train.Config(**{**asdict(good), **how}), encode.Ranks(sp=2, dp=3))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("how", [dict(seed=-1), dict(lr=math.nan), dict(sft_lr=-1e-3), dict(clip_low=1.5), dict(clip_high=-0.1),
                                 dict(format_weight=1.5), dict(max_pixels=-1), dict(vllm_memory=1.5)], ids=str)
def test_numbers_out_of_their_range_are_named_too(how):
    """seed = -1 made the align stage ask for videos like "toy:-9980000": all were dropped, and it trained on nothing."""
    with pytest.raises(ValueError, match=next(iter(how))):
        train.check(train.Config(**how), ALONE)


# ---------------------------------------------------------------------------------------------------------------------
# the other sampler, as far as it needs no vLLM: the rest is tests/test_vllm.py

@pytest.mark.parametrize("dtype, right, wrong", [("float32", 1e-4, 0.01), ("bfloat16", 0.02, 0.3), ("float32", 0.0, math.nan)])
def test_a_sampler_that_is_not_the_trainer_ends_the_run(dtype, right, wrong):
    """0.01 is what transformers' get_rope_index makes of a video's positions."""
    train.check_gap(right, train.Config(dtype=dtype))
    with pytest.raises(ValueError, match="positions.*reloaded.*banned ids.*precision") as e:
        train.check_gap(wrong, train.Config(dtype=dtype))
    assert "\n" not in str(e.value)


def test_a_run_whose_sampler_has_other_positions_is_ended(run, tmp_path, monkeypatch):
    """The bug of every trainer whose sampler places the text after a video elsewhere: here it is no slow poison but a line."""
    def elsewhere(model, tokenizer, prompts, *rest, **how):
        real = vlm.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vlm, "forward", lambda m, layout, ids, positions, *more: real(
                m, layout, ids, positions + (torch.arange(positions.shape[2]) > positions.shape[2] - 4), *more))
            return rollout(model, tokenizer, prompts, *rest, **how)
    monkeypatch.setattr(train, "rollout", elsewhere)
    refused({**run.how, "model": run.model, "sft_steps": 0, "eval_every": 0, "out_dir": str(tmp_path / "out")}, "positions computed in two ways")


def test_prompts_that_vllm_makes_no_room_for_are_dropped_and_counted(run, files):
    model, tokenizer = vlm.load(run.model)
    samples = data.load(run.how["data"])[:2]
    length = lambda **how: train.make_prompts(model, tokenizer, samples, train.Config(**{**run.how, **how}), ALONE, encode.Cache())
    made, _ = length(rollout="vllm")
    most = len(made[0][1].ids) + room(tokenizer, run.how["think_budget"], run.how["answer_budget"])
    assert len(length(rollout="vllm", vllm_length=most)[0]) >= 1 and len(length(vllm_length=1)[0]) == 2
    made, dropped = length(rollout="vllm", vllm_length=most - 1)
    assert samples[0].id in dropped and f"do not fit vllm_length = {most - 1}" in dropped[samples[0].id]


@pytest.mark.parametrize("module, says", [(None, "needs vLLM 0.32.0: pip install"), (SimpleNamespace(__version__="0.31.2"), "0.31.2 is installed")])
def test_without_the_right_vllm_a_run_ends_before_it_begins(monkeypatch, tmp_path, module, says):
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))                    # whatever is set is unset afterwards
    refused(dict(rollout="vllm", out_dir=str(tmp_path / "out")), says)
    assert not (tmp_path / "out").exists()


def test_nothing_of_vllm_is_imported_unless_asked_for():
    code = "import sys, train, rollout, bench; print([m for m in sys.modules if m.startswith('vllm')])"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# verifiers of one's own

JUDGE = """
def judge(predicted, answer):
    if not predicted.strip():
        raise RuntimeError("nothing to judge")
    return 0.25 if predicted.strip() == answer else 0.75

def strict(predicted, answer):
    raise ConnectionError("the judge does not answer")
"""


def test_a_verifier_of_ones_own_grades_and_one_that_fails_leaves_its_samples_ungraded_and_counted(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.rewards, "VERIFIERS", dict(train.rewards.VERIFIERS))
    (tmp_path / "mine.py").write_text(JUDGE)
    rows = [question(i, domain="kind") for i in range(4)] + [question(i, id=f"hard{i}", domain="hard") for i in range(4, 6)]
    path = write(tmp_path / "q.jsonl", *rows)
    how = {**run.how, "model": run.model, "data": path, "eval_data": path, "sft_steps": 0, "rl_steps": 2, "eval_every": 2, "out_dir": str(tmp_path / "out"),
           "verifiers": f"kind={tmp_path}/mine.py:judge,hard={tmp_path}/mine.py:strict"}
    alone(**how)
    said, rl = capsys.readouterr().out, metrics(how["out_dir"], "rl")
    assert "not graded hard4: domain 'hard': ConnectionError: the judge does not answer" in said
    assert sum(r["unscored"] for r in rl) >= 2 and rl[-1]["dropped"] == 0, "it is asked again: the judge may be back"
    assert all(r["accuracy"] in (0, 0.25, 0.75) or 0.2 < r["accuracy"] < 0.8 for r in rl if r["length"])
    for wrong, says in (("kind", "is not domain="), ("kind=nowhere.py:judge", "nowhere.py:judge"), (f"kind={tmp_path}/mine.py:gone", "gone")):
        refused({**how, "verifiers": wrong, "out_dir": str(tmp_path / "other")}, says)


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one clear line, on every rank, and soon

def one_clear_line(result, *says):
    """Not one traceback from train.py, whose line it is; what torchrun adds of its own is torchrun's."""
    assert result.code not in (0, None)
    said = {line for line in result.err.replace("\r", "\n").split("\n") if "train.py: " in line}
    assert len(said) == 1 and next(iter(said)).startswith("train.py: "), result.err
    assert all(words in next(iter(said)) for words in says), said
    assert f'File "{TRAIN}"' not in result.err, result.err


@pytest.fixture(scope="module")
def bad_runs(run, files):
    """Three at once: refused before the ranks know one another, while they meet, and after."""
    started = {"key": torchrun(*flags(**run.how), "--group_sise=8"), "sp": torchrun(*flags(**run.how), "--sp=3"),
               "other": torchrun(*flags(**{**run.how, "out_dir": run.dir, "seed": 1, "lr": 0.5}))}
    return {name: ended(process) for name, process in started.items()}


def test_two_ranks_end_with_one_clear_line(run, bad_runs):
    one_clear_line(bad_runs["key"], "unknown hyperparameter 'group_sise'", "group_size")
    one_clear_line(bad_runs["sp"], "sp = 3 does not divide the 2 ranks")
    one_clear_line(bad_runs["other"], "another configuration", "seed = 0 there, 1 here", "lr = 0.0003 there, 0.5 here", "--out_dir")
    assert os.readlink(run.model) == f"ckpt-{LAST}"


def test_a_bad_start_is_one_clear_line(files, tmp_path, monkeypatch):
    """What the three runs above show for two ranks, for every other bad start in one process."""
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    empty, broken = write(tmp_path / "empty.jsonl"), write(tmp_path / "broken.jsonl", question(0))
    with open(broken, "a") as f:
        f.write("{oops\n")
    missing = write(tmp_path / "missing.jsonl", question(0), {k: v for k, v in question(1).items() if k != "answer"})
    hollow = write(tmp_path / "hollow.jsonl", question(0), question(1), question(2, question=" "))
    how = {**SMALL, "data": files.data, "eval_data": files.eval_data, "out_dir": str(tmp_path / "out")}
    for bad, *says in [(dict(rl_steps="x"), "rl_steps must be an integer"), (dict(sp=3), "sp = 3 does not divide the 1 ranks"),
                       (dict(group_size=1), "group_size = 1"), (dict(data=empty), empty, "no samples"),
                       (dict(data=broken), f"{broken}, line 2: not JSON"), (dict(data=missing), f"{missing}, line 2: no 'answer'"),
                       (dict(data=hollow), f"{hollow}, line 3: an empty 'question'"), (dict(eval_data=broken), f"{broken}, line 2"),
                       (dict(data=str(tmp_path / "no.jsonl")), "no.jsonl: no such file"), (dict(out_dir=str(tmp_path / "file")), "file"),
                       (dict(model=str(tmp_path / "model")), f"{tmp_path / 'model'} is no checkpoint"),
                       (dict(mode="eval", model=str(tmp_path / "model")), "is no checkpoint")]:
        line = script(monkeypatch, *flags(**{**how, **bad}))
        assert isinstance(line, str) and line.startswith("train.py: ") and "\n" not in line, line
        assert all(words in line for words in says), line
    assert not os.path.exists(tmp_path / "out" / "model")


def test_a_model_that_is_nowhere_is_one_clear_line(files, tmp_path, monkeypatch):
    """transformers says it in several lines, and asks whether one is on the internet."""
    line = script(monkeypatch, *flags(**{**SMALL, "data": files.data, "out_dir": tmp_path / "out", "model": str(tmp_path / "nowhere")}))
    assert line.startswith("train.py: ") and str(tmp_path / "nowhere") in line and "\n" not in line, line


def test_another_configuration_is_refused_by_key(run, copied):
    for key, value in dict(seed=1, lr=0.5, group_size=8, data="toy", model=run.model, frames=4, align_steps=3).items():
        refused({**run.how, "out_dir": copied, key: value}, "another configuration", f"{key} = {run.how.get(key, getattr(train.Config(), key))!r} there",
                f"{value!r} here")


def test_a_hyperparameter_that_is_gone_does_not_keep_a_run_from_going_on():
    """Checkpoints of older commits have `compile` in their configuration."""
    c = train.Config()
    assert not hasattr(c, "compile")
    train.check_same_run(c, {**asdict(c), "compile": True}, "ckpt-1")


def test_a_domain_without_a_verifier_is_refused_before_training(run, tmp_path):
    """It was met at the first reward: after hours of align and cold start, whose last steps were lost."""
    path, out = write(tmp_path / "q.jsonl", *[question(i, domain="colour") for i in range(6)]), tmp_path / "out"
    refused({**run.how, "data": path, "align_steps": 1, "sft_steps": 1, "out_dir": out}, "'colour'")
    assert not os.path.exists(out / "metrics.jsonl") or not metrics(out)


def test_held_out_videos_that_are_all_bad_do_not_end_a_run_half_way(run, tmp_path):
    """The evaluation after the cold start found nothing to evaluate and ended the run, the cold start not yet saved.

    Refused at the start, or gone on without: either is fine.
    """
    path, out = write(tmp_path / "e.jsonl", question(1, video="missing.mp4")), tmp_path / "out"
    try:
        alone(**{**run.how, "model": run.model, "eval_data": path, "sft_steps": 1, "rl_steps": 1, "out_dir": out})
    except ValueError:
        assert not os.path.exists(out / "metrics.jsonl") or not metrics(out)
    else:
        assert len(metrics(out, "rl")) == 1


def test_a_bad_held_out_video_is_named(run, tmp_path, capsys):
    path = write(tmp_path / "e.jsonl", *map(question, range(50, 53)), question(1, id="lost", video="missing.mp4"))
    alone(**{**run.how, "model": run.model, "eval_data": path, "sft_steps": 1, "rl_steps": 0, "out_dir": tmp_path / "out"})
    said = capsys.readouterr().out
    assert "(3 samples" in said and "missing.mp4" in said


# ---------------------------------------------------------------------------------------------------------------------
# going on with something else

def test_more_cold_start_is_refused_or_right_once_rl_has_begun(run, copied):
    """sft_steps may change, but RL's optimizer was then loaded into the cold start's: the tiny model's has more parameters,
    a loaded model's took RL's moments and draws without a word."""
    try:
        alone(**{**run.how, "out_dir": copied, "sft_steps": 18})
    except ValueError as e:
        assert "sft_steps" in str(e), e
    else:
        assert [r["step"] for r in metrics(copied, "sft") if "loss" in r] == list(range(1, 19))


def test_other_evaluation_does_not_change_what_is_trained_on(run, tmp_path):
    """eval_data may change, but without it a part of data is held out: given later, the held-out part was trained on."""
    seeds = range(200)
    _, held = data.split([data.Sample(str(s), "", "", "", f"toy:{s}:1") for s in seeds])
    held = [int(s.id) for s in held][:3]
    path, out = write(tmp_path / "q.jsonl", *map(question, [*held, *[s for s in range(6) if s not in held]])), str(tmp_path / "out")
    how = {**run.how, "model": run.model, "data": path, "sft_steps": 0, "eval_every": 0, "prompts_per_step": 2, "out_dir": out}
    alone(**{**how, "eval_data": "", "rl_steps": 1})
    try:
        alone(**{**how, "rl_steps": 6})
    except ValueError as e:
        assert "eval_data" in str(e)
    else:
        curriculum = torch.load(os.path.join(out, "model", "training_state.pt"), weights_only=False)["curriculum"]
        assert not {f"q{s}" for s in held} & set(curriculum["recent"])


# ---------------------------------------------------------------------------------------------------------------------
# full disks and half-written checkpoints

def fingerprint_of_model(out_dir):
    return os.readlink(os.path.join(out_dir, "model")), fingerprint(os.path.join(out_dir, "model"))


def test_a_full_disk_ends_all_ranks_and_the_last_checkpoint_stays(run, copied):
    """Files of more than 1 MB cannot be written: the next checkpoint fails. With room again the run goes on as if nothing was."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    before = fingerprint_of_model(copied)
    more = {**run.how, "out_dir": copied, "rl_steps": 8, "eval_every": 0}
    result = ended(torchrun(*flags(**more), preexec_fn=limit))
    one_clear_line(result, f"could not write checkpoint {copied}/ckpt-{LAST + 1}", f"The last good one is {copied}/ckpt-{LAST}")
    assert fingerprint_of_model(copied) == before and not [n for n in os.listdir(copied) if n.endswith(".tmp")]
    alone(**more)
    assert [r["step"] for r in metrics(copied, "rl")] == list(range(1, 9)) and os.readlink(os.path.join(copied, "model")) == f"ckpt-{LAST + 1}"


@pytest.mark.parametrize("room", [1 << 12, 1 << 20, 5 << 20])
def test_a_checkpoint_that_does_not_fit_leaves_no_trace(run, copied, room):
    """4 kB: not even the tokenizer; 1 MB: the weights; 5 MB: the optimizer's state, which torch reports in its own way."""
    model, tokenizer = vlm.load(run.model)
    state = torch.load(os.path.join(run.model, "training_state.pt"), weights_only=False) | {"step": LAST + 1, "previous": LAST}
    assert os.path.getsize(os.path.join(run.model, "model.safetensors")) < 5 << 20 < os.path.getsize(os.path.join(run.model, "training_state.pt"))
    before, limits = fingerprint(copied), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=f"ckpt-{LAST + 1}.*last good one is .*ckpt-{LAST}"):
            train.save(copied, model, tokenizer, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fingerprint(copied) == before
    train.save(copied, model, tokenizer, state)
    assert sorted(os.listdir(copied)) == [f"ckpt-{LAST}", f"ckpt-{LAST + 1}", "curves.png", "metrics.jsonl", "model"]
    assert same(weights(copied), weights(run.dir)) and train.newest(copied) == os.path.join(os.path.realpath(copied), f"ckpt-{LAST + 1}")


def test_what_a_kill_leaves_half_written_is_in_nobodys_way(run, copied):
    """Killed between making the new link and moving it, a run left model.tmp behind, and no later save could make its own."""
    os.makedirs(os.path.join(copied, f"ckpt-{LAST + 1}.tmp"))
    shutil.copytree(os.path.join(copied, f"ckpt-{LAST}"), os.path.join(copied, f"ckpt-{LAST + 1}"))   # renamed, not yet linked
    os.symlink(f"ckpt-{LAST + 1}", os.path.join(copied, "model.tmp"))
    alone(**{**run.how, "out_dir": copied, "rl_steps": 8, "eval_every": 0})
    assert os.readlink(os.path.join(copied, "model")) == f"ckpt-{LAST + 1}" and not same(weights(copied), weights(run.dir))
    assert sorted(os.listdir(copied)) == [f"ckpt-{LAST}", f"ckpt-{LAST + 1}", "curves.png", "metrics.jsonl", "model"]


if __name__ == "__main__":
    deal_worker(*sys.argv[2:]) if sys.argv[1] == "deal" else worker(*sys.argv[1:])


def test_a_damaged_or_lost_checkpoint_ends_the_run(copied, run, monkeypatch):
    """A link that led nowhere began anew in silence, and wrote over the older checkpoint; half a file was a traceback."""
    before, how = fingerprint(copied), flags(**{**run.how, "out_dir": copied, "rl_steps": 8})
    path = os.path.join(copied, "model", "training_state.pt")
    os.truncate(path, os.path.getsize(path) // 2)
    line = script(monkeypatch, *how)
    assert line.startswith(f"train.py: {copied}/ckpt-{LAST}/training_state.pt: damaged") and "\n" not in line
    shutil.rmtree(os.path.join(copied, f"ckpt-{LAST}"))
    line = script(monkeypatch, *how)
    assert f"{copied}/model leads to a checkpoint that is gone" in line and "\n" not in line
    assert fingerprint(copied) == {k: v for k, v in before.items() if not k.startswith(f"ckpt-{LAST}")}


def test_the_cold_starts_moments_are_gone_when_rl_begins(run, tmp_path, monkeypatch):
    """What a checkpoint was made of stayed alive until the next: of 3B weights 37 GB beside RL's own."""
    update, step, moments, left = train.update, train.rl_step, [], []

    def noted(model, optimizer, *rest):
        norm = update(model, optimizer, *rest)
        moments.extend(weakref.ref(x) for of in optimizer.state.values() for x in of.values())
        return norm

    def counted(*args):
        left.append(sum(ref() is not None for ref in moments))
        moments.clear()
        return step(*args)
    monkeypatch.setattr(train, "update", noted)
    monkeypatch.setattr(train, "rl_step", counted)
    alone(**{**run.how, "out_dir": tmp_path / "out", "rl_steps": 1, "eval_every": 0, "sft_steps": 2})
    assert left == [0]


def test_data_of_which_all_is_held_out_is_refused(tmp_path, monkeypatch):
    """The run said that no sample had a thought, trained on nothing and was done."""
    seed = next(i for i in range(999) if not data.split([toy.make_sample(str(i))])[0])
    how = {**SMALL, "data": write(tmp_path / "one.jsonl", question(seed)), "out_dir": tmp_path / "out"}
    line = script(monkeypatch, *flags(**how))
    assert "one.jsonl: all 1 samples are held out" in line and "--eval_data" in line and not (tmp_path / "out").exists()


def test_help_shows_the_commands_and_every_hyperparameter(monkeypatch, capsys):
    assert script(monkeypatch, "--help") is None
    said = capsys.readouterr().out
    assert "torchrun --standalone" in said and all(f"    {f.name}: " in said for f in fields(train.Config))
