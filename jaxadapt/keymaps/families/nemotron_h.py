"""Nemotron H under Hugging Face's names: each layer has one mixer, which is Mamba 2, attention, an MLP or experts.

PEFT refuses LoRA on `out_proj` and `conv1d` of Mamba mixers, because fused kernels use their weights and not their
layers. Both are stored here, and no method adapts them. The experts have no gate: up and down are one array each,
(expert, in, out). NVIDIA's own class calls the model "backbone" ("nemotron_h/backbone"), and so do files that
transformers writes, with another name of the embedding ("nemotron_h/files").
"""

from jaxadapt.keymaps.families import (
    FROM,
    INTO,
    LAYER,
    KeyMap,
    Weight,
    bare,
    biases,
    dense,
    embeddings,
    layer_norms,
    router_kernel,
)

_MIXER = f"{LAYER}mixer."
_READING = (*(f"{p}_proj" for p in "qkv"), "up_proj", "shared_experts.up_proj", "in_proj", "fc1_latent_proj")
_WRITING = ("o_proj", "down_proj", "shared_experts.down_proj", "fc2_latent_proj")

NEMOTRON_H = KeyMap(
    "nemotron_h",
    (
        *embeddings("model.embeddings"),
        *dense(*(_MIXER + m for m in _READING), bias=False, axes=FROM),
        *dense(*(_MIXER + m for m in _WRITING), bias=False, axes=INTO),
        *biases(_MIXER + m for m in (*_READING, *_WRITING, "conv1d", "out_proj")),
        Weight(f"{_MIXER}out_proj.kernel", f"{_MIXER}out_proj.weight", "i m -> m i", kind="other"),
        Weight(f"{_MIXER}conv1d.kernel", f"{_MIXER}conv1d.weight", "w i o -> o i w", kind="other"),
        *(Weight(f"{_MIXER}{name}", f"{_MIXER}{name}", "n -> n") for name in ("dt_bias", "A_log", "D")),
        *layer_norms(LAYER, (("norm", "norm"), ("mixer.norm", "mixer.norm")), leaf="weight"),
        router_kernel("mixer.gate"),
        Weight(f"{_MIXER}gate.e_score_correction_bias", f"{_MIXER}gate.e_score_correction_bias", "e -> e"),
        Weight(f"{_MIXER}experts.up_proj", f"{_MIXER}experts.up_proj", "e c f -> e f c", kind="experts"),
        Weight(f"{_MIXER}experts.down_proj", f"{_MIXER}experts.down_proj", "e f c -> e c f", kind="experts"),
        Weight("model.norm_f.weight", "model.norm_f.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    output="lm_head",
    order=(
        *("model", "lm_head", "embeddings", "layers", "mixer", "conv1d", "in_proj", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "shared_experts", "up_proj", "down_proj"),
        *("fc1_latent_proj", "fc2_latent_proj"),
    ),
    same=("m",),
    tied=(("lm_head.weight", "model.embeddings.weight"),),
    spellings=(
        ("backbone", (("model.", "backbone."),)),
        ("files", (("model.embeddings.", "backbone.embedding."), ("model.", "backbone."))),
        *bare("model."),
    ),
    expert_modules=(
        (f"{_MIXER}experts.up_proj", (f"{_MIXER}experts.{{e}}.up_proj",)),
        (f"{_MIXER}experts.down_proj", (f"{_MIXER}experts.{{e}}.down_proj",)),
    ),
)
