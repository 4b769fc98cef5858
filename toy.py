"""
The built-in world: short films drawn from a seed, questions about them, and a teacher who makes
mistakes.

A film shows 5 to 10 events, one per second: a circle, square or triangle in one of four colours at
one of four places. A question asks about the events of one colour and shape. Many others look
alike, and all answers are about equally frequent: a model that does not watch can only guess.

A thought goes through the events in order and notes the answer so far. Each film has two. One is
right and leads to the gold answer; the other is that of the teacher, who overlooks two in three of
the triangles asked for. The cold start imitates the teacher. The model learns to reason, because
the teacher's answer follows from its thought, but also to overlook triangles. More imitation cannot
fix that. Only a verified reward can, because it compares with the gold answer.

    python toy.py --out=assets/toy.png    draws films with their questions, thoughts and answers
"""
import hashlib
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import model as vlm
from flow import Sample, VideoError
from plumbing.command_line import parse
from plumbing.frames import make_video, pick
from plumbing.optimizer import falling, update, warmed_up
from plumbing.ranks import run_command

CATEGORIES = ["temporal", "goal", "spatial", "plot"]   # LongVideo-Reason's four: the data "toy"
EXTRA_PARTS = ["reading", "grounding", "long"]         # loaded only by name: "toy:reading,long"
SAMPLES = 20000                # how many questions "toy" has
LONG_FRAMES = 256              # frames of a "long" film, which tells a story of the four slowly
TRIANGLE_QUESTIONS = 0.6       # fraction of the questions that ask for triangles
OVERLOOKED = 2 / 3             # fraction of these triangles that the teacher overlooks

COLOURS = dict(red=(220, 40, 40), green=(40, 190, 60), blue=(60, 90, 240), yellow=(230, 210, 50))
SHAPES = ["circle", "square", "triangle"]
PLACES = {"left": (8, 16), "right": (20, 16), "top": (14, 11), "bottom": (14, 21)}  # x, y of centre
LETTERS = {"A": "  #  / # # /#   #/#####/#   #", "C": " ####/#    /#    /#    / ####",
           "E": "#####/#    /###  /#    /#####", "H": "#   #/#   #/#####/#   #/#   #",
           "L": "#    /#    /#    /#    /#####", "O": " ### /#   #/#   #/#   #/ ### ",
           "T": "#####/  #  /  #  /  #  /  #  ", "X": "#   #/ # # /  #  / # # /#   #"}
QUESTIONS = {                  # category: (text, the domain, which picks the verifier)
    "temporal": ("Which colour comes right after the last {colour} {shape}?", "open"),
    "goal": ("Someone collects {colour} {shape}s and needs {needed}. When is it done?", "count"),
    "spatial": ("Where is the last {colour} {shape}?", "open"),
    "plot": ("How many {colour} {shape}s are there?", "count"),
    "reading": ("What do the letters beside the {colour} {shape}s spell?", "ocr"),
    "grounding": ("Where is the last {colour} {shape}? Give its box.", "grounding")}


@dataclass
class Story:
    """What happens in one film, a question about it, and two ways to answer it."""
    category: str
    colour: str            # the question asks for the events of this colour ...
    shape: str             # ... and this shape
    needed: int            # how many of them complete the goal; 0 in other categories
    events: list           # (colour, shape, place)
    letters: str           # one beside each event for "reading", else ""
    durations: list        # frames that each event is on screen, half a second each
    matches: list          # numbers of the events that the question asks for
    overlooked: list       # those of them that the teacher overlooks
    question: str = ""
    domain: str = ""
    thought: str = ""      # the right reasoning
    answer: str = ""       # the gold answer
    teacher_thought: str = ""
    teacher_answer: str = ""


def make_story(name):
    """-> `Story`. name: a seed, or "reading-7", "grounding-7", "long-7": the story of 7, slowly."""
    kind, _, seed = str(name).rpartition("-")
    rng = random.Random(f"story {seed if kind == 'long' else name}")   # keep the order of draws
    category = kind if kind in ("reading", "grounding") else rng.choice(CATEGORIES)
    length = rng.randint(5, 8 if category == "reading" else 10)  # letters make a thought longer
    colour = rng.choice(list(COLOURS))
    shape = "triangle" if rng.random() < TRIANGLE_QUESTIONS else rng.choice(["circle", "square"])
    needed = rng.randint(1, 2) if category == "goal" else 0
    matches = draw_matches(rng, category, needed, length)
    events = draw_events(rng, category, (colour, shape), matches, length)
    letters = "".join(rng.choices(list(LETTERS), k=length)) if category == "reading" else ""
    overlooked = []
    if shape == "triangle":                        # the teacher's mistake
        overlooked = [i for i in matches if rng.random() < OVERLOOKED]
    durations = [2] * length                       # one second each
    if kind == "long":                             # most events are short, a few are very long
        weights = [rng.random() ** 4 for _ in events]
        extra = rng.choices(range(length), weights, k=LONG_FRAMES // 2 - length)
        durations = [2 + 2 * extra.count(i) for i in range(length)]

    story = Story(category, colour, shape, needed, events, letters, durations, matches, overlooked)
    text, story.domain = QUESTIONS[category]
    story.question = text.format(colour=colour, shape=shape, needed=needed)
    story.thought, story.answer = reason(story, overlooked=[])
    story.teacher_thought, story.teacher_answer = reason(story, overlooked)
    return story


def draw_matches(rng, category, needed, length):
    """Numbers of the events asked for, drawn so that all answers are about equally frequent."""
    if category in ("plot", "reading"):
        count = rng.randint(0, 3) if category == "plot" else rng.randint(1, 4)
        return rng.sample(range(length), count)
    if category == "goal":
        done = rng.randint(needed - 1, length - 1)
        before = rng.sample(range(done), needed - 1)
        after = [i for i in range(done + 1, length) if rng.random() < 0.2]
        return [*before, done, *after]
    return rng.sample(range(length - 1), rng.randint(1, 3))     # something always comes after


def draw_events(rng, category, wanted, matches, length):
    """-> [(colour, shape, place)]. wanted: the (colour, shape) of the events in `matches`."""
    others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != wanted]
    look_alikes = [(c, s) for c, s in others if c == wanted[0] or s == wanted[1]]
    events = []
    for i in range(length):
        thing = wanted
        if i not in matches:
            thing = rng.choice(look_alikes if rng.random() < 0.5 else others)
        events.append((*thing, rng.choice(list(PLACES))))
    if category == "temporal":                     # the answer is any colour, equally often
        after = max(matches) + 1
        colour = rng.choice(list(COLOURS))
        shape = rng.choice([s for s in SHAPES if (colour, s) != wanted])
        events[after] = (colour, shape, events[after][2])
    return events


def reason(story, overlooked):
    """Goes through the events without recognising those overlooked. -> (thought, answer)"""
    known = "0" if story.category in ("plot", "goal") else "none"
    lines = []
    for i, (colour, shape, place) in enumerate(story.events):
        same_colour = colour == story.colour
        match = same_colour and shape == story.shape and i not in overlooked
        detail = story.letters[i] if story.letters else place
        known = revise(known, story.category, match, colour, detail)
        # "3 red red yes square triangle no left none": what is seen beside what is asked for, same
        # or not; the shape only if the colour is right; then the answer so far.
        words = [str(i), colour, story.colour, "yes" if same_colour else "no"]
        if same_colour:
            words += [shape, story.shape, "yes" if match else "no", detail]
        lines.append(" ".join([*words, known]))
        if story.category == "goal" and known == str(story.needed):
            return "\n".join(lines), str(i)        # the goal is reached
    if story.category == "goal":
        known = "never"
    elif story.category == "grounding" and known != "none":
        known = box(story.shape, known)
    return "\n".join(lines), known


def revise(known, category, match, colour, detail):
    """The answer so far, after one more event. detail: its letter, or else its place."""
    if category in ("plot", "goal"):
        return str(int(known) + match)
    if not match:
        return colour if known == "next" else known
    if category == "temporal":
        return "next"                              # the next event's colour is the answer
    if category == "reading" and known != "none":
        return known + detail
    return detail


@lru_cache(maxsize=None)
def mask(shape, place):
    """bool [28, 28]: the pixels of a shape."""
    y, x = np.mgrid[:28, :28]
    dx, dy = x - PLACES[place][0], y - PLACES[place][1]
    return {"circle": abs(dx ** 2 + dy ** 2 - 18) <= 9,             # a ring
            "square": np.maximum(abs(dx), abs(dy)) <= 4,
            "triangle": (dy >= -5) & (dy <= 4) & (2 * abs(dx) <= dy + 5)}[shape]


def box(shape, place):
    """"[x1, y1, x2, y2]", the edges of a shape: x2 and y2 are one past its last pixel."""
    y, x = np.nonzero(mask(shape, place))
    return str([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])


def draw_frames(name):
    """uint8 [T, 28, 28, 3], half a second per frame. White ticks show the number of the event."""
    story = make_story(name)
    rng = np.random.default_rng(int(str(name).rpartition("-")[2]))
    numbers = np.repeat(range(len(story.events)), story.durations)    # [T] the event of each frame
    film = np.full((len(numbers), 28, 28, 3), rng.integers(15, 60, 3), np.uint8)  # one background
    for frame, number in zip(film, numbers):
        colour, shape, place = story.events[number]
        shade = np.array(COLOURS[colour]) + rng.integers(-25, 26, 3)  # another one in each frame
        frame[mask(shape, place)] = np.clip(shade, 0, 255)
        ones, tens = number % 10, number // 10
        frame[:5, 4 + 2 * ones:6 + 2 * ones] = 255                    # along the top
        frame[6 + 2 * tens:8 + 2 * tens, :3] = 255                    # down the left
        if story.letters:                          # in the corner that no shape reaches
            rows = LETTERS[story.letters[number]].split("/")
            frame[22:27, 22:27][np.array([list(row) for row in rows]) == "#"] = 255
    return film


def parse_path(path):
    """"toy:NAME" or "toy:NAME:EVENTS" -> (name, how many of its first events; None: all)."""
    match = re.fullmatch(rf"toy:((?:(?:{'|'.join(EXTRA_PARTS)})-)?)(\d+)(?::0*([1-9]\d*))?", path)
    if not match:
        raise VideoError(
            f"{path}: a built-in video is toy:SEED or toy:SEED:EVENTS, with whole numbers above 0 "
            f"for EVENTS; SEED may begin with {'-, '.join(EXTRA_PARTS)}-")
    kind, seed, events = match.groups()
    return f"{kind}{int(seed)}", int(events) if events else None


def open_video(path, frames):
    """-> `Video` of at most `frames` frames. Raises VideoError for a path that is not built in."""
    name, events = parse_path(path)
    film = draw_frames(name)[:sum(make_story(name).durations[:events])]
    chosen = pick(range(len(film)), len(film), frames)

    def read(numbers, out):
        out[:] = film[numbers]
    return make_video(path, chosen, (28, 28), 0.5 * len(film) / len(chosen), False, read)


@lru_cache(maxsize=None)
def fingerprint(path):
    """64 hexadecimal digits, a hash of all its frames. Raises VideoError as `open_video` does."""
    video = open_video(path, 10 ** 9)
    return hashlib.sha256(video.read(0, video.frames)).hexdigest()


def make_sample(name):
    """-> `Sample`: the gold answer to verify with, the teacher's thought and answer to imitate."""
    story = make_story(name)
    kind, _, seed = str(name).rpartition("-")
    part = f"long-{story.category}" if kind == "long" else story.category
    return Sample(f"toy-{part}-{seed}", story.question, story.answer, story.domain, f"toy:{name}",
                  story.teacher_thought, story.teacher_answer)


def parse_parts(source):
    """"toy:A,B" -> ["A", "B"]; any other data -> LongVideo-Reason's four categories."""
    parts = source.removeprefix("toy:").split(",") if source.startswith("toy:") else CATEGORIES
    for part in parts:
        if part not in CATEGORIES + EXTRA_PARTS:
            raise ValueError(f"{source}: no built-in questions are called {part!r}; there are: "
                             + ", ".join(CATEGORIES + EXTRA_PARTS))
    return list(dict.fromkeys(parts))


def load(source):
    """-> list of `Sample`: of "toy" in the order of their seeds, of "toy:A,B" these parts, evenly
    mixed. "long" has all four categories, so it is four times as large as another part."""
    parts = parse_parts(source)
    seeds = range(SAMPLES) if set(parts) & set(CATEGORIES) else []
    samples = [make_sample(seed) for seed in seeds]
    if source == "toy":
        return samples
    mixed = []                                     # (position in [0, 1), sample)
    for part in parts:
        group = [sample for sample in samples if sample.id.startswith(f"toy-{part}-")]
        if part in EXTRA_PARTS:
            size = SAMPLES if part == "long" else SAMPLES // 4
            group = [make_sample(f"{part}-{seed}") for seed in range(size)]
        mixed += [(i / len(group), sample) for i, sample in enumerate(group)]
    mixed.sort(key=lambda pair: pair[0])
    return [sample for _, sample in mixed]


def make_description(seed, number, progress, parts=CATEGORIES):
    """-> `Sample` of the alignment stage: a description of a film's events, to learn to see from.

    progress in [0, 1]: films grow from one event to ten over the first half of the stage; parts:
    of `parse_parts`, equally frequent. No film is one that `load` has: held out stays unseen.
    """
    seed = SAMPLES + seed * 10 ** 7 + number
    rng = random.Random(f"moments {seed}")
    length = rng.randint(1, 1 + int(9 * min(1, 2 * progress)))
    kinds = {f"{part}-" if part in EXTRA_PARTS else "" for part in parts}
    name = rng.choice(sorted(kinds)) + str(seed)
    story = make_story(name)
    lines = []
    for i, (colour, shape, place) in enumerate(story.events[:length]):
        lines.append(f"{i} {colour} {shape} {story.letters[i] if story.letters else place}")
    return Sample(f"describe-{seed}", "Describe every moment.", "", "open", f"toy:{name}:{length}",
                  "\n".join(lines))


# --------------------------------------------------------------------------------------------------
# how the tiny model learns to see

def align(run, stage, teach, parts):
    """Next-token loss on descriptions of every event, from which the randomly initialised vision
    tower learns to see. The videos grow longer while it learns.

    teach(run, prompts, texts) does forward and backward, -> the loss; parts: of `parse_parts`.
    """
    c, ranks = run.config, run.ranks
    for step in stage:
        start_time = time.perf_counter()
        first = step * c.sft_batch
        samples = [make_description(c.seed, first + i, step / c.align_steps, parts)
                   for i in range(c.sft_batch)]
        batch = encode_with_gradient(run, samples[ranks.rank::ranks.world], open_video)
        loss = teach(run, batch.prompts, [sample.thought for sample, _ in batch.prompts])
        batch.backward()
        lr = c.sft_lr * warmed_up(step, c.warmup) * falling(step, c.align_steps)
        norm = update(run.model, stage.optimizer, lr, ranks)
        stage.log(step, f"loss {loss:.3f}", loss=loss, grad_norm=norm,
                  skipped=stage.count_skipped(norm), dropped=0,
                  train_s=time.perf_counter() - start_time)
        stage.save_if_due(step)


@dataclass
class TowerBatch:
    """Prompts while the tower itself trains. All hang on one graph of the tower, so their vision
    tokens are leaves: there the gradients of all micro-batches add up."""
    prompts: list          # [(`Sample`, `Prompt`)]
    dropped: dict          # {id of a sample: why}
    outputs: tuple = ()    # [V, D] of each prompt, with the tower's graph

    def backward(self):
        """From the leaves on through the tower; call it once, after the prompts' own backward."""
        if self.outputs:
            torch.autograd.backward(self.outputs, [x.vision.grad for _, x in self.prompts])


def encode_with_gradient(run, samples, open_video):
    """-> `TowerBatch` of this rank's samples: in one call, nothing shared, nothing kept"""
    model, tower = run.model, run.model.model.visual
    videos, dropped = [], {}
    for sample in samples:
        try:
            video = open_video(sample.video, run.config.frames)
            patches, grid = vlm.patchify(video.read(0, video.frames), model.pixels)
            videos.append((sample, video.seconds, patches, grid))
        except VideoError as e:
            dropped[sample.id] = str(e)
    if not videos:
        return TowerBatch([], dropped)
    patches = torch.cat([x for _, _, x, _ in videos]).to(run.ranks.device, tower.dtype)
    grids = torch.tensor([grid for *_, grid in videos], device=patches.device)
    sizes = [math.prod(grid) // model.pixels.merge ** 2 for *_, grid in videos]
    outputs = tower(patches, grid_thw=grids).pooler_output.split(sizes)        # a [V, D] each
    prompts = []
    for (sample, seconds, _, grid), output in zip(videos, outputs):
        leaf = output.detach().requires_grad_()
        prompt = vlm.make_prompt(model, run.tokenizer, sample.question, leaf, grid, seconds)
        prompts.append((sample, prompt))
    return TowerBatch(prompts, dropped, outputs)


@dataclass
class Options:
    out: str = "toy.png"   # where the picture is written


def draw_sheet(path, names=(41, 49, 48, 27, "reading-859", "grounding-32")):
    """Draw one film of each category, with its question, thought and answers."""
    from matplotlib import figure, patches
    rows = len(names)
    sheet = figure.Figure(figsize=(14, 3.2 * rows))
    axes = sheet.subplots(rows, 10, subplot_kw={"box_aspect": 1})
    sheet.subplots_adjust(0.01, 0.36 / rows, 0.99, 1 - 0.2 / rows, wspace=0.08, hspace=0.95)
    for axis in axes.flat:
        axis.axis("off")
    for row, name in zip(axes, names):
        story = make_story(name)
        question = f"{story.category}: {story.question}   Right: {story.answer}."
        teacher = f"The teacher says: {story.teacher_answer}"
        row[0].annotate(question, (0, 1.14), xycoords="axes fraction", fontsize=12, weight="bold")
        row[9].annotate(teacher, (1, 1.14), xycoords="axes fraction", fontsize=12, ha="right",
                        color="firebrick")
        for axis, frame in zip(row, draw_frames(name)[::2]):
            axis.imshow(frame)
        for i, line in enumerate(story.thought.split("\n")):
            words = re.sub(r" (yes|no) ", r" \1\n", line.replace(" ", "\n", 1))
            row[i].annotate(words, (0, -0.05), xycoords="axes fraction", fontsize=8, va="top")
            if i in story.overlooked:
                row[i].annotate("overlooked", (0, -0.75), xycoords="axes fraction", fontsize=9,
                                va="top", color="firebrick")
        if story.category == "grounding":          # the box asked for, which the model does not see
            x1, y1, x2, y2 = map(int, re.findall(r"\d+", story.answer))
            row[max(story.matches)].add_patch(patches.Rectangle(
                (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ls="--", ec="white"))
    sheet.savefig(path, dpi=70)


if __name__ == "__main__":
    run_command("toy.py", lambda: draw_sheet(parse(Options, __doc__, sys.argv[1:]).out))
