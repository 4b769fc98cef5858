"""python -m pytest tests/test_formats.py -q

Files of questions: others' forms, and what is wrong in a file. (tests/test_data.py has what becomes
of the records that are right.)
"""
import json
import os

import pytest

import data
import rewards
from flow import Sample
from plumbing.formats import read_records, sample_fields

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
    assert sample_fields(ITEM, "here") == {
        "id": "7", "question": "Who? A. Ann B. Ben", "video": "b.mp4", "answer": "B",
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
# the forms of other data sets

COLOUR = {"video": "a.mp4", "question": "Which colour?"}
COLOURS = ["red", "blue", "green"]
LISTED = "Which colour?\nA. red\nB. blue\nC. green"
FORMS = {              # a record as its data set has it, but for the words
    "LongVideo-Reason": {
        "problem_id": 0, "problem": LISTED, "data_type": "video", "problem_type": "goal",
        "reasoning": "It is.", "videos": "a.mp4", "answer": "<answer>B</answer>"},
    "Video-R1": {
        "problem_id": 2, "problem": "Which colour?", "data_type": "video",
        "problem_type": "multiple choice", "options": ["A. red", "B. blue", "C. green"],
        "process": "<think>It is.</think>", "solution": "<answer>B</answer>", "path": "a.mp4",
        "data_source": "LLaVA-Video-178K/30_60_s"},
    "EasyR1": {
        "problem": "<video>" + LISTED, "answer": "B", "videos": ["a.mp4"], "data_type": "video"},
    "EasyR1 with options": {
        "problem": "<video>\nWhich colour?", "answer": "B", "videos": ["a.mp4"], "images": [],
        "problem_type": "multiple choice", "options": ["A. red", "B. blue", "C. green"]},
    "LongVideoBench": {
        "video_id": "a", "question": "Which colour?", "question_wo_referring_query": "Which?",
        "candidates": COLOURS, "correct_choice": 1, "position": [3, 9], "topic_category": "Food",
        "question_category": "S2E", "level": "L1", "id": "a_0", "video_path": "a.mp4",
        "subtitle_path": "a.json", "duration_group": 60, "view_count": 8, "duration": 40.1,
        "starting_timestamp_for_subtitles": 0},
    "LongVideoBench, a column for each option": {
        "video_id": "a", "question": "Which colour?", "option0": "red", "option1": "blue",
        "option2": "green", "option3": "N/A", "option4": "N/A", "correct_choice": 1, "id": "a_0",
        "video_path": "a.mp4"},
    "MVBench": {**COLOUR, "candidates": COLOURS, "answer": "blue"},
    "MVBench, a part of a film": {
        **COLOUR, "candidates": COLOURS, "answer": "blue", "start": 2.5, "end": 9.0},
    "MLVU": {
        **COLOUR, "duration": 246, "candidates": COLOURS, "answer": "blue",
        "question_type": "plotQA", "question_id": "PQ_1"},
    "MLVU, options in the question": {
        "video_name": "a.mp4", "question": "Which colour?\n(A) red\n(B) blue\n(C) green\n",
        "candidates": COLOURS, "answer": "B", "task_type": "plotQA"},
    "Video-MME": {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History",
        "url": "https://x.org/a", "videoID": "a", "question_id": "001-1",
        "task_type": "Attribute Perception", "question": "Which colour?",
        "options": ["A. red", "B. blue", "C. green"], "answer": "B"},
    "Video-MME's own": {
        "video_id": "001", "duration_category": "short", "video_category": "Knowledge",
        "url": "https://x.org/a", "videoID": "a", "questions": [
            {"question_id": "001-1", "task_type": "x", "question": "Which colour?",
             "choices": ["A. red", "B. blue", "C. green"], "answer": "B"}]},
    "LLaVA-Video": {
        "id": "a", "data_source": "0_30_s_academic_v0_1", "video": "a.mp4", "conversations": [
            {"from": "human", "value": "<image>\n" + LISTED}, {"from": "gpt", "value": "B."}]}}


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_the_same_question_in_every_form(tmp_path, name, record):
    """Options beside the question were dropped in silence: nobody could be right."""
    [sample] = data.load(write(tmp_path, name, record))
    assert " ".join(sample.question.replace("(", "").replace(")", ".").split()) == (
        "Which colour? A. red B. blue C. green")
    assert (sample.answer, sample.domain) == ("B", "choice")
    assert sample.video == str(tmp_path / "a.mp4")
    assert sample.thought in ("", "It is.")
    assert rewards.score("<think></think><answer>B</answer>", sample.answer, "choice").accuracy == 1


def test_a_record_with_several_questions_is_several_samples(tmp_path):
    said = [("human", "<image>\nHow many?"), ("gpt", "3"), ("human", "Where?"), ("gpt", "outside")]
    talk = {"id": "a", "video": "a.mp4",
            "conversations": [{"from": who, "value": value} for who, value in said]}
    again = {**talk, "conversations": talk["conversations"][:2]}        # its id is the video's
    first, second, third = data.load(write(tmp_path, "q.json", talk, again))
    assert (first.id, first.question, first.answer) == ("a", "How many?", "3")
    assert (second.id, second.question, second.answer) == ("a-1", "Where?", "outside")
    assert third.question == "How many?" and len({first.id, second.id, third.id}) == 3

    video = {**FORMS["Video-MME's own"]}
    video["questions"] = [{**video["questions"][0], "question_id": f"001-{i}"} for i in range(3)]
    samples = data.load(write(tmp_path, "v.json", video))
    assert [sample.id for sample in samples] == ["001-0", "001-1", "001-2"]
    del video["questions"][1]["answer"]
    fails(write(tmp_path, "v.json", video), "item 0, question 1: no 'answer'")


def test_a_film_of_video_mme_is_named_after_it_only_if_there_is_no_path(tmp_path):
    record = FORMS["Video-MME"]
    [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "video": "deep/b.mp4"}))
    assert sample.video == str(tmp_path / "deep/b.mp4")
    fails(write(tmp_path, "q.jsonl", {**record, "videoID": True}), "no 'video' or")


def test_an_empty_id_is_none(tmp_path):
    samples = data.load(write(tmp_path, "q.jsonl", {**GOOD, "id": ""}, {**GOOD, "id": " "}))
    assert [sample.id for sample in samples] == ["q.jsonl-0", "q.jsonl-1"]


@pytest.mark.parametrize("said, says", [
    ([], "questions and answers"), ("text", "questions and answers"),
    ([{"from": "human", "value": "How?"}], "questions and answers"),
    ([{"from": "gpt", "value": "3"}, {"from": "human", "value": "How?"}], "turn 0"),
    ([{"from": "human", "value": "How?"}, "3"], "turn 1"),
    ([{"from": "human"}, {"from": "gpt", "value": "3"}], "no 'question'")])
def test_a_conversation_that_is_none_is_named(tmp_path, said, says):
    fails(write(tmp_path, "q.json", {"video": "a.mp4", "conversations": said}), says)


TALK = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "3"}]


@pytest.mark.parametrize("fields, says", [
    ({"conversations": TALK, "question": "x"}, "both 'conversations' and 'question'"),
    ({"conversations": TALK, "solution": "x"}, "both 'conversations' and 'solution'"),
    ({"conversations": TALK, "questions": [GOOD]}, "both 'conversations' and 'questions'"),
    ({"questions": [GOOD], "problem": "x"}, "both 'questions' and 'problem'"),
    ({"questions": [GOOD], "answer": "x"}, "both 'questions' and 'answer'"),
    ({"questions": []}, "'questions' is an empty list")])
def test_questions_in_two_places_of_a_record_are_refused(tmp_path, fields, says):
    """Those in one of the places were lost without a word."""
    fails(write(tmp_path, "q.jsonl", GOOD, {"video": "a.mp4", **fields}), f"line 2: {says}")


def test_what_is_null_beside_conversations_is_nothing(tmp_path):
    """Tables have a column for each field that any record has."""
    record = {"video": "a.mp4", "conversations": TALK, "question": None, "questions": []}
    assert data.load(write(tmp_path, "q.jsonl", record))[0].question == "How?"
    assert data.load(write(tmp_path, "q.jsonl", {**GOOD, "questions": []}))[0].answer == "3"


# --------------------------------------------------------------------------------------------------
# options beside the question

@pytest.mark.parametrize("options, answer, letter", [
    (COLOURS, "B", "B"), (COLOURS, "b", "B"), (COLOURS, "(B)", "B"), (COLOURS, "B.", "B"),
    (COLOURS, "blue", "B"), (COLOURS, " Blue. ", "B"), (COLOURS, "B. blue", "B"),
    (COLOURS, "(B) blue", "B"), (COLOURS, "B blue", "B"), (COLOURS, "Option B", "B"),
    (COLOURS, 1, "B"), (COLOURS, 1.0, "B"), (COLOURS, "1", "B"), (COLOURS, 0, "A"),
    (COLOURS, "<answer>B</answer>", "B"),
    (["7", "12", "33"], "33", "C"), ([7, 12, 33], 12, "B"), (["-3", "3"], "-3", "A"),
    (["C", "C++"], "C++", "B"), (["G. Bush", "A. Lincoln"], "A. Lincoln", "B"),
    (["us", "US"], "US", "B"), (["A", "B", "C"], "B", "B"),
    (["(A) red", "(B) blue"], "blue", "B"), (["a) red", "b) blue"], "b", "B"),
    (["A: red", "B: blue"], "A: red", "A"), (["[A] red", "[B] blue"], "B", "B"),
    ({"A": "red", "B": "blue"}, "blue", "B"), ("A. red\nB. blue", "B", "B")])
def test_the_answer_is_the_letter_of_its_option(tmp_path, options, answer, letter):
    record = {**COLOUR, "options": options, "answer": answer}
    [sample] = data.load(write(tmp_path, "q.jsonl", record))
    assert (sample.answer, sample.domain) == (letter, "choice")
    lines = sample.question.split("\n")
    assert [line[:3] for line in lines[1:]] == [f"{x}. " for x in "ABC"[:len(lines) - 1]]


@pytest.mark.parametrize("options, answer, says", [
    (COLOURS, "F", "'F' is none of the 3 options: A. red, B. blue, C. green"),
    (COLOURS, "yellow", "'yellow' is none"), (COLOURS, 3, "'3' is none"), (COLOURS, -1, "none"),
    (COLOURS, "A. blue", "'A. blue' is none"), (COLOURS, "A, B", "none"), (COLOURS, "@", "none"),
    (["2", "3", "4"], 2, "could be A or C: write the letter"),
    (["B", "A"], "B", "could be A or B"), (["red", "red"], "red", "could be A or B"),
    (["red"], "A", "'options' are 1; expected 2 to 26"), ("red, blue", "A", "without letters"),
    ([["red"], ["blue"]], "A", "a list; expected text"), ([None, "x"], "A", "NoneType"),
    ([True, False], "A", "a bool"), ([1.5, float("nan")], "A", "nan"),
    (["red", " "], "A", "empty"), (5, "A", "are a int"),
    ({"x": "red", "y": "blue"}, "A", "have the keys 'x', 'y'"),
    (["\ud83d", "x"], "A", "option A has half a character")])
def test_options_that_do_not_fit_are_refused(tmp_path, options, answer, says):
    path = write(tmp_path, "q.jsonl", {**COLOUR, "options": options, "answer": answer})
    fails(path, says)
    fails(path, "line 1")


@pytest.mark.parametrize("options, letters, text", [
    (["A. red", "C. blue", "D. green"], "BCD", "C. blue"),
    (["B. red", "C. blue"], "ABC", "C. blue"),
    (["(A) red", "(A) blue"], "AB", "(A) blue"), (["G. Bush", "J. Smith"], "B", "J. Smith")])
def test_letters_of_options_with_a_gap_or_twice_are_not_replaced(tmp_path, options, letters, text):
    """"C" became the letter of "D. green"."""
    record = {**COLOUR, "options": options, "thought": "So."}
    for letter in letters:
        path = write(tmp_path, "q.jsonl", {**record, "answer": letter})
        fails(path, f"line 1: the answer {letter!r} is a letter, but the options have the letters")
        path = write(tmp_path, "q.jsonl", {**record, "answer": text, "taught": letter})
        fails(path, f"line 1: 'taught', {letter!r}, is a letter, but the options have")
    [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "answer": text}))
    assert (sample.answer, sample.domain) == ("B", "choice")


@pytest.mark.parametrize("listed", ["A. blue\nB. red", "(a) blue (b) red. Choose one."])
@pytest.mark.parametrize("answer", ["B", "red", 0])
def test_options_in_the_question_and_beside_it_have_the_same_letters(tmp_path, listed, answer):
    """The question got both lists, so that "B" was red and blue."""
    record = {**COLOUR, "question": f"Which?\n{listed}", "options": ["red", "blue"]}
    fails(write(tmp_path, "q.jsonl", {**record, "answer": answer}),
          "line 1: 'options' are also in the question, with other letters")
    record["options"] = ["B. red", "A. blue"]              # in another order, with the same letters
    [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "answer": "red"}))
    assert (sample.answer.upper(), sample.question) == ("B", record["question"])
    record["options"] = ["A. red", "B. green"]             # those in the question are others
    [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "answer": "red"}))
    assert sample.question.endswith("\nA. red\nB. green")


@pytest.mark.parametrize("columns, says", [
    (["red", "N/A", "blue", "green"], "no option in 'option1', but one in 'option3'"),
    (["red", None, "blue"], "no option in 'option1', but one in 'option2'"),
    ([None, "red", "blue"], "no option in 'option0', but one in 'option2'"),
    (["N/A", "N/A"], "'correct_choice' is '1', the place of an option, but there are no options")])
def test_a_place_among_columns_of_options_is_that_of_the_column(tmp_path, columns, says):
    """An "N/A" in the middle was left out, so that 2 was "green"; without the first column all were
    ignored."""
    record = {**COLOUR, "correct_choice": 1}
    record |= {f"option{i}": text for i, text in enumerate(columns)}
    fails(write(tmp_path, "q.jsonl", record), f"line 1: {says}")
    if columns[0] is None:
        del record["option0"]
        fails(write(tmp_path, "q.jsonl", record), f"line 1: {says}")


@pytest.mark.parametrize("fields", [{}, {"candidates": []}, {"options": None}, {"options": " "}])
def test_a_place_without_options_is_refused(tmp_path, fields):
    """It became the gold answer "1" of a count."""
    for place in (1, 1.0, "1"):
        path = write(tmp_path, "q.jsonl", {**COLOUR, **fields, "correct_choice": place})
        fails(path, f"line 1: 'correct_choice' is '{place}', the place of an option, but there are")


def test_an_answer_of_5000_digits_is_text(tmp_path):
    """Python refuses to make a number of it."""
    record = {**COLOUR, "options": ["9" * 5000, "8"], "answer": "9" * 5000}
    assert data.load(write(tmp_path, "q.jsonl", record))[0].answer == "A"
    fails(write(tmp_path, "q.jsonl", {**record, "options": COLOURS}), "is none of the 3 options")


def test_an_empty_list_of_options_is_none(tmp_path):
    """Video-R1 has one beside each question without options."""
    [sample] = data.load(write(tmp_path, "q.jsonl", {**GOOD, "options": []}))
    assert (sample.question, sample.domain) == ("How many?", "count")


def test_what_the_thought_leads_to_becomes_a_letter_too(tmp_path):
    record = {**COLOUR, "options": COLOURS, "answer": "blue", "thought": "It is.", "taught": "red"}
    [sample] = data.load(write(tmp_path, "q.jsonl", record))
    assert (sample.answer, sample.taught) == ("B", "A")
    fails(write(tmp_path, "q.jsonl", {**record, "taught": "pink"}), "'taught', 'pink', is none")


def test_what_the_thought_leads_to_is_an_option_of_the_question(tmp_path):
    """A letter that the question does not list was taught."""
    record = {**GOOD, "question": "Which? A. red B. blue", "answer": "A"}
    for taught, letter in (("B", "B"), ("blue", "B"), ("B. blue", "B")):
        [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "taught": taught}))
        assert (sample.answer, sample.taught) == ("A", letter)
    fails(write(tmp_path, "q.jsonl", {**record, "taught": "F"}), "'taught', 'F', is none of the")


def test_characters_that_are_not_seen_are_no_part_of_an_answer(tmp_path):
    """"7" and a space of no width was text, and 7 a wrong answer."""
    for mark in "\u200b\u200f\u2060\ufeff":
        [sample] = data.load(write(tmp_path, "q.jsonl", {**GOOD, "answer": f"{mark}7{mark}"}))
        assert (sample.answer, sample.domain) == ("7", "count")


# --------------------------------------------------------------------------------------------------
# what is not used, and what is nearly right

def test_unknown_fields_are_said_once(tmp_path, capsys):
    records = [{**GOOD, "duration": i, "notes": None} for i in range(3)]
    path = write(tmp_path, "q.jsonl", {**records[0], "url": "x", "path": "b.mp4"}, *records[1:])
    lines = []
    assert data.load(path, say=lines.append)[0].video == str(tmp_path / "a.mp4")
    assert lines == [f"{path}: fields that are not used (in so many samples): 'duration' (3), "
                     "'url' (1), 'path' (1)"]
    data.load(path)
    assert capsys.readouterr().out.strip() == lines[0]
    assert data.load(write(tmp_path, "q.jsonl", GOOD), say=lines.append) and len(lines) == 1


def test_names_of_other_forms_are_said_if_they_are_not_used(tmp_path):
    """They were passed over, whether their form was read or not."""
    lines = []
    record = {**GOOD, "videoID": "b", "questions": "three", "option0": "red", "option1": "blue"}
    path = write(tmp_path, "q.jsonl", {**record, "options": ["2", "3"]})
    assert data.load(path, say=lines.append)[0].answer == "B"
    assert lines == [f"{path}: fields that are not used (in so many samples): 'videoID' (1), "
                     "'questions' (1), 'option0' (1), 'option1' (1)"]
    record = {**without(record, "video"), "questions": None, "answer": "blue"}
    assert data.load(write(tmp_path, "q.jsonl", record), say=lines.append)[0].answer == "B"
    assert len(lines) == 1


@pytest.mark.parametrize("typed, ours", [
    ("thougth", "thought"), ("Thought", "thought"), ("thoughts", "thought"), ("thouhgt", "thought"),
    ("domian", "domain"), ("tought", "thought"), ("tuaght", "taught"), ("option", "options"),
    ("candidate", "candidates"), ("ID", "id"), ("_id", "id"), ("optoins", "options")])
def test_a_field_that_is_nearly_one_of_ours_is_an_error(tmp_path, typed, ours):
    """A cold start without any thought, because of one letter."""
    fails(write(tmp_path, "q.jsonl", GOOD, {**GOOD, typed: "x"}),
          f"line 2: unknown field {typed!r}; did you mean {ours!r}?")


@pytest.mark.parametrize("typed, ours", [
    ("vedio", "video"), ("Video", "video"), ("anwser", "answer"), ("answers", "answer"),
    ("quesiton", "question")])
def test_a_required_field_with_a_typing_error_is_named(tmp_path, typed, ours):
    record = {typed if name == ours else name: value for name, value in GOOD.items()}
    fails(write(tmp_path, "q.jsonl", record), f"unknown field {typed!r}; did you mean {ours!r}?")


@pytest.mark.parametrize("name", ["audio", "actions", "uid", "main", "tag", "title", "source",
                                  "video_id", "answer_type", "optional", "text"])
def test_other_names_are_no_typing_errors(tmp_path, name):
    assert data.load(write(tmp_path, "q.jsonl", {**GOOD, name: "x"}), say=str)


def test_a_topic_in_the_place_of_a_domain_is_said_and_is_no_verifier(tmp_path):
    lines = []
    record = FORMS["Video-MME"]
    other = {**record, "question_id": "001-2", "domain": "Sports"}
    samples = data.load(write(tmp_path, "q.jsonl", record, other), say=lines.append)
    assert [sample.domain for sample in samples] == ["choice"] * 2
    assert "'domain' names topics, 'Knowledge', 'Sports'" in lines[1]
    ours = {**GOOD, "domain": "cuont"}                     # may be a typing error: not passed over
    assert data.load(write(tmp_path, "q.jsonl", ours))[0].domain == "cuont"


# --------------------------------------------------------------------------------------------------
# answers and thoughts

@pytest.mark.parametrize("answer", [
    "<answer>A</answer><answer>B</answer>", "<answer>A</answer> or <answer>B</answer>",
    "<answer>A<answer>B</answer></answer>", "<answer>A", "A</answer>", "A</answer>B<answer>"])
@pytest.mark.parametrize("record", [ITEM, FORMS["Video-R1"], GOOD], ids=["theirs", "r1", "ours"])
def test_two_answers_in_one_field_are_refused(tmp_path, record, answer):
    """What stood between the first tag and the last became the gold answer."""
    name = "solution" if "solution" in record else "answer"
    fails(write(tmp_path, "q.jsonl", {**record, name: answer}), "a sample has one answer")


@pytest.mark.parametrize("thought", ["<think>Two.</think>", " <think>\nTwo. </think> \n", "Two."])
def test_a_thought_is_taught_with_its_tags_once(tmp_path, thought):
    [sample] = data.load(write(tmp_path, "q.jsonl", {**GOOD, "thought": thought}))
    assert data.taught_text(sample) == "<think>Two.</think><answer>3</answer>"


@pytest.mark.parametrize("thought", ["<think></think>", " <think> \n </think>\n"])
@pytest.mark.parametrize("name", ["thought", "process", "reasoning"])
def test_an_empty_thought_in_tags_is_none(tmp_path, name, thought):
    """It kept its tags, so that they were taught twice, and it hid the thought in the answer."""
    [sample] = data.load(write(tmp_path, "q.jsonl", {**GOOD, name: thought}))
    assert sample.thought == ""
    answer = "<think>I see.</think><answer>3</answer>"
    [sample] = data.load(write(tmp_path, "q.jsonl", {**GOOD, name: thought, "answer": answer}))
    assert (sample.thought, sample.answer) == ("I see.", "3")


@pytest.mark.parametrize("field, text", [
    ("thought", "a</think>b"), ("thought", "<think>a"), ("taught", "<answer>3</answer>"),
    ("thought", "<think>a</think><answer>3</answer>"),
    ("thought", "<think><think>a</think></think>")])
def test_tags_inside_a_thought_are_refused(tmp_path, field, text):
    record = {**GOOD, "thought": "a", field: text}
    fails(write(tmp_path, "q.jsonl", record), f"inside {field!r}")


def test_an_answer_may_come_with_its_thought(tmp_path):
    answer = "<think>I see. </think>\n<answer> 3 </answer>"
    first, second = data.load(write(tmp_path, "q.jsonl", {**GOOD, "answer": answer},
                                    {**GOOD, "answer": answer, "thought": "Other."}))
    assert (first.answer, first.thought, second.thought) == ("3", "I see.", "Other.")


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
    ("q.json", [without(ITEM, "problem")], "item 0: no 'question' or 'problem'; found: "
     "'problem_id', 'data_type', 'videos', 'problem_type', 'reasoning', 'answer'"),
    ("q.json", [ITEM, without(ITEM, "answer")], "item 1: no 'answer'"),
    ("q.json", [without(ITEM, "videos")], "item 0: no 'video' or 'videos'"),
    ("q.json", [{**ITEM, "videos": []}], "item 0: no 'video' or 'videos'"),
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
    ("q.jsonl", [GOOD, {**GOOD, "answer": float("nan")}], "line 2: 'answer' is nan"),
    ("q.json", [ITEM, {**ITEM, "answer": float("inf")}], "item 1: 'answer' is inf"),
    ("q.jsonl", ['{"video": "a", "question": "q", "answer": 1e999}'], "line 1: 'answer' is inf"),
    ("q.jsonl", [GOOD, '{"id": ' + "[" * 99999], "line 2: lists or objects are nested too deeply"),
    ("q.json", [GOOD, '{"id": ' + '{"a": ' * 99999], "line 2: lists or objects are nested"),
    ("q.jsonl", [{**GOOD, "id": [[[[[1]]]]]}], "line 1: 'id' is a list"),
    ("q.jsonl", [GOOD, '{"answer": ' + "9" * 5000 + "}"], "line 2: a number of more than 4,300"),
    ("q.json", [GOOD, GOOD, '{"answer": ' + "9" * 5000 + "}"], "line 3: a number of more than"),
    ("q.jsonl", [GOOD, {**GOOD, "question": "x\ud83d"}], "line 2: 'question' has half a character"),
    ("q.jsonl", [{**GOOD, "video": "a\0b"}], "line 1: 'video' has a NUL"),
    ("q.json", [json.dumps(GOOD) + "]\n[" + json.dumps(GOOD)], "one record a line is a .jsonl"),
    ("q.jsonl", [{**GOOD, "question": "Which?\nA. x\nB. y", "answer": "F"}],
     "the answer 'F' is none of the options in the question: A. x, B. y"),
    ("q.jsonl", [{**GOOD, "question": "Which? (A) x (B) y", "answer": "(B) x"}],
     "the answer '(B) x' does not fit the options in the question"),
    ("q.jsonl", [{**GOOD, "answer": None}], "no 'answer' or 'solution' or 'correct_choice'; "
     "'answer' is null; found: 'video', 'question'"),
    ("q.json", [{**ITEM, "videos": []}], "; 'videos' is []; found: 'problem_id', 'data_type', "),
    ("q.jsonl", [{"x": 1, "y": 2}], "line 1: no 'question' or 'problem'; found: 'x', 'y'"),
    ("q.jsonl", [{}], "found: nothing"),
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


def test_what_windows_and_phones_write_is_read(tmp_path):
    """A byte order mark was an error, and so was a name in capital letters."""
    line, lines = json.dumps(GOOD), []
    for name, text in (("bom.jsonl", "\ufeff" + line), ("crlf.jsonl", line + "\r\n" + line),
                       ("UPPER.JSON", f"[{line}]"), ("bom.json", f"\ufeff[{line}]"),
                       ("UPPER.JSONL", line), ("mac.jsonl", line + "\r" + line)):
        (tmp_path / name).write_bytes(text.encode())
        lines += data.load(str(tmp_path / name))
    assert {(sample.question, sample.answer) for sample in lines} == {("How many?", "3")}
    assert len(lines) == 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_is_no_utf8_is_named_with_its_place(tmp_path, name):
    text = "[\n" + json.dumps({**GOOD, "question": "né?"}, ensure_ascii=False) + "]"
    if name == "a.jsonl":
        text = json.dumps(GOOD) + text[1:-1]
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    column = text.split("\n")[1].index("é") + 1
    fails(str(tmp_path / name), f"line 2: not UTF-8 text (byte 0xe9 in column {column})")


TWICE = '{"video": "a}.mp4", "question": "\\"}?",\n "answer": "1", "answer": "2"}'


@pytest.mark.parametrize("name, text, says", [
    ("q.jsonl", json.dumps(GOOD) + "\n" + TWICE.replace("\n", ""), "line 2: the key 'answer'"),
    ("q.jsonl", TWICE.replace("\n", "").replace('"2"', '"1"'), "line 1: the key 'answer'"),
    ("q.json", f"[{json.dumps(GOOD)},\n{TWICE},\n{json.dumps(GOOD)}]", "line 3: the key 'answer'"),
    ("q.jsonl", '{"options": {"A": "x", "A": "y"}}', "line 1: the key 'A'"),
    ("q.json", '[{"questions": [\n{"a": {},\n"a": {"b": {}}}\n]\n}]', "line 3: the key 'a'")])
def test_a_key_that_is_twice_in_an_object_is_named(tmp_path, name, text, says):
    """The second was taken, and the first lost without a word."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    fails(str(tmp_path / name), f"{says} is twice in one object")


@pytest.mark.parametrize("head, says", [
    (b"PAR1\x15\x04", "a parquet file"), (b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "zip"),
    ("{}".encode("utf-16"), "UTF-16")])
def test_what_is_no_text_is_called_what_it_is(tmp_path, head, says):
    for name in ("a.json", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(head + b"\0" * 50)
        fails(str(tmp_path / name), says)


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
    ("answer", ["B"]), ("question", {"text": "How many?"}), ("video", {"path": "a.mp4"}),
    ("video", [["a.mp4"]]), ("answer", True), ("video", False), ("id", False), ("thought", {})])
def test_a_field_that_is_no_text_is_named(tmp_path, field, value):
    """A list became its Python spelling: the answer ["B"] was verified against "['B']", which
    nobody ever says."""
    path = write(tmp_path, "q.jsonl", GOOD, {**GOOD, field: value})
    fails(path, f"line 2: {field!r}")
