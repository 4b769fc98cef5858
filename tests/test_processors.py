"""python -m pytest tests/test_processors.py -q

Prompts and patches against transformers' whole processors, which need torchvision: we do without it
elsewhere. Where it is not installed these tests are skipped; .ci/run runs them beside vLLM's.
"""
import pytest
import torch
from small import film
from tiny_families import KINDS, build
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

import model as vlm
from flow import Ranks
from plumbing.families import INSTRUCTION

pytest.importorskip("torchvision")

# frames, height, width, seconds
FILMS = [(2, 56, 84, 0.5), (5, 84, 56, 7.3), (9, 60, 100, 2.0), (16, 480, 640, 0.1), (7, 20, 31, 3),
         (4, 128, 128, 1.0)]


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind != "qwen2_5_vl"])
def checkpoint(request, tmp_path_factory):
    """-> (model, tokenizer, processor) of a kind, from its saved files"""
    path = str(tmp_path_factory.mktemp("checkpoint"))
    vlm.save(*build(request.param), path)
    return (*vlm.load(path), AutoProcessor.from_pretrained(path), KINDS[request.param])


@pytest.mark.parametrize("n, height, width, seconds", FILMS)
def test_prompts_and_patches_are_the_whole_processors(checkpoint, n, height, width, seconds):
    """The processor that the files name, over the same frames at the same times: the ids, where
    video is in them, the grid and the patches, bit for bit. Odd and even numbers of frames, frames
    that shrink, that grow, and that stay."""
    model, tokenizer, processor, name = checkpoint
    assert type(processor).__name__ == name
    video = film(n, height, width, seconds)
    content = [{"type": "video"}, {"type": "text", "text": "Where?\n" + INSTRUCTION}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    about = VideoMetadata(total_num_frames=10 ** 6, fps=1000.0,
                          frames_indices=[round(1000 * (i + 0.5) * seconds) for i in range(n)])
    frames = torch.from_numpy(video.read(0, n)).permute(0, 3, 1, 2)
    right = processor(text=[text], videos=[frames], video_metadata=[about], do_sample_frames=False,
                      return_tensors="pt")
    vision, *where = vlm.encode_video(model, lambda: video, Ranks())
    prompt = vlm.make_prompt(model, tokenizer, "Where?", vision, *where)
    assert prompt.ids.tolist() == right.input_ids[0].tolist()
    patches, grid = vlm.patchify(video.read(0, n), model.pixels)
    assert [list(grid)] == right.video_grid_thw.tolist()
    assert torch.equal(patches, right.pixel_values_videos)
    positions, _ = model.model.get_rope_index(
        right.input_ids, right.mm_token_type_ids, video_grid_thw=right.video_grid_thw)
    assert torch.equal(prompt.positions, positions[:, 0])
