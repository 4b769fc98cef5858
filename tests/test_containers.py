"""python -m pytest tests/test_containers.py -q

Films that are healthy and odd: packets that tell less than their frames, tables that are wrong,
unusual formats. Most are made here; a few exist only as the cases in ../shared/cases/video.
"""
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from runs import EVALUATE, alone, command, flags, metrics, question, write
from test_video import H, W, clip, fails, marked_frame, numbers, paint

import evaluate
from flow import VideoError
from plumbing import containers, mp4
from plumbing import film as films
from plumbing.containers import ffmpeg_log
from plumbing.ranks import say_once
from plumbing.video import open_file, read_video

CASES = Path(__file__).resolve().parent.parent.parent / "shared/cases/video"


def case(name):
    """The path of a case, or the test is skipped, which names it."""
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is not here")
    return CASES / name


def remux(source, target, change):
    """A copy of a film whose packets, a list, went through change()."""
    with av.open(str(source)) as film, av.open(str(target), "w") as out:
        stream = film.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in change([packet for packet in film.demux(stream) if packet.size]):
            packet.stream = copy
            out.mux(packet)
    return str(target)


def reads_alike(path, n):
    """The whole read, of n frames. Each frame on its own, the last one first, is the same."""
    video = open_file(path, 1000)
    everything = video.read(0, video.frames)
    assert len(everything) == n
    for lo in reversed(range(n)):
        assert np.array_equal(video.read(lo, lo + 1)[0], everything[lo]), lo
    return everything


# --------------------------------------------------------------------------------------------------
# seeks

def mark_all(packets):
    for packet in packets:
        packet.is_keyframe = True
    return packets


@pytest.mark.parametrize("bf", ["0", "2"])
@pytest.mark.parametrize("name", ["lies.mp4", "lies.mkv"])
def test_a_table_that_marks_frames_as_keys_which_are_none(tmp_path, name, bf):
    """The bug: such a seek decoded P-frames upon nothing, up to 255 grey levels off, silently."""
    path = remux(clip(tmp_path / "a.mp4", g="40", bf=bf), tmp_path / name, mark_all)
    assert numbers(reads_alike(path, 40)) == list(range(40))
    assert numbers(read_video(path, 1)[0]) == [20]


def test_a_real_film_whose_table_marks_frames_as_keys_which_are_none():
    path = case("MOV00006.3gp")
    frames, _ = read_video(path, 16)
    video = open_file(path, 16)
    for i in range(16):
        assert np.array_equal(video.read(i, i + 1)[0], frames[i])
    assert np.array_equal(read_video(path, 1)[0][0], read_video(path, 1000)[0][111])


@pytest.mark.parametrize("name, how", [
    ("a.ts", {}), ("a.mkv", {}), ("a.mp4", {}), ("h264.avi", {}), ("b.avi", dict(codec="mpeg4")),
    ("open.mp4", {"codec": "libx265", "x265-params": "log-level=none:keyint=8:open-gop=1:pools=1"}),
    ("open.ts", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    ("open.avi", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
], ids=lambda x: x if isinstance(x, str) else "")
def test_frames_far_apart_are_reached_by_seeks(tmp_path, monkeypatch, name, how):
    """The bugs: a transport stream sought by decoding times, and fell back to the start; an avi
    never sought; one seek was followed by decoding everything."""
    path = clip(tmp_path / name, pts=range(120), frames=[paint(i % 40) for i in range(120)], **how)
    everything, _ = read_video(path, 120)
    assert numbers(everything) == [i % 40 for i in range(120)]
    decoded = []
    real = films.Film.agrees
    monkeypatch.setattr(films.Film, "agrees", lambda film, place, *others: (
        decoded.append(place) or real(film, place, *others)))
    video = open_file(path, 4)
    assert np.array_equal(video.read(0, 4), everything[15::30])
    assert len(decoded) < 60 or name == "open.avi"         # of 106, which are decoded there
    decoded.clear()
    assert np.array_equal(video.read(3, 4)[0], everything[105])
    assert len(decoded) < 20 or name == "open.avi"


@pytest.mark.parametrize("codec, how", [
    ("mjpeg", dict(pix_fmt="yuvj420p", b="20000")), ("wmv2", dict(g="12", b="20000"))])
def test_small_frames_of_an_asf_share_their_place(tmp_path, codec, how):
    """A seek took the first frame of the place for the one that was wanted: frame 47 was 42."""
    frames = [np.full((H, W, 3), 30, np.uint8) for _ in range(60)]
    for i, frame in enumerate(frames):
        frame[i % (H - 8):i % (H - 8) + 8, i % (W - 8):i % (W - 8) + 8] = 255, 4 * i, 0
    path = clip(tmp_path / "a.asf", codec=codec, pts=range(60), frames=frames, **how)
    with av.open(path) as film:
        places = [packet.pos for packet in film.demux(film.streams.video[0]) if packet.size]
    assert len(set(places)) < len(places) == 60
    reads_alike(path, 60)


@pytest.mark.parametrize("bf", ["0", "2"])
def test_a_film_whose_last_packet_tells_no_place(tmp_path, bf):
    """A program stream was refused: its last packet comes from the parser, without a place."""
    path = clip(tmp_path / "a.mpg", codec="mpeg2video", rate=25, g="12", bf=bf, b="20000",
                frames=[paint(0)] * 40)
    with av.open(path) as film:
        *_, last = [packet for packet in film.demux(film.streams.video[0]) if packet.size]
    assert last.pos is None
    reads_alike(path, 40)


# --------------------------------------------------------------------------------------------------
# packets and frames that do not agree

def swapped(tmp_path, first):
    """A film of 40 frames: from `first` on every fourth one exchanges its time with the next."""
    def swap(packets):
        for packet in packets:
            packet.pts += 2 * packet.duration
        for i in range(first, 40, 4):
            packets[i].pts, packets[i + 1].pts = packets[i + 1].pts, packets[i].pts
        return packets

    return remux(clip(tmp_path / "a.mp4", bf="0"), tmp_path / "swapped.mp4", swap)


def test_frames_shown_in_another_order_than_their_times(tmp_path):
    path = swapped(tmp_path, 4)
    assert numbers(reads_alike(path, 40)) == list(range(40))
    assert read_video(path, 40)[1] == pytest.approx(0.1, rel=0.01)
    assert numbers(read_video(path, 5)[0]) == [4, 12, 20, 28, 36]


def test_frames_that_turn_out_to_be_in_another_order_late_in_a_film(tmp_path):
    """After the frames that are decoded at opening: slices that were read before stay right."""
    path = swapped(tmp_path, 24)
    video = open_file(path, 20)
    right = list(range(1, 40, 2))
    assert numbers(video.read(0, 5)) == right[:5]
    assert numbers(video.read(10, 20)) == right[10:]
    assert numbers(video.read(0, 20)) == right
    assert video.seconds == pytest.approx(0.2, rel=0.01)


def test_a_real_film_whose_frames_are_shown_in_another_order_than_their_times():
    frames = reads_alike(case("precise_clip.mp4"), 60)
    steps = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
    assert steps.max() < 15, "no frame jumps ahead and back"


def test_a_hidden_frame_in_a_packet_of_its_own(tmp_path):
    """The bug: "damaged, only 36 of 40 wanted frames". In a VP9 key frame, one bit hides it."""
    def hide(packets):
        shown = 0
        for i, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            hidden = packet.is_keyframe and i > 0
            if hidden:
                data[0] ^= 0b10
            copy = av.Packet(bytes(data))
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.pts = copy.dts = 100 * shown - hidden     # ms: a hidden frame takes no time
            shown += not hidden
            yield copy

    path = clip(tmp_path / "a.webm", codec="libvpx-vp9", g="8", deadline="realtime")
    path = remux(path, tmp_path / "hidden.mkv", hide)
    shown = [i for i in range(40) if i % 8 or i == 0]
    assert numbers(reads_alike(path, 36)) == shown
    frames, seconds = read_video(path, 4)
    assert numbers(frames) == shown[4::9] and seconds == pytest.approx(0.9, rel=0.01)


def test_a_real_film_with_hidden_frames_in_packets_of_their_own():
    path = case("roadtrip-vp92-10bit.webm")
    assert open_file(path, 1000).frames == 72 and open_file(path, 8).frames == 8
    frames, seconds = read_video(path, 1)
    assert seconds == pytest.approx(3.0, abs=0.01)
    assert np.array_equal(frames[0], read_video(path, 72)[0][35])


def test_empty_packets_mean_as_before():
    frames, seconds = read_video(case("RGB_Circles.ogv"), 1000)
    assert len(frames) == 135 and seconds * 135 == pytest.approx(145 / 60, abs=0.02)
    reads_alike(case("RGB_Circles.ogv"), 135)


@pytest.mark.parametrize("shift", ["again", "later", "earlier"])
def test_two_transport_streams_joined(tmp_path, shift):
    """The bug: "cut off or damaged", since the count of the packets jumps where they are joined."""
    first = Path(clip(tmp_path / "1.ts", pts=range(500, 520), frames=[paint(i) for i in range(20)]))
    starts = {"again": 500, "later": 50_000, "earlier": 0}[shift]
    second = Path(clip(tmp_path / "2.ts", pts=range(starts, starts + 20),
                       frames=[paint(i) for i in range(20, 40)]))
    path = tmp_path / "joined.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert numbers(reads_alike(path, 40)) == list(range(40))
    frames, seconds = read_video(path, 5)
    assert numbers(frames) == [4, 12, 20, 28, 36] and seconds == pytest.approx(0.8, rel=0.02)


def test_an_mp4_is_opened_by_its_tables_as_by_its_packets(tmp_path, monkeypatch):
    for name, how in [("a.mp4", {}), ("b.mov", dict(codec="prores", pix_fmt="yuv422p10le")),
                      ("late.mp4", dict(pts=range(50, 90))), ("bf.mp4", dict(bf="4", g="99")),
                      ("fast.mp4", dict(container={"movflags": "faststart"})),
                      ("vfr.mp4", dict(pts=[i * i for i in range(40)], base=Fraction(1, 10)))]:
        path = clip(tmp_path / name, **how)
        with containers.opened(path) as (container, stream):
            first = [packet for packet in list(container.demux(stream))[:16] if packet.size]
            tabled = containers.tabled_packets(path, stream, first)
        with monkeypatch.context() as patch, containers.opened(path) as (container, stream):
            patch.setattr(containers, "tabled_packets", lambda *others: None)
            packets = containers.read_packets(path, container, stream)
        for column, name in zip(tabled, ("pts", "dts", "duration", "pos", "key")):
            assert np.array_equal(column, getattr(packets, name)), (path, name)
    for name, blob in [("none", b""), ("short", b"\0\0\0\x10moov\0\0\0\x08trak")]:
        (tmp_path / name).write_bytes(blob)
        with pytest.raises((ValueError, KeyError)):
            mp4.time_tables(tmp_path / name, 1, 40)


def test_a_hole_in_a_transport_stream_is_damage(tmp_path):
    blob = Path(clip(tmp_path / "a.ts")).read_bytes()
    half = len(blob) // 188 // 2 * 188
    (tmp_path / "hole.ts").write_bytes(blob[:half] + blob[half + 3 * 188:])
    fails(tmp_path / "hole.ts", "damaged")


def test_a_film_in_fragments_that_is_cut_off(tmp_path):
    """The bug: cut inside a "moof", the header of a fragment, it was 16 frames without an error."""
    path = Path(clip(tmp_path / "a.mp4", container={"movflags": "frag_keyframe+empty_moov"}))
    moofs = [box for box in mp4.top_boxes(path) if box[0] == b"moof"]
    _, start, size = moofs[2]
    assert numbers(reads_alike(path, 40)) == list(range(40))
    path.write_bytes(path.read_bytes()[:start + size // 2])
    fails(path, "cut off or damaged, only 16 frames")


@pytest.mark.parametrize("name, how", [
    ("a.y4m", dict(codec="wrapped_avframe")), ("a.mxf", dict(codec="mpeg2video", rate=25))])
def test_films_without_checksums_that_are_cut_off(tmp_path, name, how):
    """The bug: the frames up to there were taken for the film."""
    path = Path(clip(tmp_path / name, **how))
    assert numbers(reads_alike(path, 40)) == list(range(40))
    with av.open(str(path)) as film:
        packet = [packet for packet in film.demux(video=0) if packet.size][30]
    path.write_bytes(path.read_bytes()[:packet.pos + packet.size // 2])
    fails(path, "cut off or damaged, only 3")               # an mxf counts the cut frame too


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_short_matroska_that_is_cut_off_while_ffmpeg_probes_it(tmp_path, share):
    """The bug: FFmpeg reads all of it at opening, where the log was not collected."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        s = out.add_stream("libx264", rate=10, options={"g": "8"})
        s.width, s.height, s.pix_fmt = W, H, "yuv420p"
        out.add_stream("aac", rate=44100)                  # without packets: FFmpeg looks for some
        for i in range(40):
            out.mux(s.encode(av.VideoFrame.from_ndarray(paint(i), "rgb24")))
        out.mux(s.encode())
    assert numbers(reads_alike(path, 40)) == list(range(40))
    blob = path.read_bytes()
    path.write_bytes(blob[:int(share * len(blob))])
    fails(path, "File ended prematurely")


@pytest.mark.parametrize("damage", ["cut", "cut between pages", "zeros"])
def test_a_real_ogg_that_is_cut_off_or_damaged(tmp_path, damage):
    """The bugs: half of it was 54 frames; with zeros in a page, 134 of 135."""
    blob = case("RGB_Circles.ogv").read_bytes()
    half = len(blob) // 2
    damaged = {
        "cut": blob[:half],
        "cut between pages": blob[:blob.rindex(b"OggS", 0, half)],
        "zeros": blob[:30_000] + bytes(40) + blob[30_040:],
    }
    (tmp_path / "a.ogv").write_bytes(damaged[damage])
    fails(tmp_path / "a.ogv", "cut off or damaged")


def test_a_damaged_header_of_an_ogg_or_matroska_is_an_error(tmp_path):
    """The log is collected twice there: by the file's opening, and to look for the format."""
    for start in (b"OggS", b"\x1a\x45\xdf\xa3"):
        (tmp_path / "a.mkv").write_bytes(start + bytes(999))
        fails(tmp_path / "a.mkv", "not decodable as video")


class Bits:
    """Writes the syntax elements of H.264."""

    def __init__(self):
        self.text = ""

    def u(self, value, n=1):
        self.text += f"{value:0{n}b}"

    def ue(self, *values):
        for value in values:
            code = f"{value + 1:b}"
            self.text += "0" * (len(code) - 1) + code

    def align(self):
        self.text += "0" * (-len(self.text) % 8)

    def unit(self, header):
        """-> a NAL unit with its start code"""
        self.text += "1"
        self.align()
        raw = int(self.text, 2).to_bytes(len(self.text) // 8, "big")
        body = bytearray()
        for byte in raw:
            if byte <= 3 and body[-2:] == b"\0\0":
                body.append(3)
            body.append(byte)
        return b"\0\0\0\1" + bytes([header]) + body


def field(number, bottom, grey):
    """A field of 64 x 32 pixels as uncompressed macroblocks; two make a frame."""
    bits = Bits()
    bits.ue(0, 7, 0)                                       # first macroblock, I, parameter set
    bits.u(number % 16, 4)
    bits.u(1)
    bits.u(bottom)
    is_idr = number == 0 and not bottom
    if is_idr:
        bits.ue(0)
        bits.u(0, 2)
    else:
        bits.u(0)
    bits.ue(0, 1)                                          # quantiser as it is, no deblocking
    for _ in range(4 * 2):
        bits.ue(25)
        bits.align()
        bits.text += f"{grey:08b}" * 256 + f"{128:08b}" * 128
    return bits.unit(0x65 if is_idr else 0x21)


def field_pictures(n):
    """H.264 of n frames of 64 x 64, each in two fields. -> list of 2 n access units"""
    parameters = Bits()
    parameters.u(77, 8)
    parameters.u(0, 8)
    parameters.u(30, 8)
    parameters.ue(0, 0, 2, 1)
    parameters.u(0)
    parameters.ue(3, 1)
    parameters.u(0b001, 3)                                 # fields, not adaptive, 8 x 8 inference
    parameters.u(0, 2)
    picture = Bits()
    picture.ue(0, 0)
    picture.u(0, 2)
    picture.ue(0, 0, 0)
    picture.u(0, 3)
    picture.ue(0, 0, 0)
    picture.u(0b100, 3)
    delimiter = b"\0\0\0\1\x09\x10"
    fields = []
    for i in range(n):
        for bottom in (0, 1):
            fields.append(delimiter + field(i, bottom, 40 + 4 * i))
    fields[0] = delimiter + parameters.unit(0x67) + picture.unit(0x68) + fields[0][len(delimiter):]
    return fields


@pytest.mark.parametrize("name", ["fields.ts", "fields.mkv", "fields.h264"])
def test_field_pictures_with_a_packet_a_field(tmp_path, name):
    """AVCHD. The bug: "damaged, only 20 of 40 wanted frames"."""
    fields = field_pictures(20)
    raw = tmp_path / "fields.h264"
    raw.write_bytes(b"".join(fields))
    if name != raw.name:
        with av.open(str(raw)) as film, av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream_from_template(film.streams.video[0])
            for i, unit in enumerate(fields):
                packet = av.Packet(unit)
                packet.stream = stream
                packet.time_base = Fraction(1, 50)
                packet.pts = packet.dts = i
                packet.duration = 1
                packet.is_keyframe = i == 0
                out.mux(packet)
    frames = reads_alike(tmp_path / name, 20)
    grey = [(40 + 4 * i - 16) * 255 / 219 for i in range(20)]
    assert np.abs(frames.mean((1, 2, 3)) - grey).max() < 1
    _, seconds = read_video(tmp_path / name, 4)
    assert seconds == pytest.approx(0.2, rel=0.03)


# --------------------------------------------------------------------------------------------------
# time

def test_the_last_frame_lasts_as_long_as_the_file_says(tmp_path):
    """In an mp4 a packet's duration is the time to the next one in the order of decoding. The bug:
    that of the frame shown last was taken, which is decoded before the frames just before it."""
    pts = [*range(0, 200, 10), *range(200, 220)]           # slow, then fast: 22 s in all
    path = clip(tmp_path / "a.mp4", pts=pts, base=Fraction(1, 10), bf="2", g="40", b_strategy="0")
    with av.open(path) as film:
        last = [packet for packet in film.demux(video=0) if packet.size][-1]
        assert last.duration * last.time_base == Fraction(1, 10)
    _, seconds = read_video(path, 1)
    assert seconds == pytest.approx(22, abs=0.01)


# --------------------------------------------------------------------------------------------------
# tags, formats, pixels

@pytest.mark.parametrize("name", ["tags.mp4", "tags.mkv"])
def test_tags_in_another_encoding(tmp_path, name):
    """The bug: a raw UnicodeDecodeError ended the run."""
    with av.open(str(tmp_path / name), "w") as out:
        out.metadata["title"] = out.metadata["comment"] = "Untranslatable"
        s = out.add_stream("libx264", rate=10)
        s.metadata["language"] = "deu"
        s.width, s.height, s.pix_fmt = W, H, "yuv420p"
        for i in range(5):
            out.mux(s.encode(av.VideoFrame.from_ndarray(paint(i), "rgb24")))
        out.mux(s.encode())
    path = tmp_path / name
    blob = path.read_bytes()
    assert b"Untranslatable" in blob
    path.write_bytes(blob.replace(b"Untranslatable", b"\xfe\xff\xc4ntranslatab\xe9"))
    assert numbers(read_video(path, 9)[0]) == list(range(5))


def test_a_real_film_with_tags_in_another_encoding():
    assert len(read_video(case("video_desks.3gp"), 1000)[0]) == 71


def test_any_error_is_the_files_own(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4")
    video = open_file(path, 4)

    def broken(frame, aspect):
        raise LookupError("of a class\nnobody knew")

    monkeypatch.setattr(films, "to_upright", broken)
    fails(path, "LookupError: of a class nobody knew")
    with pytest.raises(VideoError, match="a.mp4: cannot be read"):
        video.read(0, 2)


RAW = [
    ("a.h264", dict()),
    ("a.hevc", {"codec": "libx265", "x265-params": "log-level=none:keyint=8:pools=1"}),
    ("a.ivf", dict(codec="libvpx-vp9", g="8", deadline="realtime")),
    ("a.mxf", dict(codec="mpeg2video", rate=25)),
    ("a.mpg", dict(codec="mpeg2video", rate=25, bf="2")),
    ("a.m2v", dict(codec="mpeg2video", rate=25, bf="2")),
    ("a.nut", dict()),
]


@pytest.mark.parametrize("name, how", RAW, ids=[name for name, _ in RAW])
def test_more_formats(tmp_path, name, how):
    """The bug: "Invalid argument"."""
    path = clip(tmp_path / name, **how)
    assert numbers(reads_alike(path, 40)) == list(range(40))
    seconds = 40 / how.get("rate", 10)
    if name in ("a.h264", "a.hevc"):       # without times; x264 and x265 write the rate
        seconds = read_video(path, 1)[1]
    assert read_video(path, 5)[1] == pytest.approx(seconds / 5, rel=0.05)


def test_a_format_that_is_not_read_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.smjpeg"
    with av.open(str(path), "w", format="smjpeg") as out:
        s = out.add_stream("mjpeg", rate=10)
        s.width, s.height, s.pix_fmt = W, H, "yuvj420p"
        out.mux(s.encode(av.VideoFrame.from_ndarray(paint(0), "rgb24")))
        out.mux(s.encode())
    fails(path, "smjpeg")
    fails(path, "ffmpeg -i a.smjpeg -c copy video.mkv")
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nWords.\n\n")
    fails(tmp_path / "a.srt", "srt")


def test_of_several_videos_the_one_marked_as_default_is_shown(tmp_path):
    """The bug: the first one was, whatever the file says."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = []
        for default in (False, True):
            s = out.add_stream("libx264", rate=10, options={"bf": "0"})
            s.width, s.height, s.pix_fmt = W, H, "yuv420p"
            s.disposition = av.stream.Disposition.default if default else 0
            streams.append(s)
        for i in range(5):
            for j, s in enumerate(streams):
                out.mux(s.encode(av.VideoFrame.from_ndarray(paint(i + 10 * j), "rgb24")))
        for s in streams:
            out.mux(s.encode())
    assert numbers(reads_alike(path, 5)) == list(range(10, 15))


def test_a_name_with_a_colon_is_a_name(tmp_path):
    Path(clip(tmp_path / "a.mp4")).rename(tmp_path / "12:30.mp4")
    (tmp_path / "concat:a|b.mp4").write_bytes((tmp_path / "12:30.mp4").read_bytes())
    for name in ("12:30.mp4", "concat:a|b.mp4"):
        assert numbers(read_video(tmp_path / name, 5)[0]) == [4, 12, 20, 28, 36]


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix", b"msf1"])
def test_a_phones_heic_is_refused_with_what_to_do(tmp_path, brand):
    """The bug: it came back as one of its tiles."""
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(99))
    fails(tmp_path / "a.heic", "heif-convert")


@pytest.mark.parametrize("aspect, width", [(Fraction(2), 2 * W), (Fraction(3, 4), W * 3 // 4)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_that_are_not_square(tmp_path, name, aspect, width):
    path = str(tmp_path / name)
    with av.open(path, "w") as out:
        s = out.add_stream("libx264", rate=10, options={"g": "2"})
        s.width, s.height, s.pix_fmt = W, H, "yuv420p"
        s.codec_context.sample_aspect_ratio = aspect
        for _ in range(5):
            out.mux(s.encode(av.VideoFrame.from_ndarray(marked_frame(), "rgb24")))
        out.mux(s.encode())
    video = open_file(path, 9)
    assert (video.frames, video.height, video.width) == (5, H, width)
    shown = np.asarray(Image.fromarray(marked_frame()).resize((width, H)))
    assert np.abs(video.read(3, 4)[0].astype(int) - shown).mean() < 8


# --------------------------------------------------------------------------------------------------
# a run over all of it

@pytest.fixture
def faults(tmp_path):
    """-> (names of files that are named in place of an answer, names of those that are read)"""
    blob = Path(clip(tmp_path / "whole.mp4")).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(blob[:len(blob) // 2])
    stream = Path(clip(tmp_path / "whole.ts")).read_bytes()
    (tmp_path / "hole.ts").write_bytes(stream[:18800] + stream[18800 + 5 * 188:])
    (tmp_path / "joined.ts").write_bytes(stream + stream)
    (tmp_path / "tags.mp4").write_bytes(blob.replace(b"VideoHandler", b"Vid\xe9oHandle\xff"))
    (tmp_path / "notes.mp4").write_text("These are notes.\n" * 99)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (tmp_path / "words.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nWords.\n\n")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    Image.new("RGB", (2, 450)).save(tmp_path / "narrow.png")
    Image.new("I;16", (30, 40)).save(tmp_path / "deep.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    Image.new("RGB", (30, 40)).save(tmp_path / "sizes/1.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "sizes/2.png")
    remux(tmp_path / "whole.mp4", tmp_path / "lies.mp4", mark_all)
    (tmp_path / "fields.h264").write_bytes(b"".join(field_pictures(8)))
    named = ["cut.mp4", "hole.ts", "notes.mp4", "list.m3u8", "words.srt", "phone.heic",
             "narrow.png", "deep.png", "empty", "sizes", "missing.mp4"]
    return named, ["whole.mp4", "joined.ts", "tags.mp4", "lies.mp4", "fields.h264"]


@pytest.mark.parametrize("grade", [False, True], ids=["evaluate", "grade"])
def test_a_run_over_one_of_every_fault_ends_normally_and_names_each(
        run, faults, tmp_path, capsys, monkeypatch, grade):
    named, read = faults
    path = write(tmp_path / "q.jsonl", *[
        question(i, id=f"of-{name}", video=name) for i, name in enumerate(named + read)])
    how = {**run.how, "model": run.model, "eval_data": path, "eval_samples": 99, "max_pixels": 3136,
           "out_dir": str(tmp_path / "out")}
    if not grade:
        n = len(named + read)
        alone(**{**how, "data": path, "sft_steps": 1, "sft_batch": n, "rl_steps": 1,
                 "prompts_per_step": n, "oversample_cap": 1})
        said = capsys.readouterr().out
        for name in named:
            assert f"dropped of-{name}: {tmp_path / name}" in said, name
        for name in read:
            assert f"dropped of-{name}" not in said
        assert metrics(how["out_dir"], "rl")[-1]["dropped"] == len(named)
    options = {key: value for key, value in how.items() if hasattr(evaluate.Config, key)}
    if grade:
        options |= {"data": path, "grade": True}
    say_once.cache_clear()
    assert command(monkeypatch, EVALUATE, *flags(**options)) is None
    said = capsys.readouterr().out
    for name in named:
        fate = "not graded" if grade else "not evaluated"
        assert said.count(f"{fate} of-{name}: {tmp_path / name}") == 1, name
    for name in read:
        assert f"of-{name}" not in said


def test_threads_wait_only_for_the_log_that_they_need(tmp_path):
    """An mp4 is opened while another thread collects errors: only a matroska needs the log."""
    path = clip(tmp_path / "a.mp4")
    with ffmpeg_log():
        assert open_file(path, 3).frames == 3
