"""
Ways to start small runs, what they leave, and the runs that many tests share.

Runs are small enough for two cores: videos of one event, answers of a dozen tokens, the right one a
coin toss, so that sixteen steps of cold start give groups with signal. conftest.py makes the
fixtures below known to all test files.
"""
import hashlib
import json
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import encode
import grpo
import model as vlm
import train
from curriculum import DECAY
from flow import Completion, Group, Ranks, Run, Sample
from plumbing.batches import micro_batches, sharers
from plumbing.metrics import Meter
from plumbing.optimizer import update

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(ROOT, "train.py")
EVALUATE = os.path.join(ROOT, "evaluate.py")
ALONE = Ranks()
SMALL = dict(frames=2, align_steps=2, sft_steps=16, sft_batch=8, sft_lr=3e-3, rl_steps=7,
             prompts_per_step=4, group_size=4, think_budget=8, answer_budget=9, lr=3e-4, warmup=1,
             eval_samples=4, eval_every=3, save_every=3, show_every=4)
LAST = SMALL["align_steps"] + SMALL["sft_steps"] + SMALL["rl_steps"]   # of the last checkpoint
SHORT = dict(sft_steps=2, rl_steps=2, eval_every=1)        # from a checkpoint: its tower is frozen
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ENV = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
ENV |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BOUND = 600            # seconds for every process to end: a hang in gloo would last 1800


# --------------------------------------------------------------------------------------------------
# ways to start a run

def flags(**how):
    return [f"--{key}={value}" for key, value in how.items()]


def config(**how):
    """-> `train.Config` of a small run"""
    return train.parse(flags(**{**SMALL, **how}))


def alone(**how):
    """A run of one rank, in this process."""
    train.main(config(**how))


def torchrun(*arguments, script=TRAIN, world=2, **how):
    """Two ranks, or more, started. `ended` waits for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={world}", script, *arguments]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **how)


class Launched:
    """A process of tests/launch.py, with what is used of a Popen."""

    def __init__(self, folder, pid):
        self.folder, self.pid = folder, pid

    def poll(self):
        code = os.path.join(self.folder.name, "code")
        return int(read_text(code)) if os.path.exists(code) else None

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("launch.py", timeout)
            time.sleep(0.02)
        return self.poll()

    def communicate(self, timeout=BOUND):
        """-> out, err"""
        self.returncode = self.wait(timeout)
        return [read_text(os.path.join(self.folder.name, name)) for name in ("out", "err")]

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        """All processes that it started are of its session."""
        os.killpg(self.pid, signal.SIGTERM)


@cache
def launcher():
    """The process of tests/launch.py. It ends with this one, which closes its stdin."""
    command = [sys.executable, os.path.join(ROOT, "tests", "launch.py")]
    return subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)


def launched(*arguments, script=TRAIN, world=2, env=None, cwd="."):
    """As `torchrun`, by its own agent, but the ranks need not import what one process has imported.
    Without it where world is 0: `python SCRIPT ARGUMENTS`."""
    folder, process = tempfile.TemporaryDirectory(), launcher()
    request = [folder.name, env or {}, os.path.abspath(cwd), world, script, arguments]
    print(json.dumps(request), file=process.stdin, flush=True)
    return Launched(folder, int(process.stdout.readline()))


def ended(process, bound=BOUND):
    """-> code, out and err of a process. One that is still running after so many seconds fails the
    test."""
    try:
        out, err = process.communicate(timeout=bound)
    except subprocess.TimeoutExpired:
        process.terminate()                                # torchrun ends its ranks
        out, err = process.communicate()
        pytest.fail(f"still running after {bound} s\n{out}\n{err}")
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def two_ranks(arguments, script=TRAIN, env=None):
    """Two ranks without torchrun, which would end one where the other is killed. Rank 0 hosts the
    store in which they meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), **(env or {})}
    processes = []
    for rank in ("0", "1"):
        of_rank = {**world, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(launched(*arguments, script=script, world=0, env=of_rank))
    return processes


def command(monkeypatch, path, *arguments):
    """`python PATH ...` in this process. -> what it says as it exits, None if it does not"""
    monkeypatch.setattr(sys, "argv", [os.path.basename(path), *arguments])
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        return e.code
    return None


def script(monkeypatch, *arguments, path=TRAIN):
    """`python train.py ...` in this process, which exits. -> what it says as it does"""
    monkeypatch.setattr(sys, "argv", [os.path.basename(path), *arguments])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(path, run_name="__main__")
    return e.value.code


def refused(how, *says):
    """The run of these hyperparameters ends with one line that says all this."""
    with pytest.raises((ValueError, OSError)) as e:
        alone(**how)
    for words in says:
        assert words in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def one_clear_line(result, *says):
    """The ranks said one line, no traceback of train.py; what torchrun adds is torchrun's own."""
    assert result.code not in (0, None)
    lines = {x for x in result.err.replace("\r", "\n").split("\n") if "train.py: " in x}
    assert len(lines) == 1, result.err
    [line] = lines
    assert line.startswith("train.py: "), result.err
    assert all(words in line for words in says), line
    assert f'File "{TRAIN}"' not in result.err, result.err


# --------------------------------------------------------------------------------------------------
# what a run leaves

def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def metrics(out_dir, stage=None):
    """The rows of metrics.jsonl, of one stage or of all."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        rows = [json.loads(line, parse_constant=no_constant) for line in f]
    return [row for row in rows if stage in (None, row["stage"])]


def rollouts(out_dir):
    """The lines of rollouts.jsonl."""
    with open(os.path.join(out_dir, "rollouts.jsonl")) as f:
        return [json.loads(line, parse_constant=no_constant) for line in f]


def logged_steps(out_dir):
    """(stage, step) of each whole line that a run has written so far."""
    path = os.path.join(out_dir, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        rows = [json.loads(line) for line in f.read().split("\n")[:-1]]
    return [(row["stage"], row["step"]) for row in rows]


def timeless(rows):
    """Rows of metrics without seconds and memory."""
    def measured(key):
        return key.endswith("_s") or key == "peak_mb"

    return [{key: row[key] for key in row if not measured(key)} for row in rows]


def weights(out_dir):
    return load_file(os.path.join(out_dir, "model", "model.safetensors"))


def state(out_dir):
    """The training state of the newest checkpoint."""
    return torch.load(os.path.join(out_dir, "model", "training_state.pt"), weights_only=False)


def visits(curriculum):
    """How many groups a checkpoint's curriculum has noted, where all had group_size completions and
    no grades came before.

    Each visit decays what was noted before: n of them leave a total of
    group_size * (1 - DECAY^n) / (1 - DECAY).
    """
    counts = []
    for _, total in curriculum["recent"].values():
        left = 1 - (1 - DECAY) * total / SMALL["group_size"]
        counts.append(math.log(left) / math.log(DECAY))
    assert counts == pytest.approx([round(n) for n in counts])
    return sum(round(n) for n in counts)


def same(a, b):
    """Bit for bit, through dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def fingerprint(folder):
    """Every file in it, by content; links by where they lead."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in names + folders:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isdir(path):
                content = "a folder"
            else:
                with open(path, "rb") as f:
                    content = hashlib.sha256(f.read()).hexdigest()
            found[os.path.relpath(path, folder)] = content
    return found


def close(a, b, within):
    """Rows of metrics are equal but for seconds and memory and a relative error."""
    a, b = timeless(a), timeless(b)
    assert [(row["stage"], row["step"], row.keys()) for row in a] == [
        (row["stage"], row["step"], row.keys()) for row in b]
    not_compared = {"stage", "sampler_gap", "sampler_gap_max", "balance"}      # a gap is rounding
    for x, y in zip(a, b):
        for key in x.keys() - not_compared:
            assert x[key] == pytest.approx(y[key], rel=within, abs=within), (
                x["stage"], x["step"], key)


def alike(a, b, within, where=""):
    """Values of JSON are equal but for an error of their numbers."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            alike(a[key], b[key], within, f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            alike(*pair, within, f"{where} {i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=within, abs=within), where
    else:
        assert a == b, where


# --------------------------------------------------------------------------------------------------
# questions

def question(i, **other):
    return {"id": f"q{i}", "video": f"toy:{i}:1", "question": "Heads? A. yes B. no",
            "answer": "AB"[i % 2], "thought": "so", **other}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_text(path):
    with open(path) as f:
        return f.read()


def write_text(path, text):
    path.write_text(text)
    return str(path)


# --------------------------------------------------------------------------------------------------
# fixtures

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As torchrun has it. The models here are too small to share out."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Questions about twelve videos, one that is missing, and one that is no video; and four to
    evaluate on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "notes.txt").write_text("These are notes, not a video.\n" * 50)
    bad = [question(90, id="gone", video="missing.mp4"), question(91, id="text", video="notes.txt")]
    return SimpleNamespace(
        folder=folder,
        data=write(folder / "q.jsonl", *map(question, range(12)), *bad),
        eval_data=write(folder / "e.jsonl", *map(question, range(50, 54))))


@pytest.fixture(scope="session")
def run(files, tmp_path_factory):
    """From nothing to the end, never stopped: two ranks that share every video. Nobody may change
    what is in its folder."""
    out = str(tmp_path_factory.mktemp("run") / "out")
    how = {**SMALL, "data": files.data, "eval_data": files.eval_data}
    result = ended(torchrun(*flags(**how, out_dir=out)))
    assert result.code == 0, result.err
    return SimpleNamespace(how=how, dir=out, model=os.path.join(out, "model"), **vars(result))


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the shared run's folder, to go on from."""
    shutil.copytree(run.dir, tmp_path / "copied", symlinks=True)
    return str(tmp_path / "copied")


@pytest.fixture(scope="session")
def short_dir(run, tmp_path_factory):
    """What two steps of cold start and two of RL left, from the shared run's checkpoint."""
    out = tmp_path_factory.mktemp("short") / "out"
    alone(**{**run.how, **SHORT, "model": run.model, "out_dir": out})
    return out


@pytest.fixture(scope="session")
def short(short_dir):
    """Its metrics."""
    rows = metrics(short_dir)
    assert sum(row["valid_groups"] for row in rows if row["stage"] == "rl") > 1
    return rows


# --------------------------------------------------------------------------------------------------
# steps of training without a run

def run_of(model, tokenizer, ranks=ALONE, **how):
    """-> `flow.Run` of a small run's configuration"""
    return Run(config(**how), ranks, print, model, tokenizer, vlm.banned_ids(model, tokenizer),
               encode.Cache())


def learn(run, groups, divisor):
    """Backward of the clipped objective over this rank's groups, as part 6 of the RL loop does it.
    -> sums over the trained tokens of all ranks. (test_train.py holds the two together.)"""
    c, ranks, meter = run.config, run.ranks, Meter()
    for batch in micro_batches(groups, c.max_tokens, run):
        prompts = data.fetch(run, batch.prompts)
        logprobs, entropy = vlm.logprobs(run.model, prompts, batch.tokens, run.banned,
                                         ranks=sharers(c, ranks))
        loss, clipped = grpo.policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.sampled,
            c.clip_low, c.clip_high, c.loss_average, divisor)
        loss.backward()
        meter.add(batch, logprobs, entropy, clipped)
    meter.end_update(ranks, c.stage2)
    return meter.updates[0]


class Catch(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given, and changes nothing."""

    def step(self):
        self.caught = []
        for group in self.param_groups:
            self.caught += [p.grad.flatten().clone() for p in group["params"]]


def summed_gradient(model, ranks):
    """The gradients of all ranks, summed and clipped. -> (norm before the clip, one vector)"""
    catch = Catch([p for p in model.parameters() if p.requires_grad], 1.0)
    norm = update(model, catch, 1.0, ranks)
    return norm, torch.cat(catch.caught)


# Vision tokens of each slot: one group is as long as several others together.
VISION = [60, 3, 30, 2, 45, 9, 12]
# The slots of an optimizer step. Slot % dp has a group: some ranks have none, at first or at last.
STEPS = {"all": [0, 1, 2, 3, 4, 5, 6], "even": [0, 2, 4, 6], "one": [1]}


def group_of(slot, model, tokenizer):
    """A group that is a function of its slot alone."""
    noise, n = torch.Generator().manual_seed(slot), VISION[slot]
    vision = torch.randn(n, 128, generator=noise)
    prompt = vlm.make_prompt(model, tokenizer, "Which" + " red" * slot, vision, (n, 2, 2), 0.5,
                             key=f"video {slot}")
    completions = []
    for length in torch.randint(2, 9 + 4 * slot, (4,), generator=noise).tolist():
        sampled = torch.rand(length, generator=noise) < 0.8
        guess = math.log(model.config.text_config.vocab_size)
        logprobs = 0.3 * torch.randn(length, generator=noise) - guess
        tokens = torch.randint(0, 500, (length,), generator=noise)
        completions.append(Completion(tokens, sampled, logprobs * sampled, f"{slot}", False, False))
    sample = Sample(**question(slot, domain="choice"))
    advantages = grpo.advantages(torch.randn(4, generator=noise))
    return Group(slot, sample, prompt, completions, None, advantages)
