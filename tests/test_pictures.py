"""python -m pytest tests/test_pictures.py -q

Folders of pictures, single pictures and animations, which are made here.
"""
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video import H, W, clip, fails, numbers, paint

import data
from flow import VideoError
from plumbing.pictures import list_pictures
from plumbing.ranks import say_once
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


def drawn_over(images, disposal):
    """What a browser shows of frames that are drawn over what is there. -> uint8 [n, 30, 40, 3]"""
    canvas = Image.new("RGBA", images[0].size, (0, 0, 0, 0))
    ground = Image.new("RGBA", images[0].size, "black")
    shown = []
    for image in images:
        before = canvas.copy()
        canvas = Image.alpha_composite(canvas, image)
        shown.append(np.asarray(Image.alpha_composite(ground, canvas).convert("RGB")))
        if disposal == 1:                                  # the background
            canvas = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
        if disposal == 2:                                  # the frame before
            canvas = before
    return np.stack(shown)


@pytest.mark.parametrize("disposal", [0, 1, 2])
@pytest.mark.parametrize("default", [False, True], ids=["", "default"])
def test_animated_png_is_shown_as_a_browser_does(tmp_path, disposal, default):
    """The bugs, through pillow: another picture under "dispose previous", and the default one, for
    viewers that do not animate, counted as a frame."""
    images, _ = squares(6)
    frames = [Image.fromarray(paint(0)).resize((40, 30)).convert("RGBA")] * default + images
    path = tmp_path / "a.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, blend=1,
                   disposal=disposal, default_image=default)
    expected = drawn_over(images, disposal)
    video = open_file(path, 9)
    everything = video.read(0, video.frames)
    assert np.array_equal(everything, expected)
    for lo in reversed(range(6)):
        assert np.array_equal(video.read(lo, lo + 1)[0], expected[lo])


def test_a_real_animated_png_under_dispose_previous():
    path = Path(__file__).resolve().parent.parent.parent / "shared/cases/video/iss634.apng"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    video = open_file(path, 1000)
    everything = video.read(0, 41)
    with av.open(str(path)) as film:
        shown = [frame.to_ndarray(format="rgba").astype(int) for frame in film.decode(video=0)]
    shown = [(rgba[..., :3] * rgba[..., 3:] + 127) // 255 for rgba in shown]
    assert np.array_equal(everything, shown)
    for lo in reversed(range(41)):
        assert np.array_equal(video.read(lo, lo + 1)[0], everything[lo])


def test_animated_avif_is_all_its_frames(tmp_path):
    """The bug: FFmpeg gave one."""
    images, expected = squares(5)
    path = tmp_path / "a.avif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=200, quality=100,
                   subsampling="4:4:4")
    video = open_file(path, 9)
    assert video.frames == 5 and video.seconds == pytest.approx(0.2)
    assert np.abs(video.read(0, 5).astype(int) - expected).max() <= 8
    assert np.array_equal(video.read(3, 4)[0], video.read(0, 5)[3])


def test_gif_of_equal_durations_gives_each_frame_once(tmp_path):
    images, expected = squares(5)
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=30, disposal=2)
    frames, seconds = read_video(path, 9)
    assert np.abs(frames.astype(int) - expected).max() <= 8 and seconds == pytest.approx(0.03)


def test_an_avif_that_is_cut_off_is_refused(tmp_path):
    """pillow or FFmpeg shows the first frame of such an animation, as if it were all."""
    images = [Image.fromarray(paint(i)) for i in range(8)]
    images[0].save(tmp_path / "a.avif", save_all=True, append_images=images[1:], duration=100)
    assert open_file(tmp_path / "a.avif", 8).frames == 8
    whole = (tmp_path / "a.avif").read_bytes()
    for share in (0.5, 0.7, 0.98):
        (tmp_path / "cut.avif").write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(VideoError, match="cut.avif: cut off"):
            read_video(tmp_path / "cut.avif", 8)


def test_the_pages_of_a_tiff_are_no_video(tmp_path):
    images = [Image.fromarray(paint(i)) for i in range(3)]
    images[0].save(tmp_path / "a.tiff", save_all=True, append_images=images[1:])
    frames, seconds = read_video(tmp_path / "a.tiff", 8)
    assert numbers(frames) == [0] and seconds == 1.0


# --------------------------------------------------------------------------------------------------
# folders

@pytest.mark.parametrize("names", [["x1", "x²", "x³"], ["٠", "١", "٢"], ["1", "a", "٢"]])
def test_digits_of_other_kinds_are_no_numbers(tmp_path, names):
    """Such a folder could not be read: "²".isdigit() is true, and int("²") an error."""
    for i, name in enumerate(names):
        Image.fromarray(paint(i)).save(tmp_path / f"{name}.png")
    assert numbers(read_video(tmp_path, 3)[0]) == [0, 1, 2]


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


def test_no_picture_of_a_folder_is_passed_over(tmp_path):
    """Pictures named .jfif and .jpe were left out in silence, as were those of other formats."""
    for i, name in enumerate(["1.jpg", "2.jfif", "3.JPE"]):
        Image.fromarray(paint(i)).save(tmp_path / name, format="JPEG", quality=95)
    assert numbers(read_video(tmp_path, 3)[0]) == [0, 1, 2]
    for name in ("2.gif", "0.heic", "9.TGA"):
        (tmp_path / name).write_bytes(b"x")
        fails(tmp_path, f"{name} is a picture of a format that is not read in a folder")
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["pipe.mp4", "folder/2.png"])
def test_a_pipe_is_refused(tmp_path, name):
    """It was waited for, for ever."""
    (tmp_path / "folder").mkdir()
    Image.fromarray(paint(0)).save(tmp_path / "folder/1.png")
    os.mkfifo(tmp_path / name)
    path = tmp_path / name.split("/")[0]
    with pytest.raises(VideoError, match=f"{name}: is not a regular file"):
        open_file(path, 2)
    with pytest.raises(VideoError, match=f"{name}: is not a regular file"):
        data.fingerprint(path)


def test_a_film_of_jpegs_is_a_film(tmp_path):
    """It was taken for one picture: its first frame was all of it."""
    path = clip(tmp_path / "a.mjpeg", codec="mjpeg", pix_fmt="yuvj420p", pts=range(5))
    assert numbers(read_video(path, 5)[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 9, 65535])
def test_the_size_of_a_turned_picture(tmp_path, name, orientation):
    """A turned tiff was refused, since pillow had exchanged its sides already; and so was any
    picture with a number that has no meaning, which viewers ignore."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(paint(3)).save(tmp_path / name, exif=exif)
    frames, _ = read_video(tmp_path / name, 1)
    turned = orientation in (6, 8)
    assert frames.shape == ((1, W, H, 3) if turned else (1, H, W, 3))
    if name in ("a.tif", "a.png"):
        quarters = {3: 2, 6: 3, 8: 1}.get(orientation, 0)  # counter-clockwise
        assert np.array_equal(frames[0], np.rot90(paint(3), quarters))


def test_folder_of_two_sizes_or_with_a_broken_picture(tmp_path):
    (tmp_path / "sizes").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sizes/1.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "sizes/2.png")
    with pytest.raises(VideoError, match=r"2\.png.*differ"):
        open_file(tmp_path / "sizes", 2)
    (tmp_path / "sizes/2.png").write_text("no picture")
    with pytest.raises(VideoError, match=r"2\.png.*broken"):
        open_file(tmp_path / "sizes", 2)


def test_the_rate_of_a_folder_is_its_samples(tmp_path, capsys):
    """The bug: always one picture a second, silently, so that times were off ten times."""
    folder = tmp_path / "clips/bird"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(paint(i)).save(folder / f"{i}.png")
    record = {"video": "clips/bird", "question": "How many?", "answer": "2"}
    rates = [{"fps": 10}, {}, {"fps": 0.5}, {"fps": 10.0}]
    lines = [json.dumps(record | rate) for rate in rates]
    lines.append(json.dumps(record | {"video": "clips/bird.mp4", "fps": 10}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    *samples, film = data.load(str(tmp_path / "q.jsonl"))
    assert film.video == str(tmp_path / "clips/bird.mp4")  # a film knows its times
    seconds = [data.open_video(sample.video, 4).seconds for sample in samples]
    assert seconds == pytest.approx([0.3, 3, 6, 0.3])
    assert numbers(data.read_video(samples[0].video, 4)[0]) == [1, 4, 7, 10]
    capsys.readouterr()
    say_once.cache_clear()
    for _ in range(2):
        read_video(folder, 4)
    assert capsys.readouterr().out.count('no field "fps"') == 1

    contents = [data.fingerprint(sample.video) for sample in samples]
    assert contents[0] == contents[3] and len(set(contents)) == 3      # seconds are cached too
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):             # all on one side
        assert len({data.is_held_out(sample.video, fraction) for sample in samples}) == 1


@pytest.mark.parametrize("fps", [0, -1, "ten", True, float("inf"), [10], 1e-320, 1e300])
def test_a_rate_that_is_none_is_refused(tmp_path, fps):
    (tmp_path / "bird").mkdir()
    record = {"video": "bird", "question": "How many?", "answer": "2", "fps": fps}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="q.jsonl, line 1: .*fps"):
        data.load(str(tmp_path / "q.jsonl"))


def test_a_folder_whose_name_ends_like_a_rate(tmp_path):
    (tmp_path / "bird@10fps").mkdir()
    for i in range(4):
        Image.fromarray(paint(i)).save(tmp_path / f"bird@10fps/{i}.png")
    assert open_file(tmp_path / "bird@10fps", 4).seconds == 1.0
    assert open_file(f"{tmp_path / 'bird@10fps'}@4fps", 4).seconds == 0.25
    for rate in ("10", ".", "1.2.3", "1e999", "1e-320", "0"):
        fails(tmp_path / f"gone@{rate}fps", "no such file or folder")


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


@pytest.mark.parametrize("size", [(2, 450), (450, 2), (1, 201)])
def test_a_picture_too_narrow_for_a_model_is_an_error_of_its_own(tmp_path, size):
    """The bug: it ended the run, unnamed, and again at every restart."""
    Image.new("RGB", size).save(tmp_path / "narrow.png")
    fails(tmp_path / "narrow.png", "differ more than 200 times")
    Image.new("RGB", (1, 200)).save(tmp_path / "just.png")
    assert read_video(tmp_path / "just.png", 1)[0].shape == (1, 200, 1, 3)


def test_a_broken_picture_and_one_of_more_than_8_bits(tmp_path):
    Image.fromarray(paint(0)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    fails(tmp_path / "half.png", "broken picture")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    fails(tmp_path / "deep.png", "more than 8 bits")
