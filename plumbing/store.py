"""
What saves work: videos identified by content, vision tokens kept on disk, videos read ahead.

    fingerprint    a hash of the content of a file or folder, regardless of its name
    Disk           vision tokens on disk, shared by ranks and runs
    Ahead          reads the next videos in threads while others are processed
"""
import atexit
import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flow import Video, VideoError
from plumbing.pictures import check_is_file, folder_and_fps, list_pictures

# --------------------------------------------------------------------------------------------------
# hashes

def sha256(text, *tensors):
    """The hash of a text and of the bytes of tensors. -> 64 hexadecimal digits"""
    digest = hashlib.sha256(text.encode())
    for x in tensors:
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(path, folder=""):
    """A hash of a video's content. -> 64 hexadecimal digits

    Of a file, the bytes, not the name; of a folder, the names, sizes and bytes of its pictures, in
    order, and how many are one second. A file is read once: then its hash is remembered by absolute
    path, size and modification time; in `folder`, if given, for later runs too. Raises VideoError.
    """
    path, fps = folder_and_fps(os.fspath(path))
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    try:
        is_folder = os.path.isdir(path)
        if not is_folder:
            check_is_file(path)
        files = list_pictures(path) if is_folder else [path]
        stamps = []
        for file in files:
            status = os.stat(file)
            stamps.append((os.path.abspath(file), status.st_size, status.st_mtime_ns))
        content = hash_files(tuple(stamps), is_folder, folder)
        return content if fps is None else sha256(f"{content} at {fps}")
    except OSError as e:
        raise VideoError(f"{path}: cannot be read ({e.strerror})") from e


@lru_cache(maxsize=None)
def hash_files(stamps, with_names, folder):
    """stamps: ((path, size, modification time), ...); with_names: file names are part of the
    content, as in a folder of pictures; folder: where notes of the hashes are kept, or empty."""
    note = None
    if folder:
        name = hashlib.sha256(repr((stamps, with_names)).encode()).hexdigest()
        note = os.path.join(folder, name + ".content")
        noted = read_note(note)
        if noted:
            return noted
    digest = hashlib.sha256()
    for path, size, _ in stamps:
        if with_names:
            digest.update(repr((os.path.basename(path), size)).encode())
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: digest)         # adds to the same digest
    if note:
        write_note(note, digest.hexdigest())
    return digest.hexdigest()


def read_note(path):
    """-> the hash; None if there is none, or an incomplete one from a machine that went down"""
    with suppress(OSError, UnicodeDecodeError), open(path) as f:
        text = f.read()
        if re.fullmatch("[0-9a-f]{64}", text):
            return text
    return None


def write_note(path, text):
    own = f"{path}.{os.getpid()}"                          # other ranks may write the same note
    try:
        with open(own, "w") as f:
            f.write(text)
        os.replace(own, path)
    except OSError:                                        # a full disk: the next run hashes again
        with suppress(OSError):
            os.remove(own)


# --------------------------------------------------------------------------------------------------
# vision tokens on disk

class Disk:
    """Vision tokens on disk, a safetensors file for each entry. Any number of ranks and runs may
    share a folder. Entries are never deleted here.

    A damaged entry or a full disk costs a warning and an encoding, but does not end the run.
    """

    def __init__(self, folder, say):
        """say(line) prints. Raises ValueError if the folder cannot be created or written to."""
        self.folder = folder
        self.say = say
        try:
            os.makedirs(folder, exist_ok=True)
            # Only a test shows it: permission bits mean nothing to root and on read-only disks.
            with tempfile.TemporaryFile(dir=folder) as probe:
                fcntl.flock(probe, fcntl.LOCK_EX)
        except OSError as e:
            raise ValueError(f"cache_dir {folder}: not a folder that can be written to "
                             f"({e.strerror})") from e

    def path(self, key):
        return os.path.join(self.folder, key + ".safetensors")

    def has(self, key):
        return os.path.exists(self.path(key))

    @contextmanager
    def lock(self, key):
        """Waits until no other process is inside the `with` of this key, so that no video
        is encoded twice at once. The system releases the lock of a process that dies."""
        with ExitStack() as until_end:
            try:
                file = until_end.enter_context(open(self.path(key) + ".lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as e:           # a full disk may not even hold this; write() says so too
                self.say(f"{self.path(key)}: no lock ({e.strerror}); "
                         "another run may encode the same video")
            yield

    def read(self, key):
        """-> (vision on the CPU, (t,h,w), seconds, frames), bit for bit as written; None if there
        is no complete entry. One of an older commit has no number of frames."""
        try:
            with safe_open(self.path(key), "pt") as f:
                about = f.metadata()
                vision = f.get_tensor("vision").clone()    # else it would change with the file
            if about["sha256"] != self.seal(key, about["video"], vision):
                raise ValueError("its sha256 is another")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            self.say(f"{self.path(key)}: a damaged cache entry ({e}); the video is encoded again")
            return None
        grid, *others = json.loads(about["video"])
        return vision, tuple(grid), *others

    def write(self, key, vision, grid, *others):
        """Write an entry, under another name first, so that an entry is always complete. The
        caller holds the lock. others: seconds, frames"""
        path = self.path(key)
        vision = vision.cpu().contiguous()
        video = json.dumps([grid, *others])
        about = {"video": video, "sha256": self.seal(key, video, vision)}
        try:
            with open(path + ".tmp", "wb") as f:
                f.write(save({"vision": vision}, about))
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        except OSError as e:
            with suppress(OSError):
                os.remove(path + ".tmp")
            self.say(f"{path}: not written ({e.strerror}); the run goes on without this entry")

    def seal(self, key, video, vision):
        """The hash of an entry: of its tokens and of all that describes them."""
        return sha256(f"{key} {video} {vision.dtype} {tuple(vision.shape)}", vision)


# --------------------------------------------------------------------------------------------------
# reading ahead

MOST_THREADS = 4


def cores_of_a_rank():
    """The cores that this process may use, shared with the other ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))     # torchrun's
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@dataclass
class Reading:
    """What a thread has read of one video."""
    key: str = None        # of the content that was read; None: it need not be read
    video: Video = None
    pieces: dict = field(default_factory=dict)     # {(lo, hi): uint8 [hi-lo, H', W', 3]}


class Ahead:
    """Reads videos in background threads before they are needed, a video in one thread. Frames and
    errors are those of `open_video`.

    Frames wait in the size in which the vision tower gets them, at most `most` bytes of them; what
    does not fit is read when it is needed. Each rank has its own threads, each of which decodes on
    one core.
    """

    def __init__(self, open_video, frames, most=512 << 20):
        """open_video(path, frames) -> `Video`; frames: per video. No thread runs before `start`."""
        self.open_video = open_video
        self.frames = frames
        self.most = most
        self.room = most           # bytes of frames that may still be read
        self.readings = {}         # {path: Future of Reading}
        self.threads = []
        self.lock = threading.Lock()       # of what the threads share: room, and the videos to do
        self.stopped = False

    def start(self, paths, key, pieces, resized):
        """Forget earlier videos and begin to read these, in order. The threads call the functions:
        key(path) -> the key of its content, None if it need not be read;
        pieces(video) -> [(lo, hi)], the frames that will be asked for together;
        resized(video) -> (height, width), in which they wait.
        """
        self.stop()
        self.stopped = False
        self.room = self.most
        self.readings = {path: Future() for path in paths}
        todo = iter(list(self.readings.items()))
        for _ in range(min(MOST_THREADS, cores_of_a_rank(), len(self.readings))):
            thread = threading.Thread(target=self.work, args=(todo, key, pieces, resized),
                                      daemon=True)
            thread.start()
            self.threads.append(thread)
        atexit.register(self.stop)         # the interpreter must not exit while FFmpeg reads

    def stop(self):
        """Forget all videos, and end the threads, after the piece that each is reading."""
        self.stopped = True
        self.readings = {}
        for thread in self.threads:
            thread.join()
        self.threads = []
        atexit.unregister(self.stop)

    def work(self, todo, key, pieces, resized):
        """A thread: take the next video of todo, set the result of its future, until all are done.
        An error is the result of its own video only."""
        while True:
            with self.lock:
                path, promise = next(todo, (None, None))
            if promise is None:
                return
            try:
                promise.set_result(self.read(path, key, pieces, resized))
            except Exception as e:         # any error: `open` raises it when needed
                promise.set_exception(e)

    def read(self, path, key, pieces, resized):
        """-> `Reading` of one video, with those of its pieces that there is room for."""
        reading = Reading()
        if self.stopped:
            return reading
        reading.key = key(path)
        if reading.key is None:
            return reading
        video = reading.video = self.open_video(path, self.frames)
        height, width = resized(video)
        for lo, hi in pieces(video):
            if self.stopped or not self.take_room((hi - lo) * height * width * 3):
                break
            reading.pieces[lo, hi] = video.read(lo, hi, (height, width))
        return reading

    def take_room(self, size):
        """-> whether there are that many bytes of room, which are now taken"""
        with self.lock:
            fits = size <= self.room
            if fits:
                self.room -= size
        return fits

    def open(self, path, key):
        """As open_video(path, frames), which a thread may have called already. What it read is
        used only if its content has this key.

        Frames that waited have the size that `start` was told. All others have the video's own,
        which is also the `Video`'s height and width. `model.patchify` gives the same patches of
        both.
        """
        if path not in self.readings:
            return self.open_video(path, self.frames)
        reading = self.readings.pop(path).result()         # waits for the thread
        if reading.key is None or reading.key != key:
            return self.open_video(path, self.frames)

        def read(lo, hi):
            if (lo, hi) in reading.pieces:
                return reading.pieces.pop((lo, hi))
            return reading.video.read(lo, hi)

        return replace(reading.video, read=read)
