"""python -m pytest tests/test_checkpoints.py -q

Hugging Face directories in and out: `model.load` and `model.save`, which are
plumbing/checkpoints.py. What differs between the families is in test_families.py.
"""
import copy
import json
import os
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from runs import ended, launched
from safetensors.torch import load_file, save_file
from small import answers, frames, shaken_tiny
from test_model import NASTY, RAGGED, separate, three_prompts, turn
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model as vlm
from flow import Pixels
from plumbing.families import FAMILIES, read_pixels
from plumbing.tiny import build_tiny

QWEN = FAMILIES["qwen2_5_vl"]


@pytest.fixture(scope="module")
def tiny():
    return shaken_tiny()


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("saved") / "model")
    vlm.save(*tiny, path)
    return path


def test_what_is_saved_loads_in_transformers_and_here(tiny, saved):
    """Same weights bit for bit, same log-probs, same tokenizer, same preprocessing, same stop
    ids."""
    model, tokenizer = tiny
    prompts, banned = three_prompts(tiny), vlm.banned_ids(*tiny)
    completions = [answers(banned, lengths) for lengths in RAGGED]
    theirs = AutoModelForImageTextToText.from_pretrained(saved).eval()
    mine, words = vlm.load(saved)
    for other in (theirs, mine):
        assert type(other) is type(model) and set(other.state_dict()) == set(model.state_dict())
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
        assert vlm.stop_ids(other, tokenizer) == vlm.stop_ids(model, tokenizer)
    with torch.no_grad():
        right = vlm.logprobs(model, prompts, completions, banned)[0]
        assert torch.equal(vlm.logprobs(mine, prompts, completions, banned)[0], right)
        value, _ = separate(theirs, prompts[0], completions[0][0], banned)
        assert torch.allclose(right[0, :7], value, atol=1e-5, rtol=0)
    assert mine.pixels == model.pixels and not mine.training
    text = turn(tokenizer, NASTY[1] + "é", 3)
    for other in (words, AutoTokenizer.from_pretrained(saved)):
        assert other(text).input_ids == tokenizer(text).input_ids and len(other) == len(tokenizer)
        assert other.eos_token_id == tokenizer.eos_token_id
        assert other.pad_token_id == tokenizer.pad_token_id
        assert turn(other, "Where?", 1) == turn(tokenizer, "Where?", 1)


# --------------------------------------------------------------------------------------------------
# preprocessing

def test_preprocessing_files_round_trip_and_mean_the_same_to_transformers(tiny, saved):
    px = tiny[0].pixels
    assert read_pixels(saved, QWEN) == px
    theirs = Qwen2VLImageProcessorPil.from_pretrained(saved)
    x = frames(1, 100, 60)[0]
    out = theirs(images=[Image.fromarray(x)], return_tensors="pt")
    assert out.image_grid_thw.tolist() == [list(vlm.patchify(x[None], px)[1])]
    assert (list(theirs.image_mean), list(theirs.image_std)) == (px.mean, px.std)
    assert (theirs.patch_size, theirs.temporal_patch_size, theirs.merge_size) == (
        px.patch, px.temporal, px.merge)
    with open(os.path.join(saved, "video_preprocessor_config.json")) as f:
        video = json.load(f)
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert video["size"] == {"shortest_edge": 784, "longest_edge": 12544}


BASE = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2}
SIZED = {**BASE, "size": {"shortest_edge": 11, "longest_edge": 22}}
OLD = {**BASE, "min_pixels": 33, "max_pixels": 44}                     # Qwen2.5-VL's first form
NO_SIZE = {"size": {"shortest_edge": None, "longest_edge": None}}


@pytest.mark.parametrize("files, bounds", [
    ({"preprocessor_config.json": OLD}, (33, 44)),
    ({"preprocessor_config.json": {**OLD, **NO_SIZE}}, (33, 44)),
    ({"preprocessor_config.json": OLD, "video_preprocessor_config.json": SIZED}, (11, 22)),
    ({"processor_config.json": {"video_processor": SIZED, "image_processor": OLD}}, (11, 22)),
    ({"processor_config.json": {"processor_class": "x"}, "preprocessor_config.json": OLD},
     (33, 44)),
    ({"processor_config.json": {"video_processor": SIZED}, "preprocessor_config.json": OLD},
     (11, 22))])
def test_preprocessing_is_read_from_every_form_of_file(tmp_path, files, bounds):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert asdict(read_pixels(str(tmp_path), QWEN)) == dict(
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], patch=14, temporal=2, merge=2,
        min_pixels=bounds[0], max_pixels=bounds[1], video_pixels=())


def test_bounds_that_disagree_mean_what_they_mean_to_transformers(tmp_path):
    """Files that hold both forms: who lowers max_pixels by hand, as model cards advise, would see
    it ignored by us alone."""
    content = {**SIZED, "size": {"shortest_edge": 784, "longest_edge": 99999}, "min_pixels": 1568,
               "max_pixels": 7840, "image_processor_type": "Qwen2VLImageProcessor"}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps(content))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    mine = read_pixels(str(tmp_path), QWEN)
    assert (mine.min_pixels, mine.max_pixels) == (theirs.shortest_edge, theirs.longest_edge)


def test_no_preprocessing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no video_preprocessor_config.json"):
        read_pixels(str(tmp_path), QWEN)


def test_max_pixels_only_lowers_the_checkpoints_bound(saved):
    def bound(name, **options):
        return vlm.load(name, **options)[0].pixels.max_pixels

    assert bound(saved, max_pixels=5000) == 5000
    assert bound(saved, max_pixels=10 ** 9) == 12544
    assert bound("tiny", max_pixels=3136) == 3136
    assert bound("tiny") == 12544, "the last call left nothing behind"


def test_max_pixels_holds_for_a_frame_below_the_checkpoints_minimum(tiny, tmp_path):
    """A frame smaller than min_pixels is made larger; it must not end above the max_pixels that the
    user asked for."""
    model = copy.copy(tiny[0])
    # what Qwen2-VL's video processor starts from
    model.pixels = Pixels([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 14, 2, 2, 128 * 784, 768 * 784)
    vlm.save(model, tiny[1], str(tmp_path))
    px = vlm.load(str(tmp_path), max_pixels=64 * 784)[0].pixels
    for height, width in [(100, 100), (196, 196), (240, 320), (720, 1280)]:
        h, w = vlm.frame_size(height, width, px)
        assert h * w <= 64 * 784, (height, width)


# --------------------------------------------------------------------------------------------------
# weights

def test_load_sets_attention_dtype_and_no_dropout(saved):
    """Our attention in both halves: with transformers' default a completion would see the others.
    And float32 frequencies: rounded to bfloat16, position 1,000 is a radian off."""
    model, _ = vlm.load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    frequencies = vlm.load("tiny")[0].model.language_model.rotary_emb.inv_freq
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, frequencies)
    assert frequencies.dtype == torch.float32
    assert model.config.text_config._attn_implementation == "attention_object"
    assert model.config.vision_config._attn_implementation == "frames_flash"


def test_a_checkpoint_with_tied_embeddings_loads(tmp_path):
    """Qwen2.5-VL-3B has no tensor of its own for the head: that is not a missing tensor."""
    model, tokenizer, px = build_tiny()
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(model)(config)
    model.generation_config.eos_token_id, model.pixels = tokenizer.eos_token_id, px
    vlm.save(model, tokenizer, str(tmp_path))
    assert not any("lm_head" in k for k in load_file(tmp_path / "model.safetensors"))
    loaded, _ = vlm.load(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.get_input_embeddings().weight)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


# --------------------------------------------------------------------------------------------------
# what is refused

def tampered(saved, path, change=None):
    """A copy of a checkpoint whose tensors were changed. -> its path"""
    os.makedirs(path)
    for name in os.listdir(saved):
        if name != "model.safetensors":
            os.link(os.path.join(saved, name), os.path.join(path, name))
    tensors = load_file(os.path.join(saved, "model.safetensors"))
    if change:
        change(tensors)
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    return str(path)


def test_load_refuses_missing_and_unknown_tensors_by_name(saved, tmp_path):
    """transformers fills what is missing with random numbers, and only logs it."""
    path = tampered(saved, tmp_path / "a", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight") as e:
        vlm.load(path)
    assert path in str(e.value) and "1 in all" in str(e.value)

    name = "model.language_model.layers.0.strange"
    path = tampered(saved, tmp_path / "b", lambda t: t.update({name: torch.zeros(2)}))
    with pytest.raises(ValueError, match="strange") as e:
        vlm.load(path)
    assert path in str(e.value)


def test_load_refuses_another_architecture_by_name(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama.*qwen2_5_vl") as e:
        vlm.load(str(tmp_path))
    assert str(tmp_path) in str(e.value)


def test_load_refuses_a_directory_without_config(tmp_path):
    with pytest.raises(ValueError, match="config.json") as e:
        vlm.load(str(tmp_path))
    assert str(tmp_path) in str(e.value)


def test_a_hub_name_without_a_hub_is_one_line_that_names_it():
    """transformers' own lines are several. A process of its own: whether there is a hub is settled
    at import, in runs.ENV."""
    script = os.path.join(os.path.dirname(vlm.__file__), "rollout.py")
    done = ended(launched("--model=nobody/nothing", "--video=toy:3", "--question=How many?",
                          script=script, world=0))
    [line] = done.err.strip().split("\n")
    right = "rollout.py: nobody/nothing is no directory here and did not come from the hub"
    assert done.code == 1 and line.startswith(right), done.err


@pytest.mark.parametrize("file, change", [
    ("config.json", lambda text: text[:40]),
    ("config.json", lambda text: text.replace('"qwen2_5_vl"', '"nobody"')),
    ("config.json", lambda text: text.replace('"num_hidden_layers": 4',
                                              '"num_hidden_layers": "four"')),
    ("config.json", lambda text: text.replace('"num_attention_heads": 4',
                                              '"num_attention_heads": 0')),
    ("tokenizer.json", lambda text: "{}"),
    ("tokenizer.json", lambda text: text[:99]),
    ("tokenizer_config.json", lambda text: text[:20]),
    ("video_preprocessor_config.json", lambda text: text[:20]),
    ("video_preprocessor_config.json", lambda text: text.replace("patch_size", "path_size"))])
def test_a_damaged_file_is_one_line_that_names_the_checkpoint(saved, tmp_path, file, change):
    """transformers' KeyErrors and many lines came through, and did not say which checkpoint."""
    path = tampered(saved, tmp_path / "c")
    with open(os.path.join(path, file)) as f:
        text = f.read()
    os.remove(os.path.join(path, file))                    # a link to the whole one
    with open(os.path.join(path, file), "w") as f:
        f.write(change(text))
    assert change(text) != text
    with pytest.raises(ValueError) as e:
        vlm.load(path)
    assert str(e.value).startswith(path) and "\n" not in str(e.value)


def test_load_refuses_a_checkpoint_without_preprocessing(saved, tmp_path):
    path = tampered(saved, tmp_path / "c")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        os.remove(os.path.join(path, name))
    with pytest.raises(ValueError, match="preprocessor_config.json") as e:
        vlm.load(path)
    assert path in str(e.value)
