"""python -m pytest tests/test_stages.py -q

What the stages of a run have in common: updates that are skipped, samples that are dropped, and
what of a stage is gone when the next begins.
"""
import json
import math
import os
import sys
import weakref
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import worlds
from runs import SMALL, alone, metrics, refused, state, visits

import toy
import train
from curriculum import Curriculum
from plumbing.stages import Progress, Stage


def case_lines_are_gone(folder, ranks):
    """-> what each rank says of a run whose checkpoint counts lines that are gone"""
    out_dir = os.path.join(folder, "out")
    c = train.Config(out_dir=out_dir)
    if ranks.rank == 0:
        os.makedirs(f"{out_dir}/ckpt-3")
        os.symlink("ckpt-3", f"{out_dir}/model")
        torch.save({"step": 3, "previous": 0, "lines": 3, "done": {"align": 0, "sft": 3, "rl": 0},
                    "config": asdict(c), "curriculum": {}, "copies": [],
                    "optimizer": {"state": {}, "param_groups": []}},
                   f"{out_dir}/ckpt-3/training_state.pt")
    torch.distributed.barrier()
    try:
        Progress(c, ranks, False)
    except ValueError as e:
        return [str(e)]


WORLDS = {"two": worlds.World(size=2, local=1, sp=1, cases=[case_lines_are_gone])}


def test_every_rank_hears_that_lines_are_gone(tmp_path):
    """Only the first rank did: on another machine the cause was "another rank is gone"."""
    brought = worlds.start(WORLDS, __file__, tmp_path)
    [first], [second] = brought("two", "case_lines_are_gone")
    assert first == second and "metrics.jsonl: not whole up to the checkpoint" in first


def test_steps_that_are_not_finite_are_counted_and_ten_in_a_row_end_the_run(files, tmp_path):
    """A learning rate that throws the weights away at the first step: all that follow have no
    finite gradient."""
    out = str(tmp_path / "out")
    how = dict(data=files.data, eval_data=files.eval_data, out_dir=out, align_steps=0, sft_lr=1e30,
               sft_steps=14, save_every=50)
    refused(how, "ten steps in a row", "lower lr or sft_lr")
    with open(os.path.join(out, "metrics.jsonl")) as f:
        skipped = [json.loads(line)["skipped"] for line in f]
    assert skipped[0] == 0
    assert sum(skipped) >= 9 and skipped[-9:] == [1] * 9


def stage_without_a_run(lines=None):
    """What `count_skipped` and `drop` need of a stage."""
    stage = Stage.__new__(Stage)
    stage.progress = SimpleNamespace(bad_steps=0)
    stage.curriculum = Curriculum(["a", "b", "c"], "0")
    stage.run = SimpleNamespace(say=[].append if lines is None else lines.append)
    return stage


@pytest.mark.method
def test_only_steps_in_a_row_end_a_run():
    stage = stage_without_a_run()
    for bad in (math.nan, math.inf):
        assert [stage.count_skipped(bad) for _ in range(9)] == [1] * 9
        assert stage.count_skipped(0.3) == 0
    for _ in range(9):
        stage.count_skipped(math.nan)
    with pytest.raises(ValueError, match="ten steps in a row"):
        stage.count_skipped(math.nan)


@pytest.mark.method
def test_a_dropped_sample_is_named_once_and_not_drawn_again():
    lines = []
    stage = stage_without_a_run(lines)
    stage.drop({"b": "no such file"})
    stage.drop({"b": "no such file", "c": "too long"})
    assert lines == ["dropped b: no such file (1 dropped so far)",
                     "dropped c: too long (2 dropped so far)"]
    assert set(stage.curriculum.draw(20)) == {"a"}


def test_bad_videos_are_dropped_named_counted_and_not_replaced(run, files):
    """A missing video and one that is none: each stage says which and why, goes on without, and
    puts nothing in their place."""
    for id, file in (("gone", "missing.mp4"), ("text", "notes.txt")):
        lines = [x for x in run.out.splitlines() if x.startswith(f"dropped {id}: ")]
        assert len(lines) == 2                             # once a stage
        assert all(str(files.folder / file) in line for line in lines)
    for stage in ("sft", "rl"):
        dropped = [row["dropped"] for row in metrics(run.dir, stage) if "dropped" in row]
        assert dropped == sorted(dropped) and dropped[-1] == 2
    curriculum = state(run.dir)["curriculum"]
    assert set(curriculum["dropped"]) == {"gone", "text"}
    assert set(curriculum["recent"]) == {f"q{i}" for i in range(12)}
    asked = sum(row["oversample"] for row in metrics(run.dir, "rl")) * SMALL["prompts_per_step"]
    assert visits(curriculum) == asked - 2                 # two draws gave nothing


def test_the_moments_of_the_cold_start_are_gone_when_rl_begins(run, tmp_path, monkeypatch):
    """What a checkpoint was made of stayed alive until the next: of 3B weights 37 GB beside RL's
    own."""
    real_update, real_encode, moments, left = toy.update, train.encode_questions, [], []

    def update(model, optimizer, *rest):
        norm = real_update(model, optimizer, *rest)
        for of_weight in optimizer.state.values():
            moments.extend(weakref.ref(x) for x in of_weight.values())
        return norm

    def encode_questions(*arguments):
        left.append((len(moments), sum(ref() is not None for ref in moments)))
        moments.clear()
        return real_encode(*arguments)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(toy, "update", update)
    monkeypatch.setattr(train, "encode_questions", encode_questions)
    alone(**{**run.how, "out_dir": tmp_path / "out", "rl_steps": 1, "eval_every": 0,
             "sft_steps": 2})
    [(seen, alive)] = left
    assert seen > 100 and alive == 0


if __name__ == "__main__":
    worlds.run(WORLDS, sys.argv[1], sys.argv[1])
