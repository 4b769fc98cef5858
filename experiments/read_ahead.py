"""
Seconds that a rank waits for pixels, with and without reading ahead.

    python experiments/read_ahead.py              24 films of 720p, 3 s each
    python experiments/read_ahead.py 4 5          4 films, and a step of 5 s

The films are generated into a temporary folder. While a step runs (here: a sleep of 10 s), threads
read the films of the next one. Then the rank asks for their frames, as `model.encode_video` does,
and the seconds until it has all of them resized are printed. The vision tower is left out.

  none        the rank decodes and resizes by itself
  1 thread    one thread reads ahead
  threads     as in training: at most four threads, on the cores that the rank has
"""
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import encode  # noqa: E402
import model as vlm  # noqa: E402
from flow import Pixels, Sample  # noqa: E402
from plumbing import store  # noqa: E402
from plumbing.frames import resize  # noqa: E402

HEIGHT, WIDTH, RATE, SECONDS = 720, 1280, 25, 3
FRAMES = 64
QWEN = Pixels([0.5] * 3, [0.5] * 3, 14, 2, 2, 4 * 28 * 28, 308 * 308)


def make_film(path, seed):
    """Coarse noise that moves, in H.264, with a keyframe each second."""
    noise = np.random.default_rng(seed)
    wide = noise.integers(0, 256, (HEIGHT // 20, WIDTH // 10, 3), np.uint8)
    wide = wide.repeat(20, 0).repeat(20, 1)                # [H, 2 W, 3]
    with av.open(path, "w") as out:
        options = {"g": str(RATE), "preset": "ultrafast", "threads": "1"}
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(RATE * SECONDS):
            picture = np.ascontiguousarray(wide[:, 8 * i:8 * i + WIDTH])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())


def ask_for_pixels(run, paths):
    """-> (seconds until the resized frames of all films are there, a hash of their patches)"""
    digest = ""
    waited = 0.0
    for path in paths:
        begun = time.perf_counter()
        video = data.open_unchanged(run, path, data.video_key(run, path))
        size = vlm.frame_size(video.height, video.width, QWEN, video.frames)
        parts = []
        for lo, hi in vlm.frames_to_read(run.model, video, run.ranks):
            parts.append(resize(video.read(lo, hi), size))
        waited += time.perf_counter() - begun
        digest = store.sha256(digest, *(vlm.patchify(part, QWEN, size)[0] for part in parts))
    return waited, digest


def main(films=24, step=10.0):
    torch.set_num_threads(1)
    most_threads = store.MOST_THREADS
    tower = torch.nn.Linear(1, 1)                          # it is only asked for its name
    tower.config = SimpleNamespace(to_dict=dict)
    visual = SimpleNamespace(visual=tower)
    config = SimpleNamespace(cache_dir="", frames=FRAMES)
    run = SimpleNamespace(model=SimpleNamespace(model=visual, pixels=QWEN), config=config,
                          ranks=encode.Ranks(), cache=encode.Cache(), ahead=None)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.mp4" for i in range(films)]
        for seed, path in enumerate(paths):
            make_film(path, seed)
            data.video_key(run, path)                      # in no row is the file hashed
        print(f"{films} films, {SECONDS} s of {HEIGHT}p, {FRAMES} frames of each, a step of "
              f"{step:g} s, {store.cores_of_a_rank()} cores")
        hashes = set()
        for name, threads in (("none", 0), ("1 thread", 1), ("threads", most_threads)):
            store.MOST_THREADS = threads
            run.ahead = None
            if threads:
                run.ahead = store.Ahead(data.open_video, FRAMES)
                data.read_ahead(run, [Sample(path, "", "", "", path) for path in paths])
                time.sleep(step)
            waited, digest = ask_for_pixels(run, paths)
            hashes.add(digest)
            print(f"{name:10} {waited:6.2f} s")
            if run.ahead:
                run.ahead.stop()
    print("the same patches" if len(hashes) == 1 else "OTHER PATCHES")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
