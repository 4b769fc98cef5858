"""python -m pytest tests/test_video.py -q

Films. Every clip is made here: the left half of frame i is gray, 20 + 5 i, so that a frame that is
read back tells its number. (tests/test_pictures.py has folders and single pictures.)
"""
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import data
from flow import VideoError
from plumbing import film as films
from plumbing.containers import ffmpeg_log
from plumbing.video import open_file, read_video

H, W = 48, 64
noise = np.random.default_rng(0).integers(0, 255, (H, W // 2, 3), dtype=np.uint8)


def paint(i):
    frame = np.empty((H, W, 3), np.uint8)
    frame[:, :W // 2] = 20 + 5 * i
    frame[:, W // 2:] = np.roll(noise, i, axis=0)          # each frame has bytes worth damaging
    return frame


def numbers(frames):
    return [round((f[8:-8, 8:24].mean() - 20) / 5) for f in frames]


def clip(path, codec="libx264", pts=range(40), rate=10, base=None, rotation=0, pix_fmt="yuv420p",
         frames=None, container=None, **options):
    """pts: of each frame, in units of base, which is the length of a frame by default."""
    if codec == "libx264":
        options = {"bf": "2", "g": "8", **options}
    with av.open(str(path), "w", options=container or {}) as out:
        s = out.add_stream(codec, rate=rate, options=options)
        s.width = W
        s.height = H
        s.pix_fmt = pix_fmt
        s.bit_rate = 2_000_000
        s.codec_context.thread_count = 1
        s.codec_context.time_base = Fraction(base or Fraction(1, rate))
        if rotation:
            s.set_display_rotation(rotation)
        for i, t in enumerate(pts):
            picture = paint(i) if frames is None else frames[i]
            f = av.VideoFrame.from_ndarray(picture, "rgb24")
            f.pts = t
            f.time_base = s.codec_context.time_base
            out.mux(s.encode(f))
        out.mux(s.encode())
    return str(path)


def fails(path, cause, frames=1000):
    """Reading raises an error of one line that names the file and the cause."""
    with pytest.raises(VideoError) as e:
        read_video(path, frames)
    text = str(e.value)
    assert str(path) in text and cause in text and "\n" not in text, text


# --------------------------------------------------------------------------------------------------
# containers

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
VP8 = {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "16"}
KINDS = [
    ("a.mp4", dict()),
    ("a.mkv", dict()),
    ("a.mov", dict()),
    ("a.ts", dict()),
    ("frag.mp4", dict(container=FRAGMENTED)),
    ("hevc.mp4", {"codec": "libx265", "x265-params": "log-level=none:keyint=8:pools=1"}),
    ("a.webm", dict(codec="libvpx-vp9", g="8", deadline="realtime")),
    ("vp8.webm", dict(codec="libvpx", g="8", **VP8)),
    ("a.avi", dict(codec="mpeg4")),
    ("b.avi", dict(codec="mpeg4", bf="2", g="8")),
    ("h264.avi", dict()),
    ("prores.mov", dict(codec="prores", pix_fmt="yuv422p10le")),
]


@pytest.mark.parametrize("name, how", KINDS, ids=[k[0] for k in KINDS])
def test_each_container_gives_every_frame_once_and_equal_slices(tmp_path, name, how):
    path = clip(tmp_path / name, **how)
    video = open_file(path, 100)
    assert (video.path, video.frames, video.height, video.width) == (path, 40, H, W)
    assert video.seconds == pytest.approx(0.1, rel=0.01)
    everything = video.read(0, 40)
    assert everything.shape == (40, H, W, 3) and everything.dtype == np.uint8
    assert numbers(everything) == list(range(40))
    for lo, hi in [(0, 1), (7, 9), (13, 14), (16, 33), (39, 40), (5, 5), (40, 40)]:
        assert np.array_equal(video.read(lo, hi), everything[lo:hi])
    some, seconds = read_video(path, 5)                    # the middles of five parts of 8 frames
    assert numbers(some) == [4, 12, 20, 28, 36] and seconds == pytest.approx(0.8, rel=0.01)
    assert np.array_equal(some, everything[4::8])
    few = open_file(path, 7)                               # 40 / 7 frames apart
    assert numbers(few.read(0, 7)) == [int((i + 0.5) * 40 / 7) for i in range(7)]
    assert np.array_equal(few.read(3, 6), few.read(0, 7)[3:6])


def test_a_film_is_opened_alike_through_data(tmp_path):
    """`data.open_video` and `data.read_video` hand a file on to here."""
    path = Path(clip(tmp_path / "a.mp4"))
    frames, seconds = read_video(path, 5)
    other_frames, other_seconds = data.read_video(path, 5)
    assert np.array_equal(frames, other_frames) and seconds == other_seconds
    video = data.open_video(path, 5)
    assert video.path == str(path)
    assert np.array_equal(video.read(1, 3), frames[1:3])


# --------------------------------------------------------------------------------------------------
# time

def test_variable_rate_is_even_in_time(tmp_path):
    """Frames 0 to 9 and the last are 0.1 s long, 10 to 13 last 1 s, 14 lasts 0.9 s: 6 s in all."""
    starts = [*range(10), 10, 20, 30, 40, 50, 59]
    path = clip(tmp_path / "v.mkv", pts=starts, base=Fraction(1, 10))
    frames, seconds = read_video(path, 6)
    assert numbers(frames) == [5, 10, 11, 12, 13, 14] and seconds == pytest.approx(1.0)
    frames, seconds = read_video(path, 16)                 # 16 parts of the time, not each once
    middles = (np.arange(16) + 0.5) * 60 / 16
    assert numbers(frames) == [sum(t <= m for t in starts) - 1 for m in middles]
    video = open_file(path, 16)
    assert np.array_equal(video.read(3, 11), frames[3:11])


def test_variable_rate_drop_of_frames_in_avi(tmp_path):
    """An avi marks a dropped frame by an empty chunk, which is time but decodes to nothing."""
    path = clip(tmp_path / "gap.avi", codec="mpeg4", pts=[0, 1, 2, 5, 6, 10, 11])
    frames, seconds = read_video(path, 4)                  # 12 ticks: middles 1.5, 4.5, 7.5, 10.5
    assert numbers(frames) == [1, 2, 4, 5] and seconds == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["o.mkv", "o.ts", "o.mp4"])
def test_stream_that_starts_late(tmp_path, name):
    path = clip(tmp_path / name, pts=range(50, 90))
    frames, seconds = read_video(path, 40)
    assert numbers(frames) == list(range(40)) and seconds == pytest.approx(0.1, rel=0.01)
    assert numbers(open_file(path, 8).read(5, 8)) == [27, 32, 37]


def test_no_frame_count_and_no_duration_in_the_header(tmp_path):
    path = clip(tmp_path / "live.webm", codec="libvpx-vp9", container={"live": "1"},
                deadline="realtime")
    with av.open(path) as c:
        assert c.duration is None and c.streams.video[0].frames == 0
    frames, seconds = read_video(path, 4)
    assert numbers(frames) == [5, 15, 25, 35] and seconds == pytest.approx(1.0, rel=0.01)


# --------------------------------------------------------------------------------------------------
# seeking

def test_decoding_begins_at_the_keyframe_before_the_first_wanted_frame(tmp_path, monkeypatch):
    """Keyframes are 8 frames apart, so that a late slice does not decode the film from its start.
    Where a seek finds nothing, as in a format without an index, that is done after all."""
    video = open_file(clip(tmp_path / "a.mkv"), 40)
    real = films.packets_from
    starts = []
    seek_works = True

    def packets_from(film, container, stream, number):
        starts.append(film.ids.tolist().index(number))
        if starts[-1] > 0 and not seek_works:
            return iter([])
        return real(film, container, stream, number)

    monkeypatch.setattr(films, "packets_from", packets_from)
    assert numbers(video.read(19, 21)) == [19, 20]
    assert starts == [0, 16]                               # 0: the first frame, and no more
    starts.clear()
    seek_works = False
    assert numbers(video.read(19, 21)) == [19, 20] and starts == [0, 16, 0]


def test_old_x264_444_is_read_right_after_a_seek(tmp_path):
    """A real 4:4:4 clip came out as garbage after a seek: x264 names its version in the first frame
    only, FFmpeg decodes versions before 151 differently, and a decoder that never saw the first
    frame takes the file for a new one.

    Here an old version is written over the new one: some frames then read differently, by luck
    without an error.
    """
    for qp in ["24", "5", "14", "20", "28"]:
        path = clip(tmp_path / "new.mp4", pix_fmt="yuv444p", qp=qp)
        blob = bytearray(Path(path).read_bytes())
        at = blob.index(b"x264 - core ") + len(b"x264 - core ")
        blob[at:at + 3] = b"142"
        (tmp_path / "old.mp4").write_bytes(blob)
        video = open_file(tmp_path / "old.mp4", 40)
        try:
            everything = video.read(0, 40)
        except VideoError:
            continue                                       # the wrong reading met impossible bits
        if not np.array_equal(everything[8:], read_video(path, 40)[0][8:]):
            break
    else:
        pytest.fail("no quality at which this x264 can be read both ways")
    for lo in range(40):
        assert np.array_equal(video.read(lo, lo + 1), everything[lo:lo + 1])


# --------------------------------------------------------------------------------------------------
# the right way up

CORNERS = {0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}   # of the mark, counter-clockwise


def marked_frame():
    frame = np.zeros((H, W, 3), np.uint8)
    frame[:H // 2, :W // 2] = 255                          # top left
    return frame


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation(tmp_path, turn):
    marked = marked_frame()
    path = clip(tmp_path / "r.mp4", pts=range(3), rotation=turn, frames=[marked] * 3)
    video = open_file(path, 3)
    assert (video.height, video.width) == ((H, W) if turn % 180 == 0 else (W, H))
    turned = np.rot90(marked, turn // 90)
    assert np.abs(video.read(1, 2)[0].astype(int) - turned).max() < 12
    down, right = CORNERS[turn]
    assert video.read(0, 1)[0, -1 if down else 0, -1 if right else 0].min() > 240


def with_matrix(path, matrix):
    """A film of `marked_frame` whose header has this display matrix."""
    clip(path, pts=range(3), frames=[marked_frame()] * 3)
    blob = bytearray(path.read_bytes())
    at = blob.index(b"tkhd") + 44                          # 36 bytes, big-endian 16.16
    unturned = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    assert blob[at:at + 36] == np.array(unturned, ">i4").tobytes()
    blob[at:at + 36] = np.array(matrix, ">i4").tobytes()
    path.write_bytes(blob)
    return path


@pytest.mark.parametrize("abcd, turned", [
    ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    ((1, 0, 0, -1), lambda frame: frame[::-1]),
    ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
    ((0, 0, 0, 0), lambda frame: frame),
    ((0.9, 0.4, -0.4, 0.9), lambda frame: frame),
    ((0.4, 0.9, -0.9, 0.4), lambda frame: np.rot90(frame, -1)),
], ids=["mirrored", "flipped", "transposed", "anti-transposed", "zeros", "24", "66"])
def test_a_matrix_that_is_no_quarter_turn(tmp_path, abcd, turned):
    """The bugs: mirrored and zeros came upside down, flipped and transposed wrong, 24 degrees and
    more turned by 90."""
    a, b, c, d = (int(value * (1 << 16)) for value in abcd)
    path = with_matrix(tmp_path / "a.mp4", [a, b, 0, c, d, 0, 0, 0, 1 << 30])
    frames, _ = read_video(path, 1)
    right = turned(marked_frame())
    assert frames[0].shape == right.shape
    assert np.abs(frames[0].astype(int) - right).max() < 12


def test_rotation_of_a_phone(tmp_path):
    """The matrix in the header itself, as a phone held upright writes it: (x, y) is shown at
    (-y, x), clockwise."""
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, H << 16, 0, 1 << 30]
    frames, _ = read_video(with_matrix(tmp_path / "phone.mp4", turned), 1)
    assert frames.shape == (1, W, H, 3)
    assert frames[0, 0, -1].min() > 240 and frames[0, -1, 0].max() < 15


# --------------------------------------------------------------------------------------------------
# errors

def test_errors_name_the_file_and_the_cause(tmp_path):
    fails(tmp_path / "none.mp4", "no such file")
    (tmp_path / "readme.md").write_text("# words\n" * 99)
    (tmp_path / "words.txt").write_text("words\n" * 99)    # FFmpeg would draw it as a video
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n"
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ["readme.md", "words.txt", "list.mp4", "empty.mp4"]:
        fails(tmp_path / name, "not decodable as video")
    with av.open(str(tmp_path / "song.m4a"), "w") as out:
        s = out.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 4096), np.float32)
        sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(s.encode(sound))
        out.mux(s.encode())
    fails(tmp_path / "song.m4a", "no video stream")


@pytest.mark.parametrize("name, codec, tag, other", [
    ("a.mp4", "libx264", b"avc1", b"abcd"),
    ("a.mp4", "libx264", b"avc1", b"encv"),
    ("a.mkv", "libx264", b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"),
    ("a.avi", "mpeg4", b"FMP4", b"ZZZZ"),
])
def test_a_codec_without_a_decoder_is_named_with_what_to_do(tmp_path, name, codec, tag, other):
    """The bug: "AttributeError: 'NoneType' object has no attribute 'thread_count'"."""
    path = Path(clip(tmp_path / name, codec=codec))
    path.write_bytes(path.read_bytes().replace(tag, other))
    fails(path, "no decoder here, or it is encrypted; convert it")


@pytest.mark.parametrize("frames", [0, -1])
def test_no_frames_are_refused_before_the_file_is_looked_at(tmp_path, frames):
    Image.fromarray(paint(0)).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path / "none.mp4"):
        for open_one in (open_file, data.open_video):
            with pytest.raises(ValueError, match="frames"):
                open_one(path, frames)


BROKEN = [
    ("a.mp4", dict(container={"movflags": "faststart"})),
    ("a.mkv", dict()),
    ("a.avi", dict(codec="mpeg4")),
    ("a.webm", dict(codec="libvpx-vp9", deadline="realtime")),
    ("a.gif", None),
    ("a.webp", None),
]
DAMAGES = ["cut in a frame", "cut between frames", "zeros in a frame", "zeros to the end"]
UNSEEN = [                                                 # no checksum, no trace
    ("a.gif", "zeros in a frame"),
    ("a.webp", "zeros in a frame"),
    ("a.webp", "zeros to the end"),
]
DAMAGED = [(name, how, damage) for name, how in BROKEN for damage in DAMAGES
           if (name, damage) not in UNSEEN]


@pytest.mark.parametrize("name, how, damage", DAMAGED)
def test_damage_in_the_middle_is_an_error(tmp_path, name, how, damage):
    path = tmp_path / name
    if how is not None:
        clip(path, **how)
    else:
        images = [Image.fromarray(paint(i)) for i in range(40)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    blob = path.read_bytes()
    if name == "a.webp":
        start, size = len(blob) // 2, 400
    else:
        with av.open(str(path)) as c:
            packet = [p for p in c.demux(video=0) if p.size][20]
            start, size = packet.pos, packet.size
    assert len(read_video(path, 1000)[0]) == 40            # before the damage
    damaged = {
        "cut in a frame": blob[:start + size // 2],
        "cut between frames": blob[:start],
        "zeros in a frame": blob[:start] + bytes(size) + blob[start + size:],
        "zeros to the end": blob[:start] + bytes(len(blob) - start),
    }
    path.write_bytes(damaged[damage])
    fails(path, "")


def test_wrong_bits_in_h264_are_an_error_also_when_that_frame_is_not_wanted(tmp_path):
    """FFmpeg patches the missing blocks from the neighbours and goes on; the frames built upon them
    look fine."""
    path = tmp_path / "a.mp4"
    clip(path, g="40")
    blob = bytearray(path.read_bytes())
    with av.open(str(path)) as c:
        packet = [p for p in c.demux(video=0) if p.size][20]
    middle = packet.pos + packet.size // 2
    blob[middle:middle + 20] = bytes(b ^ 0xA5 for b in blob[middle:middle + 20])
    path.write_bytes(blob)
    fails(path, "")
    with pytest.raises(VideoError):
        open_file(path, 8).read(5, 8)


HEVC = {"codec": "libx265", "x265-params": "log-level=none:keyint=40:pools=1"}


@pytest.mark.parametrize("number", [5, 20])
def test_a_frame_of_hevc_that_is_lost_is_an_error(tmp_path, number):
    """The bug: FFmpeg gives no frame for the packet and no error; the film was 5 or 39 frames."""
    path = Path(clip(tmp_path / "a.mp4", **HEVC))
    with av.open(str(path)) as c:
        packet = [p for p in c.demux(video=0) if p.size][number]
    blob = path.read_bytes()
    size = packet.size - 4
    start = packet.pos + 4
    path.write_bytes(blob[:start] + bytes(size) + blob[start + size:])
    fails(path, "damaged, only")


@pytest.mark.parametrize("name, how", [
    ("a.mkv", dict(bf="0")),
    ("a.mp4", {"codec": "libx265", "x265-params": "log-level=none:keyint=8:pools=1"}),
])
def test_a_film_without_one_of_its_key_packets_is_damaged(tmp_path, name, how):
    """The bug: the frames that cannot be decoded were replaced by earlier ones."""
    with av.open(clip(tmp_path / f"whole-{name}", **how)) as film:
        stream = film.streams.video[0]
        packets = [packet for packet in film.demux(stream) if packet.size]
        second = [packet for packet in packets if packet.is_keyframe][1]
        with av.open(str(tmp_path / name), "w") as out:
            copy = out.add_stream_from_template(stream)
            for packet in packets:
                packet.stream = copy
                if packet is not second:
                    out.mux(packet)
    fails(tmp_path / name, "damaged, only")


def test_ffmpeg_is_quiet_and_its_settings_are_given_back(tmp_path, capfd):
    path = clip(tmp_path / "a.mp4")
    capfd.readouterr()
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    read_video(path, 4)
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before
    assert capfd.readouterr().err == ""


def test_threads_that_collect_errors_do_not_lower_each_others_log_level():
    """The bug: the first to end put the level back, and the other missed that a film is cut off."""
    before = av.logging.get_level()
    first_inside, first_ended = threading.Event(), threading.Event()
    levels = []

    def first():
        with ffmpeg_log():
            first_inside.set()
            first_ended.wait(0.2)                          # meanwhile the second tries to enter
        first_ended.set()

    def second():
        first_inside.wait(10)
        with ffmpeg_log():
            first_ended.wait(10)
            levels.append(av.logging.get_level())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert levels == [av.logging.ERROR] and av.logging.get_level() == before
