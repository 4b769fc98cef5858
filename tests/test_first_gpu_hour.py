"""python -m pytest tests/test_first_gpu_hour.py -q

experiments/first_gpu_hour.py without a GPU: its dry run, the commands it shows, and whether it sees
a vLLM that keeps old weights.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import text_config

import bench
import model as vlm
import rollout
import train
from flow import Ranks
from plumbing import command_line
from plumbing.optimizer import updates
from plumbing.sharding import check_heads

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import first_gpu_hour  # noqa: E402
import first_gpu_kernels  # noqa: E402
import first_gpu_vllm  # noqa: E402


def test_dry_run(tmp_path):
    """What runs on a CPU is as expected; the rest says why it was skipped."""
    out = tmp_path / "hour.jsonl"
    skipped = ["sleep", "two_gpus", "eight_gpus"]
    parts = ["attention", "memory", "kernels", *skipped]
    run = subprocess.run(
        [sys.executable, EXPERIMENTS / "first_gpu_hour.py", "--size=tiny", f"--out={out}",
         "--parts=" + ",".join(parts)], capture_output=True, text=True, timeout=300,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": ""})
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == parts
    for row in rows:
        assert f"{row['part']}, {row['took_s']} s: {row['verdict']}" in run.stdout
        assert row["verdict"].startswith("skipped: " if row["part"] in skipped else "ok: ")
    attention, memory, kernels, *_ = rows
    assert attention["float32"]["error"] < 1e-5 < attention["bfloat16"]["error"] < 0.02
    assert 0.95 < memory["ratios"]["kept_for_backward"] < 1.05
    seconds = [spent for spent, _ in kernels["kernels"].values()]
    assert len(seconds) == first_gpu_kernels.SHOWN and seconds == sorted(seconds, reverse=True)
    assert 0 < sum(seconds) < kernels["train_kernels_s"] + 1e-3


def test_kernels_are_counted_by_name():
    """The slowest come first. Which those are depends on what else the machine does: a test that
    looked for attention among a step's slowest eight failed on a busy one."""
    x = torch.ones(100, 100)

    def call():
        for _ in range(3):
            x @ x
        x.exp()

    found = first_gpu_kernels.recorded(call, "cpu")
    assert found["aten::mm"][1] == 3 and found["aten::exp"][1] == 1
    seconds = [spent for spent, _ in found.values()]
    assert seconds == sorted(seconds, reverse=True)


def test_a_part_that_fails_says_so():
    """It ends none of the parts after it."""
    options = first_gpu_hour.Options(size="tiny")
    first_gpu_hour.PARTS["breaks"] = (breaks, 64)
    try:
        figures, verdict = first_gpu_hour.run_part("breaks", options)
    finally:
        del first_gpu_hour.PARTS["breaks"]
    assert verdict == "failed: ZeroDivisionError: division by zero"
    assert "in breaks" in figures["error"]


def breaks(row):
    return 1 / 0


def test_commands_for_several_gpus_are_understood():
    for gpus, commands, _ in first_gpu_hour.BY_HAND.values():
        for command in commands:
            words = shlex.split(command)
            if "bench.py" in words:
                options = bench.parse([w for w in words if w.startswith("--")])
                assert max(options.sp) == gpus
                continue
            assert words[2] == f"--nproc_per_node={gpus}"
            c = train.parse(words[words.index("train.py") + 1:])
            sp = c.sp or gpus
            command_line.check_training(c, Ranks(world=gpus, sp=sp, dp=gpus // sp))
            heads = (4, 2) if c.model == "tiny" else (28, 4)
            check_heads(text_config(*heads), Ranks(world=gpus, sp=sp))


class StandIn:
    """Samples as vLLM does, with a copy of the trainer's weights. keeps_first: it takes no new
    ones."""

    def __init__(self, work, keeps_first):
        self.model, self.tokenizer = vlm.load("tiny")
        self.banned, self.keeps_first, self.version = work.banned, keeps_first, None
        self.llm = SimpleNamespace(apply_model=lambda function: [function(self.model)])

    def load(self, model):
        if self.version is None or not self.keeps_first:
            self.model.load_state_dict(model.state_dict())
            self.version = updates(model)

    def sample(self, prompts, keys, **how):
        return rollout.sample(self.model, self.tokenizer, prompts, keys, banned=self.banned, **how)

    def rest(self):
        pass


@pytest.mark.parametrize("keeps_first", [False, True])
def test_weights_that_do_not_reach_vllm_are_seen(keeps_first, monkeypatch):
    """With a fused optimizer vLLM kept the first weights for ever: that is what the part is for."""
    def vllm_work(row):
        work = bench.Workload(row, Ranks())
        return work, StandIn(work, keeps_first)

    monkeypatch.setattr(first_gpu_vllm, "vllm_work", vllm_work)
    with torch.random.fork_rng():
        figures, verdict = first_gpu_vllm.weights(first_gpu_hour.row_of("tiny", 64))
    assert min(figures["changed"]) > 0
    assert verdict.startswith("look: " if keeps_first else "ok: ")
    assert (max(figures["differing"]) > 0) == keeps_first
