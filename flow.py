"""
What flows through the method, in the order in which it comes into being:

    Sample --> Video --> Prompt --> Group of G Completions --> Rewards --> advantages --> loss
"""
from dataclasses import dataclass
from typing import Callable

import torch


class VideoError(ValueError):
    """A video that cannot be read: the file and the cause, in one sentence."""


class PromptError(ValueError):
    """A prompt that cannot be used, and why, in one sentence."""


@dataclass
class Sample:
    """One question about one video."""
    id: str            # unique; every cache, statistic and random stream is keyed by it
    question: str
    answer: str        # the gold answer: what a verifier compares with
    domain: str        # picks the verifier
    video: str         # a film, a folder of pictures, one picture, or a built-in "toy:SEED"
    thought: str = ""  # reasoning for the cold start; empty where there is none
    taught: str = ""   # the answer that the thought comes to, if it is not the gold answer


@dataclass
class Video:
    """What must be known of a video before one of its pixels is read."""
    path: str
    frames: int      # T, how many frames read() can give: at most as many as were asked for
    height: int      # pixels, the right way up
    width: int
    seconds: float   # between two neighbouring frames of the T
    read: Callable   # read(lo, hi) -> uint8 [hi-lo, H, W, 3], equal to read(0, T)[lo:hi]


@dataclass
class Pixels:
    """How a checkpoint wants its pixels, as read from its own JSON files."""
    mean: list        # of each colour
    std: list
    patch: int        # a patch is patch x patch pixels ...
    temporal: int     # ... over this many frames
    merge: int        # merge x merge patches become one vision token
    min_pixels: int   # of one frame, after resizing
    max_pixels: int
    video_pixels: tuple = ()  # (least, most) of all frames of a video together (GLM-4.1V)


@dataclass
class Prompt:
    """What the language model reads before it answers: P ids, V of them vision tokens."""
    ids: torch.Tensor        # [P] long, one vision pad for each vision token
    positions: torch.Tensor  # [3, P] long, M-RoPE: time, height, width
    vision: torch.Tensor     # [V, D] on the CPU; has a gradient only where the tower itself trains
    grids: list              # (t, h, w) in patches of each run of vision tokens
    seconds: float = 0.0     # between two temporal patches
    key: str = ""            # the video's name in the cache


@dataclass
class Completion:
    """One answer to one prompt: L tokens, the end token included."""
    tokens: torch.Tensor     # [L] long
    sampled: torch.Tensor    # [L] bool, False where forced: such a token carries no loss
    logprobs: torch.Tensor   # [L] float32, under the sampler; 0 where forced
    text: str
    forced: bool             # the thinking budget ran out, and an answer was begun for it
    truncated: bool          # a budget ended it: the answer's, or that of an unforced thought


@dataclass
class Reward:
    total: float       # in [0, 1], what GRPO sees
    accuracy: float    # in [0, 1]
    format: float      # 1 or 0


@dataclass
class Group:
    """One prompt and its G completions."""
    slot: int                         # its place among the questions drawn in this step
    sample: Sample
    prompt: Prompt
    completions: list = None          # G, all of them on every rank of the sp group
    rewards: list = None              # G of `Reward`
    advantages: torch.Tensor = None   # [G] float32


@dataclass
class Ranks:
    """Who this process is. world = dp * sp: sp ranks share a video, dp groups of them do not."""
    rank: int = 0
    world: int = 1
    sp: int = 1
    sp_rank: int = 0
    dp: int = 1
    dp_rank: int = 0
    device: str = "cpu"
    group: object = None       # the process group of my sp ranks; None without torchrun


@dataclass
class Run:
    """What one run holds together."""
    config: object             # its hyperparameters: train.Config or evaluate.Config
    ranks: Ranks
    say: Callable              # print one line, on rank 0 alone
    model: torch.nn.Module
    tokenizer: object
    banned: torch.Tensor       # bool [vocabulary], ids that are never sampled
    cache: object              # encode.Cache: vision tokens of videos that were encoded
    ahead: object = None       # plumbing.store.Ahead: videos that are being read before their turn
    engine: object = None      # plumbing.vllm_engine.VLLM; None: the torch engine in rollout.py
