"""
Where questions about videos come from, which are held out, and how one becomes a prompt.

    load           questions from a .jsonl, from others' .json, or "toy" and "toy:A,B"
    split          training questions and held-out ones
    taught_text    what the cold start teaches
    open_video     any usual file, folder of pictures or picture, or a built-in video
    fingerprint    the content of a video, whatever its name
    make_prompts   the prompts of a step's samples, each video encoded once
    fetch          a prompt's vision tokens, at the time they are needed

    python data.py my.jsonl         what a run would read of a file, and what it would drop
"""
import hashlib
import os
import re
from dataclasses import asdict, replace
from functools import partial

import model as vlm
import rewards
import toy
from flow import Sample, VideoError
from plumbing import check_data, store
from plumbing.fetching import refuse_changes, without_tokens
from plumbing.formats import read_samples
from plumbing.judges import load_verifiers
from plumbing.pictures import folder_and_fps, with_fps
from plumbing.ranks import on_first, run_command
from plumbing.video import open_file

# --------------------------------------------------------------------------------------------------
# questions

def load(source, video_dir="", say=print):
    """-> list of `Sample`

    source: "toy" or "toy:A,B" (`toy.load`), or a .jsonl or .json of questions (docs/data.md).
    video_dir: where the paths of videos begin; empty: at the folder of the file.
    say: prints a line, about what is not used of the file. Raises ValueError that names the file,
    the line and what is wrong with it.
    """
    if source == "toy" or source.startswith("toy:"):
        return toy.load(source)
    samples = []
    for where, fields in read_samples(source, rewards.VERIFIERS, say):
        fps = fields.pop("fps", None)
        if not fields["video"].startswith("toy:"):
            folder = video_dir or os.path.dirname(source)
            path = os.path.join(folder, fields["video"])
            fields["video"] = with_fps(path, fps, where)
        samples.append(Sample(**fields))
    if not samples:
        raise ValueError(f"{source}: no samples in it")
    return samples


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
    name = os.path.basename(os.path.normpath(folder_and_fps(path)[0]))
    built_in = re.match(r"toy:(?:[a-z]+-)?0*(\d+)", path)
    if built_in:                                           # toy:long-7 tells the story of toy:7
        name = f"toy:{built_in[1]}"
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < fraction * 2 ** 32


def load_questions(c, say):
    """What a run asks about. -> (samples to train on, held-out samples)

    c: train.Config or evaluate.Config. Raises ValueError if a domain has no verifier. Samples
    whose gold answer its own verifier refuses are named: nobody can be right about them.
    """
    users_own = load_verifiers(c.verifiers)
    rewards.VERIFIERS.update(users_own)
    samples = load(c.data, c.video_dir, say)
    if c.eval_data:
        train, held_out = samples, load(c.eval_data, c.video_dir, say)
    else:
        train, held_out = split(samples)
    for sample in train + held_out:
        if sample.domain not in rewards.VERIFIERS:
            raise ValueError(f"sample {sample.id}: no verifier for domain {sample.domain!r}; "
                             f"there are: {', '.join(rewards.VERIFIERS)}")
    refused = []
    for sample in train + held_out[:c.eval_samples]:
        if sample.domain not in users_own:
            if rewards.VERIFIERS[sample.domain](sample.answer, sample.answer) < 1:
                refused.append(sample.id)
    if refused:
        names = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
        say(f"{len(refused)} samples have an answer that their own verifier does not accept, so "
            f"{check_data.NOBODY_IS_RIGHT}: {names}")
    return train, held_out


def taught_text(sample, think=True):
    """What the cold start teaches: a thought and the answer that it comes to. The thought is empty
    if think is False."""
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
        return toy.open_video(path, frames)
    return open_file(path, frames)


def read_video(path, frames):
    """As `open_video`, all frames at once. -> (uint8 [T,H,W,3], seconds between frames)"""
    video = open_video(path, frames)
    return video.read(0, video.frames), video.seconds


def fingerprint(path, folder=""):
    """A hash of a video's content, not of its name: of a built-in video's frames, or else
    `plumbing.store.fingerprint`. -> 64 hexadecimal digits. Raises VideoError."""
    path = os.fspath(path)
    if path.startswith("toy:"):
        return toy.fingerprint(path)
    return store.fingerprint(path, folder)


# --------------------------------------------------------------------------------------------------
# from a sample to a prompt

def make_prompts(run, samples, room):
    """The prompts of samples, each video encoded once. -> [(`Sample`, `Prompt`)], {id: why dropped}

    room: tokens that a completion may have. All sp ranks call this with the same samples. A video
    that cannot be read and a prompt that is too long are dropped, never replaced and never cut.
    The prompts hold no vision tokens: a step's videos may be more than fit in memory. See `fetch`.
    """
    # One exchange between the ranks for all keys, since each costs as much as encoding many frames.
    keys, dropped = on_first(partial(video_keys, run, samples), run.ranks)
    most = run.config.vllm_length if run.config.rollout == "vllm" else None
    prompts = []
    for sample in samples:
        if sample.id in dropped:
            continue
        key = keys[sample.id]
        try:
            vision, *about = vision_tokens(run, sample.video, key)
            prompt = vlm.make_prompt(run.model, run.tokenizer, sample.question, vision, *about,
                                     key=key)
            vlm.check_length(run.model, prompt, room, most)
            prompts.append((sample, without_tokens(replace(prompt, video=sample.video))))
        except ValueError as e:            # VideoError, PromptError, or what else its data causes
            dropped[sample.id] = str(e)
    return prompts, dropped


def fetch(run, prompts):
    """The prompts with their vision tokens: from the cache, or else encoded again. -> a list

    All sp ranks call this with the same prompts in the same order. Raises VideoError if a video
    can no longer be read, or has changed.
    """
    fetched = []
    for prompt in prompts:
        if prompt.vision.is_meta:
            vision, *_ = vision_tokens(run, prompt.video, prompt.key)
            prompt = replace(prompt, vision=vision)
        fetched.append(prompt)
    return fetched


def video_keys(run, samples):
    """-> {id: `video_key` of the sample's video}, {id: why it cannot be read}"""
    keys, unreadable = {}, {}
    for sample in samples:
        try:
            keys[sample.id] = video_key(run, sample.video)
        except VideoError as e:
            unreadable[sample.id] = str(e)
    return keys, unreadable


def video_key(run, path):
    """The name of a video in the cache: its content, and how it is sampled, resized and encoded.
    Raises VideoError."""
    c = run.config
    content = fingerprint(path, c.cache_dir)
    return run.cache.key(run.model.model.visual, content, c.frames, asdict(run.model.pixels))


def vision_tokens(run, path, key):
    """The vision tokens of a video, from the cache or encoded now. -> as `model.encode_video`

    key: its `video_key`.
    """
    open_for_key = partial(open_unchanged, run, path, key)
    encode_now = partial(vlm.encode_video, run.model, open_for_key, run.ranks)
    return run.cache.get(key, encode_now, run.ranks)


def open_unchanged(run, path, key):
    """-> the `Video` at path. Its read raises VideoError if the content no longer has this key."""
    video = run.ahead.open(path, key) if run.ahead else open_video(path, run.config.frames)
    return refuse_changes(video, partial(video_key, run, path), key)


def read_ahead(run, samples):
    """Begin to read those videos of this team's samples that are not encoded yet."""
    def key_if_needed(path):
        key = video_key(run, path)
        return None if run.cache.has(key) else key

    def resized(video):
        return vlm.frame_size(video.height, video.width, run.model.pixels, video.frames)

    def pieces(video):
        return vlm.frames_to_read(run.model, video, run.ranks)

    mine = samples[run.ranks.dp_rank::run.ranks.dp]
    paths = [sample.video for sample in mine if not sample.video.startswith("toy:")]
    run.ahead.start(paths, key_if_needed, pieces, resized)


if __name__ == "__main__":
    run_command("data.py", lambda: check_data.main(load_questions, open_video, vlm))
