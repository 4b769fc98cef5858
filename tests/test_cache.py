"""python -m pytest tests/test_cache.py -q

The cache on disk, and reading ahead. Clips are real, written here with PyAV; the several processes are real ones: this
file, run as a script, starts them all, and the tests look at what they brought.
"""
import copy
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import encode
import model as vlm
import train
from curriculum import Curriculum

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = encode.Ranks()
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
ENV |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def clip(path, seed, frames=10, size=56):
    """A film of noise; every frame is a keyframe, so that any of them can be read alone."""
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        s = out.add_stream("mpeg4", rate=5, options={"g": "1"})
        s.width = s.height = size
        s.pix_fmt, s.bit_rate = "yuv420p", 400_000
        for _ in range(frames):
            picture = noise.integers(0, 255, (size // 7, size // 7, 3), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
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

    def __init__(self, dtype=torch.float32, work=lambda: None):
        self.calls, self.dtype, self.work = 0, dtype, work

    def __call__(self):
        self.calls += 1
        self.work()
        return torch.arange(6, dtype=self.dtype).view(2, 3) + self.calls, (2, 2, 2), 1 / 3


def never():
    raise AssertionError("was made although it was there")


def same(a, b):
    return a[0].dtype == b[0].dtype and torch.equal(a[0], b[0]) and a[1:] == b[1:] and type(a[1]) is type(b[1]) is tuple


def entries(folder):
    return sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))


def count_patches(tower, seen):
    """Every temporal patch that goes through the tower, by its content."""
    def note(_, args, kwargs):
        t = len(kwargs["grid_thw"])                        # one temporal patch each
        seen.extend(hashlib.sha256(x.numpy()).hexdigest() for x in args[0].view(t, -1, args[0].shape[1]))
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


# ---------------------------------------------------------------------------------------------------------------------
# what a video's content is

def test_a_file_is_its_bytes_under_any_name(tmp_path):
    a, b = clip(tmp_path / "a.mp4", 0), clip(tmp_path / "b.mp4", 1)
    c = shutil.copy(a, tmp_path / "c.avi")
    with open(a, "rb") as f:
        assert data.fingerprint(a) == hashlib.sha256(f.read()).hexdigest() == data.fingerprint(c)
    assert data.fingerprint(a) != data.fingerprint(b)
    assert data.fingerprint(tmp_path / "a.mp4") == data.fingerprint(os.path.relpath(a)) == data.fingerprint(a)


def test_a_folder_is_its_pictures_in_order(tmp_path):
    """Names count, since they are the order; files that are not read do not."""
    def folder(name, *pictures):
        (tmp_path / name).mkdir()
        for file, colour in pictures:
            Image.new("RGB", (28, 28), colour).save(tmp_path / name / file)
        return str(tmp_path / name)
    a = folder("a", ("1.png", "red"), ("2.png", "blue"))
    assert data.fingerprint(a) == data.fingerprint(folder("b", ("1.png", "red"), ("2.png", "blue")))
    others = [folder("c", ("1.png", "blue"), ("2.png", "red")), folder("d", ("1.png", "red"), ("3.png", "blue")), folder("e", ("1.png", "red"))]
    assert len({data.fingerprint(x) for x in [a, *others]}) == 4
    before = data.fingerprint(a)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert data.fingerprint(a) == before
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a" / "3.png")
    assert data.fingerprint(a) != before


def test_a_built_in_video_is_its_frames():
    prints = [data.fingerprint(v) for v in ("toy:1", "toy:2", "toy:1:2", "toy:1:3")]
    assert len(set(prints)) == 4 and data.fingerprint("toy:1") == prints[0]
    assert prints[2] == hashlib.sha256(data.toy_frames(1)[:4]).hexdigest()


@pytest.mark.parametrize("path", ["missing.mp4", "empty", "toy:x"])
def test_what_cannot_be_read_is_said_as_open_video_says_it(tmp_path, path):
    (tmp_path / "empty").mkdir()
    path = path if path.startswith("toy") else str(tmp_path / path)
    said = []
    for read in (data.fingerprint, lambda p: data.open_video(p, 4)):
        with pytest.raises(data.VideoError) as e:
            read(path)
        said.append(str(e.value))
    assert said[0] == said[1] and path in said[0]


def test_a_file_is_read_once_then_remembered_by_path_size_and_time(tmp_path, monkeypatch):
    """In memory and, in a folder, by the next run; a file that changed under its name is read again, its size the same."""
    reads, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, how: reads.append(f.name) or real(f, how))
    path, notes = clip(tmp_path / "a.mp4", 0), tmp_path / "notes"
    notes.mkdir()
    first = data.fingerprint(path, str(notes))
    assert data.fingerprint(path, str(notes)) == first and reads == [path]
    data.hash_files.cache_clear()                          # as a new process has it
    assert data.fingerprint(path, str(notes)) == first and reads == [path]
    assert len(os.listdir(notes)) == 1
    change_byte(path)
    os.utime(path, ns=(0, 12345))
    assert data.fingerprint(path, str(notes)) != first and len(reads) == 2
    for name in os.listdir(notes):                         # cut off when the machine went down
        os.truncate(notes / name, 20)
    data.hash_files.cache_clear()
    assert data.fingerprint(path, str(notes)) == real_digest(path) and len(reads) == 3


def real_digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# keys

def test_a_key_changes_with_content_sampling_pixels_dtype_and_tower(tmp_path, tiny):
    """Property 4 and decision 1. The clips have one shape. Another name, or process, is no change."""
    a, b, again = clip(tmp_path / "a.mp4", 0), clip(tmp_path / "b.mp4", 1), clip(tmp_path / "again.mp4", 0)
    c, cache, loaded = train.Config(), encode.Cache(), vlm.load(tiny)[0]

    def key(path, model=loaded, cache=cache, **how):
        return train.video_key(model, path, train.Config(**how), cache)

    def other(change):
        model = copy.deepcopy(loaded)
        with torch.no_grad():
            change(model)
        return model

    first = key(a)
    assert first == key(a) == key(a, cache=encode.Cache()) == key(again)
    assert first == key(a, vlm.load("tiny")[0])            # the same weights, never saved
    assert first == key(a, other(lambda m: m.get_output_embeddings().weight.zero_()))          # what RL trains is no part of it
    others = [key(b), key(a, frames=c.frames + 1), key(a, other(lambda m: setattr(m.pixels, "max_pixels", 784))),
              key(a, other(lambda m: m.to(torch.bfloat16))), key(a, other(lambda m: m.model.visual.blocks[0].attn.qkv.bias[3].add_(1e-6))),
              key(a, other(lambda m: setattr(m.model.visual.config, "window_size", 56)))]
    assert len({first, *others}) == 7
    with torch.no_grad():                                  # seen by a cache that has hashed this very tower before
        loaded.model.visual.merger.mlp[0].weight[0, 0] += 1e-3
    assert key(a) not in (first, *others)


def test_the_tower_is_hashed_once(monkeypatch, tiny):
    model, calls = vlm.load(tiny)[0], []
    real = type(model.model.visual).state_dict
    monkeypatch.setattr(type(model.model.visual), "state_dict", lambda self: calls.append(1) or real(self))
    cache = encode.Cache()
    assert len({cache.key(model.model.visual, i) for i in range(5)}) == 5 and len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# entries on disk

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path, lines, dtype):
    vision = torch.randn(50, 7).to(dtype)
    vision[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    fresh = encode.Cache(folder=tmp_path / "new" / "folder", say=lines.append).get("k", lambda: (vision.T, (1, 2, 3), 0.1 + 0.2))
    read = encode.Cache(folder=str(tmp_path / "new" / "folder"), say=lines.append).get("k", never)
    assert read[0].view(torch.uint8).equal(fresh[0].contiguous().view(torch.uint8)) and read[0].shape == (7, 50)
    assert read[1:] == ((1, 2, 3), 0.1 + 0.2) and type(read[1]) is tuple and not lines


def test_what_left_the_memory_comes_from_the_disk(tmp_path):
    """Room for two of 24 bytes: nothing is ever made twice, and the bound holds."""
    cache, make = encode.Cache(50, str(tmp_path)), {k: Maker() for k in "abcd"}
    for _ in range(3):
        for k in "abcd":
            cache.get(k, make[k])
            assert cache.bytes == sum(v[0].nbytes for v in cache.kept.values()) <= 50
    assert [m.calls for m in make.values()] == [1] * 4 and entries(tmp_path) == [f"{k}.safetensors" for k in "abcd"]


def test_no_damage_to_an_entry_is_ever_served(tmp_path, lines, monkeypatch):
    """A bit of every byte flipped, and cut at many lengths: encoded again and said so in a line, or, where the byte says nothing,
    the same to the bit. Then the entry is whole again."""
    monkeypatch.setattr(os, "fsync", lambda f: None)       # hundreds of writes
    path, make = tmp_path / "k.safetensors", Maker()
    right = encode.Cache(folder=str(tmp_path)).get("k", make)
    whole = path.read_bytes()
    made = 0
    flipped = [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1:] for i in range(len(whole)) for bit in (1 << i % 8,)]
    cut = [whole[:i] for i in range(0, len(whole), 3)]
    for damaged in [*flipped, *cut, whole + b"x"]:
        path.write_bytes(damaged)
        make.calls, lines[:] = 0, []
        assert same(encode.Cache(folder=str(tmp_path), say=lines.append).get("k", make), right)
        made += make.calls
        assert len(lines) == make.calls and all("k.safetensors: a damaged cache entry" in x and "encoded again" in x and "\n" not in x for x in lines)
        assert make.calls or damaged[-24:] == whole[-24:]
        assert same(encode.Cache(folder=str(tmp_path)).get("k", never if make.calls else make), right)
    assert made > 1.2 * len(whole) and sorted(os.listdir(tmp_path)) == ["k.safetensors", "k.safetensors.lock"]


def test_an_entry_under_another_name_is_not_served(tmp_path, lines):
    encode.Cache(folder=str(tmp_path)).get("a", Maker())
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    make = Maker()
    encode.Cache(folder=str(tmp_path), say=lines.append).get("b", make)
    assert make.calls == 1 and len(lines) == 1


def test_a_full_disk_costs_a_line(tmp_path, lines):
    """A real limit of the system on what a file may hold; afterwards there is room again, and no half of a file is left."""
    cache, make, soft = encode.Cache(folder=str(tmp_path), say=lines.append), Maker(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft[1]))
    try:
        first = cache.get("k", make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert cache.get("k", never) is first and make.calls == 1                # in memory all the same
    assert len(lines) == 1 and "k.safetensors: not written (" in lines[0] and os.strerror(errno.EFBIG) in lines[0]
    assert os.listdir(tmp_path) == ["k.safetensors.lock"]
    encode.Cache(folder=str(tmp_path), say=lines.append).get("k", make)
    assert make.calls == 2 and len(lines) == 1 and entries(tmp_path)


def test_without_a_lock_the_run_goes_on(tmp_path, lines):
    """The folder is removed while the run goes on: said, encoded, not kept on disk."""
    cache, make = encode.Cache(folder=str(tmp_path / "f"), say=lines.append), Maker()
    shutil.rmtree(tmp_path / "f")
    assert same(cache.get("k", make), (torch.arange(6.0).view(2, 3) + 1, (2, 2, 2), 1 / 3)) and make.calls == 1
    assert len(lines) == 2 and "no lock" in lines[0] and "not written" in lines[1]


def test_a_folder_that_cannot_be_is_one_clear_line_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/cache"):
        with pytest.raises(ValueError, match="cache_dir .*: not a folder that can be written to") as e:
            encode.Cache(folder=str(folder))
        assert str(folder) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cache_dir .*file: not a folder"):
        (tmp_path / "q.jsonl").write_text(json.dumps(dict(id="a", video="toy:1", question="?", answer="1")))
        train.main(train.parse([f"--data={tmp_path / 'q.jsonl'}", f"--cache_dir={tmp_path / 'file'}", f"--out_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cache_gb"):
            train.check(train.Config(cache_gb=bad), ALONE)


def test_nothing_is_kept_of_a_video_that_failed(tmp_path, lines):
    def fail():
        raise data.VideoError("broken")
    cache, make = encode.Cache(folder=str(tmp_path), say=lines.append), Maker()
    for _ in range(2):
        with pytest.raises(data.VideoError, match="broken"):
            cache.get("k", fail)
    assert not entries(tmp_path) and not cache.kept
    cache.get("k", make)                                   # the lock was given back
    assert make.calls == 1 and not lines


def test_cached_tokens_are_the_fresh_ones_and_a_changed_file_gives_new_ones(tmp_path, tiny):
    """Through `train.see`, with a real clip. Then its content changes under its name, frame count and all."""
    model, c = vlm.load(tiny)[0], train.Config(frames=6, cache_dir=str(tmp_path / "c"))
    path, seen = clip(tmp_path / "a.mp4", 0), []
    with count_patches(model.model.visual, seen):
        def see(cache):
            return train.see(model, path, train.video_key(model, path, c, cache), c, ALONE, cache)
        caches = [encode.Cache(folder=c.cache_dir) for _ in range(3)]
        first = see(caches[0])
        assert len(seen) == 3 and same(see(caches[0]), first) and same(see(caches[1]), first) and len(seen) == 3
        fresh = vlm.encode_video(model, lambda: data.open_video(path, 6), ALONE)
        assert same(first, fresh) and not first[0].requires_grad
        for frames, patches in ((10, 3), (3, 2)):
            clip(path, 7, frames)
            seen.clear()
            for cache in caches:                           # in memory or not, they all see that it is another
                assert same(see(cache), vlm.encode_video(model, lambda: data.open_video(path, 6), ALONE)) and not same(see(cache), first)
            assert len(seen) == 4 * patches


def test_a_video_that_changes_while_it_is_read_is_no_entry(tmp_path, tiny, monkeypatch):
    model, path, real = vlm.load(tiny)[0], clip(tmp_path / "a.mp4", 0), data.open_video
    c = train.Config(cache_dir=str(tmp_path / "c"))
    cache = encode.Cache(folder=c.cache_dir)
    see = lambda: train.see(model, path, train.video_key(model, path, c, cache), c, ALONE, cache)

    def opened(path, frames):
        video = real(path, frames)
        clip(path, 1)
        return video
    monkeypatch.setattr(data, "open_video", opened)
    with pytest.raises(data.VideoError, match="a.mp4: changed while it was read"):
        see()
    assert not entries(c.cache_dir) and not cache.kept
    monkeypatch.undo()
    assert same(see(), vlm.encode_video(model, lambda: data.open_video(path, c.frames), ALONE))


# ---------------------------------------------------------------------------------------------------------------------
# reading ahead

def in_fours(video):
    return [(lo, min(lo + 4, video.frames)) for lo in range(0, video.frames, 4)]


@pytest.fixture
def ahead():
    reader = data.Ahead(10)
    yield reader
    reader.stop()
    assert not [t for t in threading.enumerate() if t is not threading.main_thread() and t.is_alive() and "work" in t.name]


def read_all(video):
    return np.concatenate([video.read(lo, hi) for lo, hi in in_fours(video)])


def settle(reader):
    """Wait until the thread has done what it can. -> bytes that wait"""
    reader.thread.join()
    return sum(x.nbytes for job in reader.jobs.values() for x in job.result()[2].values())


def test_read_ahead_gives_what_open_video_gives(tmp_path, ahead):
    """The same frames, sizes and seconds; in the order foreseen or not, in the pieces foreseen or not, twice or not at all."""
    paths = [clip(tmp_path / f"{i}.mp4", i, 9 + i) for i in range(4)]
    right = {p: data.read_video(p, 10) for p in paths}

    def check(path, video, read=read_all):
        assert np.array_equal(read(video), right[path][0]) and video.seconds == right[path][1] and video.path == path

    for turns in (paths, [paths[2], paths[1], paths[3]], [paths[0], paths[0], paths[3]], []):
        ahead.start(paths, data.fingerprint, in_fours)
        for p in turns:
            check(p, ahead.open(p, data.fingerprint(p)))
    ahead.start(paths, data.fingerprint, in_fours)
    check(paths[0], ahead.open(paths[0], data.fingerprint(paths[0])), lambda v: v.read(0, v.frames))
    one = ahead.open(paths[1], data.fingerprint(paths[1]))
    first = one.read(0, 4)
    check(paths[2], ahead.open(paths[2], data.fingerprint(paths[2])))          # given up in the middle, or so it seemed
    check(paths[1], one, lambda v: np.concatenate([first, v.read(4, 8), v.read(8, v.frames)]))
    ahead.stop()
    check(paths[3], ahead.open(paths[3], data.fingerprint(paths[3])))          # nothing was begun


def test_the_thread_reads_ahead_and_the_rank_does_not(tmp_path, ahead, monkeypatch):
    """Every piece is decoded once, by the thread; nothing of what the cache has, not even opened."""
    paths, who, real = [clip(tmp_path / f"{i}.mp4", i) for i in range(3)], [], data.read_stream
    monkeypatch.setattr(data, "read_stream", lambda path, *rest: who.append((path, threading.current_thread())) or real(path, *rest))
    ahead.start(paths, lambda p: None if p == paths[1] else data.fingerprint(p), in_fours)
    settle(ahead)
    for p in (paths[0], paths[2]):
        read_all(ahead.open(p, data.fingerprint(p)))
    assert [p for p, _ in who] == [paths[0]] * 3 + [paths[2]] * 3
    assert threading.main_thread() not in {t for _, t in who}
    read_all(ahead.open(paths[1], data.fingerprint(paths[1])))
    assert who[-1] == (paths[1], threading.main_thread())


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_what_waits_is_bounded_in_bytes(tmp_path, pieces):
    """As many pieces as there is room for, the rest when its turn comes; the frames are the same."""
    paths, piece = [clip(tmp_path / f"{i}.mp4", i) for i in range(3)], 4 * 56 * 56 * 3
    reader = data.Ahead(10, pieces * piece + piece // 3)
    reader.start(paths, data.fingerprint, in_fours)
    assert pieces * piece <= settle(reader) <= reader.most
    for p in paths:
        assert np.array_equal(read_all(reader.open(p, data.fingerprint(p))), data.read_video(p, 10)[0])
    reader.stop()


def test_errors_in_the_thread_are_raised_at_the_videos_turn(tmp_path, ahead):
    """The same sentence as without a thread; the videos before and after are as they were."""
    good, cut = clip(tmp_path / "good.mp4", 0), clip(tmp_path / "cut.mkv", 1)
    (tmp_path / "notes.txt").write_text("no video " * 99)
    holed = tmp_path / "holed.avi"
    clip(holed, 2)
    blob = bytearray(holed.read_bytes())
    at = blob.index(b"00dc", len(blob) // 2) + 8
    blob[at:at + 600] = bytes(600)
    holed.write_bytes(blob)
    os.truncate(cut, os.path.getsize(cut) // 2)
    bad = [str(tmp_path / n) for n in ("missing.mp4", "notes.txt", "cut.mkv", "holed.avi")]

    def outcome(open_one, path):
        try:
            return read_all(open_one(path)).tobytes()
        except data.VideoError as e:
            return str(e)
    right = [outcome(lambda p: data.open_video(p, 10), p) for p in bad]
    assert all(p in said for p, said in zip(bad[:3], right)) and right[3] != data.read_video(good, 10)[0].tobytes()
    name = lambda p: data.fingerprint(p) if os.path.exists(p) else "gone"
    ahead.start([*bad, good], name, in_fours)
    assert [outcome(lambda p: ahead.open(p, name(p)), p) for p in bad] == right
    assert outcome(lambda p: ahead.open(p, name(p)), good) == data.read_video(good, 10)[0].tobytes()


def test_a_bug_in_the_thread_is_raised_not_waited_for(tmp_path, ahead):
    path = clip(tmp_path / "a.mp4", 0)
    ahead.start([path], data.fingerprint, lambda video: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.open(path, data.fingerprint(path))


def test_what_was_read_of_a_file_that_changed_is_not_used(tmp_path, ahead):
    path = clip(tmp_path / "a.mp4", 0)
    ahead.start([path], data.fingerprint, in_fours)
    settle(ahead)
    clip(path, 1)
    assert np.array_equal(read_all(ahead.open(path, data.fingerprint(path))), data.read_video(path, 10)[0])


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "reader.stop()"])
def test_no_thread_hangs_at_exit(tmp_path, end):
    """At work on a long list, with no room left, or just begun."""
    path = clip(tmp_path / "a.mp4", 0, 60)
    code = (f"import data, time\nreader = data.Ahead(60, 1)\npaths = [{path!r}, {path!r} + 'x'] + ['toy:%d' % i for i in range(500)]\n"
            f"reader.start(paths, str, lambda v: [(i, i + 1) for i in range(v.frames)])\nreader.open({path!r}, {path!r}).read(0, 1)\n{end}")
    run = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0 and not run.stderr


def test_a_peek_is_the_next_draw_and_draws_nothing():
    a, b = (Curriculum([f"q{i}" for i in range(7)], 3) for _ in range(2))
    for n in (1, 3, 5, 2, 7, 4, 9, 3):                     # over the edges of epochs
        assert a.peek(n) == a.peek(n) == (drawn := a.draw(n)) == b.draw(n)
        if n == 5:
            a.drop(drawn[0], "?"), b.drop(drawn[0], "?")
    assert a.state_dict() == b.state_dict()
    for id in a.ids:
        a.drop(id, "?")
    assert a.peek(3) == []


# ---------------------------------------------------------------------------------------------------------------------
# several processes. A case: (folder, ranks) -> anything, saved under its name

def case_alike(folder, ranks):
    """Miss, hit, a damaged entry, a failure on one rank and the next try: both ranks decide alike, whatever they see."""
    cache_dir, out, said = os.path.join(folder, "alike"), {}, []

    def get(key, work=lambda: None):
        """A make in which the ranks need one another, as in encode."""
        def make():
            encode.together(work, ranks)
            made.append(1)
            return torch.full((3, 2), float(len(key))), (1, 2, 2), 0.5
        made = []
        entry = encode.Cache(folder=cache_dir, say=said.append).get(key, make, ranks)
        return len(made), entry
    out["miss"], out["hit"] = get("a"), get("a")
    if ranks.sp_rank == 0:
        change_byte(os.path.join(cache_dir, "a.safetensors"))
    out["damaged"], out["mended"] = get("a"), get("a")
    for bad in (0, 1):
        def fail():
            if ranks.sp_rank == bad:
                raise data.VideoError(f"broken on rank {bad}")
        try:
            get("bb", fail)
        except data.VideoError as e:
            out["failed", bad] = str(e)
    out["after"] = get("bb")
    out["said"] = said
    return out


def case_one_video(folder, ranks):
    """sp = 1: two dp groups ask for one video at the same time, in a cache that is slow to make."""
    made = []

    def make():
        made.append(1)
        time.sleep(0.5)
        return torch.full((3, 2), 1.0 + ranks.rank), (1, 2, 2), 0.5
    torch.distributed.barrier()
    return encode.Cache(folder=os.path.join(folder, "one")).get("a", make, ranks), len(made)


def case_whole_run(folder, ranks):
    """Two epochs and more of cold start, RL and evaluations on real clips, stopped and started again, then mode=eval."""
    seen, real = [], vlm.load

    def load(*a, **k):
        model, tokenizer = real(*a, **k)
        count_patches(model.model.visual, seen)
        return model, tokenizer
    vlm.load = load
    how = [f"--{k}={v}" for k, v in dict(
        model=f"{folder}/model", data=f"{folder}/q.jsonl", eval_data=f"{folder}/e.jsonl", frames=6, sft_steps=3, sft_batch=4, prompts_per_step=4,
        group_size=2, think_budget=4, answer_budget=3, eval_every=1, show_every=0, save_every=2, sp=ranks.sp, cache_gb=1e-6).items()]
    counts = []
    for more in (["--rl_steps=2"], ["--rl_steps=4"], ["--mode=eval"]):
        train.main(train.parse([*how, *more, f"--out_dir={folder}/out{ranks.world}", f"--cache_dir={folder}/cache{ranks.world}"]))
        counts.append(list(seen))
    vlm.load = real
    return counts


WORLDS = {"pair": (2, 2, [case_alike, case_whole_run]), "two groups": (2, 1, [case_one_video]), "alone": (1, 1, [case_whole_run])}


def one_rank(rank, world, port, folder):
    size, sp, cases = WORLDS[world]
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = encode.start(sp)
    for case in cases:
        try:
            result = case(folder, ranks)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, os.path.join(folder, f"{world}-{case.__name__}-{rank}.pt"))


def slow_run(folder, started, hold):
    """A run that is alone, and slow to make its entry; it may be killed before it is done."""
    def make():
        started.set()
        time.sleep(hold)
        return torch.full((3, 2), 7.0), (1, 2, 2), 0.5
    entry = encode.Cache(folder=os.path.join(folder, "slow")).get("a", make)
    torch.save((time.monotonic(), entry), os.path.join(folder, f"slow-{os.getpid()}.pt"))


def main(folder, patience=100):
    """Processes are forked: torch is imported once."""
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    victim = fork.Process(target=slow_run, args=(folder, started, 1000))
    victim.start()
    started.wait(patience)
    heir = fork.Process(target=slow_run, args=(folder, fork.Event(), 0))       # waits for the lock of one that will not end
    heir.start()
    heir.join(0.5)
    waited = heir.is_alive()
    victim.kill()
    heir.join(patience)
    torch.save((waited, heir.exitcode, os.path.exists(f"{folder}/slow-{heir.pid}.pt")), f"{folder}/slow.pt")
    everyone = []
    for world, (size, *_) in WORLDS.items():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        everyone += [(world, r, fork.Process(target=one_rank, args=(r, world, port, folder))) for r in range(size)]
        [p.start() for _, _, p in everyone[-size:]]
    end = time.monotonic() + patience
    for world, r, p in everyone:
        p.join(max(0, end - time.monotonic()))
        if p.is_alive():
            print(f"{world}: rank {r} hangs", file=sys.stderr)
            p.kill()


@pytest.fixture(scope="module")
def brought(tmp_path_factory, tiny):
    """brought(world, case) -> what each rank brought from it, in order of rank."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny, folder / "model")
    for name, first, n in (("q", 0, 5), ("e", 100, 2)):    # two questions a video, some clips under two names
        rows = []
        for i in range(n):
            path = clip(folder / f"{first + i}.mp4", first + i, 7 + i)
            other = shutil.copy(path, folder / f"copy of {first + i}.mp4") if i % 2 else path
            rows += [dict(id=f"{first + i}{half}", video=os.path.basename(v), question="How many?", answer="1", thought="so") for half, v in (("a", path), ("b", other))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = subprocess.Popen([sys.executable, os.path.abspath(__file__), str(folder)], env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                           text=True, start_new_session=True)
    try:
        _, said = run.communicate(timeout=300)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)

    def look(world, case):
        if not case:
            return torch.load(folder / f"{world}.pt")
        found = [folder / f"{world}-{case}-{rank}.pt" for rank in range(WORLDS[world][0])]
        assert all(f.exists() for f in found), f"{world} did not finish {case}\n{said}"
        results = [torch.load(f, weights_only=False) for f in found]
        assert not any(isinstance(r, str) for r in results), results
        return results
    return SimpleNamespace(look=look, folder=folder)


def test_two_ranks_decide_alike_and_none_is_left_waiting(brought):
    results = brought.look("pair", "case_alike")
    for name, made in (("miss", 1), ("hit", 0), ("damaged", 1), ("mended", 0), ("after", 1)):
        for calls, entry in (r[name] for r in results):
            assert calls == made, name
            assert same(entry, (torch.full((3, 2), 2.0 if name == "after" else 1.0), (1, 2, 2), 0.5))
    for bad in (0, 1):
        assert [r["failed", bad] for r in results] == [f"broken on rank {bad}"] * 2
    assert [len(r["said"]) for r in results] == [1, 0] and "damaged" in results[0]["said"][0]


def test_two_groups_make_one_video_once(brought):
    (a, made_a), (b, made_b) = brought.look("two groups", "case_one_video")
    assert made_a + made_b == 1 and same(a, b)


def test_a_run_waits_for_the_run_that_encodes_and_takes_over_where_that_dies(brought):
    assert brought.look("slow", "") == (True, 0, True)


@pytest.mark.parametrize("world", ["alone", "pair"])
def test_each_frame_goes_through_the_tower_once_in_a_run_of_many_epochs(brought, world):
    """5 + 2 clips, 9 files, 14 questions; 3 epochs; no room in memory; stopped and started again; evaluated again."""
    ranks = brought.look(world, "case_whole_run")
    videos = [data.read_video(str(brought.folder / f"{i}.mp4"), 6)[0] for i in (0, 1, 2, 3, 4, 100, 101)]
    pixels = vlm.load(str(brought.folder / "model"))[0].pixels
    right = sorted(hashlib.sha256(x.numpy()).hexdigest() for v in videos for p, (t, h, w) in [vlm.patchify(v, pixels)] for x in p.view(t, h * w, -1))
    assert len(right) == 21
    for when in range(3):
        assert sorted(x for r in ranks for x in r[when]) == right
    assert len(entries(brought.folder / f"cache{len(ranks)}")) == 7


def test_cache_and_reading_ahead_change_no_number(brought, tmp_path):
    """The same run with no folder, nothing read ahead, its videos encoded in each step: bit for bit the same log."""
    brought.look("alone", "case_whole_run")
    with open(brought.folder / "out1" / "metrics.jsonl") as f:
        right = [json.loads(line) for line in f]
    how = dict(model=f"{brought.folder}/model", data=f"{brought.folder}/q.jsonl", eval_data=f"{brought.folder}/e.jsonl", frames=6, sft_steps=3,
               sft_batch=4, prompts_per_step=4, group_size=2, think_budget=4, answer_budget=3, eval_every=1, show_every=0, save_every=2, rl_steps=4,
               out_dir=tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "read_ahead", lambda *_: None)
        patch.setattr(encode.Cache, "get", lambda self, key, make, ranks: make())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train.main(train.parse([f"--{k}={v}" for k, v in how.items()]))
        torch.set_num_threads(threads)
    with open(tmp_path / "out" / "metrics.jsonl") as f:
        rows = [json.loads(line) for line in f]
    timeless = lambda rows: [{k: v for k, v in r.items() if not k.endswith("_s") and k != "peak_mb"} for r in rows]
    assert timeless(rows) == timeless(right)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
