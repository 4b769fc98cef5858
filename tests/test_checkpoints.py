"""python -m pytest tests/test_checkpoints.py -q

Hugging Face directories in and out: `model.load` and `model.save`, which are
plumbing/checkpoints.py. What differs between the families is in test_families.py.
"""
import copy
import json
import os
import re
from dataclasses import asdict
from types import SimpleNamespace

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
from plumbing.checkpoints import load_without_weights
from plumbing.families import FAMILIES
from plumbing.preprocessing import read_pixels
from plumbing.tiny import build_tiny

QWEN = FAMILIES["qwen2_5_vl"]
TOWER = SimpleNamespace(patch_size=14, temporal_patch_size=2, spatial_merge_size=2)


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
    assert read_pixels(saved, QWEN, TOWER) == px
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
    assert asdict(read_pixels(str(tmp_path), QWEN, TOWER)) == dict(
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
    mine = read_pixels(str(tmp_path), QWEN, TOWER)
    assert (mine.min_pixels, mine.max_pixels) == (theirs.shortest_edge, theirs.longest_edge)


def test_no_preprocessing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no video_preprocessor_config.json"):
        read_pixels(str(tmp_path), QWEN, TOWER)


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


def with_file(saved, path, file, change):
    """A copy of a checkpoint with another text in one file, change(text); the file is missing if
    that is None. -> its path"""
    path = tampered(saved, path)
    file = os.path.join(path, file)
    with open(file) as f:
        text = f.read()
    new = change(text)
    assert new != text
    os.remove(file)                                        # a link to the whole one
    if new is not None:
        with open(file, "w") as f:
            f.write(new)
    return path


def in_json(**new):
    """-> a change of a JSON file: these keys are new"""
    return lambda text: json.dumps(json.loads(text) | new)


def in_part(part, **new):
    """-> a change of a config.json: these keys of a part are new"""
    def change(text):
        content = json.loads(text)
        content[part] |= new
        return json.dumps(content)
    return change


def refusal(read, path):
    """What read(path) says, one line that names the checkpoint."""
    with pytest.raises(ValueError) as e:
        read(path)
    assert str(e.value).startswith(path) and "\n" not in str(e.value)
    return str(e.value)


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
    refusal(vlm.load, with_file(saved, tmp_path / "c", file, change))


NAN = float("nan")


@pytest.mark.parametrize("new, text", [
    ({"patch_size": 0}, "patch_size is 0, and must be a whole number, at least 1; copy the file"),
    ({"patch_size": -14}, "patch_size is -14"),
    ({"patch_size": "14"}, 'patch_size is "14"'),
    ({"patch_size": 14.5}, "patch_size is 14.5"),
    ({"patch_size": True}, "patch_size is true"),
    ({"patch_size": None}, "patch_size is null"),
    ({"patch_size": 16}, "patch_size is 16, and the patch_size of the vision_config in config.json "
                         "is 14: copy both files from one checkpoint"),
    ({"merge_size": 0}, "merge_size is 0"),
    ({"merge_size": 1}, "merge_size is 1, and the spatial_merge_size of the vision_config"),
    ({"temporal_patch_size": 0}, "temporal_patch_size is 0"),
    ({"temporal_patch_size": 1}, "temporal_patch_size is 1, and the temporal_patch_size of the"),
    ({"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5], and must be a list of three numbers"),
    ({"image_mean": "x"}, 'image_mean is "x"'),
    ({"image_mean": [NAN] * 3}, "image_mean is [NaN, NaN, NaN]"),
    ({"image_mean": [10 ** 400] * 3}, "image_mean is [1000"),
    ({"image_std": [0, 0, 0]}, "image_std is [0, 0, 0], and must be a list of three numbers above"),
    ({"image_std": [-1, -1, -1]}, "image_std is [-1, -1, -1]"),
    ({"size": [784, 12544]}, "size is [784, 12544], and must be an object"),
    ({"size": None}, "it has no 'shortest_edge'"),
    ({"size": {"shortest_edge": 0, "longest_edge": 0}}, "shortest_edge is 0"),
    ({"size": {"shortest_edge": -1, "longest_edge": -5}}, "shortest_edge is -1"),
    ({"size": {"shortest_edge": "784", "longest_edge": "12544"}}, 'shortest_edge is "784"'),
    ({"size": {"shortest_edge": 1e18, "longest_edge": 1e19}}, "shortest_edge is 1e+18"),
    ({"size": {"shortest_edge": 10 ** 18, "longest_edge": 10 ** 19}}, "shortest_edge is 10000"),
    ({"size": {"shortest_edge": 12544, "longest_edge": 784}}, "12544, is above the most, 784"),
    ({"min_pixels": 0}, "min_pixels is 0"),
    ({"max_pixels": 1.5}, "max_pixels is 1.5"),
    ({"do_rescale": False}, "do_rescale is false, and must be true"),
    ({"do_normalize": False}, "do_normalize is false, and must be true"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
    ({"video_processor": None}, "video_processor is no JSON object"),
    ({"processor_class": ["x"]}, "processor_class is no text")])
def test_a_wrong_value_in_a_preprocessing_file_is_named(saved, tmp_path, new, text):
    """Most were tracebacks of the first frame. A deviation of 0, a NaN, bounds in the wrong order
    and the switches gave other pixels, in silence."""
    path = with_file(saved, tmp_path / "c", "video_preprocessor_config.json", in_json(**new))
    said = refusal(vlm.load, path)
    assert said.startswith(f"{path}/video_preprocessor_config.json: ") and text in said


@pytest.mark.parametrize("change, text", [
    (in_json(quantization_config={"quant_method": "awq", "bits": 4}),
     "quantised weights cannot be trained; give the checkpoint that is not quantised"),
    (in_part("text_config", quantization_config={"quant_method": "fp8"}), "quantised weights"),
    (in_json(text_config=None), "the text_config in config.json is no JSON object"),
    (in_json(vision_config=[]), "the vision_config in config.json is no JSON object"),
    (in_json(dtype="float99"), "transformers said: AttributeError: .*float99"),
    (in_part("text_config", rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}),
     "mrope_section in config.json is .1, 1, 1., and must be three numbers from 1 with the sum 16"),
    (in_part("text_config", rope_scaling={"type": "mrope", "mrope_section": 16}),
     "mrope_section in config.json is 16"),
    (in_part("vision_config", num_heads=3), "vision_config in config.json has 3 heads"),
    (in_part("vision_config", num_heads=32), "vision_config in config.json has 32 heads"),
    (in_part("text_config", vocab_size=100), "below the model's vocab_size of 100"),
    (in_part("text_config", vocab_size=100, eos_token_id=None), "below the model's vocab_size"),
    (in_part("text_config", eos_token_id=-1), "config.json: eos_token_id has -1")])
def test_a_config_that_cannot_be_trained_is_named(saved, tmp_path, change, text):
    """Each was a traceback, when the weights were loaded or at the first forward."""
    path = with_file(saved, tmp_path / "c", "config.json", change)
    assert re.search(text, refusal(vlm.load, path))


def test_a_vocabulary_without_room_for_the_tokens_is_named(saved, tmp_path):
    """transformers' AssertionError of the pad's row came through, or our own of a token's."""
    path = with_file(saved, tmp_path / "c", "config.json", in_part(
        "text_config", vocab_size=100, eos_token_id=None))
    os.remove(os.path.join(path, "generation_config.json"))
    assert "tokens and its config.json a vocab_size of 100" in refusal(vlm.load, path)


def test_weights_that_are_no_pickle_are_named(saved, tmp_path):
    """torch's UnpicklingError came through."""
    path = tampered(saved, tmp_path / "c")
    os.remove(os.path.join(path, "model.safetensors"))
    with open(os.path.join(path, "pytorch_model.bin"), "wb") as f:
        f.write(b"x" * 100)
    assert "UnpicklingError" in refusal(vlm.load, path)


@pytest.mark.parametrize("template, text", [
    (None, "no chat template, or an empty one: copy the chat_template.jinja"),
    ("", "no chat template, or an empty one"),
    ("{% for %}", "the chat template fails (TemplateSyntaxError"),
    ("{{ 1/0 }}", "the chat template fails (ZeroDivisionError"),
    ("{{ a.b.c }}", "the chat template fails (UndefinedError"),
    ("{{ 'x' + 1 }}", "the chat template fails (TypeError"),
    ("{{ raise_exception('no') }}", "the chat template fails (TemplateError: no)"),
    ("{{ messages[0]['role'] }}", "the chat template writes a question 0 times, expected once"),
    ("{{ messages[0]['content'][1]['text'] }}", "the chat template gives 0 vision pads")])
@pytest.mark.parametrize("read", [vlm.load, load_without_weights])
def test_a_damaged_chat_template_is_named(saved, tmp_path, read, template, text):
    """Tracebacks, or sentences that named no checkpoint; and those that were ValueErrors dropped
    every question of a run, one by one."""
    path = with_file(saved, tmp_path / "c", "chat_template.jinja", lambda _: template)
    assert f"{path}: {text}" in refusal(read, path)


@pytest.mark.parametrize("change, text", [
    (lambda _: "{", "damaged"),
    (lambda _: "[]", "damaged (it is no JSON object)"),
    (in_json(eos_token_id=99999999), "eos_token_id has 99999999, which is no id below the model's"),
    (in_json(eos_token_id=-1), "eos_token_id has -1"),
    (in_json(eos_token_id="x"), 'eos_token_id has "x"'),
    (in_json(eos_token_id=[1, [2]]), "eos_token_id has [2]"),
    (in_json(eos_token_id=True), "eos_token_id has true")])
@pytest.mark.parametrize("read", [vlm.load, load_without_weights])
def test_a_damaged_generation_config_is_named(saved, tmp_path, read, change, text):
    """A broken file was ignored in silence, with the ids that stop in it; an id that is no token
    was a traceback where the list of ids is made."""
    path = with_file(saved, tmp_path / "c", "generation_config.json", change)
    assert f"{path}/generation_config.json: {text}" in refusal(read, path)


def test_a_tokenizer_without_an_end_of_turn_is_refused(saved, tmp_path):
    """Without it every control token could be sampled: an index of None is the whole list."""
    path = with_file(saved, tmp_path / "c", "tokenizer_config.json", in_json(eos_token=None))
    assert f"{path}: its tokenizer has no eos_token" in refusal(vlm.load, path)


def test_load_refuses_a_checkpoint_without_preprocessing(saved, tmp_path):
    path = tampered(saved, tmp_path / "c")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        os.remove(os.path.join(path, name))
    with pytest.raises(ValueError, match="preprocessor_config.json") as e:
        vlm.load(path)
    assert path in str(e.value)
