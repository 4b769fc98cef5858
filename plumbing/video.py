"""
Reads any video file, or folder of pictures, as uint8 frames.

A file that pillow recognises is a picture (or an animated webp or png, which FFmpeg cannot decode):
see pictures.py. Everything else is read here with FFmpeg through PyAV. To open a film, its packets
are read once, without decoding: they give the time of each frame. Frames are decoded on demand.
"""
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from flow import VideoError
from plumbing.frames import make_video, pick
from plumbing.pictures import is_picture, open_folder, open_picture

# Without this list FFmpeg also renders text files as video, and lets playlists open other files.
FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg,asf,mp3,wav"
LOG_LOCK = threading.Lock()    # of FFmpeg's log level, which all threads share


def open_file(path, frames):
    """-> `Video`. path: a film, a folder of pictures or a picture; frames: how many at most, evenly
    spaced in time. Pixels are read on demand.

    Raises VideoError, which names the file and the cause, or ValueError if frames < 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = os.fspath(path)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    if os.path.isdir(path):
        return open_folder(path, frames)
    if is_picture(path):
        return open_picture(path, frames)
    return open_film(path, frames)


def read_video(path, frames):
    """As `open_file`, all frames at once. -> (uint8 [T,H,W,3], seconds between frames)"""
    video = open_file(path, frames)
    return video.read(0, video.frames), video.seconds


@contextmanager
def opened(path):
    """-> (container, its video stream). An FFmpeg error inside the `with` becomes a VideoError."""
    try:
        with av.open(path, options={"format_whitelist": FORMATS}) as container:
            streams = [stream for stream in container.streams.video if not is_cover(stream)]
            if not streams:
                raise VideoError(f"{path}: no video stream in this file")
            # FFmpeg takes all cores by default: one reader per GPU would starve the others.
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.error.FFmpegError as e:
        raise VideoError(f"{path}: not decodable as video: {e.strerror}") from e


def is_cover(stream):
    """Whether the stream is the cover picture of a song."""
    return stream.disposition & av.stream.Disposition.attached_pic


# --------------------------------------------------------------------------------------------------
# opening: what a film's packets say

@dataclass
class Packet:
    """One coded frame."""
    pts: int           # the tick at which it is shown; None if the container has none
    duration: int      # ticks
    key: bool          # decoding can start here
    shown: bool        # False: only decoded as a reference for others


@dataclass
class FilmIndex:
    """The n frames that a film shows, in the order in which they are shown."""
    times: list            # [n] ticks, when each frame appears
    end: int               # the tick at which the last one disappears
    tick: Fraction         # seconds
    frame_ids: np.ndarray  # [n] identify the decoded frames, ascending: their pts ...
    numbered: bool         # ... or their number among those shown, if pts are unreliable
    keyframes: np.ndarray  # ids of the frames at which decoding can start, ascending


def open_film(path, frames):
    """-> `Video` of a film. The header is not enough: it may lack the number of frames (mkv) or the
    duration (live webm), and never has the time of each frame, which a variable rate requires."""
    with opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: no frame can be decoded")
        height, width, _ = to_upright(first).shape
    index = index_film(path)
    places = pick(index.times, index.end, frames)
    seconds = (index.end - index.times[0]) * index.tick / len(places)

    def read(chosen, out):
        read_film(path, index, chosen, out)

    return make_video(path, index.frame_ids[places], (height, width), seconds,
                      len(index.times) == 1, read)


def index_film(path):
    """-> `FilmIndex`. Raises VideoError if packets are missing or damaged."""
    with opened(path) as (container, stream):
        packets = read_packets(path, container, stream)
        tick = stream.time_base
        rate = stream.average_rate or stream.guessed_rate or 25
        numbered = container.format.name == "avi"          # has no pts: FFmpeg guesses them
    first_key = next((i for i, packet in enumerate(packets) if packet.key), None)
    if first_key is not None:          # packets before it refer to frames that are not in the file
        packets = packets[first_key:]
    shown = [packet for packet in packets if packet.shown]
    if not have_distinct_pts(shown):
        numbered = True
        tick = 1 / rate
        shown = [Packet(i, 1, packet.key, True) for i, packet in enumerate(shown)]
    elif first_key is not None and not numbered:
        # Leading B-frames of an open group of pictures also refer to frames before the file.
        shown = [packet for packet in shown if packet.pts >= packets[0].pts]
    if not shown:
        raise VideoError(f"{path}: no frame in this file")

    shown.sort(key=lambda packet: packet.pts)
    times = [packet.pts for packet in shown]
    mean_duration = round((times[-1] - times[0]) / max(1, len(times) - 1))
    end = times[-1] + (shown[-1].duration or mean_duration or 1)
    if numbered:
        frame_ids = np.arange(len(times))
    else:
        frame_ids = np.array(times)
    keyframes = frame_ids[:1]
    if first_key is not None and not numbered:
        keyframes = np.array(sorted(packet.pts for packet in packets if packet.key))
    return FilmIndex(times, end, tick, frame_ids, numbered, keyframes)


def have_distinct_pts(packets):
    pts = {packet.pts for packet in packets}
    return None not in pts and len(pts) == len(packets)


def read_packets(path, container, stream):
    """All packets in the order of the file. Raises VideoError if some are missing: FFmpeg itself
    reads a truncated file to its end, skips holes, and at most logs it."""
    packets = []
    corrupt = False
    last_dts = -2**63
    last_byte = b""
    with ffmpeg_log() as log:
        for packet in container.demux(stream):
            if packet.dts is not None:
                last_dts = packet.dts
            if not packet.size:                            # the end, or a repeated frame
                continue
            data = bytes(packet)
            hidden_vp8 = stream.codec_context.name == "vp8" and not data[0] & 16
            shown = not packet.is_discard and not hidden_vp8   # an edit list may discard packets
            packets.append(Packet(packet.pts, packet.duration or 0, packet.is_keyframe, shown))
            corrupt = corrupt or packet.is_corrupt
            last_byte = data[-1:]

    kind = container.format.name
    cut_off = False
    if kind == "mov,mp4,m4a,3gp,3g2,mj2":
        cut_off = any(entry.timestamp > last_dts for entry in stream.index_entries)
    elif kind == "avi":
        cut_off = last_dts + 1 < stream.frames             # its clock counts dropped frames too
    elif kind == "gif":
        cut_off = last_byte != b";"                        # the trailer of a gif
    if corrupt or cut_off:
        raise VideoError(f"{path}: cut off or damaged, only {len(packets)} frames are whole")
    if kind.startswith("matroska"):
        for _, source, text in log:
            if source == kind:                             # the container, not a decoder
                raise VideoError(f"{path}: cut off or damaged: {text.strip()}")
    return packets


@contextmanager
def ffmpeg_log():
    """-> list that collects this thread's errors of FFmpeg inside the `with`, as (level, source,
    text). One thread at a time: another would reset the level, and errors would be missed."""
    with LOG_LOCK:
        level = av.logging.get_level()
        skip_repeated = av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)             # Capture sees nothing below the level,
        av.logging.set_skip_repeated(False)                # nor repeated errors
        try:
            with av.logging.Capture() as log:
                yield log
        finally:
            av.logging.set_level(level)
            av.logging.set_skip_repeated(skip_repeated)


# --------------------------------------------------------------------------------------------------
# reading: decoding some of its frames

def read_film(path, index, chosen, out):
    """Fill out, uint8 [n, H, W, 3], with the frames of the ids chosen, which are ascending.

    Decoding starts at the last keyframe before them. That seek is only a shortcut: if it fails, or
    a frame is missing after it, decoding starts at the beginning of the file.
    """
    start = index.keyframes[index.keyframes <= chosen[0]][-1]
    if start > index.keyframes[0]:
        if decode(path, index, start, chosen, out) == len(chosen):
            return
    found = decode(path, index, index.keyframes[0], chosen, out)
    if found < len(chosen):
        raise VideoError(f"{path}: damaged, only {found} of {len(chosen)} wanted frames "
                         "could be decoded")


def decode(path, index, start, chosen, out):
    """Decode from the keyframe `start` on, into out. -> how many of the chosen frames were found;
    if fewer than all, one is missing."""
    seek = start > index.keyframes[0]
    found = 0
    with opened(path) as (container, stream):
        if seek:
            # Decode the first frame before seeking: x264 writes its version only there, and without
            # it FFmpeg decodes old 4:4:4 files to garbage.
            next(container.decode(stream))
            try:
                container.seek(int(start), stream=stream)
            except av.error.FFmpegError:                   # this format has no index
                return 0
        for number, frame in enumerate(container.decode(stream)):
            frame_id = number if index.numbered else frame.pts
            if frame_id is None or frame_id > chosen[found]:
                break
            # Corrupt frames before start are leftovers of an open group of pictures.
            if frame.is_corrupt and frame_id >= start:
                if seek:
                    break
                raise VideoError(f"{path}: damaged, frame at {frame.time} s has missing parts")
            if frame_id < chosen[found]:
                continue
            rgb = to_upright(frame)
            if rgb.shape != out.shape[1:]:
                raise VideoError(f"{path}: the frame size changes from {out.shape[1:3]} "
                                 f"to {rgb.shape[:2]}")
            while found < len(chosen) and chosen[found] == frame_id:   # may be chosen twice
                out[found] = rgb
                found += 1
            if found == len(chosen):
                break
    return found


def to_upright(frame):
    """-> uint8 [H, W, 3], rotated as the file says; transparency (gif, some mov) becomes black"""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", threads=1).astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24", threads=1)
    return np.rot90(rgb, frame.rotation // 90)             # both count counter-clockwise
