"""python -m pytest tests/test_check_data.py -q

`python data.py FILE`: what a run would read, drop, and be unable to grade, before it starts.
"""
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image
from runs import ALONE, EVALUATE, command, run_of
from test_formats import GOOD, write
from tiny_families import KINDS, build

import data
import model as vlm
import rewards
import rollout
import train
from plumbing import check_data, checkpoints

DATA = os.path.join(os.path.dirname(EVALUATE), "data.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """-> model, tokenizer and the directory that they are saved in"""
    path = str(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = vlm.load("tiny")
    vlm.save(model, tokenizer, path)
    return SimpleNamespace(model=model, tokenizer=tokenizer, path=path)


def pictures(folder, count):
    """A folder of pictures, large enough that half a file is half a picture."""
    os.makedirs(folder)
    for i in range(count):
        Image.effect_noise((120, 90), 50 + i).convert("RGB").save(folder / f"{i}.png")


@pytest.fixture
def questions(tmp_path):
    """Records about pictures that are whole, one of which is held out, and the folder."""
    names = [f"clip{i}" for i in range(40)]
    held_out = next(name for name in names if data.is_held_out(name, 0.05))
    for name, count in (("six", 6), (held_out, 3)):
        pictures(tmp_path / name, count)
    return [
        {"id": "a", "video": "six", "question": "Which?", "options": ["x", "y"], "answer": "y"},
        {"id": "b", "video": "six", "question": "How many?", "answer": "3", "thought": "So."},
        {"id": "c", "video": held_out, "question": "How long?", "answer": "3.5"}]


def checked(monkeypatch, capsys, *arguments):
    """-> (exit status, what it prints, without the bars)"""
    status = command(monkeypatch, DATA, *arguments)
    return status, capsys.readouterr().out


def test_a_file_that_is_all_right(tmp_path, monkeypatch, capsys, questions):
    path = write(tmp_path, "q.jsonl", *questions)
    status, out = checked(monkeypatch, capsys, path, "--decode=true", "--frames=4")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert f"{path}: 3 samples of 2 videos" in out
    assert ["choice", "1", "0", "0"] in rows               # to train on, with a thought, held out
    assert ["count", "1", "1", "0"] in rows
    assert ["math", "0", "0", "1"] in rows
    assert ["all", "2", "1", "1"] in rows
    assert "frames: 4 in 1 of 2 videos, fewest 3 (decoded)" in out
    assert "all 3 samples would be used" in out


def test_every_sample_that_would_be_dropped_is_named_with_its_reason(tmp_path, monkeypatch, capsys,
                                                                     questions):
    pictures(tmp_path / "broken", 3)
    os.truncate(tmp_path / "broken" / "1.png", os.path.getsize(tmp_path / "broken/1.png") // 2)
    (tmp_path / "notes.mp4").write_text("no film")
    bad = [{**GOOD, "id": "gone", "video": "gone.mp4"}, {**GOOD, "id": "two", "video": "gone.mp4"},
           {**GOOD, "id": "text", "video": "notes.mp4"}, {**GOOD, "id": "half", "video": "broken"}]
    path = write(tmp_path, "q.jsonl", *questions, *bad)
    status, out = checked(monkeypatch, capsys, f"--data={path}", "--decode=true")
    assert status == 1 and "4 of 7 samples would be dropped:" in out
    for record in bad:
        reason = re.search(rf"^  {record['id']}: (.*)$", out, re.M)[1]
        assert str(tmp_path / record["video"]) in reason, reason

    status, out = checked(monkeypatch, capsys, path)       # the header of half a picture is whole
    assert status == 1 and "3 of 7 samples would be dropped:" in out


def test_the_lengths_are_those_of_a_runs_prompts(tmp_path, monkeypatch, capsys, questions, tiny):
    """Counted without encoding a video, and without the weights of the model."""
    path = write(tmp_path, "q.jsonl", *questions)
    how = dict(frames=4, max_pixels=3136, think_budget=20, answer_budget=9)
    model, tokenizer = vlm.load(tiny.path, max_pixels=3136)
    run = run_of(model, tokenizer, **how)
    prompts, dropped = data.make_prompts(run, data.load(path), 9)
    lengths = sorted(len(prompt.ids) for _, prompt in prompts)
    assert not dropped and len(lengths) == 3
    room = rollout.room(tokenizer, **rollout.budgets(run.config))

    weightless = shutil.copytree(tiny.path, tmp_path / "model")
    os.remove(weightless / "model.safetensors")
    flags = [f"--{key}={value}" for key, value in how.items()]
    for name in ("tiny", weightless):
        status, out = checked(monkeypatch, capsys, path, f"--model={name}", *flags)
        assert status == 0
        assert (f"tokens of a prompt: {lengths[0]} to {lengths[2]}, median {lengths[1]}; {room} "
                "more for the answer; the model takes 131072") in out
    too_long = lengths[2] + room - 1
    status, out = checked(monkeypatch, capsys, path, f"--model={weightless}", *flags,
                          f"--vllm_length={too_long}")
    assert status == 1 and f"do not fit vllm_length = {too_long}" in out


def test_without_time_to_think_the_whole_empty_thought_needs_room(tmp_path, monkeypatch, capsys,
                                                                  questions, tiny):
    """Its opening tag was not counted: a prompt that a run drops was said to fit."""
    room = rollout.room(tiny.tokenizer, **rollout.limits(0, 9))
    status, out = checked(monkeypatch, capsys, write(tmp_path, "q.jsonl", *questions),
                          "--model=tiny", "--think_budget=0", "--answer_budget=9")
    assert status == 0 and f"; {room} more for the answer;" in out


def test_one_id_in_two_files_is_two_samples(tmp_path, monkeypatch, capsys, questions):
    """Both were said to be dropped where the video of one was missing."""
    path = write(tmp_path, "q.jsonl", *questions[:2])
    held_out = write(tmp_path, "held.jsonl", {**questions[2], "id": "a", "video": "gone.mp4"})
    status, out = checked(monkeypatch, capsys, path, f"--eval_data={held_out}")
    assert status == 1 and "1 of 3 samples would be dropped:" in out
    assert len(re.findall(r"^  a: .*gone.mp4", out, re.M)) == 1


def test_the_domain_of_every_held_out_question_is_known_before_grading(tmp_path, questions):
    """Only those that an evaluation asks about were checked, but grading asks about all: a mistyped
    domain ended it half-way, after hours."""
    strange = {**questions[2], "id": "d", "domain": "cuont"}
    path = write(tmp_path, "q.jsonl", *questions, strange)
    c = train.Config(data=path, eval_samples=1)
    with pytest.raises(ValueError, match="sample d: no verifier for domain 'cuont'"):
        data.load_questions(c, print)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_counted_and_tried_without_its_weights(tmp_path, questions, kind):
    """The prompt is that of the whole model; and saving is tried without writing a tensor."""
    model, tokenizer = build(kind)
    os.makedirs(tmp_path / "out")
    checkpoints.try_saving(model, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
    checkpoints.save_pretrained(model, tokenizer, str(tmp_path / "model"), weights={})
    assert not [file for file in os.listdir(tmp_path / "model") if "safetensors" in file]
    facts, words = checkpoints.load_without_weights(str(tmp_path / "model"))
    for sample in data.load(write(tmp_path, "q.jsonl", *questions)):
        video = data.open_video(sample.video, 5)
        encoded = vlm.encode_video(model, lambda video=video: video, ALONE)
        whole = vlm.make_prompt(model, tokenizer, sample.question, *encoded)
        counted = check_data.prompt_without_vision(facts, words, sample, video, vlm)
        assert counted.ids.shape == whole.ids.shape and counted.vision.shape == whole.vision.shape
        assert counted.grids == whole.grids


def test_an_answer_that_its_own_verifier_refuses_is_a_failure(tmp_path, monkeypatch, capsys,
                                                              questions):
    wrong = {**GOOD, "id": "word", "answer": "three", "domain": "count", "video": "six"}
    status, out = checked(monkeypatch, capsys, write(tmp_path, "q.jsonl", *questions, wrong))
    assert status == 1 and "nobody can be right: word" in out
    assert "all 4 samples would be used" in out


def test_nothing_left_to_train_on_is_a_failure(tmp_path, monkeypatch, capsys, questions):
    status, out = checked(monkeypatch, capsys, write(tmp_path, "q.jsonl", questions[2]))
    assert status == 1 and "no sample is left to train on" in out


def test_the_users_own_verifiers_count(tmp_path, monkeypatch, capsys, questions):
    monkeypatch.setattr(rewards, "VERIFIERS", dict(rewards.VERIFIERS))
    (tmp_path / "mine.py").write_text("def judge(predicted, answer): return 1.0")
    path = write(tmp_path, "q.jsonl", {**questions[0], "options": None, "domain": "poetry"})
    status = command(monkeypatch, DATA, path)
    assert "no verifier for domain 'poetry'" in status
    status, out = checked(monkeypatch, capsys, path, f"--verifiers=poetry={tmp_path}/mine.py:judge")
    assert status == 0 and "poetry" in out


@pytest.mark.parametrize("arguments, says", [
    ([], "--data is missing"), (["a.jsonl", "b.jsonl"], "'b.jsonl'"),
    (["a.jsonl", "--frame=3"], "did you mean 'frames'"), (["a.jsonl"], "a.jsonl: no such file"),
    (["toy", "--frames=0"], "frames"), (["toy", "--decode=maybe"], "decode must be true or false")])
def test_a_wrong_command_line_is_one_line(monkeypatch, arguments, says):
    line = command(monkeypatch, DATA, *arguments)
    assert line.startswith("data.py: ") and says in line and "\n" not in line


def test_the_file_may_come_first_or_as_an_option():
    assert check_data.parse(["a.jsonl", "--frames=3"]) == check_data.parse(
        ["--frames", "3", "--data=a.jsonl"])
    assert check_data.parse(["toy"]).data == "toy"
    for arguments in (["toy", "--decode"], ["--decode", "--data=toy"], ["toy", "--decode", "true"]):
        assert check_data.parse(arguments) == check_data.parse(["toy", "--decode=true"])


def test_a_line_that_is_wrong_ends_it(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD) + "\n{")
    line = command(monkeypatch, DATA, str(tmp_path / "q.jsonl"))
    assert line.startswith(f"data.py: {tmp_path}/q.jsonl, line 2: not JSON")


def test_a_frame_that_is_far_too_wide_is_dropped_not_the_end_of_the_run(tmp_path, tiny):
    """It was a ValueError that nobody caught: one panorama ended the run."""
    Image.new("RGB", (1000, 4)).save(tmp_path / "wide.png")
    run = run_of(tiny.model, tiny.tokenizer, ranks=ALONE)
    wide = data.load(write(tmp_path, "q.jsonl", {**GOOD, "id": "wide", "video": "wide.png"}))
    prompts, dropped = data.make_prompts(run, wide, 9)
    assert prompts == [] and "sides that differ" in dropped["wide"]
