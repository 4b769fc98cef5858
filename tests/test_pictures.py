"""python -m pytest tests/test_pictures.py -q

Folders of pictures, single pictures and animations, which are made here.
"""
import numpy as np
import pytest
from PIL import Image
from test_video import H, W, fails, numbers, paint

from flow import VideoError
from plumbing.pictures import list_pictures
from plumbing.video import open_file, read_video


def squares(n):
    """A red square that moves over a transparent ground. -> (n images, uint8 [n, 30, 40, 3]: what
    they look like on black)"""
    images = []
    for i in range(n):
        image = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
        image.paste((250, 40 * i, 50, 255), (4 * i, 5, 4 * i + 10, 20))
        images.append(image)
    ground = Image.new("RGBA", (40, 30), "black")
    on_black = [Image.alpha_composite(ground, image).convert("RGB") for image in images]
    return images, np.stack([np.asarray(image) for image in on_black])


# --------------------------------------------------------------------------------------------------
# animations

KINDS = [("a.gif", dict(disposal=2)), ("a.webp", dict(lossless=True)), ("a.png", {})]


@pytest.mark.parametrize("name, options", KINDS)
def test_animated_picture_keeps_its_durations(tmp_path, name, options):
    """1 s: frames begin at 0, 0.1, 0.3, 0.7 and 0.8; the middles are 0.125, 0.375, 0.625, 0.875."""
    images, expected = squares(5)
    path = tmp_path / name
    durations = [100, 200, 400, 100, 200]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    video = open_file(path, 4)
    assert video.frames == 4 and video.seconds == pytest.approx(0.25)
    everything = video.read(0, 4)
    assert np.abs(everything.astype(int) - expected[[1, 2, 2, 4]]).max() <= 8  # gif: 256 colours
    for lo in range(4):
        assert np.array_equal(video.read(lo, 4), everything[lo:])


def test_gif_of_equal_durations_gives_each_frame_once(tmp_path):
    images, expected = squares(5)
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=30, disposal=2)
    frames, seconds = read_video(path, 9)
    assert np.abs(frames.astype(int) - expected).max() <= 8 and seconds == pytest.approx(0.03)


def test_the_pages_of_a_tiff_are_no_video(tmp_path):
    images = [Image.fromarray(paint(i)) for i in range(3)]
    images[0].save(tmp_path / "a.tiff", save_all=True, append_images=images[1:])
    frames, seconds = read_video(tmp_path / "a.tiff", 8)
    assert numbers(frames) == [0] and seconds == 1.0


# --------------------------------------------------------------------------------------------------
# folders

def test_folder_in_natural_order(tmp_path):
    for i in range(12):
        Image.fromarray(paint(i)).save(tmp_path / f"frame_{i}.png")
    for other in ["notes.txt", ".frame_3.png", "._frame_4.PNG"]:
        (tmp_path / other).write_text("no picture")
    assert list_pictures(tmp_path) == [str(tmp_path / f"frame_{i}.png") for i in range(12)]
    frames, seconds = read_video(tmp_path, 100)
    assert np.array_equal(frames, np.stack([paint(i) for i in range(12)])) and seconds == 1.0
    video = open_file(str(tmp_path), 3)
    assert numbers(video.read(0, 3)) == [2, 6, 10] and video.seconds == 4.0
    assert numbers(video.read(1, 2)) == [6]


def test_folder_of_two_sizes_or_with_a_broken_picture(tmp_path):
    (tmp_path / "sizes").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sizes/1.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "sizes/2.png")
    with pytest.raises(VideoError, match=r"2\.png.*differ"):
        open_file(tmp_path / "sizes", 2)
    (tmp_path / "sizes/2.png").write_text("no picture")
    with pytest.raises(VideoError, match=r"2\.png.*broken"):
        open_file(tmp_path / "sizes", 2)


def test_folder_without_pictures(tmp_path):
    fails(tmp_path, "no pictures")


# --------------------------------------------------------------------------------------------------
# single pictures

def test_picture(tmp_path):
    Image.fromarray(paint(3)).save(tmp_path / "a.png")
    frames, seconds = read_video(tmp_path / "a.png", 8)
    assert np.array_equal(frames, paint(3)[None]) and seconds == 1.0

    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned clockwise
    Image.fromarray(paint(3)).save(tmp_path / "turned.png", exif=exif)
    video = open_file(tmp_path / "turned.png", 1)
    assert (video.height, video.width) == (W, H)
    assert np.array_equal(video.read(0, 1)[0], np.rot90(paint(3), -1))

    images, expected = squares(2)
    images[1].save(tmp_path / "clear.png")
    assert np.array_equal(read_video(tmp_path / "clear.png", 1)[0][0], expected[1])
    images[1].save(tmp_path / "palette.gif")               # a transparent entry; through PyAV
    assert np.array_equal(read_video(tmp_path / "palette.gif", 1)[0][0], expected[1])
    assert open_file(tmp_path / "palette.gif", 1).seconds == 1.0
    images[1].quantize(8).save(tmp_path / "palette.png")
    assert np.array_equal(read_video(tmp_path / "palette.png", 1)[0][0], expected[1])
    Image.fromarray(paint(3)[..., 0]).save(tmp_path / "gray.png")
    gray = np.repeat(paint(3)[..., :1], 3, axis=2)
    assert np.array_equal(read_video(tmp_path / "gray.png", 1)[0][0], gray)


def test_a_broken_picture_and_one_of_more_than_8_bits(tmp_path):
    Image.fromarray(paint(0)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    fails(tmp_path / "half.png", "broken picture")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    fails(tmp_path / "deep.png", "more than 8 bits")
