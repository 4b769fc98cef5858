"""
The families of checkpoints that this code reads: a table of what differs between them, how each
writes a prompt, and the size that a frame is resized to.
"""
import math
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError

from flow import PromptError, VideoError
from plumbing.preprocessing import FILES, read_file

# The last line of every question. plumbing/tiny.py makes each of its words one token.
INSTRUCTION = ("First reason between <think> and </think>, "
               "then give the answer between <answer> and </answer>.")
TAGS = ("<think>", "</think>", "<answer>", "</answer>",    # GLM-4.1V has control tokens for them
        "<|begin_of_box|>", "<|end_of_box|>")


@dataclass(frozen=True)
class Family:
    """What this code must know about a family of checkpoints. A checkpoint names its family by its
    processor: models of one type may write the times of a video in different forms."""
    models: tuple          # model_type in config.json, of each kind of checkpoint in the family
    processor: str         # the names of the processors in transformers: for a whole prompt,
    image_processor: str   # for its pictures,
    video_processor: str   # and for its videos
    vision_pad: str        # the config's name of the id that holds the place of a vision token
    around: tuple = ()     # the config's names of the ids before and after a temporal patch
    clock: str = ""        # a temporal patch and its time as text, see video_ids; "" if the time is
                           # in the M-RoPE positions and all temporal patches are one run of pads
    video_bounds: tuple = ()   # transformers' own bounds on the pixels of a whole video, where a
                               # file has none; () if the bounds are of a frame
    image_bounds: tuple = ()   # its bounds on a picture, if those are others


QWEN2_5_VL = Family(
    ("qwen2_5_vl",), "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor",
    vision_pad="video_token_id")
GLM_4_1V = Family(         # and GLM-4.5V
    ("glm4v", "glm4v_moe"), "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor",
    vision_pad="image_token_id", around=("image_start_token_id", "image_end_token_id"),
    clock="{patch}{second}", video_bounds=(112 * 112, 28 * 28 * 2 * 30000),
    image_bounds=(112 * 112, 28 * 28 * 15000))
GLM_4_6V = replace(        # which may have the model_type of GLM-4.1V or GLM-4.5V
    GLM_4_1V, models=("glm46v", "glm4v", "glm4v_moe"), processor="Glm46VProcessor",
    image_processor="Glm46VImageProcessor", video_processor="Glm46VVideoProcessor",
    clock="{patch}{first:.1f} seconds")
QWEN3_VL = Family(
    ("qwen3_vl", "qwen3_vl_moe"),
    "Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor",
    vision_pad="video_token_id",
    around=("vision_start_token_id", "vision_end_token_id"),
    clock="<{mean:.1f} seconds>{patch}", video_bounds=(128 * 32 * 32, 768 * 32 * 32),
    image_bounds=(256 * 256, 4096 * 4096))

FAMILIES = {}              # {model_type: `Family` of a checkpoint that names no processor}
PROCESSORS = {}            # {processor: `Family`}
for family in (QWEN2_5_VL, GLM_4_1V, GLM_4_6V, QWEN3_VL):
    PROCESSORS[family.processor] = family
    for model_type in family.models:
        FAMILIES.setdefault(model_type, family)


def family_of(model):
    """The `Family` of a model: that of its checkpoint's processor, else that of its type."""
    return getattr(model, "family", FAMILIES[model.config.model_type])


def vision_pad(config):
    """The id that holds the place of a vision token."""
    return getattr(config, FAMILIES[config.model_type].vision_pad)


def deepstack_levels(tower_config):
    """How many layers of the language model get vision features of their own (Qwen3-VL)."""
    return len(getattr(tower_config, "deepstack_visual_indexes", ()))


def vision_width(tower_config):
    """The features of a vision token: D, and D more for each level of deepstack."""
    return tower_config.out_hidden_size * (1 + deepstack_levels(tower_config))


def deepstack(config, pads, features):
    """The features that Qwen3-VL adds to the hidden states of the vision tokens after its first n
    layers, as its language model takes them. -> {} if n is 0. Raises ValueError for other widths.

    They stand behind a token's own D features: whatever shards, gathers, keeps or moves vision
    tokens need not know of them. pads: bool [B,s], where the v tokens stand; features: [v,n*D].
    """
    D = config.text_config.hidden_size
    levels = deepstack_levels(config.vision_config)
    if features.shape[1] != levels * D:
        raise ValueError(f"vision tokens with {features.shape[1]} features of deepstack, not "
                         f"{levels} x {D}")
    if not levels:
        return {}
    return {"visual_pos_masks": pads, "deepstack_visual_embeds": features.split(D, dim=1)}


def stop_ids(model, tokenizer):
    """The ids that end a completion, the end of turn first."""
    stops = model.generation_config.eos_token_id           # an id, several, or None
    stops = stops if isinstance(stops, list) else [stops]
    end_of_turn = tokenizer.eos_token_id
    return [end_of_turn, *(i for i in stops if i not in (None, end_of_turn))]


def banned_ids(model, tokenizer):
    """The ids that are never sampled, in sampler and trainer alike. -> bool [vocabulary]

    Vision pads (one that is sampled as text breaks the next forward), every other control id that
    neither ends the turn nor spells one of our tags, and the padded rows that no token owns.
    """
    banned = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    banned[len(tokenizer):] = True
    for i, token in tokenizer.added_tokens_decoder.items():
        banned[i] = token.special and token.content not in TAGS
    banned[stop_ids(model, tokenizer)] = False
    return banned.to(model.device)


def decode(tokenizer, ids, stops):
    """A completion's text without the id that ended it, unless that is a tag: GLM-4.1V stops at
    </answer>."""
    silent = [i for i in stops if tokenizer.decode([i]) not in TAGS]
    return tokenizer.decode([i for i in ids if i not in silent])


# --------------------------------------------------------------------------------------------------
# prompt forms

def template_ids(config, tokenizer):
    """The chat template of a user's turn with one video, and INSTRUCTION after the question.

    -> three lists of ids: before the video, between video and question, after the question. Raises
    ValueError if there is no template, if it fails, or if it has no place for video and question.
    """
    remedy = "copy the chat_template.jinja that its authors publish"
    if not tokenizer.chat_template:
        raise ValueError(f"no chat template, or an empty one: {remedy}")
    mark = "\x00"                                          # in the place of the question
    content = [{"type": "video"}, {"type": "text", "text": mark}]
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                             tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError,
            ValueError) as e:                              # a template is a program
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"the chat template fails ({type(e).__name__}: {reason}): {remedy}") from e
    if text.count(mark) != 1:
        raise ValueError(f"the chat template writes a question {text.count(mark)} times, expected "
                         f"once: {remedy}")
    head, tail = text.split(mark)
    head = tokenize(tokenizer, head)
    count = head.count(config.video_token_id)
    if count != 1:
        raise ValueError(f"the chat template gives {count} vision pads for one video, expected "
                         f"one: {remedy}, or correct video_token_id in config.json")
    at = head.index(config.video_token_id)
    return head[:at], head[at + 1:], tokenize(tokenizer, "\n" + INSTRUCTION + tail)


def tokenize(tokenizer, text):
    """Our own text, in which control tokens are read as such. -> list of ids"""
    return tokenizer(text, add_special_tokens=False).input_ids


def tokenize_text(tokenizer, text, but=()):
    """A user's text: a control token that is spelled out in it is broken up. -> list of ids

    A question that contains "<|video_pad|>" must become the letters of that word, never the token.
    but: control tokens that stay, since we wrote them around the text.
    """
    controls = [token.content for token in tokenizer.added_tokens_decoder.values()]
    controls = [control for control in controls if control not in but]
    pieces = [text]
    for control in sorted(controls, key=len, reverse=True):
        pieces = [part for piece in pieces for part in break_up(piece, control)]
    ids = []
    for piece in filter(None, pieces):
        ids += tokenize(tokenizer, piece)
    added = tokenizer.added_tokens_decoder
    bad = [i for i in ids if i in added and added[i].content not in but]
    assert not bad, f"text became control tokens {bad}: {text!r}"
    return ids


def break_up(text, control):
    """text in parts, cut after the first letter of each control token in it."""
    first, *rest = text.split(control)
    parts = [first]
    for part in rest:
        parts[-1] += control[0]
        parts.append(control[1:] + part)
    return parts


def video_ids(model, tokenizer, grid, seconds, frames=None):
    """The ids that represent a video in a prompt.

    grid: (t, h, w) in patches; seconds: between two frames; frames: how many there are, None if
    they fill the t temporal patches.
    -> (ids, the grid of each run of pads in them, M-RoPE positions between the temporal patches
    of a run)
    """
    config, px = model.config, model.pixels
    family = family_of(model)
    t, h, w = grid
    frames = frames or t * px.temporal
    pads = [vision_pad(config)] * (h * w // px.merge ** 2)             # of one temporal patch
    if not family.clock:
        interval = seconds * px.temporal * config.vision_config.tokens_per_second
        return pads * t, [grid], interval
    start, end = (getattr(config, name) for name in family.around)
    before, after = family.clock.split("{patch}")
    # Frames are taken from the middle of equal parts of the video, hence 0.5.
    times = [round((frame + 0.5) * seconds, 6) for frame in range(frames)]
    ids = []
    for i in range(0, frames, px.temporal):
        first = times[i]
        last = times[min(i + px.temporal, frames) - 1]     # an odd last frame fills its patch alone
        time = {"first": first, "second": int(first + 1e-6), "mean": (first + last) / 2}
        ids += tokenize(tokenizer, before.format(**time))
        ids += [start, *pads, end]
        ids += tokenize(tokenizer, after.format(**time))
    return ids, [(1, h, w)] * t, 0.0


def check_length(model, prompt, room, vllm_length=None):
    """Raises PromptError if prompt and `room` more tokens do not fit the model, or vLLM's own
    limit if there is one. Nothing is ever cut off."""
    limit = model.config.text_config.max_position_embeddings
    name = f"the model's {limit}"
    if vllm_length and vllm_length < limit:
        limit = vllm_length
        name = f"vllm_length = {limit}"
    if len(prompt.ids) + room > limit:
        raise PromptError(f"a prompt of {len(prompt.ids)} tokens ({len(prompt.vision)} of them "
                          f"vision) and {room} for the answer do not fit {name}; "
                          "lower frames or max_pixels")


# --------------------------------------------------------------------------------------------------
# what a checkpoint's files say

def read_family(name, model_type):
    """The `Family` of a checkpoint directory or hub name, by the processor that its files name.
    Raises ValueError if they name one that does not go with the model, or several."""
    named = {}                                             # {processor: file}
    for file in (*FILES, "tokenizer_config.json"):
        path, content = read_file(name, file)
        processor = content.get("processor_class")
        if not isinstance(processor, (str, type(None))):
            raise ValueError(f"{path}: processor_class is no text; copy the file its authors "
                             "publish")
        if processor and not (named and file == "tokenizer_config.json"):
            named.setdefault(processor, file)
    if not named:
        return FAMILIES[model_type]
    if len(named) > 1:
        texts = " but ".join(f"{file} names {processor}" for processor, file in named.items())
        raise ValueError(f"{name}: {texts}; copy the files its authors publish")
    [(processor, file)] = named.items()
    family = PROCESSORS.get(processor)
    if family is None or model_type not in family.models:
        known = [p for p, family in PROCESSORS.items() if model_type in family.models]
        raise ValueError(f"{name}: {file} names the processor {processor}, and a {model_type} "
                         f"model is read here with {' or '.join(known)}: another writes another "
                         "prompt")
    return family


# --------------------------------------------------------------------------------------------------
# pixels

def frame_size(height, width, px, frames=1):
    """The size frames are resized to, as transformers computes it: both sides are whole vision
    tokens, and the area is within the checkpoint's bounds.

    height, width: in pixels; px: `Pixels`; frames: how many the video has, which matters if all
    of them together have bounds. -> (height, width). Raises VideoError if one side is more than
    200 times the other.

    >>> from flow import Pixels
    >>> frame_size(720, 1280, Pixels([], [], 14, 2, 2, 28 * 28, 112 * 112))
    (84, 140)
    """
    unit = px.patch * px.merge                             # the side of a vision token
    if px.video_pixels and min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height = int(height * scale)
        width = int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise VideoError(f"frames of {height} x {width}: sides that differ more than 200 times "
                         "are not supported")
    original = height, width
    size = round(height / unit) * unit, round(width / unit) * unit
    if px.video_pixels:
        frames = max(frames, px.temporal)                  # a picture fills a temporal patch
        padded = round(frames / px.temporal) * px.temporal
        size = within(size, original, unit, *px.video_pixels, frames, padded)
    return within(size, original, unit, px.min_pixels, px.max_pixels)


def within(size, original, unit, least, most, frames=1, padded=1):
    """size if its area is within (least, most), else the nearest size with original's shape.

    least and most bound all frames together: `padded` of them when the area is compared, `frames`
    of them when the scale is computed. That is what transformers does.
    """
    height, width = original
    area = padded * size[0] * size[1]
    if area > most:
        shrink = math.sqrt(frames * height * width / most)
        return tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in original)
    if area < least:
        grow = math.sqrt(least / (frames * height * width))
        return tuple(math.ceil(side * grow / unit) * unit for side in original)
    return size
