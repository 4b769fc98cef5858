"""
What a question about a video is, how real video is read, and the videos that are built in.

    load            questions from a .jsonl, from LongVideo-Reason's .json, or "toy" and "toy:A,B"
    open_video      any usual file, folder of pictures or picture; pixels are read when asked for, a few at a time
    fingerprint     the content of a video, whatever its name
    Ahead           reads the next videos in a thread while others are computed with
    toy_story       the built-in videos: what happens, a question, the right reasoning, a teacher's imperfect one

    python data.py    draws assets/toy.png, a sheet of built-in videos with their questions, thoughts and answers
"""
import atexit
import hashlib
import itertools
import json
import os
import random
import re
import threading
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable

import av
import numpy as np
from PIL import Image, ImageOps

from flow import Sample, Video, VideoError


def taught_text(sample, think=True):
    """What the cold start teaches: the thought, or an empty one, and the answer that it comes to."""
    return f"<think>{sample.thought * think}</think><answer>{sample.taught or sample.answer}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# questions

def load(source, video_dir=""):
    """-> list of `Sample`. source: "toy" or "toy:A,B" (`toy_samples`), a .jsonl of `Sample`, LongVideo-Reason's .json.

    Video paths are taken relative to video_dir, or else to the file. A sample without a domain is "choice" if its answer
    is one letter and the question lists options, "count" if it is an integer, else "open"; one without an id is named
    after its place in the file. Raises ValueError that names the file, the line and what is wrong with it.
    """
    if source == "toy" or source.startswith("toy:"):
        return toy_samples(source)
    if not os.path.isfile(source):
        raise ValueError(f'{source}: no such file; data is a .jsonl, a .json in LongVideo-Reason\'s form, or "toy"')
    base, samples, seen = video_dir or os.path.dirname(source), [], {}
    for where, record in read_records(source):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with the fields of a sample, found {type(record).__name__}")
        if "problem" in record or "problem_id" in record:
            record = from_longvideo_reason(record, where)
        for field, value in record.items():
            if field in Sample.__dataclass_fields__ and not isinstance(value, (str, int, float, type(None))):
                raise ValueError(f"{where}: {field!r} is a {type(value).__name__}, expected text")
        fields = {k: str(record[k]).strip() for k in Sample.__dataclass_fields__
                  if record.get(k) is not None}
        for field in ("question", "answer", "video"):
            if not fields.get(field):
                raise ValueError(f"{where}: {'an empty' if field in fields else 'no'} {field!r}")
        if not fields["video"].startswith("toy:"):
            fields["video"] = os.path.join(base, fields["video"])
        sample = Sample(**{"id": f"{os.path.basename(source)}-{len(samples)}", "domain": "", "thought": "", **fields})
        sample.domain = sample.domain or guess_domain(sample)
        if sample.id in seen:
            raise ValueError(f"{where}: id {sample.id!r} was already used at {seen[sample.id]}; ids must be unique")
        seen[sample.id] = where
        samples.append(sample)
    if not samples:
        raise ValueError(f"{source}: no samples in it")
    return samples


def read_records(source):
    """Yields (where, record) of a .jsonl or .json file; where is "file, line 3" or "file, item 3"."""
    with open(source, encoding="utf-8") as f:
        try:
            if source.endswith(".json"):
                records = json.load(f)
                if not isinstance(records, list):
                    raise ValueError(f"{source}: expected a list of samples, found {type(records).__name__}")
                yield from ((f"{source}, item {i}", r) for i, r in enumerate(records))
            else:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield f"{source}, line {number}", json.loads(line)
        except json.JSONDecodeError as e:
            number = e.lineno if source.endswith(".json") else number
            raise ValueError(f"{source}, line {number}: not JSON ({e.msg}, column {e.colno})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{source}: not UTF-8 text") from None


def from_longvideo_reason(record, where):
    """LongVideo-Reason's item as ours: its answer comes inside <answer> tags, its video may come as a list of one."""
    for field in ("problem_id", "videos", "problem", "answer"):
        if field not in record:
            raise ValueError(f"{where}: no {field!r}")
    videos = record["videos"]
    if isinstance(videos, list):
        if len(videos) != 1:
            raise ValueError(f"{where}: {len(videos)} videos; a sample is about one")
        videos = videos[0]
    answer = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", str(record["answer"]), re.DOTALL)
    return {"id": record["problem_id"], "question": record["problem"], "video": videos,
            "answer": answer[1] if answer else record["answer"], "thought": record.get("reasoning")}


def guess_domain(sample):
    if re.fullmatch(r"[A-Za-z]", sample.answer) and re.search(r"(^|[\s(])B[).:]\s*\S", sample.question):
        return "choice"
    return "count" if re.fullmatch(r"[+-]?\d+", sample.answer) else "open"


def split(samples, part=0.05):
    """-> (train, held out). By a hash of the video, so that no video is on both sides, whatever else is in the data."""
    def held(sample):
        toy = re.match(r"toy:(?:[a-z]+-)?0*(\d+)", sample.video)                  # toy:long-7 is the story of toy:7
        name = f"toy:{toy[1]}" if toy else os.path.basename(os.path.normpath(sample.video))
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < part * 2 ** 32

    return [s for s in samples if not held(s)], [s for s in samples if held(s)]


# ---------------------------------------------------------------------------------------------------------------------
# video: file or folder -> uint8 frames. What pillow knows is a picture (or an animated webp or png, which
# FFmpeg cannot decode), everything else goes to PyAV. Suffixes count only inside a folder, to skip notes and the like.

PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# without this list FFmpeg also draws text files as video and lets a playlist open other files
FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg,asf,mp3,wav"
# a broken picture: pillow raises the last three from inside webp, png and oversized files
PICTURE_ERRORS = (OSError, EOFError, SyntaxError, Image.DecompressionBombError)


def open_video(path, frames):
    """-> `Video`. path: a film, a folder of pictures, a picture, or "toy:SEED"; frames: how many at most, evenly spaced
    in time. Raises VideoError, which names the file and the cause; ValueError for frames below 1."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = os.fspath(path)
    if path.startswith("toy:"):
        return open_toy(path, frames)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    if os.path.isdir(path):
        return open_folder(path, frames)
    try:
        image = Image.open(path, formats=PICTURES)
    except Image.UnidentifiedImageError:
        return open_stream(path, frames)
    except PICTURE_ERRORS as e:
        raise VideoError(f"{path}: broken picture: {e}") from e
    with image:
        return open_picture(path, image, frames)


def read_video(path, frames):
    """-> (uint8 [T,H,W,3], seconds between frames). As `open_video`, all frames at once."""
    video = open_video(path, frames)
    return video.read(0, video.frames), video.seconds


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


# pictures, through pillow

def pictures(path):
    natural = lambda name: ([int(x) if x.isdigit() else x.lower() for x in re.split(r"([0-9]+)", name)], name)
    names = [n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not names:
        raise VideoError(f"{path}: no pictures in this folder")
    return [os.path.join(path, n) for n in sorted(names, key=natural)]


def open_folder(path, frames):
    """files with a picture suffix, not hidden, in natural order (frame_2 before frame_10), one second apart"""
    files, sizes = pictures(path), []
    for file in files:
        try:
            with Image.open(file, formats=PICTURES) as image:                # reads the header only
                sizes.append(upright_size(image))
        except PICTURE_ERRORS as e:
            raise VideoError(f"{file}: broken picture: {e}") from e
        if sizes[-1] != sizes[0]:
            raise VideoError(f"{file}: height and width {sizes[-1]} differ from {sizes[0]} of {files[0]}")
    index = pick(range(len(files)), len(files), frames)
    return make_video(path, [(files[i], 0) for i in index], sizes[0], len(files) / len(index), len(files) == 1,
                      read_pictures)


def open_picture(path, image, frames):
    # only these two formats animate; the further pages of a tiff or of a phone's jpeg are no video
    n = image.n_frames if image.format in ("WEBP", "PNG") else 1
    times = [0]                                                              # in ms, one more than there are frames
    try:
        for i in range(n if n > 1 else 0):
            image.seek(i)
            image.load()                                                     # a webp tells a duration only when decoded
            times.append(times[-1] + (round(image.info.get("duration", 0)) or 100))  # 0 is 100 ms, as browsers do
    except PICTURE_ERRORS as e:
        raise VideoError(f"{path}: broken picture: {e}") from e
    end = times.pop() if n > 1 else 1
    index = pick(times if n > 1 else [0], end, frames)
    return make_video(path, [(path, int(i)) for i in index], upright_size(image), end / 1000 / len(index), n == 1,
                      read_pictures)


def upright_size(image):
    # Image's own getexif, since png's decodes the whole picture; orientations 5..8 lie on their side
    turned = Image.Image.getexif(image).get(0x0112, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def read_pictures(chosen, out):
    """`chosen`: (file, number of the frame in it)"""
    rows = iter(out)
    for file, group in itertools.groupby(chosen, key=lambda c: c[0]):
        try:
            with Image.open(file, formats=PICTURES) as image:
                for _, i in group:
                    if i:
                        image.seek(i)
                    row, rgb = next(rows), to_rgb(image, file)
                    if rgb.shape != row.shape:
                        raise VideoError(f"{file}: decodes to {rgb.shape[:2]}, not {row.shape[:2]} as its header says")
                    row[:] = rgb
        except PICTURE_ERRORS as e:
            raise VideoError(f"{file}: broken picture: {e}") from e


def to_rgb(image, file):
    if image.mode[0] in "IF":
        raise VideoError(f"{file}: more than 8 bits per pixel ({image.mode}), which pillow would clip to white")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:                                          # palette too
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))                                  # (H, W, 3)


# films, through PyAV

@contextmanager
def film(path):
    """-> container, its video stream; an FFmpeg error anywhere inside leaves as a VideoError"""
    try:
        with av.open(path, options={"format_whitelist": FORMATS}) as container:
            streams = [s for s in container.streams.video
                       if not s.disposition & av.stream.Disposition.attached_pic]  # the cover of a song
            if not streams:
                raise VideoError(f"{path}: no video stream in this file")
            # FFmpeg takes every core by default: with one loader per GPU on a node that starves the others
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.error.FFmpegError as e:
        raise VideoError(f"{path}: not decodable as video: {e.strerror}") from e


def open_stream(path, frames):
    """One pass over the packets, without decoding, tells every frame's time. Headers do not: they lack the number of
    frames (mkv), the duration (live webm), and always the single times, which a variable rate needs."""
    with film(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: no frame can be decoded")
        size = to_upright(first).shape[:2]                                   # (H, W)
    with film(path) as (container, stream):
        packets = whole_packets(path, container, stream)
        base = stream.time_base
        by_order = container.format.name == "avi"                            # it stores no pts, FFmpeg guesses them
        rate = stream.average_rate or stream.guessed_rate or 25
    keys = [i for i, p in enumerate(packets) if p.key]
    packets = packets[keys[0] if keys else 0:]                               # what precedes needs frames we do not have
    shown = [p for p in packets if p.shown]
    if any(p.pts is None for p in shown) or len({p.pts for p in shown}) < len(shown):
        by_order, base = True, 1 / rate
        shown = [Packet(i, 1, p.key, True) for i, p in enumerate(shown)]
    elif not by_order and keys:                                              # so do leading B-frames, in an open GOP
        shown = [p for p in shown if p.pts >= packets[0].pts]
    if not shown:
        raise VideoError(f"{path}: no frame in this file")
    shown.sort(key=lambda p: p.pts)
    times = [p.pts for p in shown]
    last = shown[-1].duration or round((times[-1] - times[0]) / max(1, len(times) - 1)) or 1
    end = times[-1] + last
    index = pick(times, end, frames)
    # a frame's name is its pts, or its number in the order shown where pts are not to be trusted
    names = np.arange(len(times)) if by_order else np.array(times)           # (frames in the file,)
    keys = np.array(sorted(p.pts for p in packets if p.key)) if keys and not by_order else names[:1]
    return make_video(path, names[index], size, (end - times[0]) * base / len(index), len(times) == 1,
                      lambda chosen, out: read_stream(path, chosen, keys, by_order, out))


@dataclass
class Packet:
    pts: int
    duration: int
    key: bool
    shown: bool      # false: decoded for others to refer to, but cut away by an edit list or hidden (VP8)


def whole_packets(path, container, stream):
    """all packets in file order, or a VideoError if some are missing: FFmpeg reads a cut file to where it ends
    and a holed one past the hole, and mentions it in its log at most"""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)                                   # Capture sees nothing below the level
    av.logging.set_skip_repeated(False)                                      # nor the same damage in a second file
    try:
        with av.logging.Capture() as log:
            packets, corrupt, tail, last = [], False, b"", -2**63
            for p in container.demux(stream):
                last = last if p.dts is None else p.dts
                if p.size:                                                   # empty: the flush packet, or "as before"
                    vp8_hidden = stream.codec_context.name == "vp8" and not bytes(p)[0] & 16
                    packets.append(Packet(p.pts, p.duration or 0, p.is_keyframe, not (p.is_discard or vp8_hidden)))
                    corrupt, tail = corrupt or p.is_corrupt, bytes(p)[-1:]
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)
    kind = container.format.name
    short = {"mov,mp4,m4a,3gp,3g2,mj2": any(e.timestamp > last for e in stream.index_entries),
             "avi": last + 1 < stream.frames,                                # its clock counts dropped frames too
             "gif": tail != b";"}.get(kind, False)                           # the trailer of a gif
    if corrupt or short:
        raise VideoError(f"{path}: cut off or damaged, only {len(packets)} frames are whole")
    said = [text.strip() for _, name, text in log if name == kind]           # by the container, not by a decoder
    if said and kind.startswith("matroska"):
        raise VideoError(f"{path}: cut off or damaged: {said[0]}")
    return packets


def read_stream(path, chosen, keys, by_order, out):
    """seek to the keyframe before the first chosen frame and decode on from there; a seek is only a shortcut:
    if it fails, or a frame is missing after it, decode from the start of the file"""
    start = keys[keys <= chosen[0]][-1]
    if start > keys[0] and decode(path, chosen, start, True, by_order, out) == len(chosen):
        return
    met = decode(path, chosen, keys[0], False, by_order, out)
    if met < len(chosen):
        raise VideoError(f"{path}: damaged, only {met} of {len(chosen)} wanted frames could be decoded")


def decode(path, chosen, start, seek, by_order, out):
    """fills `out` and returns how many of its frames were met; fewer than all means one is missing there"""
    row = 0
    with film(path) as (container, stream):
        if seek:
            # the first frame may carry what all others need: x264 writes its version there and nowhere else, and
            # FFmpeg, not having read it, decodes old 4:4:4 files to garbage (seen in a real clip)
            next(container.decode(stream))
            try:
                container.seek(int(start), stream=stream)
            except av.error.FFmpegError:                                     # no index in this format
                return 0
        for n, frame in enumerate(container.decode(stream)):
            name = n if by_order else frame.pts
            if name is None or name > chosen[row]:
                break
            if frame.is_corrupt and name >= start:                           # before start: leftovers of an open GOP
                if seek:
                    break
                raise VideoError(f"{path}: damaged, frame at {frame.time} s has missing parts")
            if name < chosen[row]:
                continue
            rgb = to_upright(frame)
            if rgb.shape != out.shape[1:]:
                raise VideoError(f"{path}: the frame size changes from {out.shape[1:3]} to {rgb.shape[:2]}")
            while row < len(chosen) and chosen[row] == name:
                out[row] = rgb
                row += 1
            if row == len(chosen):
                break
    return row


def to_upright(frame):
    if any(c.is_alpha for c in frame.format.components):                     # gif, some mov: on black
        rgba = frame.to_ndarray(format="rgba", threads=1).astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24", threads=1)                    # (H, W, 3)
    return np.rot90(rgb, frame.rotation // 90)                               # both count counter-clockwise


# ---------------------------------------------------------------------------------------------------------------------
# what a video's content is, and reading it before its turn

def fingerprint(path, folder=""):
    """-> 64 hexadecimal digits, the same for the same content under any name: of a file its bytes, of a folder the names
    and bytes of its pictures in order, of a built-in video its frames. Raises VideoError as `open_video` does.

    A file is read whole, once: then it is remembered by absolute path, size and time of change; in `folder`, if given,
    for later runs too.
    """
    path = os.fspath(path)
    if path.startswith("toy:"):
        return toy_fingerprint(path)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    try:
        files = pictures(path) if os.path.isdir(path) else [path]
        stamps = [(os.path.abspath(file), s.st_size, s.st_mtime_ns) for file in files for s in [os.stat(file)]]
        return hash_files(tuple(stamps), os.path.isdir(path), folder)
    except OSError as e:
        raise VideoError(f"{path}: cannot be read ({e.strerror})") from e


@lru_cache(maxsize=None)
def toy_fingerprint(path):
    video = open_toy(path, 10 ** 9)
    return hashlib.sha256(video.read(0, video.frames)).hexdigest()


@lru_cache(maxsize=None)
def hash_files(stamps, named, folder):
    """stamps: ((path, size, time), ...); named: the files' names are content too, as in a folder of pictures."""
    if folder:
        note = os.path.join(folder, hashlib.sha256(repr((stamps, named)).encode()).hexdigest() + ".content")
        with suppress(OSError, UnicodeDecodeError), open(note) as f:
            found = f.read()
            if re.fullmatch("[0-9a-f]{64}", found):        # else cut off, when the machine went down
                return found
    whole = hashlib.sha256()
    for path, size, _ in stamps:
        whole.update(repr((os.path.basename(path), size)).encode() if named else b"")
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: whole)
    if folder:
        part = f"{note}.{os.getpid()}"                     # ranks may write the same, each under a name of its own
        try:
            with open(part, "w") as f:
                f.write(whole.hexdigest())
            os.replace(part, note)
        except OSError:                                    # a full disk: the next run hashes the file again, no harm
            with suppress(OSError):
                os.remove(part)
    return whole.hexdigest()


class Ahead:
    """Videos read in one background thread before their turn, with the values and the errors of `open_video`.

    At most `most` bytes of frames wait; what does not fit is read when its turn comes. A rank has its own.
    """

    def __init__(self, frames, most=512 << 20):
        """frames: as for `open_video`. No thread runs before `start`."""
        self.frames, self.most, self.jobs, self.thread, self.ended = frames, most, {}, None, False

    def start(self, paths, name, pieces):
        """Forget what waits and begin to read these, in order. Both functions are called in the thread:
        name(path) -> a name of the content, None where it need not be read; pieces(video) -> [(lo, hi)] that will be read.
        """
        self.stop()
        self.jobs, self.ended = {path: Future() for path in paths}, False
        self.thread = threading.Thread(target=self.work, args=(dict(self.jobs), name, pieces), daemon=True)
        self.thread.start()
        atexit.register(self.stop)                         # or the interpreter would go down around a thread inside FFmpeg

    def stop(self):
        """Forget what waits. The thread ends; this takes as long as the piece that it is reading."""
        self.ended, self.jobs = True, {}
        if self.thread:
            self.thread.join()
            self.thread = None
            atexit.unregister(self.stop)

    def work(self, jobs, name, pieces):
        room = self.most
        for path, job in jobs.items():
            try:
                known, kept = None if self.ended else name(path), {}
                video = open_video(path, self.frames) if known else None
                for lo, hi in pieces(video) if known else ():
                    size = (hi - lo) * video.height * video.width * 3
                    if self.ended or size > room:
                        break
                    room, kept[lo, hi] = room - size, video.read(lo, hi)
                job.set_result((known, video, kept))
            except Exception as e:                         # whatever it is: the rank raises it, when the video's turn comes
                job.set_exception(e)

    def open(self, path, name):
        """`open_video(path, frames)`, for whom the thread may have read. What it read is used only if its content was that
        of `name`."""
        known, video, kept = self.jobs.pop(path).result() if path in self.jobs else (None, None, {})
        if known is None or known != name:
            return open_video(path, self.frames)
        return replace(video, read=lambda lo, hi: kept.pop((lo, hi)) if (lo, hi) in kept else video.read(lo, hi))


# ---------------------------------------------------------------------------------------------------------------------
# the built-in videos

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 240), "yellow": (230, 210, 50)}
SHAPES = ["circle", "square", "triangle"]
PLACES = {"left": (8, 16), "right": (20, 16), "top": (14, 11), "bottom": (14, 21)}       # x, y of the centre
CATEGORIES = ["temporal", "goal", "spatial", "plot"]                                     # LongVideo-Reason's four
MORE = ["reading", "grounding", "long"]   # parts by name alone, with videos of their own; long: the four stories as long films
LETTERS = {"A": "  #  / # # /#   #/#####/#   #", "C": " ####/#    /#    /#    / ####", "E": "#####/#    /###  /#    /#####",
           "H": "#   #/#   #/#####/#   #/#   #", "L": "#    /#    /#    /#    /#####", "O": " ### /#   #/#   #/#   #/ ### ",
           "T": "#####/  #  /  #  /  #  /  #  ", "X": "#   #/ # # /  #  / # # /#   #"}
TOYS = 20000                   # how many samples "toy" has
FILM = 256                     # frames of a long film
TRIANGLES, SLIP = 0.6, 2 / 3   # questions that ask for triangles; of these triangles, how many the teacher overlooks


@dataclass
class Story:
    """What happens in one built-in video, a question about it, and two ways to answer: the truth and the teacher's."""
    events: list       # (colour, shape, place)
    letters: str       # beside the events, one each, where the question is about reading; else empty
    lasts: list        # how many frames each event is on screen, half a second a frame
    category: str
    question: str
    answer: str
    domain: str
    thought: str       # the right reasoning
    taught: tuple      # (thought, answer) of the teacher, who overlooks 2 in 3 of the triangles asked for
    difficulty: int    # how many events must be judged right for the answer to be right


def toy_story(name):
    """name: a seed, or one of MORE and a seed, "reading-7". "long-7" is the story of 7, told slowly."""
    kind, _, seed = str(name).rpartition("-")
    rng = random.Random(f"story {seed if kind == 'long' else name}")
    category = kind if kind in ("reading", "grounding") else rng.choice(CATEGORIES)
    n = rng.randint(5, 8 if category == "reading" else 10)                        # letters cost tokens: thoughts stay within 100
    want = rng.choice(list(COLOURS)), "triangle" if rng.random() < TRIANGLES else rng.choice(SHAPES[:2])
    colour, shape = want

    def place(match):
        other = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != want]
        near = [x for x in other if x[0] == colour or x[1] == shape]              # half of the others look alike
        return (*(want if match else rng.choice(near if rng.random() < 0.5 else other)), rng.choice(list(PLACES)))

    # Which events match is drawn so that every answer is as frequent as any other.
    need = None
    if category == "plot":
        matches = rng.sample(range(n), rng.randint(0, 3))
    elif category == "reading":
        matches = rng.sample(range(n), rng.randint(1, 4))
    elif category == "goal":
        need = rng.randint(1, 2)
        done = rng.randint(need - 1, n - 1)
        matches = rng.sample(range(done), need - 1) + [done] + [i for i in range(done + 1, n) if rng.random() < 0.2]
    else:
        matches = rng.sample(range(n - 1), rng.randint(1, 3))                     # something always comes after
    events = [place(i in matches) for i in range(n)]
    if category == "temporal":                                                    # a fair colour after the last match
        last = max(matches)
        c = rng.choice(list(COLOURS))
        events[last + 1] = (c, rng.choice([s for s in SHAPES if (c, s) != want]), events[last + 1][2])
    letters = "".join(rng.choices(list(LETTERS), k=n)) if category == "reading" else ""

    question, domain = {
        "temporal": (f"Which colour comes right after the last {colour} {shape}?", "open"),
        "goal": (f"Someone collects {colour} {shape}s and needs {need}. When is it done?", "count"),
        "spatial": (f"Where is the last {colour} {shape}?", "open"),
        "plot": (f"How many {colour} {shape}s are there?", "count"),
        "reading": (f"What do the letters beside the {colour} {shape}s spell?", "ocr"),
        "grounding": (f"Where is the last {colour} {shape}? Give its box.", "grounding"),
    }[category]

    def reason(overlooked):
        lines, count, state = [], 0, "0" if category in ("plot", "goal") else "none"
        for i, (c, s, p) in enumerate(events):
            match = (c, s) == want and i not in overlooked
            count += match
            if category == "temporal":
                state = "next" if match else c if state == "next" else state
            elif category in ("spatial", "grounding"):
                state = p if match else state
            elif category == "reading":
                p = letters[i]                             # what is read stands in the place's stead
                state = state.replace("none", "") + p if match else state
            else:
                state = str(count)
            same = c == colour                             # what is seen stands beside what is asked; then: the same or not
            lines.append(f"{i} {c} {colour} {'yes' if same else 'no'} " + same * f"{s} {shape} {'yes' if match else 'no'} {p} "
                         + state)
            if category == "goal" and count == need:
                return "\n".join(lines), str(i)
        if category == "goal":
            state = "never"
        if category == "grounding" and state != "none":
            state = toy_box(shape, state)
        return "\n".join(lines), state

    thought, answer = reason(())
    seen = [i for i in matches if not (shape == "triangle" and rng.random() < SLIP)]
    taught = reason([i for i in matches if i not in seen])
    lasts = [2] * n                                        # an event a second, or a film in which some stand and some flit by
    if kind == "long":                                     # even numbers: the tower sees two frames at a time
        more = rng.choices(range(n), [rng.random() ** 4 for _ in events], k=FILM // 2 - n)
        lasts = [2 + 2 * more.count(i) for i in range(n)]
    return Story(events, letters, lasts, category, question, answer, domain, thought, taught, len(matches))


def toy_description(seed, number, progress, parts=CATEGORIES):
    """What the alignment stage teaches the tiny model's eyes: every moment of a video, a line each, its letter last or its place.

    number: which one; progress in [0,1]: the videos grow from one moment to ten over the first half of the stage;
    parts: as of `toy_parts`, their kinds of video equally often. The stories are none that `load` has, so that
    nothing held out is ever seen. -> `Sample`, the text its thought
    """
    seed = TOYS + seed * 10 ** 7 + number
    rng = random.Random(f"moments {seed}")
    n = rng.randint(1, 1 + int(9 * min(1, 2 * progress)))
    name = rng.choice(sorted({f"{part}-" if part in MORE else "" for part in parts})) + str(seed)
    story = toy_story(name)
    lines = [f"{i} {c} {s} {story.letters[i:i + 1] or p}" for i, (c, s, p) in enumerate(story.events[:n])]
    return Sample(f"describe-{seed}", "Describe every moment.", "", "open", f"toy:{name}:{n}", "\n".join(lines))


@lru_cache(maxsize=None)
def toy_mask(shape, place):
    """bool [28, 28]: the pixels of a shape"""
    y, x = np.mgrid[:28, :28]
    dx, dy = x - PLACES[place][0], y - PLACES[place][1]
    return {"circle": abs(dx ** 2 + dy ** 2 - 18) <= 9, "square": np.maximum(abs(dx), abs(dy)) <= 4,
            "triangle": (dy >= -5) & (dy <= 4) & (2 * abs(dx) <= dy + 5)}[shape]


def toy_box(shape, place):
    """"[x1, y1, x2, y2]", the edges of its pixels: x2 and y2 are one past the last pixel, so that x2 - x1 is the width."""
    y, x = np.nonzero(toy_mask(shape, place))
    return str([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])


def toy_frames(name):
    """uint8 [frames, 28, 28, 3]: half a second a frame, on the edges a clock: the event's number, which is its second in all
    but long films. A letter is in the corner that no shape reaches."""
    story, rng = toy_story(name), np.random.default_rng(int(str(name).rpartition("-")[2]))
    frames = np.empty((sum(story.lasts), 28, 28, 3), np.uint8)
    frames[:] = rng.integers(15, 60, 3)
    for t, frame in zip(np.repeat(range(len(story.events)), story.lasts), frames):
        colour, shape, place = story.events[t]
        frame[toy_mask(shape, place)] = np.clip(np.array(COLOURS[colour]) + rng.integers(-25, 26, 3), 0, 255)
        ones, tens = t % 10, t // 10
        frame[:5, 4 + 2 * ones:6 + 2 * ones] = 255         # seconds, along the top
        frame[6 + 2 * tens:8 + 2 * tens, :3] = 255         # tens of seconds, down the left
        if story.letters:
            frame[22:27, 22:27][[[c == "#" for c in row] for row in LETTERS[story.letters[t]].split("/")]] = 255
    return frames


def toy_name(path):
    """"toy:NAME" or "toy:NAME:EVENTS" -> (name for `toy_story`, how many of its first events; None: all)"""
    match = re.fullmatch(rf"toy:((?:(?:{'|'.join(MORE)})-)?)(\d+)(?::0*([1-9]\d*))?", path)
    if not match:
        raise VideoError(f"{path}: a built-in video is toy:SEED or toy:SEED:EVENTS, with whole numbers above 0 for EVENTS; "
                         f"SEED may begin with {', '.join(f'{kind}-' for kind in MORE)}")
    return f"{match[1]}{int(match[2])}", int(match[3]) if match[3] else None


def open_toy(path, frames):
    """"toy:SEED", or "toy:SEED:N" for its first N events; "toy:reading-SEED" and so on likewise."""
    name, events = toy_name(path)
    film = toy_frames(name)[:sum(toy_story(name).lasts[:events])]
    index = pick(range(len(film)), len(film), frames)

    def read(chosen, out):
        out[:] = film[chosen]

    return make_video(path, index, film.shape[1:3], 0.5 * len(film) / len(index), False, read)


def toy_sample(name):
    s, (kind, _, seed) = toy_story(name), str(name).rpartition("-")
    thought, answer = s.taught
    return Sample(f"toy-{'long-' if kind == 'long' else ''}{s.category}-{seed}", s.question, s.answer, s.domain, f"toy:{name}",
                  thought, answer)


def toy_parts(source):
    """["A", "B"] of "toy:A,B", each one of CATEGORIES or MORE; LongVideo-Reason's four of any other data."""
    parts = source[4:].split(",") if source.startswith("toy:") else CATEGORIES
    for part in parts:
        if part not in CATEGORIES + MORE:
            raise ValueError(f"{source}: no built-in questions are called {part!r}; there are: {', '.join(CATEGORIES + MORE)}")
    return list(dict.fromkeys(parts))


def toy_samples(source):
    """Of "toy" the questions in the order of their seeds; of "toy:A,B" those of these parts, so mixed that any stretch has
    as much of each category: long has four, so four times as much as another part."""
    parts = toy_parts(source)
    made = [toy_sample(seed) for seed in range(TOYS)] if {*parts} & {*CATEGORIES} else []
    if source == "toy":
        return made
    groups = [[s for s in made if s.id.startswith(f"toy-{part}-")] if part in CATEGORIES else
              [toy_sample(f"{part}-{seed}") for seed in range(TOYS if part == "long" else TOYS // 4)] for part in parts]
    return [s for _, s in sorted(((i / len(g), s) for g in groups for i, s in enumerate(g)), key=lambda x: x[0])]


def draw_sheet(path, seeds=(41, 49, 48, 27, "reading-859", "grounding-32")):
    """A picture of built-in videos, one a category: every event, the question, the reasoning, what the teacher missed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(seeds), 10, figsize=(14, 3.2 * len(seeds)))
    fig.subplots_adjust(left=0.01, right=0.99, top=1 - 0.2 / len(seeds), bottom=0.36 / len(seeds), hspace=0.95, wspace=0.08)
    for row, seed in zip(axes, seeds):
        story, film = toy_story(seed), toy_frames(seed)[::2]
        last = max((i for i, line in enumerate(story.thought.split("\n")) if line.count(" yes ") == 2), default=-1)
        right, taught = (text.split("\n") for text in (story.thought, story.taught[0]))
        row[0].text(0, 1.14, f"{story.category}: {story.question}   Right: {story.answer}.", fontsize=12, weight="bold",
                    transform=row[0].transAxes)
        row[9].text(1, 1.14, f"The teacher says: {story.taught[1]}", fontsize=12, color="firebrick", ha="right",
                    transform=row[9].transAxes)
        for i, axis in enumerate(row):
            axis.axis("off")
            axis.set_box_aspect(1)
            if i >= len(film):
                continue
            axis.imshow(film[i])
            if story.category == "grounding" and i == last:                       # the box asked for; the model does not see it
                x1, y1, x2, y2 = json.loads(story.answer)
                axis.add_patch(plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ls="--", ec="white"))
            if i >= len(right):                            # a goal is reached: nothing more to think about
                continue
            words = re.sub(r" (yes|no) ", r" \1\n", right[i].replace(" ", "\n", 1))
            axis.text(0, -0.05, words, va="top", fontsize=8, transform=axis.transAxes)
            if " triangle yes " in right[i] and " triangle no " in taught[i]:
                axis.text(0, -0.75, "overlooked", va="top", fontsize=9, color="firebrick", transform=axis.transAxes)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=70)
    plt.close(fig)


if __name__ == "__main__":
    draw_sheet(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "toy.png"))
    print("assets/toy.png")
