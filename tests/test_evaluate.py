"""python -m pytest tests/test_evaluate.py -q

evaluate.py: pass@k, a sweep over frames and thinking budgets, and grades of how hard questions are.
As a command of its own, and as train.py --mode=eval and --mode=grade.
"""
import itertools
import json
import math
import os
from dataclasses import asdict, fields

import pytest
from PIL import Image
from runs import (
    EVALUATE,
    TRAIN,
    alone,
    command,
    ended,
    flags,
    launched,
    question,
    refused,
    script,
    write,
    write_text,
)

import data
import evaluate
import rollout
import train
from plumbing import command_line
from plumbing.grades import read_grades
from plumbing.sweep import Setting, sweep

OPTIONS = {field.name for field in fields(evaluate.Config)}


def options(run, **more):
    """What evaluate.py is given, of a run's hyperparameters."""
    how = {key: value for key, value in run.how.items() if key in OPTIONS}
    return {**how, "model": run.model, **more}


def evaluate_here(how):
    """evaluate.py in this process, without its error handling."""
    evaluate.main(command_line.parse(evaluate.Config, evaluate.__doc__, flags(**how)))


def not_evaluated(how, *says):
    """evaluate.py ends with one line that says all this."""
    with pytest.raises((ValueError, OSError)) as e:
        evaluate_here(how)
    assert all(words in str(e.value) for words in says), str(e.value)
    assert "\n" not in str(e.value)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


@pytest.mark.method
def test_an_option_of_train_and_evaluate_has_one_default_and_one_type():
    theirs, ours = train.Config(), evaluate.Config()
    assert OPTIONS - set(asdict(theirs)) == {"grade"}
    kinds = {field.name: field.type for field in fields(train.Config)}
    for field in fields(evaluate.Config):
        if field.name in ("model", "grade"):               # what is evaluated was trained
            continue
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
        assert field.type is kinds[field.name], field.name
    assert ours.model == f"{theirs.out_dir}/model"


# --------------------------------------------------------------------------------------------------
# pass@k, and what a sweep asks for

@pytest.mark.method
@pytest.mark.parametrize("accuracies", [
    [1, 0, 0, 1, 0], [0.0] * 4, [1.0] * 3, [0.2, 0.9, 0.0, 0.9, 1.0, 0.4]])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(accuracies):
    """By counting, for right and wrong and for what is in between; 1 - C(n-c,k)/C(n,k) where it is
    right or wrong."""
    n, right = len(accuracies), sum(accuracy == 1 for accuracy in accuracies)
    for k in range(1, n + 1):
        choices = [max(chosen) for chosen in itertools.combinations(accuracies, k)]
        assert evaluate.pass_at(k, accuracies) == pytest.approx(sum(choices) / len(choices))
        if set(accuracies) <= {0, 1}:
            formula = 1 - math.comb(n - right, k) / math.comb(n, k)
            assert evaluate.pass_at(k, accuracies) == pytest.approx(formula)


@pytest.mark.method
def test_pass_at_k_needs_k_answers():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"pass@{k} of 3 answers: k is 1 to 3"):
            evaluate.pass_at(k, [1, 0, 1])


@pytest.mark.method
def test_a_sweep_is_every_number_of_frames_with_every_budget():
    c = evaluate.Config(eval_frames="1,2", eval_budgets="0,5-8", frames=9, think_budget=96)
    assert sweep(c) == [Setting(f, least, most) for f in (1, 2) for least, most in ((0, 0), (5, 8))]
    assert sweep(evaluate.Config(eval_frames="4", think_budget=96)) == [Setting(4, 0, 96)]
    assert sweep(evaluate.Config(eval_budgets="7", frames=9)) == [Setting(9, 0, 7)]
    assert sweep(evaluate.Config()) == []


@pytest.mark.method
@pytest.mark.parametrize("config", [train.Config, evaluate.Config])
@pytest.mark.parametrize("how, says", [
    (dict(eval_frames="16,x"), "whole numbers"),
    (dict(eval_budgets="1-2-3"), "whole numbers"),
    (dict(eval_budgets="-4"), "whole numbers"),
    (dict(eval_budgets="9-4"), "--eval_budgets=9-4"),
    (dict(eval_budgets="8,0", force_answer=False), "a budget of 0 needs force_answer"),
    (dict(eval_frames="0"), "frames are at least 1"),
    (dict(eval_budgets="4-9", rollout="vllm"), "torch engine's alone")])
def test_a_sweep_that_cannot_work_is_named(config, how, says):
    with pytest.raises(ValueError) as e:
        sweep(config(**how))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("path", [TRAIN, EVALUATE], ids=os.path.basename)
def test_a_sweep_that_cannot_work_is_named_before_anything_is_loaded(monkeypatch, tmp_path, path):
    arguments = flags(eval_budgets="9-4", model=tmp_path / "none", out_dir=tmp_path / "out")
    line = script(monkeypatch, *arguments, path=path)
    assert line.startswith(f"{os.path.basename(path)}: --eval_frames= --eval_budgets=9-4: ")
    assert "\n" not in line and not os.path.exists(tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# an evaluation

@pytest.mark.parametrize("path, more", [(EVALUATE, {}), (TRAIN, {"mode": "eval"})],
                         ids=["evaluate.py", "train.py"])
def test_eval_prints_one_line_of_json_last(run, tmp_path, capsys, monkeypatch, path, more):
    """As a command of its own, and as train.py's mode."""
    path_of_data = write(tmp_path / "e.jsonl", *map(question, range(50, 53)),
                         question(0, answer="7"), question(9, id="gone", video="missing.mp4"))
    how = options(run, eval_data=path_of_data, eval_samples=9, out_dir=tmp_path / "out", **more)
    assert command(monkeypatch, path, *flags(**how)) is None
    result = last_line(capsys)
    assert {"accuracy", "format", "pass@1", "pass@4", "domains"} <= result.keys()
    assert (result["samples"], result["dropped"]) == (4, 1)
    assert set(result["domains"]) == {"choice", "count"} and result["domains"]["count"] == 0
    assert result["accuracy"] == pytest.approx(result["domains"]["choice"] * 3 / 4)
    assert result["pass@1"] <= result["pass@4"] <= 0.75
    assert not os.path.exists(tmp_path / "out")


def test_the_command_and_the_mode_say_the_same(run, tmp_path, capsys):
    how = options(run, out_dir=tmp_path / "out", eval_budgets="3")
    evaluate_here(how)
    by_command = capsys.readouterr().out
    alone(**{**run.how, **how, "mode": "eval"})
    assert capsys.readouterr().out == by_command


def test_two_ranks_evaluate_as_one_does(run, tmp_path, capsys):
    how = options(run, out_dir=tmp_path / "out", pass_k=2)
    evaluate_here(how)
    expected = last_line(capsys)
    processes = [launched(*flags(**how, sp=sp), script=EVALUATE) for sp in (1, 2)]
    for two in map(ended, processes):
        assert two.code == 0, two.err
        assert json.loads(two.out.strip().split("\n")[-1]) == expected


def test_eval_looks_at_every_budget_and_number_of_frames_asked_for(run, files, tmp_path, capsys):
    """A row each, what an evaluation with that setting alone says; a table, a picture; tiers by
    grades or by its own answers."""
    def result(**more):
        evaluate_here(options(run, out_dir=tmp_path / "out", **more))
        return last_line(capsys)

    whole = result(eval_frames="1,2", eval_budgets="0,3,5-8", pass_k=2)
    budgets = ((0, 0), (0, 3), (5, 8))
    settings = [(frames, least, most) for frames in (1, 2) for least, most in budgets]
    rows = whole["rows"]
    assert [(x["frames"], x["think_least"], x["think_budget"]) for x in rows] == settings
    with Image.open(tmp_path / "out" / "eval.png") as image:
        assert image.width > 300 and len(set(image.convert("L").tobytes())) > 10
    for row in rows:
        if not row["think_least"]:
            single = result(frames=row["frames"], think_budget=row["think_budget"])
            for key in row.keys() - {"rows", "tiers"}:
                assert single[key] == row[key], key
        if not row["think_budget"]:
            assert row["forced"] == 1 and row["length"] > 8
    base = result()
    assert base["pass@1"] <= whole["pass@2"] <= base["pass@4"]
    assert (whole["accuracy"], whole["pass@1"]) == (base["accuracy"], base["pass@1"])
    assert sum(tier["samples"] for tier in base["tiers"]) == 4 == base["samples"]
    right = sum(tier["samples"] * tier["accuracy"] for tier in base["tiers"])
    assert right == pytest.approx(4 * base["accuracy"])
    grades = [{"id": sample.id, "correct": 8 * (i > 0), "total": 8}
              for i, sample in enumerate(data.load(files.eval_data)[:3])]
    graded = result(grades=write(tmp_path / "grades.jsonl", *grades))
    assert [tier["samples"] for tier in graded["tiers"]] == [1, 0, 0, 0, 2]    # one has no grade


def test_without_force_no_thought_that_was_cut_earns_anything(run, tmp_path, capsys):
    """GLM-4.1V §5.3.1: with force the same cut thoughts are answered, and graded as any answer."""
    results = []
    for force in ("true", "false"):
        evaluate_here(options(run, think_budget=3, force_answer=force, out_dir=tmp_path / "out"))
        results.append(last_line(capsys))
    forced, cut = results
    assert forced["forced"] == 1 and forced["truncated"] == 0
    assert forced["accuracy"] == forced["forced_accuracy"] >= 0.25
    assert cut["forced"] == 0 and cut["truncated"] == 1
    assert cut["accuracy"] == cut["format"] == cut["pass@4"] == 0


def test_a_sweep_that_cannot_be_drawn_ends_before_the_evaluation(run, tmp_path):
    """A folder that cannot be made was noticed after all evaluations, which were lost."""
    write_text(tmp_path / "file", "")
    how = options(run, eval_budgets="3", out_dir=tmp_path / "file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", None)
        not_evaluated(how, str(tmp_path / "file"))


def test_nothing_to_evaluate_is_one_clear_line(run, tmp_path):
    path = write(tmp_path / "e.jsonl", question(1, video="missing.mp4"))
    not_evaluated(options(run, eval_data=path, out_dir=tmp_path / "out"),
                  "no sample could be evaluated", "missing.mp4")


# --------------------------------------------------------------------------------------------------
# grades

@pytest.fixture(scope="module")
def graded(run, tmp_path_factory):
    """The path of a grades.jsonl that evaluate.py wrote."""
    folder = tmp_path_factory.mktemp("graded")
    evaluate_here(options(run, grade=True, out_dir=folder))
    return str(folder / "grades.jsonl")


def read(path):
    with open(path) as f:
        return f.read()


def rows_by_id(path):
    return {row["id"]: row for row in map(json.loads, read(path).splitlines())}


def training_on(run, grades, **more):
    """A step of RL that begins with grades."""
    return {**run.how, "model": run.model, "sft_steps": 0, "rl_steps": 1, "eval_every": 0,
            "grades": grades, **more}


@pytest.mark.parametrize("path, more", [(EVALUATE, {"grade": True}), (TRAIN, {"mode": "grade"})],
                         ids=["evaluate.py", "train.py"])
def test_grades_are_written_once(run, graded, tmp_path, capsys, monkeypatch, path, more):
    """Stopped in the middle of a line and started again it does what is missing, to the same file.
    As a command of its own, and as train.py's mode."""
    how = flags(**options(run, out_dir=tmp_path, **more))
    grades = tmp_path / "grades.jsonl"
    assert command(monkeypatch, path, *how) is None
    out = capsys.readouterr().out
    assert all(f"not graded {id}: " in out for id in ("gone", "text"))
    assert "12 graded, 2 not" in out
    text = grades.read_text()
    assert text == read(graded) and text.count("\n") == 12
    rows = rows_by_id(grades)
    assert set(rows) == {f"q{i}" for i in range(12)}
    assert all(row["total"] == 4 and 0 <= row["correct"] <= 4 for row in rows.values())
    assert len({row["correct"] for row in rows.values()}) > 1

    grades.write_text("\n".join(text.split("\n")[:5]) + '\n{"id": "q')
    asked, real = [], rollout.rollout

    def note(model, tokenizer, prompts, *rest, **how):
        asked.extend(prompts)
        return real(model, tokenizer, prompts, *rest, **how)

    monkeypatch.setattr(rollout, "rollout", note)          # the command imports it anew,
    monkeypatch.setattr(evaluate, "rollout", note)         # train.py's mode does not
    assert command(monkeypatch, path, *how) is None
    assert grades.read_text() == text and len(asked) == 7


def test_grades_set_the_tiers_of_a_training(run, graded, tmp_path, monkeypatch):
    """They are what the curriculum knows at first."""
    given, real = [], train.Curriculum

    def note(*arguments):
        given.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(train, "Curriculum", note)
    alone(**training_on(run, graded, out_dir=tmp_path / "out"))
    _, _, grades, tiers, *_ = given[-1]
    assert grades == {id: [row["correct"], 4.0] for id, row in rows_by_id(graded).items()}
    assert tiers is True


def test_grades_of_something_else_are_refused(run, graded, tmp_path):
    """Of other data, and of another model."""
    out = tmp_path / "out"
    other = write(tmp_path / "other.jsonl", *[question(i, answer="B") for i in range(12)])
    refused(training_on(run, graded, data=other, out_dir=out), graded, "line 1", "other data")
    few = write(tmp_path / "few.jsonl", question(1))
    refused(training_on(run, graded, data=few, out_dir=out), graded, "other data", "'q0'")
    none = str(tmp_path / "none.jsonl")
    refused(training_on(run, none, out_dir=out), "none.jsonl: no such file")
    not_evaluated(options(run, grade=True, model="tiny", out_dir=os.path.dirname(graded)),
                  graded, "line 1: graded by", "not 'tiny'")


@pytest.mark.parametrize("bad", [
    '{"id": "q0", "correct": 5, "total": 4}', '{"id": "q0"}', "[]",
    '{"id": ["q0"], "correct": NaN, "total": 4}', "oops"])
def test_a_line_that_is_no_grade_is_refused(run, tmp_path, bad):
    path = write_text(tmp_path / "bad.jsonl", bad + "\n")
    refused(training_on(run, path, out_dir=tmp_path / "out"), "bad.jsonl, line 1: expected")


@pytest.mark.method
def test_grades_of_several_models_are_added_up(tmp_path):
    """Any other tool may have written them."""
    samples = data.load(write(tmp_path / "q.jsonl", question(0), question(1)))
    plain = write(tmp_path / "plain.jsonl", {"id": "q0", "correct": 1, "total": 8},
                  {"id": "q0", "correct": 2.5, "total": 8})
    assert read_grades(plain, samples) == {"q0": [3.5, 16.0]}
