"""
Reads any video file, or folder of pictures, as uint8 frames.

A file that pillow recognises is a picture (or an animated webp or avif): see pictures.py.
Everything else is a film, which FFmpeg reads through PyAV: see film.py.
"""
import os

from flow import VideoError
from plumbing.film import open_film
from plumbing.frames import one_file
from plumbing.pictures import (
    check_is_file,
    folder_and_fps,
    is_picture,
    open_folder,
    open_picture,
)


def open_file(path, frames):
    """-> `Video`. path: a film, a folder of pictures (folder@10fps: 10 of them a second) or a
    picture; frames: how many at most, evenly spaced in time. Pixels are read on demand.

    Raises VideoError, which names the file and the cause, or ValueError if frames < 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    path = os.fspath(path)
    with one_file(path):
        folder, fps = folder_and_fps(path)
        if not os.path.exists(folder):
            raise VideoError(f"{path}: no such file or folder")
        if os.path.isdir(folder):
            return open_folder(folder, frames, fps)
        check_is_file(folder)
        if is_picture(path):
            return open_picture(path, frames)
        return open_film(path, frames)


def read_video(path, frames):
    """As `open_file`, all frames at once. -> (uint8 [T,H,W,3], seconds between frames)"""
    video = open_file(path, frames)
    return video.read(0, video.frames), video.seconds
