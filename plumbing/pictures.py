"""
Pictures as video, through pillow: a folder of pictures, one picture, an animated webp or avif.
"""
import os
import re
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flow import VideoError
from plumbing.frames import make_video, pick
from plumbing.mp4 import ends_inside_a_box
from plumbing.ranks import say_once

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM")
# Used only inside a folder, where suffixes tell pictures from other files.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff",
            ".ppm")
NOT_READ = (".gif", ".heic", ".heif", ".jp2", ".jxl", ".tga")      # pictures of other formats
# What pillow raises for a broken picture: the last three come from its webp and png readers and
# for oversized files.
ERRORS = (OSError, EOFError, SyntaxError, Image.DecompressionBombError)
LEAST_FPS, MOST_FPS = 1e-6, 1e6    # pictures a second
ORIENTATION = 0x0112           # the EXIF tag; values 5 to 8 are pictures that lie on their side


@contextmanager
def opened(path):
    """-> pillow's image, with only the header read. An error of pillow inside the `with` becomes a
    VideoError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except ERRORS as e:
        raise VideoError(f"{path}: broken picture: {e}") from e


def is_picture(path):
    """Whether pillow recognises this file as a picture, even a broken one. An animated png is left
    to FFmpeg: pillow shows its frames wrongly where one is disposed of, and a picture too many
    where the default one is not part of the animation. So is a film of JPEGs."""
    if path.lower().endswith((".mjpeg", ".mjpg")):
        return False
    try:
        with Image.open(path, formats=FORMATS) as image:
            return not (image.format == "PNG" and image.n_frames > 1)
    except UnidentifiedImageError:
        return False
    except ERRORS:
        return True


# --------------------------------------------------------------------------------------------------
# a folder

def list_pictures(folder):
    """Paths of the pictures in a folder: names with a picture's suffix, not hidden, in natural
    order. Raises VideoError if there are none, or one of a format that is not read."""
    visible = [name for name in os.listdir(folder) if not name.startswith(".")]
    visible.sort(key=natural_order)
    for name in visible:
        if name.lower().endswith(NOT_READ):
            raise VideoError(f"{folder}: {name} is a picture of a format that is not read in a "
                             "folder; convert it to png, or remove it")
    names = [name for name in visible if name.lower().endswith(SUFFIXES)]
    if not names:
        raise VideoError(f"{folder}: no pictures in this folder")
    files = [os.path.join(folder, name) for name in names]
    for file in files:
        check_is_file(file)
    return files


def check_is_file(path):
    """Raises VideoError for what is there but no file: a pipe or a device might never end."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise VideoError(f"{path}: is not a regular file")


def natural_order(name):
    """A key to sort names by: frame_2 comes before frame_10."""
    parts = []
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        is_number = i % 2 == 1                             # "²" is no number, but isdigit() is True
        parts.append(int(part) if is_number else part.lower())
    return parts, name                                     # "a1" and "A01" have equal parts


def folder_and_fps(path):
    """"clips/bird@10fps" -> ("clips/bird", 10.0): a folder, and how many of its pictures are one
    second. Any other path, and what exists by the whole name -> (path, None)"""
    number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?"
    match = re.fullmatch(rf"(.+)@({number})fps", path, re.DOTALL)
    if not match or os.path.exists(path) or not LEAST_FPS <= float(match[2]) <= MOST_FPS:
        return path, None
    return match[1], float(match[2])


def with_fps(path, fps, where):
    """The path of a sample's video and its field `fps` as one path, for `folder_and_fps`. Only a
    folder of pictures needs it: a film knows its times. Raises ValueError, which begins with where,
    unless fps is None or a positive number."""
    if fps is None or not os.path.isdir(path):
        return path
    is_number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if not is_number or not LEAST_FPS <= fps <= MOST_FPS:
        raise ValueError(f"{where}: 'fps' is {fps!r}, expected a positive number")
    return f"{os.path.normpath(path)}@{fps}fps"


def open_folder(path, frames, fps=None):
    """-> `Video` of at most `frames` of the folder's pictures, of which fps are one second; None:
    one. Raises VideoError if a picture is broken or has another size than the first one."""
    files = list_pictures(path)
    if fps is None and len(files) > 1:
        say_once("Folders of pictures are taken as one picture a second, since their samples have "
                 'no field "fps"')
    first_size = None
    for file in files:
        with opened(file) as image:
            size = upright_size(image)
        if first_size is None:
            first_size = size
        if size != first_size:
            raise VideoError(f"{file}: height and width {size} differ from {first_size} "
                             f"of {files[0]}")
    chosen = [files[place] for place in pick(range(len(files)), len(files), frames)]
    seconds = len(files) / len(chosen) / (fps or 1)
    return make_video(path, chosen, first_size, seconds, len(files) == 1, read_files)


def read_files(chosen, out):
    """chosen: the file of each frame."""
    for place, file in enumerate(chosen):
        with opened(file) as image:
            out[place] = upright_pixels(image, out.shape[1:], file)


# --------------------------------------------------------------------------------------------------
# one file

def open_picture(path, frames):
    """-> `Video` of a picture, which has one frame, or of at most `frames` frames of an animation.
    Raises VideoError if it is broken."""
    with opened(path) as image:
        if image.format == "AVIF" and ends_inside_a_box(path):
            raise VideoError(f"{path}: cut off")           # pillow shows its first frame alone
        times, end = display_times(image)
        size = upright_size(image)
    chosen = pick(times, end, frames)
    seconds = end / 1000 / len(chosen)

    def read(chosen, out):
        read_animation(path, chosen, out)

    return make_video(path, chosen, size, seconds, len(times) == 1, read)


def display_times(image):
    """-> ([n] milliseconds, when each frame appears; when the last one disappears)"""
    # Only these two are animated (FFmpeg reads an animated png). More pages in a tiff or a phone's
    # jpeg are no video.
    if image.format not in ("WEBP", "AVIF") or image.n_frames == 1:
        return [0], 1
    times = []
    now = 0
    for number in range(image.n_frames):
        image.seek(number)
        image.load()                                       # a webp has no duration before that
        times.append(now)
        now += round(image.info.get("duration", 0)) or 100     # 0 means 100 ms, as in browsers
    return times, now


def read_animation(path, chosen, out):
    """chosen: the number of each frame in the file."""
    with opened(path) as image:
        for place, number in enumerate(chosen):
            if number:
                image.seek(int(number))
            out[place] = upright_pixels(image, out.shape[1:], path)


# --------------------------------------------------------------------------------------------------
# pixels

def upright_size(image):
    """(height, width) as the picture is displayed. Reads no pixels."""
    exif = Image.Image.getexif(image)                      # a png's own getexif decodes the picture
    lies_on_its_side = 5 <= exif.get(ORIENTATION, 1) <= 8
    if lies_on_its_side and image.format != "TIFF":        # whose size pillow has turned already
        return image.width, image.height
    return image.height, image.width


def upright_pixels(image, shape, path):
    """-> uint8 [H, W, 3], the current frame of an image, upright and on black. Raises VideoError
    if that is not its shape."""
    if image.mode[0] in "IF":
        raise VideoError(f"{path}: more than 8 bits per pixel ({image.mode}), "
                         "which pillow would clip to white")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:                        # also in a palette
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    rgb = np.asarray(image.convert("RGB"))                 # [H, W, 3]
    if rgb.shape != shape:
        raise VideoError(f"{path}: decodes to {rgb.shape[:2]}, "
                         f"not {shape[:2]} as its header says")
    return rgb
