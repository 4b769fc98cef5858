"""python -m pytest tests/test_nodes.py -q

Two machines, that is two torchruns that know of one another; one that dies; what ranks and machines
can be that they cannot work together; and memory that runs out.
"""
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from runs import (
    BOUND,
    ENV,
    ROOT,
    SMALL,
    TRAIN,
    ended,
    flags,
    launched,
    logged_steps,
    metrics,
    one_clear_line,
    question,
    same,
    script,
    timeless,
    weights,
    write,
)

import model as vlm
from plumbing import ranks

HOW = {**SMALL, "sft_steps": 4, "rl_steps": 6, "prompts_per_step": 2, "eval_every": 0,
       "save_every": 2, "show_every": 0}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def machine(number, port, *arguments):
    """The torchrun of one of two machines, with one rank: LOCAL_WORLD_SIZE is 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
               f"--node_rank={number}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
               f"--master_port={port}", TRAIN, *arguments]
    return subprocess.Popen(command, env={**ENV, "GLOO_SOCKET_IFNAME": "lo"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def machines(*arguments):
    port = free_port()
    return [machine(number, port, *arguments) for number in range(2)]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(x) for x in f.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"),
                    reason="finds the ranks of a torchrun in /proc")
def test_a_machine_that_dies_ends_the_other_and_both_go_on_when_started_again(tmp_path):
    """SIGKILL to torchrun and rank of the second. The first says so and ends, long before any
    timeout; the run of the two, killed and started again, is bit for bit that of two ranks of one
    machine."""
    how = {**HOW, "data": write(tmp_path / "q.jsonl", *map(question, range(6))),
           "eval_data": write(tmp_path / "e.jsonl", question(50))}
    out = str(tmp_path / "out")
    whole = launched(*flags(**how, sp=1, out_dir=tmp_path / "whole"))
    first, second = machines(*flags(**how, out_dir=out))
    seen, start = [], time.monotonic()
    while ("rl", 3) not in seen and time.monotonic() - start < BOUND and first.poll() is None:
        time.sleep(0.01)
        seen = logged_steps(out)
    for pid in [second.pid, *children(second.pid)]:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    one_clear_line(ended(first), "another rank is gone", "same out_dir")
    assert time.monotonic() - killed < 120
    assert ended(second).code == -signal.SIGKILL
    assert ("rl", 6) not in seen
    for result in [ended(p) for p in machines(*flags(**how, out_dir=out))]:
        assert result.code == 0, result.err
    assert ended(whole).code == 0
    assert timeless(metrics(out)) == timeless(metrics(tmp_path / "whole"))
    assert len(metrics(out)) == 12
    assert same(weights(out), weights(tmp_path / "whole"))


# --------------------------------------------------------------------------------------------------
# ranks that cannot work together

LIAR = f"""
import os, runpy, sys, time
sys.path.insert(0, {ROOT!r})
import torch
from plumbing import ranks
rank = int(os.environ["RANK"])
if sys.argv[1] == "torch" and rank:
    torch.__version__ = "2.12.1"
if sys.argv[1] == "gpus":
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = None
if sys.argv[1] == "flag" and rank:
    sys.argv.append("--lr=0.5")
if sys.argv[1] == "silent":
    ranks.PATIENCE = ranks.timedelta(seconds=5)
    if rank:
        time.sleep(1000)                                   # torchrun ends it when rank 0 has ended
sys.argv[:2] = ["train.py"]
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.parametrize("lie, says", [
    ("torch", [f"torch = {torch.__version__} on rank 0, 2.12.1 on rank 1"]),
    ("flag", ["lr = 0.0003 on rank 0, 0.5 on rank 1"]),
    ("gpus", ["2 ranks on a machine of 1 GPUs", "--nproc_per_node=1"]),
    ("silent", ["rank 1 did not start within 0:00:05"])])
def test_ranks_that_cannot_work_together_end_with_one_clear_line(tmp_path, lie, says):
    """Before they have built anything between them: none waits for another."""
    (tmp_path / "liar.py").write_text(LIAR)
    how = {**HOW, "data": write(tmp_path / "q.jsonl", question(0)), "out_dir": tmp_path / "out"}
    result = ended(launched(lie, *flags(**how), script=str(tmp_path / "liar.py")))
    one_clear_line(result, *says)
    assert not os.path.exists(tmp_path / "out")


def test_sp_is_compared_as_each_machine_settles_it(monkeypatch):
    """sp = 0 means the ranks of the machine: of two and of one it is not the same, though the flag
    is. The one trained on alone."""
    def note(store, rank, world, facts, wrong):
        raise KeyError(facts["sp"])

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 3)]))
    monkeypatch.setattr(ranks, "meet", note)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError, match="2"):
        ranks.start(0, {"sp": 0})


@pytest.mark.method
def test_facts_are_compared_value_by_value():
    every = [{"torch": "2", "sp": 1}, {"torch": "3", "sp": 1}, {"torch": "2", "sp": 4},
             {"torch": "3", "sp": 1}]
    store = torch.distributed.HashStore()
    for rank, facts in enumerate(every[1:], 1):
        store.set(f"met {rank}", json.dumps([facts, ""]))
    with pytest.raises(ValueError) as e:
        ranks.meet(store, 0, 4, every[0])
    assert str(e.value) == ("the ranks cannot work together: torch = 2 on rank 0 2, 3 on rank 1 3; "
                            "sp = 1 on rank 0 1 3, 4 on rank 2")
    # What a rank of another version adds.
    store.set("met 3", json.dumps([every[3] | {"torch": "2", "new": 1}, ""]))
    with pytest.raises(ValueError, match="; new = None on rank 0 1 2, 1 on rank 3$"):
        ranks.meet(store, 0, 4, every[0])
    for rank in range(4):
        store.set(f"met {rank}", json.dumps([every[0], ""]))
    ranks.meet(store, 3, 4, every[0])


@pytest.mark.method
def test_what_is_wrong_on_one_rank_is_one_text_on_all():
    store = torch.distributed.HashStore()
    for rank, problem in enumerate(["", "no GPU here", "", "no GPU here"]):
        store.set(f"met {rank}", json.dumps([{"sp": 1}, problem]))
    for rank, problem in ((0, ""), (1, "no GPU here")):
        with pytest.raises(ValueError, match="^the ranks cannot work together: no GPU here$"):
            ranks.meet(store, rank, 4, {"sp": 1}, problem)


CODE = """
import os, sys
from pathlib import Path
top = sys.argv[1]
sys.path.insert(0, top)
import train                                               # as a rank has it when they meet
from plumbing import ranks

loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
ours = sorted(file for file in loaded if file.startswith(top + os.sep))
first = ranks.versions()["code"]
print(first, len(ours))
for file in map(Path, ours):
    before = file.read_bytes()
    file.write_bytes(b"#" + before[1:])
    if ranks.versions()["code"] == first:
        print("not noticed:", file)
    file.write_bytes(before)
assert ranks.versions()["code"] == first
"""


def test_the_ranks_notice_another_version_of_any_of_our_files(tmp_path):
    """A changed byte of any loaded file at the top or in plumbing/ gives another hash; the folder's
    name and a user's own files beside ours do not."""
    (tmp_path / "code.py").write_text(CODE)
    processes = []
    for name in ("one", "two"):
        top = tmp_path / name
        shutil.copytree(os.path.join(ROOT, "plumbing"), top / "plumbing",
                        ignore=shutil.ignore_patterns("__pycache__"))
        for file in os.listdir(ROOT):
            if file.endswith(".py"):
                shutil.copy(os.path.join(ROOT, file), top)
        if name == "two":
            (top / "mine.py").write_text("def judge(predicted, answer):\n    return 1.0\n")
            (top / "plumbing" / "mine.py").write_text("")
        processes.append(subprocess.Popen(
            [sys.executable, str(tmp_path / "code.py"), str(top)], env={**ENV, "PYTHONPATH": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = []
    for result in map(ended, processes):
        assert result.code == 0, result.err
        outputs.append(result.out)
    assert outputs[0] == outputs[1]
    [line] = outputs[0].splitlines()                       # no file was not noticed
    assert int(line.split()[1]) > 25                       # files


# --------------------------------------------------------------------------------------------------
# errors of the machine

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                 "9 bytes")])
def test_out_of_memory_names_the_knobs(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(vlm, "logprobs", fail)
    how = {**HOW, "data": write(tmp_path / "q.jsonl", question(0)), "out_dir": tmp_path / "out",
           "align_steps": 1}
    line = script(monkeypatch, *flags(**how))
    assert line.startswith("train.py: out of memory") and "\n" not in line
    for knob in ("max_tokens", "frames", "max_pixels", "checkpointing", "stage2", "vllm_memory"):
        assert knob in line, line
    assert str(error).split("\n")[0] in line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ranks, "start", fail)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="shapes"):
        runpy.run_path(TRAIN, run_name="__main__")
