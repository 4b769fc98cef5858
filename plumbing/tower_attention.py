"""
The attention of the vision tower, in few calls.
"""
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

# On Hopper torch would choose cuDNN's attention first, which makes a plan for every new shape. Here
# each group of completions has new shapes.
torch.backends.cuda.enable_cudnn_sdp(False)

# Its name in transformers, which passes segments only to an attention with "flash" in its name.
FRAMES_ATTENTION = "frames_flash"


def frames_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """Attention within each of many short segments: a frame, or a window of one.

    query, key, value: [1,heads,S,d]; cu_seq_lens_q: int [segments+1], where the segments start.
    -> ([1,S,heads,d], None). Segments of one length share one call; transformers' own path makes
    one call per segment, which is thousands for a long video.
    """
    starts = cu_seq_lens_q[:-1].long()
    lengths = cu_seq_lens_q.diff().long()
    out = torch.empty_like(query.transpose(1, 2))                      # [1, S, heads, d]
    for n in lengths.unique().tolist():
        offsets = torch.arange(n, device=starts.device)
        at = (starts[lengths == n, None] + offsets).flatten()          # [segments*n]
        y = F.scaled_dot_product_attention(
            as_batch(query, at, n), as_batch(key, at, n), as_batch(value, at, n), scale=scaling)
        out = out.index_copy(1, at, y.transpose(1, 2).flatten(0, 1)[None])
    return out, None


def as_batch(x, at, n):
    """The segments of n positions that stand at `at`. [1,heads,S,d] -> [segments,heads,n,d]"""
    return x[0, :, at].unflatten(1, (-1, n)).transpose(0, 1)


AttentionInterface.register(FRAMES_ATTENTION, frames_attention)
