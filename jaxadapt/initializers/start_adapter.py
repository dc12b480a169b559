"""Start an adapter with an initialisation that reads the base, data or gradients, and convert it back.

PiSSA, OLoRA, CorDA and LoRA-GA move a part of the base weights into the adapter, and LoftQ quantises the base. So
`start` returns both the adapter and its base. `for_original_base` converts the trained adapter to a plain LoRA for the
original base; loading can change the base again instead. A prompt may start from the base's token embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Recipe
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.adapters.site import Site, Sites
from jaxadapt.arrays import quantized, regions
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import statistics
from jaxadapt.initializers.kinds import Factors, Initialization, init_kind, init_settings
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import factors
from jaxadapt.methods.base import Method
from jaxadapt.methods.prompt import PromptMethod, StartData
from jaxadapt.methods.registry import get_method
from jaxadapt.models import planning
from jaxadapt.models.attention_calls import input_embedding
from jaxadapt.models.carriers import DEFAULT, Carrier, base_params, carrier, check_free, lora_carrier
from jaxadapt.models.linen import wrapper
from jaxadapt.models.nnx import attach
from jaxadapt.models.planning import BaseParams

# ---------------------------------------------------------------- start prompt


Array = Any


def token_table(keymap: KeyMap, leaves: Mapping[str, Array], peft_type: str) -> Array:
    """Return the embeddings of all tokens (vocabulary, token_dim); raise `AttachError` if their leaf is unclear."""
    leaf = input_embedding(keymap, leaves)
    x = None if leaf is None else leaves[leaf]
    if x is None or isinstance(x, jax.ShapeDtypeStruct) or len(x.shape) != 2:
        raise AttachError(
            f"{peft_type}: the start needs the values of the token embeddings (vocabulary, width), and"
            f" {'several or no parameters may hold them' if leaf is None else f'{leaf} has none of this shape'}."
            ' Use prompt_tuning_init="RANDOM", and write your own values with jaxadapt.inject'
        )
    return jnp.asarray(quantized.to_dense(x))


# ---------------------------------------------------------------- start adapter


class Started(NamedTuple):
    """An initialised adapter and its base.

    Attributes:
        base: the parameters, with new arrays for the weights that the initialisation changes and the same arrays
            elsewhere. For an NNX model: that model, changed in place, with the adapter attached.
        adapter: its initial values. Keep it: `for_original_base` needs it.
    """

    base: Any
    adapter: Adapter


@dataclasses.dataclass(frozen=True)
class Batches:
    """Inputs of the model in evaluation mode, for a start that reads activations.

    Args:
        inputs: the batches. "eva" iterates over them until its components converge (PEFT:
            `initialize_lora_eva_weights`), "corda" once, one sample each (`preprocess_corda`).
        forward: `forward(base, batch)` returns the model's outputs. For an NNX model by default `model(batch)`, for a
            tuple `model(*batch)`, for a mapping `model(**batch)`. Required for parameters.
        mask: "eva": `mask(batch)` returns True for tokens that count; by default from "attention_mask" and "labels" of
            a mapping, as PEFT does.

    >>> Batches([{"input_ids": [[3, 1, 4]]}]).mask is None
    True
    """

    inputs: Iterable[Any]
    forward: Callable[[Any, Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None


def start(
    model: Any,
    config: Config,
    data: Any = None,
    *,
    key: Any = None,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Started:
    """Initialize a LoRA adapter as `init_lora_weights` requires, or a prompt by `prompt_tuning_init`, as PEFT 0.21.2.

    An adapter of another type starts as `init` and `adapt` start it; it needs `key`.

    The adapter and the returned base together compute the original base's outputs ("loftq", KaSA: approximately).
    W is the original weight:

    | `init_lora_weights` | the returned base | needs |
    |---|---|---|
    | true, "gaussian", "orthogonal" | W | `key` |
    | "eva" | W | `data`: `Batches` |
    | "mica" (B is never trained then) | W | |
    | "pissa", "olora" | W − s·B·A | |
    | "pissa_niter_4" (any number) | W − s·B·A | `key` |
    | "loftq" | W in 4 or 8 bits, dense (`quantize` then stores it exactly) | |
    | "corda" | W − s·B·A | `data`: `Batches` |
    | "lora_ga" | W − s·B·A | `data`: gradients, `key` |
    | true or "gaussian", with `kasa_config` | W without its r smallest singular values | `key` |

    | `prompt_tuning_init` | the prompt starts from | needs |
    |---|---|---|
    | "RANDOM" | normal values | `key` |
    | "SAMPLE_VOCAB" | the embeddings of random tokens | `key` |
    | "TEXT" | the embeddings of a text's tokens, repeated or cut | `data`: token ids |
    | (CPT) | the embeddings of `cpt_token_ids` | |
    | "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED" | an adapter of several tasks | `data`: it |

    Args:
        model: nested mappings of base parameters (a new tree is returned), or an NNX model (changed in place; the
            adapter is attached under `name` and active).
        data: what the start reads besides the base, for those that need it: `Batches`; a loss's gradients with respect
            to the base parameters, averaged over batches, in a tree like theirs (an `nnx.State` for a model); the token
            ids of the text, or a function from `prompt_tuning_init_text` to them; the adapter of
            MULTITASK_PROMPT_TUNING to start from, or the tensors that `jaxadapt.read` returns.
        key: a JAX random key, for initialisations that draw random numbers.
        name, keymap, dtype, rngs, stack_axes, example: as in `adapt` and `init`.

    Raises `ConfigError` for a configuration that the weights do not support exactly, `AttachError` for missing
    arguments. The base is then unchanged.

    >>> import jax, numpy as np, jaxadapt
    >>> params = {"q": {"kernel": np.random.default_rng(0).standard_normal((4, 6)).astype("float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q"], init_lora_weights="pissa")
    >>> residual, adapter = start(params, config)
    >>> bool(np.allclose(jaxadapt.merge(residual, adapter)["q"]["kernel"], params["q"]["kernel"], atol=1e-6))
    True
    """
    method, held = get_method(config), carrier(model)
    if held.in_place:
        check_free(name, held.names())
    if key is None and rngs is not None:
        key = attach.draw_params_key(rngs)
    base = base_params(model)
    _check_arguments(config, method, key, data)

    def plan(config: Config) -> tuple[Recipe, Sites]:
        return planning.plan_adapter(base, config, keymap, stack_axes, example)

    recipe, adapter_sites = plan(config)
    if isinstance(config, lora.LoraConfig):
        initialization = Initialization(init_kind(config), recipe, adapter_sites, base.leaves, key)
        initialization, factors_of = _compute_factors(initialization, plan, model, data)
        adapter, new = initialization.assemble(factors_of, dtype, base.shardings)
        return _attach(held, adapter, initialization.sites, name, rngs, held.replace(new) if new else model)
    given: dict[str, Array] = {}
    if isinstance(method, PromptMethod):
        key = jax.random.key(0) if key is None else key
        given = _prompt_values(recipe, adapter_sites, method, base, key, dtype, data)
    values = initial_values.init_values(
        recipe.config, adapter_sites, key, dtype, base=base.leaves, base_shardings=base.shardings, given=given
    )
    adapter = Adapter(recipe.config, paths.unflatten(values), recipe.keymap)
    return _attach(held, adapter, adapter_sites, name, rngs, model)


_DATA = {
    "batches": "jaxadapt.initializers.Batches(inputs, forward)",
    "gradients": "the gradients of a loss, in a tree like the base parameters",
    "tokens": "the token ids of the text",
    "source": "the adapter to start from",
}
"""{what an initialisation needs: the value of `data` for it}."""


def _check_arguments(config: Config, method: Method, key: Any, data: Any) -> None:
    """Raise `AttachError` unless `key` and `data` are what an initialisation needs; a key is always allowed."""
    setting, needs = type(config).__name__, ("key",)
    if isinstance(config, lora.LoraConfig):
        setting, needs = lora.init_field(config), init_kind(config).needs
    elif isinstance(method, PromptMethod):
        setting, needs = method.start_setting(config)
    wanted = next((_DATA[name] for name in needs if name in _DATA), None)
    problems = ["data has no effect"] if wanted is None and data is not None else []
    problems += [f"data is needed: {wanted}"] if wanted is not None and data is None else []
    problems += ["key is needed"] if "key" in needs and key is None else []
    if wanted is not None and data is not None and isinstance(data, Batches) != ("batches" in needs):
        problems.append(f"data: expected {wanted}, found {type(data).__name__}")
    if problems:
        raise AttachError(f"{setting}: " + ", ".join(problems))


def _prompt_values(
    recipe: Recipe, adapter_sites: Sites, method: PromptMethod, base: BaseParams, key: Array, dtype: Any, data: Any
) -> dict[str, Array]:
    """Return the tensors of a prompt that do not start from random values, `{path: array}`."""
    config = recipe.config
    tokens, source = (data if name in method.start_setting(config)[1] else None for name in ("tokens", "source"))
    table = functools.cache(lambda: token_table(recipe.keymap, base.leaves, config.peft_type))
    given = StartData(jax.random.fold_in(key, 1), table, tokens, _source_tensors(source))
    shapes = {each.tensor.name: each.entry.shape for each in adapter_sites.shared}
    own, where = initial_values.new_dtype(dtype), initial_values.adapter_shardings(adapter_sites, base.shardings)
    started = {paths.join(SHARED_NODE, name): x for name, x in method.start_values(config, shapes, given).items()}
    cast = {path: x.astype(own) for path, x in started.items()}
    return {path: regions.move_to(x, where[path]) if path in where else x for path, x in cast.items()}


def _compute_factors(
    first: Initialization, plan: Callable[[Config], tuple[Recipe, Sites]], model: Any, data: Any
) -> tuple[Initialization, dict[str, Factors]]:
    """Return the factors of each module, and the initialisation with their ranks, which EVA chooses."""
    if "gradients" in first.kind.needs:
        leaves = {path: x for path, x in carrier(data).leaves().items() if x is not None}
        return first, first.factors(first.gradients(leaves))
    if "batches" not in first.kind.needs:
        return first, first.factors()
    forward = _forward_function(model, data.forward)
    if first.kind.name != "eva":
        if data.mask is not None:
            raise AttachError(f"{lora.init_field(first.recipe.config)}: mask has no effect")
        return first, first.factors(_covariances(first, model, data.inputs, forward))
    config, components = _find_components(first, model, data, forward)
    recipe, adapter_sites = plan(config)
    chosen = dataclasses.replace(first, recipe=recipe, sites=adapter_sites)
    return chosen, chosen.factors(components)


def _source_tensors(source: Adapter | PeftTensors | None) -> Mapping[str, Array] | None:
    """Return the tensors of an adapter to start from, by the names in a file."""
    if source is None or isinstance(source, Adapter):
        return None if source is None else source.shared
    if not isinstance(source, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(f"source: expected an Adapter or PeftTensors (jaxadapt.read), found {type(source).__name__}")
    return source.tensors


def _attach(held: Carrier, adapter: Adapter, on: Sequence[Site], name: str, rngs: Any, base: Any) -> Started:
    """Attach an adapter to a model; leave it beside a tree of parameters, `base`."""
    if held.in_place:
        attach.attach(held.tree, adapter.recipe, on, name, adapter.flat(), rngs)
        return Started(held.tree, jax.tree.map(lambda x: jnp.array(x, copy=True), adapter))
    return Started(base, wrapper.box_like_base(adapter, base_params(base).held))


# ---------------------------------------------------------------- from data


def _forward_function(base: Any, given: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    """Return the function that calls the model on a batch. Raises `AttachError` if parameters come without one."""
    if given is not None:
        return given
    if not carrier(base).in_place:
        raise AttachError(
            "forward= is required for bare parameters, for example"
            " forward=lambda params, batch: module.apply({'params': params}, batch)"
        )
    return _call_model


def _call_model(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _covariances(initialization: Initialization, base: Any, batches: Any, forward: Any) -> dict[str, Array]:
    """Return {module: covariance (in, in)}, averaged over the calls."""
    observed = {b.leaf: statistics.Statistic(statistics.gram, b.fan_in + 1) for b in initialization.pairs}
    observe = statistics.make_observer(base, initialization.recipe, initialization.pairs, observed, forward)
    sums: dict[str, Array] = {}
    for batch in batches:
        grams = observe({}, batch)
        sums = {leaf: sums[leaf] + x if sums else x for leaf, x in grams.items()}
    if not sums:
        raise AttachError("CorDA needs at least one batch: data has none")
    out: dict[str, Array] = {}
    for b in initialization.pairs:
        rows = statistics.split_layers(b, sums[b.leaf])
        out |= {m: rows[layer, :-1] / rows[layer, -1, 0] for m, layer in b.layers.items()}
    return out


def _find_components(
    first: Initialization, base: Any, data: Batches, forward: Any
) -> tuple[lora.LoraConfig, dict[str, Array]]:
    """Return the configuration with EVA's ranks, and A of each module."""
    config: Any = first.recipe.config
    fields = [f.name for f in dataclasses.fields(statistics.Settings)]
    settings = statistics.Settings(**init_settings(config, "eva_config", fields))

    def watch(watched: Sequence[Site], observed: Any) -> statistics.Observer:
        return statistics.make_observer(base, first.recipe, watched, observed, forward)

    components = statistics.find_components(config, first.pairs, data.inputs, watch, settings, data.mask)
    chosen = statistics.redistribute_ranks(config, components, settings)
    return chosen, {m: jnp.asarray(x) for m, x in components.items()}


# ---------------------------------------------------------------- original base


def for_original_base(trained: Any, first: Adapter, *, name: str = DEFAULT) -> Adapter:
    """Convert a trained adapter to a plain LoRA for the original base, before `start` changed it.

    Writes ΔW = s·(B·A − B₀·A₀) exactly as one product of twice the rank, A' = [A; A₀] and B' = [B, −B₀]. The scale
    stays: rank, alpha and their patterns are doubled (with `use_rslora` alpha is multiplied by √2). PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=…)` does the same. Reduce the rank with `resize_rank`.

    Args:
        trained: a model, variables or an `Adapter`, as in `extract`.
        first: `start(…).adapter`.

    Raises `ConfigError` if ΔW is not such a product (DoRA; rsLoRA with patterns, as in PEFT), `MismatchError` if
    `first` belongs to another adapter.

    >>> import numpy as np, jaxadapt
    >>> params = {"q": {"kernel": np.arange(24.0).reshape(4, 6).astype("float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights="olora")
    >>> residual, first = jaxadapt.initializers.start(params, config)
    >>> plain = jaxadapt.initializers.for_original_base(first, first)
    >>> plain.config.r, plain.config.init_lora_weights
    (4, True)
    >>> bool(np.allclose(jaxadapt.merge(params, plain)["q"]["kernel"], params["q"]["kernel"], atol=1e-4))
    True
    """
    return convert_start(lora_carrier(trained).extract(name), first)


def convert_start(trained: factors.Plain, first: factors.Plain) -> factors.Plain:
    """Convert a trained adapter as `for_original_base` does, in a model's layout or as PEFT's tensors."""
    config = _require_product_start(trained.config)
    trained, first = factors.normalize(trained), factors.normalize(first)
    new, old = factors.pairs_of(trained), factors.pairs_of(first, "first")
    sizes = [{name: (pair.rank, *pair.sizes) for name, pair in pairs.items()} for pairs in (new, old)]
    differ = sorted(name for name in sizes[0].keys() | sizes[1].keys() if sizes[0].get(name) != sizes[1].get(name))
    if differ or config != first.config:
        raise MismatchError(
            "first: expected an adapter of the same shapes and configuration as the trained one"
            + ("; they differ at:\n" + paths.bullets(differ) if differ else "")
        )
    doubled = config.with_default_init().replace(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * config.scale_divisor(2),
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: 2 * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    pairs = {
        name: dataclasses.replace(
            pair, a=jnp.concatenate([pair.a, old[name].a], -2), b=jnp.concatenate([pair.b, -old[name].b], -1)
        )
        for name, pair in new.items()
    }
    return factors.build(pairs, doubled, [trained, first], "for_original_base")


def _require_product_start(config: Config) -> lora.LoraConfig:
    """Return the configuration; raise `ConfigError` if the change since the start is no product of twice the rank."""
    if config.get("init_lora_weights") == "loftq":
        raise ConfigError(
            "cannot convert a LoftQ adapter: LoftQ quantized the base, and the adapter does not contain the rounding"
            " error. Keep the changed base (export_base), or read the file with change_base=True and load it, which"
            " quantizes the base again"
        )
    why = lora.reasons_not_a_product(config)
    if why or not isinstance(config, lora.LoraConfig):
        raise ConfigError(
            "cannot convert: the change since the start is not a product of two matrices: " + "; ".join(why)
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "cannot convert use_rslora with rank_pattern or alpha_pattern: no patterns of the doubled rank have the"
            " same scales (PEFT refuses it too). jaxadapt.merging.to_lora((original, merged), r) approximates it"
        )
    return config


def residual_base(recipe: Recipe, adapter_sites: Sequence[Site], weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return {leaf: array} of the base weights that PEFT changes when it loads an adapter with this configuration.

    Raises `ConfigError` for initialisations that cannot be repeated, in PEFT either.
    """
    config: Any = recipe.config
    kind = init_kind(config)
    if kind.from_run:
        raise ConfigError(
            f"{lora.init_field(config)}: cannot repeat the change of the base, which depends on"
            f" {kind.from_run} (PEFT's load cannot either). Read it with change_base=False for the changed base, or"
            " convert the adapter where it was trained, with for_original_base (in PEFT"
            " path_initial_model_for_weight_conversion)"
        )
    initialization = Initialization(kind, recipe, adapter_sites, weights, None)
    return initialization.assemble(initialization.factors(), None, {})[1]
