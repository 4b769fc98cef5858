"""
The vision-language model as plain steps:

    patchify        uint8 frames -> normalised patches, in the order the tower was trained on
    encode_video    patches -> vision tokens, with the frames sharded over the ranks
    make_prompt     chat template, pads for the vision tokens, question, M-RoPE positions
    splice          text embeddings, with the vision tokens put where the pads are
    logprobs        log-probs of G completions over one shared prefix, in one packed sequence

The weights and the layers are those of Hugging Face transformers. These steps are ours, because
mistakes in them raise no error: other positions in the sampler than in the trainer, vision tokens
that are cut off, pads that are sampled as text.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

import encode
from flow import Pixels, Prompt, PromptError, Ranks  # noqa: F401  Pixels is found here too
from plumbing import families
from plumbing.checkpoints import ATTENTION, load  # noqa: F401
from plumbing.checkpoints import save_pretrained as save  # noqa: F401
from plumbing.families import (  # noqa: F401
    banned_ids,
    check_length,
    frame_size,
    stop_ids,
    vision_pad,
)
from plumbing.frames import resize
from plumbing.sharding import one_forward
from plumbing.two_parts import Layout, TwoParts

ALONE = Ranks()

# --------------------------------------------------------------------------------------------------
# frames -> patches -> vision tokens

def patchify(frames, px, size=None, device="cpu"):
    """Frames to the tower's input: the patches of one vision token stand together.

    frames: uint8 [T,H,W,3]; px: `Pixels`; size: (height, width) that they are resized to, None
    where they are a whole video; device: where the patches are made (the frames go there as bytes).
    An odd last frame is repeated to fill its temporal patch.
    Returns (float32 [t*h*w, 3*temporal*patch*patch], (t, h, w) in patches).
    """
    size = size or frame_size(*frames.shape[1:3], px, len(frames))
    x = resize(frames, size).to(device).permute(0, 3, 1, 2)            # [T, 3, H', W']
    missing = -len(x) % px.temporal
    x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
    t, h, w = len(x) // px.temporal, size[0] // px.patch, size[1] // px.patch
    x = x.view(t, px.temporal, 3, h // px.merge, px.merge, px.patch,
               w // px.merge, px.merge, px.patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)   # t, h', w', merge x2, colour, temporal, patch x2
    x = x.reshape(t * h * w, 3, -1).float()    # only now: bytes are a quarter of the size
    mean = torch.tensor(px.mean, device=device)[:, None]               # [3, 1]
    std = torch.tensor(px.std, device=device)[:, None]
    return x.sub_(mean * 255).div_(std * 255).flatten(1), (t, h, w)


class VideoPatches:
    """The patches of a video. `encode.encode` opens it, since there an error that one rank meets is
    raised on all sp ranks, so that no rank hangs."""

    def __init__(self, open_video, px, device="cpu"):
        self.open_video = open_video                       # () -> `Video`
        self.px = px
        self.device = device

    def open(self):
        """-> ((t, h, w) in patches, merge, read), as `encode.encode` wants it"""
        px = self.px
        video = self.video = self.open_video()
        h, w = self.size = frame_size(video.height, video.width, px, video.frames)
        t = math.ceil(video.frames / px.temporal)
        return (t, h // px.patch, w // px.patch), px.merge, self.read

    def read(self, lo, hi):
        """Temporal patches lo to hi. -> float32 [n,C]"""
        n = self.px.temporal
        frames = self.video.read(lo * n, min(hi * n, self.video.frames))
        return patchify(frames, self.px, self.size, self.device)[0]


def encode_video(model, open_video, ranks):
    """A video's vision tokens, its frames sharded over the sp ranks (MR-SP, stage 1).

    open_video() -> `Video`. Returns (vision [V,D], (t, h, w) in patches, seconds between frames,
    how many frames).
    """
    patches = VideoPatches(open_video, model.pixels, ranks.device)
    vision, grid = encode.encode(model.model.visual, patches.open, ranks)
    return vision, grid, patches.video.seconds, patches.video.frames


def frames_to_read(model, video, ranks):
    """The frames (lo, hi) that encode_video will ask of a video on this rank, in order."""
    n = model.pixels.temporal
    spans = encode.spans(math.ceil(video.frames / n), ranks)
    return [(lo * n, min(hi * n, video.frames)) for lo, hi in spans]


# --------------------------------------------------------------------------------------------------
# the prompt

def mrope_positions(ids, pad, grids, merge, interval):
    """M-RoPE positions of one sequence: the place of each token in time, height and width.

    ids: long [P]; pad: the vision pad's id; grids: (t, h, w) in patches of each run of pads;
    merge: patches along a side of a vision token; interval: positions between two temporal patches,
    tokens_per_second * seconds. -> long [3, P]. Raises ValueError if pads do not fill the grids.

    Text counts up on all three axes at once. Text after a video continues from 1 + the largest
    position so far on any axis, as Qwen2.5-VL was trained and as vLLM does. (transformers' own
    get_rope_index continues from the larger of height and width, which puts the question among a
    long video's own positions. In GLM-4.1V a run is one temporal patch: there both are the same.)

    >>> mrope_positions(torch.tensor([7, 9, 9, 7]), 9, [(2, 2, 2)], 2, 4.0)   # 4 apart in time
    tensor([[0, 1, 5, 6],
            [0, 1, 1, 6],
            [0, 1, 1, 6]])
    """
    grids = list(grids)
    is_pad = (ids == pad).tolist() + [True]                # True ends the last run of text
    parts = []
    at = 0                                                 # a place in the sequence
    start = 0                                              # the next free position
    while at < len(ids):
        if is_pad[at]:
            if not grids:
                raise ValueError("more runs of vision pads in the prompt than grids")
            t, h, w = grids.pop(0)
            time = (torch.arange(t, dtype=torch.float64) * interval).long()
            axes = time, torch.arange(h // merge), torch.arange(w // merge)
            part = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
            end = at + part.shape[1]
            if end > len(ids) or not all(is_pad[at:end]):
                raise ValueError("the vision pads in the prompt do not fill the grids")
        else:
            end = is_pad.index(True, at)
            part = torch.arange(start, start + end - at).expand(3, -1)
        parts.append(part)
        at = end
        start = int(part.max()) + 1
    if grids:
        raise ValueError("the vision pads in the prompt do not fill the grids")
    return torch.cat(parts, dim=1).to(ids.device)                      # [3, P]


def make_prompt(model, tokenizer, question, vision, grid, seconds, frames=None, key=""):
    """One user turn of the model's chat template: the video, the question, INSTRUCTION.

    vision: [V,D], what encode_video returned for grid (t, h, w); seconds: between two frames;
    frames: how many, None if they fill the grid; key: the video's name in the cache.
    -> `Prompt`. Raises ValueError if the template has no place for a video, or where vision does
    not fill the grid.
    """
    before, between, after = families.template_ids(model.config, tokenizer)
    video, grids, interval = families.video_ids(model, tokenizer, grid, seconds, frames)
    question = families.tokenize_text(tokenizer, question)     # never as control tokens
    ids = torch.tensor(before + video + between + question + after)
    pad = vision_pad(model.config)
    shape = video.count(pad), families.vision_width(model.config.vision_config)
    if len(vision) != shape[0]:
        raise ValueError(f"{shape[0]} vision pads but {len(vision)} vision tokens")
    if vision.shape != shape:
        raise ValueError(f"vision tokens of {vision.shape[1]} features, not {shape[1]}")
    positions = mrope_positions(ids, pad, grids, model.pixels.merge, interval)
    return Prompt(ids.to(vision.device), positions.to(vision.device), vision, grids,
                  seconds * model.pixels.temporal, frames, key)


# --------------------------------------------------------------------------------------------------
# one packed sequence for a group

def call_attention(module, query, key, value, attention_mask, attention, scaling, **_):
    """Called by transformers in every decoder layer; delegates to the attention object passed to
    this forward: `Packed`, `rollout.SharedPrefix` or `encode.Ulysses` around one of them.

    query: [B,heads,S,d]; key, value: [B,kv heads,S,d]; attention(layer, q, k, v, scale) gives
    [B,heads,S,d]. Returns ([B,S,heads,d], None).
    """
    out = attention(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("attention_object", call_attention)
# transformers makes no mask: an attention object has its own.
AttentionMaskInterface.register("attention_object", lambda *args, **kwargs: None)


class Packed:
    """The attention of a group that is packed as [prefix | completion 1 | ... | completion G].

    Each completion sees the prefix and itself. So the prefix, nearly all of a long video's cost, is
    computed once forward and once backward, not G times; and its keys and values are never copied.
    Prefixes are padded on the right to P places.
    """

    def __init__(self, prefix_lengths, owner, prefix=None):
        """prefix_lengths: long [B]; owner: long [B,C], the completion that a place belongs to, -1
        for padding; prefix: P, None for the longest."""
        self.prefix_lengths = prefix_lengths.tolist()
        self.P = prefix or max(self.prefix_lengths)
        B, C = owner.shape
        if C == 0:                                         # each completion has a single token
            return
        row = torch.arange(B, device=owner.device)[:, None]
        number = owner + row * (int(owner.max()) + 1)                  # [B, C], as no other row's
        places = (owner >= 0).flatten().nonzero()[:, 0]                # [M], in [B*C]: no padding
        _, lengths = number.flatten()[places].unique_consecutive(return_counts=True)
        self.completions = Layout(places.split(lengths.tolist()), B, C)

    def __call__(self, layer, q, k, v, scale):
        P = self.P
        prefix = F.scaled_dot_product_attention(           # pads come last, so none is seen
            q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, scale=scale, enable_gqa=True)
        if q.shape[2] == P:
            return prefix
        completions = TwoParts.apply(q[:, :, P:], k[:, :, :P], v[:, :, :P], k[:, :, P:],
                                     v[:, :, P:], self.prefix_lengths, self.completions, scale)
        return torch.cat([prefix, completions], dim=2)                 # [B, heads, P+C, d]


def vision_at(model, ids, visions, columns=None):
    """Where the vision tokens stand. See `splice`. -> (pads bool [B,s], their tokens [v,D])"""
    pads = ids == vision_pad(model.config)                             # [B, S]
    vision = torch.cat(list(visions)).to(ids.device)
    count = int(pads.sum())
    if count != len(vision):
        raise ValueError(f"{count} vision pads in the sequence but {len(vision)} vision tokens")
    if columns is None:
        return pads, vision
    vision_index = pads.flatten().cumsum(0).view_as(pads) - 1          # [B, S], its row in vision
    pads = pads[:, columns]
    return pads, vision[vision_index[:, columns][pads]]


def splice(model, ids, visions, columns=None):
    """Text embeddings, with the vision tokens in the places of the pads.

    ids: long [B,S]; visions: a [V,D] for each row; columns: long [s], the places that are wanted,
    None for all. -> [B,s,D]. Raises ValueError if pads and vision tokens are not as many.
    """
    pads, vision = vision_at(model, ids, visions, columns)
    if columns is not None:
        ids = ids[:, columns]
    embeds = model.get_input_embeddings()(ids)                         # [B, s, D]
    return embeds.masked_scatter(pads[..., None], vision.to(embeds.dtype))


def pad_prefixes(prompts, device, ranks=ALONE):
    """B prompts as rows, padded on the right to a length that the sp ranks can share out.

    -> ids [B,P], positions [3,B,P], lengths [B], first position of each completion [B]: all long
    """
    ids = pad_sequence([p.ids for p in prompts], batch_first=True)     # [B, P]
    positions = pad_sequence([p.positions.T for p in prompts], batch_first=True).permute(2, 0, 1)
    padding = 0, -ids.shape[1] % ranks.sp
    lengths = torch.tensor([len(p.ids) for p in prompts])
    first = torch.tensor([int(p.positions.max()) + 1 for p in prompts])
    rows = F.pad(ids, padding), F.pad(positions, padding), lengths, first
    return tuple(x.to(device) for x in rows)


def completion_rows(completions, device, ranks=ALONE):
    """The completions of B groups as rows, to be put behind their prefixes. See predicted_at.

    Returns three long [B,C] on device, C a multiple of sp: the tokens that are read (0: padding),
    the completion of the group that each belongs to (-1), and its number in that completion (0).
    """
    def rows(of_group, fill):
        x = pad_sequence([of_group(group) for group in completions], True, padding_value=fill)
        return F.pad(x, (0, -x.shape[1] % ranks.sp), value=fill).to(device)

    def read(group):
        return torch.cat([tokens[:-1] for tokens in group])

    def owner(group):
        return torch.cat([torch.full((len(tokens) - 1,), g) for g, tokens in enumerate(group)])

    def steps(group):
        return torch.cat([torch.arange(len(tokens) - 1) for tokens in group])

    return rows(read, 0), rows(owner, -1), rows(steps, 0)


def predicted_at(prompts, completions, prefix, device):
    """Where each token of all completions is predicted. -> row, place: long [M] each, in order

    Token i of a completion stands at place start + i and is predicted one place earlier; token 0 is
    predicted at the prefix's last place. The last token is predicted but never read, so it takes no
    place: L tokens take L - 1 places. prefix: P, the place where a row's first completion starts.
    """
    rows = []
    places = []
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        last_of_prefix = len(prompt.ids) - 1               # what follows it, up to P, is padding
        start = prefix
        for tokens in group:
            end = start + len(tokens) - 1
            rows += [b] * len(tokens)
            places += [last_of_prefix, *range(start, end)]
            start = end
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def forward(model, attention, ids, positions, visions, prefix, ranks):
    """The language model over packed sequences, or over this rank's share of them (MR-SP stage 2).

    attention: see `call_attention`; ids: long [B,S]; positions: long [3,B,S]; visions: a [V,D] for
    each row, with deepstack's features a [V,D*(1+n)]; prefix: how many of the S places are the
    prefix's; it and the rest are multiples of sp.
    Returns (hidden [B,S/sp,D], local [S]: where in it a place is, -1 where on another rank).
    """
    columns = encode.columns(prefix, ids.shape[1] - prefix, ranks).to(ids.device)  # [S/sp]
    if ranks.sp > 1:
        attention = encode.Ulysses(attention, prefix // ranks.sp, ranks)
    D = model.config.text_config.hidden_size
    embeds = splice(model, ids, [vision[:, :D] for vision in visions], columns)
    pads, features = vision_at(model, ids, [vision[:, D:] for vision in visions], columns)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions[:, :, columns], use_cache=False,
        attention=attention, **families.deepstack(model.config, pads, features)).last_hidden_state
    local = torch.full((ids.shape[1],), -1, device=ids.device)
    local[columns] = torch.arange(len(columns), device=ids.device)
    return hidden, local


@one_forward
def logprobs(model, prompts, completions, banned, head_chunk=2048, ranks=ALONE):
    """Log-probs of every completion's tokens under the model, the prefix of a group computed once.

    prompts: B `Prompt`s; completions: B lists of long [L] tensors, ragged, each L at least 1;
    banned: bool [vocabulary]; head_chunk: tokens that go through the head at once.
    ranks: their sp ranks share the sequence (MR-SP stage 2). All of them give the same arguments,
    each computes its share, and all get all the log-probs. A share's gradient stays with the rank
    that computed it, so that the gradients summed over the ranks are those of a single rank.
    Returns (logprobs, entropy without gradient), float32 [N,L] each, N = all completions in order;
    0 beyond their end.
    """
    device = model.device
    ids, positions, lengths, first = pad_prefixes(prompts, device, ranks)
    prefix = ids.shape[1]
    inputs, owner, steps = completion_rows(completions, device, ranks)
    ids = torch.cat([ids, inputs], dim=1)                              # [B, P+C]
    after = (first[:, None] + steps).expand(3, -1, -1)
    positions = torch.cat([positions, after], dim=2)                   # [3, B, P+C]
    attention = Packed(lengths, owner, prefix)
    visions = [p.vision for p in prompts]
    hidden, local = forward(model, attention, ids, positions, visions, prefix, ranks)

    # Only the hidden states that predict a completion's token go through the head.
    row, place = predicted_at(prompts, completions, prefix, device)    # [M] each
    targets = torch.cat([tokens.to(device) for group in completions for tokens in group])
    place = local[place]
    held = place >= 0                                                  # [M], those on this rank
    hidden = hidden[row[held], place[held]]                            # [m, D]
    targets = targets[held]

    # In chunks that are computed again in the backward, so no [m, vocabulary] tensor is kept.
    parts = []
    for h, t in zip(hidden.split(head_chunk), targets.split(head_chunk)):
        parts.append(checkpoint(logprob_and_entropy, model, h, t, banned, use_reentrant=False))
    scores = torch.cat(parts, dim=1)                                   # [2, m]
    if ranks.sp > 1:
        every = torch.zeros(2, len(held), device=device)
        every[:, held] = scores
        scores = encode.sum_forward(every, ranks)                      # [2, M]
    logp, entropy = scores
    lengths = [len(tokens) for group in completions for tokens in group]
    return (pad_sequence(logp.split(lengths), batch_first=True),
            pad_sequence(entropy.detach().split(lengths), batch_first=True))


def logprob_and_entropy(model, hidden, targets, banned):
    """Each target's log-prob, and the entropy there. hidden [m,D], targets long [m] -> [2,m]"""
    logp = token_distribution(model, hidden, banned)                   # [m, vocabulary]
    entropy = torch.special.entr(logp.detach().exp()).sum(1)
    return torch.stack([logp.gather(1, targets[:, None])[:, 0], entropy])


def token_distribution(model, hidden, banned):
    """The one distribution of sampler and trainer. hidden [m,D] -> float32 log-probs [m,vocab]"""
    logits = model.get_output_embeddings()(hidden).float()
    return logits.masked_fill(banned, -math.inf).log_softmax(dim=1)
