"""python -m pytest tests/test_data.py -q

Questions about videos: reading them from files, and holding some out. (tests/test_formats.py has
what is wrong in files, test_video.py the reading of real video, test_toy.py the built-in videos.)
"""
import hashlib
import os
import random

import pytest
from test_formats import GOOD, write

import data
import rewards
import toy

pytestmark = pytest.mark.method

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def toys():
    return data.load("toy")


@pytest.fixture(scope="module")
def films():
    """The parts that are loaded by their name alone."""
    return {part: data.load(f"toy:{part}") for part in ("reading", "grounding", "long")}


def seed_of(sample):
    return int(sample.video.split(":")[1].split("-")[-1])


# --------------------------------------------------------------------------------------------------
# questions from files

def test_a_jsonl_gives_every_field_as_written(tmp_path):
    full = {"id": "x", "video": "sub/a.mp4", "question": "Q é?", "answer": "a cat",
            "domain": "open", "thought": "T", "taught": "a dog"}
    path = write(tmp_path, "q.jsonl", full, "", GOOD,
                 {**GOOD, "id": 12, "answer": 4, "thought": ""})
    first, second, third = data.load(path)
    video = str(tmp_path / "sub/a.mp4")
    assert first == data.Sample("x", "Q é?", "a cat", "open", video, "T", "a dog")
    assert (second.question, second.answer, second.domain) == ("How many?", "3", "count")
    assert (second.thought, second.taught) == ("", "")
    assert (third.id, third.answer, third.domain) == ("12", "4", "count")
    assert len({first.id, second.id, third.id}) == 3 and "q.jsonl" in second.id


OPTIONS = "What does it do? A. It sleeps B. It pecks"


@pytest.mark.parametrize("question, answer, domain", [
    (OPTIONS, "B", "choice"),
    ("Which?\nA) red\nB) blue", "a", "choice"),
    ("Which? (A) red (B) blue", "A", "choice"),
    ("Which letter is on the wall?", "B", "open"),
    (OPTIONS, "It pecks", "open"),
    ("How many?", "5", "count"),
    ("How many?", "-3", "count"),
    ("How many? A. 3 B. 4", "3", "count"),
    ("How long?", "5.5", "math"),
    ("How much?", "50%", "math"),
    ("Which?\nA. red\nB. blue", "B. blue", "choice"),
    ("How many?", "five", "open"),
    ("Who?", "Ann B", "open"),
])
def test_the_domain_is_guessed_from_the_answer_and_the_options(tmp_path, question, answer, domain):
    """Choice if the answer is a letter, with or without its text, and the question lists options;
    count if it is an integer, math if another number, else open. Decimals and a letter with its
    text were open: nobody was right about "5.50" or "B"."""
    record = {"video": "a.mp4", "question": question, "answer": answer}
    path = write(tmp_path, "q.jsonl", record, {**record, "domain": "open"})
    guessed, given = data.load(path)
    assert (guessed.domain, given.domain) == (domain, "open")
    assert rewards.VERIFIERS[guessed.domain](answer, answer) == 1.0


def test_video_paths_are_relative_to_the_file_or_to_video_dir(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = ("a.mp4", "deep/er.mp4", "/abs/a.mp4", "toy:3")
    records = [{**GOOD, "video": video} for video in paths]
    path = write(tmp_path / "sub", "q.jsonl", *records)
    assert [s.video for s in data.load(path)] == [
        str(tmp_path / "sub/a.mp4"), str(tmp_path / "sub/deep/er.mp4"), "/abs/a.mp4", "toy:3"]
    assert [s.video for s in data.load(path, "/videos")] == [
        "/videos/a.mp4", "/videos/deep/er.mp4", "/abs/a.mp4", "toy:3"]


# --------------------------------------------------------------------------------------------------
# held out

def some_samples(videos):
    return [data.Sample(f"s{i}", "Q?", "1", "count", video) for i, video in enumerate(videos)]


def held_ids(videos):
    return [sample.id for sample in data.split(some_samples(videos), 0.5)[1]]


def test_split_keeps_every_sample_and_no_video_is_on_both_sides(toys):
    files = some_samples([f"/v/{i % 700}.mp4" for i in range(2000)])   # most have three questions
    for samples, fraction in ((toys, 0.05), (files, 0.05), (files, 0.3)):
        train, held = data.split(samples, fraction)
        assert sorted(s.id for s in train + held) == sorted(s.id for s in samples)
        assert not {s.video for s in train} & {s.video for s in held}
        videos = {s.video for s in samples}
        share = len({s.video for s in held}) / len(videos)
        deviation = (fraction * (1 - fraction) / len(videos)) ** 0.5   # of a binomial
        assert abs(share - fraction) < 4 * deviation
    assert data.split(toys)[1] == data.split(toys, 0.05)[1]


def test_split_does_not_depend_on_what_else_is_in_the_data(toys):
    held = {s.id for s in data.split(toys)[1]}
    shuffled = random.Random(0).sample(toys, 5000)
    more = shuffled + some_samples([f"/v/{i}.mp4" for i in range(100)])
    held_of_more = {s.id for s in data.split(more)[1] if s.id.startswith("toy")}
    assert held_of_more == held & {s.id for s in shuffled}


def test_split_does_not_depend_on_where_the_videos_lie():
    """Another --video_dir, on another machine, must not move a video to the other side."""
    names = [f"{i}.mp4" for i in range(300)] + [f"folder{i}" for i in range(300)]
    sides = [held_ids([base + name for name in names]) for base in ("/data/", "v/", "")]
    assert sides[0] == sides[1] == sides[2]


def test_split_knows_a_folder_by_its_name_with_a_slash_at_its_end_too():
    """The name was what follows the last slash: every folder written "clips/7/" had the same one,
    so that all were held out or none."""
    plain = [f"/v/{i}" for i in range(300)]
    assert held_ids([path + "/" for path in plain]) == held_ids(plain)


def test_split_knows_a_built_in_video_by_its_seed():
    """"toy:7" and its first three events, "toy:7:3", are the same video; so is "toy:07"."""
    paths = [f"toy:{i}{tail}" for i in range(200) for tail in ("", ":3")]
    train, held = data.split(some_samples(paths), 0.5)
    assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}


def test_split_keeps_a_story_and_its_long_film_together(toys, films):
    """"toy:long-7" tells the story of "toy:7": trained on one and asked about the other, nothing
    would be held out."""
    for samples in (films["reading"], films["grounding"], films["long"] + toys[:3000]):
        train, held = data.split(samples)
        assert not {s.video for s in train} & {s.video for s in held}
        assert 0.03 < len(held) / len(samples) < 0.07
        assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}
    kinds = ("", "0", "long-", "long-0", "reading-", "grounding-")
    paths = [f"toy:{kind}{seed}{events}"
             for seed in range(200) for events in ("", ":3") for kind in kinds]
    train, held = data.split(some_samples(paths), 0.5)
    assert not {seed_of(s) for s in train} & {seed_of(s) for s in held}


# --------------------------------------------------------------------------------------------------
# what a video's content is (tests/test_store.py has that of files)

def test_a_built_in_video_is_its_frames():
    prints = [data.fingerprint(path) for path in ("toy:1", "toy:2", "toy:1:2", "toy:1:3")]
    assert len(set(prints)) == 4 and data.fingerprint("toy:1") == prints[0]
    assert prints[2] == hashlib.sha256(toy.draw_frames(1)[:4]).hexdigest()


@pytest.mark.parametrize("path", ["missing.mp4", "toy:x"])
def test_what_cannot_be_read_is_named_as_open_video_names_it(path):
    errors = []
    for read in (data.fingerprint, lambda path: data.open_video(path, 4)):
        with pytest.raises(data.VideoError) as e:
            read(path)
        errors.append(str(e.value))
    assert errors[0] == errors[1] and path in errors[0]
