"""
What a question about a video is, and how real video is read. (The built-in videos are in toy.py.)

    load            questions from a .jsonl, from LongVideo-Reason's .json, or "toy" and "toy:A,B"
    open_video      any usual file, folder of pictures or picture; pixels are read when asked for, a few at a time
    fingerprint     the content of a video, whatever its name
    Ahead           reads the next videos in a thread while others are computed with
"""
import atexit
import hashlib
import itertools
import json
import os
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

import toy
from flow import Sample, Video, VideoError
from plumbing.frames import make_video, pick


def taught_text(sample, think=True):
    """What the cold start teaches: the thought, or an empty one, and the answer that it comes to."""
    return f"<think>{sample.thought * think}</think><answer>{sample.taught or sample.answer}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# questions

def load(source, video_dir=""):
    """-> list of `Sample`. source: "toy" or "toy:A,B" (`toy.load`), a .jsonl of `Sample`, LongVideo-Reason's .json.

    Video paths are taken relative to video_dir, or else to the file. A sample without a domain is "choice" if its answer
    is one letter and the question lists options, "count" if it is an integer, else "open"; one without an id is named
    after its place in the file. Raises ValueError that names the file, the line and what is wrong with it.
    """
    if source == "toy" or source.startswith("toy:"):
        return toy.load(source)
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
        return toy.open_video(path, frames)
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
        return toy.fingerprint(path)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    try:
        files = pictures(path) if os.path.isdir(path) else [path]
        stamps = [(os.path.abspath(file), s.st_size, s.st_mtime_ns) for file in files for s in [os.stat(file)]]
        return hash_files(tuple(stamps), os.path.isdir(path), folder)
    except OSError as e:
        raise VideoError(f"{path}: cannot be read ({e.strerror})") from e


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
