"""StableLM under Hugging Face's names: Llama's layers with nn.LayerNorm, and in StableLM 2 12B a norm for each head."""

from jaxadapt.keymaps.families import LAYER, Weight, biases, decoder_keymap, embeddings, layer_kernels, norms

_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")

STABLELM = decoder_keymap(
    "stablelm",
    (
        *embeddings("model.embed_tokens"),
        *layer_kernels(*_QKVO, *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))),
        *biases(f"{LAYER}{m}" for m in _QKVO[:3]),
        *norms(f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm", "model.norm"),
        *(
            Weight(
                f"{LAYER}self_attn.{p}_layernorm.norms.{{h}}.scale",
                f"{LAYER}self_attn.{p}_layernorm.norms.{{h}}.weight",
                "h -> h",
            )
            for p in "qk"
        ),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    same=("m",),
    # A Llama of nnx.RMSNorm has no bias, and Phi 2 and Starcoder 2 have no gate.
    needs=(f"{LAYER}input_layernorm.bias", f"{LAYER}mlp.gate_proj.kernel"),
)
