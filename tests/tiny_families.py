"""Tiny checkpoints with random weights, of every kind that `model.load` reads, and what differs
between them in tests."""
import torch
from small import shake
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    Glm4vConfig,
    Glm4vMoeConfig,
    Glm46VConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

import model as vlm
from flow import Pixels
from plumbing.families import PROCESSORS
from plumbing.tiny import build_tiny

GLM_CONTROLS = """[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>
<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|> <think>
</think> <answer> </answer> <|begin_of_box|> <|end_of_box|>""".split()
GLM_TEMPLATE = """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{% for p in m.content %}{% if p.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>\
{% else %}{{ p.text }}{% endif %}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
GLM_SPECIAL = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"}
QWEN_SPECIAL = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}

# Kind of checkpoint -> its processor. Two kinds may have one model_type.
KINDS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "glm4v": "Glm4vProcessor",
    "glm4v_moe": "Glm4vProcessor",         # GLM-4.5V
    "glm46v": "Glm46VProcessor",           # GLM-4.6V,
    "glm46v as glm4v": "Glm46VProcessor",  # some of whose checkpoints call themselves glm4v
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}


def is_glm(kind):
    return kind.startswith("glm")


def random_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config)


def special_ids(tokenizer, special):
    return dict(zip(special, tokenizer.convert_tokens_to_ids([*special.values()])))


def glm_tokenizer():
    """GLM's control tokens, the tags among them."""
    tokenizer = build_tiny()[1]
    tokenizer.add_tokens([AddedToken(c, special=True, normalized=False) for c in GLM_CONTROLS])
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", GLM_TEMPLATE
    return tokenizer


def tiny_glm(kind="glm4v", tie=False):
    """GLM-4.1V's architecture, or that of GLM-4.5V with four experts, half of a head rotated, fewer
    kv heads than heads, rows of the vocabulary that no token owns; its control tokens, the tags
    among them; a turn that ends with </answer>. -> (model, tokenizer), not yet as `model.load`
    gives them"""
    tokenizer = glm_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3]}
    text = dict(vocab_size=len(tokenizer) + 13, hidden_size=128, intermediate_size=192,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, rope_parameters=rope, initializer_range=0.07)
    tower = dict(model_type="glm4v", depth=2, hidden_size=64, num_heads=2, intermediate_size=96,
                 out_hidden_size=128, image_size=56, patch_size=14, initializer_range=0.07)
    other = dict(tie_word_embeddings=tie, **special_ids(tokenizer, GLM_SPECIAL))
    if kind == "glm4v_moe":
        text |= dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
        tower["model_type"] = "glm4v_moe_vision"
        config = Glm4vMoeConfig(text_config=text, vision_config=tower, **other)
    elif kind == "glm46v":
        tower["model_type"] = "glm4v_vision"
        config = Glm46VConfig(text_config=text, vision_config=tower, **other)
    else:
        config = Glm4vConfig(text_config=text, vision_config=tower, **other)
    model = random_model(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"])
    model.pixels = Pixels([0.48, 0.46, 0.41], [0.27, 0.26, 0.28], 14, 2, 2, 0, 40 * 28 * 28,
                          (28 * 28, 40 * 28 * 28))
    return model, tokenizer


def tiny_qwen3(kind="qwen3_vl", tie=False):
    """Qwen3-VL's architecture, with interleaved M-RoPE and deepstack features for two of its three
    layers; or its MoE's, with four experts. -> (model, tokenizer), not yet as `model.load` gives
    them"""
    tokenizer = build_tiny()[1]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
            "mrope_section": [8, 4, 4]}
    text = dict(vocab_size=len(tokenizer) + 13, hidden_size=128, intermediate_size=192,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                max_position_embeddings=4096, rope_parameters=rope, initializer_range=0.07,
                tie_word_embeddings=tie)
    tower = dict(depth=3, hidden_size=64, num_heads=2, intermediate_size=96, out_hidden_size=128,
                 patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
                 initializer_range=0.07)
    config_type = Qwen3VLConfig
    if kind == "qwen3_vl_moe":
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
        config_type = Qwen3VLMoeConfig
    model = random_model(config_type(
        text_config=text, vision_config=tower, tie_word_embeddings=tie,
        **special_ids(tokenizer, QWEN_SPECIAL)))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, ends[1]
    model.pixels = Pixels([0.5] * 3, [0.5] * 3, 16, 2, 2, 0, 40 * 32 * 32,
                          (32 * 32, 40 * 32 * 32))
    return model, tokenizer


def tiny(kind):
    """-> (model, tokenizer) of a kind, not yet as `model.load` gives them"""
    if kind == "qwen2_5_vl":
        return vlm.load("tiny")
    model, tokenizer = tiny_glm(kind) if is_glm(kind) else tiny_qwen3(kind)
    model.family = PROCESSORS[KINDS[kind]]
    return model, tokenizer


def build(kind):
    """Every weight off its initial value, a head that is sharp: else greedy choices hang on
    rounding."""
    model, tokenizer = tiny(kind)
    shake(model)
    for name, x in model.named_buffers():
        if name.endswith("e_score_correction_bias"):       # of GLM-4.5V's router, no parameter
            x.copy_(torch.linspace(-0.1, 0.1, len(x)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
        if kind != "qwen2_5_vl":                           # else it says one word again and again
            model.get_input_embeddings().weight.mul_(8)
    return model, tokenizer
