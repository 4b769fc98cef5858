"""
The vision-language model as plain steps: frames -> patches -> vision tokens -> one sequence -> log-probs.

    patchify        uint8 frames  -> normalised patches, in the order the tower was trained on
    make_prompt     the chat template, the vision tokens' places, M-RoPE positions
    splice          text embeddings, with the vision tokens put where the pads are
    logprobs        log-probs of G completions over one shared prefix, in one packed sequence

The weights and the layers are Hugging Face transformers'; these steps are ours, because this is where video RL
goes wrong in silence: other positions in the sampler than in the trainer, vision tokens cut off, pads sampled as text.

One packed sequence a group: [prefix | completion 1 | ... | completion G]. Each completion sees the prefix and itself,
so the prefix, nearly all of a long video's cost, is computed once forward and once backward, not G times.
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForImageTextToText,
                          AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
from transformers.utils import cached_file, logging

import encode
from flow import Pixels, Prompt, PromptError

logging.disable_progress_bar()          # one bar is enough: train.py's

INSTRUCTION = ("First reason between <think> and </think>, "
               "then give the answer between <answer> and </answer>.")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")    # control tokens to GLM-4.1V

# The families that are read, and the names by which transformers finds their processors: of pictures, of videos, of both and text.
FAMILIES = {"qwen2_5_vl": ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor", "Qwen2_5_VLProcessor"),
            "glm4v": ("Glm4vImageProcessor", "Glm4vVideoProcessor", "Glm4vProcessor")}


# ---------------------------------------------------------------------------------------------------------------------
# frames -> patches

def read_pixels(name, together=False):
    """The `Pixels` of a checkpoint directory or hub name; together: the bounds in its files are of a whole video (GLM-4.1V).
    Raises ValueError where it has no preprocessing file, or a damaged one."""
    for file in ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        try:
            with open(path) as f:
                c = json.load(f)
            c = c.get("video_processor", c)
            if "image_mean" not in c:
                continue
            size = c.get("size") or {}
            shared = c["image_mean"], c["image_std"], c["patch_size"], c["temporal_patch_size"], c["merge_size"]
            if together:                                   # the defaults are transformers'; max_frame_pixels is ours: see save
                least, most = size.get("shortest_edge", 112 * 112), size.get("longest_edge", 28 * 28 * 2 * 30000)
                return Pixels(*shared, 0, c.get("max_frame_pixels", most), (least, most))
            return Pixels(*shared, c.get("min_pixels") or size["shortest_edge"], c.get("max_pixels") or size["longest_edge"])
        except (KeyError, json.JSONDecodeError) as e:
            raise ValueError(f"{path}: " + (f"it has no {e}" if isinstance(e, KeyError) else f"damaged ({e})")) from e
    raise ValueError(f"{name} has no video_preprocessor_config.json, processor_config.json or "
                     "preprocessor_config.json with image_mean in it; copy the one its authors publish")


def frame_size(height, width, px, frames=1):
    """The size frames are resized to: both sides whole vision tokens, the area within the checkpoint's bounds.
    frames: how many the video has, which matters where all of them together have bounds.

    >>> frame_size(720, 1280, Pixels([], [], 14, 2, 2, 28 * 28, 112 * 112))
    (84, 140)
    """
    unit, bounds = px.patch * px.merge, [(1, 1, px.min_pixels, px.max_pixels)]
    if px.video_pixels:
        n = max(frames, px.temporal)                       # a picture is repeated to fill a temporal patch
        bounds.insert(0, (n, round(n / px.temporal) * px.temporal, *px.video_pixels))              # as transformers counts them
        if min(height, width) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"frames of {height} x {width}: sides that differ more than 200 times are not supported")
    h, w = round(height / unit) * unit, round(width / unit) * unit
    for n, t, least, most in bounds:
        if t * h * w > most:
            shrink = math.sqrt(n * height * width / most)
            h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        elif t * h * w < least:
            grow = math.sqrt(least / (n * height * width))
            h, w = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return h, w


def patchify(frames, px, size=None):
    """Frames to the tower's input, as Qwen2.5-VL and GLM-4.1V order it: patches of one vision token stand together.

    frames: uint8 [T,H,W,3]; px: `Pixels`; size: (height, width) they are resized to, None where they are a whole video.
    Returns (float32 [t*h*w, 3*temporal*patch*patch], (t, h, w) in patches).
    An odd last frame is repeated to fill its temporal patch.
    """
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)                            # [T, 3, H, W]
    size = size or frame_size(x.shape[2], x.shape[3], px, len(x))
    if size != tuple(x.shape[2:]):
        x = F.interpolate(x, size, mode="bicubic", antialias=True)             # [T, 3, H', W'], uint8 stays uint8
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (px.mean, px.std))
    x = (x.float() - mean * 255) / (std * 255)
    short = -len(x) % px.temporal
    x = torch.cat([x, x[-1:].expand(short, -1, -1, -1)])
    t, h, w = len(x) // px.temporal, size[0] // px.patch, size[1] // px.patch
    x = x.view(t, px.temporal, 3, h // px.merge, px.merge, px.patch, w // px.merge, px.merge, px.patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)         # t, h', w', merge, merge, colour, temporal, patch, patch
    return x.reshape(t * h * w, -1), (t, h, w)


def encode_video(model, open_video, ranks):
    """A video's vision tokens, its frames sharded over the sp ranks.

    open_video() -> `data.Video`. -> (vision [V,D], (t,h,w) in patches, seconds between two frames)
    """
    seconds = 0.0

    def open_patches():
        nonlocal seconds
        video, px = open_video(), model.pixels
        seconds = video.seconds
        size = frame_size(video.height, video.width, px, video.frames)
        grid = -(-video.frames // px.temporal), size[0] // px.patch, size[1] // px.patch

        def read(lo, hi):
            return patchify(video.read(lo * px.temporal, min(hi * px.temporal, video.frames)), px, size)[0]

        return grid, px.merge, read

    return *encode.encode(model.model.visual, open_patches, ranks), seconds


def frames_to_read(model, video, ranks):
    """The frames (lo, hi) that encode_video asks of a video on this rank, in order: what can be read ahead."""
    size = model.pixels.temporal
    return [(lo * size, min(hi * size, video.frames)) for lo, hi in encode.spans(-(-video.frames // size), ranks)]


# ---------------------------------------------------------------------------------------------------------------------
# the prompt

def mrope_positions(ids, pad, grids, merge, interval):
    """M-RoPE positions of one sequence: a token's place in time, height and width.

    ids: long [P]; pad: the vision pad's id; grids: (t, h, w) in patches of each run of pads, in order;
    merge: patches a side of one vision token; interval: positions between two temporal patches, which is
    tokens_per_second * seconds from one temporal patch to the next. Returns long [3, P].
    Text counts up on all three axes at once. Text after a video continues from 1 + the largest position so far on any
    axis, as Qwen2.5-VL was trained and vLLM does. (transformers' own get_rope_index continues from the larger of
    height and width, which puts the question among a long video's own positions. For GLM-4.1V, whose runs are of one
    temporal patch each, that is the same, and so are all positions.)

    >>> mrope_positions(torch.tensor([7, 9, 9, 7]), 9, [(2, 2, 2)], 2, 4.0)   # two vision tokens, 4 apart in time
    tensor([[0, 1, 5, 6],
            [0, 1, 1, 6],
            [0, 1, 1, 6]])
    """
    parts, start, at, grids = [], 0, 0, list(grids)
    is_pad = (ids == pad).tolist()
    while at < len(ids):
        if is_pad[at]:
            if not grids:
                raise ValueError("more runs of vision pads in the prompt than grids")
            t, h, w = grids.pop(0)
            h, w = h // merge, w // merge
            time = (torch.arange(t, dtype=torch.float64) * interval).long()
            part = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).flatten(1) + start
            if not all(is_pad[at:at + part.shape[1]]):
                raise ValueError("the vision pads in the prompt do not fill the grids")
        else:
            length = (is_pad + [True]).index(True, at) - at
            part = torch.arange(start, start + length).expand(3, -1)
        parts.append(part)
        at, start = at + part.shape[1], int(part.max()) + 1
    if grids or at != len(ids):
        raise ValueError("the vision pads in the prompt do not fill the grids")
    return torch.cat(parts, dim=1).to(ids.device)                              # [3, P]


def tokenize_text(tokenizer, text):
    """Text by itself, as text: a control token spelled out in it is broken up. Returns a list of ids.

    A question that contains "<|video_pad|>" must become the letters of that word, never the token.
    """
    pieces, controls = [text], [t.content for t in tokenizer.added_tokens_decoder.values()]
    for control in sorted(controls, key=len, reverse=True):
        halves = []
        for piece in pieces:
            first, *rest = piece.split(control)
            halves.append(first)
            for part in rest:                              # cut after the control token's first letter
                halves[-1] += control[0]
                halves.append(control[1:] + part)
        pieces = halves
    ids = [i for piece in pieces if piece for i in tokenizer(piece, add_special_tokens=False).input_ids]
    bad = [i for i in ids if i in tokenizer.added_tokens_decoder]
    assert not bad, f"text became control tokens {bad}: {text!r}"
    return ids


def vision_pad(config):
    """The id that stands where a vision token goes. GLM-4.1V writes a video as its pictures."""
    return config.image_token_id if config.model_type == "glm4v" else config.video_token_id


def make_prompt(model, tokenizer, question, vision, grid, seconds, key=""):
    """One user turn of the model's chat template: the video, the question, the instruction how to answer.

    vision: [V, D], what `encode.encode` returned for grid (t, h, w); seconds: between two frames; key: the cache's.
    """
    config, pad, temporal = model.config, vision_pad(model.config), model.pixels.temporal
    mark = "\x00"                                          # stands for the user's words, which are tokenized apart
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": mark}]}]
    head, tail = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(mark)
    head = tokenizer(head, add_special_tokens=False).input_ids
    if head.count(config.video_token_id) != 1:
        raise ValueError(f"the chat template gives {head.count(config.video_token_id)} vision pads for one video, expected one")
    at, n = head.index(config.video_token_id), math.prod(grid) // model.pixels.merge ** 2
    if config.model_type == "glm4v":                       # each temporal patch by itself, then its first frame's second as text
        (t, h, w), video = grid, []
        for i in range(t):                                 # frames are those in the middle of equal parts of the video
            second = str(int((i * temporal + 0.5) * seconds + 1e-6))
            video += [config.image_start_token_id, *[pad] * (n // t), config.image_end_token_id,
                      *tokenizer(second, add_special_tokens=False).input_ids]
        grids, interval = [(1, h, w)] * t, 0.0
    else:
        video, grids, interval = [pad] * n, [grid], seconds * temporal * config.vision_config.tokens_per_second
    ids = (head[:at] + video + head[at + 1:] + tokenize_text(tokenizer, question)
           + tokenizer("\n" + INSTRUCTION + tail, add_special_tokens=False).input_ids)
    if len(vision) != n:
        raise ValueError(f"{n} vision pads but {len(vision)} vision tokens")
    ids = torch.tensor(ids)
    positions = mrope_positions(ids, pad, grids, model.pixels.merge, interval)
    return Prompt(ids.to(vision.device), positions.to(vision.device), vision, grids, seconds * temporal, key)


def check_length(model, prompt, room, most=None):
    """Raises PromptError where prompt and `room` more tokens do not fit the model, or vLLM's `most`. Nothing is ever cut off."""
    own = model.config.text_config.max_position_embeddings
    if len(prompt.ids) + room > min(own, most or own):
        what = f"the model's {own}" if not most or own <= most else f"vllm_length = {most}"
        raise PromptError(f"a prompt of {len(prompt.ids)} tokens ({len(prompt.vision)} of them vision) and {room} for the "
                          f"answer do not fit {what}; lower frames or max_pixels")


def splice(model, ids, visions, columns=slice(None)):
    """Text embeddings with the vision tokens in the pads' places. ids: long [B,S]; visions: a [V,D] each;
    columns: long [s], the places of the sequence that are wanted: those that one rank holds. -> [B,s,D]
    """
    pads, vision = ids == vision_pad(model.config), torch.cat(list(visions)).to(ids.device)
    if int(pads.sum()) != len(vision):
        raise ValueError(f"{int(pads.sum())} vision pads in the sequence but {len(vision)} vision tokens")
    row = pads.flatten().cumsum(0).view_as(pads) - 1                           # [B, S], which vision token a pad stands for
    ids, pads, vision = ids[:, columns], pads[:, columns], vision[row[:, columns][pads[:, columns]]]
    embeds = model.get_input_embeddings()(ids)                                 # [B, s, D]
    return embeds.masked_scatter(pads[..., None], vision.to(embeds.dtype))


def stop_ids(model, tokenizer):
    """The ids that end a completion, the end of turn first."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return [tokenizer.eos_token_id] + [i for i in ids if i is not None and i != tokenizer.eos_token_id]


def decode(tokenizer, ids, stops):
    """A completion's text, without what ended it, unless that is a tag: GLM-4.1V stops at </answer>."""
    return tokenizer.decode([i for i in ids if i not in stops or tokenizer.decode([i]) in TAGS])


def banned_ids(model, tokenizer):
    """The ids that must never be sampled, as a bool [vocabulary] mask, the same in sampler and trainer.

    Vision pads (one sampled as text breaks the next forward), every other control id that does not end the turn or
    spell one of our tags, and the padded rows of the vocabulary that no token owns.
    """
    banned = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    banned[len(tokenizer):] = True
    for i, token in tokenizer.added_tokens_decoder.items():
        banned[i] = token.special and token.content not in TAGS
    banned[stop_ids(model, tokenizer)] = False
    return banned.to(model.device)


# ---------------------------------------------------------------------------------------------------------------------
# attention over a shared prefix

def layout_attention(module, query, key, value, attention_mask, layout, scaling, **_):
    """What transformers calls in every decoder layer: hand q, k, v to the layout that the caller passed along.

    query: [B,heads,S,d]; key, value: [B,kv heads,S,d]; layout: a function (layer, q, k, v, scale) -> [B,heads,S,d].
    """
    return layout(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register("layout", layout_attention)
AttentionMaskInterface.register("layout", lambda *args, **kwargs: None)        # the layout knows who sees whom
ATTENTION = {"text_config": "layout", "vision_config": "frames_flash"}         # what a model here attends with; the second is encode's


class Packed:
    """Who sees whom in rows of [prefix | completion 1 | ... | completion G], prefixes padded on the right to P.

    Two calls: the prefix over itself, causal; then all completions, in query chunks, over the same keys and values,
    which are never copied per completion. The masks are built once and shared by all layers.
    """

    def __init__(self, prefix_lengths, owner, dtype, prefix=None, chunk=1 << 24):
        """prefix_lengths: long [B]; owner: long [B,C], which completion a position belongs to, -1 for padding;
        prefix: P, None for the longest; chunk: the most elements of one mask."""
        self.P, (B, C) = prefix or int(prefix_lengths.max()), owner.shape
        at = torch.arange(C, device=owner.device)
        real = torch.arange(self.P, device=owner.device) < prefix_lengths[:, None]                 # [B, P]
        self.chunks, step = [], max(1, chunk // (B * (self.P + C)))
        for lo in range(0, C, step):
            hi = min(lo + step, C)
            own = (owner[:, lo:hi, None] == owner[:, None, :hi]) & (at[lo:hi, None] >= at[:hi])    # [B, q, hi]
            sees = torch.cat([real[:, None].expand(B, hi - lo, self.P), own], dim=2)[:, None]      # [B, 1, q, P+hi]
            self.chunks.append((self.P + lo, self.P + hi,
                                torch.zeros(sees.shape, dtype=dtype, device=owner.device).masked_fill_(~sees, -math.inf)))

    def __call__(self, layer, q, k, v, scale):
        P = self.P
        out = [F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, scale=scale,
                                              enable_gqa=True)]                # pads stand last: none is seen
        R = q.shape[1] // k.shape[1]                                           # query heads that share a key-value head
        for lo, hi, mask in self.chunks:
            heads = []                                     # GPU kernels that take a mask want a key-value head for each head: it is expanded,
            for mine, *kv in zip(q[:, :, lo:hi].split(R, dim=1), k[:, :, :hi].split(1, dim=1), v[:, :, :hi].split(1, dim=1)):
                kv = (x.expand(-1, R, -1, -1) for x in kv)                     # which copies nothing
                heads.append(F.scaled_dot_product_attention(mine, *kv, attn_mask=mask, scale=scale))           # [B, R, hi-lo, d]
            out.append(torch.cat(heads, dim=1))
        return torch.cat(out, dim=2)                                           # [B, heads, P+C, d]


def pad_prefixes(prompts, device, ranks=encode.Ranks()):
    """B prompts, padded on the right, and so that every sp rank can hold as many places of each.
    -> ids [B,P] (pads are 0), positions [3,B,P], lengths [B], where each completion's positions start [B], all long, on device."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([p.ids for p in prompts], batch_first=True)                      # [B, P]
    positions = pad([p.positions.T for p in prompts], batch_first=True).permute(2, 0, 1)           # [3, B, P]
    ids, positions = (F.pad(x, (0, -x.shape[-1] % ranks.sp)) for x in (ids, positions))
    lengths, first = torch.tensor([(len(p.ids), int(p.positions.max()) + 1) for p in prompts]).T   # [B] each
    return tuple(x.to(device) for x in (ids, positions, lengths, first))


def forward(model, layout, ids, positions, visions, prefix, ranks):
    """The language model over packed sequences, or over this rank's share of them where several sp ranks hold one (MR-SP
    stage 2). ids: long [B,S]; positions: long [3,B,S]; visions: a [V,D] each; prefix: how many of the S are the prefix's;
    it and the rest are multiples of sp. -> (hidden [B,S/sp,D], place [S]: where in it a position is, -1: on another rank)
    """
    columns = encode.columns(prefix, ids.shape[1] - prefix, ranks).to(ids.device)                  # [S/sp]
    if ranks.sp > 1:
        layout = encode.Ulysses(layout, prefix // ranks.sp, ranks)
    hidden = model.model.language_model(inputs_embeds=splice(model, ids, visions, columns), position_ids=positions[:, :, columns],
                                        use_cache=False, layout=layout).last_hidden_state          # [B, S/sp, D]
    place = torch.full((ids.shape[1],), -1, device=ids.device)
    place[columns] = torch.arange(len(columns), device=ids.device)
    return hidden, place


def recompute_layers(model):
    """Activation checkpointing: of each decoder layer its input alone is kept for the backward, which runs the layer again."""
    text = model.model.language_model
    text.gradient_checkpointing_enable({"use_reentrant": False})
    text.train()                                           # transformers checkpoints in this mode alone; nothing here drops out


def one_forward(work):
    """work(model, ...) as one forward of the model: where parameters are sharded, those of no layer (embeddings, head) are
    gathered before it, and once for its backward, in however many parts work calls them."""
    @wraps(work)
    def call(model, *args, **how):
        return model.run(lambda: work(model, *args, **how)) if isinstance(model, FSDPModule) else work(model, *args, **how)
    return call


@one_forward
def logprobs(model, prompts, completions, banned, head_chunk=2048, ranks=encode.Ranks()):
    """Log-probs of every completion's tokens under the model, the prefix of a group computed once.

    prompts: B `Prompt`s; completions: B lists of long [L] tensors, ragged, each L at least 1; banned: bool [vocabulary].
    ranks: the sequence is sharded over their sp ranks (MR-SP stage 2): all give the same prompts and completions, each
    computes its share, and all get all the log-probs; the gradient of what a rank did not compute stays with the rank
    that did, so that gradients summed over the ranks are those of one rank alone.
    Returns (logprobs [N,L], entropy [N,L] without gradient), float32, N = all completions in order, 0 beyond their end.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    device = model.device
    ids, positions, lengths, first = pad_prefixes(prompts, device, ranks)      # [B, P], [3, B, P], [B], [B]

    # A completion's last token is predicted but never read: it stays out of the sequence.
    inputs = pad([torch.cat([c[:-1] for c in group]) for group in completions], batch_first=True).to(device)       # [B, C]
    owner = pad([torch.cat([torch.full((len(c) - 1,), g) for g, c in enumerate(group)]) for group in completions],
                batch_first=True, padding_value=-1).to(device)                 # [B, C], which completion a place is of
    steps = pad([torch.cat([torch.arange(len(c) - 1) for c in group]) for group in completions], batch_first=True).to(device)
    inputs, steps, owner = (F.pad(x, (0, -x.shape[1] % ranks.sp), value=fill) for x, fill in ((inputs, 0), (steps, 0), (owner, -1)))
    positions = torch.cat([positions, (first[:, None] + steps).expand(3, -1, -1)], dim=2)                          # [3, B, P+C]
    P = ids.shape[1]
    hidden, place = forward(model, Packed(lengths, owner, model.dtype, P), torch.cat([ids, inputs], dim=1), positions,
                            [p.vision for p in prompts], P, ranks)             # [B, (P+C)/sp, D], [P+C]

    # Where each token is predicted: the first at the prefix's last position, the others one position before their own.
    rows, targets = [], []
    for b, group in enumerate(completions):
        own = P
        for c in group:
            rows += [(b, len(prompts[b].ids) - 1)] + [(b, i) for i in range(own, own + len(c) - 1)]
            own += len(c) - 1
            targets.append(c.to(device))
    row, column = torch.tensor(rows, device=device).T                          # [M] each
    column = place[column]
    held = column >= 0                                                         # [M], the ones on this rank
    hidden, targets = hidden[row[held], column[held]], torch.cat(targets)[held]                    # [m, D], [m]: completions alone

    # The head, in chunks that are computed again in the backward: no [m, vocabulary] tensor is ever kept.
    def head(hidden, targets):
        logp = token_distribution(model, hidden, banned)                       # [m, vocabulary]
        return logp.gather(1, targets[:, None])[:, 0], torch.special.entr(logp.detach().exp()).sum(1)

    parts = [checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(head_chunk), targets.split(head_chunk))]
    logp, entropy = (torch.cat(x) for x in zip(*parts))                        # [m] each
    if ranks.sp > 1:
        whole = torch.zeros(2, len(held), device=device)
        whole[:, held] = torch.stack([logp, entropy])
        logp, entropy = encode.sum_forward(whole, ranks)
    lengths = [len(c) for group in completions for c in group]
    return pad(logp.split(lengths), batch_first=True), pad(entropy.detach().split(lengths), batch_first=True)      # [N, L]


def token_distribution(model, hidden, banned):
    """The one distribution that sampler and trainer share. hidden [m,D] -> float32 log-probs [m,vocabulary]."""
    logits = model.get_output_embeddings()(hidden).float()
    return logits.masked_fill(banned, -math.inf).log_softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# parameters sharded over all ranks

def shard(model, ranks):
    """FSDP2: of every parameter that trains, its gradient and its optimizer state each rank holds 1/world, in float32. A layer is
    gathered when it runs, in the dtype that the model had; gradients are summed over the ranks in float32. The tower stays whole.
    model may still be on the CPU: it comes to the device a layer at a time."""
    tower, dtype = model.model.visual.requires_grad_(False).to(ranks.device), model.dtype
    how = {"mesh": init_device_mesh(ranks.device.partition(":")[0], (ranks.world,)), "ignored_params": set(tower.parameters()),
           "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for part in [*model.model.language_model.layers, model]:                   # one at a time: never the whole in float32
        for p in part.parameters():
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(part, **how)
        part.set_gradient_divide_factor(1.0)               # summed, not averaged
        part.set_force_sum_reduction_for_comms(True)       # gloo can do no other
    model.run = lambda work: work()
    register_fsdp_forward_method(model, "run")             # so that work is to FSDP what the forward is


@contextmanager
def gathered(model, unless=None):
    """For sampling: all parameters whole on every rank, so that each runs as many forwards as it needs. All ranks enter alike."""
    if unless or not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    model.run(lambda: None)                                # what runs first is taken for the root
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    try:
        yield
    finally:
        model.reset_iter_state()                           # sharded again, and what ran here forgotten: another rank ran less
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


def weights(model, tied=False):
    """Name and tensor of each parameter, once, or under every name that it has. Where they are sharded all ranks must ask alike: one is
    gathered as it is asked for."""
    for name, w in model.named_parameters(remove_duplicate=not tied):
        w = w.detach()
        yield name, w.to(model.dtype).full_tensor() if isinstance(w, DTensor) else w


# ---------------------------------------------------------------------------------------------------------------------
# loading and saving

def load(name, device="cpu", dtype=torch.float32, max_pixels=0, seed=0):
    """-> (model, tokenizer). name: "tiny", a Hugging Face checkpoint directory, or a hub name.

    The model gains `model.pixels` (see `Pixels`); max_pixels, where not 0, lowers the checkpoint's own bound on a frame.
    """
    if name == "tiny":
        model, tokenizer, pixels = build_tiny(seed)
    else:
        local = os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1
        if local and not os.path.exists(os.path.join(name, "config.json")):
            raise ValueError(f"{name} is no checkpoint: it has no config.json")
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind in FAMILIES:
                model, info = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, output_loading_info=True,
                                                                          ignore_mismatched_sizes=True)
                tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError, SafetensorError) as e:
            what = (f"{name} has a file that is missing, damaged or of another kind" if os.path.isdir(name) else
                    f"{name} is no directory here and did not come from the hub: see whether the name is right and the network there, "
                    "or give the directory of a copy")
            raise ValueError(f"{what}. transformers said: {type(e).__name__}: {' '.join(str(e).split())[:500]}") from e
        if kind not in FAMILIES:
            why = ("; its tower adds features to several layers of the language model (deepstack), and what is cached, gathered and "
                   "sharded here is one vector a vision token" if kind.startswith("qwen3_vl") else "")
            raise ValueError(f"{name} is a {kind} model; this code reads {' and '.join(FAMILIES)} checkpoints{why}")
        pixels = read_pixels(name, kind == "glm4v")
        wrong = [str(k) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in sorted(info[key])]
        if wrong:
            raise ValueError(f"{name}: tensors missing, not expected or of another shape: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    model.set_attn_implementation(ATTENTION)
    model.pixels = pixels
    if max_pixels:
        pixels.max_pixels = min(max_pixels, pixels.max_pixels)
        pixels.min_pixels = min(max_pixels, pixels.min_pixels)
    model.to(device).eval()                                # no dropout, in training either
    for p in model.parameters():   # weights alone: M-RoPE's frequencies stay float32: in bfloat16 a radian off at position 1,000
        p.data = p.data.to(dtype, copy=True)               # weights read from a file lie anywhere in memory, and matrix kernels
    return model, tokenizer        # round by alignment: without the copy a resumed run differs from one never stopped in the last bit


def save(model, tokenizer, path, weights=None):
    """A checkpoint that transformers and vLLM load as it is: weights, configs, tokenizer, preprocessing.
    weights: {name: tensor}, gathered where model's are sharded."""
    model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
    px, (images, videos, both) = model.pixels, FAMILIES[model.config.model_type]
    shared = {"image_mean": px.mean, "image_std": px.std, "patch_size": px.patch, "temporal_patch_size": px.temporal,
              "merge_size": px.merge}
    size = {"size": dict(zip(("shortest_edge", "longest_edge"), px.video_pixels or (px.min_pixels, px.max_pixels)))}
    # GLM-4.1V's pictures have other bounds, which we do not read: transformers' own, spelled out, for vLLM has no default
    pictures = {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}} if px.video_pixels else size
    if px.video_pixels and px.max_pixels < px.video_pixels[1]:
        size["max_frame_pixels"] = px.max_pixels
    for file, kind in (("preprocessor_config.json", {**pictures, "image_processor_type": images}),
                       ("video_preprocessor_config.json", {**size, "video_processor_type": videos})):
        with open(os.path.join(path, file), "w") as f:
            json.dump({**shared, **kind, "processor_class": both}, f, indent=1)


TINY_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Words that are one token each in the tiny model; everything else is spelled in bytes, so any text can be read.
TINY_WORDS = " ".join(f"""{INSTRUCTION} user assistant Describe every moment How many are there When is it done
Which colour comes right after the last Where Someone collects and needs left right top bottom A B C D want yes no none
next never red green blue yellow circle square triangle circles squares triangles so the is are of in at to what when
where which before first time with video {' '.join(map(str, range(100)))}""".split())
TINY_WORDS += "\n" + TINY_WORDS.replace(" ", "\n") + "<answer></answer></think><answer> A. B. C. D."


def build_tiny(seed=0):
    """A Qwen2.5-VL of one million parameters, from nothing: real architecture, own tokenizer, no download."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokens.train_from_iterator([TINY_WORDS], trainer)
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                "<|image_pad|>", "<|video_pad|>"]
    tokens.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in controls])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=TINY_TEMPLATE, model_max_length=131072)
    ids = dict(zip(controls, tokenizer.convert_tokens_to_ids(controls)))
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}, initializer_range=0.07,
                         bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                         tie_word_embeddings=False),
        vision_config=dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, patch_size=14,
                           spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128, window_size=112, initializer_range=0.07,
                           fullatt_block_indexes=[1], tokens_per_second=2),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    return model, tokenizer, Pixels([0.2] * 3, [0.2] * 3, 14, 2, 2, 28 * 28, 112 * 112)
