"""
What every source of video shares: which frames are taken, how they are returned and resized.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from flow import Video, VideoError

MOST_UNEQUAL = 200     # the longer side over the shorter one, in the models' own preprocessing


@contextmanager
def one_file(path):
    """Whatever error is raised inside the `with` becomes a VideoError of that file: the libraries
    raise many classes, and one bad file must not end a run."""
    try:
        yield
    except VideoError:
        raise
    except Exception as e:
        cause = " ".join(f"{type(e).__name__}: {e}".split())
        raise VideoError(f"{path}: cannot be read ({cause})") from e


def pick(times, end, frames):
    """Frames evenly spaced in time: of each of T equal parts of the video, the frame in its middle.

    times: [n] integers in ascending order, when each frame appears; end: when the last one
    disappears; frames: how many frames at most. -> long [T], T = min(frames, n), places in times.
    With a variable rate, a frame that is shown for a long time may be taken twice, a short one
    never.

    >>> pick([0, 1, 2, 3], 4, 2)       # two parts, whose middles are at 1 and 3
    array([1, 3])
    >>> pick([0, 1, 2, 3], 4, 4)       # middles at 0.5, 1.5, 2.5 and 3.5: each frame once
    array([0, 1, 2, 3])
    """
    times = np.asarray(times, dtype=np.int64)              # integers: a tie is exact
    T = min(frames, len(times))
    middles = times[0] + (2 * np.arange(T) + 1) * (end - times[0]) // (2 * T)  # [T]
    return np.searchsorted(times, middles, side="right") - 1   # the last frame at or before each


def make_video(path, chosen, size, seconds, single, read):
    """-> `Video`

    chosen: [T], whatever `read` needs to find each frame; size: (height, width) in pixels;
    seconds: between two of the T frames.
    single: the source has only one frame. It has no neighbour: its seconds are 1.0 by convention.
    read(chosen, out) fills out, uint8 [n, H, W, 3], with the n frames chosen. It may use out.shape
    and assign to places of out.

    The `Video`'s read(lo, hi, resized) gives frames of the size `resized`, (height, width), bit for
    bit as `resize` would. Each is resized once it is decoded: one at a time is there in full size.
    Raises VideoError if the frames are so narrow that no model takes them.
    """
    height, width = size
    if max(size) > MOST_UNEQUAL * min(size):
        raise VideoError(f"{path}: frames of {height} x {width}: sides that differ more than "
                         f"{MOST_UNEQUAL} times are not supported")

    def read_slice(lo, hi, resized=None):
        assert 0 <= lo <= hi <= len(chosen), f"frames {lo}:{hi} of {len(chosen)}"
        shape = (hi - lo, *size, 3)
        out = Resized(shape, resized) if resized else np.empty(shape, dtype=np.uint8)
        if hi > lo:
            with one_file(path):
                read(chosen[lo:hi], out)       # only these frames are in memory
        return out.frames if resized else out

    return Video(path, len(chosen), height, width, 1.0 if single else float(seconds), read_slice)


class Resized:
    """Stands for an array of frames while they are assigned to it, and keeps them resized."""

    def __init__(self, shape, size):
        """shape: (n, H, W, 3), of what is assigned; size: (height, width) of what is kept"""
        self.shape = shape
        self.size = size
        self.frames = np.empty((shape[0], *size, 3), dtype=np.uint8)   # [n, H', W', 3]

    def __setitem__(self, places, frames):
        frames = np.array(frames, order="C")   # torch takes neither reversed nor read-only arrays
        self.frames[places] = resize(frames.reshape(-1, *self.shape[1:]), self.size).numpy()


def resize(frames, size):
    """Frames of another size: bicubic, antialiased, each frame for itself.

    uint8 [T, H, W, 3], size: (height, width) -> uint8 tensor [T, H', W', 3]
    """
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)                    # [T, 3, H, W]
    if size != tuple(x.shape[2:]):
        x = F.interpolate(x, size, mode="bicubic", antialias=True)     # [T, 3, H', W'], still uint8
    return x.permute(0, 2, 3, 1)                                       # [T, H', W', 3]
