"""
rollouts.jsonl: what happened in an RL step, for people to look at. docs/metrics.md describes a
line. It has no times, so that the file of a run that resumes is that of a run never stopped.
"""
import json
import math
import os
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
from PIL import Image
from tokenizers.decoders import DecodeStream

from flow import VideoError
from plumbing.batches import split
from plumbing.ranks import gather

MOST_STEPS = 48        # lines in the file
MOST_BYTES = 8 << 20   # of the file
MOST_TOKENS = 512      # of a completion; of a longer one those in the middle are left out
MOST_PICTURES = 16     # frames in a strip
HEIGHT, WIDTH = 112, 200   # of a picture in a strip, at most, in pixels
MOST_STRIP = 20 << 10  # bytes of a strip before they become text


# --------------------------------------------------------------------------------------------------
# which steps, and the file

def is_kept(step, steps):
    """Whether the file has a line for this step, counted from 1, of `steps` in all.

    The steps are those that a power of two divides, the first and the last. So a run that is given
    more steps needs no line that it does not have.
    """
    stride = 1
    while steps // stride > MOST_STEPS - 2:
        stride *= 2
    return step % stride == 0 or step in (1, steps)


def cut_back(path, done, steps):
    """Remove the lines of steps after `done`, which will be written again, and those of steps that
    a run of `steps` steps does not keep. A file without lines is removed. Raises ValueError that
    names the file if it holds anything else."""
    if not os.path.exists(path):
        return
    kept = []
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        for line in lines:
            if line.endswith("\n"):        # a killed run leaves half a line
                step = json.loads(line)["step"]
                if step <= done and is_kept(step, max(done, steps)):
                    kept.append(line)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not every line is one that a run writes ({e!r}); move the file "
                         "away: a run goes on without it") from e
    if not kept:
        os.remove(path)
    elif len(kept) < len(lines):
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(f"{path}.tmp", path)


# --------------------------------------------------------------------------------------------------
# one step

class Recording:
    """Collects the line of one step. All ranks make the same calls, and rank 0 writes. In a step
    that is not kept the calls do nothing."""

    def __init__(self, run, curriculum, path, step, drawn):
        """step: from 0; drawn: the `Sample`s of the step."""
        self.run, self.curriculum, self.path = run, curriculum, path
        self.step, self.drawn = step + 1, drawn
        self.active = is_kept(self.step, run.config.rl_steps)
        self.chosen = []       # slots of the groups that are shown whole
        self.trained = {}      # {slot: (log-probs, entropy) of each completion trained on here}
        if self.active and run.ranks.rank == 0:
            used = [id for id in curriculum.ids if id not in curriculum.dropped]
            tiers = Counter(map(curriculum.tier, used))
            self.tiers = [tiers[tier] for tier in range(5)]
            self.before = self.estimates()

    def estimates(self):
        """(pass rate, tier) of each sample of the step, as the curriculum estimates them now."""
        return [(self.curriculum.rate(sample.id), self.curriculum.tier(sample.id))
                for sample in self.drawn]

    def choose(self, groups, facts, kept, ungraded, open_video):
        """Say what became of each group, and choose those that are shown whole.

        groups: this rank's; facts: {slot: a dict for each completion} of all graded groups; kept:
        slots that are trained on; ungraded: {id: why}. All but groups are equal on all ranks.
        open_video(path, frames) -> `Video`
        """
        if not self.active:
            return
        self.facts, self.ungraded = facts, ungraded
        self.fates = {}
        for slot in sorted(facts):
            if slot in kept:
                self.fates[slot] = "kept"
            elif len({x["accuracy"] for x in facts[slot]}) == 1:
                self.fates[slot] = "no signal"
            else:
                self.fates[slot] = "cut by balance"
        self.update = {}       # {slot: number of the update that trains on it}
        for number, part in enumerate(split(kept, self.run.config.updates_per_rollout)):
            self.update |= dict.fromkeys(part, number)
        # Rank 0 has the completions of its own team.
        here = [slot for slot in self.fates if slot % self.run.ranks.dp == 0]
        self.chosen = of_interest(here, self.fates, facts, self.update)
        self.groups = {group.slot: group for group in groups if group.slot in self.chosen}
        if self.run.ranks.rank == 0:
            self.thread = ThreadPoolExecutor(1)        # it reads videos while the ranks train
            self.frames = {}
            for slot in self.chosen:
                self.frames[slot] = self.thread.submit(
                    frames_shown, open_video, self.drawn[slot].video, self.run.config.frames)

    def add(self, batch, logprobs, entropy):
        """Note the chosen groups of a micro-batch. logprobs, entropy: [N, L]"""
        if self.run.config.stage2 and self.run.ranks.sp_rank:
            return                         # sp rank 0 has the same values
        row = 0
        for slot, completions in zip(batch.slots, batch.tokens):
            if slot in self.chosen:
                values = self.trained[slot] = []
                for i, tokens in enumerate(completions, row):
                    values.append((logprobs[i, :len(tokens)].tolist(),
                                   entropy[i, :len(tokens)].tolist()))
            row += len(completions)

    def write(self):
        """Write the step's line."""
        if not self.active:
            return
        trained = {}           # sp ranks have the completions of a group in the order of ranks
        for of_rank in gather(self.trained, self.run.ranks):
            for slot, values in of_rank.items():
                trained[slot] = trained.get(slot, []) + values
        if self.run.ranks.rank:
            return
        c = self.run.config
        row = {"step": self.step, "asked": len(self.drawn), "wanted": c.prompts_per_step,
               "tiers": self.tiers, "clip": [short(1 - c.clip_low), short(1 + c.clip_high)],
               "groups": self.outlines()}
        shown = [self.show(slot, trained.get(slot)) for slot in self.chosen]
        self.thread.shutdown()
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(bounded(row, shown, MOST_BYTES // MOST_STEPS))

    def outlines(self):
        """What became of each of the step's groups, in the order of slots."""
        outlines = []
        for slot, (sample, before, after) in enumerate(
                zip(self.drawn, self.before, self.estimates())):
            fate, why = self.fates.get(slot), ""
            if fate is None and sample.id in self.ungraded:
                fate, why = "not graded", self.ungraded[sample.id]
            elif fate is None:
                fate, why = "dropped", self.curriculum.dropped[sample.id]
            outlines.append({
                "slot": slot, "id": sample.id, "domain": sample.domain, "fate": fate, "why": why,
                "accuracies": [short(x["accuracy"]) for x in self.facts.get(slot, [])],
                "rate": [short(before[0]), short(after[0])], "tier": [before[1], after[1]]})
        return outlines

    def show(self, slot, trained):
        """A group whole. trained: (log-probs, entropy) of each completion; None: not trained on"""
        group, sample = self.groups[slot], self.drawn[slot]
        completions = []
        for i, completion in enumerate(group.completions):
            new, entropy = trained[i] if trained else (None, None)
            shown = {"tokens": completion.tokens.tolist(),
                     "sampled": completion.sampled.int().tolist(),
                     "logprobs": completion.logprobs.tolist(),
                     "new": new, "entropy": entropy, "left_out": None}
            cut_middle(shown, len(completion.tokens), MOST_TOKENS)
            shown["tokens"] = pieces(self.run.tokenizer, shown["tokens"], shown["left_out"])
            for key in ("logprobs", "new", "entropy"):
                if shown[key]:
                    shown[key] = [short(x) for x in shown[key]]            # one a token
            facts = self.facts[slot][i]
            for key in ("length", "forced", "truncated"):
                shown[key] = facts[key]
            shown["predicted"] = facts["answer"]
            for key in ("reward", "accuracy", "format"):
                shown[key] = short(facts[key])
            shown["advantage"] = short(float(group.advantages[i]))
            completions.append(shown)
        return {"slot": slot, "question": sample.question, "answer": sample.answer,
                "video": sample.video, "prefix": len(group.prompt.ids),
                "vision": len(group.prompt.vision), "frames": self.frames[slot].result(),
                "update": self.update.get(slot), "completions": completions}


def of_interest(slots, fates, facts, update):
    """Which of the groups in `slots` are shown whole, the most interesting first: one trained on,
    with a forced answer if possible; one without signal; one cut by balance; one of the
    last update, where ratios are no longer 1 and tokens may be clipped. -> slots"""
    of_fate = {"kept": [], "no signal": [], "cut by balance": []}
    for slot in slots:
        of_fate[fates[slot]].append(slot)
    trained = of_fate["kept"]
    forced = [slot for slot in trained if any(x["forced"] for x in facts[slot])]
    last = max((update[slot] for slot in trained), default=0)
    of_last = [slot for slot in trained if update[slot] == last]
    chosen = []
    for wanted in (forced or trained, of_fate["no signal"], of_fate["cut by balance"], of_last):
        chosen += [slot for slot in wanted if slot not in chosen][:1]
    return chosen


# --------------------------------------------------------------------------------------------------
# its size

def short(x):
    """A number of few characters; None if it is not finite, since JSON has no nan."""
    return round(float(f"{x:.4g}"), 5) if math.isfinite(x) else None


PER_TOKEN = ("tokens", "sampled", "logprobs", "new", "entropy")    # lists of a shown completion


def cut_middle(shown, length, most):
    """Leave out what is in the middle of a shown completion of `length` tokens, so that it has at
    most `most` of them. It may have been cut before, to more."""
    if length <= most:
        return
    head = most // 2
    for key in PER_TOKEN:
        if shown[key]:
            shown[key] = shown[key][:head] + shown[key][-head:]
    shown["left_out"] = [head, length - 2 * head]


def bounded(row, shown, most):
    """A line of at most `most` bytes. -> text

    Where it would be longer fewer groups are shown, then less of their completions. `row` itself
    may be too long, if a step has thousands of groups: then those that come last are left out.
    """
    row = {**row, "groups_left_out": 0, "shown": shown}
    while len(line(row)) > most and len(row["shown"]) > 1:
        row["shown"] = row["shown"][:-1]
    tokens = MOST_TOKENS
    while len(line(row)) > most and row["shown"]:
        tokens //= 2
        if tokens < 8:
            row["shown"] = []
        for group in row["shown"]:
            for completion in group["completions"]:
                cut_middle(completion, completion["length"], tokens)
    while len(line(row)) > most and row["groups"]:
        half = len(row["groups"]) // 2
        row["groups_left_out"] += len(row["groups"]) - half
        row["groups"] = row["groups"][:half]
    return line(row)


def line(row):
    return json.dumps(row, separators=(",", ":")) + "\n"


# --------------------------------------------------------------------------------------------------
# text and pictures

def pieces(tokenizer, ids, left_out):
    """The text of each token. A character that takes several tokens is the text of the last one,
    and that of the others is empty. left_out: as `cut_middle` sets it. -> list of str

    Joined they are the text of all ids, that of the id that ends a completion included.
    """
    head = left_out[0] if left_out else len(ids)
    pieces = []
    for part in (ids[:head], ids[head:]):
        stream = DecodeStream(skip_special_tokens=False)
        texts = [stream.step(tokenizer.backend_tokenizer, id) or "" for id in part]
        if part:                           # the stream still waits for the rest of a character
            texts[-1] += tokenizer.decode(part)[len("".join(texts)):]
        pieces += texts
    return pieces


def frames_shown(open_video, path, frames):
    """The frames that the model was shown, at most MOST_PICTURES of them, side by side in one
    picture. -> dict, or None if the video can no longer be read"""
    try:
        video = open_video(path, frames)
        n = min(video.frames, MOST_PICTURES)
        places = (2 * np.arange(n) + 1) * video.frames // (2 * n)      # the middles of n parts
        pictures = read_places(video, places.tolist())                 # [n, h, w, 3]
    except VideoError:
        return None
    strip, (height, width) = picture_strip(pictures)
    return {"of": video.frames, "seconds": [short(i * video.seconds) for i in places.tolist()],
            "width": width, "height": height, "strip": strip}


def read_places(video, places):
    """Some frames of a `Video`, small. -> uint8 [n, h, w, 3]"""
    scale = min(1.0, HEIGHT / video.height, WIDTH / video.width)
    size = max(1, round(scale * video.height)), max(1, round(scale * video.width))
    # In a short video all frames are decoded on the way to the last; in a long one those between.
    if len(places) == video.frames or video.frames * video.seconds < 60:
        return np.asarray(video.read(0, video.frames, size))[places]
    return np.concatenate([np.asarray(video.read(i, i + 1, size)) for i in places])


def picture_strip(pictures):
    """uint8 [n, h, w, 3] -> (a data: URL of one picture, size (h', w') of each frame in it)

    PNG if that is small, else JPEG; of lower frames if that is still too large.
    """
    n, height, width, _ = pictures.shape
    strip = Image.fromarray(pictures.transpose(1, 0, 2, 3).reshape(height, n * width, 3))
    kind, coded = "png", encode(strip, "png")
    while len(coded) > MOST_STRIP and height > 16:
        if kind == "jpeg":
            height, width = height * 3 // 4, max(1, width * 3 // 4)
        kind, coded = "jpeg", encode(strip.resize((n * width, height)), "jpeg")
    return f"data:image/{kind};base64,{b64encode(coded).decode()}", (height, width)


def encode(picture, kind):
    file = BytesIO()
    picture.save(file, kind)
    return file.getvalue()
