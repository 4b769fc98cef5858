"""python -m pytest tests/test_bench.py -q

The variants do the same work by other ways: same completions, loss and gradient. The rows of two ranks are real runs.
"""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import encode
import grpo
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
                        (["--group=3", "--sp=2"], "not divisible")):
        with pytest.raises(ValueError, match=said) as error:
            bench.parse(given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nothing to run"):
        bench.main(bench.parse(["--variant=naive", "--cache=warm"]))
    with pytest.raises(ValueError, match="multiple of 28"):
        bench.main(bench.parse(["--variant=shared", "--sp=1", "--size=50"]))       # said by the row's own process
    assert "frames" not in capfd.readouterr().out
