"""Qwen 3, Gemma 3, ViT, DINOv3, Whisper and UMT5 of jax-ml/bonsai (NNX, names of commit 3628425 of 2026-03-27).

Each model's own `params.py` reads the names and layouts of Hugging Face's files. The names here are those of modules in
transformers 5.12.1, which an adapter needs; the spellings are the names in files and in earlier versions. The keys of
Whisper's attention have a bias in Bonsai that PyTorch lacks: no entry matches it, so an adapter cannot train it.
"""

from jaxadapt.keymaps.families import (
    DECODER_ORDER,
    KEYS_FIRST_ORDER,
    LAYER,
    KeyMap,
    Names,
    Weight,
    bare,
    decoder_keymap,
    layer_norms,
)

_LAYER = "layers.{l}."
_IN, _OUT = "m o -> o m", "i m -> m i"
_HEADS_IN, _HEADS_OUT = "m n h -> (n h) m", "n h m -> m (n h)"


def _kernels(names: Names, pattern: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{a}.kernel", f"{b}.weight", pattern) for a, b in names)


def _biases(names: Names, pattern: str = "o -> o") -> tuple[Weight, ...]:
    return tuple(Weight(f"{a}.bias", f"{b}.bias", pattern) for a, b in names)


def _linear(names: Names, pattern: str = _IN) -> tuple[Weight, ...]:
    """Return the entries of `nnx.Linear` modules, which may have biases or not."""
    names = tuple(names)
    return (*_kernels(names, pattern), *_biases(names))


def _norms(names: Names, leaf: str = "scale") -> tuple[Weight, ...]:
    """Return the entries of norms, which may have biases or not."""
    names = tuple(names)
    return (*(Weight(f"{a}.{leaf}", f"{b}.weight", "d -> d") for a, b in names), *_biases(names))


def _embeddings(names: Names) -> tuple[Weight, ...]:
    return tuple(Weight(f"{a}.embedding", f"{b}.weight", "v d -> v d", kind="embedding") for a, b in names)


def _conv(ours: str, theirs: str, window: str) -> tuple[Weight, ...]:
    kernel = Weight(f"{ours}.kernel", f"{theirs}.weight", f"{window} i o -> o i {window}", kind="conv")
    return (kernel, *_biases([(ours, theirs)]))


def _attention(ours: str, theirs: str, out: str, biased: str = "qkv") -> tuple[Weight, ...]:
    """Return the entries of an `nnx.MultiHeadAttention`; `biased` are the projections that have a bias in PyTorch."""
    names = {name[0]: (f"{ours}.{name}", f"{theirs}.{name[0]}_proj") for name in ("query", "key", "value")}
    return (
        *_kernels(names.values(), _HEADS_IN),
        *_biases((names[name] for name in biased), "n h -> (n h)"),
        *_linear([(f"{ours}.out", f"{theirs}.{out}")], _HEADS_OUT),
    )


def _same(prefix: str, into: str, *modules: str) -> Names:
    """Return the names of modules that differ in their prefix only."""
    return tuple((f"{prefix}{module}", f"{into}{module}") for module in modules)


_QKV = ("q_proj", "k_proj", "v_proj")

# ---------------------------------------------------------------- decoders


QWEN3 = decoder_keymap(
    "bonsai:qwen3",
    (
        *_embeddings([("embedder", "model.embed_tokens")]),
        *_kernels(_same(f"{_LAYER}attn.", f"{LAYER}self_attn.", *_QKV), _HEADS_IN),
        *_kernels(_same(f"{_LAYER}attn.", f"{LAYER}self_attn.", "o_proj"), _HEADS_OUT),
        # Tunix's entries: an adapter of these modules, without its base, may be of either library.
        *_kernels(_same(f"{_LAYER}mlp.", f"{LAYER}mlp.", "gate_proj", "up_proj"), "d f -> f d"),
        *_kernels(_same(f"{_LAYER}mlp.", f"{LAYER}mlp.", "down_proj"), "f d -> d f"),
        *layer_norms(_LAYER, _same("", "", "input_layernorm", "post_attention_layernorm"), "m"),
        *layer_norms(_LAYER, _same("attn.", "self_attn.", "q_norm", "k_norm"), "h"),
        Weight("final_norm.scale", "model.norm.weight", "m -> m"),
        Weight("lm_head.kernel", "lm_head.weight", "m v -> v m"),  # in a tied model too, a copy of the embedding
    ),
    complete=True,
    needs=(f"{_LAYER}attn.q_proj.kernel", f"{_LAYER}attn.q_norm.scale"),
    same=("m", "d", "h"),
)

_TEXT, _VISION = "model.language_model.", "model.vision_tower."
_TEXT_LAYER, _VISION_LAYER = f"language_model.{_LAYER}", f"vision_tower.encoder.{_LAYER}"
_GEMMA3_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)

GEMMA3 = KeyMap(
    "bonsai:gemma3",
    (
        *_embeddings([("embed_tokens.weight", f"{_TEXT}embed_tokens")]),
        *_linear(_same(_TEXT_LAYER, f"{_TEXT}{_LAYER}", *(f"self_attn.{p}" for p in _QKV)), "text o -> o text"),
        *_kernels(_same(_TEXT_LAYER, f"{_TEXT}{_LAYER}", "mlp.gate_proj", "mlp.up_proj"), "text o -> o text"),
        *_linear(_same(_TEXT_LAYER, f"{_TEXT}{_LAYER}", "self_attn.o_proj", "mlp.down_proj"), "i text -> text i"),
        *_norms(_same(_TEXT_LAYER, f"{_TEXT}{_LAYER}", *_GEMMA3_NORMS)),
        *_norms([("language_model.norm", f"{_TEXT}norm")]),
        *_conv("vision_tower.embeddings.patch_embedding", f"{_VISION}embeddings.patch_embedding", "h w"),
        *_embeddings(_same("vision_tower.", _VISION, "embeddings.position_embedding")),
        *_linear(
            _same(_VISION_LAYER, f"{_VISION}encoder.{_LAYER}", *(f"self_attn.{p}" for p in _QKV), "mlp.fc1"),
            "vision o -> o vision",
        ),
        *_linear(
            _same(_VISION_LAYER, f"{_VISION}encoder.{_LAYER}", "self_attn.out_proj", "mlp.fc2"),
            "i vision -> vision i",
        ),
        *_norms(_same(_VISION_LAYER, f"{_VISION}encoder.{_LAYER}", "layer_norm1", "layer_norm2")),
        *_norms(_same("vision_tower.", _VISION, "post_layernorm")),
        *_norms(_same("multi_modal_projector.", "model.multi_modal_projector.", "mm_soft_emb_norm")),
        Weight(
            "multi_modal_projector.mm_input_projection_weight",
            "model.multi_modal_projector.mm_input_projection_weight",
            "i o -> i o",
            kind="other",
        ),
    ),
    output="lm_head",
    complete=True,
    needs=(f"{_TEXT_LAYER}self_attn.q_norm.scale",),
    same=("text", "vision"),
    order=("language_model", *DECODER_ORDER),  # not the vision tower's, which creates k_proj first
    tied=(("lm_head.weight", f"{_TEXT}embed_tokens.weight"),),
    spellings=(
        ("text", ((_TEXT, "model."),)),  # Gemma3ForCausalLM
        ("v4", ((_VISION, f"{_VISION}vision_model."),)),  # transformers 4.52 to 4.57
        (
            "file",  # and transformers before 4.52
            (
                (_TEXT, "language_model.model."),
                (_VISION, "vision_tower.vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
                ("lm_head.", "language_model.lm_head."),
            ),
        ),
    ),
)

# ---------------------------------------------------------------- vision


_VIT_LAYER = "vit.layers.{l}."
_VIT_V4 = (
    *((f"attention.{name[0]}_proj", f"attention.attention.{name}") for name in ("query", "key", "value")),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    *((name, name) for name in ("layernorm_before", "layernorm_after")),
)

VIT = KeyMap(
    "bonsai:vit",
    (
        *_attention(f"{_LAYER}attention", f"{_VIT_LAYER}attention", "o_proj"),
        *_linear([(f"{_LAYER}linear1", f"{_VIT_LAYER}mlp.fc1")]),
        *_linear([(f"{_LAYER}linear2", f"{_VIT_LAYER}mlp.fc2")], _OUT),
        *_norms(_same(_LAYER, _VIT_LAYER, "layernorm_before", "layernorm_after")),
        *_norms([("ln", "vit.layernorm")]),
        *_linear(_same("", "", "classifier")),
        *_conv("pos_embeddings.projection", "vit.embeddings.patch_embeddings.projection", "h w"),
        Weight("pos_embeddings.cls_token", "vit.embeddings.cls_token", "a b d -> a b d"),
        Weight("pos_embeddings.pos_embeddings", "vit.embeddings.position_embeddings", "a p d -> a p d"),
    ),
    complete=True,
    same=("m",),
    order=(
        *("vit", "classifier", "embeddings", "layers", "encoder", "layer", "attention", "intermediate", "output"),
        *("mlp", *_QKV, "o_proj", "query", "key", "value", "dense", "fc1", "fc2"),
    ),
    spellings=(("v4", tuple((f"{_VIT_LAYER}{a}.", f"vit.encoder.layer.{{l}}.{b}.") for a, b in _VIT_V4)),),
)

_DINO_LAYER = "layer.{l}."

DINOV3 = KeyMap(
    "bonsai:dinov3",
    (
        *_linear(
            _same(
                _DINO_LAYER,
                f"model.{_DINO_LAYER}",
                *(f"attention.{p}" for p in _QKV),
                *("mlp.gate_proj", "mlp.up_proj"),
            )
        ),
        *_linear(_same(_DINO_LAYER, f"model.{_DINO_LAYER}", "attention.o_proj", "mlp.down_proj"), _OUT),
        *_norms(_same(_DINO_LAYER, f"model.{_DINO_LAYER}", "norm1", "norm2")),
        *(
            Weight(f"{_DINO_LAYER}{name}.lambda1", f"model.{_DINO_LAYER}{name}.lambda1", "d -> d")
            for name in ("layer_scale1", "layer_scale2")
        ),
        *_norms(_same("", "", "norm")),
        *_conv("embeddings.patch_embeddings", "embeddings.patch_embeddings", "h w"),
        *(
            Weight(f"embeddings.{name}", f"embeddings.{name}", "a b d -> a b d")
            for name in ("cls_token", "mask_token", "register_tokens")
        ),
    ),
    complete=True,
    needs=(f"{_DINO_LAYER}layer_scale1.lambda1",),
    same=("m",),
    order=(
        *("embeddings", "model", "layer", "norm", "attention", "mlp"),
        *("k_proj", "v_proj", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    spellings=(("v4", ((f"model.{_DINO_LAYER}", _DINO_LAYER),)),),  # and files
)

# ---------------------------------------------------------------- encoder and decoder


def _whisper_stack(name: str, *attentions: str) -> tuple[Weight, ...]:
    ours, theirs = f"{name}.{_LAYER}", f"model.{name}.{_LAYER}"
    return (
        *(w for a in attentions for w in _attention(f"{ours}{a}", f"{theirs}{a}", "out_proj", biased="qv")),
        *_linear(_same(ours, theirs, "fc1")),
        *_linear(_same(ours, theirs, "fc2"), _OUT),
        *_norms(_same(ours, theirs, *(f"{a}_layer_norm" for a in (*attentions, "final")))),
        *_norms(_same(f"{name}.", f"model.{name}.", "layer_norm")),
        *_embeddings(_same(f"{name}.", f"model.{name}.", "embed_positions")),
    )


WHISPER = KeyMap(
    "bonsai:whisper",
    (
        *_conv("encoder.conv1", "model.encoder.conv1", "w"),
        *_conv("encoder.conv2", "model.encoder.conv2", "w"),
        *_whisper_stack("encoder", "self_attn"),
        *_whisper_stack("decoder", "self_attn", "encoder_attn"),
        *_embeddings(_same("decoder.", "model.decoder.", "embed_tokens")),
    ),
    output="proj_out",
    needs=("encoder.conv1.kernel",),
    same=("m",),
    order=(
        *("model", "proj_out", "encoder", "decoder", "conv1", "conv2", "embed_tokens", "embed_positions", "layers"),
        *("self_attn", "encoder_attn", *KEYS_FIRST_ORDER, "fc1", "fc2"),
    ),
    tied=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    spellings=bare("model."),
)

_UMT5 = (
    ("encoder.block.{l}.layer.0.", "SelfAttention", "qkv", "o"),
    ("encoder.block.{l}.layer.1.", "DenseReluDense", ("wi", "wi_0", "wi_1"), "wo"),
    ("decoder.block.{l}.layer.0.", "SelfAttention", "qkv", "o"),
    ("decoder.block.{l}.layer.1.", "EncDecAttention", "qkv", "o"),
    ("decoder.block.{l}.layer.2.", "DenseReluDense", ("wi", "wi_0", "wi_1"), "wo"),
)

UMT5 = KeyMap(
    "bonsai:umt5",
    (
        *_embeddings([("encoder.embed_tokens", "shared"), ("decoder.embed_tokens", "decoder.embed_tokens")]),
        *_embeddings(
            (name, name)
            for stack in ("encoder", "decoder")
            for name in (f"{stack}.block.{{l}}.layer.0.SelfAttention.relative_attention_bias",)
        ),
        *(
            entry
            for sublayer, module, reading, writing in _UMT5
            for entry in (
                *_kernels(_same(f"{sublayer}{module}.", f"{sublayer}{module}.", *reading), _IN),
                *_kernels(_same(f"{sublayer}{module}.", f"{sublayer}{module}.", writing), _OUT),
                Weight(f"{sublayer}layer_norm.scale", f"{sublayer}layer_norm.weight", "d -> d"),
            )
        ),
        *(
            Weight(f"{stack}.final_layer_norm.scale", f"{stack}.final_layer_norm.weight", "d -> d")
            for stack in ("encoder", "decoder")
        ),
        *_kernels(_same("", "", "lm_head"), "m v -> v m"),
    ),
    output="lm_head",
    complete=True,
    needs=("encoder.block.{l}.layer.0.layer_norm.scale",),
    same=("m",),
    order=(
        *("shared", "encoder", "decoder", "lm_head", "embed_tokens", "block", "layer"),
        *("SelfAttention", "EncDecAttention", "DenseReluDense"),
        *("q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo"),
    ),
    relative_positions=True,
    tied=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
)
