"""python -m pytest tests/test_progress.py -q

What a run says while it goes: the plan, a line for each RL step, how long the rest will take, the
commands at the end, and TensorBoard's scalars.
"""
import io
import json
import os
import pty
import random
import re
import shlex
import shutil
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from runs import (
    ALONE,
    ENV,
    EVALUATE,
    ROOT,
    SMALL,
    alone,
    command,
    config,
    metrics,
    refused,
)
from tqdm import tqdm

import evaluate
import rollout
import train
from flow import Ranks, Sample
from plumbing.metrics import Board
from plumbing.progress import (
    FEW,
    LINES,
    Pace,
    Report,
    about,
    has_own_question,
    plan,
    steps_to_come,
    took,
    what_next,
)

# Seconds of the RL steps of a default run on two cores: more questions are drawn as it learns.
RECORDED = [1.9, 2.7, 2.1, 2.2, 2.7, 2.9, 2.9, 2.5, 2.3, 2.8, 2.6, 2.8, 2.8, 2.9, 3.0, 3.0, 3.1,
            2.9, 3.2, 3.1, 3.1, 2.9, 2.9, 3.1, 3.1, 3.3, 3.1, 3.7, 3.0, 3.0, 3.6, 3.2, 3.6, 3.6,
            3.3, 3.6, 3.8, 3.8, 3.8, 4.2]


# --------------------------------------------------------------------------------------------------
# how long it will take

def estimates(seconds):
    """After each step from FEW on, up to the last but one. -> [(estimated, true)] of the rest"""
    pace, pairs = Pace(len(seconds)), []
    for n, x in enumerate(seconds, 1):
        pace.add(x, x)
        if FEW <= n < len(seconds):
            pairs.append((pace.seconds_left(), sum(seconds[n:])))
    return pairs


def estimates_of_tqdm(seconds):
    """The same by tqdm's own moving average."""
    bar, time, pairs = tqdm(total=len(seconds), file=io.StringIO(), mininterval=0), [0.0], []
    bar._time = lambda: time[0]
    bar.last_print_t = bar.start_t = 0.0
    for n, x in enumerate(seconds, 1):
        time[0] += x
        bar.update()
        if FEW <= n < len(seconds):
            pairs.append(((len(seconds) - n) / bar.format_dict["rate"], sum(seconds[n:])))
    return pairs


def error(pairs):
    """Mean distance from the truth over its mean."""
    return sum(abs(x - true) for x, true in pairs) / sum(true for _, true in pairs)


GROWING = [2 + 0.1 * i for i in range(40)]


SEQUENCES = {"recorded": (RECORDED, 0.7), "growing": (GROWING, 0.5),
             "shrinking": (GROWING[::-1], 0.5)}


@pytest.mark.parametrize("seconds, most", SEQUENCES.values(), ids=SEQUENCES)
def test_the_estimate_follows_steps_that_change_better_than_tqdms(seconds, most):
    """tqdm multiplies the steps to do by the average of the last ones: of steps that grow it says
    too little all the way."""
    assert error(estimates(seconds)) < most * error(estimates_of_tqdm(seconds))


@pytest.mark.parametrize("slope", [0.1, -0.05])
def test_a_straight_line_is_followed_as_far_as_it_was_seen(slope):
    for estimated, true in estimates([5 + slope * i for i in range(40)])[20:]:
        assert estimated == pytest.approx(true)


def test_steps_that_are_all_alike_go_on_so():
    assert all(x == pytest.approx(true) for x, true in estimates([3.0] * 30))


def test_noise_is_no_trend_to_follow_for_ever():
    """Of one noisy sequence the line may point anywhere; no step counts less than half or more than
    twice the mean."""
    rng = random.Random(0)
    for _ in range(50):
        seconds = [rng.lognormvariate(1, 0.7) for _ in range(rng.randint(1, 12))]
        mean, to_do = sum(seconds) / len(seconds), 1000
        assert mean / 2 - 1e-9 <= steps_to_come(seconds, to_do) / to_do <= 2 * mean + 1e-9
    noisy = [3 * rng.uniform(0.8, 1.2) for _ in range(60)]
    assert error(estimates(noisy)) < 0.15


def test_steps_that_shrink_never_take_less_than_nothing():
    assert steps_to_come([10, 8, 6, 4, 2], 100) >= 100 * 3 - 1e-9
    assert steps_to_come([1e-9, 0, 0, 0, 0, 0], 7) >= 0
    assert steps_to_come([1.0], 0) == 0


def test_the_first_step_which_warms_up_does_not_count():
    assert all(x == pytest.approx(true) for x, true in estimates([30.0] + [3.0] * 20))


def test_evaluating_and_saving_are_counted():
    """Every fifth step also takes 10 s that are not its own: as many come as have been."""
    pace = Pace(20)
    for n in range(1, 11):
        pace.add(13.0 if n % 5 == 0 else 3.0, 3.0)
    assert pace.seconds_left() == pytest.approx(10 * 3 + 2 * 10)


def test_nothing_is_said_before_a_few_steps_and_after_a_restart_those_before_count_at_first():
    """The process that goes on may have more ranks: once it has a few steps of its own, they
    count alone."""
    new, resumed = Pace(20), Pace(20, earlier=[8.0] * 12)
    assert new.seconds_left() is None and resumed.seconds_left() == pytest.approx(160)
    for n in range(1, FEW + 1):
        new.add(2.0, 2.0)
        resumed.add(2.0, 2.0)
        if n < FEW:
            assert new.seconds_left() is None
            assert resumed.seconds_left() == pytest.approx(8 * (20 - n))
    assert new.seconds_left() == resumed.seconds_left() == pytest.approx(2 * (20 - FEW))


@pytest.mark.parametrize("seconds, text", [
    (0.2, "about 5 s"), (42, "about 40 s"), (94, "about 95 s"), (100, "about 2 min"),
    (170, "about 3 min"), (94 * 60, "about 94 min"), (9000, "about 2.5 h")])
def test_durations_are_as_exact_as_they_are_known(seconds, text):
    assert about(seconds) == text


def test_a_step_says_which_phases_took_most_of_its_time():
    phases = {"encode": 0.1, "rollout": 2.2, "verify": 0.0, "train": 1.6}
    assert took(4.1, phases) == "4.1 s (rollout 2.2, train 1.6)"
    assert took(9.0, phases) == "9.0 s (rollout 2.2, train 1.6, other 5.1)"
    assert took(0.3, {}) == "0.3 s"


# --------------------------------------------------------------------------------------------------
# the plan and the lines

def progress(checkpoint=None, lines=(), **done):
    done = {"align": 0, "sft": 0, "rl": 0, **done}
    return SimpleNamespace(checkpoint=checkpoint, done=done, log=SimpleNamespace(lines=lines))


def test_the_plan_of_a_new_run_names_its_stages_and_no_time():
    c = config(out_dir="out-x")
    text = plan(c, Ranks(world=4, sp=2, dp=2), progress(), ["q1"])
    assert "on 4 ranks (sp 2 x dp 2), results in out-x" in text
    assert "align 2 steps" in text and "sft   16 steps" in text
    assert "rl    7 steps, 4 questions x 4 completions each, more if" in text
    assert "about" not in text and "going on" not in text
    text = plan(config(model="m", oversample_cap=1), ALONE, progress(), [])
    assert "on one rank" in text and "align" not in text and "sft" not in text
    assert "more if" not in text


def test_the_plan_of_a_resumed_run_says_what_is_left_and_how_long_as_before():
    lines = [json.dumps({"step": n, "stage": "rl", "rollout_s": 50, "train_s": 10})
             for n in range(1, 5)]
    lines.append(json.dumps({"step": 16, "stage": "sft", "eval_accuracy": 0.5}))
    done = progress("out/ckpt-22", lines, align=2, sft=16, rl=4)
    text = plan(config(), ALONE, done, ["q1"])
    assert text.startswith("going on from out/ckpt-22: 2 align steps, 16 sft steps, 4 rl steps d")
    assert re.search(r"rl +3 of 7 steps, .*: about 3 min, as the steps before went", text)
    assert "16 steps," not in text
    done = progress("out/ckpt-25", lines, align=2, sft=16, rl=9)
    assert plan(config(), ALONE, done, ["q1"]).endswith("nothing is left to do")


def test_a_run_says_its_plan_once_and_one_line_for_each_rl_step(run):
    """Its output is a file, as a cluster job's: there is no bar, and the other stages have a few
    lines."""
    lines = run.out.splitlines()
    assert sum(x.startswith("to do on 2 ranks (sp 2 x dp 1)") for x in lines) == 1
    rows, of_rl = metrics(run.dir, "rl"), [x for x in lines if re.match(r"RL +\d+/", x)]
    assert len(of_rl) == len(rows) == SMALL["rl_steps"]
    for row, line in zip(rows, of_rl):
        asked = round(row["oversample"] * SMALL["prompts_per_step"])
        assert line.startswith(
            f"RL {row['step']}/7  reward {row['reward']:.2f}  accuracy {row['accuracy']:.2f}  "
            f"kept {row['valid_groups']} of {asked}  length {row['length']:.0f}  "
            f"entropy {row['entropy']:.2f}  "), line
        assert ("about" in line) == (FEW <= row["step"] < 7), line
    of_sft = [x for x in lines if re.match(r"sft(:| +\d+/)", x)]
    assert LINES - 1 <= len(of_sft) <= LINES + 1
    assert any(x.startswith(f"sft: {16 - FEW} more steps, about ") for x in of_sft)
    assert "%|" not in run.err


def reported(name, steps, rank=0):
    """-> the lines of a stage's Report"""
    lines = []
    run = SimpleNamespace(say=lines.append, ranks=Ranks(rank=rank, world=2))
    with Report(name, 0, steps, [], run) as report:
        for step in range(1, steps + 1):
            report.step(step, f"loss {step}", {"train_s": 0.0, "loss": step})
    return lines


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 300])
def test_lines_do_not_drown(steps):
    lines = reported("align", steps)
    assert min(steps, LINES) <= len(lines) <= LINES + 1
    assert lines[-1].startswith(f"align {steps}/{steps}  loss {steps}")
    assert len(reported("rl", steps)) == steps
    assert reported("rl", steps, rank=1) == reported("align", steps, rank=1) == []


ON_A_TERMINAL = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
from types import SimpleNamespace
from tqdm import tqdm
from plumbing.progress import Report

run = SimpleNamespace(say=tqdm.write, ranks=SimpleNamespace(rank=0))
for name in ("sft", "rl"):
    with Report(name, 2, 8, [], run) as report:
        for step in range(3, 9):
            time.sleep(0.15)
            report.step(step, f"loss {{step}}.0", {{"train_s": 0.15}})
"""


def test_on_a_terminal_the_bar_has_the_estimate_and_only_rl_has_lines():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (30, 100))
    with subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], env=ENV, stdout=follower,
                          stderr=follower) as process:
        os.close(follower)
        text = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:                                # Linux: the other end is closed
                break
            if not part:
                break
            text += part
    os.close(leader)
    assert process.returncode == 0, text.decode()
    drawn = [x.strip() for x in re.split(r"[\r\n]+", text.decode())]
    bars = [x for x in drawn if "%|" in x]
    of_sft = r"^sft: +62%\|.*\| 5/8 \[00:\d\d, loss 5.0, about 5 s left\]$"
    of_rl = r"^rl: +62%\|.*\| 5/8 \[00:\d\d, about 5 s left\]$"
    assert any(re.search(of_sft, x) for x in bars), bars
    assert any(re.search(of_rl, x) for x in bars), bars
    assert not any("it/s" in x or "s/it" in x or "<" in x for x in bars)
    lines = [x for x in drawn if x and "%|" not in x]
    assert [x[:6] for x in lines] == ["sft: 3", *[f"RL {n}/8" for n in range(3, 9)]]


# --------------------------------------------------------------------------------------------------
# what to look at next

def commands_of(text):
    """{script: arguments} of the commands in what a run says last"""
    found = {}
    for line in text.split("done: ")[-1].splitlines():
        words = re.search(r"(?:python|torchrun .*) (\w+\.py) (.*)", line)
        if words:
            found[words[1]] = shlex.split(words[2])
    return found


def test_the_commands_at_the_end_work_as_they_stand(run, monkeypatch, capsys):
    """On data of one's own: the video is one that the data has, and the question its own."""
    assert "torchrun --standalone --nproc_per_node=2 evaluate.py" in run.out
    commands = commands_of(run.out)
    assert f"--model={run.model}" in commands["rollout.py"]
    assert "--question=Heads? A. yes B. no" in commands["rollout.py"]
    assert "--video=toy:50:1" in commands["rollout.py"]
    assert command(monkeypatch, os.path.join(ROOT, "rollout.py"), *commands["rollout.py"]) is None
    assert "Heads? A. yes B. no" in capsys.readouterr().out
    assert command(monkeypatch, EVALUATE, *commands["evaluate.py"]) is None
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = metrics(run.dir, "rl")[-1]
    assert result["samples"] == 4 and result["accuracy"] == last["eval_accuracy"]


def next_of(c, ranks, samples):
    return what_next(c, ranks, samples, rollout.Options, train.evaluation(c))


@pytest.mark.parametrize("words", ["Who's there? \"A\" or $B?", "two\nlines; rm -r x", "نعم 🎬"])
def test_paths_and_questions_reach_the_shell_as_they_are(tmp_path, words):
    folder = tmp_path / "my run's $out"
    folder.mkdir()
    (folder / "film.mp4").write_text("")
    c = config(out_dir=str(folder), data=str(folder / "my data.jsonl"), frames=7)
    there = Sample("1", words, "A", "choice", str(folder / "film.mp4"))
    gone = Sample("2", "Why?", "A", "choice", str(folder / "gone.mp4"))
    text = next_of(c, ALONE, [gone, there]).partition("\n  measure")[0]
    shell = "python() { printf '%s\\0' \"$@\"; }; " + text[text.index("python rollout.py"):]
    shown = subprocess.run(["sh", "-c", shell], capture_output=True, text=True)
    arguments = shown.stdout.split("\0")[:-1]
    assert arguments[0] == "rollout.py"
    assert f"--question={words}" in arguments and f"--video={there.video}" in arguments
    assert f"--model={folder}/model" in arguments and "--frames=7" in arguments
    assert "rollout.py" not in next_of(c, ALONE, [gone])   # no video is there: nothing to ask


def test_a_folder_of_pictures_with_a_rate_is_a_video_that_can_be_asked_about(tmp_path):
    video = f"{tmp_path}@10fps"            # as `data.load` names it
    text = next_of(config(data="my.jsonl"), ALONE, [Sample("1", "Why?", "A", "choice", video)])
    assert f"--video={video}" in commands_of(text)["rollout.py"]


def test_the_options_of_the_run_that_evaluate_has_are_given_and_are_understood(monkeypatch):
    c = config(out_dir="o", data="my.jsonl", eval_data="e.jsonl", sp=4, grades="g",
               dtype="bfloat16", force_answer=False, stage2=True)
    sample = Sample("1", "Why?", "A", "choice", "toy:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    arguments = commands_of(next_of(c, Ranks(world=4, sp=4), [sample]))["evaluate.py"]
    measure = evaluate.command_line.parse(evaluate.Config, "", arguments)
    expected = dict(model="o/model", data="my.jsonl", eval_data="e.jsonl", sp=4, dtype="bfloat16",
                    force_answer=False, frames=2, think_budget=8, out_dir="o", grades="")
    assert {key: getattr(measure, key) for key in expected} == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")            # sp spans two machines
    arguments = commands_of(next_of(c, Ranks(world=4, sp=4), [sample]))["evaluate.py"]
    assert not any(x.startswith("--sp") for x in arguments)
    assert "evaluate.py" not in what_next(c, ALONE, [sample], rollout.Options, None)


@pytest.mark.parametrize("data, eval_data, video, known", [
    ("toy", "", "toy:7", True), ("toy:count,open", "", "toy:7", True),
    ("toys.jsonl", "", "toy:7", False),
    ("toy", "my.jsonl", "toy:7", False), ("toy", "", "toy:reading-7", False),
    ("toy", "", "toy:7:1", False)])
def test_only_a_built_in_question_is_left_out(data, eval_data, video, known):
    assert has_own_question(config(data=data, eval_data=eval_data), video) == known


# --------------------------------------------------------------------------------------------------
# TensorBoard

def scalars(folder):
    """[(stage/key, step, value)] of what TensorBoard reads in a folder, sorted"""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = []
    for tag in events.Tags()["scalars"]:
        found += [(tag, event.step, event.value) for event in events.Scalars(tag)]
    return sorted(found)


def expected_scalars(rows):
    found = []
    for row in rows:
        for key in row.keys() - {"stage", "step"}:
            value = float(torch.tensor(row[key], dtype=torch.float32))     # as TensorBoard has it
            found.append((f"{row['stage']}/{key}", row["step"], value))
    return sorted(found)


def test_tensorboard_has_the_numbers_of_metrics_also_after_a_restart(run, copied):
    """A run that began without, then with it, killed after its last checkpoint, and started again:
    what was cut from metrics.jsonl is gone, what was logged again is there once."""
    pytest.importorskip("tensorboard")
    how = {**run.how, "out_dir": copied, "eval_every": 0, "tensorboard": True}
    alone(**{**how, "rl_steps": 8})
    folder = os.path.join(copied, "tensorboard")
    before = scalars(folder)
    assert before == expected_scalars(metrics(copied))
    row = {"stage": "rl", "step": 9, "reward": 0.25}
    with open(os.path.join(copied, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")
    written = Board(os.path.join(copied, "other"))
    written.add([row])
    for name in os.listdir(written.writer.log_dir):        # as if the killed process had written it
        shutil.move(os.path.join(written.writer.log_dir, name), folder)
    assert ("rl/reward", 9, 0.25) in scalars(folder)
    alone(**{**how, "rl_steps": 9})
    after = scalars(folder)
    assert after == expected_scalars(metrics(copied)) and len(after) > len(before)
    assert sum(tag == "rl/reward" for tag, *_ in after) == 9


def test_a_number_that_is_not_finite_is_left_out_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    Board(str(tmp_path)).add([{"stage": "sft", "step": 1, "loss": None, "grad_norm": 2.0}])
    assert scalars(tmp_path) == [("sft/grad_norm", 1, 2.0)]


def test_without_tensorboard_one_line_says_so_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    refused(dict(tensorboard=True, out_dir=str(tmp_path / "out")), "pip install tensorboard")
    assert not (tmp_path / "out").exists()
