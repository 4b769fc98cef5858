"""
The FLOPs of a GRPO step on one long video, computed from the shapes of a model.
"""
from plumbing.memory import sizes

# FLOP/s of the SXM boards in bfloat16, without sparsity.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}


def train_flops(config, prompt, group, completion):
    """FLOPs that forward and backward of a group's packed sequence need at least.

    prompt: P, its tokens; group: G; completion: L, tokens of each. Attention counts only pairs of
    positions that see each other; recomputed layers count once.
    """
    m = sizes(config)
    places = completion - 1                                # the last token is never read
    attention_weights = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
    layer_weights = attention_weights + 3 * m.hidden * m.mlp
    pairs = prompt ** 2 / 2 + group * (places * prompt + places ** 2 / 2)
    layer = (prompt + group * places) * layer_weights + 2 * m.heads * m.head_dim * pairs
    products = m.layers * layer + group * completion * m.hidden * m.vocabulary
    return 3 * 2 * products        # a multiplication and an addition; the backward is two products


def peak_share(flops, seconds, device_name):
    """The share of a GPU's peak that flops in `seconds` reach; None for a device whose peak is not
    known."""
    for name, peak in PEAK_FLOPS.items():
        if name in device_name:
            return round(flops / seconds / peak, 4)
    return None
