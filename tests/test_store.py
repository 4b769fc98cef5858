"""python -m pytest tests/test_store.py -q

What a video's content is, vision tokens on disk, and reading ahead. Clips are real, written here
with PyAV. (tests/test_cache.py has the disk as `encode.Cache` uses it, in several processes too.)
"""
import errno
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ENV
from test_cache import change_byte, clip

import data
from flow import VideoError
from plumbing import film, store, video
from plumbing.frames import resize


@pytest.fixture
def lines():
    return []


# --------------------------------------------------------------------------------------------------
# what a video's content is

def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def test_a_hash_is_of_the_text_and_of_the_bytes_of_each_tensor():
    x = torch.arange(6.0).view(2, 3)
    parts = b"text" + x.numpy().tobytes() + x.bfloat16().view(torch.int16).numpy().tobytes()
    assert store.sha256("text", x, x.bfloat16()) == hashlib.sha256(parts).hexdigest()
    assert store.sha256("text", x.T.requires_grad_()) == store.sha256("text", x.T.contiguous())


def test_a_file_is_its_bytes_under_any_name(tmp_path):
    a = clip(tmp_path / "a.mp4", 0)
    b = clip(tmp_path / "b.mp4", 1)
    c = shutil.copy(a, tmp_path / "c.avi")
    assert store.fingerprint(a) == digest(a) == store.fingerprint(c) == data.fingerprint(a)
    assert store.fingerprint(a) != store.fingerprint(b)
    assert store.fingerprint(tmp_path / "a.mp4") == store.fingerprint(a)
    assert store.fingerprint(os.path.relpath(a)) == store.fingerprint(a)


def test_a_folder_is_its_pictures_in_order(tmp_path):
    """Names count, since they are the order; files that are not read do not."""
    def folder(name, *pictures):
        (tmp_path / name).mkdir()
        for file, colour in pictures:
            Image.new("RGB", (28, 28), colour).save(tmp_path / name / file)
        return str(tmp_path / name)

    a = folder("a", ("1.png", "red"), ("2.png", "blue"))
    b = folder("b", ("1.png", "red"), ("2.png", "blue"))
    others = [
        folder("c", ("1.png", "blue"), ("2.png", "red")),
        folder("d", ("1.png", "red"), ("3.png", "blue")),
        folder("e", ("1.png", "red")),
    ]
    assert store.fingerprint(a) == store.fingerprint(b)
    assert len({store.fingerprint(x) for x in [a, *others]}) == 4
    before = store.fingerprint(a)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert store.fingerprint(a) == before
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a" / "3.png")
    assert store.fingerprint(a) != before


@pytest.mark.parametrize("path", ["missing.mp4", "empty"])
def test_what_cannot_be_read_is_named_as_open_file_names_it(tmp_path, path):
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / path)
    errors = []
    for read in (store.fingerprint, lambda path: video.open_file(path, 4)):
        with pytest.raises(VideoError) as e:
            read(path)
        errors.append(str(e.value))
    assert errors[0] == errors[1] and path in errors[0]


def test_a_file_is_read_once_then_remembered_by_path_size_and_time(tmp_path, monkeypatch):
    """In memory and, in a folder, by the next run; a file that changed under its name is read
    again, its size the same."""
    reads = []
    real = hashlib.file_digest

    def file_digest(file, how):
        reads.append(file.name)
        return real(file, how)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    path = clip(tmp_path / "a.mp4", 0)
    notes = tmp_path / "notes"
    notes.mkdir()
    first = store.fingerprint(path, str(notes))
    assert store.fingerprint(path, str(notes)) == first and reads == [path]
    store.hash_files.cache_clear()                         # as a new process has it
    assert store.fingerprint(path, str(notes)) == first and reads == [path]
    assert len(os.listdir(notes)) == 1
    change_byte(path)
    os.utime(path, ns=(0, 12345))
    assert store.fingerprint(path, str(notes)) != first and len(reads) == 2
    for name in os.listdir(notes):                         # cut off when the machine went down
        os.truncate(notes / name, 20)
    store.hash_files.cache_clear()
    assert store.fingerprint(path, str(notes)) == digest(path) and len(reads) == 3


# --------------------------------------------------------------------------------------------------
# vision tokens on disk

def test_an_entry_has_the_name_and_the_seal_that_older_commits_gave_it(tmp_path, lines):
    """So that what older commits wrote is served."""
    disk = store.Disk(str(tmp_path), lines.append)
    vision = torch.arange(6.0).view(3, 2).bfloat16()
    assert not disk.has("k") and disk.read("k") is None
    disk.write("k", vision.T, (1, 2, 3), 1 / 3)
    assert os.listdir(tmp_path) == ["k.safetensors"] and disk.has("k")
    found, grid, seconds = disk.read("k")
    assert torch.equal(found, vision.T) and found.dtype == torch.bfloat16
    assert (grid, seconds) == ((1, 2, 3), 1 / 3) and not lines
    about = b"k [[1, 2, 3], 0.3333333333333333] torch.bfloat16 (2, 3)"
    whole = about + vision.T.contiguous().view(torch.int16).numpy().tobytes()
    video = "[[1, 2, 3], 0.3333333333333333]"
    assert disk.seal("k", video, vision.T) == hashlib.sha256(whole).hexdigest()


def test_a_lock_keeps_others_out_until_its_end(tmp_path, lines):
    """Also where what is done under it fails. Locks of two keys have nothing to do with another."""
    disk = store.Disk(str(tmp_path), lines.append)
    events = []

    def other():
        with store.Disk(str(tmp_path), lines.append).lock("a"):
            events.append("other")

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), disk.lock("a"), disk.lock("b"):
        thread.start()
        thread.join(0.2)
        events.append("first")
        raise ZeroDivisionError
    thread.join(10)
    assert events == ["first", "other"] and not lines


def test_a_note_on_a_full_disk_is_left_out(tmp_path):
    """A real limit of the system on what a file may hold: no half of a note stays."""
    path = clip(tmp_path / "a.mp4", 0)
    notes = tmp_path / "notes"
    notes.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            (tmp_path / "other").write_text("x" * 99)
        assert store.fingerprint(path, str(notes)) == digest(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(notes) == []


# --------------------------------------------------------------------------------------------------
# reading ahead

def in_fours(video):
    return [(lo, min(lo + 4, video.frames)) for lo in range(0, video.frames, 4)]


def own_size(video):
    return video.height, video.width


def read_all(video):
    return np.concatenate([video.read(lo, hi) for lo, hi in in_fours(video)])


def working_threads():
    return [thread for thread in threading.enumerate()
            if thread is not threading.main_thread() and "work" in thread.name]


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(store, "cores_of_a_rank", lambda: 8)   # this machine may have one
    reader = store.Ahead(data.open_video, 10)
    yield reader
    reader.stop()
    assert not working_threads()


def settle(reader):
    """Wait until the threads have done what they can. -> bytes that wait"""
    for thread in reader.threads:
        thread.join()
    waiting = 0
    for reading in reader.readings.values():
        waiting += sum(frames.nbytes for frames in reading.result().pieces.values())
    return waiting


def test_read_ahead_gives_what_open_video_gives(tmp_path, ahead):
    """The same frames, sizes and seconds; in the order foreseen or not, in the pieces foreseen or
    not, twice or not at all."""
    paths = [clip(tmp_path / f"{i}.mp4", i, 9 + i) for i in range(4)]
    right = {path: data.read_video(path, 10) for path in paths}

    def check(path, video, read=read_all):
        frames, seconds = right[path]
        assert np.array_equal(read(video), frames)
        assert video.seconds == seconds and video.path == path

    for turns in (paths, [paths[2], paths[1], paths[3]], [paths[0], paths[0], paths[3]], []):
        ahead.start(paths, data.fingerprint, in_fours, own_size)
        for path in turns:
            check(path, ahead.open(path, data.fingerprint(path)))
    ahead.start(paths, data.fingerprint, in_fours, own_size)
    zero = ahead.open(paths[0], data.fingerprint(paths[0]))
    check(paths[0], zero, lambda video: video.read(0, video.frames))
    one = ahead.open(paths[1], data.fingerprint(paths[1]))
    first = one.read(0, 4)
    check(paths[2], ahead.open(paths[2], data.fingerprint(paths[2])))  # video 1 is not read to its
    check(paths[1], one, lambda video: np.concatenate([                # end, or so it seemed
        first, video.read(4, 8), video.read(8, video.frames)]))
    ahead.stop()
    check(paths[3], ahead.open(paths[3], data.fingerprint(paths[3])))  # nothing was begun


def test_threads_read_ahead_and_the_rank_does_not(tmp_path, ahead, monkeypatch):
    """Every piece is decoded once, a video in one thread; what the cache has is not even opened."""
    paths = [clip(tmp_path / f"{i}.mp4", i) for i in range(3)]
    reads = []
    real = film.read_film

    def read_film(opened, *rest):
        reads.append((opened.path, threading.current_thread()))
        real(opened, *rest)

    def name(path):
        return None if path == paths[1] else data.fingerprint(path)

    monkeypatch.setattr(film, "read_film", read_film)
    ahead.start(paths, name, in_fours, own_size)
    settle(ahead)
    for path in (paths[0], paths[2]):
        read_all(ahead.open(path, data.fingerprint(path)))
    assert sorted(path for path, _ in reads) == [paths[0]] * 3 + [paths[2]] * 3
    assert len(set(reads)) == 2
    assert threading.main_thread() not in {thread for _, thread in reads}
    read_all(ahead.open(paths[1], data.fingerprint(paths[1])))
    assert reads[-1] == (paths[1], threading.main_thread())


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_what_waits_is_bounded_in_bytes(tmp_path, pieces):
    """As many pieces as there is room for, the rest at its turn; the frames are the same."""
    paths = [clip(tmp_path / f"{i}.mp4", i) for i in range(3)]
    piece = 4 * 56 * 56 * 3
    reader = store.Ahead(data.open_video, 10, pieces * piece + piece // 3)
    reader.start(paths, data.fingerprint, in_fours, own_size)
    assert pieces * piece <= settle(reader) <= reader.most
    for path in paths:
        frames = read_all(reader.open(path, data.fingerprint(path)))
        assert np.array_equal(frames, data.read_video(path, 10)[0])
    reader.stop()


def test_errors_in_the_thread_are_raised_at_the_videos_turn(tmp_path, ahead):
    """The same sentence as without a thread; the videos before and after are as they were."""
    good = clip(tmp_path / "good.mp4", 0)
    cut = clip(tmp_path / "cut.mkv", 1)
    os.truncate(cut, os.path.getsize(cut) // 2)
    (tmp_path / "notes.txt").write_text("no video " * 99)
    holed = tmp_path / "holed.avi"
    clip(holed, 2)
    blob = bytearray(holed.read_bytes())
    at = blob.index(b"00dc", len(blob) // 2) + 8
    blob[at:at + 600] = bytes(600)
    holed.write_bytes(blob)
    bad = [str(tmp_path / n) for n in ("missing.mp4", "notes.txt", "cut.mkv", "holed.avi")]
    good_bytes = data.read_video(good, 10)[0].tobytes()

    def outcome(open_one, path):
        try:
            return read_all(open_one(path)).tobytes()
        except VideoError as e:
            return str(e)

    def name(path):
        return data.fingerprint(path) if os.path.exists(path) else "gone"

    def open_ahead(path):
        return ahead.open(path, name(path))

    right = [outcome(lambda path: data.open_video(path, 10), path) for path in bad]
    assert all(path in text for path, text in zip(bad[:3], right)) and right[3] != good_bytes
    ahead.start([*bad, good], name, in_fours, own_size)
    assert [outcome(open_ahead, path) for path in bad] == right
    assert outcome(open_ahead, good) == good_bytes


def test_a_bug_in_the_thread_is_raised_not_waited_for(tmp_path, ahead):
    path = clip(tmp_path / "a.mp4", 0)
    ahead.start([path], data.fingerprint, lambda video: 1 / 0, own_size)
    with pytest.raises(ZeroDivisionError):
        ahead.open(path, data.fingerprint(path))


def test_what_was_read_of_a_file_that_changed_is_not_used(tmp_path, ahead):
    path = clip(tmp_path / "a.mp4", 0)
    ahead.start([path], data.fingerprint, in_fours, own_size)
    settle(ahead)
    clip(path, 1)
    frames = read_all(ahead.open(path, data.fingerprint(path)))
    assert np.array_equal(frames, data.read_video(path, 10)[0])


def test_threads_are_few_and_no_more_than_the_cores_of_a_rank(tmp_path, ahead, monkeypatch):
    """All of them are at work at once: each waits until all the others have come."""
    paths = [f"{i}.mp4" for i in range(9)]
    for cores, threads in ((8, 4), (3, 3), (1, 1)):
        monkeypatch.setattr(store, "cores_of_a_rank", lambda cores=cores: cores)
        all_here = threading.Barrier(threads, timeout=20)
        begun = []

        def name(path, all_here=all_here, begun=begun, threads=threads):
            begun.append(threading.current_thread())
            if len(begun) <= threads:
                all_here.wait()

        ahead.start(paths, name, in_fours, own_size)
        assert len(ahead.threads) == threads and settle(ahead) == 0
        assert len(begun) == len(paths) and len(set(begun[:threads])) == threads
        assert not any(reading.exception() for reading in ahead.readings.values())
    ahead.start(paths[:2], str, in_fours, own_size)
    assert len(ahead.threads) <= 2


def test_the_cores_of_a_machine_are_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert store.cores_of_a_rank() == 16
    for ranks, cores in ((1, 16), (8, 2), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert store.cores_of_a_rank() == cores


def test_what_waits_is_resized_and_many_films_fit(tmp_path, ahead):
    """In full size there was room for one film; a folder of pictures and a picture are resized
    too."""
    paths = [clip(tmp_path / f"{i}.mp4", i, size=224) for i in range(6)]
    (tmp_path / "folder").mkdir()
    for i in range(3):
        Image.new("RGB", (100, 60), (i, 99, 9)).save(tmp_path / "folder" / f"{i}.png")
    Image.new("RGB", (100, 60), "red").save(tmp_path / "picture.png")
    paths += [str(tmp_path / "folder"), str(tmp_path / "picture.png")]
    ahead.most = 10 * 224 * 224 * 3
    ahead.start(paths, data.fingerprint, in_fours, lambda video: (56, 84))
    assert settle(ahead) == (6 * 10 + 3 + 1) * 56 * 84 * 3 <= ahead.most
    for path in paths:
        video = ahead.open(path, data.fingerprint(path))
        original = data.open_video(path, 10)
        assert own_size(video) == own_size(original)
        right = resize(original.read(0, original.frames), (56, 84))
        assert np.array_equal(read_all(video), right)


def test_stop_while_threads_read(tmp_path, ahead):
    """Each ends after its piece, those that have not begun are not read, and the next start reads
    as if nothing had been."""
    paths = [clip(tmp_path / f"{i}.mp4", i) for i in range(6)]
    reading = threading.Event()
    read = []

    def pieces(video):
        read.append(video.path)
        reading.set()
        while not ahead.stopped:
            time.sleep(0.001)
        return in_fours(video)

    ahead.start(paths, data.fingerprint, pieces, own_size)
    readings = list(ahead.readings.values())
    assert reading.wait(20)
    ahead.stop()
    assert 1 <= len(read) <= 4 and not working_threads() and not ahead.readings
    assert all(promise.result().pieces == {} for promise in readings)
    ahead.start(paths, data.fingerprint, in_fours, own_size)
    assert settle(ahead) == 6 * 10 * 56 * 56 * 3


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "reader.stop()"])
def test_no_thread_hangs_at_exit(tmp_path, end):
    """At work on a long list, with no room left, or just begun."""
    path = clip(tmp_path / "a.mp4", 0, 60)
    code = "\n".join([
        "import data",
        "from plumbing import store",
        "reader = store.Ahead(data.open_video, 60, 1)",
        f"paths = [{path!r}, {path!r} + 'x'] + ['toy:%d' % i for i in range(500)]",
        "reader.start(paths, str, lambda v: [(i, i + 1) for i in range(v.frames)],",
        "             lambda v: (v.height, v.width))",
        f"reader.open({path!r}, {path!r}).read(0, 1)",
        end,
    ])
    run = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True,
                         timeout=30)
    assert run.returncode == 0 and not run.stderr
