"""python -m pytest tests/test_data.py -q

Questions about videos: reading them from files, and holding some out.
(tests/test_video.py has the reading of real video, tests/test_toy.py the built-in videos.)
"""
import json
import os
import random

import pytest

import data
import rewards


@pytest.fixture(scope="module")
def toys():
    return data.load("toy")


@pytest.fixture(scope="module")
def films():
    """The parts that are loaded by their name alone."""
    return {part: data.load(f"toy:{part}") for part in ("reading", "grounding", "long")}


def seed_of(sample):
    return int(sample.video.split(":")[1].split("-")[-1])


# ---------------------------------------------------------------------------------------------------------------------
# questions from files

GOOD = {"video": "a.mp4", "question": "How many?", "answer": "3"}
ITEM = {"problem_id": 7, "data_type": "video", "videos": "b.mp4", "problem": "Who? A. Ann B. Ben", "problem_type": "general",
        "reasoning": "He says so.", "answer": "<answer>B</answer>"}


def write(folder, name, *records):
    """A .jsonl, a record a line, or a .json with a list of them. A str is written as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path = folder / name
    path.write_text("[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_jsonl_gives_every_field_as_written(tmp_path):
    full = {"id": "x", "video": "sub/a.mp4", "question": "Q é?", "answer": "a cat", "domain": "open", "thought": "T", "taught": "a dog"}
    first, second, third = data.load(write(tmp_path, "q.jsonl", full, "", GOOD, {**GOOD, "id": 12, "answer": 4, "thought": ""}))
    assert first == data.Sample("x", "Q é?", "a cat", "open", str(tmp_path / "sub/a.mp4"), "T", "a dog")
    assert (second.question, second.answer, second.domain, second.thought, second.taught) == ("How many?", "3", "count", "", "")
    assert (third.id, third.answer, third.domain) == ("12", "4", "count")
    assert len({first.id, second.id, third.id}) == 3 and "q.jsonl" in second.id


def test_a_longvideo_reason_json_gives_the_same_samples_as_a_jsonl(tmp_path):
    """LongVideo-Reason's answers come in <answer> tags, and its thoughts as "reasoning"; a list of one video is one video."""
    items = [ITEM, {**ITEM, "problem_id": 8, "videos": ["c.mp4"], "answer": " <answer> B </answer>\n"},
             {**ITEM, "problem_id": 9, "problem": "How many?", "answer": "<answer>12</answer>", "reasoning": ""},
             {**ITEM, "problem_id": 10, "problem": "What?", "answer": "a bird", "reasoning": None}]
    samples = data.load(write(tmp_path, "train.json", *items))
    at = lambda name: str(tmp_path / name)
    assert samples == [data.Sample("7", "Who? A. Ann B. Ben", "B", "choice", at("b.mp4"), "He says so."),
                       data.Sample("8", "Who? A. Ann B. Ben", "B", "choice", at("c.mp4"), "He says so."),
                       data.Sample("9", "How many?", "12", "count", at("b.mp4"), ""),
                       data.Sample("10", "What?", "a bird", "open", at("b.mp4"), "")]
    ours = [{"id": s.id, "video": os.path.basename(s.video), "question": s.question, "answer": s.answer, "thought": s.thought}
            for s in samples]
    assert data.load(write(tmp_path, "ours.jsonl", *ours)) == samples
    assert data.load(write(tmp_path, "theirs.jsonl", *items)) == samples          # the same items, a line each


@pytest.mark.parametrize("question, answer, domain", [
    ("What does it do? A. It sleeps B. It pecks", "B", "choice"), ("Which?\nA) red\nB) blue", "a", "choice"),
    ("Which? (A) red (B) blue", "A", "choice"), ("Which letter is on the wall?", "B", "open"),
    ("What does it do? A. It sleeps B. It pecks", "It pecks", "open"), ("How many?", "5", "count"), ("How many?", "-3", "count"),
    ("How many? A. 3 B. 4", "3", "count"), ("How long?", "5.5", "open"), ("How many?", "five", "open"), ("Who?", "Ann B", "open")])
def test_the_domain_is_guessed_from_the_answer_and_the_options(tmp_path, question, answer, domain):
    """Decision 12: choice if the answer is one letter and the question lists options, count if an integer, else open."""
    record = {"video": "a.mp4", "question": question, "answer": answer}
    said, told = data.load(write(tmp_path, "q.jsonl", record, {**record, "domain": "open"}))
    assert (said.domain, told.domain) == (domain, "open")
    assert rewards.VERIFIERS[said.domain](answer, answer) == 1.0


def test_video_paths_are_relative_to_the_file_or_to_video_dir(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", "q.jsonl", GOOD, {**GOOD, "video": "deep/er.mp4"}, {**GOOD, "video": "/abs/a.mp4"}, {**GOOD, "video": "toy:3"})
    names = lambda samples: [s.video for s in samples]
    assert names(data.load(path)) == [str(tmp_path / "sub/a.mp4"), str(tmp_path / "sub/deep/er.mp4"), "/abs/a.mp4", "toy:3"]
    assert names(data.load(path, "/videos")) == ["/videos/a.mp4", "/videos/deep/er.mp4", "/abs/a.mp4", "toy:3"]


without = lambda record, field: {k: v for k, v in record.items() if k != field}
BAD = [  # file, its records, what the message must say beside the file's name
    ("q.jsonl", [], "no samples"), ("q.jsonl", ["", "  "], "no samples"), ("q.json", [], "no samples"),
    ("q.jsonl", [GOOD, "", "{broken"], "line 3: not JSON"), ("q.jsonl", [GOOD, '{"video": "a.mp4"} x'], "line 2: not JSON"),
    ("q.json", [ITEM, "{broken"], "line 2: not JSON"), ("q.json", ["]"], "line 1: not JSON"),
    ("q.jsonl", [GOOD, without(GOOD, "question")], "line 2: no 'question'"),
    ("q.jsonl", [without(GOOD, "answer")], "line 1: no 'answer'"), ("q.jsonl", ["", without(GOOD, "video")], "line 2: no 'video'"),
    ("q.json", [without(ITEM, "problem")], "item 0: no 'problem'"), ("q.json", [ITEM, without(ITEM, "answer")], "item 1: no 'answer'"),
    ("q.json", [without(ITEM, "videos")], "item 0: no 'videos'"), ("q.json", [without(ITEM, "problem_id")], "item 0: no 'problem_id'"),
    ("q.jsonl", [GOOD, {**GOOD, "question": ""}], "line 2: an empty 'question'"),
    ("q.jsonl", [{**GOOD, "question": " \t"}], "line 1: an empty 'question'"),
    ("q.jsonl", [{**GOOD, "question": None}], "line 1: no 'question'"), ("q.json", [{**ITEM, "problem": " "}], "item 0: an empty 'question'"),
    ("q.json", [{**ITEM, "answer": "<answer> </answer>"}], "item 0: an empty 'answer'"),
    ("q.json", [{**ITEM, "videos": None}], "item 0: no 'video'"), ("q.json", [{**ITEM, "videos": ["a", "b"]}], "item 0: 2 videos"),
    ("q.jsonl", [{**GOOD, "id": "x"}, GOOD, {**GOOD, "id": "x"}], "line 3: id 'x' was already used at {file}, line 1"),
    ("q.json", [ITEM, {**ITEM, "problem": "Other?"}], "item 1: id '7' was already used at {file}, item 0"),
    ("q.jsonl", [GOOD, "[1, 2]"], "line 2: expected an object"), ("q.jsonl", ['"text"'], "line 1: expected an object"),
    ("q.jsonl", ["null"], "line 1: expected an object"), ("q.json", [ITEM, 5], "item 1: expected an object"),
]


@pytest.mark.parametrize("name, records, says", BAD, ids=[f"{n}-{s[:30]}" for n, _, s in BAD])
def test_bad_data_is_one_error_that_names_the_file_and_the_place(tmp_path, name, records, says):
    path = write(tmp_path, name, *records)
    with pytest.raises(ValueError) as e:
        data.load(path)
    assert f"{path}" in str(e.value) and says.format(file=path) in str(e.value) and "\n" not in str(e.value)


def test_files_that_are_none_are_named_too(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}\n'.encode("latin-1"))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "object.json").write_text(json.dumps(ITEM))
    for name, says in [("missing.jsonl", "no such file"), ("latin.jsonl", "not UTF-8"), ("empty.json", "line 1: not JSON"),
                       ("object.json", "expected a list"), (".", "no such file")]:
        path = str(tmp_path / name)
        with pytest.raises(ValueError) as e:
            data.load(path)
        assert path in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("record", [{**GOOD, "answer": ["B"]}, {**GOOD, "question": {"text": "How many?"}}, {**GOOD, "video": ["a.mp4"]}],
                         ids=["answer", "question", "video"])
def test_a_field_that_is_no_text_is_named(tmp_path, record):
    """A list became its Python spelling: the answer ["B"] was verified against "['B']", which nobody ever says."""
    path = write(tmp_path, "q.jsonl", GOOD, record)
    with pytest.raises(ValueError, match="line 2"):
        data.load(path)


# ---------------------------------------------------------------------------------------------------------------------
# held out

def some_samples(videos):
    return [data.Sample(f"s{i}", "Q?", "1", "count", video) for i, video in enumerate(videos)]


def test_split_keeps_every_sample_and_no_video_is_on_both_sides(toys):
    files = some_samples([f"/v/{i % 700}.mp4" for i in range(2000)])               # most videos have three questions
    for samples, fraction in ((toys, 0.05), (files, 0.05), (files, 0.3)):
        train, held = data.split(samples, fraction)
        assert sorted(s.id for s in train + held) == sorted(s.id for s in samples)
        assert not {s.video for s in train} & {s.video for s in held}
        videos = {s.video for s in samples}
        share = len({s.video for s in held}) / len(videos)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(videos)) ** 0.5       # four binomial deviations
    assert data.split(toys)[1] == data.split(toys, 0.05)[1]


def test_split_does_not_depend_on_what_else_is_in_the_data(toys):
    held = {s.id for s in data.split(toys)[1]}
    shuffled = random.Random(0).sample(toys, 5000)
    more = shuffled + some_samples([f"/v/{i}.mp4" for i in range(100)])
    assert {s.id for s in data.split(more)[1] if s.id.startswith("toy")} == held & {s.id for s in shuffled}


def test_split_does_not_depend_on_where_the_videos_lie():
    """Another --video_dir, on another machine, must not move a video to the other side."""
    names = [f"{i}.mp4" for i in range(300)] + [f"folder{i}" for i in range(300)]
    sides = [[s.id for s in data.split(some_samples([base + name for name in names]), 0.5)[1]] for base in ("/data/", "v/", "")]
    assert sides[0] == sides[1] == sides[2]


def test_split_knows_a_folder_by_its_name_with_a_slash_at_its_end_too():
    """The name was what follows the last slash: every folder written "clips/7/" had the same one, so all were held out or none."""
    plain = [f"/v/{i}" for i in range(300)]
    with_slash = data.split(some_samples([p + "/" for p in plain]), 0.5)[1]
    assert [s.id for s in with_slash] == [s.id for s in data.split(some_samples(plain), 0.5)[1]]


def test_split_knows_a_built_in_video_by_its_seed():
    """"toy:7" and its first three events, "toy:7:3", are the same video; so is "toy:07"."""
    train, held = data.split(some_samples([f"toy:{i}{tail}" for i in range(200) for tail in ("", ":3")]), 0.5)
    assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}


def test_split_keeps_a_story_and_its_long_film_together(toys, films):
    """"toy:long-7" tells the story of "toy:7": trained on one and asked about the other, nothing would be held out."""
    for samples in (films["reading"], films["grounding"], films["long"] + toys[:3000]):
        train, held = data.split(samples)
        assert not {s.video for s in train} & {s.video for s in held} and 0.03 < len(held) / len(samples) < 0.07
        assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}
    train, held = data.split(some_samples([f"toy:{kind}{seed}{n}" for seed in range(200) for n in ("", ":3")
                                           for kind in ("", "0", "long-", "long-0", "reading-", "grounding-")]), 0.5)
    assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}
