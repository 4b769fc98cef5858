"""python -m pytest tests/test_record.py -q

rollouts.jsonl: which steps it has, what a line says, how large it becomes. That it is the same on
one rank and two, and after a restart, is in the tests of those runs: test_train.py, test_fsdp.py,
test_mixture.py and test_resume.py.
"""
import base64
import copy
import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image
from runs import SMALL, metrics, question, rollouts

import data
import model as vlm
from flow import VideoError
from plumbing import record

FATES = {"kept", "no signal", "cut by balance", "not graded", "dropped"}


# --------------------------------------------------------------------------------------------------
# which steps

@pytest.mark.method
def test_steps_are_few_evenly_spaced_and_a_longer_run_needs_none_that_a_shorter_lacks():
    for steps in [*range(1, 200), 1000, 4097, 10 ** 5]:
        kept = [step for step in range(1, steps + 1) if record.is_kept(step, steps)]
        assert len(kept) <= record.MOST_STEPS and {kept[0], kept[-1]} == {1, steps}
        assert len(kept) >= min(steps, record.MOST_STEPS // 2 - 1)
        apart = set(np.diff(kept[1:-1]))
        assert len(apart) <= 1
        if steps < 200:
            for more in (steps + 1, 2 * steps, 3 * steps + 1):
                for step in range(1, steps + 1):
                    if record.is_kept(step, more):
                        assert record.is_kept(step, steps)


@pytest.mark.method
def test_a_run_that_goes_on_has_the_lines_of_one_left_alone(tmp_path):
    path = tmp_path / "rollouts.jsonl"

    def write(steps):
        path.write_text("".join(f'{{"step":{step}}}\n' for step in steps))

    def steps():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    record.cut_back(path, 5, 9)                            # nothing there
    write(range(1, 10))
    before = path.stat()
    record.cut_back(path, 9, 9)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and steps() == list(range(1, 10))
    with open(path, "a") as f:
        f.write('{"step":2')                               # killed while it wrote
    record.cut_back(path, 7, 9)
    assert steps() == list(range(1, 8))
    write(range(1, 41))
    record.cut_back(path, 40, 100)                         # rl_steps was raised: every fourth
    assert steps() == [1, *range(4, 41, 4)]
    assert all(record.is_kept(step, 100) for step in steps())
    write(range(1, 41))
    record.cut_back(path, 40, 10)                          # lowered: nothing is done any more
    assert steps() == list(range(1, 41))
    record.cut_back(path, 0, 9)                            # begun anew in the same folder
    assert not path.exists()
    for wrong in ("no json\n", "{}\n", "3\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="rollouts.jsonl: not every line.*without it") as e:
            record.cut_back(path, 5, 9)
        assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# a line

def test_a_line_says_what_metrics_say_of_its_step(run):
    tokenizer = vlm.load(run.model)[1]
    fates = []
    for row, logged in zip(rollouts(run.dir), metrics(run.dir, "rl"), strict=True):
        assert row["step"] == logged["step"] and row["clip"] == [0.8, 1.28]
        assert row["wanted"] == SMALL["prompts_per_step"] and row["groups_left_out"] == 0
        assert row["asked"] == logged["oversample"] * row["wanted"] == len(row["groups"])
        assert [group["slot"] for group in row["groups"]] == list(range(row["asked"]))
        accuracies = [x for group in row["groups"] for x in group["accuracies"]]
        assert np.mean(accuracies) == pytest.approx(logged["accuracy"], abs=1e-3)
        fate = [group["fate"] for group in row["groups"]]
        assert fate.count("kept") == logged["valid_groups"] and set(fate) <= FATES
        fates += fate
        for group in row["groups"]:
            if group["fate"] in ("no signal", "kept"):
                assert (len(set(group["accuracies"])) == 1) == (group["fate"] == "no signal")
            for rate, tier in zip(group["rate"], group["tier"]):
                # A rate on a cut is in the outer tier.
                assert tier == (rate > 0.1) + (rate > 0.35) + (rate >= 0.65) + (rate >= 0.9)
        for shown in row["shown"]:
            check_shown(shown, row, tokenizer)
    assert {"kept", "no signal", "dropped"} <= set(fates)
    gone = {group["id"]: group["why"] for row in rollouts(run.dir) for group in row["groups"]
            if group["fate"] == "dropped"}
    assert set(gone) == {"gone", "text"} and "missing.mp4" in gone["gone"]
    for before, after in zip(rollouts(run.dir), rollouts(run.dir)[1:]):
        lost = sum(group["fate"] == "dropped" for group in before["groups"])
        assert sum(before["tiers"]) - sum(after["tiers"]) == lost


def test_which_groups_are_shown():
    """A newcomer looked through all groups of twelve steps, and none had a forced or a clipped
    token: the two first groups kept were shown, which the first update trains on."""
    fates = {0: "kept", 1: "no signal", 2: "kept", 3: "cut by balance", 4: "kept", 5: "kept"}
    update = {0: 0, 2: 0, 4: 1, 5: 1}

    def shown(forced=(), slots=fates):
        facts = {slot: [{"forced": False}, {"forced": slot in forced}] for slot in fates}
        return record.of_interest(slots, fates, facts, update)

    assert shown() == [0, 1, 3, 4]
    assert shown(forced=[1, 3, 5]) == [5, 1, 3, 4]
    assert shown(forced=[4]) == [4, 1, 3, 5]
    assert shown(slots=[0, 2]) == [0, 2]                   # those of rank 0's team
    assert shown(slots=[1]) == [1] and shown(slots=[]) == []


def check_shown(shown, row, tokenizer):
    """A group that is shown whole, of a run of two updates a step on `files`' questions."""
    group = row["groups"][shown["slot"]]
    i = int(group["id"][1:])
    assert shown["question"] == question(i)["question"] and shown["answer"] == question(i)["answer"]
    assert shown["video"] == f"toy:{i}:1" and 0 < shown["vision"] < shown["prefix"]
    assert shown["frames"]["of"] == len(shown["frames"]["seconds"]) == SMALL["frames"]
    frames, seconds = data.read_video(shown["video"], SMALL["frames"])
    assert shown["frames"]["seconds"] == [0.0, pytest.approx(seconds)]
    assert np.array_equal(strip_of(shown), np.concatenate(list(frames), axis=1))

    completions = shown["completions"]
    assert [x["accuracy"] for x in completions] == group["accuracies"]
    rewards = np.array([x["reward"] for x in completions])
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    assert [x["advantage"] for x in completions] == pytest.approx(advantages, abs=1e-3)
    assert (shown["update"] is None) == (group["fate"] != "kept")
    for x in completions:
        assert x["length"] == len(x["tokens"]) == len(x["sampled"]) == len(x["logprobs"])
        text = "".join(x["tokens"])
        assert x["truncated"] or text.endswith("<|im_end|>")
        assert x["left_out"] is None
        assert x["predicted"] is None or x["predicted"] in text
        assert (0 in x["sampled"]) == x["forced"]
        if x["forced"]:                                    # the forced tokens stand in one run
            at = x["sampled"].index(0)
            n = x["sampled"].count(0)
            assert not any(x["sampled"][at:at + n]) and not any(x["logprobs"][at:at + n])
            assert "".join(x["tokens"][at:at + n]) == "</think><answer>"
        if shown["update"] is None:
            assert x["new"] is None and x["entropy"] is None
            continue
        assert len(x["new"]) == len(x["entropy"]) == x["length"]
        assert all(0 <= entropy < math.log(len(tokenizer)) for entropy in x["entropy"])
        if shown["update"] == 0:                           # both have the weights of the sampler
            for old, new, sampled in zip(x["logprobs"], x["new"], x["sampled"]):
                assert not sampled or new == pytest.approx(old, rel=1e-3, abs=1e-4)


def strip_of(shown):
    kind, _, coded = shown["frames"]["strip"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))))


# --------------------------------------------------------------------------------------------------
# the text of tokens

HARD_TEXT = ("é 👩‍👩‍👧‍👦 <b>&amp;</b> مرحبا \u202e שלום 中文 \n\t\ufffd e\u0301 "
             "</think><answer>3</answer>")


@pytest.mark.method
def test_pieces_of_tokens_join_to_the_text_and_a_character_stands_at_its_last_token():
    tokenizer = vlm.load("tiny")[1]
    ids = tokenizer(HARD_TEXT, add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pieces = record.pieces(tokenizer, [*ids, end], None)
    assert pieces[-1] == "<|im_end|>" and "".join(pieces[:-1]) == HARD_TEXT
    emoji = tokenizer("👩", add_special_tokens=False).input_ids
    assert len(emoji) > 1
    assert record.pieces(tokenizer, emoji, None) == [""] * (len(emoji) - 1) + ["👩"]
    unfinished = record.pieces(tokenizer, emoji[:-1], None)
    assert "".join(unfinished) == tokenizer.decode(emoji[:-1]) != ""
    assert record.pieces(tokenizer, [], None) == []
    assert record.pieces(tokenizer, [end], None) == ["<|im_end|>"]
    rng = random.Random(0)
    for _ in range(300):                                   # whatever a model may write
        most = rng.choice([256, len(tokenizer)])
        ids = [rng.randrange(most) for _ in range(rng.randrange(1, 40))]
        pieces = record.pieces(tokenizer, ids, None)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
        half = len(ids) // 2
        parts = record.pieces(tokenizer, ids, [half, 5])
        assert "".join(parts[:half]) == tokenizer.decode(ids[:half])
        assert "".join(parts[half:]) == tokenizer.decode(ids[half:])


# --------------------------------------------------------------------------------------------------
# its size

def shown_group(slot, lengths, new=True):
    completions = []
    for length in lengths:
        numbers = [-0.1234] * length
        completions.append({
            "tokens": [f"{i}," for i in range(length)], "sampled": [1] * length,
            "logprobs": numbers, "new": numbers if new else None,
            "entropy": numbers if new else None, "left_out": None, "length": length})
        record.cut_middle(completions[-1], length, record.MOST_TOKENS)
    return {"slot": slot, "completions": completions}


@pytest.mark.method
@pytest.mark.parametrize("most", [200, 3000, 30_000, 170_000])
@pytest.mark.parametrize("lengths", [[3] * 8, [400, 3, 5000, 512, 513], [20_000] * 16])
def test_a_line_is_bounded_and_what_it_leaves_out_is_in_the_middle(most, lengths):
    shown = [shown_group(slot, lengths, new=slot != 1) for slot in range(4)]
    row = {"step": 1, "groups": [{"slot": slot} for slot in range(7)]}
    line = record.bounded(copy.deepcopy(row), copy.deepcopy(shown), most)
    assert len(line) <= most and line.endswith("\n") and line.count("\n") == 1
    got = json.loads(line)
    assert got["groups"] == row["groups"][:7 - got["groups_left_out"]]
    if len(json.dumps(shown)) < most / 2:
        assert got["shown"] == shown
    if most == 170_000:
        assert got["shown"] and got["groups_left_out"] == 0
    for group, before in zip(got["shown"], shown):
        assert group["slot"] == before["slot"]
        for x, length in zip(group["completions"], lengths, strict=True):
            written = [f"{i}," for i in range(length)]
            if x["left_out"]:
                head, left_out = x["left_out"]
                del written[head:head + left_out]
                assert len(x["tokens"]) + left_out == length
            assert x["tokens"] == written and x["length"] == length
            for key in ("sampled", "logprobs", "new", "entropy"):
                assert x[key] is None or len(x[key]) == len(written)


@pytest.mark.method
def test_groups_that_do_not_fit_are_counted():
    row = {"groups": [{"slot": slot, "id": "x" * 100} for slot in range(5000)]}
    got = json.loads(record.bounded(row, [shown_group(0, [9])], 100_000))
    assert len(got["groups"]) > 300 and got["groups_left_out"] == 5000 - len(got["groups"])
    assert got["groups"] == row["groups"][:len(got["groups"])]


@pytest.mark.method
def test_numbers_are_short_and_json():
    assert [record.short(x) for x in (-0.123456, 12.34567, 1e-9, 0.0, 1.0, -4.6494e-5)] == [
        -0.1235, 12.35, 0.0, 0.0, 1.0, -5e-05]
    assert record.short(math.nan) is record.short(math.inf) is record.short(-math.inf) is None


# --------------------------------------------------------------------------------------------------
# pictures

def pictures_of(folder, n, size, noise):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        shape = (*size, 3)
        picture = np.full(shape, 12 * i % 256, np.uint8)
        if noise:
            picture = rng.integers(0, 255, shape).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return str(folder)


@pytest.mark.parametrize("size, n, asked, width, height", [
    ((28, 28), 5, 32, 28, 28),             # as they are
    ((720, 1280), 3, 32, 199, 112),
    ((900, 450), 20, 20, 56, 112),
    ((20, 2000), 2, 32, 200, 2),
    ((1, 1), 1, 32, 1, 1)])
def test_the_frames_that_the_model_was_shown_stand_side_by_side(tmp_path, size, n, asked, width,
                                                                height):
    path = pictures_of(tmp_path / "video", n, size, noise=False)
    shown = record.frames_shown(data.open_video, path, asked)
    assert (shown["of"], shown["width"], shown["height"]) == (n, width, height)
    video = data.open_video(path, asked)
    pictured = min(n, record.MOST_PICTURES)
    assert len(shown["seconds"]) == pictured
    strip = strip_of({"frames": shown})
    assert strip.shape == (height, pictured * width, 3)
    for i, seconds in enumerate(shown["seconds"]):         # each frame has a brightness of its own
        frame = video.read(round(seconds / video.seconds), round(seconds / video.seconds) + 1)
        assert np.all(strip[:, i * width:(i + 1) * width] == frame[0, 0, 0])


def test_a_long_video_is_read_in_places_and_a_short_one_at_once(tmp_path):
    """The same pictures either way."""
    path = pictures_of(tmp_path / "video", 40, (30, 40), noise=True)
    video = data.open_video(path, 40)
    slow = data.open_video(path, 40)
    slow.seconds = 100.0
    places = [1, 7, 39]
    assert np.array_equal(record.read_places(video, places), record.read_places(slow, places))
    assert np.array_equal(record.read_places(video, places), video.read(0, 40)[places])


def test_a_strip_has_few_bytes_whatever_it_shows(tmp_path):
    path = pictures_of(tmp_path / "video", 16, (300, 400), noise=True)
    shown = record.frames_shown(data.open_video, path, 16)
    assert len(shown["strip"]) < 1.4 * record.MOST_STRIP
    assert shown["strip"].startswith("data:image/jpeg")
    assert strip_of({"frames": shown}).shape == (shown["height"], 16 * shown["width"], 3)


def test_a_video_that_can_no_longer_be_read_has_no_frames(tmp_path):
    """Gone when it is opened, or while it is read."""
    path = pictures_of(tmp_path / "video", 3, (30, 40), noise=False)

    def open_then_lose(path, frames):
        video = data.open_video(path, frames)
        for name in (tmp_path / "video").iterdir():
            name.unlink()
        return video

    assert record.frames_shown(open_then_lose, path, 8) is None
    with pytest.raises(VideoError):
        data.open_video(path, 8)
    assert record.frames_shown(data.open_video, path, 8) is None
    assert record.frames_shown(data.open_video, "missing.mp4", 8) is None
