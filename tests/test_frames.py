"""python -m pytest tests/test_frames.py -q"""
import numpy as np
import pytest
import torch

from plumbing.frames import make_video, pick, resize


def test_equal_durations_are_picked_evenly_and_each_at_most_once():
    for n in (1, 2, 5, 8, 40):
        for frames in (1, 2, 3, 7, n, n + 1, 100):
            T = min(n, frames)
            expected = [int((i + 0.5) * n / T) for i in range(T)]
            assert pick(range(n), n, frames).tolist() == expected
            assert pick(range(90, 90 + 3 * n, 3), 90 + 3 * n, frames).tolist() == expected


def test_what_is_on_screen_in_the_middle_of_each_part_is_picked():
    """A long frame may come twice and a short one never. A middle that falls on a frame's own start
    shows that frame."""
    assert pick([0, 1, 2, 10], 12, 4).tolist() == [1, 2, 2, 3]     # middles 1.5, 4.5, 7.5, 10.5
    assert pick([0, 1, 2, 3], 4, 2).tolist() == [1, 3]             # middles 1 and 3


def read_nothing(chosen, out):
    raise AssertionError("asked for no frame")


def test_a_slice_is_read_by_what_was_chosen_for_it():
    def read(chosen, out):
        for row, value in zip(out, chosen):
            row[:] = value

    video = make_video("x", [3, 5, 5, 9], (2, 4), 0.25, False, read)
    assert (video.path, video.frames, video.height, video.width) == ("x", 4, 2, 4)
    assert video.seconds == 0.25
    assert video.read(1, 4).shape == (3, 2, 4, 3) and video.read(1, 4).dtype == np.uint8
    assert video.read(1, 4)[:, 0, 0, 0].tolist() == [5, 5, 9]
    with pytest.raises(AssertionError, match="frames 2:5 of 4"):
        video.read(2, 5)


def test_no_frames_are_no_reading_and_a_single_frame_has_one_second():
    video = make_video("x", [0], (2, 4), 0.04, True, read_nothing)
    assert video.read(1, 1).shape == (0, 2, 4, 3) and video.seconds == 1.0


@pytest.mark.parametrize("size", [(28, 28), (9, 35), (60, 100), (84, 140)])
def test_frames_are_resized_one_by_one_to_what_they_are_together(size):
    """Bit for bit, smaller and larger, from arrays that run backwards (np.rot90) too."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 60, 100, 3), dtype=np.uint8)

    def read_each(chosen, out):
        for place, number in enumerate(chosen):
            out[place] = pixels[number]

    def read_together(chosen, out):
        out[:] = pixels[chosen]

    def read_backwards(chosen, out):
        for place, number in enumerate(chosen):
            out[place] = np.flip(np.flip(pixels[number], 0).copy(), 0)

    right = resize(pixels, size)
    assert right.shape == (7, *size, 3) and right.dtype == torch.uint8
    if size == (60, 100):
        assert np.array_equal(right, pixels)
    for read in (read_each, read_together, read_backwards):
        video = make_video("x", np.arange(7), (60, 100), 1.0, False, read)
        assert np.array_equal(video.read(0, 7, size), right)
        assert np.array_equal(video.read(2, 5, size), right[2:5])
        assert video.read(3, 3, size).shape == (0, *size, 3)
        assert np.array_equal(video.read(2, 5), pixels[2:5])
