"""
Opens a film with FFmpeg, through PyAV, and reads what its packets say about its frames, without
decoding them: one pass over the file.

FFmpeg itself reads a truncated file to its end, skips holes, and at most logs it. Here that is an
error.
"""
import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter

import av
import numpy as np

from flow import VideoError
from plumbing.mp4 import CHECKED, ends_inside_a_box, fragment_is_cut, tabled_packets

# A file of these formats is read on its own. Without this list FFmpeg also renders text as video,
# and lets playlists open other files.
FORMATS = ("mov,matroska,avi,gif,apng,mpegts,mpeg,flv,live_flv,ogg,asf,mp3,wav,mxf,gxf,ivf,nut,rm,"
           "dv,wtv,swf,nsv,nuv,lxf,smk,bink,roq,flic,h261,h263,h264,hevc,vvc,evc,obu,m4v,"
           "mpegvideo,vc1,vc1test,cavsvideo,avs2,avs3,dirac,mjpeg,yuv4mpegpipe")
# The first brand of pictures of the HEIF family except AVIF, which pillow reads.
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"avci", b"avcs",
        b"mif1", b"mif2", b"mif3", b"msf1", b"miaf", b"jpeg", b"jpgs", b"j2ki", b"j2is", b"vvic",
        b"vvis", b"evbi", b"evbs", b"evmi", b"evms")
UNKNOWN = -2 ** 63             # a time or a place in the file that the container does not tell
NO_JUMP = 10                   # seconds between two frames; more is another recording, as in ffmpeg
JOINABLE = ("mpegts", "mpeg")  # formats whose files may be joined by `cat`
MOV = "mov,mp4,m4a,3gp,3g2,mj2"
LOGGED = (b"\x1a\x45\xdf\xa3", b"OggS")   # files of matroska and ogg: only the log tells of damage
OGG_PAGE = 27 + 255 + 255 * 255    # bytes at most
LOG_LOCK = threading.RLock()   # of FFmpeg's log level, which all threads share


@contextmanager
def opened(path):
    """-> (container, its video stream). An FFmpeg error inside the `with` becomes a VideoError."""
    refuse_heif(path)
    try:
        with open_container(path) as container:
            streams = [stream for stream in container.streams.video if not is_cover(stream)]
            if not streams:
                raise VideoError(f"{path}: no video stream in this file")
            stream = max(streams, key=is_default)          # the first of equal ones
            if stream.codec_context is None:
                raise VideoError(f"{path}: its codec has no decoder here, or it is encrypted; "
                                 "convert it to H.264 with a program that plays it")
            # FFmpeg takes all cores by default: one reader per GPU would starve the others.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.FFmpegError as e:
        cause = refused_format(path) or e.strerror
        raise VideoError(f"{path}: not decodable as video: {cause}") from e


@contextmanager
def opened_strictly(path):
    """As `opened`. Of formats whose damage FFmpeg only logs, that is a VideoError too, if nothing
    else was wrong inside the `with`."""
    with ffmpeg_log(read_bytes(path, 0, 4) in LOGGED) as log:
        with opened(path) as (container, stream):
            in_header = len(log)
            yield container, stream
    for i, (_, source, text) in enumerate(log):
        # The header may have faults that leave the frames whole, as in a tag; not so these two.
        grave = i >= in_header or "ended prematurely" in text or "CRC mismatch" in text
        if grave and source == container.format.name:      # not a decoder
            raise VideoError(f"{path}: cut off or damaged: {text.strip()}")


def open_container(path):
    # "file:", or a name with a colon is taken for an address. Tags may be in any encoding.
    return av.open(f"file:{path}", options={"format_whitelist": FORMATS},
                   metadata_errors="replace")


def is_cover(stream):
    """Whether the stream is the cover picture of a song."""
    return stream.disposition & av.stream.Disposition.attached_pic


def is_default(stream):
    """Whether the file says that players are to show this stream, of several."""
    return bool(stream.disposition & av.stream.Disposition.default)


def refuse_heif(path):
    """Raises VideoError for a phone's HEIC picture: FFmpeg gives PyAV only one of its tiles."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in HEIF:
        raise VideoError(f"{path}: a HEIC picture, which is not read here; convert it first, "
                         "for example with `heif-convert`, to PNG or JPEG")


def refused_format(path):
    """What to do about a file whose format is not in FORMATS; "" for any other. FFmpeg names the
    format only in its log."""
    with ffmpeg_log() as log, suppress(av.error.FFmpegError):
        open_container(path).close()
    for _, source, text in log:
        if "not on whitelist" in text:
            return (f"its format, {source}, is not read here; if it is a video, convert it: "
                    f"ffmpeg -i {os.path.basename(path)} -c copy video.mkv")
    return ""


@dataclass
class Packets:
    """The n coded frames of a film, in the order of the file. Times are ticks."""
    pts: np.ndarray        # [n] when a frame appears
    dts: np.ndarray        # [n] when it is decoded
    duration: np.ndarray   # [n] 0: not known
    pos: np.ndarray        # [n] bytes from the beginning of the file
    key: np.ndarray        # [n] bool, the container says that decoding can start here
    shown: np.ndarray      # [n] bool; False: only decoded as a reference for others
    end_of_empty: int      # the tick at which the last packet without a frame ends, or UNKNOWN
    joined: bool = False   # made of several recordings, whose times are now made one


def read_packets(path, container, stream):
    """-> `Packets`. Raises VideoError if packets are missing or damaged."""
    kind = container.format.name
    codec = stream.codec_context.name
    demuxed = container.demux(stream)
    if kind == MOV and codec not in LOOKS:
        first = [*islice(demuxed, CHECKED)]
        tabled = tabled_packets(path, stream, [packet for packet in first if packet.size])
        if tabled is not None:
            shown = np.ones(tabled.shape[1], bool)
            return Packets(*tabled[:4], tabled[4].astype(bool), shown, end_of_empty=UNKNOWN)
        demuxed = chain(first, demuxed)
    look = LOOKS.get(codec, attrgetter(*COLUMNS))
    # A packet at a time: an hour has 90,000. Times that are not known are nan.
    table = np.fromiter(map(look, demuxed), DTYPE)
    empty = table["size"] == 0                             # the film's end, or a repeated frame
    ends = whole(table["dts"][empty] + np.nan_to_num(table["duration"][empty]))
    table = table[~empty]
    if not len(table):
        raise VideoError(f"{path}: no frame in this file")
    packets = Packets(whole(table["pts"]), whole(table["dts"]),
                      np.nan_to_num(table["duration"]).astype(np.int64), whole(table["pos"]),
                      table["is_keyframe"], ~table["is_discard"], int(ends.max(initial=UNKNOWN)))
    joints = find_joints(packets, stream) if kind in JOINABLE else []

    end = int(packets.pos[-1] + table["size"][-1])         # in bytes; senseless if pos is UNKNOWN
    cut_off = False
    if kind == MOV:
        entries = stream.index_entries                     # by dts; none if fragmented
        cut_off = len(entries) > 0 and entries[-1].timestamp > packets.dts[-1]
        cut_off = cut_off or fragment_is_cut(path)
        if read_bytes(path, 8, 4) == b"avis":                    # an animation that pillow refused
            cut_off = cut_off or ends_inside_a_box(path)
    elif kind == "avi":
        # Its clock counts dropped frames too.
        cut_off = max(packets.end_of_empty, packets.dts[-1] + 1) < stream.frames
    elif kind == "mxf":
        cut_off = len(table) < (stream.duration or 0)
    elif kind == "gif":
        cut_off = read_bytes(path, end - 1, 1) != b";"
    elif kind == "yuv4mpegpipe":
        cut_off = end < os.path.getsize(path)
    elif kind == "ogg":
        cut_off = not ends_with_last_page(path)
    # FFmpeg also marks one of the last two packets before a joint, where the count jumps.
    corrupt = set(np.flatnonzero(table["is_corrupt"]).tolist())
    if cut_off or corrupt - {number - back for number in joints for back in (1, 2)}:
        raise VideoError(f"{path}: cut off or damaged, only {len(table)} frames are whole")
    make_one_recording(packets, joints)
    return packets


def read_bytes(path, pos, size):
    """The bytes of a file from `pos` on, at most so many."""
    with open(path, "rb") as file:
        file.seek(pos)
        return file.read(size)


def ends_with_last_page(path):
    """Whether the last page of an ogg is whole, and marked as the last one of a stream."""
    start = max(0, os.path.getsize(path) - OGG_PAGE)
    end = read_bytes(path, start, OGG_PAGE)
    page = end[max(0, end.rfind(b"OggS")):]
    if len(page) < 27:
        return False
    body = 27 + page[26]                                   # a byte for each segment, of its size
    return page[5] & 4 and body + sum(page[27:body]) <= len(page)


def find_joints(packets, stream):
    """The numbers of the packets whose decoding time is before the last one's, or long after it."""
    if UNKNOWN in packets.dts:
        return []
    gaps = np.diff(packets.dts)
    return (np.flatnonzero((gaps < 0) | (gaps * float(stream.time_base) > NO_JUMP)) + 1).tolist()


def make_one_recording(packets, joints):
    """Move the times from each joint on, so that they continue those before it."""
    packets.joined = len(joints) > 0
    for number in joints:
        end = packets.dts[number - 1] + packets.duration[number - 1]
        shift = end - packets.dts[number]
        packets.dts[number:] += shift
        known = packets.pts[number:] != UNKNOWN
        packets.pts[number:][known] += shift


# --------------------------------------------------------------------------------------------------
# what is noted of a packet

COLUMNS = ("pts", "dts", "duration", "pos", "size", "is_keyframe", "is_corrupt", "is_discard")
DTYPE = [(name, bool if name.startswith("is_") else float) for name in COLUMNS]


def whole(numbers):
    """Of float64, in which nan is an unknown one. -> int64"""
    return np.where(np.isnan(numbers), UNKNOWN, numbers).astype(np.int64)


def look_at(packet, hidden):
    """The columns of a packet that has a frame but only as a reference for others, if hidden."""
    *others, discarded = attrgetter(*COLUMNS)(packet)
    return *others, discarded or hidden


def look_at_vp8(packet):
    return look_at(packet, packet.size > 0 and not memoryview(packet)[0] & 16)


def look_at_vp9(packet):
    """Of a packet of several frames, a superframe, the last frame is shown."""
    if packet.size == 0:
        return look_at(packet, False)
    data = memoryview(packet)
    is_superframe = data[-1] & 0b11100000 == 0b11000000
    profile = (data[0] >> 5 & 1) + 2 * (data[0] >> 4 & 1)
    bit = 3 if profile < 3 else 2
    shows_existing_frame = data[0] >> bit & 1
    shows_frame = data[0] >> (bit - 2) & 1
    return look_at(packet, not (is_superframe or shows_existing_frame or shows_frame))


LOOKS = {"vp8": look_at_vp8, "vp9": look_at_vp9}


@contextmanager
def ffmpeg_log(wanted=True):
    """-> list that collects this thread's errors of FFmpeg inside the `with`, as (level, source,
    text). One thread at a time: another would reset the level, and errors would be missed."""
    if not wanted:
        yield []
        return
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
