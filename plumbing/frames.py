"""
What every source of video shares: which frames are taken, and how they are returned.
"""
import numpy as np

from flow import Video


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
    read(chosen, out) fills out, uint8 [n, H, W, 3], with the n frames chosen.
    """
    def read_slice(lo, hi):
        assert 0 <= lo <= hi <= len(chosen), f"frames {lo}:{hi} of {len(chosen)}"
        out = np.empty((hi - lo, *size, 3), dtype=np.uint8)    # only these frames are in memory
        if hi > lo:
            read(chosen[lo:hi], out)
        return out

    height, width = size
    return Video(path, len(chosen), height, width, 1.0 if single else float(seconds), read_slice)
