# python -m pytest tests/test_video.py -q
# Every clip is made here. Frame i carries gray level 20 + 5 i in its left half, so a frame read back tells its number.
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data import VideoError, open_video, read_video

H, W = 48, 64
noise = np.random.default_rng(0).integers(0, 255, (H, W // 2, 3), dtype=np.uint8)

def paint(i):
    frame = np.empty((H, W, 3), np.uint8)
    frame[:, :W // 2] = 20 + 5 * i
    frame[:, W // 2:] = np.roll(noise, i, axis=0)   # so that every frame has bytes worth damaging
    return frame

def numbers(frames):
    return [round((f[8:-8, 8:24].mean() - 20) / 5) for f in frames]

def clip(path, codec="libx264", pts=range(40), rate=10, base=None, rotation=0, pix_fmt="yuv420p", frames=None,
         container={}, **options):
    """`pts`: of each frame, in units of `base` (default: one frame)"""
    if codec == "libx264":
        options = {"bf": "2", "g": "8", **options}
    with av.open(str(path), "w", options=container) as out:
        s = out.add_stream(codec, rate=rate, options=options)
        s.width, s.height, s.pix_fmt, s.bit_rate, s.codec_context.thread_count = W, H, pix_fmt, 2_000_000, 1
        s.codec_context.time_base = Fraction(base or Fraction(1, rate))
        if rotation:
            s.set_display_rotation(rotation)
        for i, t in enumerate(pts):
            f = av.VideoFrame.from_ndarray(paint(i) if frames is None else frames[i], "rgb24")
            f.pts, f.time_base = t, s.codec_context.time_base
            out.mux(s.encode(f))
        out.mux(s.encode())
    return str(path)

KINDS = [("a.mp4", dict()), ("a.mkv", dict()), ("a.mov", dict()), ("a.ts", dict()),
         ("frag.mp4", dict(container={"movflags": "frag_keyframe+empty_moov"})),
         ("hevc.mp4", dict(codec="libx265", **{"x265-params": "log-level=none:keyint=8:pools=1"})),
         ("a.webm", dict(codec="libvpx-vp9", g="8", deadline="realtime")),
         ("vp8.webm", dict(codec="libvpx", g="8", deadline="realtime", **{"auto-alt-ref": "1", "lag-in-frames": "16"})),
         ("a.avi", dict(codec="mpeg4")), ("b.avi", dict(codec="mpeg4", bf="2", g="8")), ("h264.avi", dict()),
         ("prores.mov", dict(codec="prores", pix_fmt="yuv422p10le"))]

@pytest.mark.parametrize("name, how", KINDS, ids=[k[0] for k in KINDS])
def test_each_container_gives_every_frame_once_and_equal_slices(tmp_path, name, how):
    path = clip(tmp_path / name, **how)
    video = open_video(path, 100)
    assert (video.path, video.frames, video.height, video.width) == (path, 40, H, W)
    assert video.seconds == pytest.approx(0.1, rel=0.01)
    everything = video.read(0, 40)
    assert everything.shape == (40, H, W, 3) and everything.dtype == np.uint8
    assert numbers(everything) == list(range(40))
    for lo, hi in [(0, 1), (7, 9), (13, 14), (16, 33), (39, 40), (5, 5), (40, 40)]:
        assert np.array_equal(video.read(lo, hi), everything[lo:hi])
    some, seconds = read_video(path, 5)             # the middles of five parts of eight frames
    assert numbers(some) == [4, 12, 20, 28, 36] and seconds == pytest.approx(0.8, rel=0.01)
    assert np.array_equal(some, everything[4::8])
    few = open_video(path, 7)                       # 40 / 7 frames apart
    assert numbers(few.read(0, 7)) == [int((i + 0.5) * 40 / 7) for i in range(7)]
    assert np.array_equal(few.read(3, 6), few.read(0, 7)[3:6])

def test_variable_rate_is_even_in_time(tmp_path):
    # frames 0 .. 9 and the last are 0.1 s long, 10 .. 13 last 1 s, 14 lasts 0.9 s: 6 s in all
    starts = [*range(10), 10, 20, 30, 40, 50, 59]
    path = clip(tmp_path / "v.mkv", pts=starts, base=Fraction(1, 10))
    frames, seconds = read_video(path, 6)
    assert numbers(frames) == [5, 10, 11, 12, 13, 14] and seconds == pytest.approx(1.0)
    frames, seconds = read_video(path, 16)          # 16 parts of the time, not each frame once
    middles = (np.arange(16) + 0.5) * 60 / 16
    assert numbers(frames) == [sum(t <= m for t in starts) - 1 for m in middles]
    video = open_video(path, 16)
    assert np.array_equal(video.read(3, 11), frames[3:11])

def test_variable_rate_drop_of_frames_in_avi(tmp_path):
    """an avi marks a dropped frame by an empty chunk, which counts as time and decodes to nothing"""
    path = clip(tmp_path / "gap.avi", codec="mpeg4", pts=[0, 1, 2, 5, 6, 10, 11])
    frames, seconds = read_video(path, 4)           # 12 ticks: the middles are 1.5, 4.5, 7.5, 10.5
    assert numbers(frames) == [1, 2, 4, 5] and seconds == pytest.approx(0.3)

@pytest.mark.parametrize("name", ["o.mkv", "o.ts", "o.mp4"])
def test_stream_that_starts_late(tmp_path, name):
    path = clip(tmp_path / name, pts=range(50, 90))
    frames, seconds = read_video(path, 40)
    assert numbers(frames) == list(range(40)) and seconds == pytest.approx(0.1, rel=0.01)
    assert numbers(open_video(path, 8).read(5, 8)) == [27, 32, 37]

def test_no_frame_count_and_no_duration_in_the_header(tmp_path):
    path = clip(tmp_path / "live.webm", codec="libvpx-vp9", container={"live": "1"}, deadline="realtime")
    with av.open(path) as c:
        assert c.duration is None and c.streams.video[0].frames == 0
    frames, seconds = read_video(path, 4)
    assert numbers(frames) == [5, 15, 25, 35] and seconds == pytest.approx(1.0, rel=0.01)

def test_old_x264_444_is_read_right_after_a_seek(tmp_path):
    """A real 4:4:4 clip came out as garbage after a seek: x264 names its version in the first frame only, FFmpeg
    decodes versions before 151 differently, and a decoder that never saw the first frame takes the file for a new one.
    Here an old version is written over the new one: some frames then read differently, by luck without an error."""
    for qp in ["24", "5", "14", "20", "28"]:
        path = clip(tmp_path / "new.mp4", pix_fmt="yuv444p", qp=qp)
        data = bytearray(open(path, "rb").read())
        at = data.index(b"x264 - core ") + len(b"x264 - core ")
        data[at:at + 3] = b"142"
        (tmp_path / "old.mp4").write_bytes(data)
        video = open_video(tmp_path / "old.mp4", 40)
        try:
            everything = video.read(0, 40)
        except VideoError:
            continue                                # the wrong reading met impossible bits: the next quality
        if not np.array_equal(everything[8:], read_video(path, 40)[0][8:]):
            break
    else:
        pytest.fail("no quality at which this x264 can be read both ways")
    for lo in range(40):
        assert np.array_equal(video.read(lo, lo + 1), everything[lo:lo + 1])

CORNERS = {0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}   # of the mark, after a counter-clockwise turn

@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation(tmp_path, turn):
    marked = np.zeros((H, W, 3), np.uint8)
    marked[:H // 2, :W // 2] = 255                  # top left
    path = clip(tmp_path / "r.mp4", pts=range(3), rotation=turn, frames=[marked] * 3)
    video = open_video(path, 3)
    assert (video.height, video.width) == ((H, W) if turn % 180 == 0 else (W, H))
    assert np.abs(video.read(1, 2)[0].astype(int) - np.rot90(marked, turn // 90)).max() < 12
    down, right = CORNERS[turn]
    assert video.read(0, 1)[0, -1 if down else 0, -1 if right else 0].min() > 240

def test_rotation_of_a_phone(tmp_path):
    """the matrix in the header itself, as a phone held upright writes it: (x, y) is shown at (-y, x), clockwise"""
    marked = np.zeros((H, W, 3), np.uint8)
    marked[:H // 2, :W // 2] = 255
    path = clip(tmp_path / "phone.mp4", pts=range(3), frames=[marked] * 3)
    data = bytearray(open(path, "rb").read())
    at = data.index(b"tkhd") + 44                   # 36 bytes, big-endian 16.16
    assert data[at:at + 36] == np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data[at:at + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, H << 16, 0, 1 << 30], ">i4").tobytes()
    open(path, "wb").write(data)
    frames, _ = read_video(path, 1)
    assert frames.shape == (1, W, H, 3) and frames[0, 0, -1].min() > 240 and frames[0, -1, 0].max() < 15

def squares(n, mode="RGBA"):
    """a red square that moves over a transparent ground, and what it looks like on black"""
    images = []
    for i in range(n):
        images.append(Image.new("RGBA", (40, 30), (255, 255, 255, 0)))
        images[i].paste((250, 40 * i, 50, 255), (4 * i, 5, 4 * i + 10, 20))
    black = [Image.alpha_composite(Image.new("RGBA", (40, 30), "black"), x).convert("RGB") for x in images]
    return images, np.stack([np.asarray(x) for x in black])

@pytest.mark.parametrize("name, options", [("a.gif", dict(disposal=2)), ("a.webp", dict(lossless=True)), ("a.png", {})])
def test_animated_picture_keeps_its_durations(tmp_path, name, options):
    images, expected = squares(5)
    path = tmp_path / name
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 200, 400, 100, 200], **options)
    video = open_video(path, 4)                     # 1 s: the middles are .125 .375 .625 .875, starts 0 .1 .3 .7 .8
    assert video.frames == 4 and video.seconds == pytest.approx(0.25)
    everything = video.read(0, 4)
    assert np.abs(everything.astype(int) - expected[[1, 2, 2, 4]]).max() <= 8     # a gif has 256 colours
    for lo in range(4):
        assert np.array_equal(video.read(lo, 4), everything[lo:])

def test_gif_of_equal_durations_gives_each_frame_once(tmp_path):
    images, expected = squares(5)
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=30, disposal=2)
    frames, seconds = read_video(tmp_path / "a.gif", 9)
    assert np.abs(frames.astype(int) - expected).max() <= 8 and seconds == pytest.approx(0.03)

def test_folder_in_natural_order(tmp_path):
    for i in range(12):
        Image.fromarray(paint(i)).save(tmp_path / f"frame_{i}.png")
    for other in ["notes.txt", ".frame_3.png", "._frame_4.PNG"]:
        (tmp_path / other).write_text("no picture")
    frames, seconds = read_video(tmp_path, 100)
    assert np.array_equal(frames, np.stack([paint(i) for i in range(12)])) and seconds == 1.0
    video = open_video(str(tmp_path), 3)
    assert numbers(video.read(0, 3)) == [2, 6, 10] and video.seconds == 4.0
    assert numbers(video.read(1, 2)) == [6]

def test_picture(tmp_path):
    Image.fromarray(paint(3)).save(tmp_path / "a.png")
    frames, seconds = read_video(tmp_path / "a.png", 8)
    assert np.array_equal(frames, paint(3)[None]) and seconds == 1.0

    exif = Image.Exif()
    exif[0x0112] = 6                                # to be turned clockwise
    Image.fromarray(paint(3)).save(tmp_path / "turned.png", exif=exif)
    video = open_video(tmp_path / "turned.png", 1)
    assert (video.height, video.width) == (W, H) and np.array_equal(video.read(0, 1)[0], np.rot90(paint(3), -1))

    images, expected = squares(2)
    images[1].save(tmp_path / "clear.png")
    assert np.array_equal(read_video(tmp_path / "clear.png", 1)[0][0], expected[1])
    images[1].save(tmp_path / "palette.gif")        # a palette with a transparent entry; through PyAV
    assert np.array_equal(read_video(tmp_path / "palette.gif", 1)[0][0], expected[1])
    assert open_video(tmp_path / "palette.gif", 1).seconds == 1.0
    images[1].quantize(8).save(tmp_path / "palette.png")
    assert np.array_equal(read_video(tmp_path / "palette.png", 1)[0][0], expected[1])
    Image.fromarray(paint(3)[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(read_video(tmp_path / "gray.png", 1)[0][0], np.repeat(paint(3)[..., :1], 3, axis=2))

def fails(path, cause, frames=1000):
    with pytest.raises(VideoError) as e:
        read_video(path, frames)
    assert str(path) in str(e.value) and cause in str(e.value) and "\n" not in str(e.value), str(e.value)

def test_errors_name_the_file_and_the_cause(tmp_path):
    fails(tmp_path / "none.mp4", "no such file")
    fails(tmp_path, "no pictures")
    (tmp_path / "readme.md").write_text("# words\n" * 99)
    (tmp_path / "words.txt").write_text("words\n" * 99)         # FFmpeg would draw it as a video
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ["readme.md", "words.txt", "list.mp4", "empty.mp4"]:
        fails(tmp_path / name, "not decodable as video")
    with av.open(str(tmp_path / "song.m4a"), "w") as out:
        s = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(s.encode(sound))
        out.mux(s.encode())
    fails(tmp_path / "song.m4a", "no video stream")
    Image.fromarray(paint(0)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    fails(tmp_path / "half.png", "broken picture")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    fails(tmp_path / "deep.png", "more than 8 bits")
    for frames in [0, -1]:
        with pytest.raises(ValueError, match="frames"):
            open_video(tmp_path / "a.png", frames)

def test_folder_of_two_sizes_or_with_a_broken_picture(tmp_path):
    (tmp_path / "sizes").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sizes/1.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "sizes/2.png")
    with pytest.raises(VideoError, match=r"2\.png.*differ"):
        open_video(tmp_path / "sizes", 2)
    (tmp_path / "sizes/2.png").write_text("no picture")
    with pytest.raises(VideoError, match=r"2\.png.*broken"):
        open_video(tmp_path / "sizes", 2)

BROKEN = [("a.mp4", dict(container={"movflags": "faststart"})), ("a.mkv", dict()), ("a.avi", dict(codec="mpeg4")),
          ("a.webm", dict(codec="libvpx-vp9", deadline="realtime")), ("a.gif", None), ("a.webp", None)]
DAMAGES = ["cut in a frame", "cut between frames", "zeros in a frame", "zeros to the end"]
UNSEEN = [("a.gif", "zeros in a frame"), ("a.webp", "zeros in a frame"), ("a.webp", "zeros to the end")]    # no checksum, no trace

@pytest.mark.parametrize("name, how, damage", [(*b, d) for b in BROKEN for d in DAMAGES if (b[0], d) not in UNSEEN])
def test_damage_in_the_middle_is_an_error(tmp_path, name, how, damage):
    path = tmp_path / name
    if how is not None:
        clip(path, **how)
    else:
        images = [Image.fromarray(paint(i)) for i in range(40)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    data = path.read_bytes()
    if name == "a.webp":
        start, size = len(data) // 2, 400
    else:
        with av.open(str(path)) as c:
            packet = [p for p in c.demux(video=0) if p.size][20]
            start, size = packet.pos, packet.size
    assert len(read_video(path, 1000)[0]) == 40     # before the damage
    path.write_bytes({"cut in a frame": data[:start + size // 2],
                      "cut between frames": data[:start],
                      "zeros in a frame": data[:start] + bytes(size) + data[start + size:],
                      "zeros to the end": data[:start] + bytes(len(data) - start)}[damage])
    fails(path, "")

def test_wrong_bits_in_h264_are_an_error_also_when_that_frame_is_not_wanted(tmp_path):
    """FFmpeg patches the missing blocks from the neighbours and goes on; the frames built upon them look fine"""
    path = tmp_path / "a.mp4"
    clip(path, g="40")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as c:
        packet = [p for p in c.demux(video=0) if p.size][20]
    middle = packet.pos + packet.size // 2
    data[middle:middle + 20] = bytes(b ^ 0xA5 for b in data[middle:middle + 20])
    path.write_bytes(data)
    fails(path, "")
    with pytest.raises(VideoError):
        open_video(path, 8).read(5, 8)

def test_quiet_on_stderr(tmp_path, capfd):
    path = clip(tmp_path / "a.mp4")
    capfd.readouterr()
    read_video(path, 4)
    assert capfd.readouterr().err == ""
