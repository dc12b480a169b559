"""The JAX side of a specimen, built from the real packages; each function imports its own.

Python 3.11 of the extra `test` has Tunix; gemma, MaxText and transformers' last Flax classes have environments of
their own (`record.py` says which).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt.core import paths
from tests.keymaps.families import bonsai_side
from tests.keymaps.families.specimens import HEADS, IDS, INPUTS, KV, LAYERS, RECORDED, D, F, Specimen, V
from tests.support.twins import decoders, gpt2, recurrent, trees
from tests.support.twins import moe as moe_twins

Leaves = Mapping[str, np.ndarray]
LIBRARY = {
    **dict.fromkeys(("tunix", "tunix_gemma", "tunix_gemma3", "tunix_gemma4"), "tunix"),
    **dict.fromkeys(("gemma", "gemma3n", "gemma4"), "gemma"),
    "maxtext": "maxtext",
    "flax": "transformers",
    "keras": "keras_hub",
    "easydel": "easydel",
    "bonsai": "bonsai",
    **dict.fromkeys(("moe", "decoders", "recurrent"), "flax"),
    "gpt2_dense": "flax",
}
PACKAGES = {"tunix": "google-tunix", "keras_hub": "keras-hub", "bonsai": "jax-bonsai"}


@dataclasses.dataclass(frozen=True)
class Side:
    """`make` gives an NNX model, or for a Linen `module` its variables; `run` calls the one or applies the other.

    With `merges`, `make` gives the tree of a model that is neither, and adapters are merged into it.
    """

    shapes: dict[str, tuple[int, ...]]
    make: Callable[[Leaves], Any]
    run: Callable[..., Any]
    module: nn.Module | None = None
    merges: bool = False

    def logits(self, target: Any) -> np.ndarray:
        return np.asarray(self.run(target) if self.module is None else self.run(self.module, target))

    def adapted(self, target: Any, folder: Path, keymap: Any = None) -> tuple[np.ndarray, Any]:
        """Logits with the adapter in `folder` loaded, and what carries it."""
        loaded = jaxadapt.load(folder, target, keymap=keymap)
        if self.merges:
            return self.logits({"params": jaxadapt.merge(target["params"], jaxadapt.extract(loaded))}), loaded
        if self.module is None:
            return self.logits(loaded), loaded
        module = jaxadapt.adapt(self.module, jaxadapt.read_config(folder), keymap=keymap)
        return np.asarray(self.run(module, loaded)), loaded


def here(specimen: Specimen) -> bool:
    """Whether this environment has the real classes. Of the recorded twins, only tests/full runs the JAX model."""
    library = LIBRARY[specimen.side]
    if library == "flax" and (RECORDED / f"{specimen.name}.json").exists():
        return "JAXADAPT_EVERY_TWIN" in os.environ
    if importlib.util.find_spec(library) is None:
        return False
    return library != "transformers" or importlib.metadata.version("transformers").startswith("4.")


def side(specimen: Specimen) -> Side:
    return BUILDERS[specimen.side](specimen)


def versions(specimen: Specimen) -> dict[str, str]:
    library = LIBRARY[specimen.side]
    names = (PACKAGES.get(library, library), "jax", "flax")
    return {name: importlib.metadata.version(name) for name in names}


def _of_nnx(make: Callable[[], nnx.Module], run: Callable[[Any], Any], kind: Any = nnx.Param) -> Side:
    def filled(leaves: Leaves) -> nnx.Module:
        model = make()
        trees.fill(model, leaves, kind)
        return model

    abstract = nnx.eval_shape(make)
    return Side({p: v.shape for p, v in trees.nnx_leaves(abstract, kind).items()}, filled, run)


def _of_linen(module: nn.Module, params: Any, run: Callable[..., Any]) -> Side:
    flat = jax.tree_util.tree_leaves_with_path(params)
    shapes = {".".join(str(k.key) for k in path): tuple(x.shape) for path, x in flat}
    return Side(shapes, lambda leaves: {"params": trees.nest(leaves)}, run, module)


def _causal(length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(IDS), length, length))


def _positions() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)


# ---- Tunix -------------------------------------------------------------------------------------------------


def tunix(specimen: Specimen) -> Side:
    o = specimen.options
    model = importlib.import_module(f"tunix.models.{o['model'].removesuffix('_moe')}.model")
    cls = {"llama3": "Llama3", "qwen2": "Qwen2"}.get(o["model"], "Qwen3")
    tie = {"weight_tying" if o["model"] == "llama3" else "use_tied_embedding": o["tied"]}
    if o["model"] == "qwen3_moe":
        tie |= {"num_experts": 4, "num_experts_per_tok": 2}
    config = model.ModelConfig(
        num_layers=LAYERS, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=o["head_dim"],
        num_kv_heads=KV, rope_theta=o["rope_theta"], norm_eps=1e-6, **tie,
    )  # fmt: skip
    return _of_nnx(lambda: getattr(model, cls)(config, rngs=nnx.Rngs(0)), _run_tunix)


def _run_tunix(model: Any) -> Any:
    return model(jnp.asarray(IDS), _positions(), None, _causal(IDS.shape[1]))[0]


def tunix_gemma(specimen: Specimen) -> Side:
    model = importlib.import_module("tunix.models.gemma.model")
    second = specimen.options["generation"] == 2
    kinds = [model.AttentionType.GLOBAL] * LAYERS
    if second:
        kinds[::2] = [model.AttentionType.LOCAL_SLIDING] * 2
    config = model.ModelConfig(
        num_layers=LAYERS, num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6,
        num_kv_heads=specimen.options["kv"], attention_types=kinds, sliding_window_size=4,
        use_post_attn_norm=second, use_post_ffw_norm=second, final_logit_softcap=8.0 if second else None,
        attn_logits_soft_cap=5.0 if second else None,
    )  # fmt: skip
    return _of_nnx(lambda: model.Gemma(config, rngs=nnx.Rngs(0)), _run_tunix)


def tunix_gemma3(specimen: Specimen) -> Side:
    model = importlib.import_module("tunix.models.gemma3.model")
    config = model.ModelConfig(
        num_layers=LAYERS, num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6,
        num_kv_heads=specimen.options["kv"], sliding_window_size=4, local_base_frequency=10_000,
        global_base_frequency=1_000_000, param_dtype=jnp.float32,
    )  # fmt: skip

    def make() -> Any:
        made = model.Gemma3(config, rngs=nnx.Rngs(0))
        _alternate(made, model)
        return made

    return _of_nnx(make, _run_tunix)


def tunix_gemma4(specimen: Specimen) -> Side:
    model = importlib.import_module("tunix.models.gemma4.model")
    kinds, large = model.AttentionType, specimen.options["large"]
    config = model.ModelConfig(
        num_layers=LAYERS, num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6, num_kv_heads=KV,
        global_key_size=8, num_global_kv_heads=1 if large else None, k_eq_v_global=large, final_logit_softcap=8.0,
        per_layer_input_dim=0 if large else 5, sliding_window_size=4, **(
            {"enable_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "expert_dim": 8}
            if specimen.options["moe"] else {}
        ),
        attention_pattern=(kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.GLOBAL),
    )  # fmt: skip
    return _of_nnx(lambda: model.Gemma4(config, rngs=nnx.Rngs(0)), nnx.jit(_run_tunix))


def _alternate(made: Any, model: Any) -> None:
    """Sliding, full, sliding: the real pattern has its first full layer at the sixth."""
    for i, layer in enumerate(made.layers):
        full = i == 1
        layer.attn.attn_type = model.AttentionType.GLOBAL if full else model.AttentionType.LOCAL_SLIDING
        layer.attn.rope_base_frequency = 1_000_000 if full else 10_000


# ---- twins of our own, where no library has the model under Hugging Face's names -----------------------------


TWINS: dict[str, Any] = {
    "moe": moe_twins.CausalLM,
    "decoders": decoders.CausalLM,
    "recurrent": recurrent.CausalLM,
}


def twin(specimen: Specimen) -> Side:
    run = nnx.jit(lambda model: model(jnp.asarray(IDS)))
    return _of_nnx(lambda: TWINS[specimen.side](specimen.options, nnx.Rngs(0)), run)


def gpt2_dense(specimen: Specimen) -> Side:
    def make() -> Any:
        rngs = nnx.Rngs(0)
        model = gpt2.GPT2(gpt2.Shape(V, 32, D, LAYERS, HEADS), rngs=rngs)
        for block in model.transformer.h:
            for part, name in (
                (block.attn, "c_attn"),
                (block.attn, "c_proj"),
                (block.mlp, "c_fc"),
                (block.mlp, "c_proj"),
            ):
                out, ins = getattr(part, name).kernel.shape
                setattr(part, name, nnx.Linear(ins, out, rngs=rngs))
        return model

    return _of_nnx(make, lambda model: model(jnp.asarray(IDS)))


# ---- gemma -------------------------------------------------------------------------------------------------


def gemma(specimen: Specimen) -> Side:
    config = importlib.import_module("gemma.gm.nn._config")
    modules = importlib.import_module("gemma.gm.nn._modules")
    transformer = importlib.import_module("gemma.gm.nn._transformer")
    kinds, generation = modules.AttentionType, specimen.options["generation"]
    second = generation == 2
    pattern = (kinds.GLOBAL,) * LAYERS if generation == 1 else (kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.LOCAL_SLIDING)
    module = transformer.Transformer(
        config=config.TransformerConfig(
            num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6, num_kv_heads=specimen.options["kv"],
            final_logit_softcap=8.0 if second else None, attn_logits_soft_cap=5.0 if second else None,
            use_post_attn_norm=generation > 1, use_post_ffw_norm=generation > 1, use_qk_norm=generation > 2,
            attention_types=pattern, sliding_window_size=4,
            transpose_gating_einsum=specimen.table in ("gemma:gemma2", "gemma:gemma3"),
            local_base_frequency=10_000, global_base_frequency=10_000 if generation < 3 else 1_000_000,
        ),
        dtype=jnp.float32,
    )  # fmt: skip
    ids = jnp.asarray(IDS, jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids))["params"]
    return _of_linen(module, params, lambda m, variables: m.apply(variables, ids).logits)


def gemma4(specimen: Specimen) -> Side:
    config = importlib.import_module("gemma.gm.nn.gemma4._config")
    kinds = importlib.import_module("gemma.gm.nn.gemma4._modules").AttentionType
    transformer = importlib.import_module("gemma.gm.nn.gemma4._transformer")
    large = specimen.options["large"]
    module = transformer.Transformer(
        config=config.TransformerConfig(
            num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6, num_kv_heads=KV,
            global_key_size=8, num_global_kv_heads=1 if large else None, k_eq_v_global=large, final_logit_softcap=8.0,
            per_layer_input_dim=0 if large else 5, sliding_window_size=4, use_post_attn_norm=True,
            use_post_ffw_norm=True, attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.GLOBAL),
            global_rope_proportion=0.25, local_rope_proportion=1.0, global_base_frequency=1_000_000,
            **({"enable_moe": True, "num_experts": 4, "top_k_experts": 2, "expert_dim": 8, "moe_dense_hidden_dim": F}
               if specimen.options["moe"] else {}),
        ),
        dtype=jnp.float32,
    )  # fmt: skip
    ids = jnp.asarray(IDS, jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids))["params"]
    return _of_linen(module, params, lambda m, variables: m.apply(variables, ids).logits)


def gemma3n(specimen: Specimen) -> Side:
    config = importlib.import_module("gemma.gm.nn.gemma3n._config")
    kinds = importlib.import_module("gemma.gm.nn.gemma3n._modules").AttentionType
    transformer = importlib.import_module("gemma.gm.nn.gemma3n._transformer")
    module = transformer.Gemma3nTransformer(
        config=config.TransformerConfig(
            num_embed=V, embed_dim=D, hidden_dim=F, num_heads=HEADS, head_dim=6, num_kv_heads=KV,
            final_logit_softcap=8.0, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
            use_value_norm=True, attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.LOCAL_SLIDING),
            query_pre_attn_norm=config.QueryPreAttentionNormalisation.NONE, sliding_window_size=4,
            transpose_gating_einsum=True, local_base_frequency=10_000, global_base_frequency=1_000_000,
            activation_sparsity_pattern=(0.5, 0.0, 0.0), use_altup=True, altup_coef_clip=120.0, per_layer_input_dim=5,
            use_laurel=True, laurel_rank=3, scale_plus_one=False,
        ),
        dtype=jnp.float32,
    )  # fmt: skip
    ids = jnp.asarray(IDS, jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids))["params"]
    return _of_linen(module, params, lambda m, variables: m.apply(variables, ids).logits)


# ---- MaxText -----------------------------------------------------------------------------------------------


def maxtext(specimen: Specimen) -> Side:
    importlib.import_module("pathwaysutils")
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    creation = importlib.import_module("maxtext.utils.model_creation_utils")
    utils = importlib.import_module("maxtext.utils.maxtext_utils")
    o = specimen.options
    base = Path(importlib.import_module("maxtext").__file__).parent / "configs" / "base.yml"
    qwen3 = o["model"].startswith("qwen3")
    more: dict[str, Any] = {}
    if "expert_size" in o:  # every token to each of its experts, none dropped
        more = {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": o["expert_size"]}
        more |= {"sparse_matmul": False, "megablox": False, "capacity_factor": -1.0, "norm_topk_prob": qwen3}
    if o["model"] == "gpt_oss":
        more |= {"attention_sink": True, "routed_bias": True, "mlp_bias": True, "mlp_activations_limit": 7.0}
        more |= {"sliding_window_size": 128, "inhomogeneous_layer_cycle_interval": 1 if o["scan"] is None else 2}
    if o["model"] == "deepseek_v3":
        more |= {"attention_type": "mla", "q_lora_rank": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 6}
        more |= {"qk_rope_head_dim": 4, "v_head_dim": 5, "first_num_dense_layers": o["dense"], "shared_experts": 1}
        more |= {"routed_bias": True, "n_routing_groups": 2, "topk_routing_group": 1}
        more |= {"model_name": "deepseek3-671b", "override_model_config": True}  # (it routes by its name)
        more |= {"routed_score_func": "sigmoid", "routed_scaling_factor": 2.5}
        # It turns neighboring pairs, as DeepSeek does, in its yarn alone; which by a factor of 1 changes nothing else.
        more |= {"rope_interleave": True, "rope_factor": 1.0, "max_position_embeddings": 4096}
    activation, theta = "sigmoid" if o["model"] == "gpt_oss" else "silu", 10_000
    if "gemma" in o["model"]:
        more |= {"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 4}
        activation = "gelu"
    if o["model"] == "gemma2":
        more |= {"attn_logits_soft_cap": 5.0, "final_logits_soft_cap": 8.0}
    if o["model"] == "gemma3":  # (by its name it knows what to divide queries by)
        more |= {"model_name": "gemma3-4b", "override_model_config": True, "local_rope_max_timescale": 10_000}
        more |= {"rope_linear_scaling_factor": 1.0}
        theta = 1_000_000
    more |= _maxtext_more(specimen)
    activation, theta = more.pop("activation", activation), more.pop("theta", theta)
    count = o.get("layers", LAYERS) // (2 if o["model"] == "gemma2" else 1)
    blocks = {"llama3.1": "llama2", "llama3": "llama2", "deepseek_v3": "deepseek", "deepseek2": "deepseek"}
    block = blocks.get(o["model"], o["model"])
    config = pyconfig.initialize(
        ["record", str(base)],
        run_name="specimen", base_output_directory="unused", enable_checkpointing=False, log_config=False,
        skip_jax_distributed_system=True, dataset_type="synthetic", per_device_batch_size=len(IDS),
        max_target_length=IDS.shape[1], max_prefill_predict_length=IDS.shape[1], attention="dot_product",
        dtype="float32", weight_dtype="float32", matmul_precision="highest", float32_logits=True,
        base_emb_dim=D, base_num_query_heads=HEADS,
        base_num_kv_heads=HEADS if block in ("deepseek", "gpt3") else KV, base_mlp_dim=F, base_num_decoder_layers=count,
        head_dim=o["head_dim"], vocab_size=V, normalization_layer_epsilon=1e-6,
        decoder_block=more.pop("decoder_block", block), use_qk_norm=more.pop("use_qk_norm", qwen3),
        attention_bias=block in ("qwen2", "gpt_oss"),
        logits_via_embedding=o["tied"], normalize_embedding_logits="gemma" in o["model"], logits_dot_in_fp32=True,
        rope_max_timescale=theta, rope_use_scale=False,
        rope_type=more.pop("rope_type", {"llama3.1": "llama3.1", "deepseek_v3": "yarn"}.get(o["model"], "default")),
        mlp_activations=more.pop("mlp_activations", [activation, "linear"]),
        scan_layers=o["scan"] is not None, param_scan_axis=o["scan"] or 0, enable_dropout=False, **more,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(utils.create_device_mesh(config), config.mesh_axes)

    def make() -> Any:
        with mesh:
            return creation.from_config(config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1))

    def run(model: Any) -> Any:
        with mesh:
            ids = jnp.asarray(IDS, jnp.int32)
            return model(ids, _positions(), decoder_segment_ids=jnp.ones_like(ids), enable_dropout=False)

    # DeepSeek's routers have a variable of a kind of its own for the bias, which training changes by itself.
    bias = importlib.import_module("maxtext.layers.moe").MoEBiasVar
    return _of_nnx(make, run, nnx.Any(nnx.Param, bias))


def _maxtext_more(specimen: Specimen) -> dict[str, Any]:
    """The fields of MaxText's configuration of the models that have a file of their own."""
    o = specimen.options
    if "more" not in o:
        return {}
    model, found, named = o["model"], dict(o["more"]), {"override_model_config": True}
    if "experts_implementation" in specimen.config:  # every token to each of its experts, none dropped
        found |= {"sparse_matmul": False, "megablox": False, "capacity_factor": -1.0, "shared_experts": 1}
        found |= {"num_experts": 4, "num_experts_per_tok": 1 if model == "llama4" else 2}
        found["base_moe_mlp_dim"] = specimen.config["intermediate_size"] if model == "llama4" else 8
    if model == "gemma4":
        found |= {"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 4}
        found |= {"local_rope_max_timescale": 10_000, "global_rope_max_timescale": 1_000_000, "theta": 1_000_000}
        found |= {"global_rope_proportion": 0.25, "local_rope_proportion": 1.0, "final_logits_soft_cap": 8.0}
        found |= {"activation": "gelu", "v_norm_with_scale": False, "norm_topk_prob": True, **named}
        found |= {
            "model_name": specimen.name.removeprefix("maxtext-")[: len("gemma4-31b")],
            "num_experts": found.get("num_experts", 1),
        }  # (one is none)
    if model in ("qwen3_next", "qwen3_5"):
        found |= {"norm_topk_prob": True, "use_qk_norm": False, "inhomogeneous_layer_cycle_interval": 4}
        found |= {"gdn_conv_kernel_dim": 4, "gdn_value_head_dim": 6, "gdn_num_key_heads": 2, "gdn_num_value_heads": 4}
        found |= {"gdn_key_head_dim": specimen.config["linear_key_head_dim"], "gdn_chunk_size": 64}
        found["partial_rotary_factor"] = 0.25
    if model == "llama4":
        found |= {"nope_layer_interval": 4, "temperature_tuning": True, "chunk_attn_window_size": 4}
        found |= {"inhomogeneous_layer_cycle_interval": 1 if o["scan"] is None else 4, "rope_type": "llama3.1"}
        found |= {"use_qk_norm": specimen.config["use_qk_norm"], "model_name": "llama4-17b-16e", **named}
    if model == "deepseek2":
        found |= {"attention_type": "mla", "q_lora_rank": 0, "kv_lora_rank": 12, "qk_nope_head_dim": 6}
        found |= {"qk_rope_head_dim": 4, "v_head_dim": 5, "first_num_dense_layers": 1, "shared_experts": 2}
        found |= {"routed_score_func": "softmax", "routed_scaling_factor": 1.0, "routed_bias": False}
        found |= {"rope_type": "yarn", "rope_interleave": True, "rope_factor": 1.0, "max_position_embeddings": 4096}
    if model == "olmo3":
        found |= {"use_qk_norm": True, "sliding_window_size": 4, "model_name": "olmo3-7b", **named}
        found["inhomogeneous_layer_cycle_interval"] = 4
    if model == "gpt3":
        found |= {"trainable_position_size": 32, "mlp_activations": ["gelu"], "fused_qkv": True}
    return found


# ---- transformers 4.57 -------------------------------------------------------------------------------------


def flax(specimen: Specimen) -> Side:
    transformers = importlib.import_module("transformers")
    if specimen.table == "t5":
        importlib.import_module("transformers.models.t5.modeling_flax_t5").jnp = _EarlierNumpy()
    cls = getattr(transformers, specimen.options["class"])
    fields = {k: v for k, v in specimen.config.items() if k != "rope_parameters"}
    model = cls(cls.config_class(**fields), _do_init=False)
    made = {key: jnp.asarray(INPUTS[key]) for key in specimen.inputs}
    if "pixel_values" in made:
        made["pixel_values"] = made["pixel_values"].transpose(0, 2, 3, 1)
    shapes = tuple(x.shape for x in made.values() if x is not made.get("decoder_input_ids"))
    params = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), shapes if len(shapes) > 1 else shapes[0]))
    if ids := [key for key in made if key.endswith("ids")]:
        at = "decoder_" if "decoder_input_ids" in ids else ""
        made[f"{at}attention_mask"] = ones = jnp.ones(made[f"{at}input_ids"].shape, jnp.int32)
        made[f"{at}position_ids"] = jnp.broadcast_to(jnp.arange(ones.shape[1]), ones.shape)
    if specimen.table == "t5":
        del made["decoder_position_ids"]
        made["attention_mask"] = jnp.ones(IDS.shape, jnp.int32)
    if specimen.table in ("bert", "roberta"):  # the Flax classes count RoBERTa's positions outside the module
        more = {"token_type_ids": jnp.zeros_like(made["input_ids"]), "head_mask": None}
        made = {**made, **more, "position_ids": made["position_ids"] + (1 if specimen.table == "roberta" else 0)}
    return _of_linen(model.module, params, lambda module, variables: module.apply(variables, **made)[0])


class _EarlierNumpy:
    """`jax.numpy` with the `a_max` that `clip` no longer takes, and transformers' Flax T5 still gives it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def clip(self, x: Any, a_max: Any) -> Any:
        return jnp.clip(x, max=a_max)


# ---- keras-hub ---------------------------------------------------------------------------------------------


def keras(specimen: Specimen) -> Side:
    with jax.numpy_rank_promotion("allow"):  # its layers are called when they are built
        made = keras_backbone(specimen)
    shapes = {v.path.replace("/", "."): tuple(v.shape) for v in made.weights}
    return Side(shapes, lambda leaves: {"params": trees.nest(leaves)}, lambda tree: run_keras(made, tree), merges=True)


def keras_backbone(specimen: Specimen) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    models = importlib.import_module("keras_hub.models")
    importlib.import_module("keras").utils.clear_session()  # the numbers in the names of layers begin anew
    sizes = {
        "vocabulary_size": V, "hidden_dim": D, "intermediate_dim": F, "num_layers": LAYERS, "num_query_heads": HEADS,
        "num_key_value_heads": KV, "layer_norm_epsilon": 1e-6, "dtype": "float32",
    }  # fmt: skip
    gemma = {"head_dim": 6, "use_post_ffw_norm": True, "use_post_attention_norm": True, "sliding_window_size": 4}
    experts = {"num_experts": 4, "top_k": 2, "rope_max_wavelength": 10_000}
    more: dict[str, dict[str, Any]] = {
        "Llama": {"rope_max_wavelength": 10_000},
        "Mistral": {"rope_max_wavelength": 10_000, "sliding_window": 32},
        "Qwen2": {"rope_max_wavelength": 10_000, "tie_word_embeddings": True},
        "Qwen3": {"rope_max_wavelength": 10_000, "head_dim": 6, "tie_word_embeddings": True},
        "Gemma": {"intermediate_dim": 2 * F, "head_dim": 6},  # which it halves, as the converter doubles it
        "Gemma2": {
            **gemma, "intermediate_dim": 2 * F, "final_logit_soft_cap": 8.0, "attention_logit_soft_cap": 5.0,
            "use_sliding_window_attention": True, "query_head_dim_normalize": True,
        },
        "Gemma3": {
            **gemma, "image_size": 8, "query_head_dim_normalize": True, "use_query_key_norm": True,
            "use_sliding_window_attention": True, "vision_encoder": None, "final_logit_soft_cap": None,
            "attention_logit_soft_cap": None,
        },
        "Phi3": {"num_key_value_heads": HEADS, "rope_max_wavelength": 10_000},
        "Mixtral": {**experts, "sliding_window": 32},
        "Qwen2Moe": {
            **experts, "moe_intermediate_dim": 8, "shared_expert_intermediate_dim": 20, "norm_top_k_prob": False,
        },
        "Qwen3Moe": {
            **experts, "moe_intermediate_dim": 8, "head_dim": 6, "norm_top_k_prob": True, "mlp_only_layers": [1],
        },
    }  # fmt: skip
    old = {
        "vocabulary_size": V, "hidden_dim": D, "num_layers": LAYERS, "num_heads": HEADS, "max_sequence_length": 32,
        "dtype": "float32",
    }  # fmt: skip
    if specimen.table == "keras:gpt2":
        return models.GPT2Backbone(**old, intermediate_dim=4 * D)
    if specimen.table == "keras:gemma4":
        parts: dict[str, dict[str, Any]] = {
            "e": {"hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": V},
            "large": {"num_global_key_value_heads": 1},
            "moe": {
                "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
                "expert_intermediate_dim": 8, "num_experts_per_token": 2,
            },
        }  # fmt: skip
        return models.Gemma4Backbone(
            **sizes, **parts[specimen.options["size"]], image_size=8, head_dim=6, global_head_dim=8,
            sliding_window_size=4, layer_types=list(specimen.config["layer_types"]), final_logit_soft_cap=8.0,
            local_rope_wavelength=10_000, global_rope_wavelength=1_000_000, global_rope_partial_rotary_factor=0.25,
        )  # fmt: skip
    if specimen.torch.endswith("ForSequenceClassification"):
        name = specimen.torch.removesuffix("ForSequenceClassification")
        if name == "Roberta":  # two positions less, as its converter makes it
            old["max_sequence_length"] -= 2
        backbone = getattr(models, f"{name}Backbone")(**old, intermediate_dim=F)
        return getattr(models, f"{name}TextClassifier")(backbone, num_classes=2)
    torch = specimen.torch.removesuffix("ForCausalLM")
    names = {"Gemma2": "Gemma", "Qwen2": "Qwen", "Qwen2Moe": "QwenMoe"}
    return getattr(models, f"{names.get(torch, torch)}Backbone")(**{**sizes, **more[torch]})


def run_keras(made: Any, tree: Any) -> Any:
    """The logits with the values of a tree, `{"params": …}`."""
    flat, held = paths.flatten(tree["params"]), {v.path.replace("/", "."): v for v in made.weights}
    assert set(flat) == set(held)
    for path, variable in held.items():
        variable.assign(flat[path])
    inputs = {"token_ids": jnp.asarray(IDS), "padding_mask": jnp.ones_like(IDS)}
    if "position_ids" in made.input:
        inputs["position_ids"] = _positions()
    if "logits.kernel" in held:
        return made(
            {**inputs, "segment_ids": jnp.zeros_like(IDS)} if "segment_embedding.embeddings" in held else inputs
        )
    return made.token_embedding(made(inputs), reverse=True)


def easydel(specimen: Specimen) -> Side:
    importlib.import_module("easydel")
    name = specimen.options["model"]
    where = f"easydel.modules.{name}"
    layers, utils = importlib.import_module("easydel.layers"), importlib.import_module("easydel.infra.utils")
    fields = {**specimen.config, "rope_theta": specimen.config["rope_parameters"]["rope_theta"]}
    kind = specimen.torch.removesuffix("ForCausalLM")
    fields.pop("experts_implementation", None)
    config = getattr(importlib.import_module(where), f"{kind}Config")(**fields)
    size = specimen.config.get("head_dim", D // HEADS)

    def frequencies(*_: Any, **__: Any) -> Any:
        """As EasyDeL 0.3.0 computes them, but not rounded to bfloat16 whatever the dtype is."""
        most = config.granted_freq_max_position_embedding
        return utils.ModuleCaches(
            layers.get_frequencies(head_size=size, rotary_dim=size, max_position=most, base=fields["rope_theta"])
        )

    object.__setattr__(config, "get_basic_frequencies", frequencies)
    config.add_basic_configurations(
        sharding_axis_dims=(1, 1, 1, 1, 1), use_sharding_constraint=False, attn_mechanism="vanilla",
        attn_dtype=jnp.float32, attn_softmax_dtype=jnp.float32,
    )  # fmt: skip
    cls = getattr(importlib.import_module(where), specimen.torch)

    with config.mesh:
        made = cls(config=config, dtype=jnp.float32, param_dtype=jnp.float32, precision="highest", rngs=nnx.Rngs(0))

    def run(target: Any) -> Any:  # merged: its JAX is older than what our own layers need
        trees.fill(made, paths.flatten(target["params"]))
        with config.mesh:
            return made(input_ids=jnp.asarray(IDS, jnp.int32)).logits

    shapes = {path: tuple(v.shape) for path, v in trees.nnx_leaves(made).items()}
    return Side(shapes, lambda leaves: {"params": trees.nest(leaves)}, run, merges=True)


BUILDERS: dict[str, Callable[[Specimen], Side]] = {
    "tunix": tunix,
    "tunix_gemma": tunix_gemma,
    "tunix_gemma3": tunix_gemma3,
    "tunix_gemma4": tunix_gemma4,
    **dict.fromkeys(TWINS, twin),
    "gpt2_dense": gpt2_dense,
    "gemma": gemma,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "maxtext": maxtext,
    "flax": flax,
    "keras": keras,
    "easydel": easydel,
    "bonsai": lambda specimen: _of_nnx(*bonsai_side.MODELS[specimen.options["model"]](specimen)),
}
