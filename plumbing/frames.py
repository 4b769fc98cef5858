"""Which frames of a video are taken, and the `Video` that reads them when asked for."""
import numpy as np

from flow import Video


def pick(times, end, frames):
    """which frame is on screen in the middle of each of `frames` equal parts of [times[0], end).
    times 0 1 2 3, end 4: two parts have their middles at 1 and 3 -> frames 1 and 3; four parts at .5 1.5 2.5 3.5
    -> each frame once. With a variable rate a long-standing frame may come twice and a short one never."""
    times = np.asarray(times, dtype=np.int64)                                # integer ticks: a tie is exact
    T = min(frames, len(times))
    middle = times[0] + (2 * np.arange(T) + 1) * (end - times[0]) // (2 * T) # (T,)
    return np.searchsorted(times, middle, side="right") - 1                  # (T,) last frame with time <= middle


def make_video(path, chosen, size, seconds, one, read):
    """`chosen`: per output frame, whatever `read` needs to find it; `one`: the source has a single frame,
    which has no neighbour, so its seconds are 1.0 by convention"""
    def read_slice(lo, hi):
        assert 0 <= lo <= hi <= len(chosen), f"frames {lo}:{hi} of {len(chosen)}"
        out = np.empty((hi - lo, *size, 3), dtype=np.uint8)                  # (hi-lo, H, W, 3) nothing more is held
        if hi > lo:
            read(chosen[lo:hi], out)
        return out
    return Video(path, len(chosen), *size, 1.0 if one else float(seconds), read_slice)
