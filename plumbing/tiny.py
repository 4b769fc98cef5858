"""
The tiny model: Qwen2.5-VL's architecture with a million parameters and its own tokenizer, randomly
initialised. It runs on a laptop and needs no download.
"""
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from flow import Pixels
from plumbing.families import INSTRUCTION

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] -%}
{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# Words that are one token each. Everything else is spelled in bytes, so any text can be read.
NUMBERS = " ".join(map(str, range(100)))
WORDS = " ".join(f"""{INSTRUCTION} user assistant Describe every moment How many are there When is
it done Which colour comes right after the last Where Someone collects and needs left right top
bottom A B C D want yes no none next never red green blue yellow circle square triangle circles
squares triangles so the is are of in at to what when where which before first time with video
{NUMBERS}""".split())
WORDS += "\n" + WORDS.replace(" ", "\n") + "<answer></answer></think><answer> A. B. C. D."


def build_tiny(seed=0):
    """The tiny model, untrained. -> (model, tokenizer, `Pixels`)

    Its weights depend only on the seed; the state of torch's generator does not change.
    """
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    pixels = Pixels([0.2] * 3, [0.2] * 3, patch=14, temporal=2, merge=2,
                    min_pixels=28 * 28, max_pixels=112 * 112)
    return model, tokenizer, pixels


def build_tokenizer():
    """A byte-level BPE trained on WORDS, with Qwen2.5-VL's control tokens and chat template."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, show_progress=False,
                                  initial_alphabet=alphabet)
    tokens.train_from_iterator([WORDS], trainer)
    tokens.add_special_tokens([AddedToken(control, special=True, normalized=False)
                               for control in CONTROLS])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=TEMPLATE,
                                   model_max_length=131072)


def build_config(tokenizer):
    ids = dict(zip(CONTROLS, tokenizer.convert_tokens_to_ids(CONTROLS)))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    language_model = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072,
        rope_parameters=rope, initializer_range=0.07, bos_token_id=None,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=False)
    vision_tower = dict(
        depth=2, hidden_size=64, num_heads=2, intermediate_size=128, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128, window_size=112,
        initializer_range=0.07, fullatt_block_indexes=[1], tokens_per_second=2)
    return Qwen2_5_VLConfig(
        text_config=language_model, vision_config=vision_tower, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
