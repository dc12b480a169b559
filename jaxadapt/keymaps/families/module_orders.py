"""The order of the linear layers and embeddings in PyTorch's classes, for `KeyMap.order`."""

DECODER = (
    *("model", "lm_head", "embed_tokens", "layers", "self_attn", "mlp"),
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
"""Llama and the models after it."""

KEYS_FIRST = ("k_proj", "v_proj", "q_proj", "out_proj")
"""Attention layers that create the projection of the keys first."""

GPT = (
    *("transformer", "lm_head", "wte", "wpe", "h", "attn", "mlp"),
    *("c_attn", *KEYS_FIRST, "c_fc", "c_proj", "fc_in", "fc_out"),
)
"""GPT-2, GPT-Neo and GPT-J."""

BERT = (
    *("bert", "roberta", "cls", "lm_head", "classifier", "qa_outputs", "embeddings", "encoder", "pooler"),
    *("layer", "word_embeddings", "attention", "self", "query", "key", "value"),
    *("intermediate", "output", "dense", "transform", "out_proj", "decoder"),
)
"""BERT and RoBERTa."""

T5 = (
    *("shared", "encoder", "decoder", "lm_head", "embed_tokens", "block", "layer", "SelfAttention", "EncDecAttention"),
    *("DenseReluDense", "q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo"),
)
"""T5."""

VIT = (
    *("vit", "classifier", "embeddings", "layers", "encoder", "layer", "pooler"),
    *("attention", "intermediate", "output", "mlp", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"),
    *("dense", "fc1", "fc2"),
)
"""ViT."""

CLIP = (
    *(
        "text_model",
        "vision_model",
        "visual_projection",
        "text_projection",
        "embeddings",
        "encoder",
        "self_attn",
        "mlp",
    ),
    *(*KEYS_FIRST, "fc1", "fc2", "token_embedding", "patch_embedding", "position_embedding"),
)
"""CLIP."""

WHISPER = (
    *("model", "proj_out", "encoder", "decoder", "conv1", "conv2", "embed_tokens", "embed_positions", "layers"),
    *("self_attn", "encoder_attn", *KEYS_FIRST, "fc1", "fc2"),
)
"""Whisper."""
