"""python -m pytest tests/test_data.py -q

Questions about videos: reading them from files, holding some out, and the built-in videos, whose pixels, answers and
thoughts are checked by a second implementation that shares nothing with data.py but the words of the questions.
(tests/test_video.py has the reading of real video.)
"""
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

import data
import rewards

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def toys():
    return data.load("toy")


@pytest.fixture(scope="module")
def stories():
    return [data.toy_story(seed) for seed in range(4000)]


@pytest.fixture(scope="module")
def films():
    """The parts that are loaded by their name alone."""
    return {part: data.load(f"toy:{part}") for part in ("reading", "grounding", "long")}


def seed_of(sample):
    return int(sample.video.split(":")[1].split("-")[-1])


def answered(value, text):
    """The text between <think> and </think>, or <answer> and </answer>."""
    return re.search(f"<{value}>(.*)</{value}>", text, re.DOTALL)[1]


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


def test_the_alignment_stage_sees_no_story_that_load_has(toys):
    """It trains the eyes on other built-in videos; were one of them held out, its evaluation would be worth nothing."""
    loaded = {seed_of(s) for s in toys}
    assert loaded == set(range(len(toys)))
    runs = []
    for seed in (0, 1, 2, 50):
        samples = [data.toy_description(seed, number, number / 12000) for number in (*range(0, 12000, 37), 99999, 10 ** 6)]
        runs.append({seed_of(s) for s in samples})
        assert len(runs[-1]) == len(samples) == len({s.id for s in samples}) and not runs[-1] & loaded
    assert sum(map(len, runs)) == len(set().union(*runs))                          # and runs of other seeds see others
    tales = {(tuple(s.events), s.question) for s in map(data.toy_story, range(0, 20000, 4))}
    assert not tales & {(tuple(s.events), s.question) for s in map(data.toy_story, sorted(runs[0]))}
    for part in ("reading", "grounding", "long"):
        assert not {seed_of(data.toy_description(0, number, 1, [part])) for number in range(100)} & loaded


# ---------------------------------------------------------------------------------------------------------------------
# the built-in videos: pixels

def watch(frames):
    """A second pair of eyes: uint8 [T,28,28,3] -> [(second on the clock, colour, shape, place)], from pixels alone."""
    seen = []
    for frame in frames.astype(int):
        white = (frame == 255).all(2)
        seconds = np.flatnonzero(white[:4, 4:].any(0))                             # the clock along the top, two pixels a second
        assert len(seconds) == 2 and seconds[0] % 2 == 0
        figure = (abs(frame - frame[27, 27]).max(2) > 0) & ~white                  # all that is not background
        y, x = np.nonzero(figure)
        r, g, b = frame[y, x].mean(0)
        colour = "yellow" if min(r, g) > 150 else "red" if r > 150 else "green" if g > 130 else "blue" if b > 180 else None
        above, below = figure[y.min(), x.min()], figure[y.max(), x.min()]          # corners of its bounding box
        shape = "square" if above and below else "triangle" if below else "circle" if not above else None
        right, down = (x.min() + x.max()) / 2 - 14, (y.min() + y.max()) / 2 - 16
        place = ("right" if right > 0 else "left") if abs(right) > abs(down) else "bottom" if down > 0 else "top"
        assert max(abs(right), abs(down)) > 3, "in the middle"
        seen.append((int(seconds[0]) // 2, colour, shape, place))
    return seen


def read(frames):
    """The letters of uint8 [T,28,28,3], known by how many pixels are white in each of their five rows."""
    known = {(1, 2, 2, 5, 2): "A", (4, 1, 1, 1, 4): "C", (5, 1, 3, 1, 5): "E", (2, 2, 5, 2, 2): "H", (1, 1, 1, 1, 5): "L",
             (3, 2, 2, 2, 3): "O", (5, 1, 1, 1, 1): "T", (2, 2, 1, 2, 2): "X"}
    return "".join(known[tuple((frame[22:27, 22:27] == 255).all(2).sum(1))] for frame in frames)


def box(frame):
    """The edges of what is neither background nor white."""
    y, x = np.nonzero((frame != frame[27, 27]).any(2) & (frame != 255).any(2))
    return f"[{x.min()}, {y.min()}, {x.max() + 1}, {y.max() + 1}]"


def events_of(path):
    """The events of a built-in video as seen on the screen: half a second a frame, an event a second."""
    frames, seconds = data.read_video(path, 1000)
    assert seconds == 0.5 and frames.shape[1:] == (28, 28, 3) and frames.dtype == np.uint8 and len(frames) % 2 == 0
    seen = watch(frames)
    assert seen[::2] == seen[1::2] and [t for t, *_ in seen[::2]] == list(range(len(frames) // 2))
    return [tuple(event) for _, *event in seen[::2]]


def test_fifty_videos_show_their_stories():
    for seed in range(50):
        assert events_of(f"toy:{seed}") == data.toy_story(seed).events


def test_a_slice_shows_the_first_events_and_a_description_says_all_of_them():
    for seed in range(10):
        whole = events_of(f"toy:{seed}")
        assert 5 <= len(whole) <= 10
        for n in (1, 3, len(whole)):
            assert events_of(f"toy:{seed}:{n}") == whole[:n]
    lengths = {0.0: [], 0.5: [], 1.0: []}
    for progress, seen in lengths.items():
        for number in range(20):
            s = data.toy_description(3, number, progress)
            lines = [line.split() for line in s.thought.split("\n")]
            assert [tuple(line[1:]) for line in lines] == events_of(s.video) and [line[0] for line in lines] == [*map(str, range(len(lines)))]
            seen.append(len(lines))
    assert set(lengths[0.0]) == {1} and max(lengths[0.5]) > 7 and max(lengths[1.0]) > 7           # it begins with one moment


def test_fewer_frames_than_the_video_has_are_evenly_spaced():
    for seed in range(5):
        whole, _ = data.read_video(f"toy:{seed}", 1000)
        for n in (1, 2, 3, 4, 7, len(whole) - 1, len(whole), len(whole) + 1, 64):
            frames, seconds = data.read_video(f"toy:{seed}", n)
            T = min(n, len(whole))
            assert len(frames) == T and seconds == pytest.approx(len(whole) / 2 / T)
            assert np.array_equal(frames, whole[[int((i + 0.5) * len(whole) / T) for i in range(T)]])
    video = data.open_video("toy:3", 6)
    assert (video.frames, video.height, video.width) == (6, 28, 28)
    assert np.array_equal(video.read(2, 5), data.read_video("toy:3", 6)[0][2:5])


@pytest.mark.parametrize("path", ["toy:", "toy:x", "toy:-1", "toy:1.5", "toy:1:", "toy:1:x", "toy:1:2:3", "toy: 1", "toy:1\n", "toy:1:0",
                                  "toy:reading", "toy:reading-", "toy:reading-x", "toy:plot-1", "toy:long-1:0", "toy:long-long-1"])
def test_a_bad_path_of_a_built_in_video_is_named(path):
    with pytest.raises(data.VideoError) as e:
        data.open_video(path, 4)
    assert path.strip() in str(e.value)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        data.open_video("toy:1", 0)


def test_a_seed_gives_the_same_video_and_question_anywhere(toys):
    """Ranks are processes of their own: they must see the same videos, whatever Python's hash seed is."""
    code = ("import data, hashlib; print(hashlib.sha256(b''.join(repr(data.toy_story(s)).encode() + data.toy_frames(s).tobytes()"
            " for s in range(20))).hexdigest())")
    digests = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": h}, check=True,
                              capture_output=True, text=True).stdout for h in "12"}
    assert len(digests) == 1
    assert [data.toy_sample(s) for s in range(50)] == toys[:50] and data.toy_story(5) == data.toy_story(5)
    assert not np.array_equal(data.toy_frames(5)[:10], data.toy_frames(6)[:10])


def test_the_four_categories_are_for_ever_what_they_were(toys):
    """Every number in the README was measured on these frames and texts: the digest was computed before there were others."""
    digest = hashlib.sha256(repr(toys).encode())
    for seed in range(40):
        s = data.toy_story(seed)
        digest.update(repr((s.events, s.thought, s.difficulty)).encode() + data.toy_frames(seed).tobytes())
        digest.update(data.read_video(f"toy:{seed}:3", 5)[0].tobytes() + repr(data.toy_description(seed, seed, seed / 40)).encode())
    assert digest.hexdigest() == "222dea837481cf96a8e12053d8188373555786cc1d4a33d33caab05d47411adb"


def test_no_shape_and_no_clock_comes_near_a_letter():
    met = set()
    for seed in range(60):
        story = data.toy_story(f"reading-{seed}")
        frames, _ = data.read_video(f"toy:reading-{seed}", 100)
        assert read(frames[::2]) == read(frames[1::2]) == story.letters and events_of(f"toy:reading-{seed}") == story.events
        around = frames[:, 22:, 21:]                                               # the letter, and a pixel at three sides
        white = (around == 255).all(3)
        assert ((around == frames[:, 27:, 27:]).all(3) | white).all(), "a shape"
        white[:, :5, 1:6] = False
        assert not white.any(), "the clock, or a letter that is too large"
        met |= {(*event, letter) for event, letter in zip(story.events, story.letters)}
    assert len({m[1:3] for m in met}) == 12 and len({m[3] for m in met}) == 8
    for name in [f"{kind}{seed}" for kind in ("", "grounding-", "long-") for seed in range(10)]:
        corner = data.toy_frames(name)[:, 22:, 21:]
        assert (corner == corner[:, -1:, -1:]).all(), "a letter where none is asked for"


def test_a_slice_and_a_content_of_the_other_videos():
    for kind in ("reading", "grounding"):
        whole, _ = data.read_video(f"toy:{kind}-4", 100)
        assert np.array_equal(data.read_video(f"toy:{kind}-04:3", 100)[0], whole[:6])
    film = data.toy_frames("long-4")
    clock = [t for t, *_ in watch(film)]
    for n in (1, 3, 9):
        assert np.array_equal(data.read_video(f"toy:long-4:{n}", 1000)[0], film[[t < n for t in clock]])
    assert len({data.fingerprint(f"toy:{kind}4") for kind in ("", "reading-", "grounding-", "long-", "long-5")}) == 5
    assert data.toy_name("toy:long-007:03") == ("long-7", 3) and data.toy_name("toy:7") == ("7", None)
    assert data.toy_sample(data.toy_name("toy:07")[0]) == data.toy_sample(7)


def test_a_long_film_tells_the_same_story_at_an_uneven_pace(toys, films):
    """256 frames; every event is seen with all of them, and 16 of them pass over some: that is what more frames are for."""
    uneven, missed, needed = [], 0, 0
    assert [(s.question, s.answer, s.thought, s.taught, s.domain) for s in films["long"]] == [
        (s.question, s.answer, s.thought, s.taught, s.domain) for s in toys]
    for seed in range(60):
        frames, seconds = data.read_video(f"toy:long-{seed}", 256)
        assert len(frames) == 256 and seconds == 0.5
        seen = watch(frames)
        events, lasts = zip(*[(event, len([*same])) for event, same in itertools.groupby(seen)])
        assert [list(event[1:]) for event in events] == [list(e) for e in data.toy_story(seed).events]
        assert [event[0] for event in events] == [*range(len(events))] and min(lasts) >= 2
        uneven.append(max(lasts) / min(lasts))
        few = watch(data.read_video(f"toy:long-{seed}", 16)[0])
        missed += len(set(few)) < len(events)
        _, want, _, _ = ask(films["long"][seed].question, data.toy_story(seed).events)
        needed += any(event[1:3] == want and event not in few for event in events)
    assert missed > 50 and needed > 20 and np.median(uneven) > 10


def test_a_description_says_what_its_parts_are_about():
    kinds = Counter()
    for number in range(30):
        assert data.toy_description(1, number, 1, ["plot", "spatial"]) == data.toy_description(1, number, 1)
        s = data.toy_description(1, number, 1, ["reading"])
        frames, _ = data.read_video(s.video, 100)
        assert [line.split() for line in s.thought.split("\n")] == [
            [str(i), c, shape, letter] for i, (c, shape, _), letter in zip(range(10), events_of(s.video), read(frames[::2]))]
        s = data.toy_description(1, number, 1, ["long"])
        seen = [key for key, _ in itertools.groupby(watch(data.read_video(s.video, 256)[0]))]
        assert s.video.startswith("toy:long-") and s.thought == "\n".join(" ".join(map(str, event)) for event in seen)
        mixed = data.toy_description(1, number, 1, data.toy_parts("toy:plot,long,reading"))
        kinds[mixed.video.split(":")[1].rpartition("-")[0]] += 1
    assert set(kinds) == {"", "long", "reading"} and min(kinds.values()) > 4
    assert data.toy_parts("toy") == data.toy_parts("a/toy.jsonl") == ["temporal", "goal", "spatial", "plot"]


# ---------------------------------------------------------------------------------------------------------------------
# the built-in videos: questions, answers, thoughts

def test_parts_of_the_toy_are_loaded_by_name(toys, films):
    alone = films | {part: [s for s in toys if s.id.startswith(f"toy-{part}-")] for part in ("temporal", "goal", "spatial", "plot")}
    assert data.load("toy:plot") == data.load("toy:plot,plot") == alone["plot"]
    assert sorted(s.id for s in data.load("toy:plot,goal,spatial,temporal")) == sorted(s.id for s in toys)
    for parts in (("temporal", "reading"), ("reading", "plot", "grounding"), ("grounding", "long")):
        samples = data.load(f"toy:{','.join(parts)}")
        assert len({s.id for s in samples}) == len(samples) == sum(len(alone[part]) for part in parts)
        for part in parts:                                                         # all of each, in its own order
            assert [s for s in samples if s.id.startswith(f"toy-{part}-")] == alone[part]
        first = Counter(s.id.rsplit("-", 1)[0] for s in data.split(samples)[1][:256])
        assert len(first) == len(parts) + 3 * ("long" in parts) and min(first.values()) > 0.7 * first.total() / len(first)
    assert {part: (len(s), s[17].id, s[17].video) for part, s in films.items()} == {
        "reading": (5000, "toy-reading-17", "toy:reading-17"), "grounding": (5000, "toy-grounding-17", "toy:grounding-17"),
        "long": (20000, f"toy-long-{data.toy_story(17).category}-17", "toy:long-17")}


@pytest.mark.parametrize("source, wrong", [("toy:pilot", "'pilot'"), ("toy:", "''"), ("toy:plot,", "''"), ("toy:plot, long", "' long'")])
def test_an_unknown_part_is_named_with_those_there_are(source, wrong):
    with pytest.raises(ValueError) as e:
        data.load(source)
    assert wrong in str(e.value) and "temporal, goal, spatial, plot, reading, grounding, long" in str(e.value)


def test_reading_and_grounding_follow_from_what_is_on_the_screen(films):
    """The answer from pixels; the thought and the teacher's as in the other categories; difficulty is how many match."""
    matches, wrong = {"reading": Counter(), "grounding": Counter()}, Counter()
    for s in films["reading"][:150] + films["grounding"][:150]:
        frames, events = data.read_video(s.video, 100)[0][::2], events_of(s.video)
        letters = read(frames) if "spell" in s.question else ""
        boxes = {place: box(frame) for (colour, shape, place), frame in zip(events, frames) if f"{colour} {shape}" in s.question}
        boxes["none"] = "none"
        category, want, need, answer = ask(s.question, events, letters)
        story = data.toy_story(s.video.split(":")[1])
        answer = boxes[answer] if category == "grounding" else answer
        assert (s.answer, category, s.domain) == (answer, story.category, {"reading": "ocr"}.get(category, category))
        for thought, said in ((story.thought, story.answer), story.taught):
            came, overlooked = follow(thought, events, category, want, need, letters)
            assert said == (boxes[came] if category == "grounding" else came)
            assert not overlooked or want[1] == "triangle" and thought == s.thought != story.thought
        assert rewards.score(data.taught_text(replace(s, taught="")), s.answer, s.domain).total == 1
        assert (rewards.score(data.taught_text(s), s.answer, s.domain).accuracy == 1) == (s.taught == s.answer)
        assert story.difficulty == sum(e[:2] == want for e in events)
        matches[category][story.difficulty] += 1
        wrong[category] += s.taught != s.answer
    assert sorted(matches["reading"]) == [1, 2, 3, 4] and sorted(matches["grounding"]) == [1, 2, 3]
    assert all(0.2 < n / 150 < 0.7 for n in wrong.values())                        # enough wrong for RL to mend


def test_only_the_box_of_the_right_place_is_right():
    """The box fits the drawn shape tightly: x2 - x1 pixels wide, and no two places' boxes overlap by half."""
    for shape in SHAPES:
        for place in ("left", "right", "top", "bottom"):
            name = next(n for n in range(1000) if data.toy_story(n).events[0][1:] == (shape, place))
            right = data.toy_box(shape, place)
            assert right == box(data.toy_frames(name)[0]) and rewards.verify_grounding(right, right) == 1
            for other in SHAPES:
                for there in {"left", "right", "top", "bottom"} - {place}:
                    assert rewards.verify_grounding(data.toy_box(other, there), right) == 0
            assert rewards.verify_grounding("none", right) == 0

def ask(question, events, letters=""):
    """A second implementation: the answer to a question, from the events (and letters beside them) alone; a place where a
    box is asked for. -> (category, wanted, need, answer)"""
    find = lambda pattern: re.fullmatch(pattern, question)
    thing = f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    where = lambda m: [i for i, e in enumerate(events) if e[:2] == (m[1], m[2])]
    if m := find(rf"Which colour comes right after the last {thing}\?"):
        return "temporal", (m[1], m[2]), 0, events[where(m)[-1] + 1][0]
    if m := find(rf"Where is the last {thing}\?"):
        return "spatial", (m[1], m[2]), 0, events[where(m)[-1]][2]
    if m := find(rf"How many {thing}s are there\?"):
        return "plot", (m[1], m[2]), 0, str(len(where(m)))
    if m := find(rf"Someone collects {thing}s and needs (\d)\. When is it done\?"):
        return "goal", (m[1], m[2]), int(m[3]), str(where(m)[int(m[3]) - 1])
    if m := find(rf"What do the letters beside the {thing}s spell\?"):
        return "reading", (m[1], m[2]), 0, "".join(letters[i] for i in where(m))
    if m := find(rf"Where is the last {thing}\? Give its box\."):
        return "grounding", (m[1], m[2]), 0, events[where(m)[-1]][2]
    raise AssertionError(f"no question of ours: {question}")


def follow(thought, events, category, want, need, letters=""):
    """Read a thought line by line and check every claim in it. -> (the answer it comes to, events it overlooked)

    A line: number, colour seen, colour asked for, the same or not; if so, shape seen, shape asked for, the same or not, and
    the place, or the letter if there is one; then what is known so far. The one lie that is let through: "no" at an event that
    is the one asked for.
    """
    count, state, overlooked = 0, "0" if need or category == "plot" else "none", []
    lines = thought.split("\n")
    for i, (line, (colour, shape, place)) in enumerate(zip(lines, events)):
        words = line.split(" ")
        expected = [str(i), colour, want[0], "yes" if colour == want[0] else "no"]
        match = False
        if colour == want[0]:
            said = words[6]
            match = said == "yes"
            expected += [shape, want[1], "yes" if shape == want[1] and match else "no", letters[i] if letters else place]
            if shape == want[1] and not match:
                overlooked.append(i)
        count += match
        if category in ("plot", "goal"):
            state = str(count)
        elif category in ("spatial", "grounding") and match:
            state = place
        elif category == "reading" and match:
            state = letters[i] if state == "none" else state + letters[i]
        elif category == "temporal":
            state = "next" if match else colour if state == "next" else state
        assert words == expected + [state], line
        if category == "goal" and count == need:
            assert i == len(lines) - 1, "it thinks on after the goal is reached"
            return str(i), overlooked
    assert len(lines) == len(events)
    return "never" if category == "goal" else state, overlooked


def test_the_answer_follows_from_what_is_on_the_screen():
    met = Counter()
    for seed in range(60):
        s = data.toy_sample(seed)
        category, *_, answer = ask(s.question, events_of(s.video))
        assert s.answer == answer and category in s.id
        met[category] += 1
    assert len(met) == 4 and min(met.values()) > 5


def test_the_right_thought_derives_the_right_answer(stories):
    for story in stories:
        category, want, need, answer = ask(story.question, story.events)
        assert (category, answer) == (story.category, story.answer)
        assert follow(story.thought, story.events, category, want, need) == (answer, [])
        assert story.domain == ("count" if category in ("plot", "goal") else "open")


def test_the_teacher_errs_only_by_overlooking_wanted_triangles(stories):
    """Two in three of them; and its answer is what its own thought comes to, so that it teaches to think, not to guess.

    Counted where every event is judged (a goal ends the thought early), 4 standard deviations of a binomial allowed.
    """
    wanted, missed, right = 0, 0, Counter()
    for story in stories:
        category, want, need, answer = ask(story.question, story.events)
        thought, taught = story.taught
        concluded, overlooked = follow(thought, story.events, category, want, need)
        assert concluded == taught
        assert not overlooked or want[1] == "triangle"
        assert overlooked or (thought, taught) == (story.thought, story.answer)
        right[want[1] == "triangle", taught == answer] += 1
        if want[1] == "triangle" and category != "goal":
            wanted += sum(e[:2] == want for e in story.events)
            missed += len(overlooked)
    assert wanted > 2000 and abs(missed / wanted - 2 / 3) < 4 * (2 / 9 / wanted) ** 0.5
    triangles = right[True, True] + right[True, False]
    assert abs(triangles / len(stories) - 0.6) < 4 * (0.6 * 0.4 / len(stories)) ** 0.5            # questions about triangles
    assert right[False, False] == 0 and 0.2 < right[True, True] / triangles < 0.7                 # enough wrong for RL to mend


def test_a_sample_carries_the_truth_to_verify_and_the_teacher_to_imitate(toys, stories):
    differ = 0
    for s, story in zip(toys, stories):
        assert (s.answer, s.thought, s.taught, s.domain, s.question) == (story.answer, *story.taught, story.domain, story.question)
        text = data.taught_text(s)
        assert rewards.well_formed(text) and answered("think", text) == s.thought and answered("answer", text) == s.taught
        reward = rewards.score(text, s.answer, s.domain)
        assert (reward.accuracy, reward.format) == (float(s.taught == s.answer), 1.0)
        differ += s.taught != s.answer
    assert 0.2 < differ / len(stories) < 0.5
    plain = data.Sample("x", "Q?", "7", "count", "a.mp4", "It is 7.")              # whose thought's writer was right
    assert rewards.well_formed(data.taught_text(plain)) and answered("answer", data.taught_text(plain)) == "7"
    assert len({s.id for s in toys}) == len(toys)


def test_difficulty_counts_the_events_asked_for(stories):
    for story in stories:
        _, want, _, _ = ask(story.question, story.events)
        assert story.difficulty == sum(e[:2] == want for e in story.events)
    assert {s.difficulty for s in stories} >= {0, 1, 2, 3}


def test_every_answer_is_as_frequent_as_any_other(toys):
    """So that a model that learns the frequencies alone learns nothing. A goal cannot be reached late in a short video."""
    for category, values in {"temporal": COLOURS, "spatial": ("left", "right", "top", "bottom"), "plot": "0123"}.items():
        answers = Counter(s.answer for s in toys if s.id.startswith(f"toy-{category}-"))
        total = answers.total()
        assert set(answers) == set(values) and total > 4500
        assert all(abs(n / total - 0.25) < 4 * (0.25 * 0.75 / total) ** 0.5 for n in answers.values()), answers
    answers = Counter(s.answer for s in toys if s.id.startswith("toy-goal-"))
    assert set(answers) == set("0123456789") and max(answers.values()) / answers.total() < 0.2


def test_a_reader_who_cannot_see_the_video_stays_near_chance(toys):
    """The best guess from the question's text, the majority answer to that exact question in 12,000 others: about 0.23."""
    known = defaultdict(Counter)
    for s in toys[:12000]:
        known[s.question][s.answer] += 1
    asked = toys[12000:]
    guessed = sum(known[s.question].most_common(1)[0][0] == s.answer for s in asked if s.question in known)
    assert len(asked) == 8000 and guessed / len(asked) < 0.28


def test_nor_does_such_a_reader_read_or_point(films):
    """The best guess from the question: one of four boxes, hardly ever the letters; and no text is nearly right of many."""
    for part, chance in (("reading", 0.06), ("grounding", 0.28)):
        known = defaultdict(Counter)
        for s in films[part][:3000]:
            known[s.question][s.answer] += 1
        asked = films[part][3000:]
        assert sum(known[s.question].most_common(1)[0][0] == s.answer for s in asked) / len(asked) < chance
    answers = [s.answer for s in films["reading"][:400]]
    assert max(np.mean([rewards.verify_ocr(guess, answer) for answer in answers]) for guess in {*answers[:60], "ACEHLOTX", "A"}) < 0.3
