"""
The shapes of published models, for random weights and for the memory table.
"""


def qwen_shape(hidden, mlp, layers, heads, kv_heads, vocabulary, tied):
    """The config of a published Qwen2.5-VL, as far as it differs from transformers' defaults."""
    text = dict(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=128000,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden,
        tokens_per_second=2)
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


SHAPES = {
    "3b": qwen_shape(2048, 11008, 36, 16, 2, 151936, tied=True),
    "7b": qwen_shape(3584, 18944, 28, 28, 4, 152064, tied=False),
}


def qwen3_shape(hidden, mlp, layers, heads, tied, tower=(24, 1024, 4096), deepstack=(5, 11, 17)):
    """The config of a published Qwen3-VL. tower: its layers, hidden size and MLP size."""
    text = dict(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=tied, max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                         "mrope_section": [24, 20, 20]})
    depth, tower_hidden, tower_mlp = tower
    vision = dict(
        depth=depth, hidden_size=tower_hidden, intermediate_size=tower_mlp, num_heads=16,
        out_hidden_size=hidden, deepstack_visual_indexes=list(deepstack))
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


QWEN3_SHAPES = {
    "2b": qwen3_shape(2048, 6144, 28, 16, tied=True),
    "4b": qwen3_shape(2560, 9728, 36, 32, tied=True),
    "8b": qwen3_shape(4096, 12288, 36, 32, tied=False, tower=(27, 1152, 4304),
                      deepstack=(8, 16, 24)),
}
