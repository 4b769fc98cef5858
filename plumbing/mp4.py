"""
The packets of an mp4 as its own tables tell them, without reading the packets: an hour of film is
opened in a tenth of the time. FFmpeg has read these tables too, but does not give PyAV the offset
between a packet's decoding and showing, the box "ctts".
"""
import os
import struct
from operator import attrgetter

import numpy as np

CHECKED = 16           # packets that are read after all, to compare them with the tables
ENTRY = ("timestamp", "pos", "size", "is_keyframe", "is_discard")


def tabled_packets(path, stream, first_packets):
    """-> [n] of (pts, dts, duration, pos, is_keyframe), int64 columns; None if the tables do not
    tell all, or not what the first packets say: as in a film in fragments, with edits inside it, or
    cut off."""
    entries = np.array([*map(attrgetter(*ENTRY), stream.index_entries)], np.int64).reshape(-1, 5).T
    dts, pos, size, is_key, is_discarded = entries
    n = len(dts)
    if n == 0 or not first_packets or first_packets[0].pts is None:
        return None
    if is_discarded.any() or size.min() == 0 or (pos + size).max() > os.path.getsize(path):
        return None
    try:
        durations, offsets = time_tables(path, stream.id, n)
    except (KeyError, ValueError, struct.error):           # no such box, or a short one
        return None
    if (np.diff(dts) != durations[:-1]).any():
        return None
    pts = dts + offsets + first_packets[0].pts - dts[0] - offsets[0]
    for i, packet in enumerate(first_packets):
        if (packet.pts, packet.dts, packet.pos, packet.size) != (pts[i], dts[i], pos[i], size[i]):
            return None
    return np.stack([pts, dts, durations, pos, is_key])


def time_tables(path, track, n):
    """-> the duration of each of the n samples of a track, int64 [n], and its offset [n]. Raises
    ValueError or KeyError if there are none, as where the film is in fragments."""
    moov = read_moov(path)
    if b"mvex" in dict(boxes(moov)):
        raise ValueError("in fragments")
    for kind, trak in boxes(moov):
        if kind == b"trak" and track_number(trak) == track:
            break
    else:
        raise ValueError("no such track")
    box = trak
    for name in (b"mdia", b"minf", b"stbl"):
        box = dict(boxes(box))[name]
    tables = dict(boxes(box))
    durations = run_lengths(tables[b"stts"], n)
    if b"ctts" not in tables:
        return durations, np.zeros(n, np.int64)
    return durations, run_lengths(tables[b"ctts"], n)


def track_number(trak):
    head = dict(boxes(trak))[b"tkhd"]
    [number] = struct.unpack_from(">I", head, 20 if head[0] == 1 else 12)
    return number


def read_moov(path):
    """The content of the file's box "moov"; empty if there is none."""
    for kind, start, size in top_boxes(path):
        if kind == b"moov":
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(size)
    return b""


def fragment_is_cut(path):
    """Whether one of the film's fragments, a "moof" and its "mdat", ends beyond the file."""
    length = os.path.getsize(path)
    in_fragments = False
    for kind, start, size in top_boxes(path):
        in_fragments = in_fragments or kind == b"moof"
        if in_fragments and kind in (b"moof", b"mdat") and start + size > length:
            return True
    return False


def ends_inside_a_box(path):
    """Whether a file of boxes is cut off."""
    length = os.path.getsize(path)
    return any(start + size > length for _, start, size in top_boxes(path))


def top_boxes(path):
    """Yields (kind, place of the content, its size) of the boxes of a file, of which it reads the
    headers only."""
    with open(path, "rb") as file:
        while head := file.read(8):
            size, kind = struct.unpack(">I4s", head.ljust(8, b"\0"))
            body = 8
            if size == 1:                                  # too large for 32 bits
                [size] = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
                body = 16
            if size < body:                                # 0: to the end of the file
                return
            start = file.tell()
            yield kind, start, size - body
            file.seek(start + size - body)


def boxes(data):
    """Yields (kind, content) of the boxes in a box's content."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield kind, data[at + 8:at + size]
        at += size


def run_lengths(box, n):
    """The values of a table of (how often, value). -> int64 [n]. Raises ValueError if they are not
    n."""
    pairs = np.frombuffer(box, ">i4", offset=8)
    pairs = pairs[:len(pairs) // 2 * 2].reshape(-1, 2).astype(np.int64)
    if pairs[:, 0].min(initial=0) < 0 or pairs[:, 0].sum() != n:
        raise ValueError("another number of samples")
    return np.repeat(pairs[:, 1], pairs[:, 0])
