"""
`python data.py my.jsonl`: what a run would read of a data file, and what it would drop.
"""
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median

import torch
from tqdm import tqdm

from flow import VideoError
from plumbing import command_line
from plumbing.checkpoints import load_without_weights
from plumbing.families import tokenize, vision_width

ABOUT = """
    python data.py my.jsonl --model=Qwen/Qwen2.5-VL-3B-Instruct --frames=64 --decode=true

Ends with status 1 if a run would drop samples, or could not be right about some.
"""
CHUNK = 16             # frames that are decoded at a time
NOBODY_IS_RIGHT = "nobody can be right"     # of a warning that ends the command with status 1


@dataclass
class Options:
    data: str                      # a .jsonl or .json of questions, or "toy"
    eval_data: str = ""            # as for train.py; empty: some of data's videos are held out
    video_dir: str = ""            # base of relative video paths; empty: the data file's folder
    verifiers: str = ""            # your own: "domain=my_file.py:function", comma-separated
    model: str = ""                # count tokens as this checkpoint does; its weights are not read
    frames: int = 32               # frames per video
    max_pixels: int = 0            # per frame, after resizing; 0: the checkpoint's own bound
    think_budget: int = 96         # tokens that the prompt must leave room for
    answer_budget: int = 16        # tokens after that
    vllm_length: int = 0           # vLLM's own limit on prompt plus completion; 0: none
    decode: bool = False           # also decode all frames, not only each video's index
    eval_samples: int = 10 ** 9    # held-out samples whose gold answers are checked


def main(load_questions, open_video, vlm):
    """The command: `check` with the options in sys.argv. Exits with its status."""
    sys.exit(check(parse(sys.argv[1:]), load_questions, open_video, vlm))


def parse(arguments):
    """`data.py FILE --key=value ...` -> `Options`. --decode alone is --decode=true."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--data={arguments[0]}", *arguments[1:]]
    following = [*arguments[1:], "--"]
    arguments = ["--decode=true" if (argument, after[:2]) == ("--decode", "--") else argument
                 for argument, after in zip(arguments, following)]
    c = command_line.parse(Options, ABOUT, arguments)
    command_line.check_range(c, 1, math.inf, "frames")
    command_line.check_range(c, 0, math.inf, "max_pixels", "think_budget", "answer_budget",
                             "vllm_length", "eval_samples")
    return c


def check(c, load_questions, open_video, vlm):
    """Read what a run would read, and print what it would find. -> the exit status

    c: `Options`; load_questions, open_video: data.py's; vlm: the module model.py.
    """
    warnings = []

    def say(line):
        print(line)
        warnings.append(line)

    training, held_out = load_questions(c, say)
    bad = any(NOBODY_IS_RIGHT in line for line in warnings)
    samples = training + held_out
    print_domains(c, training, held_out)
    if not training:
        bad = True
        print("no sample is left to train on: all are held out, by a hash of their videos' names")
    videos, dropped = open_all(c, samples, open_video)
    print_frames(c, videos)
    if c.model:
        dropped |= print_lengths(c, samples, videos, vlm)
    if dropped:
        print(f"{len(dropped)} of {len(samples)} samples would be dropped:")
        for sample in samples:
            if (sample.id, sample.video) in dropped:
                print(f"  {sample.id}: {dropped[sample.id, sample.video]}")
    else:
        print(f"all {len(samples)} samples would be used")
    return 1 if dropped or bad else 0


def print_domains(c, training, held_out):
    in_training = Counter(sample.domain for sample in training)
    in_held_out = Counter(sample.domain for sample in held_out)
    thoughts = Counter(sample.domain for sample in training if sample.thought)
    videos = {sample.video for sample in training + held_out}
    print(f"{c.data}: {len(training) + len(held_out)} samples of {len(videos)} videos")
    print(f"{'domain':16} {'training':>10} {'thoughts':>10} {'held out':>10}")
    for domain in sorted(in_training | in_held_out):
        print(f"{domain:16} {in_training[domain]:10} {thoughts[domain]:10} "
              f"{in_held_out[domain]:10}")
    print(f"{'all':16} {len(training):10} {thoughts.total():10} {len(held_out):10}")


# --------------------------------------------------------------------------------------------------
# videos

def open_all(c, samples, open_video):
    """Open each video once, in threads, and decode it if c.decode. -> {path: `Video`, which is not
    read again}, {(id, video) of a sample: why it would be dropped}"""
    def work(path):
        try:
            video = open_video(path, c.frames)
            if c.decode:
                for lo in range(0, video.frames, CHUNK):
                    video.read(lo, min(lo + CHUNK, video.frames))
        except VideoError as e:
            return e
        return replace(video, read=None)                   # what it knows of a film may be large

    paths = list(dict.fromkeys(sample.video for sample in samples))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(work, paths), total=len(paths), dynamic_ncols=True,
                   desc="decode" if c.decode else "open")
        found = dict(zip(paths, bar))
    dropped = {}
    for sample in samples:
        if isinstance(found[sample.video], VideoError):
            dropped[sample.id, sample.video] = str(found[sample.video])
    videos = {path: video for path, video in found.items() if not isinstance(video, VideoError)}
    return videos, dropped


def print_frames(c, videos):
    if not videos:
        print("no video can be read")
        return
    counts = sorted(video.frames for video in videos.values())
    whole = sum(count == c.frames for count in counts)
    how = "decoded" if c.decode else "opened; --decode=true also decodes them"
    print(f"frames: {c.frames} in {whole} of {len(counts)} videos, fewest {counts[0]} ({how})")


# --------------------------------------------------------------------------------------------------
# lengths

def print_lengths(c, samples, videos, vlm):
    """Count the tokens of each prompt, without encoding a video.
    -> {(id, video) of a sample: why it is too long}"""
    model, tokenizer = load_without_weights(c.model)
    if c.max_pixels:
        model.pixels.max_pixels = min(c.max_pixels, model.pixels.max_pixels)
        model.pixels.min_pixels = min(c.max_pixels, model.pixels.min_pixels)
    forced = "</think><answer>" if c.think_budget else "<think></think><answer>"
    room = c.think_budget + len(tokenize(tokenizer, forced)) + c.answer_budget
    lengths, dropped = [], {}
    for sample in tqdm(samples, desc="tokens", dynamic_ncols=True):
        if sample.video not in videos:
            continue
        video = videos[sample.video]
        try:
            prompt = prompt_without_vision(model, tokenizer, sample, video, vlm)
            lengths.append(len(prompt.ids))
            vlm.check_length(model, prompt, room, c.vllm_length)
        except ValueError as e:            # as in `data.make_prompts`
            dropped[sample.id, sample.video] = str(e)
    if lengths:
        limit = model.config.text_config.max_position_embeddings
        print(f"tokens of a prompt: {min(lengths)} to {max(lengths)}, median {median(lengths):g}; "
              f"{room} more for the answer; the model takes {limit}")
    return dropped


def prompt_without_vision(model, tokenizer, sample, video, vlm):
    """The `Prompt` of a sample, whose vision tokens have no numbers."""
    patches = vlm.VideoPatches(lambda: video, model.pixels)
    (t, h, w), merge, _ = patches.open()
    shape = t * h * w // merge ** 2, vision_width(model.config.vision_config)
    vision = torch.empty(shape, device="meta")                         # [V, D]
    return vlm.make_prompt(model, tokenizer, sample.question, vision, (t, h, w), video.seconds,
                           video.frames)
