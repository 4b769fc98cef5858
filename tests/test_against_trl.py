"""python -m pytest tests/test_against_trl.py -q

experiments/against_trl.py: TRL itself is not needed here.
"""
import sys
from pathlib import Path

import torch

import model as vlm
from plumbing.tiny import build_tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from against_trl import Attached  # noqa: E402


def test_a_forward_without_its_video_gets_it():
    """TRL's training forward saw placeholders: its log-probs were not of the video."""
    model, tokenizer, pixels = build_tiny()
    video_ids = [model.config.video_token_id] * 4          # 4 frames of 28 x 56 pixels
    ids = torch.tensor([tokenizer.encode("Where") + video_ids + tokenizer.encode("red")] * 3)
    frames = torch.randint(0, 256, (4, 28, 56, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    patches, grid = vlm.patchify(frames.numpy(), pixels)
    types = 2 * (ids == model.config.video_token_id).int()
    counted = Attached(model)
    with torch.no_grad():
        seen = model(input_ids=ids, mm_token_type_ids=types,
                     pixel_values_videos=patches.repeat(3, 1),
                     video_grid_thw=torch.tensor([grid] * 3),
                     second_per_grid_ts=torch.ones(3)).logits
        later = model(input_ids=ids).logits
        counted.kept.clear()
        blind = model(input_ids=ids).logits
    assert torch.equal(seen, later)
    assert not torch.allclose(seen, blind, atol=1e-3)
    assert (counted.encodes, counted.lm_tokens) == (6, 3 * ids.numel())
