"""python -m pytest tests/test_fetching.py -q

How many vision tokens are in a rank's memory at once, and that a step is the same when they are
fetched again and again. This file, run as a script by torchrun, is what each rank does.
"""
import os
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import (
    alone,
    close,
    ended,
    flags,
    launched,
    metrics,
    question,
    run_of,
    same,
    write,
)
from small import film
from tiny_families import build

import model as vlm
import train
from flow import Group
from plumbing.fetching import rounds, store_received

VIDEOS = 24                # questions, each about a video of its own
STEP = dict(sft_steps=0, rl_steps=2, prompts_per_step=12, updates_per_rollout=1, oversample_cap=1,
            eval_every=0, save_every=9, show_every=0, eval_samples=1, max_tokens=1)


class Watch:
    """Counts the vision tokens that the tower made and that are still alive, in bytes."""

    def __init__(self):
        self.encoded, self.kept = [], []                   # videos
        self.alive, self.most = 0, 0
        self.largest = 0
        self.encode_video, self.store = vlm.encode_video, train.store_received

    def __enter__(self):
        vlm.encode_video, train.store_received = self.watched_encode, self.watched_store
        return self

    def __exit__(self, *_):
        vlm.encode_video, train.store_received = self.encode_video, self.store

    def watched_encode(self, model, open_video, ranks):
        vision, *about = self.encode_video(model, open_video, ranks)
        self.encoded.append(open_video().path)
        self.count(vision)
        return vision, *about

    def watched_store(self, run, drawn, group):
        self.kept.append(group.prompt.video)
        self.count(group.prompt.vision)
        return self.store(run, drawn, group)

    def count(self, vision):
        self.alive += vision.nbytes
        self.most = max(self.most, self.alive)
        self.largest = max(self.largest, vision.nbytes)
        weakref.finalize(vision, self.forget, vision.nbytes)

    def forget(self, size):
        self.alive -= size


def videos(tmp_path, *more):
    return write(tmp_path / "q.jsonl", *map(question, range(100, 100 + VIDEOS)), *more)


@pytest.mark.method
def test_a_round_has_what_fits_in_memory_or_is_decoded_at_once():
    prompts = [SimpleNamespace(vision=torch.zeros(n), ids=[0] * n) for n in (4, 4, 2, 9, 1, 1)]
    order = [3, 0, 1, 2, 4, 5]

    def cut(most_bytes, most_ids):
        return list(rounds(order, prompts, most_bytes, most_ids))

    assert cut(1 << 20, 0) == cut(0, 1 << 20) == [order]
    assert cut(0, 0) == [[i] for i in order]
    assert cut(4 * 8, 0) == cut(0, 8) == [[3], [0, 1], [2, 4, 5]]
    assert cut(4 * 13, 8) == cut(4 * 8, 13) == [[3, 0], [1, 2, 4, 5]]
    assert list(rounds([], prompts, 0, 0)) == []


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_tokens_of_a_group_that_was_sent_make_the_same_prompt(kind):
    """What was stored lacked the number of frames. A later question about the same video then read
    other times: "<7.5 seconds>" instead of "<6.8 seconds>" for the last frame of five. And a group
    kept the path that its video has on the machine that sent it."""
    model, tokenizer = build(kind)
    run = run_of(model, tokenizer)
    vision, *about = vlm.encode_video(model, lambda: film(5), train.Ranks())
    prompt = vlm.make_prompt(model, tokenizer, "Where?", vision, *about, key="k")
    theirs = train.data.Sample(**question(7, domain="count", video="/theirs/7.mp4"))
    mine = replace(theirs, video="/mine/7.mp4")
    sent = Group(0, theirs, replace(prompt, video=theirs.video))
    stored = store_received(run, [mine], sent)
    assert stored.sample == mine and stored.prompt.video == mine.video
    assert stored.prompt.vision.is_meta and torch.equal(stored.prompt.ids, prompt.ids)
    entry = run.cache.get("k", None)                       # is there, so nothing is encoded
    again = vlm.make_prompt(model, tokenizer, "Where?", *entry, key="k")
    assert same(vars(again), vars(prompt))


def test_a_step_holds_no_more_than_the_cache_may(run, tmp_path):
    """All prompts of a step held their vision tokens until its end, whatever cache_gb was: 450 GB
    of a machine's memory for 512 films. The numbers of the step are the same."""
    how = {**run.how, **STEP, "model": run.model, "data": videos(tmp_path)}
    size, peaks = size_of_one(run), {}
    for name, held in (("few", 3), ("all", VIDEOS)):
        with Watch() as watch:
            alone(**how, cache_gb=held * size / 2 ** 30, out_dir=tmp_path / name)
        peaks[name] = watch.most / watch.largest
        if name == "all":
            assert len(watch.encoded) == len(set(watch.encoded))       # each frame once in the run
    assert peaks["few"] <= 3 + 2                           # one that is made, one computed with
    assert peaks["all"] > 12
    few, every = metrics(tmp_path / "few", "rl"), metrics(tmp_path / "all", "rl")
    assert sum(row["valid_groups"] for row in every) > 1
    close(every[:1], few[:1], 1e-5)
    close(every, few, 1e-3)


def size_of_one(run):
    """Bytes of one video's vision tokens."""
    with Watch() as watch:
        model, _ = vlm.load(run.model)
        frames = run.how["frames"]
        vlm.encode_video(model, lambda: train.data.open_video("toy:100:1", frames), train.Ranks())
    return watch.largest


def worker(folder, size, *arguments):
    """What each of four ranks does, two to a video: a run that keeps three videos, a run that keeps
    all, and one that keeps one, with sharded parameters."""
    for name, held in (("few", 3), ("all", VIDEOS), ("sharded", 1)):
        more = flags(sp=2, cache_gb=held * int(size) / 2 ** 30, out_dir=f"{folder}/{name}",
                     fsdp=name == "sharded")
        with Watch() as watch:
            train.main(train.parse([*arguments, *more]))
        rank = int(os.environ["RANK"])
        torch.save([watch.most / watch.largest, watch.encoded, watch.kept],
                   f"{folder}/{name}-{rank}.pt")
    train.on_first(lambda: None, train.start(2))           # all have written
    torch.distributed.destroy_process_group()


def test_groups_bring_their_vision_tokens_to_other_ranks(run, tmp_path):
    """Four ranks, two to a video, without a cache on disk. A group that is trained on by the other
    team brings its tokens: nobody encodes them again while they are kept, and what is kept
    stays within its bound, but for one that is made, one sent and one computed with. With FSDP no
    rank waits for rounds of a rollout that others do not have: the dp teams have unlike numbers of
    prompts, since some videos are missing."""
    gone = [question(i, video=f"{i}.mp4") for i in range(3)]
    how = {**run.how, **STEP, "model": run.model, "data": videos(tmp_path, *gone)}
    alone(**how, out_dir=tmp_path / "alone")
    size = size_of_one(run)
    result = ended(launched(str(tmp_path), str(size), *flags(**how),
                            script=os.path.abspath(__file__), world=4))
    assert result.code == 0, result.err
    expected = metrics(tmp_path / "alone", "rl")
    for name, bound in (("few", 3 + 3), ("all", VIDEOS), ("sharded", 1 + 4)):
        close(expected[:1], metrics(tmp_path / name, "rl")[:1], 1e-5)
        close(expected, metrics(tmp_path / name, "rl"), 1e-3)
        moved = []
        for rank in range(4):
            most, encoded, kept = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert most <= bound, (name, rank)
            moved += kept
            if name == "all":
                assert len(encoded) == len(set(encoded)) and not set(encoded) & set(kept)
        assert moved, "no group changed its rank: this test would show nothing"


if __name__ == "__main__":
    worker(*sys.argv[1:])
