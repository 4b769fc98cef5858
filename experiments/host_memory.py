"""
Peak host memory of a step with many videos, for several bounds on the cache.

    python experiments/host_memory.py             128 videos of 8 MB of vision tokens, on one rank
    python experiments/host_memory.py 512 1       512 videos of 1 MB

The step is simulated: each video's vision tokens are random numbers in place of the tower's, a
rollout fetches them in rounds and training fetches them one video at a time, as train.py does.
Nothing is computed with them. Each row runs in a process of its own. "encoded" is how often a
video had to be encoded: 1 where all stay in memory.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import encode  # noqa: E402
import model as vlm  # noqa: E402
from flow import Ranks, Sample  # noqa: E402
from plumbing.fetching import fetch_in_rounds  # noqa: E402
from plumbing.metrics import peak_bytes  # noqa: E402
from plumbing.ranks import spawn  # noqa: E402


def step(videos, megabytes, cache_gb):
    """-> (bytes of host memory that the step adds at its peak, encodings per video)"""
    model, tokenizer = vlm.load("tiny")
    model.config.text_config.max_position_embeddings = 1 << 30
    width = model.config.text_config.hidden_size
    tokens = int(megabytes * 2 ** 20) // (width * 4)
    encoded = []

    def encode_video(model, open_video, ranks):
        encoded.append(1)
        return torch.randn(tokens, width), (tokens, 2, 2), 1.0

    vlm.encode_video = encode_video
    config = SimpleNamespace(frames=8, cache_dir="", rollout="torch", max_tokens=1)
    cache = encode.Cache(cache_gb * 2 ** 30)
    run = SimpleNamespace(config=config, ranks=Ranks(), model=model, tokenizer=tokenizer,
                          cache=cache, ahead=None)
    samples = [Sample(str(i), "What?", "", "open", f"toy:{i}:1") for i in range(videos)]
    before = peak_bytes()
    prompts = [prompt for _, prompt in data.make_prompts(run, samples, 8)[0]]
    for _, fetched in fetch_in_rounds(run, data.fetch, prompts):
        del fetched
    for prompt in prompts:
        data.fetch(run, [prompt])
    return peak_bytes() - before, len(encoded) / videos


def main():
    videos, megabytes = 128, 8.0
    if len(sys.argv) > 2:
        videos, megabytes = int(sys.argv[1]), float(sys.argv[2])
    total = videos * megabytes / 1024
    print(f"{videos} videos of {megabytes:g} MB: {1024 * total:,.0f} MB of vision tokens")
    for cache_gb in (2 * total, total / 4, total / 16):
        peak, encodings = spawn(1, step, videos, megabytes, cache_gb)
        print(f"cache_gb = {cache_gb:6.3f}: the step added {peak / 2 ** 20:6,.0f} MB at its peak; "
              f"each video encoded {encodings:.2f} times")


if __name__ == "__main__":
    main()
