"""The data that flows through the method, in the order in which it is made:

    Sample --> Video --> Prompt --> Group of G Completions --> Rewards --> advantages --> loss"""
from dataclasses import dataclass
from typing import Callable

import torch


class VideoError(ValueError):
    """A video cannot be read. The text names the file and the cause, in one sentence."""


class PromptError(ValueError):
    """A prompt cannot be used. The text says why, in one sentence."""


@dataclass
class Sample:
    """One question about one video."""
    id: str            # unique; every cache, statistic and random stream is keyed by it
    question: str
    answer: str        # the gold answer: what a verifier compares with
    domain: str        # picks the verifier
    video: str         # a film, a folder of pictures, one picture, or a built-in "toy:SEED"
    thought: str = ""  # reasoning for the cold start; empty if there is none
    taught: str = ""   # the answer that the thought leads to, if it is not the gold answer


@dataclass
class Video:
    """What is known about a video before any of its pixels is read."""
    path: str
    frames: int      # T, how many frames read() can give: at most the number requested
    height: int      # pixels, as displayed (upright)
    width: int
    seconds: float   # between two neighbouring frames of the T
    read: Callable   # read(lo, hi) -> uint8 [hi-lo, H, W, 3]; open_video's also takes a size (H, W)


@dataclass
class Pixels:
    """How a checkpoint expects its pixels, as read from its own JSON files."""
    mean: list        # per colour channel
    std: list
    patch: int        # a patch is patch x patch pixels ...
    temporal: int     # ... over this many frames
    merge: int        # merge x merge patches become one vision token
    min_pixels: int   # of one frame, after resizing
    max_pixels: int
    video_pixels: tuple = ()  # (least, most) for all frames of a video together (GLM-4.1V)


@dataclass
class Prompt:
    """What the language model reads before it answers: P ids, V of them vision tokens."""
    ids: torch.Tensor        # [P] long, one vision pad for each vision token
    positions: torch.Tensor  # [3, P] long, M-RoPE: time, height, width
    vision: torch.Tensor     # [V, D]; on "meta", without memory, until `data.fetch` brings it
    grids: list              # (t, h, w) in patches of each run of vision tokens
    seconds: float = 0.0     # between two temporal patches
    frames: int = None       # of its video; None if they fill the temporal patches
    key: str = ""            # the video's name in the cache
    video: str = ""          # its path, to encode it again where the cache no longer has it


@dataclass
class Completion:
    """One answer to one prompt: L tokens, the end token included."""
    tokens: torch.Tensor     # [L] long
    sampled: torch.Tensor    # [L] bool, False for forced tokens, which carry no loss
    logprobs: torch.Tensor   # [L] float32, under the sampler; 0 for forced tokens
    text: str
    forced: bool             # the thinking budget ran out, and the answer tag was forced
    truncated: bool          # ran out of answer tokens, or thinking tokens if no answer is forced


@dataclass
class Reward:
    total: float       # in [0, 1], the reward that GRPO uses
    accuracy: float    # in [0, 1]
    format: float      # 1 or 0


@dataclass
class Group:
    """One prompt and its G completions."""
    slot: int                         # its place among the questions drawn in this step
    sample: Sample
    prompt: Prompt
    completions: list = None          # G `Completion`s, all of them on every sp rank
    rewards: list = None              # G `Reward`s
    advantages: torch.Tensor = None   # [G] float32


@dataclass
class Ranks:
    """Which process this is, of world = dp * sp: dp teams, whose sp ranks share each video."""
    rank: int = 0
    world: int = 1
    sp: int = 1
    sp_rank: int = 0
    dp: int = 1
    dp_rank: int = 0
    device: str = "cpu"
    group: object = None       # the process group of this rank's team; None without torchrun


@dataclass
class Run:
    """What the functions of one run share."""
    config: object             # its hyperparameters: train.Config or evaluate.Config
    ranks: Ranks
    say: Callable              # prints one line, only on rank 0
    model: torch.nn.Module
    tokenizer: object
    banned: torch.Tensor       # bool [vocabulary], ids that are never sampled
    cache: object              # encode.Cache: vision tokens of encoded videos
    ahead: object = None       # plumbing.store.Ahead: reads the next videos in threads
    engine: object = None      # plumbing.vllm_engine.VLLM; None: the torch engine in rollout.py
