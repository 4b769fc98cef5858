"""python -m pytest tests/test_formats.py -q

Files of questions: others' forms, and what is wrong in a file. (tests/test_data.py has what becomes
of the records that are right.)
"""
import json
import os

import pytest

import data
from flow import Sample
from plumbing.formats import from_longvideo_reason, read_records, sample_fields

GOOD = {"video": "a.mp4", "question": "How many?", "answer": "3"}
ITEM = {"problem_id": 7, "data_type": "video", "videos": "b.mp4", "problem": "Who? A. Ann B. Ben",
        "problem_type": "general", "reasoning": "He says so.", "answer": "<answer>B</answer>"}


def write(folder, name, *records):
    """A .jsonl, a record a line, or a .json with a list of them. A str is written as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    if name.endswith(".json"):
        text = "[" + ",\n".join(lines) + "]"
    else:
        text = "\n".join(lines) + "\n"
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


# --------------------------------------------------------------------------------------------------
# what is read

def test_records_come_as_they_are_written_with_their_place(tmp_path):
    path = write(tmp_path, "q.jsonl", GOOD, "", "  ", {"any": ["thing"]})
    assert list(read_records(path)) == [
        (f"{path}, line 1", GOOD), (f"{path}, line 4", {"any": ["thing"]})]
    path = write(tmp_path, "q.json", GOOD, {"any": ["thing"]})
    assert list(read_records(path)) == [
        (f"{path}, item 0", GOOD), (f"{path}, item 1", {"any": ["thing"]})]


def test_the_records_before_a_broken_line_are_still_given(tmp_path):
    """So that the first thing that is wrong in a file is the one that is named."""
    records = read_records(write(tmp_path, "q.jsonl", GOOD, "{broken"))
    assert next(records)[1] == GOOD
    with pytest.raises(ValueError, match="line 2: not JSON"):
        next(records)


def test_fields_are_text_and_only_those_that_are_there():
    record = {**GOOD, "id": 12, "answer": 4.5, "domain": None, "thought": " a \n", "more": [1]}
    assert sample_fields(record, "here") == {
        "id": "12", "question": "How many?", "answer": "4.5", "video": "a.mp4", "thought": "a"}


def test_a_longvideo_reason_record_in_our_form():
    assert from_longvideo_reason(ITEM, "here") == {
        "id": 7, "question": "Who? A. Ann B. Ben", "video": "b.mp4", "answer": "B",
        "thought": "He says so."}


def test_a_longvideo_reason_json_gives_the_same_samples_as_a_jsonl(tmp_path):
    """LongVideo-Reason's answers come in <answer> tags, and its thoughts as "reasoning"; a list of
    one video is one video."""
    items = [
        ITEM,
        {**ITEM, "problem_id": 8, "videos": ["c.mp4"], "answer": " <answer> B </answer>\n"},
        {**ITEM, "problem_id": 9, "problem": "How many?", "answer": "<answer>12</answer>",
         "reasoning": ""},
        {**ITEM, "problem_id": 10, "problem": "What?", "answer": "a bird", "reasoning": None},
    ]
    b, c = str(tmp_path / "b.mp4"), str(tmp_path / "c.mp4")
    samples = data.load(write(tmp_path, "train.json", *items))
    assert samples == [
        Sample("7", "Who? A. Ann B. Ben", "B", "choice", b, "He says so."),
        Sample("8", "Who? A. Ann B. Ben", "B", "choice", c, "He says so."),
        Sample("9", "How many?", "12", "count", b, ""),
        Sample("10", "What?", "a bird", "open", b, ""),
    ]
    ours = [{"id": s.id, "video": os.path.basename(s.video), "question": s.question,
             "answer": s.answer, "thought": s.thought} for s in samples]
    assert data.load(write(tmp_path, "ours.jsonl", *ours)) == samples
    assert data.load(write(tmp_path, "theirs.jsonl", *items)) == samples   # an item a line


# --------------------------------------------------------------------------------------------------
# what is wrong

NO_QUESTION = without(GOOD, "question")
BAD = [                # file, its records, what the message must say beside the file's name
    ("q.jsonl", [], "no samples"),
    ("q.jsonl", ["", "  "], "no samples"),
    ("q.json", [], "no samples"),
    ("q.jsonl", [GOOD, "", "{broken"], "line 3: not JSON"),
    ("q.jsonl", [GOOD, '{"video": "a.mp4"} x'], "line 2: not JSON"),
    ("q.json", [ITEM, "{broken"], "line 2: not JSON"),
    ("q.json", ["]"], "line 1: not JSON"),
    ("q.jsonl", [GOOD, NO_QUESTION], "line 2: no 'question'"),
    ("q.jsonl", [without(GOOD, "answer")], "line 1: no 'answer'"),
    ("q.jsonl", ["", without(GOOD, "video")], "line 2: no 'video'"),
    ("q.json", [without(ITEM, "problem")], "item 0: no 'problem'"),
    ("q.json", [ITEM, without(ITEM, "answer")], "item 1: no 'answer'"),
    ("q.json", [without(ITEM, "videos")], "item 0: no 'videos'"),
    ("q.json", [without(ITEM, "problem_id")], "item 0: no 'problem_id'"),
    ("q.jsonl", [GOOD, {**GOOD, "question": ""}], "line 2: an empty 'question'"),
    ("q.jsonl", [{**GOOD, "question": " \t"}], "line 1: an empty 'question'"),
    ("q.jsonl", [{**GOOD, "question": None}], "line 1: no 'question'"),
    ("q.json", [{**ITEM, "problem": " "}], "item 0: an empty 'question'"),
    ("q.json", [{**ITEM, "answer": "<answer> </answer>"}], "item 0: an empty 'answer'"),
    ("q.json", [{**ITEM, "videos": None}], "item 0: no 'video'"),
    ("q.json", [{**ITEM, "videos": ["a", "b"]}], "item 0: 2 videos"),
    ("q.jsonl", [{**GOOD, "id": "x"}, GOOD, {**GOOD, "id": "x"}],
     "line 3: id 'x' was already used at {file}, line 1"),
    ("q.json", [ITEM, {**ITEM, "problem": "Other?"}],
     "item 1: id '7' was already used at {file}, item 0"),
    ("q.jsonl", [GOOD, "[1, 2]"], "line 2: expected an object"),
    ("q.jsonl", ['"text"'], "line 1: expected an object"),
    ("q.jsonl", ["null"], "line 1: expected an object"),
    ("q.json", [ITEM, 5], "item 1: expected an object"),
]


def fails(path, says):
    """data.load raises an error of one line that names the file and what is wrong."""
    with pytest.raises(ValueError) as e:
        data.load(path)
    text = str(e.value)
    assert path in text and says in text and "\n" not in text, text


@pytest.mark.parametrize("name, records, says", BAD, ids=[f"{n}-{s[:30]}" for n, _, s in BAD])
def test_bad_data_is_one_error_that_names_the_file_and_the_place(tmp_path, name, records, says):
    path = write(tmp_path, name, *records)
    fails(path, says.format(file=path))


@pytest.mark.parametrize("name, says", [
    ("missing.jsonl", "no such file"),
    ("latin.jsonl", "not UTF-8"),
    ("empty.json", "line 1: not JSON"),
    ("object.json", "expected a list"),
    (".", "no such file"),
])
def test_files_that_are_none_are_named_too(tmp_path, name, says):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}\n'.encode("latin-1"))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "object.json").write_text(json.dumps(ITEM))
    fails(str(tmp_path / name), says)


@pytest.mark.parametrize("field, value", [
    ("answer", ["B"]), ("question", {"text": "How many?"}), ("video", ["a.mp4"])])
def test_a_field_that_is_no_text_is_named(tmp_path, field, value):
    """A list became its Python spelling: the answer ["B"] was verified against "['B']", which
    nobody ever says."""
    path = write(tmp_path, "q.jsonl", GOOD, {**GOOD, field: value})
    fails(path, f"line 2: {field!r}")
