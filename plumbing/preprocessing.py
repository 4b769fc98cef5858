"""
How a checkpoint expects its pixels: its preprocessing files, read and checked. transformers checks
little of them, and a wrong number would silently give other pixels.
"""
import json
import math

from transformers.utils import cached_file

from flow import Pixels

FILES = "video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json"
REMEDY = "copy the file its authors publish"


def read_file(name, file):
    """A JSON file of a checkpoint directory or hub name. -> (path, content); (None, {}) if there is
    no such file. Raises ValueError if it is damaged."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None, {}
    try:
        with open(path) as f:
            content = json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: damaged ({e}); {REMEDY}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (it is no JSON object); {REMEDY}")
    return path, content


# --------------------------------------------------------------------------------------------------
# what the keys may hold

def is_count(x):
    return type(x) is int and x >= 1                       # True is no count


def is_least(x):
    return is_count(x) and x <= 10 ** 9                    # a frame grows to it: it must fit memory


def are_means(x):
    return isinstance(x, list) and len(x) == 3 and all(map(is_number, x))


def are_deviations(x):
    return are_means(x) and min(x) > 0                     # pixels are divided by them


def is_number(x):
    return type(x) in (int, float) and abs(x) < 1000       # no NaN either


def is_true(x):
    return x is True


def is_one_255th(x):
    return is_number(x) and math.isclose(x, 1 / 255, rel_tol=1e-6)


def is_object(x):
    return isinstance(x, dict)


COUNT = "a whole number, at least 1"
LEAST = "a whole number of pixels from 1 to 1,000,000,000"
# (key, test, what it must be). A file has these ...
NEEDED = [
    ("image_mean", are_means, "a list of three numbers below 1,000"),
    ("image_std", are_deviations, "a list of three numbers above 0 and below 1,000"),
    ("patch_size", is_count, COUNT),
    ("temporal_patch_size", is_count, COUNT),
    ("merge_size", is_count, COUNT)]
# ... and may lack these, or have null in their place.
OPTIONAL = [
    ("do_rescale", is_true, "true (bytes are always divided by 255 here)"),
    ("do_normalize", is_true, "true (pixels are always normalised here)"),
    ("rescale_factor", is_one_255th, "1/255 (bytes are always divided by 255 here)"),
    ("size", is_object, "an object with shortest_edge and longest_edge"),
    ("min_pixels", is_least, LEAST),
    ("max_pixels", is_count, COUNT),
    ("max_frame_pixels", is_count, COUNT)]
EDGES = [
    ("shortest_edge", is_least, LEAST),
    ("longest_edge", is_count, COUNT)]
# The tower's own names of what it shares with the file.
TOWER = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
         "merge_size": "spatial_merge_size"}


def check(content, table):
    """Raises ValueError for a value that fails the test of its key. What is not there passes."""
    for key, test, right in table:
        if key in content and not test(content[key]):
            raise ValueError(f"{key} is {json.dumps(content[key])[:100]}, and must be {right}; "
                             f"{REMEDY}")


# --------------------------------------------------------------------------------------------------
# a file -> `Pixels`

def read_pixels(name, family, tower):
    """The `Pixels` of a checkpoint directory or hub name. Raises ValueError if it has no
    preprocessing file, or one that is damaged or does not go with the model.

    family: its `families.Family`; tower: the configuration of its vision tower.
    """
    for file in FILES:
        path, content = read_file(name, file)
        content = content.get("video_processor", content)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: damaged (video_processor is no JSON object); {REMEDY}")
        if "image_mean" not in content:
            continue
        try:
            return to_pixels(content, family, tower)
        except KeyError as e:
            raise ValueError(f"{path}: it has no {e}; {REMEDY}") from e
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    raise ValueError(f"{name} has no {FILES[0]}, {FILES[1]} or {FILES[2]} with image_mean in it; "
                     f"{REMEDY}")


def to_pixels(content, family, tower):
    """The content of a preprocessing file as `Pixels`. Raises KeyError for what it lacks,
    ValueError for what is wrong, or not read here."""
    if content.get("cap_pixels_per_frame"):
        raise ValueError("cap_pixels_per_frame is not read here: set it to false, and lower "
                         "--max_pixels instead")
    check(content, NEEDED)
    content = without_null(content)
    check(content, OPTIONAL)
    size = without_null(content.get("size", {}))
    check(size, EDGES)
    for key, of_tower in TOWER.items():
        right = getattr(tower, of_tower)
        if content[key] != right:
            raise ValueError(f"{key} is {content[key]}, and the {of_tower} of the vision_config in "
                             f"config.json is {right}: copy both files from one checkpoint")
    shared = [content[key] for key, *_ in NEEDED]
    if family.video_bounds:
        least, most = family.video_bounds
        least = size.get("shortest_edge", least)
        most = size.get("longest_edge", most)
        # max_frame_pixels is ours: checkpoints.save_pretrained writes it.
        most_of_frame = content.get("max_frame_pixels", most)
        pixels = Pixels(*shared, 0, most_of_frame, video_pixels=(least, most))
    else:
        # The older form comes first, as to transformers.
        least = content["min_pixels"] if "min_pixels" in content else size["shortest_edge"]
        most = content["max_pixels"] if "max_pixels" in content else size["longest_edge"]
        pixels = Pixels(*shared, min_pixels=least, max_pixels=most)
    if least > most:
        raise ValueError(f"the least number of pixels, {least}, is above the most, {most}; "
                         f"{REMEDY}")
    return pixels


def without_null(content):
    return {key: value for key, value in content.items() if value is not None}
