"""python -m pytest tests/test_metrics.py -q

What a run logs of itself: every promised key, numbers that mean what docs/metrics.md says, and a
sampler that is not the trainer.
"""
import copy
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from runs import ALONE, ROOT, SMALL, alone, metrics, refused

import model as vlm
import train
from flow import Ranks
from plumbing.metrics import Log, Meter, check_gap
from rollout import rollout, sample

STAGE_KEYS = {"step", "stage", "loss", "grad_norm", "skipped", "dropped", "train_s", "peak_mb"}
RL_KEYS = {"step", "stage", "reward", "accuracy", "format", "length", "forced", "truncated",
           "entropy", "clip_low", "clip_high", "valid_groups", "oversample", "sampler_gap",
           "balance", "skipped", "grad_norm", "encode_s", "rollout_s", "train_s", "peak_mb"}


def promised(row):
    """The keys that a line must have."""
    if row["stage"] == "rl":
        return RL_KEYS
    if row["stage"] == "sft" and "loss" not in row:        # the evaluation after the cold start
        return {"eval_accuracy"}
    return STAGE_KEYS


def test_a_run_logs_one_line_a_step_with_every_promised_key(run):
    rows = metrics(run.dir)
    sft = [("sft", i) for i in range(1, 17)]
    rl = [("rl", i) for i in range(1, 8)]
    steps = [(row["stage"], row["step"]) for row in rows]
    assert steps == [("align", 1), ("align", 2), *sft, ("sft", 16), *rl]
    for row in rows:
        assert row.keys() >= promised(row), row
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert all(map(math.isfinite, numbers)), row
        assert row["peak_mb"] > 0
    evaluated = [(row["stage"], row["step"]) for row in rows if "eval_accuracy" in row]
    assert evaluated == [("sft", 16), ("rl", 3), ("rl", 6), ("rl", 7)]


def test_the_logged_numbers_mean_what_they_say(run):
    rows = metrics(run.dir)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 5 and losses[-1] < 0.5              # it learned to write its thoughts
    rl = metrics(run.dir, "rl")
    for row in rl:
        assert row["reward"] == pytest.approx(0.9 * row["accuracy"] + 0.1 * row["format"])
        for key in ("format", "truncated", "forced", "clip_low", "clip_high"):
            assert 0 <= row[key] <= 1, key
        assert 8 < row["length"] <= SMALL["think_budget"] + 10 + SMALL["answer_budget"]
        assert 0 < row["entropy"] < 7
        assert row["sampler_gap"] < 1e-5                   # sampler and trainer: one distribution
        assert row["sampler_gap_max"] < 1e-4
        assert 0 <= row["valid_groups"] <= SMALL["prompts_per_step"]
        assert row["skipped"] == 0
        assert (row["grad_norm"] > 0) == (row["valid_groups"] > 0)
        assert row["accuracy_choice"] == row["accuracy"]
        assert row["length_choice"] == row["length"]
        assert 0.25 <= row["same_answer_choice"] <= 1
    assert sum(row["valid_groups"] for row in rl) > 7      # or other tests would test nothing
    evaluated = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert all(accuracy in (0, 0.25, 0.5, 0.75, 1) for accuracy in evaluated)


def test_every_key_of_metrics_is_explained_in_the_docs(run):
    with open(os.path.join(ROOT, "docs", "metrics.md")) as f:
        first_columns = [line.split("|")[1] for line in f if line.startswith("|")]
    explained = set(re.findall(r"`(\w+)`", "".join(first_columns)))
    keys = {re.sub("_(count|open|choice)$", "_D", key) for row in metrics(run.dir) for key in row}
    assert keys - explained == set(), "not explained"
    assert explained - keys == set(), "explained, but never logged"


def test_metrics_stay_json_where_a_gradient_is_not_finite(files, tmp_path):
    """NaN, as Python spells it, is no JSON: jq, pandas and a browser refuse the whole file."""
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="ten steps"):
        alone(data=files.data, out_dir=out, eval_data=files.eval_data, align_steps=0, sft_lr=1e30,
              sft_steps=14, save_every=4)
    assert metrics(out)


# --------------------------------------------------------------------------------------------------
# sampler and trainer

def batch_of(old_logprobs):
    old_logprobs = torch.tensor([old_logprobs])
    return SimpleNamespace(old_logprobs=old_logprobs, sampled=torch.isfinite(old_logprobs))


@pytest.mark.method
def test_the_lines_that_a_checkpoint_counts_are_on_the_disk(tmp_path, monkeypatch):
    """After a power loss the checkpoint was there and the last lines that it counted were not, so
    the run could not resume."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda f: synced.append(os.fstat(f).st_ino))
    log = Log(str(tmp_path / "metrics.jsonl"), ALONE)
    log.write("rl", 1, loss=0.5)
    assert synced == []                                    # not at every step
    log.sync()
    assert synced == [os.stat(tmp_path / "metrics.jsonl").st_ino]


def test_a_meter_adds_up_the_tokens_of_a_step_and_the_gap_before_its_first_update():
    meter, zero = Meter(), torch.zeros(1, 3)
    assert meter.sampler_gap() == (0.0, 0.0)
    clipped = {"tokens": 2.0, "clip_low": 1.0, "clip_high": 0.0}
    meter.add(batch_of([-1.0, -3.0, math.nan]), zero - 1, zero + 0.5, clipped)
    meter.add(batch_of([-1.0, -1.5, math.nan]), zero - 1, zero + 1.5, clipped)
    meter.end_update(ALONE, stage2=False)
    meter.add(batch_of([-9.0, -9.0, math.nan]), zero - 1, zero, clipped)
    meter.end_update(ALONE, stage2=False)
    assert meter.sampler_gap() == (2.5 / 4, 2.0)
    assert meter.mean("entropy") == pytest.approx((2 * 0.5 + 2 * 1.5) / 6)
    assert meter.mean("clip_low") == pytest.approx(3 / 6)
    assert meter.mean("clip_high") == 0


@pytest.mark.method
def test_with_stage_2_one_rank_of_each_sp_group_counts_its_tokens():
    meter, zero = Meter(), torch.zeros(1, 1)
    meter.add(batch_of([-1.0]), zero, zero, {"tokens": 1.0, "clip_low": 0.0, "clip_high": 0.0})
    meter.end_update(Ranks(sp=2, sp_rank=1), stage2=True)
    assert meter.updates == [dict.fromkeys(Meter.KEYS, 0.0)]


@pytest.mark.method
@pytest.mark.parametrize("dtype, right, wrong", [
    ("float32", 1e-4, 0.01), ("bfloat16", 0.02, 0.3), ("float32", 0.0, math.nan)])
def test_a_sampler_that_is_not_the_trainer_ends_the_run(dtype, right, wrong):
    """0.01 is what transformers' get_rope_index makes of a video's positions."""
    check_gap(right, dtype)
    with pytest.raises(ValueError, match="positions.*reloaded.*banned ids.*precision") as e:
        check_gap(wrong, dtype)
    assert "\n" not in str(e.value)


def test_a_run_whose_sampler_has_other_positions_is_ended(run, tmp_path, monkeypatch):
    """The bug of every trainer whose sampler places the text after a video elsewhere: here it is no
    slow poison but a line."""
    real = vlm.forward

    def forward_elsewhere(model, attention, ids, positions, *rest):
        n = positions.shape[2]
        return real(model, attention, ids, positions + (torch.arange(n) > n - 4), *rest)

    def rollout_elsewhere(*arguments, **how):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vlm, "forward", forward_elsewhere)
            return rollout(*arguments, **how)

    monkeypatch.setattr(train, "rollout", rollout_elsewhere)
    refused({**run.how, "model": run.model, "sft_steps": 0, "eval_every": 0,
             "out_dir": str(tmp_path / "out")}, "positions computed in two ways")


class OtherSampler:
    """An engine with a copy of the trainer's weights, of which one is damaged, or which stay those
    of the first step."""
    shared = False

    def __init__(self, model, tokenizer, damaged):
        self.model, self.tokenizer, self.damaged = copy.deepcopy(model), tokenizer, damaged

    def load(self, model):
        if self.damaged:
            self.model.load_state_dict(model.state_dict())
            self.model.model.language_model.layers[1].mlp.down_proj.weight.data.mul_(1.2)

    def sample(self, prompts, keys, **how):
        return sample(self.model, self.tokenizer, prompts, keys, **how)

    def rest(self):
        pass


@pytest.mark.parametrize("damaged", [True, False])
def test_a_run_whose_engine_has_other_weights_is_ended(run, tmp_path, monkeypatch, damaged):
    """In the first step with groups that have signal, or in the next one, after an update that the
    engine did not get."""
    out = str(tmp_path / "out")

    def engine_of(c, name, model, tokenizer, ranks):
        return OtherSampler(model, tokenizer, damaged)

    monkeypatch.setattr(train, "engine_of", engine_of)
    refused({**run.how, "model": run.model, "sft_steps": 0, "rl_steps": 7, "eval_every": 0,
             "lr": 1e-3, "out_dir": out}, "not one model", "weights that were not reloaded")
    with_signal = [row for row in metrics(out, "rl") if row["valid_groups"]]
    assert len(with_signal) == (0 if damaged else 1)
