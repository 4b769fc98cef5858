"""
Films: which frames a file shows and when, and reading some of them.

To open a film, its packets are read once, without decoding (containers.py): they give the time of
each frame. Frames are decoded on demand, from the key frame before each. Nothing of that is taken
on trust: a decoded frame tells which packet it is of, and where that is another one than the
packets predict, the file is decoded from its start, and once as a whole.
"""
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, islice

import av
import numpy as np

from flow import VideoError
from plumbing.containers import MOV, UNKNOWN, Packets, opened, opened_strictly, read_packets
from plumbing.frames import make_video, pick

PROBED = 12            # frames decoded at opening, to see whether packets and frames agree
# Codecs whose decoder gives a frame for each packet that is shown. Others have packets that mean
# "as before", such as a VOP of MPEG-4 that is not coded.
FRAME_EACH = ("h264", "hevc")
NEAR = 8               # frames: a seek this far ahead costs as much as decoding them
# Formats without an index: FFmpeg seeks a place in the file, and not a time, at once and exactly.
BY_PLACE = ("mpegts", "mpeg", "mpegvideo", "h264", "hevc", "m4v")


def open_film(path, frames):
    """-> `Video` of a film. The header is not enough: it may lack the number of frames (mkv) or the
    duration (live webm), and never has the time of each frame, which a variable rate requires."""
    film = index_film(path)
    chosen = film.times[pick(film.times, film.end, frames)]
    seconds = (film.end - int(film.times[0])) * film.tick / len(chosen)

    def read(chosen, out):
        read_film(film, chosen, out)

    return make_video(path, chosen, film.size, seconds, len(film.times) == 1, read)


# --------------------------------------------------------------------------------------------------
# opening: which frames a film shows, and when

@dataclass
class Film:
    """The n frames that a film shows, in the order in which they are shown.

    A frame is identified by the number of the packet that it is decoded from: before a packet goes
    to the decoder, its number takes the place of its pts, which decoders hand on to the frame.
    """
    path: str
    kind: str              # FFmpeg's name of the format
    codec: str
    packets: Packets
    rate: Fraction         # frames a second, as far as the header knows
    tick: Fraction         # seconds
    aspect: Fraction       # width / height of a pixel
    first: int             # the number of the packet at which decoding starts
    size: tuple = ()       # (height, width) of a frame as shown
    delay: int = 0         # most packets that the decoder held back in the first frames
    times: np.ndarray = None   # [n] ticks, when each frame appears, ascending
    end: int = 0               # the tick at which the last one disappears
    ids: np.ndarray = None     # [n] numbers of packets; None if unknown, as in an avi with B-frames
    keys: np.ndarray = None    # [k] where decoding can start: numbers of packets, ascending ...
    key_frames: np.ndarray = None  # [k] ... and which of the n frames they are
    decoded: bool = False  # all frames were decoded to know this
    seeks: bool = True     # False once a seek has not led where it should

    def agrees(self, place, number, held_back):
        """Whether a decoded frame is the one expected at `place` of the n. It comes from packet
        `number`, while the decoder holds back so many others. A decoder that holds back more than
        before has left out frames."""
        if self.ids is None:
            return held_back <= self.delay
        return place < len(self.ids) and self.ids[place] == number


def index_film(path):
    """-> `Film`. Raises VideoError if packets are missing or damaged."""
    with opened_strictly(path) as (container, stream):
        packets = read_packets(path, container, stream)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        # Packets before the first key refer to frames that are not in the file.
        film = Film(path, container.format.name, stream.codec_context.name, packets, rate,
                    stream.time_base, stream.sample_aspect_ratio or Fraction(1),
                    first=int(packets.key.argmax()))
    numbers = probe(film)
    if not predict(film) or not foresaw(film, numbers):
        decode_all(film)
    return film


def foresaw(film, numbers):
    """Whether the packets predicted the first frames. numbers: of their packets, from `probe`"""
    # Where fewer than PROBED were decoded, the film has no others.
    if len(numbers) < PROBED and len(numbers) != len(film.times):
        return False
    return film.ids is None or film.ids[:len(numbers)].tolist() == numbers


def probe(film):
    """Decode the first frames, for their size, and to see whether the packets predict them.
    -> numbers of their packets"""
    numbers = []
    with opened(film.path) as (container, stream):
        for number, held_back, frame in decode(film, container, stream, film.first):
            numbers.append(number)
            film.delay = max(film.delay, held_back)
            if len(numbers) == 1:
                film.size = to_upright(frame, film.aspect).shape[:2]
            if len(numbers) == PROBED:
                break
    if not numbers:
        raise VideoError(f"{film.path}: no frame can be decoded")
    return numbers


def predict(film):
    """Set the film's frames and their times as its packets tell them. -> False if they do not"""
    packets, first = film.packets, film.first
    numbers = np.flatnonzero(packets.shown)
    numbers = numbers[numbers >= first]
    if film.kind == "avi":                 # has no pts: FFmpeg guesses them
        ids_known = film.delay == 0
        times = packets.dts[numbers]
    else:
        ids_known = True
        times = packets.pts[numbers]
        if packets.key[first]:
            # Leading B-frames of an open group of pictures also refer to frames before the file.
            leads = (times < packets.pts[first]) & ~packets.key[numbers]
            numbers, times = numbers[~leads], times[~leads]
        order = np.argsort(times)
        numbers, times = numbers[order], times[order]
    # Of a picture in two fields, each field may be a packet; its duration is half a frame's.
    uneven = len(np.unique(packets.duration[:-1])) > 1
    fields = film.codec == "h264" and film.kind in BY_PLACE and uneven
    if fields or packets.joined or len(times) == 0 or not ascend(times):
        return False
    # In mov, durations are from one dts to the next. Only the last packet has one of its own.
    last = -1 if film.kind == MOV else numbers[-1]
    set_frames(film, numbers, times, packets.key[numbers], packets.duration[last])
    film.end = max(film.end, packets.end_of_empty)
    if not ids_known:
        film.ids = None
    return True


def ascend(times):
    """Whether times are all known, and each is after the last one."""
    return UNKNOWN not in times and bool(np.all(np.diff(times) > 0))


def decode_all(film):
    """Set the film's frames and times by a full decode, since its packets do not tell them. Raises
    VideoError if a frame is damaged or missing."""
    numbers, keys = [], []
    in_fields = False
    with opened(film.path) as (container, stream):
        for number, _, frame in decode(film, container, stream, film.first):
            if frame.is_corrupt:
                raise damaged(film, number)
            numbers.append(number)
            keys.append(frame.key_frame)
            in_fields = in_fields or frame.interlaced_frame
    if not numbers:
        raise VideoError(f"{film.path}: no frame can be decoded")
    packets = film.packets
    ids = np.array(numbers)
    known = ids >= 0
    of_packet = np.maximum(ids, 0)
    stamps = packets.dts if film.kind == "avi" else packets.pts
    times = np.where(known, stamps[of_packet], UNKNOWN)
    if not (film.codec == "h264" and in_fields):          # two packets may be fields of one frame
        refuse_lost_frames(film, times)
    duration = packets.duration[of_packet[-1]]
    if film.codec == "h264":
        duration = 0                       # perhaps of one field
    if not ascend(times):
        times = np.sort(times)             # pts in another order than the frames
    if not ascend(times) and film.times is None:
        times = np.arange(len(ids))
        duration = 1
        film.tick = 1 / film.rate
    elif not ascend(times):                # frames are asked for by the ticks known till now
        span = film.end - film.times[0]
        times = film.times[0] + span * np.arange(len(ids)) // len(ids)
    film.decoded = True
    film.seeks = True
    set_frames(film, ids, times, np.array(keys) & known & packets.key[of_packet], duration)


def refuse_lost_frames(film, times):
    """Raises VideoError if fewer frames were decoded, at the ticks `times`, than predicted."""
    if film.times is None or film.codec not in FRAME_EACH:
        return
    # A recording may begin in the middle: nothing is lost before the first frame that is decoded.
    expected = np.count_nonzero(film.times >= times.min())
    if len(times) < expected:
        raise VideoError(f"{film.path}: damaged, only {len(times)} of {expected} frames can be "
                         "decoded")


def set_frames(film, ids, times, keys, duration):
    """ids, times, keys: [n] of each frame, in the order shown: the number of its packet, its tick,
    and whether decoding can start at it. duration: ticks of the last one; 0: as the others"""
    film.ids = ids
    film.times = times
    film.key_frames = np.flatnonzero(keys)
    film.keys = ids[film.key_frames]
    mean = round((times[-1] - times[0]) / max(1, len(times) - 1))
    film.end = int(times[-1]) + int(duration or mean or 1)


# --------------------------------------------------------------------------------------------------
# reading: decoding some of its frames

def read_film(film, chosen, out):
    """Fill out, uint8 [n, H, W, 3], with the frames on screen at the ticks chosen, which ascend.

    Seeks are only a shortcut: if one leads elsewhere, decoding starts at the beginning. If even so
    the frames are not those that the packets predict, and none is damaged, they are learnt from one
    full decode.
    """
    while True:
        places = np.searchsorted(film.times, chosen, side="right") - 1
        if film.seeks and read_runs(film, plan(film, places), places, out):
            return
        film.seeks = False
        if read_runs(film, [Run(0, film.first, 0, len(places))], places, out):
            return
        if film.decoded:
            raise VideoError(f"{film.path}: damaged, not every frame can be decoded again")
        decode_all(film)


@dataclass
class Run:
    """Frames that are decoded in one go."""
    place: int             # of the frame at which decoding starts
    number: int            # of its packet
    lo: int                # it gives those of the wanted frames
    hi: int


def plan(film, places):
    """How to reach frames at `places`, ascending: from the key before each. -> list of `Run`"""
    runs = []
    for i, place in enumerate(places):
        key = np.searchsorted(film.key_frames, place, side="right") - 1
        start, number = 0, film.first
        if key > 0:
            start, number = int(film.key_frames[key]), int(film.keys[key])
        if runs and start <= places[i - 1] + NEAR:
            runs[-1].hi = i + 1
        else:
            runs.append(Run(start, number, i, i + 1))
    return runs


def read_runs(film, runs, places, out):
    """-> whether all frames at `places` were found"""
    with opened(film.path) as (container, stream):
        if runs[0].number > film.first:
            # Decode the first frame before seeking: x264 writes its version only there, and without
            # it FFmpeg decodes old 4:4:4 files to garbage.
            next(decode(film, container, stream, film.first))
        try:
            return all(read_run(film, run, container, stream, places, out) for run in runs)
        except av.error.FFmpegError:
            if runs[-1].number == film.first:              # no seek is to blame
                raise
            return False


def read_run(film, run, container, stream, places, out):
    """-> whether all frames of the run were found. Raises VideoError if one of those decoded is
    damaged, or of another size."""
    seeks = run.number > film.first
    place = run.place
    filled = run.lo
    for number, held_back, frame in decode(film, container, stream, run.number):
        if seeks and place == run.place and not (number == run.number and frame.key_frame):
            return False                   # decoding cannot start here, whatever the table says
        if frame.is_corrupt and seeks:
            return False
        if frame.is_corrupt:
            raise damaged(film, number)
        if not film.agrees(place, number, held_back):
            return False
        if place == places[filled]:
            rgb = to_upright(frame, film.aspect)
            if rgb.shape != out.shape[1:]:
                raise VideoError(f"{film.path}: the frame size changes from {out.shape[1:3]} "
                                 f"to {rgb.shape[:2]}")
        while filled < run.hi and places[filled] == place:     # may be chosen twice
            out[filled] = rgb
            filled += 1
        if filled == run.hi:
            return True
        place += 1
    return False


def damaged(film, number):
    seconds = float(film.packets.pts[number] * film.tick)
    return VideoError(f"{film.path}: damaged, the frame at {seconds:.2f} s has missing parts")


def decode(film, container, stream, start):
    """Decode from packet number `start` on. Yields (the number of the packet that a frame is of,
    how many packets the decoder holds back, the frame)."""
    sent = came_out = 0
    begun = False
    for packet in chain(packets_from(film, container, stream, start), [None]):
        if packet is not None:
            packet.pts = start + sent
            sent += 1
        for frame in stream.codec_context.decode(packet):  # None: what it still holds back
            came_out += 1
            number = UNKNOWN if frame.pts is None else frame.pts
            begun = begun or number == start or not frame.is_corrupt
            if begun:                                      # else a leftover of an open group
                yield number, sent - came_out, frame


def packets_from(film, container, stream, number):
    """Yields the film's packets from `number` on, except empty ones. Ends early where a seek does
    not lead to them."""
    packets = (packet for packet in container.demux(stream) if packet.size)
    if number == film.first:
        yield from islice(packets, number, None)
        return
    known = film.packets
    if film.kind in BY_PLACE:
        container.seek(int(known.pos[number]), stream=stream, unsupported_byte_offset=True)
    elif film.kind == "avi":
        container.seek(int(known.dts[number]), stream=stream)
    else:
        container.seek(int(known.pts[number]), stream=stream)

    def is_packet(packet, n):              # the n-th; in asf many small ones share a place
        same_time = film.kind in BY_PLACE or packet.pts in (None, known.pts[n])
        return same_time and packet.pos == known.pos[n]

    packets = dropwhile(lambda packet: not is_packet(packet, number), packets)
    for n, packet in enumerate(packets, number):
        if n == len(known.pos) or not is_packet(packet, n):
            return
        yield packet


def to_upright(frame, aspect):
    """-> uint8 [H, W, 3], turned as the file says, of square pixels; transparency (gif, some mov)
    becomes black. aspect: width / height of a pixel"""
    shape = {}
    if aspect != 1:
        shape = {"width": max(1, round(frame.width * aspect)), "height": frame.height,
                 "interpolation": "BICUBIC"}
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", threads=1, **shape).astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24", threads=1, **shape)
    mirrored, turns = orientation(frame)
    if mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, turns)


def orientation(frame):
    """-> (whether to exchange left and right, how many quarter turns counter-clockwise to make
    then). The frame's display matrix, of nine numbers, shows (x, y) at (ax + cy, bx + dy)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    # y counts downwards; of zeros, atan2 is 0.
    return mirrored, -round(math.atan2(b, a) / (math.pi / 2))
