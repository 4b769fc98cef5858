"""
What a question about a video is, where questions come from, and which are held out.

    load           questions from a .jsonl, from LongVideo-Reason's .json, or "toy" and "toy:A,B"
    split          training questions and held-out ones
    taught_text    what the cold start teaches
    open_video     any usual file, folder of pictures or picture, or a built-in video
    fingerprint    the content of a video, whatever its name

    python data.py    draws assets/toy.png, a sheet of built-in videos with their questions,
                      thoughts and answers
"""
import hashlib
import json
import os
import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flow import Sample, Video, VideoError  # noqa: F401  other files find them here
from plumbing import store
from plumbing.formats import read_records, sample_fields
from plumbing.frames import make_video, pick
from plumbing.video import open_file

# --------------------------------------------------------------------------------------------------
# questions

def load(source, video_dir=""):
    """-> list of `Sample`

    source: "toy" or "toy:A,B" (`toy_samples`), a .jsonl of `Sample`, LongVideo-Reason's .json.
    video_dir: where the paths of videos begin; empty: at the folder of the file.
    A sample without an id is named after its place in the file; for one without a domain see
    `guess_domain`. Raises ValueError that names the file, the line and what is wrong with it.
    """
    if source == "toy" or source.startswith("toy:"):
        return toy_samples(source)
    folder = video_dir or os.path.dirname(source)
    samples = []
    places = {}                                            # {id: where it was used}
    for where, record in read_records(source):
        fields = sample_fields(record, where)
        fields.setdefault("id", f"{os.path.basename(source)}-{len(samples)}")
        fields.setdefault("domain", "")
        if not fields["video"].startswith("toy:"):
            fields["video"] = os.path.join(folder, fields["video"])
        sample = Sample(**fields)
        if not sample.domain:
            sample.domain = guess_domain(sample)
        if sample.id in places:
            raise ValueError(f"{where}: id {sample.id!r} was already used at {places[sample.id]}; "
                             "ids must be unique")
        places[sample.id] = where
        samples.append(sample)
    if not samples:
        raise ValueError(f"{source}: no samples in it")
    return samples


def guess_domain(sample):
    """"choice" if the answer is one letter and the question lists options, "count" if it is an
    integer, else "open"."""
    is_letter = re.fullmatch(r"[A-Za-z]", sample.answer)
    lists_options = re.search(r"(^|[\s(])B[).:]\s*\S", sample.question)
    if is_letter and lists_options:
        return "choice"
    if re.fullmatch(r"[+-]?\d+", sample.answer):
        return "count"
    return "open"


def split(samples, fraction=0.05):
    """-> (training samples, held-out samples), of about `fraction` of the videos

    By a hash of the video's name: all questions about a video are on one side, whatever else is in
    the data, and wherever the videos lie.
    """
    training, held_out = [], []
    for sample in samples:
        side = held_out if is_held_out(sample.video, fraction) else training
        side.append(sample)
    return training, held_out


def is_held_out(path, fraction):
    name = os.path.basename(os.path.normpath(path))
    toy = re.match(r"toy:(?:[a-z]+-)?0*(\d+)", path)
    if toy:                                                # toy:long-7 tells the story of toy:7
        name = f"toy:{toy[1]}"
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < fraction * 2 ** 32


def taught_text(sample, think=True):
    """What the cold start teaches: a thought and the answer that it comes to. The thought is empty
    where think is False."""
    thought = sample.thought if think else ""
    answer = sample.taught or sample.answer
    return f"<think>{thought}</think><answer>{answer}</answer>"


# --------------------------------------------------------------------------------------------------
# videos

def open_video(path, frames):
    """-> `Video`, whose pixels are read when asked for

    path: a film, a folder of pictures, a picture, or a built-in "toy:SEED"; frames: how many at
    most, evenly spaced in time. Raises VideoError, which names the file and the cause; ValueError
    for frames below 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = os.fspath(path)
    if path.startswith("toy:"):
        return open_toy(path, frames)
    return open_file(path, frames)


def read_video(path, frames):
    """As `open_video`, all frames at once. -> (uint8 [T,H,W,3], seconds between frames)"""
    video = open_video(path, frames)
    return video.read(0, video.frames), video.seconds


def fingerprint(path, folder=""):
    """A hash of a video's content, whatever its name: of a built-in video its frames, else as
    `plumbing.store.fingerprint`. -> 64 hexadecimal digits. Raises VideoError."""
    path = os.fspath(path)
    if path.startswith("toy:"):
        return toy_fingerprint(path)
    return store.fingerprint(path, folder)


@lru_cache(maxsize=None)
def toy_fingerprint(path):
    video = open_toy(path, 10 ** 9)                        # all of its frames
    return hashlib.sha256(video.read(0, video.frames)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# the built-in videos

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 240), "yellow": (230, 210, 50)}
SHAPES = ["circle", "square", "triangle"]
PLACES = {"left": (8, 16), "right": (20, 16), "top": (14, 11), "bottom": (14, 21)}       # x, y of the centre
CATEGORIES = ["temporal", "goal", "spatial", "plot"]                                     # LongVideo-Reason's four
MORE = ["reading", "grounding", "long"]   # parts by name alone, with videos of their own; long: the four stories as long films
LETTERS = {"A": "  #  / # # /#   #/#####/#   #", "C": " ####/#    /#    /#    / ####", "E": "#####/#    /###  /#    /#####",
           "H": "#   #/#   #/#####/#   #/#   #", "L": "#    /#    /#    /#    /#####", "O": " ### /#   #/#   #/#   #/ ### ",
           "T": "#####/  #  /  #  /  #  /  #  ", "X": "#   #/ # # /  #  / # # /#   #"}
TOYS = 20000                   # how many samples "toy" has
FILM = 256                     # frames of a long film
TRIANGLES, SLIP = 0.6, 2 / 3   # questions that ask for triangles; of these triangles, how many the teacher overlooks


@dataclass
class Story:
    """What happens in one built-in video, a question about it, and two ways to answer: the truth and the teacher's."""
    events: list       # (colour, shape, place)
    letters: str       # beside the events, one each, where the question is about reading; else empty
    lasts: list        # how many frames each event is on screen, half a second a frame
    category: str
    question: str
    answer: str
    domain: str
    thought: str       # the right reasoning
    taught: tuple      # (thought, answer) of the teacher, who overlooks 2 in 3 of the triangles asked for
    difficulty: int    # how many events must be judged right for the answer to be right


def toy_story(name):
    """name: a seed, or one of MORE and a seed, "reading-7". "long-7" is the story of 7, told slowly."""
    kind, _, seed = str(name).rpartition("-")
    rng = random.Random(f"story {seed if kind == 'long' else name}")
    category = kind if kind in ("reading", "grounding") else rng.choice(CATEGORIES)
    n = rng.randint(5, 8 if category == "reading" else 10)                        # letters cost tokens: thoughts stay within 100
    want = rng.choice(list(COLOURS)), "triangle" if rng.random() < TRIANGLES else rng.choice(SHAPES[:2])
    colour, shape = want

    def place(match):
        other = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != want]
        near = [x for x in other if x[0] == colour or x[1] == shape]              # half of the others look alike
        return (*(want if match else rng.choice(near if rng.random() < 0.5 else other)), rng.choice(list(PLACES)))

    # Which events match is drawn so that every answer is as frequent as any other.
    need = None
    if category == "plot":
        matches = rng.sample(range(n), rng.randint(0, 3))
    elif category == "reading":
        matches = rng.sample(range(n), rng.randint(1, 4))
    elif category == "goal":
        need = rng.randint(1, 2)
        done = rng.randint(need - 1, n - 1)
        matches = rng.sample(range(done), need - 1) + [done] + [i for i in range(done + 1, n) if rng.random() < 0.2]
    else:
        matches = rng.sample(range(n - 1), rng.randint(1, 3))                     # something always comes after
    events = [place(i in matches) for i in range(n)]
    if category == "temporal":                                                    # a fair colour after the last match
        last = max(matches)
        c = rng.choice(list(COLOURS))
        events[last + 1] = (c, rng.choice([s for s in SHAPES if (c, s) != want]), events[last + 1][2])
    letters = "".join(rng.choices(list(LETTERS), k=n)) if category == "reading" else ""

    question, domain = {
        "temporal": (f"Which colour comes right after the last {colour} {shape}?", "open"),
        "goal": (f"Someone collects {colour} {shape}s and needs {need}. When is it done?", "count"),
        "spatial": (f"Where is the last {colour} {shape}?", "open"),
        "plot": (f"How many {colour} {shape}s are there?", "count"),
        "reading": (f"What do the letters beside the {colour} {shape}s spell?", "ocr"),
        "grounding": (f"Where is the last {colour} {shape}? Give its box.", "grounding"),
    }[category]

    def reason(overlooked):
        lines, count, state = [], 0, "0" if category in ("plot", "goal") else "none"
        for i, (c, s, p) in enumerate(events):
            match = (c, s) == want and i not in overlooked
            count += match
            if category == "temporal":
                state = "next" if match else c if state == "next" else state
            elif category in ("spatial", "grounding"):
                state = p if match else state
            elif category == "reading":
                p = letters[i]                             # what is read stands in the place's stead
                state = state.replace("none", "") + p if match else state
            else:
                state = str(count)
            same = c == colour                             # what is seen stands beside what is asked; then: the same or not
            lines.append(f"{i} {c} {colour} {'yes' if same else 'no'} " + same * f"{s} {shape} {'yes' if match else 'no'} {p} "
                         + state)
            if category == "goal" and count == need:
                return "\n".join(lines), str(i)
        if category == "goal":
            state = "never"
        if category == "grounding" and state != "none":
            state = toy_box(shape, state)
        return "\n".join(lines), state

    thought, answer = reason(())
    seen = [i for i in matches if not (shape == "triangle" and rng.random() < SLIP)]
    taught = reason([i for i in matches if i not in seen])
    lasts = [2] * n                                        # an event a second, or a film in which some stand and some flit by
    if kind == "long":                                     # even numbers: the tower sees two frames at a time
        more = rng.choices(range(n), [rng.random() ** 4 for _ in events], k=FILM // 2 - n)
        lasts = [2 + 2 * more.count(i) for i in range(n)]
    return Story(events, letters, lasts, category, question, answer, domain, thought, taught, len(matches))


def toy_description(seed, number, progress, parts=CATEGORIES):
    """What the alignment stage teaches the tiny model's eyes: every moment of a video, a line each, its letter last or its place.

    number: which one; progress in [0,1]: the videos grow from one moment to ten over the first half of the stage;
    parts: as of `toy_parts`, their kinds of video equally often. The stories are none that `load` has, so that
    nothing held out is ever seen. -> `Sample`, the text its thought
    """
    seed = TOYS + seed * 10 ** 7 + number
    rng = random.Random(f"moments {seed}")
    n = rng.randint(1, 1 + int(9 * min(1, 2 * progress)))
    name = rng.choice(sorted({f"{part}-" if part in MORE else "" for part in parts})) + str(seed)
    story = toy_story(name)
    lines = [f"{i} {c} {s} {story.letters[i:i + 1] or p}" for i, (c, s, p) in enumerate(story.events[:n])]
    return Sample(f"describe-{seed}", "Describe every moment.", "", "open", f"toy:{name}:{n}", "\n".join(lines))


@lru_cache(maxsize=None)
def toy_mask(shape, place):
    """bool [28, 28]: the pixels of a shape"""
    y, x = np.mgrid[:28, :28]
    dx, dy = x - PLACES[place][0], y - PLACES[place][1]
    return {"circle": abs(dx ** 2 + dy ** 2 - 18) <= 9, "square": np.maximum(abs(dx), abs(dy)) <= 4,
            "triangle": (dy >= -5) & (dy <= 4) & (2 * abs(dx) <= dy + 5)}[shape]


def toy_box(shape, place):
    """"[x1, y1, x2, y2]", the edges of its pixels: x2 and y2 are one past the last pixel, so that x2 - x1 is the width."""
    y, x = np.nonzero(toy_mask(shape, place))
    return str([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])


def toy_frames(name):
    """uint8 [frames, 28, 28, 3]: half a second a frame, on the edges a clock: the event's number, which is its second in all
    but long films. A letter is in the corner that no shape reaches."""
    story, rng = toy_story(name), np.random.default_rng(int(str(name).rpartition("-")[2]))
    frames = np.empty((sum(story.lasts), 28, 28, 3), np.uint8)
    frames[:] = rng.integers(15, 60, 3)
    for t, frame in zip(np.repeat(range(len(story.events)), story.lasts), frames):
        colour, shape, place = story.events[t]
        frame[toy_mask(shape, place)] = np.clip(np.array(COLOURS[colour]) + rng.integers(-25, 26, 3), 0, 255)
        ones, tens = t % 10, t // 10
        frame[:5, 4 + 2 * ones:6 + 2 * ones] = 255         # seconds, along the top
        frame[6 + 2 * tens:8 + 2 * tens, :3] = 255         # tens of seconds, down the left
        if story.letters:
            frame[22:27, 22:27][[[c == "#" for c in row] for row in LETTERS[story.letters[t]].split("/")]] = 255
    return frames


def toy_name(path):
    """"toy:NAME" or "toy:NAME:EVENTS" -> (name for `toy_story`, how many of its first events; None: all)"""
    match = re.fullmatch(rf"toy:((?:(?:{'|'.join(MORE)})-)?)(\d+)(?::0*([1-9]\d*))?", path)
    if not match:
        raise VideoError(f"{path}: a built-in video is toy:SEED or toy:SEED:EVENTS, with whole numbers above 0 for EVENTS; "
                         f"SEED may begin with {', '.join(f'{kind}-' for kind in MORE)}")
    return f"{match[1]}{int(match[2])}", int(match[3]) if match[3] else None


def open_toy(path, frames):
    """"toy:SEED", or "toy:SEED:N" for its first N events; "toy:reading-SEED" and so on likewise."""
    name, events = toy_name(path)
    film = toy_frames(name)[:sum(toy_story(name).lasts[:events])]
    index = pick(range(len(film)), len(film), frames)

    def read(chosen, out):
        out[:] = film[chosen]

    return make_video(path, index, film.shape[1:3], 0.5 * len(film) / len(index), False, read)


def toy_sample(name):
    s, (kind, _, seed) = toy_story(name), str(name).rpartition("-")
    thought, answer = s.taught
    return Sample(f"toy-{'long-' if kind == 'long' else ''}{s.category}-{seed}", s.question, s.answer, s.domain, f"toy:{name}",
                  thought, answer)


def toy_parts(source):
    """["A", "B"] of "toy:A,B", each one of CATEGORIES or MORE; LongVideo-Reason's four of any other data."""
    parts = source[4:].split(",") if source.startswith("toy:") else CATEGORIES
    for part in parts:
        if part not in CATEGORIES + MORE:
            raise ValueError(f"{source}: no built-in questions are called {part!r}; there are: {', '.join(CATEGORIES + MORE)}")
    return list(dict.fromkeys(parts))


def toy_samples(source):
    """Of "toy" the questions in the order of their seeds; of "toy:A,B" those of these parts, so mixed that any stretch has
    as much of each category: long has four, so four times as much as another part."""
    parts = toy_parts(source)
    made = [toy_sample(seed) for seed in range(TOYS)] if {*parts} & {*CATEGORIES} else []
    if source == "toy":
        return made
    groups = [[s for s in made if s.id.startswith(f"toy-{part}-")] if part in CATEGORIES else
              [toy_sample(f"{part}-{seed}") for seed in range(TOYS if part == "long" else TOYS // 4)] for part in parts]
    return [s for _, s in sorted(((i / len(g), s) for g in groups for i, s in enumerate(g)), key=lambda x: x[0])]


def draw_sheet(path, seeds=(41, 49, 48, 27, "reading-859", "grounding-32")):
    """A picture of built-in videos, one a category: every event, the question, the reasoning, what the teacher missed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(seeds), 10, figsize=(14, 3.2 * len(seeds)))
    fig.subplots_adjust(left=0.01, right=0.99, top=1 - 0.2 / len(seeds), bottom=0.36 / len(seeds), hspace=0.95, wspace=0.08)
    for row, seed in zip(axes, seeds):
        story, film = toy_story(seed), toy_frames(seed)[::2]
        last = max((i for i, line in enumerate(story.thought.split("\n")) if line.count(" yes ") == 2), default=-1)
        right, taught = (text.split("\n") for text in (story.thought, story.taught[0]))
        row[0].text(0, 1.14, f"{story.category}: {story.question}   Right: {story.answer}.", fontsize=12, weight="bold",
                    transform=row[0].transAxes)
        row[9].text(1, 1.14, f"The teacher says: {story.taught[1]}", fontsize=12, color="firebrick", ha="right",
                    transform=row[9].transAxes)
        for i, axis in enumerate(row):
            axis.axis("off")
            axis.set_box_aspect(1)
            if i >= len(film):
                continue
            axis.imshow(film[i])
            if story.category == "grounding" and i == last:                       # the box asked for; the model does not see it
                x1, y1, x2, y2 = json.loads(story.answer)
                axis.add_patch(plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ls="--", ec="white"))
            if i >= len(right):                            # a goal is reached: nothing more to think about
                continue
            words = re.sub(r" (yes|no) ", r" \1\n", right[i].replace(" ", "\n", 1))
            axis.text(0, -0.05, words, va="top", fontsize=8, transform=axis.transAxes)
            if " triangle yes " in right[i] and " triangle no " in taught[i]:
                axis.text(0, -0.75, "overlooked", va="top", fontsize=9, color="firebrick", transform=axis.transAxes)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=70)
    plt.close(fig)


if __name__ == "__main__":
    draw_sheet(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy.png"))
    print("assets/toy.png")
