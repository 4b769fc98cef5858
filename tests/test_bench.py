"""python -m pytest tests/test_bench.py -q

The variants do the same work in different ways: the same completions, loss and gradient. The rows
of two ranks are real runs.
"""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import grpo
from flow import Ranks
from plumbing import memory

SMALL = {"frames": 5, "size": 56, "group": 4, "completion": 5, "steps": 1, "warmup": 0}


def make_row(variant, **other):
    """The options of one small row."""
    row = replace(bench.Options(), **SMALL, sp=1, variant=variant, cache="cold", rollout="torch")
    return replace(row, **other)


def one_step(variant, monkeypatch, **other):
    """-> what the first step returned, and its loss, gradient, tokens, counts and phases"""
    work = bench.Workload(make_row(variant, **other), Ranks())
    losses, tokens, gradients = [], [], []
    policy_loss, update, forward_backward = grpo.policy_loss, bench.update, bench.forward_backward

    def noted_loss(logprobs, old, *rest, **how):
        """On-policy the loss is 0: other old log-probs give it a value."""
        old = old - 0.1 * torch.arange(logprobs.shape[1])
        loss, metrics = policy_loss(logprobs, old, *rest, **how)
        losses.append(float(loss.detach()))
        return loss, metrics

    def noted_forward(model, prompt, completions, *rest):
        tokens.extend(completion.tokens.tolist() for completion in completions)
        return forward_backward(model, prompt, completions, *rest)

    def noted_update(model, *rest):
        gradients.append(gradient(model))
        return update(model, *rest)

    monkeypatch.setattr(grpo, "policy_loss", noted_loss)
    monkeypatch.setattr(bench, "forward_backward", noted_forward)
    monkeypatch.setattr(bench, "update", noted_update)
    clock = bench.Clock()
    result = work.step(0, clock)
    monkeypatch.undo()
    return SimpleNamespace(**result, loss=sum(losses), tokens=tokens, gradient=gradients[0],
                           counts=dict(work.counts), phases=set(clock.seconds))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(x, y):
    """Of two vectors, relative to the second."""
    return float((x - y).norm() / y.norm())


def test_variants_are_the_same_step_and_the_hooks_count_what_each_computes(monkeypatch):
    naive, reuse, shared = [one_step(v, monkeypatch) for v in ("naive", "reuse", "shared")]
    for other in (reuse, shared):
        assert other.tokens == naive.tokens
        assert abs(naive.loss) > 1e-3
        assert other.loss == pytest.approx(naive.loss, rel=1e-4)
        assert other.norm == pytest.approx(naive.norm, rel=1e-4)
        assert difference(other.gradient, naive.gradient) < 1e-4
    assert max(step.gap for step in (naive, reuse, shared)) < 1e-4
    assert len(naive.tokens) == 4
    assert all(len(tokens) == 5 for tokens in naive.tokens)
    G, L, S = 4, 5, naive.prompt_tokens
    per_completion = G * S + G * (L - 1) + G * (S + L - 1)
    assert naive.counts["lm_tokens"] == reuse.counts["lm_tokens"] == per_completion
    assert shared.counts["lm_tokens"] == 2 * S + 2 * G * (L - 1)
    assert naive.counts["temporal_patches"] == 2 * G * 3   # for the rollout, and for training
    assert reuse.counts["temporal_patches"] == shared.counts["temporal_patches"] == 3
    assert naive.phases == shared.phases == {"encode", "rollout", "train"}


def test_a_warm_cache_encodes_nothing_and_a_group_of_one_runs():
    work = bench.Workload(make_row("shared", cache="warm", group=1), Ranks())
    work.prompt()
    work.counts.update(lm_tokens=0, temporal_patches=0)
    norm = work.step(0, bench.Clock())["norm"]
    assert work.counts["temporal_patches"] == 0
    assert norm > 0
    assert work.saved_bytes() > 0


def test_saved_bytes_grow_with_completions_by_less_than_the_prefix():
    def saved(variant, group):
        return bench.Workload(make_row(variant, frames=32, group=group), Ranks()).saved_bytes()

    assert saved("shared", 4) < 1.7 * saved("shared", 1)
    assert saved("naive", 4) == saved("naive", 1)          # it keeps one pass at a time


def test_checkpointing_keeps_less_and_gives_the_same_gradient(monkeypatch):
    plain, again = [one_step("shared", monkeypatch, frames=32, checkpointing=on) for on in (0, 1)]
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)
    assert difference(again.gradient, plain.gradient) < 1e-6
    rows = [make_row("shared", frames=32, checkpointing=on) for on in (0, 1)]
    saved = [bench.Workload(row, Ranks()).saved_bytes() for row in rows]
    assert saved[1] < saved[0] / 3


def test_noise_video_is_a_function_of_seed_and_frame_in_any_slices():
    video = bench.noise_video(6, 28, seed=3)
    frames = video.read(0, 6)
    assert frames.shape == (6, 28, 28, 3)
    assert frames.dtype == np.uint8
    slices = [video.read(0, 1), video.read(1, 4), video.read(4, 6)]
    assert (np.concatenate(slices) == frames).all()
    assert (bench.noise_video(6, 28, seed=4).read(0, 6) != frames).any()
    assert (frames[0] != frames[1]).any()


def test_rows_of_two_ranks(capsys, tmp_path):
    """Each row runs in processes of its own, prints one JSON line with the keys of the design, and
    has the gradient of one rank."""
    small = [f"--{key}={value}" for key, value in SMALL.items()]
    bench.run(bench.parse([*small, "--sp=2", "--variant=shared,shared+sp", "--cache=cold",
                           f"--plot={tmp_path}/plot.png"]))
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(row["variant"], row["sp"]) for row in rows] == [("shared", 2), ("shared+sp", 2)]
    for row in rows:
        assert tuple(row) == bench.KEYS
        assert row["encodes"] == 1
        phases = row["encode_s"] + row["rollout_s"] + row["train_s"]
        assert 0 < phases <= row["seconds"] + 1e-3
        assert row["peak_mb"] > 100
        assert row["device"]
    assert 0 < rows[1]["saved_mb"] < rows[0]["saved_mb"]   # stage 2 holds a part of the sequence
    P, G, L = rows[0]["prompt_tokens"], 4, 5
    assert rows[0]["lm_tokens"] == 2 * 2 * P + 2 * G * (L - 1)     # each rank has its own prefix
    computed = memory.memory(bench.build_tiny()[0].config, 5, 56, G, L, torch.float32, sp=2,
                             text=P - 12)                  # 12 vision tokens
    saved = rows[1]["saved_mb"] * 2 ** 20
    assert computed["activations"] == pytest.approx(saved, rel=0.05)
    table = [line.split() for line in out.splitlines() if line.split()[:1] == ["5"]]
    alone = bench.Workload(make_row("shared"), Ranks()).step(0, bench.Clock())["norm"]
    assert [float(line[-1]) for line in table] == pytest.approx([alone, alone], rel=1e-4)
    assert max(float(line[-2]) for line in table) < 1e-4   # sampler against trainer
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_row_is_run_once_where_options_have_several_values():
    options = bench.parse(["--frames=8,16", "--sp=1,2", "--rollout=torch,vllm"])
    rows = [(row.variant, row.cache, row.sp, row.rollout) for row in bench.rows_to_run(options)
            if row.frames == 8]
    expected = [("naive", "cold", 1, "torch"), ("reuse", "cold", 1, "torch"),
                ("reuse", "warm", 1, "torch")]
    for variant, sp in (("shared", 1), ("shared", 2), ("shared+sp", 2)):
        for cache in ("cold", "warm"):
            expected += [(variant, cache, sp, "torch"), (variant, cache, sp, "vllm")]
    assert rows == expected


@pytest.mark.parametrize("argument, words", [
    ("--frame=8", "unknown option 'frame'; did you mean 'frames'"),
    ("frames=8", "'frames=8': options are given as --key=value"),
    ("--frames=8,x", "frames must be an integer"), ("--frames=0", "at least 1"),
    ("--warmup=-1", "at least 0"), ("--variant=fast", "fast"), ("--cache=hot", "hot"),
    ("--rollout=sglang", "sglang"), ("--checkpointing=2", "0 or 1"),
    ("--memory=13b", "3b, 7b, 9b, tiny or a checkpoint directory"),
    ("--group=3 --sp=2", "not divisible")])
def test_what_cannot_be_run_is_said_in_one_sentence(argument, words):
    with pytest.raises(ValueError, match=words) as error:
        bench.parse(argument.split())
    assert "\n" not in str(error.value)


def test_a_row_that_cannot_run_is_named_with_its_reason(capfd):
    with pytest.raises(ValueError, match="nothing to run"):
        bench.run(bench.parse(["--variant=naive", "--cache=warm"]))
    with pytest.raises(ValueError, match="shared on 64 frames, sp = 1: .*multiple of 28"):
        bench.run(bench.parse(["--variant=shared", "--sp=1", "--size=50"]))    # by its own process
    assert "P" not in capfd.readouterr().out.split()       # no table


def test_a_row_that_runs_out_of_memory_says_what_takes_less():
    """It ended with torch's text alone. A frame of 28 million pixels a side fits no memory."""
    options = bench.parse(["--variant=shared", "--sp=1", "--frames=1", "--size=28000000"])
    with pytest.raises(ValueError, match="shared on 1 frames.*out of memory: checkpointing=true"):
        bench.run(options)
