"""
The attention of a packed group's completions: each sees the prefix and its own past.

One call for both would need a mask, and kernels that read a mask are slow: on an H200 they took 59%
of a group's forward and backward. So there are two calls that need none: over the prefix, which all
queries see whole, and over the completion, which is causal. They are two parts of one softmax.
Besides its output o, a kernel returns s, the logarithm of the sum of a query's exponentials. The
parts merge exactly:

    s = log(exp(s1) + exp(s2))            o = exp(s1 - s) o1 + exp(s2 - s) o2

The backward of each part is its kernel's own, given the merged s and o. (Ring attention, arXiv
2310.01889, merges the parts of its ranks in the same way.)
"""
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------
# torch's attention, with s

def attend(q, k, v, causal, scale):
    """q, k, v: [B,heads,S,d] -> (o as q, s float32 [B,heads,S], what else the backward needs)"""
    if q.device.type != "cuda":
        o, s = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return o, s, ()
    if q.dtype == torch.float32:                           # the flash kernel has no float32
        o, s, *state = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale)
        return o, s.narrow(2, 0, q.shape[2]), state        # s is padded to a multiple of 32
    o, s, *lengths, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale)
    return o, s, (*lengths, 0.0, causal, seed, offset)


def attend_backward(grad, q, k, v, o, s, state, causal, scale):
    """-> the gradients of q, k and v. o and s may be those of a softmax that has more keys."""
    s = s.contiguous()
    if q.device.type != "cuda":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, s, 0.0, causal, scale=scale)
    if q.dtype == torch.float32:
        s = F.pad(s, (0, -s.shape[2] % 32), value=torch.inf)
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, o, s, *state, 0.0, [True, True, True, False], causal,
            scale=scale)[:3]
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, o, s, *state, scale=scale)


# --------------------------------------------------------------------------------------------------
# the two parts

class Layout:
    """The N completions of B rows with C places each, as N rows of their own with L places, L the
    longest, padded on the right."""

    def __init__(self, places, B, C):
        """places: N long tensors, the places of the completions' tokens in [B*C]."""
        self.B, self.C = B, C
        padded = pad_sequence(places, batch_first=True, padding_value=-1)          # [N, L]
        self.is_token = padded >= 0
        self.padded = padded.clamp(min=0)
        self.places = torch.cat(list(places))                                      # [M]
        self.cells = self.is_token.flatten().nonzero()[:, 0]                       # [M], in [N*L]

    def apart(self, x):                        # [B, heads, C, ...] -> [N, heads, L, ...]
        return x.transpose(1, 2).flatten(0, 1)[self.padded].transpose(1, 2).contiguous()

    def together(self, x, padding=0.0):        # [N, heads, L, ...] -> [B, heads, C, ...]
        x = x.transpose(1, 2).flatten(0, 1)[self.cells]                # [M, heads, ...]
        rows = x.new_full((self.B * self.C, *x.shape[1:]), padding)
        rows[self.places] = x
        return rows.unflatten(0, (self.B, self.C)).transpose(1, 2)


class TwoParts(torch.autograd.Function):
    """apply(q [B,heads,C,d], prefix_k, prefix_v [B,kv heads,P,d], own_k, own_v [B,kv heads,C,d],
    lengths, completions, scale) -> [B,heads,C,d]

    lengths: B integers, of the prefixes without padding; completions: their `Layout`.
    """

    @staticmethod
    def forward(ctx, q, prefix_k, prefix_v, own_k, own_v, lengths, completions, scale):
        R = q.shape[1] // own_k.shape[1]                   # query heads of one key-value head
        parts = []
        for row, length in enumerate(lengths):
            parts.append(attend(fold(q, row, R), prefix_k[row, None, :, :length],
                                prefix_v[row, None, :, :length], False, scale))
        prefix_o = torch.cat([unfold(o, R) for o, _, _ in parts])      # [B, heads, C, d]
        prefix_s = torch.cat([unfold(s, R) for _, s, _ in parts])      # [B, heads, C]
        own_o, own_s, own_state = attend(
            completions.apart(q), repeat(completions.apart(own_k), R),
            repeat(completions.apart(own_v), R), True, scale)          # [N, heads, L, d]
        own_o, own_s = completions.together(own_o), completions.together(own_s, -torch.inf)

        s = torch.logaddexp(prefix_s, own_s)                           # [B, heads, C]
        o = prefix_o * (prefix_s - s).exp()[..., None] + own_o * (own_s - s).exp()[..., None]
        o = o.to(q.dtype)                                              # [B, heads, C, d]
        ctx.save_for_backward(q, prefix_k, prefix_v, own_k, own_v, o, s)
        states = [state for _, _, state in parts]
        ctx.others = lengths, completions, scale, R, states, own_state
        return o

    @staticmethod
    def backward(ctx, grad):
        q, prefix_k, prefix_v, own_k, own_v, o, s = ctx.saved_tensors
        lengths, completions, scale, R, states, own_state = ctx.others
        # The padding behind a completion is seen by no token. Nor does it see one: at s = inf its
        # weights, exp(q k - s), are 0. (With another token's s they could overflow, to NaN.)
        own_s = completions.apart(s).masked_fill(~completions.is_token[:, None], torch.inf)
        dq, own_dk, own_dv = attend_backward(
            completions.apart(grad), completions.apart(q), repeat(completions.apart(own_k), R),
            repeat(completions.apart(own_v), R), completions.apart(o), own_s, own_state, True,
            scale)                                                     # [N, heads, L, d]
        dq = completions.together(dq)                                  # [B, heads, C, d]
        own_dk = completions.together(own_dk.unflatten(1, (-1, R)).sum(2))         # [B, kv, C, d]
        own_dv = completions.together(own_dv.unflatten(1, (-1, R)).sum(2))
        dk, dv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
        for row, length in enumerate(lengths):
            seen = row, slice(None), slice(length)
            row_dq, row_dk, row_dv = attend_backward(
                fold(grad, row, R), fold(q, row, R), prefix_k[seen][None], prefix_v[seen][None],
                fold(o, row, R), fold(s, row, R), states[row], False, scale)
            dq[row] += unfold(row_dq, R)[0]
            dk[seen], dv[seen] = row_dk[0], row_dv[0]
        return dq, dk, dv, own_dk, own_dv, None, None, None


# The R query heads of a key-value head are more queries of that head.
def fold(x, row, R):       # a row of [B, kv*R, C, ...] -> [1, kv, R*C, ...]
    return x[row].unflatten(0, (-1, R)).flatten(1, 2)[None].contiguous()


def unfold(x, R):          # [1, kv, R*C, ...] -> [1, kv*R, C, ...]
    return x.unflatten(2, (R, -1)).flatten(1, 2)


def repeat(x, R):          # [N, kv, L, d] -> [N, kv*R, L, d]
    return x.repeat_interleave(R, dim=1)
