"""python -m pytest tests/test_toy.py -q

The built-in world: its pixels, answers and thoughts are checked by a second implementation that
shares nothing with toy.py but the words of the questions.
"""
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from runs import ended, launched

import data
import model as vlm
import rewards
import toy
from flow import Ranks, Sample, VideoError

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def toys():
    return data.load("toy")


@pytest.fixture(scope="module")
def stories():
    return [toy.make_story(seed) for seed in range(4000)]


@pytest.fixture(scope="module")
def extra_parts():
    """The parts that are loaded by their name alone."""
    return {part: data.load(f"toy:{part}") for part in ("reading", "grounding", "long")}


def seed_of(sample):
    return int(sample.video.split(":")[1].split("-")[-1])


def name_of(sample):
    return sample.video.split(":")[1]


def inside(tag, text):
    """The text between <think> and </think>, or <answer> and </answer>."""
    return re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)[1]


def four_deviations(probability, n):
    """Of the mean of n draws that are 1 with this probability, else 0."""
    return 4 * (probability * (1 - probability) / n) ** 0.5


# --------------------------------------------------------------------------------------------------
# a second pair of eyes

def watch(frames):
    """uint8 [T, 28, 28, 3] -> [(number on the clock, colour, shape, place)], from pixels alone."""
    seen = []
    for frame in frames.astype(int):
        white = (frame == 255).all(2)
        ticks = np.flatnonzero(white[:4, 4:].any(0))          # along the top, two pixels a second
        assert len(ticks) == 2 and ticks[0] % 2 == 0
        figure = (abs(frame - frame[27, 27]).max(2) > 0) & ~white     # all that is not background
        seen.append((int(ticks[0]) // 2, colour_of(frame[figure]), shape_of(figure),
                     place_of(figure)))
    return seen


def colour_of(pixels):
    red, green, blue = pixels.mean(0)
    if min(red, green) > 150:
        return "yellow"
    if red > 150:
        return "red"
    if green > 130:
        return "green"
    assert blue > 180
    return "blue"


def shape_of(figure):
    """By the left corners of the bounding box: which of them the shape fills."""
    y, x = np.nonzero(figure)
    above, below = figure[y.min(), x.min()], figure[y.max(), x.min()]
    if above and below:
        return "square"
    if below:
        return "triangle"
    assert not above
    return "circle"


def place_of(figure):
    y, x = np.nonzero(figure)
    right, down = (x.min() + x.max()) / 2 - 14, (y.min() + y.max()) / 2 - 16
    assert max(abs(right), abs(down)) > 3, "in the middle"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def read_letters(frames):
    """The letters of uint8 [T, 28, 28, 3], known by the white pixels in each of their five rows."""
    known = {(1, 2, 2, 5, 2): "A", (4, 1, 1, 1, 4): "C", (5, 1, 3, 1, 5): "E", (2, 2, 5, 2, 2): "H",
             (1, 1, 1, 1, 5): "L", (3, 2, 2, 2, 3): "O", (5, 1, 1, 1, 1): "T", (2, 2, 1, 2, 2): "X"}
    white = (frames[:, 22:27, 22:27] == 255).all(3)
    return "".join(known[tuple(rows)] for rows in white.sum(2))


def box_in(frame):
    """The edges of what is neither background nor white."""
    y, x = np.nonzero((frame != frame[27, 27]).any(2) & (frame != 255).any(2))
    return f"[{x.min()}, {y.min()}, {x.max() + 1}, {y.max() + 1}]"


def events_of(path):
    """The events of a built-in video as seen on the screen: half a second a frame, one a second."""
    frames, seconds = data.read_video(path, 1000)
    assert seconds == 0.5 and frames.shape[1:] == (28, 28, 3) and frames.dtype == np.uint8
    assert len(frames) % 2 == 0
    seen = watch(frames)
    assert seen[::2] == seen[1::2] and [t for t, *_ in seen[::2]] == list(range(len(frames) // 2))
    return [tuple(event) for _, *event in seen[::2]]


# --------------------------------------------------------------------------------------------------
# a second way to the answers

THING = f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
PATTERNS = {
    "temporal": rf"Which colour comes right after the last {THING}\?",
    "spatial": rf"Where is the last {THING}\?",
    "plot": rf"How many {THING}s are there\?",
    "goal": rf"Someone collects {THING}s and needs (\d)\. When is it done\?",
    "reading": rf"What do the letters beside the {THING}s spell\?",
    "grounding": rf"Where is the last {THING}\? Give its box\.",
}


def numbers_of(wanted, events):
    """Which events have the wanted (colour, shape)."""
    return [i for i, event in enumerate(events) if event[:2] == wanted]


def solve(question, events, letters=""):
    """The answer to a question, from the events (and the letters beside them) alone; a place where
    a box is asked for. -> (category, wanted, needed, answer)"""
    found = {category: re.fullmatch(pattern, question) for category, pattern in PATTERNS.items()}
    [(category, match)] = [item for item in found.items() if item[1]]
    wanted = match[1], match[2]
    numbers = numbers_of(wanted, events)
    if category == "temporal":
        return category, wanted, 0, events[numbers[-1] + 1][0]
    if category in ("spatial", "grounding"):
        return category, wanted, 0, events[numbers[-1]][2]
    if category == "plot":
        return category, wanted, 0, str(len(numbers))
    if category == "reading":
        return category, wanted, 0, "".join(letters[i] for i in numbers)
    needed = int(match[3])
    return category, wanted, needed, str(numbers[needed - 1])


def follow(thought, events, category, wanted, needed, letters=""):
    """Reads a thought line by line and checks each claim. -> (its answer, events it overlooked)

    A line: number, colour seen, colour asked for, the same or not; if so, shape seen, shape asked
    for, the same or not, and the place, or the letter if there is one; then what is known so far.
    One mistake is let through: "no" at an event that is the one asked for.
    """
    count, overlooked = 0, []
    known = "0" if category in ("goal", "plot") else "none"
    lines = thought.split("\n")
    for i, (line, (colour, shape, place)) in enumerate(zip(lines, events)):
        words = line.split(" ")
        expected = [str(i), colour, wanted[0], "yes" if colour == wanted[0] else "no"]
        match = False
        if colour == wanted[0]:
            match = words[6] == "yes"
            right = "yes" if shape == wanted[1] and match else "no"
            expected += [shape, wanted[1], right, letters[i] if letters else place]
            if shape == wanted[1] and not match:
                overlooked.append(i)
        count += match
        if category in ("plot", "goal"):
            known = str(count)
        elif category in ("spatial", "grounding"):
            known = place if match else known
        elif category == "reading" and match:
            known = letters[i] if known == "none" else known + letters[i]
        elif category == "temporal":
            after = colour if known == "next" else known
            known = "next" if match else after
        assert words == expected + [known], line
        if category == "goal" and count == needed:
            assert i == len(lines) - 1, "it thinks on after the goal is reached"
            return str(i), overlooked
    assert len(lines) == len(events)
    return "never" if category == "goal" else known, overlooked


# --------------------------------------------------------------------------------------------------
# pixels

def test_fifty_videos_show_their_stories():
    for seed in range(50):
        assert events_of(f"toy:{seed}") == toy.make_story(seed).events


def test_a_slice_shows_the_first_events_and_a_description_says_all_of_them():
    for seed in range(10):
        whole = events_of(f"toy:{seed}")
        assert 5 <= len(whole) <= 10
        for n in (1, 3, len(whole)):
            assert events_of(f"toy:{seed}:{n}") == whole[:n]
    lengths = {0.0: [], 0.5: [], 1.0: []}
    for progress, seen in lengths.items():
        for number in range(20):
            s = toy.make_description(3, number, progress)
            lines = [line.split() for line in s.thought.split("\n")]
            assert [tuple(line[1:]) for line in lines] == events_of(s.video)
            assert [line[0] for line in lines] == [*map(str, range(len(lines)))]
            seen.append(len(lines))
    assert set(lengths[0.0]) == {1}                           # it begins with one moment
    assert max(lengths[0.5]) > 7 and max(lengths[1.0]) > 7


def test_fewer_frames_than_the_video_has_are_evenly_spaced():
    for seed in range(5):
        whole, _ = data.read_video(f"toy:{seed}", 1000)
        for n in (1, 2, 3, 4, 7, len(whole) - 1, len(whole), len(whole) + 1, 64):
            frames, seconds = data.read_video(f"toy:{seed}", n)
            T = min(n, len(whole))
            assert len(frames) == T and seconds == pytest.approx(len(whole) / 2 / T)
            chosen = [int((i + 0.5) * len(whole) / T) for i in range(T)]
            assert np.array_equal(frames, whole[chosen])
    video = data.open_video("toy:3", 6)
    assert (video.frames, video.height, video.width) == (6, 28, 28)
    assert np.array_equal(video.read(2, 5), data.read_video("toy:3", 6)[0][2:5])


@pytest.mark.parametrize("path", [
    "toy:", "toy:x", "toy:-1", "toy:1.5", "toy:1:", "toy:1:x", "toy:1:2:3", "toy: 1", "toy:1\n",
    "toy:1:0", "toy:reading", "toy:reading-", "toy:reading-x", "toy:plot-1", "toy:long-1:0",
    "toy:long-long-1"])
def test_a_bad_path_of_a_built_in_video_is_named(path):
    with pytest.raises(VideoError) as e:
        data.open_video(path, 4)
    assert path.strip() in str(e.value)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        data.open_video("toy:1", 0)


def test_a_seed_gives_the_same_video_and_question_anywhere(toys):
    """Ranks are processes: they must see the same videos, whatever Python's hash seed is."""
    code = ("import hashlib, toy; "
            "parts = [repr(toy.make_story(s)).encode() + toy.draw_frames(s).tobytes()"
            " for s in range(20)]; "
            "print(hashlib.sha256(b''.join(parts)).hexdigest())")
    digests = set()
    for hash_seed in "12":
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True)
        digests.add(done.stdout)
    assert len(digests) == 1
    assert [toy.make_sample(s) for s in range(50)] == toys[:50]
    assert toy.make_story(5) == toy.make_story(5)
    assert not np.array_equal(toy.draw_frames(5)[:10], toy.draw_frames(6)[:10])


def test_the_four_categories_are_for_ever_what_they_were(toys):
    """Every number in the README was measured on these frames and texts: the digest was computed
    before there were others."""
    digest = hashlib.sha256(repr(toys).encode())
    for seed in range(40):
        s = toy.make_story(seed)
        digest.update(repr((s.events, s.thought, len(s.matches))).encode())
        digest.update(toy.draw_frames(seed).tobytes())
        digest.update(data.read_video(f"toy:{seed}:3", 5)[0].tobytes())
        digest.update(repr(toy.make_description(seed, seed, seed / 40)).encode())
    expected = "222dea837481cf96a8e12053d8188373555786cc1d4a33d33caab05d47411adb"
    assert digest.hexdigest() == expected


def test_the_other_parts_are_for_ever_what_they_were(extra_parts):
    """The same for the parts that came later; computed before toy.py was a file of its own."""
    digest = hashlib.sha256(repr(extra_parts).encode())
    for part in ("reading", "grounding", "long"):
        for seed in range(20):
            digest.update(toy.draw_frames(f"{part}-{seed}").tobytes())
            digest.update(data.read_video(f"toy:{part}-{seed}:3", 5)[0].tobytes())
            digest.update(repr(toy.make_description(seed, seed, seed / 20, [part])).encode())
    expected = "b91bee1aee62090dfa63b58e807edd5b1972c84c3023d77314c362bef2436831"
    assert digest.hexdigest() == expected


def test_no_shape_and_no_clock_comes_near_a_letter():
    met = set()
    for seed in range(60):
        story = toy.make_story(f"reading-{seed}")
        frames, _ = data.read_video(f"toy:reading-{seed}", 100)
        assert read_letters(frames[::2]) == read_letters(frames[1::2]) == story.letters
        assert events_of(f"toy:reading-{seed}") == story.events
        around = frames[:, 22:, 21:]                          # the letter, a pixel at three sides
        white = (around == 255).all(3)
        assert ((around == frames[:, 27:, 27:]).all(3) | white).all(), "a shape"
        white[:, :5, 1:6] = False
        assert not white.any(), "the clock, or a letter that is too large"
        met |= {(*event, letter) for event, letter in zip(story.events, story.letters)}
    assert len({m[1:3] for m in met}) == 12 and len({m[3] for m in met}) == 8
    for kind, seed in itertools.product(("", "grounding-", "long-"), range(10)):
        corner = toy.draw_frames(f"{kind}{seed}")[:, 22:, 21:]
        assert (corner == corner[:, -1:, -1:]).all(), "a letter where none is asked for"


def test_a_slice_and_a_content_of_the_other_videos():
    for kind in ("reading", "grounding"):
        whole, _ = data.read_video(f"toy:{kind}-4", 100)
        assert np.array_equal(data.read_video(f"toy:{kind}-04:3", 100)[0], whole[:6])
    film = toy.draw_frames("long-4")
    clock = [t for t, *_ in watch(film)]
    for n in (1, 3, 9):
        first = film[[t < n for t in clock]]
        assert np.array_equal(data.read_video(f"toy:long-4:{n}", 1000)[0], first)
    names = ("4", "reading-4", "grounding-4", "long-4", "long-54")
    assert len({data.fingerprint(f"toy:{name}") for name in names}) == 5
    assert toy.parse_path("toy:long-007:03") == ("long-7", 3)
    assert toy.parse_path("toy:7") == ("7", None)
    assert toy.make_sample(toy.parse_path("toy:07")[0]) == toy.make_sample(7)


def test_a_long_film_tells_the_same_story_at_an_uneven_pace(toys, extra_parts):
    """256 frames; every event is seen with all of them, and 16 of them pass over some: that is what
    more frames are for."""
    def texts(samples):
        return [(s.question, s.answer, s.thought, s.taught, s.domain) for s in samples]

    uneven, missed, needed = [], 0, 0
    assert texts(extra_parts["long"]) == texts(toys)
    for seed in range(60):
        frames, seconds = data.read_video(f"toy:long-{seed}", 256)
        assert len(frames) == 256 and seconds == 0.5
        runs = [(event, len([*same])) for event, same in itertools.groupby(watch(frames))]
        events, durations = zip(*runs)
        assert [event[1:] for event in events] == toy.make_story(seed).events
        assert [event[0] for event in events] == [*range(len(events))] and min(durations) >= 2
        uneven.append(max(durations) / min(durations))
        few = watch(data.read_video(f"toy:long-{seed}", 16)[0])
        missed += len(set(few)) < len(events)
        question = extra_parts["long"][seed].question
        _, wanted, _, _ = solve(question, toy.make_story(seed).events)
        unseen = set(events) - set(few)
        needed += any(event[1:3] == wanted for event in unseen)
    assert missed > 50 and needed > 20 and np.median(uneven) > 10


def test_a_description_says_what_its_parts_are_about():
    kinds = Counter()
    for number in range(30):
        four = toy.make_description(1, number, 1)
        assert toy.make_description(1, number, 1, ["plot", "spatial"]) == four
        s = toy.make_description(1, number, 1, ["reading"])
        letters = read_letters(data.read_video(s.video, 100)[0][::2])
        assert [line.split() for line in s.thought.split("\n")] == [
            [str(i), colour, shape, letters[i]]
            for i, (colour, shape, _) in enumerate(events_of(s.video))]
        s = toy.make_description(1, number, 1, ["long"])
        frames, _ = data.read_video(s.video, 256)
        seen = [event for event, _ in itertools.groupby(watch(frames))]
        assert s.video.startswith("toy:long-")
        assert s.thought == "\n".join(" ".join(map(str, event)) for event in seen)
        mixed = toy.make_description(1, number, 1, toy.parse_parts("toy:plot,long,reading"))
        kinds[name_of(mixed).rpartition("-")[0]] += 1
    assert set(kinds) == {"", "long", "reading"} and min(kinds.values()) > 4
    four = ["temporal", "goal", "spatial", "plot"]
    assert toy.parse_parts("toy") == toy.parse_parts("a/toy.jsonl") == four


def test_the_alignment_stage_sees_no_story_that_load_has(toys):
    """It trains the vision tower on other built-in videos; were one of them held out, its
    evaluation would be worth nothing."""
    loaded = {seed_of(s) for s in toys}
    assert loaded == set(range(len(toys)))
    runs = []
    numbers = (*range(0, 12000, 37), 99999, 10 ** 6)
    for seed in (0, 1, 2, 50):
        samples = [toy.make_description(seed, number, number / 12000) for number in numbers]
        runs.append({seed_of(s) for s in samples})
        assert len(runs[-1]) == len(samples) == len({s.id for s in samples})
        assert not runs[-1] & loaded
    assert sum(map(len, runs)) == len(set().union(*runs))     # and runs of other seeds see others

    def tales(seeds):
        return {(tuple(s.events), s.question) for s in map(toy.make_story, seeds)}

    assert not tales(range(0, 20000, 4)) & tales(sorted(runs[0]))
    for part in ("reading", "grounding", "long"):
        described = {seed_of(toy.make_description(0, number, 1, [part])) for number in range(100)}
        assert not described & loaded


# --------------------------------------------------------------------------------------------------
# questions, answers, thoughts

def test_parts_of_the_toy_are_loaded_by_name(toys, extra_parts):
    alone = dict(extra_parts)
    for part in ("temporal", "goal", "spatial", "plot"):
        alone[part] = [s for s in toys if s.id.startswith(f"toy-{part}-")]
    assert data.load("toy:plot") == data.load("toy:plot,plot") == alone["plot"]
    all_four = data.load("toy:plot,goal,spatial,temporal")
    assert sorted(s.id for s in all_four) == sorted(s.id for s in toys)
    for parts in (("temporal", "reading"), ("reading", "plot", "grounding"), ("grounding", "long")):
        samples = data.load(f"toy:{','.join(parts)}")
        assert len({s.id for s in samples}) == len(samples) == sum(len(alone[p]) for p in parts)
        for part in parts:                                    # all of each, in its own order
            assert [s for s in samples if s.id.startswith(f"toy-{part}-")] == alone[part]
        held_out = data.split(samples)[1]
        first = Counter(s.id.rsplit("-", 1)[0] for s in held_out[:256])
        assert len(first) == len(parts) + 3 * ("long" in parts)
        assert min(first.values()) > 0.7 * first.total() / len(first)
    shown = {part: (len(s), s[17].id, s[17].video) for part, s in extra_parts.items()}
    assert shown == {
        "reading": (5000, "toy-reading-17", "toy:reading-17"),
        "grounding": (5000, "toy-grounding-17", "toy:grounding-17"),
        "long": (20000, f"toy-long-{toy.make_story(17).category}-17", "toy:long-17")}


@pytest.mark.parametrize("source, wrong", [
    ("toy:pilot", "'pilot'"), ("toy:", "''"), ("toy:plot,", "''"), ("toy:plot, long", "' long'")])
def test_an_unknown_part_is_named_with_those_there_are(source, wrong):
    with pytest.raises(ValueError) as e:
        data.load(source)
    assert wrong in str(e.value)
    assert "temporal, goal, spatial, plot, reading, grounding, long" in str(e.value)


def test_reading_and_grounding_follow_from_what_is_on_the_screen(extra_parts):
    """The answer from pixels; the thought and the teacher's as in the other categories."""
    matches, wrong = {"reading": Counter(), "grounding": Counter()}, Counter()
    for s in extra_parts["reading"][:150] + extra_parts["grounding"][:150]:
        frames, events = data.read_video(s.video, 100)[0][::2], events_of(s.video)
        letters = read_letters(frames) if "spell" in s.question else ""
        category, wanted, needed, answer = solve(s.question, events, letters)
        boxes = {event[2]: box_in(frame) for event, frame in zip(events, frames)
                 if event[:2] == wanted}
        boxes["none"] = "none"
        if category == "grounding":
            answer = boxes[answer]
        story = toy.make_story(name_of(s))
        domain = {"reading": "ocr", "grounding": "grounding"}[category]
        assert (s.answer, category, s.domain) == (answer, story.category, domain)
        for thought, stated in ((story.thought, story.answer),
                                (story.teacher_thought, story.teacher_answer)):
            reached, overlooked = follow(thought, events, category, wanted, needed, letters)
            assert stated == (boxes[reached] if category == "grounding" else reached)
            if overlooked:
                assert wanted[1] == "triangle" and thought == s.thought != story.thought
        right = data.taught_text(replace(s, taught=""))
        assert rewards.score(right, s.answer, s.domain).total == 1
        taught = rewards.score(data.taught_text(s), s.answer, s.domain)
        assert (taught.accuracy == 1) == (s.taught == s.answer)
        assert sorted(story.matches) == numbers_of(wanted, events)
        matches[category][len(story.matches)] += 1
        wrong[category] += s.taught != s.answer
    assert sorted(matches["reading"]) == [1, 2, 3, 4]
    assert sorted(matches["grounding"]) == [1, 2, 3]
    assert all(0.2 < n / 150 < 0.7 for n in wrong.values())   # enough wrong for RL to mend


def test_only_the_box_of_the_right_place_is_right():
    """The box fits the drawn shape tightly: x2 - x1 pixels wide, and no two places' boxes overlap
    by half."""
    for shape, place in itertools.product(SHAPES, PLACES):
        name = next(n for n in range(1000) if toy.make_story(n).events[0][1:] == (shape, place))
        right = toy.box(shape, place)
        assert right == box_in(toy.draw_frames(name)[0])
        assert rewards.verify_grounding(right, right) == 1
        for other, elsewhere in itertools.product(SHAPES, {*PLACES} - {place}):
            assert rewards.verify_grounding(toy.box(other, elsewhere), right) == 0
        assert rewards.verify_grounding("none", right) == 0


def test_the_answer_follows_from_what_is_on_the_screen():
    met = Counter()
    for seed in range(60):
        s = toy.make_sample(seed)
        category, *_, answer = solve(s.question, events_of(s.video))
        assert s.answer == answer and category in s.id
        met[category] += 1
    assert len(met) == 4 and min(met.values()) > 5


def test_the_right_thought_derives_the_right_answer(stories):
    for story in stories:
        category, wanted, needed, answer = solve(story.question, story.events)
        assert (category, answer) == (story.category, story.answer)
        followed = follow(story.thought, story.events, category, wanted, needed)
        assert followed == (answer, [])
        assert story.domain == ("count" if category in ("plot", "goal") else "open")


def test_the_teacher_errs_only_by_overlooking_wanted_triangles(stories):
    """Two in three of them; and its answer is what its own thought comes to, so that it teaches to
    think, not to guess.

    Counted where every event is judged (a goal ends the thought early), 4 standard deviations of a
    binomial allowed.
    """
    shown, missed, right = 0, 0, Counter()
    for story in stories:
        category, wanted, needed, answer = solve(story.question, story.events)
        thought, taught = story.teacher_thought, story.teacher_answer
        concluded, overlooked = follow(thought, story.events, category, wanted, needed)
        assert concluded == taught
        triangle = wanted[1] == "triangle"
        if overlooked:
            assert triangle
            assert set(overlooked) <= set(story.overlooked)
        else:
            assert (thought, taught) == (story.thought, story.answer)
        right[triangle, taught == answer] += 1
        if triangle and category != "goal":
            assert overlooked == sorted(story.overlooked)
            shown += sum(event[:2] == wanted for event in story.events)
            missed += len(overlooked)
    assert shown > 2000 and abs(missed / shown - 2 / 3) < four_deviations(2 / 3, shown)
    triangles = right[True, True] + right[True, False]        # questions about triangles
    assert abs(triangles / len(stories) - 0.6) < four_deviations(0.6, len(stories))
    assert right[False, False] == 0
    assert 0.2 < right[True, True] / triangles < 0.7          # enough wrong for RL to mend


def test_a_sample_carries_the_truth_to_verify_and_the_teacher_to_imitate(toys, stories):
    differ = 0
    for s, story in zip(toys, stories):
        assert (s.answer, s.domain, s.question) == (story.answer, story.domain, story.question)
        assert (s.thought, s.taught) == (story.teacher_thought, story.teacher_answer)
        text = data.taught_text(s)
        assert rewards.well_formed(text)
        assert inside("think", text) == s.thought and inside("answer", text) == s.taught
        reward = rewards.score(text, s.answer, s.domain)
        assert (reward.accuracy, reward.format) == (float(s.taught == s.answer), 1.0)
        differ += s.taught != s.answer
    assert 0.2 < differ / len(stories) < 0.5
    plain = Sample("x", "Q?", "7", "count", "a.mp4", "It is 7.")   # a thought that is right
    assert rewards.well_formed(data.taught_text(plain))
    assert inside("answer", data.taught_text(plain)) == "7"
    assert len({s.id for s in toys}) == len(toys)


def test_matches_are_the_events_asked_for(stories):
    for story in stories:
        _, wanted, _, _ = solve(story.question, story.events)
        assert sorted(story.matches) == numbers_of(wanted, story.events)
    assert {len(s.matches) for s in stories} >= {0, 1, 2, 3}


def test_every_answer_is_as_frequent_as_any_other(toys):
    """So that a model that learns the frequencies alone learns nothing. A goal cannot be reached
    late in a short video."""
    for category, values in {"temporal": COLOURS, "spatial": PLACES, "plot": "0123"}.items():
        answers = Counter(s.answer for s in toys if s.id.startswith(f"toy-{category}-"))
        total = answers.total()
        assert set(answers) == set(values) and total > 4500
        for n in answers.values():
            assert abs(n / total - 0.25) < four_deviations(0.25, total), answers
    answers = Counter(s.answer for s in toys if s.id.startswith("toy-goal-"))
    assert set(answers) == set("0123456789")
    assert max(answers.values()) / answers.total() < 0.2


def blind_accuracy(known, asked):
    """The best guess from the question's text: the majority answer to it in `known`."""
    answers = defaultdict(Counter)
    for s in known:
        answers[s.question][s.answer] += 1
    right = 0
    for s in asked:
        if s.question in answers:
            right += answers[s.question].most_common(1)[0][0] == s.answer
    return right / len(asked)


def test_a_reader_who_cannot_see_the_video_stays_near_chance(toys):
    """About 0.23."""
    assert len(toys[12000:]) == 8000 and blind_accuracy(toys[:12000], toys[12000:]) < 0.28


def test_nor_does_such_a_reader_read_or_point(extra_parts):
    """The best guess from the question: one of four boxes, hardly ever the letters; and no text is
    nearly right of many."""
    for part, chance in (("reading", 0.06), ("grounding", 0.28)):
        assert blind_accuracy(extra_parts[part][:3000], extra_parts[part][3000:]) < chance
    answers = [s.answer for s in extra_parts["reading"][:400]]
    for guess in {*answers[:60], "ACEHLOTX", "A"}:
        assert np.mean([rewards.verify_ocr(guess, answer) for answer in answers]) < 0.3


# --------------------------------------------------------------------------------------------------
# the sheet

def test_the_command_draws_the_sheet_of_the_readme(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "toy.py"), "--out=sheet.png"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as new, \
            Image.open(os.path.join(ROOT, "assets", "toy.png")) as old:
        assert new.size == old.size


def test_help_and_a_wrong_option_draw_nothing(tmp_path):
    """`python data.py --help` drew the picture into the repo."""
    def draw(argument):
        return ended(launched(argument, script=os.path.join(ROOT, "toy.py"), world=0, cwd=tmp_path))

    shown = draw("--help")
    assert shown.code == 0 and "--out" in shown.out
    refused = draw("--uot=sheet.png")
    assert refused.code == 1
    assert refused.err.strip().startswith("toy.py: unknown option 'uot'")
    nowhere = draw("--out=missing/sheet.png")
    assert nowhere.code == 1 and nowhere.err.strip().startswith("toy.py: ")
    assert "Traceback" not in nowhere.err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("readable", [True, False])
def test_the_towers_backward_runs_when_it_is_called(readable):
    """The loss alone stops at the vision tokens; `TowerBatch.backward` goes on to the weights. It
    does nothing where every video was dropped."""
    model, tokenizer = vlm.load("tiny")
    run = SimpleNamespace(model=model, tokenizer=tokenizer, ranks=Ranks(),
                          config=SimpleNamespace(frames=4))
    samples = [toy.make_sample(seed) for seed in (1, 2)]
    if not readable:
        samples = [replace(sample, video="toy:x") for sample in samples]
    batch = toy.encode_with_gradient(run, samples, toy.open_video)
    assert len(batch.prompts) == 2 * readable and len(batch.dropped) == 2 * (not readable)
    for _, prompt in batch.prompts:
        prompt.vision.square().sum().backward()
    weights = list(model.model.visual.parameters())
    assert all(weight.grad is None for weight in weights)
    batch.backward()
    assert any(weight.grad is not None for weight in weights) == readable
