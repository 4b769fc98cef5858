"""python -m pytest tests/test_cache.py -q

The cache: its keys, its entries on disk, and several processes that share one. Clips are real,
written here with PyAV; the several processes are real ones: this file, run as a script, starts them
all, and the tests look at what they brought. (tests/test_store.py has reading ahead.)
"""
import copy
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ended, launched

import data
import encode
import model as vlm
import train
from curriculum import Curriculum
from flow import Run, Sample
from plumbing import command_line
from plumbing.ranks import together
from plumbing.store import Ahead

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = encode.Ranks()


def clip(path, seed, frames=10, size=56):
    """A film of noise; every frame is a keyframe, so that any of them can be read alone."""
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        s = out.add_stream("mpeg4", rate=5, options={"g": "1"})
        s.width = s.height = size
        s.pix_fmt = "yuv420p"
        s.bit_rate = 400_000
        for _ in range(frames):
            squares = noise.integers(0, 255, (size // 7, size // 7, 3), dtype=np.uint8)
            picture = squares.repeat(7, 0).repeat(7, 1)
            out.mux(s.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(s.encode())
    return str(path)


def change_byte(path, at=-1):
    with open(path, "rb") as f:
        blob = bytearray(f.read())
    blob[at] ^= 0x41
    with open(path, "wb") as f:
        f.write(blob)


class Maker:
    """make() -> vision [2,3], grid, seconds; counts its calls, and no two give the same."""

    def __init__(self, dtype=torch.float32):
        self.calls = 0
        self.dtype = dtype

    def __call__(self):
        self.calls += 1
        return torch.arange(6, dtype=self.dtype).view(2, 3) + self.calls, (2, 2, 2), 1 / 3


def run_of(model, cache, config):
    """What `data.vision_tokens` needs of a run."""
    return Run(config, ALONE, print, model, None, None, cache)


def never():
    raise AssertionError("was made although it was there")


def same(a, b):
    assert type(a[1]) is type(b[1]) is tuple
    return a[0].dtype == b[0].dtype and torch.equal(a[0], b[0]) and a[1:] == b[1:]


def entries(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def hash_patches(patches, grid):
    """The content of each temporal patch. patches: [t*h*w, C]; grid: (t, h, w)"""
    t, h, w = grid
    return [hashlib.sha256(x.numpy()).hexdigest() for x in patches.view(t, h * w, -1)]


def count_patches(tower, seen):
    """Add every temporal patch that goes through the tower to seen, by its content."""
    def note(_, args, kwargs):
        grids = kwargs["grid_thw"].tolist()                # one for each temporal patch
        seen.extend(hash_patches(args[0], (len(grids), *grids[0][1:])))
    return tower.register_forward_pre_hook(note, with_kwargs=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint, so that its tower is frozen from the start."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = vlm.load("tiny")
    vlm.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def lines():
    return []


# --------------------------------------------------------------------------------------------------
# keys

def test_a_key_changes_with_content_sampling_pixels_dtype_and_tower(tmp_path, tiny):
    """Property 4 and decision 1. The clips have one shape. Another name, or process, is no
    change."""
    a = clip(tmp_path / "a.mp4", 0)
    b = clip(tmp_path / "b.mp4", 1)
    again = clip(tmp_path / "again.mp4", 0)
    c = train.Config()
    one_cache = encode.Cache()
    loaded = vlm.load(tiny)[0]

    def key(path, model=loaded, cache=one_cache, **how):
        return data.video_key(run_of(model, cache, train.Config(**how)), path)

    def other(change):
        model = copy.deepcopy(loaded)
        with torch.no_grad():
            change(model)
        return model

    first = key(a)
    assert first == key(a) == key(a, cache=encode.Cache()) == key(again)
    assert first == key(a, vlm.load("tiny")[0])            # the same weights, never saved
    trained = other(lambda m: m.get_output_embeddings().weight.zero_())
    assert first == key(a, trained)                        # what RL trains is no part of it
    others = [
        key(b),
        key(a, frames=c.frames + 1),
        key(a, other(lambda m: setattr(m.pixels, "max_pixels", 784))),
        key(a, other(lambda m: m.to(torch.bfloat16))),
        key(a, other(lambda m: m.model.visual.blocks[0].attn.qkv.bias[3].add_(1e-6))),
        key(a, other(lambda m: setattr(m.model.visual.config, "window_size", 56))),
    ]
    assert len({first, *others}) == 7
    with torch.no_grad():                                  # one_cache has hashed this very tower
        loaded.model.visual.merger.mlp[0].weight[0, 0] += 1e-3
    assert key(a) not in (first, *others)


def test_the_tower_is_hashed_once(monkeypatch, tiny):
    tower = vlm.load(tiny)[0].model.visual
    calls = []
    real = type(tower).state_dict

    def state_dict(self):
        calls.append(self)
        return real(self)

    monkeypatch.setattr(type(tower), "state_dict", state_dict)
    cache = encode.Cache()
    assert len({cache.key(tower, i) for i in range(5)}) == 5 and len(calls) == 1


# --------------------------------------------------------------------------------------------------
# entries on disk

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path, lines, dtype):
    vision = torch.randn(50, 7).to(dtype)
    vision[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    folder = tmp_path / "new" / "folder"
    writer = encode.Cache(folder=folder, say=lines.append)
    fresh = writer.get("k", lambda: (vision.T, (1, 2, 3), 0.1 + 0.2))
    found = encode.Cache(folder=str(folder), say=lines.append).get("k", never)
    assert found[0].view(torch.uint8).equal(fresh[0].contiguous().view(torch.uint8))
    assert found[0].shape == (7, 50)
    assert found[1:] == ((1, 2, 3), 0.1 + 0.2) and type(found[1]) is tuple and not lines


def test_what_left_the_memory_comes_from_the_disk(tmp_path):
    """Room for two of 24 bytes: nothing is ever made twice, and the bound holds."""
    cache = encode.Cache(50, str(tmp_path))
    make = {key: Maker() for key in "abcd"}
    for _ in range(3):
        for key in "abcd":
            cache.get(key, make[key])
            assert cache.bytes == sum(v[0].nbytes for v in cache.kept.values()) <= 50
    assert [m.calls for m in make.values()] == [1] * 4
    assert entries(tmp_path) == [f"{key}.safetensors" for key in "abcd"]


def test_has_is_what_a_get_would_find(tmp_path):
    """In memory, on disk, or in neither; without a folder in memory alone."""
    first = encode.Cache(folder=str(tmp_path))
    second = encode.Cache(folder=str(tmp_path))
    no_folder = encode.Cache()
    first.get("a", Maker())
    no_folder.get("b", Maker())
    assert first.has("a") and second.has("a") and not no_folder.has("a")
    assert not first.has("b") and not second.has("b") and no_folder.has("b")


def test_no_damage_to_an_entry_is_ever_served(tmp_path, lines, monkeypatch):
    """A bit of every byte flipped, and cut at many lengths: encoded again and said so in a line,
    or, where the byte says nothing, the same to the bit. Then the entry is whole again."""
    monkeypatch.setattr(os, "fsync", lambda f: None)       # hundreds of writes
    path = tmp_path / "k.safetensors"
    make = Maker()
    right = encode.Cache(folder=str(tmp_path)).get("k", make)
    whole = path.read_bytes()
    made = 0
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:]
               for i in range(len(whole))]
    cut = [whole[:i] for i in range(0, len(whole), 3)]
    for damaged in [*flipped, *cut, whole + b"x"]:
        path.write_bytes(damaged)
        make.calls = 0
        lines.clear()
        assert same(encode.Cache(folder=str(tmp_path), say=lines.append).get("k", make), right)
        made += make.calls
        assert len(lines) == make.calls
        for line in lines:
            assert "k.safetensors: a damaged cache entry" in line and "encoded again" in line
            assert "\n" not in line
        assert make.calls or damaged[-24:] == whole[-24:]
        again = never if make.calls else make
        assert same(encode.Cache(folder=str(tmp_path)).get("k", again), right)
    assert made > 1.2 * len(whole)
    assert sorted(os.listdir(tmp_path)) == ["k.safetensors", "k.safetensors.lock"]


def test_an_entry_under_another_name_is_not_served(tmp_path, lines):
    encode.Cache(folder=str(tmp_path)).get("a", Maker())
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    make = Maker()
    encode.Cache(folder=str(tmp_path), say=lines.append).get("b", make)
    assert make.calls == 1 and len(lines) == 1


def test_a_full_disk_costs_a_line(tmp_path, lines):
    """A real limit of the system on what a file may hold; afterwards there is room again, and no
    half of a file is left."""
    cache = encode.Cache(folder=str(tmp_path), say=lines.append)
    make = Maker()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        first = cache.get("k", make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.get("k", never) is first and make.calls == 1      # in memory all the same
    assert len(lines) == 1 and "k.safetensors: not written (" in lines[0]
    assert os.strerror(errno.EFBIG) in lines[0]
    assert os.listdir(tmp_path) == ["k.safetensors.lock"]
    encode.Cache(folder=str(tmp_path), say=lines.append).get("k", make)
    assert make.calls == 2 and len(lines) == 1 and entries(tmp_path)


def test_without_a_lock_the_run_goes_on(tmp_path, lines):
    """The folder is removed while the run goes on: said, encoded, not kept on disk."""
    cache = encode.Cache(folder=str(tmp_path / "f"), say=lines.append)
    make = Maker()
    shutil.rmtree(tmp_path / "f")
    right = torch.arange(6.0).view(2, 3) + 1, (2, 2, 2), 1 / 3
    assert same(cache.get("k", make), right) and make.calls == 1
    assert len(lines) == 2 and "no lock" in lines[0] and "not written" in lines[1]


def test_a_folder_that_cannot_be_is_one_clear_line_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/cache"):
        says = "cache_dir .*: not a folder that can be written to"
        with pytest.raises(ValueError, match=says) as e:
            encode.Cache(folder=str(folder))
        assert str(folder) in str(e.value) and "\n" not in str(e.value)
    sample = dict(id="a", video="toy:1", question="?", answer="1")
    (tmp_path / "q.jsonl").write_text(json.dumps(sample))
    c = train.parse([f"--data={tmp_path / 'q.jsonl'}", f"--cache_dir={tmp_path / 'file'}",
                     f"--out_dir={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="cache_dir .*file: not a folder"):
        train.main(c)
    assert not (tmp_path / "out").exists()
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cache_gb"):
            command_line.check_training(train.Config(cache_gb=bad), ALONE)


def test_nothing_is_kept_of_a_video_that_failed(tmp_path, lines):
    def fail():
        raise data.VideoError("broken")

    cache = encode.Cache(folder=str(tmp_path), say=lines.append)
    make = Maker()
    for _ in range(2):
        with pytest.raises(data.VideoError, match="broken"):
            cache.get("k", fail)
    assert not entries(tmp_path) and not cache.kept
    cache.get("k", make)                                   # the lock was given back
    assert make.calls == 1 and not lines


def test_cached_tokens_are_the_fresh_ones_and_a_changed_file_gives_new_ones(tmp_path, tiny):
    """Through `data.vision_tokens`, with a real clip. Then its content changes under its name,
    frame count and all."""
    model = vlm.load(tiny)[0]
    c = train.Config(frames=6, cache_dir=str(tmp_path / "c"))
    path = clip(tmp_path / "a.mp4", 0)
    seen = []

    def see(cache):
        run = run_of(model, cache, c)
        return data.vision_tokens(run, path, data.video_key(run, path))

    def encode_fresh():
        return vlm.encode_video(model, lambda: data.open_video(path, 6), ALONE)

    with count_patches(model.model.visual, seen):
        caches = [encode.Cache(folder=c.cache_dir) for _ in range(3)]
        first = see(caches[0])
        assert len(seen) == 3
        assert same(see(caches[0]), first) and same(see(caches[1]), first) and len(seen) == 3
        assert same(first, encode_fresh()) and not first[0].requires_grad
        for frames, patches in ((10, 3), (3, 2)):
            clip(path, 7, frames)
            seen.clear()
            for cache in caches:                           # in memory or not, they see the change
                assert same(see(cache), encode_fresh()) and not same(see(cache), first)
            assert len(seen) == 4 * patches


def test_a_video_that_changes_while_it_is_read_is_no_entry(tmp_path, tiny, monkeypatch):
    model = vlm.load(tiny)[0]
    path = clip(tmp_path / "a.mp4", 0)
    real = data.open_video
    c = train.Config(cache_dir=str(tmp_path / "c"))
    cache = encode.Cache(folder=c.cache_dir)

    def see():
        run = run_of(model, cache, c)
        return data.vision_tokens(run, path, data.video_key(run, path))

    def open_and_change(path, frames):
        video = real(path, frames)
        clip(path, 1)
        return video

    monkeypatch.setattr(data, "open_video", open_and_change)
    with pytest.raises(data.VideoError, match="a.mp4: changed while it was read"):
        see()
    assert not entries(c.cache_dir) and not cache.kept
    monkeypatch.undo()
    assert same(see(), vlm.encode_video(model, lambda: data.open_video(path, c.frames), ALONE))


# --------------------------------------------------------------------------------------------------
# what is read ahead

def test_a_peek_is_the_next_draw_and_draws_nothing():
    a, b = (Curriculum([f"q{i}" for i in range(7)], 3) for _ in range(2))
    for n in (1, 3, 5, 2, 7, 4, 9, 3):                     # over the edges of epochs
        peeked = a.peek(n)
        assert peeked == a.peek(n)
        drawn = a.draw(n)
        assert peeked == drawn == b.draw(n)
        if n == 5:
            a.drop(drawn[0], "?")
            b.drop(drawn[0], "?")
    assert a.state_dict() == b.state_dict()
    for id in a.ids:
        a.drop(id, "?")
    assert a.peek(3) == []


def test_a_key_asked_for_while_the_tower_is_hashed_is_the_same(tiny, monkeypatch):
    """The bug: a second thread found the tower noted as hashed, but no hash yet."""
    tower = vlm.load(tiny)[0].model.visual
    right = encode.Cache().key(tower, "a")
    cache = encode.Cache()
    meanwhile = []
    real = encode.sha256

    def sha256(text, *weights):
        if weights and not meanwhile:
            meanwhile.append(None)
            meanwhile[0] = cache.key(tower, "a")
        return real(text, *weights)

    monkeypatch.setattr(encode, "sha256", sha256)
    assert cache.key(tower, "a") == right and meanwhile == [right]


@pytest.mark.parametrize("frames", [1, 7, 10])
def test_the_tower_gets_the_same_patches_of_what_was_read_ahead(tmp_path, tiny, frames):
    """Bit for bit, with bounds of one frame and of a whole video (GLM-4.1V: there the size of what
    was resized is not always the size that it would be resized to)."""
    model = vlm.load(tiny)[0]
    shapes = [(70, 56), (140, 224), (50, 260), (28, 28), (56, 30)]
    paths = []
    for i, (height, width) in enumerate(shapes):
        folder = tmp_path / str(i)
        folder.mkdir()
        for n in range(9):
            noise = np.random.default_rng([i, n]).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{n}.png")
        paths.append(str(folder))
    paths.append(clip(tmp_path / "film.mp4", 9, frames=10, size=112))
    seen = []
    count_patches(model.model.visual, seen)
    c = train.Config(frames=frames)
    of_video = replace(model.pixels, min_pixels=0, video_pixels=(3000, 20000))
    for pixels in (model.pixels, of_video):
        model.pixels = pixels
        both = []
        for reads_ahead in (False, True):
            seen.clear()
            run = run_of(model, encode.Cache(), c)
            if reads_ahead:
                run.ahead = Ahead(data.open_video, frames)
                data.read_ahead(run, [Sample(p, "", "", "", p) for p in paths])
                for thread in run.ahead.threads:
                    thread.join()
                assert all(reading.result().pieces for reading in run.ahead.readings.values())
            for path in paths:
                data.vision_tokens(run, path, data.video_key(run, path))
            both.append(list(seen))
            if reads_ahead:
                run.ahead.stop()
        assert both[0] == both[1] and len(both[0]) >= len(paths)


def test_an_error_of_a_film_read_ahead_reaches_its_own_samples_alone(tmp_path, tiny):
    """A film that is cut off, and one that is missing: each names itself in the samples
    that ask about it, as without reading ahead; a film that changed meanwhile is read anew."""
    model, tokenizer = vlm.load(tiny)
    paths = [clip(tmp_path / f"{i}.mp4", i) for i in range(5)]
    cut = clip(tmp_path / "cut.mkv", 8)
    os.truncate(cut, os.path.getsize(cut) // 2)
    missing = str(tmp_path / "missing.mp4")
    order = [paths[0], cut, paths[1], missing, paths[2], cut, paths[3], paths[4]]
    samples = [Sample(f"s{i}", "what?", "1", "count", path) for i, path in enumerate(order)]
    both = []
    for reads_ahead in (False, True):
        run = run_of(model, encode.Cache(), train.Config(frames=6))
        run.tokenizer = tokenizer
        if reads_ahead:
            run.ahead = Ahead(data.open_video, 6)
            clip(paths[2], 77)
            data.read_ahead(run, samples)
            for thread in run.ahead.threads:
                thread.join()
        clip(paths[2], 55)
        prompts, dropped = data.make_prompts(run, samples, 4)
        both.append(([(s.id, p.key, data.fetch(run, [p])[0].vision) for s, p in prompts], dropped))
        if reads_ahead:
            run.ahead.stop()
    (right, right_dropped), (got, dropped) = both
    assert dropped == right_dropped and sorted(dropped) == ["s1", "s3", "s5"]
    assert "cut.mkv" in dropped["s1"] and "missing.mp4" in dropped["s3"]
    assert [x[:2] for x in got] == [x[:2] for x in right]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(got, right))


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_video_whose_size_the_tower_cannot_take_is_dropped_alone(tmp_path, tiny, reads_ahead):
    """The bug: it is read without an error, and the one about its size ended the whole run, in a
    reading thread or without one."""
    model, tokenizer = vlm.load(tiny)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path, size in zip(paths, [(56, 84), (3, 700), (84, 56)]):
        Image.new("RGB", size, "red").save(path)
    samples = [Sample(f"s{i}", "what?", "1", "count", path) for i, path in enumerate(paths)]
    run = run_of(model, encode.Cache(), train.Config(frames=6))
    run.tokenizer = tokenizer
    if reads_ahead:
        run.ahead = Ahead(data.open_video, 6)
        data.read_ahead(run, samples)
    prompts, dropped = data.make_prompts(run, samples, 4)
    assert [sample.id for sample, _ in prompts] == ["s0", "s2"]
    assert list(dropped) == ["s1"] and "frames of 700 x 3" in dropped["s1"]
    if reads_ahead:
        run.ahead.stop()


# --------------------------------------------------------------------------------------------------
# several processes. A case: (folder, ranks) -> anything, saved under its name

def case_alike(folder, ranks):
    """Miss, hit, a damaged entry, a failure on one rank and the next try: both ranks decide alike,
    whatever they see."""
    cache_dir = os.path.join(folder, "alike")
    out = {}
    lines = []

    def get(key, work=lambda: None):
        """A make in which the ranks need one another, as in encode."""
        made = []

        def make():
            together(work, ranks)
            made.append(1)
            return torch.full((3, 2), float(len(key))), (1, 2, 2), 0.5

        entry = encode.Cache(folder=cache_dir, say=lines.append).get(key, make, ranks)
        return len(made), entry

    def fail_on(bad):
        def work():
            if ranks.sp_rank == bad:
                raise data.VideoError(f"broken on rank {bad}")
        return work

    out["miss"] = get("a")
    out["hit"] = get("a")
    if ranks.sp_rank == 0:
        change_byte(os.path.join(cache_dir, "a.safetensors"))
    out["damaged"] = get("a")
    out["mended"] = get("a")
    for bad in (0, 1):
        try:
            get("bb", fail_on(bad))
        except data.VideoError as e:
            out["failed", bad] = str(e)
    out["after"] = get("bb")
    out["lines"] = lines
    return out


def case_one_video(folder, ranks):
    """sp = 1: two dp teams ask for one video at the same time, in a cache that is slow to make."""
    made = []

    def make():
        made.append(1)
        time.sleep(0.5)
        return torch.full((3, 2), 1.0 + ranks.rank), (1, 2, 2), 0.5

    torch.distributed.barrier()
    entry = encode.Cache(folder=os.path.join(folder, "one")).get("a", make, ranks)
    return entry, len(made)


def small_run(folder):
    return dict(model=f"{folder}/model", data=f"{folder}/q.jsonl", eval_data=f"{folder}/e.jsonl",
                frames=6, sft_steps=3, sft_batch=4, prompts_per_step=4, group_size=2,
                think_budget=4, answer_budget=3, eval_every=1, show_every=0, save_every=2)


def flags(options):
    return [f"--{name}={value}" for name, value in options.items()]


def case_whole_run(folder, ranks):
    """Two epochs and more of cold start, RL and evaluations on real clips, stopped and started
    again, then mode=eval."""
    seen = []
    real = vlm.load

    def load(*a, **k):
        model, tokenizer = real(*a, **k)
        count_patches(model.model.visual, seen)
        return model, tokenizer

    vlm.load = load
    options = {**small_run(folder), "sp": ranks.sp, "cache_gb": 1e-6,
               "out_dir": f"{folder}/out{ranks.world}", "cache_dir": f"{folder}/cache{ranks.world}"}
    counts = []
    for more in ("--rl_steps=2", "--rl_steps=4", "--mode=eval"):
        train.main(train.parse([*flags(options), more]))
        counts.append(list(seen))
    vlm.load = real
    return counts


WORLDS = {                                                 # ranks, sp, cases
    "pair": (2, 2, [case_alike, case_whole_run]),
    "two groups": (2, 1, [case_one_video]),
    "alone": (1, 1, [case_whole_run]),
}


def one_rank(rank, world, port, folder):
    size, sp, cases = WORLDS[world]
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                          LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    ranks = encode.start(sp)
    for case in cases:
        try:
            result = case(folder, ranks)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, os.path.join(folder, f"{world}-{case.__name__}-{rank}.pt"))


def slow_run(folder, started, seconds):
    """A run that is alone, and slow to make its entry; it may be killed before it is done."""
    def make():
        started.set()
        time.sleep(seconds)
        return torch.full((3, 2), 7.0), (1, 2, 2), 0.5

    entry = encode.Cache(folder=os.path.join(folder, "slow")).get("a", make)
    torch.save((time.monotonic(), entry), os.path.join(folder, f"slow-{os.getpid()}.pt"))


def main(folder, patience=300):
    """Processes are forked: torch is imported once."""
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    victim = fork.Process(target=slow_run, args=(folder, started, 1000))
    victim.start()
    started.wait(patience)
    heir = fork.Process(target=slow_run, args=(folder, fork.Event(), 0))   # waits for the lock
    heir.start()
    heir.join(0.5)
    waited = heir.is_alive()
    victim.kill()
    heir.join(patience)
    finished = os.path.exists(f"{folder}/slow-{heir.pid}.pt")
    torch.save((waited, heir.exitcode, finished), f"{folder}/slow.pt")

    processes = []
    for world, (size, *_) in WORLDS.items():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(size):
            process = fork.Process(target=one_rank, args=(rank, world, port, folder))
            process.start()
            processes.append((world, rank, process))
    end = time.monotonic() + patience
    for world, rank, process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            print(f"{world}: rank {rank} hangs", file=sys.stderr)
            process.kill()


def write_clips(folder):
    """q.jsonl, e.jsonl and their clips: two questions a clip, some clips under two names."""
    for name, first, n in (("q", 0, 5), ("e", 100, 2)):
        rows = []
        for i in range(n):
            path = clip(folder / f"{first + i}.mp4", first + i, 7 + i)
            second = path
            if i % 2:
                second = shutil.copy(path, folder / f"copy of {first + i}.mp4")
            for half, video in (("a", path), ("b", second)):
                rows.append(dict(id=f"{first + i}{half}", video=os.path.basename(video),
                                 question="How many?", answer="1", thought="so"))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def brought(tmp_path_factory, tiny):
    """brought.look(world, case) -> what each rank brought from it, in order of rank."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny, folder / "model")
    write_clips(folder)
    env = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    process = launched(str(folder), script=os.path.abspath(__file__), world=0, env=env)
    errors = ended(process, 300).err

    def look(world, case):
        if not case:
            return torch.load(folder / f"{world}.pt")
        ranks = range(WORLDS[world][0])
        files = [folder / f"{world}-{case}-{rank}.pt" for rank in ranks]
        assert all(f.exists() for f in files), f"{world} did not finish {case}\n{errors}"
        results = [torch.load(f, weights_only=False) for f in files]
        assert not any(isinstance(r, str) for r in results), results
        return results

    return SimpleNamespace(look=look, folder=folder)


def test_two_ranks_decide_alike_and_none_is_left_waiting(brought):
    results = brought.look("pair", "case_alike")
    expected = {"miss": 1, "hit": 0, "damaged": 1, "mended": 0, "after": 1}    # calls of make
    for name, made in expected.items():
        right = torch.full((3, 2), 2.0 if name == "after" else 1.0), (1, 2, 2), 0.5
        for calls, entry in (result[name] for result in results):
            assert calls == made, name
            assert same(entry, right)
    for bad in (0, 1):
        assert [r["failed", bad] for r in results] == [f"broken on rank {bad}"] * 2
    assert [len(r["lines"]) for r in results] == [1, 0] and "damaged" in results[0]["lines"][0]


def test_two_groups_make_one_video_once(brought):
    (a, made_a), (b, made_b) = brought.look("two groups", "case_one_video")
    assert made_a + made_b == 1 and same(a, b)


def test_a_run_waits_for_the_run_that_encodes_and_takes_over_where_that_dies(brought):
    assert brought.look("slow", "") == (True, 0, True)


@pytest.mark.parametrize("world", ["alone", "pair"])
def test_each_frame_goes_through_the_tower_once_in_a_run_of_many_epochs(brought, world):
    """5 + 2 clips, 9 files, 14 questions; 3 epochs; no room in memory; stopped and started again;
    evaluated again."""
    ranks = brought.look(world, "case_whole_run")
    pixels = vlm.load(str(brought.folder / "model"))[0].pixels
    right = []
    for i in (0, 1, 2, 3, 4, 100, 101):
        frames, _ = data.read_video(str(brought.folder / f"{i}.mp4"), 6)
        right += hash_patches(*vlm.patchify(frames, pixels))
    assert len(right) == 21
    for part in range(3):
        assert sorted(x for seen in ranks for x in seen[part]) == sorted(right)
    assert len(entries(brought.folder / f"cache{len(ranks)}")) == 7


def read_metrics(out_dir):
    """Without what tells of time and memory."""
    rows = []
    with open(out_dir / "metrics.jsonl") as f:
        for row in map(json.loads, f):
            row.pop("peak_mb", None)
            rows.append({name: x for name, x in row.items() if not name.endswith("_s")})
    return rows


def test_cache_and_reading_ahead_change_no_number(brought, tmp_path):
    """The same run with no folder, nothing read ahead, its videos encoded in each step: bit for bit
    the same log."""
    brought.look("alone", "case_whole_run")
    options = {**small_run(brought.folder), "rl_steps": 4, "out_dir": tmp_path / "out"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_ahead", lambda *_: None)
        patch.setattr(encode.Cache, "get", lambda self, key, make, ranks: make())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train.main(train.parse(flags(options)))
        torch.set_num_threads(threads)
    assert read_metrics(tmp_path / "out") == read_metrics(brought.folder / "out1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
