"""
What it costs to read a few frames of an hour of film: makes the films and prints the table.

    python experiments/long_films.py                 ours, and decord and torchcodec if installed
    python experiments/long_films.py --before=DIR    also another checkout of this repository
    python experiments/long_films.py --frames=8,64 --folder=films

Each number is CPU seconds (user and system, one decoding thread) of a process of its own: open the
file and read that many frames, evenly spaced. "late" is one frame at the film's end, of an open
film. Frames are compared with those of our own full decode.
"""
import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = ("mp4", "mkv", "ts", "avi")
N, H, W = 90_000, 180, 320             # an hour at 25 frames a second
READERS = ("ours", "before", "decord", "torchcodec")


# --------------------------------------------------------------------------------------------------
# the films

def make_films(folder, n):
    """film.mp4 of n frames: a ground that moves, and the frame's number as 17 bright or dark bars.
    The others hold the same packets, but avi, which has no place for the times of B-frames."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "film.mp4")
    if not os.path.exists(path):
        draw_film(path, n)
    copy(path, os.path.join(folder, "film.mkv"))
    copy(path, os.path.join(folder, "film.ts"))
    copy(os.path.join(folder, "film.ts"), os.path.join(folder, "film.avi"), in_frames=True)


def draw_film(path, n):
    noise = np.random.default_rng(0).integers(0, 60, (H, 2 * W), dtype=np.uint8)
    ramp = np.add.outer(np.arange(H), np.arange(2 * W)) % 256 // 2
    ground = (ramp + noise).astype(np.uint8)
    with av.open(path + ".part", "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25,
                                options={"g": "250", "preset": "veryfast", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for i in range(n):
            picture = np.full((H * 3 // 2, W), 128, np.uint8)          # yuv420p, without colour
            picture[:H] = ground[:, 2 * i % W:][:, :W]
            for bit in range(17):
                picture[4:14, 8 + 16 * bit:20 + 16 * bit] = 235 if i >> bit & 1 else 16
            frame = av.VideoFrame.from_ndarray(picture, "yuv420p")
            frame.pts = i
            frame.time_base = Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    os.rename(path + ".part", path)


def copy(source, target, in_frames=False):
    """The packets of a film in another container; in_frames: with times in whole frames."""
    if os.path.exists(target):
        return
    with av.open(source) as film, av.open(target, "w") as out:
        stream = film.streams.video[0]
        new = out.add_stream_from_template(stream)
        for packet in film.demux(stream):
            if packet.dts is None:
                continue
            if in_frames:
                packet.pts = round(packet.pts * packet.time_base * 25)
                packet.dts = round(packet.dts * packet.time_base * 25)
                packet.duration = 1
                packet.time_base = Fraction(1, 25)
            packet.stream = new
            out.mux(packet)


# --------------------------------------------------------------------------------------------------
# measuring, in a process of its own

def places(n, frames):
    return [(2 * i + 1) * n // (2 * frames) for i in range(frames)]


def open_with(reader, path, frames):
    """-> read(i, j), frames i to j of those evenly spaced, uint8 [j-i, H, W, 3]"""
    if reader == "decord":
        import decord
        film = decord.VideoReader(path, num_threads=1)
        at = places(len(film), frames)
        return lambda i, j: film.get_batch(at[i:j]).asnumpy()
    if reader == "torchcodec":
        from torchcodec.decoders import VideoDecoder
        film = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        at = places(len(film), frames)
        return lambda i, j: film.get_frames_at(at[i:j]).data.numpy()
    from plumbing.video import open_file
    return open_file(path, frames).read


def cpu_seconds(work):
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(reader, path, frames, warm):
    """-> dict. warm: a short film that is read first, so that nothing is loaded for the first time
    while the clock runs."""
    open_with(reader, warm, 1)(0, 1)
    opened, read = cpu_seconds(lambda: open_with(reader, path, frames))
    decoded, out = cpu_seconds(lambda: read(0, frames))
    late, last = cpu_seconds(lambda: read(frames - 1, frames))
    assert np.array_equal(last[0], out[-1])
    return {"open": opened, "read": decoded, "late": late,
            "hashes": [hashlib.md5(frame.tobytes()).hexdigest() for frame in out],
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def whole(path, wanted):
    """The hashes of the wanted frames of a film, by number, all decoded one after the other; only
    the colours are ours. -> {number: hash}, and under -1 how many frames there are"""
    from plumbing.film import to_upright
    hashes = {}
    number = 0
    with av.open(path) as film:
        stream = film.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in film.decode(stream):
            if number in wanted:
                pixels = np.ascontiguousarray(to_upright(frame, 1))
                hashes[number] = hashlib.md5(pixels.tobytes()).hexdigest()
            number += 1
    return hashes | {-1: number}


def in_process(repository, *arguments):
    """-> what this script prints in a process of its own; None if it fails"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [repository, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--child", *arguments],
                          capture_output=True, text=True, env=environment)
    if done.returncode:
        print(arguments, done.stderr.strip().split("\n")[-1], file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().split("\n")[-1])


# --------------------------------------------------------------------------------------------------
# the table

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="out-films")
    parser.add_argument("--frames", default="8,16,32,64,128,512")
    parser.add_argument("--before", default="")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--child", nargs="*")
    options = parser.parse_args()
    if options.child:
        reader, path, *rest = options.child
        if reader == "whole":
            print(json.dumps(whole(path, {int(number) for number in rest})))
        else:
            print(json.dumps(measure(reader, path, int(rest[0]), rest[1])))
        return
    make_films(options.folder, N)
    warm = os.path.join(options.folder, "warm.mp4")
    if not os.path.exists(warm):
        draw_film(warm, 50)
    frames = [int(n) for n in options.frames.split(",")]
    print("| film | reader |", " | ".join(f"{n}" for n in frames), "| opening | late | MiB |")
    print("|" + "---|" * (len(frames) + 5))
    for kind in KINDS:
        path = os.path.join(options.folder, f"film.{kind}")
        wanted = {place for n in frames for place in places(N, n)}
        right = in_process(HERE, "whole", path, *map(str, wanted))
        for reader in options.readers.split(","):
            repository = options.before if reader == "before" else HERE
            if repository:
                print_row(kind, reader, repository, path, frames, warm, right)


def print_row(kind, reader, repository, path, frames, warm, right):
    cells, last = [], None
    for n in frames:
        result = in_process(repository, reader, path, str(n), warm)
        if result is None:
            cells.append("-")
            continue
        last = result
        at = places(right["-1"], n)
        wrong = sum(a != right[str(i)] for a, i in zip(result["hashes"], at))
        note = f" ({wrong} differ)" if wrong else ""
        cells.append(f"{result['open'] + result['read']:.2f}{note}")
    end = ["-", "-", "-"]
    if last:
        end = [f"{last['open']:.2f}", f"{last['late']:.3f}", str(last["memory"])]
    print("|", " | ".join([kind, reader, *cells, *end]), "|", flush=True)


if __name__ == "__main__":
    main()
