"""Start an adapter with an initialization that reads the base, data or gradients, and convert it back.

PiSSA, OLoRA, CorDA and LoRA-GA move a part of the base weights into the adapter, and LoftQ quantizes the base. So
`start` returns both the adapter and its base. `for_original_base` converts the trained adapter to a plain LoRA for the
original base; loading can change the base again instead. A prompt may start from the base's token embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Recipe, Site, Sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays import quantized, regions
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, met, raise_as, raise_listed
from jaxadapt.initializers import statistics
from jaxadapt.initializers.kinds import Array, Factors, InitKind, ModuleValues, init_kind
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import base_merge, factors
from jaxadapt.methods.applied import AppliedMethod
from jaxadapt.methods.base import Method, PerEntry, at_least_float32, get_method
from jaxadapt.methods.prompt import PromptMethod, StartData
from jaxadapt.models import nnx_adapters, planning, trees
from jaxadapt.models.attention_calls import input_embedding
from jaxadapt.models.carriers import DEFAULT, Carrier, base_params, carrier, check_free, lora_carrier

# ---------------------------------------------------------------- start prompt


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


# ---------------------------------------------------------------- initialize


@dataclasses.dataclass(frozen=True)
class Initialization:
    """An initialization of one adapter's sites.

    Raises `ConfigError` listing the sites that the initialization does not support.
    """

    kind: InitKind
    recipe: Recipe
    sites: Sequence[Site]
    weights: Mapping[str, Array]
    key: Any

    def __post_init__(self) -> None:
        if not self.kind.name:
            return
        raise_listed(
            ConfigError,
            f"{lora.init_field(self.recipe.config)} is not supported for these weights:",
            [
                f"{site.leaf}: it needs a linear layer whose weight is one parameter"
                for site in self.sites
                if (self.kind.only_matrices or site.match.weight.kind == "fused")
                and site.effects.weight != "replaces"
                and not self._has_matrices(site)
            ]
            + [f"{site.leaf}: {problem}" for site in self.pairs for problem in self._obstacles(site)],
        )

    def _obstacles(self, site: Site) -> list[str]:
        """Return the first reason why the initialization does not support a site, if there is one."""
        r = _rank(site)
        leaf = self.weights[site.leaf]
        if quantized.is_quantized(leaf):
            return ["it is quantized; initialize with the original weights, then quantize the changed base"]
        out_size, in_size = factors.matrix_sizes(site)
        max_rank = r if self.kind.limit is None else self.kind.limit(min(out_size, in_size))
        obstacles = {
            "its values are needed, but only its shape is given": (
                isinstance(leaf, jax.ShapeDtypeStruct) or regions.is_traced(leaf)
            ),
            f"expected a floating dtype, found {leaf.dtype}": not jnp.issubdtype(leaf.dtype, jnp.floating),
            f"dtype {leaf.dtype} would round the changed base weights; cast them to 16 bits or more": (
                leaf.dtype.itemsize == 1 and not self.kind.in_8_bits
            ),
            "its layers or parts differ in rank or scale; use an unrolled model": (
                isinstance(site.hparams.scale, PerEntry) and not self.kind.per_entry
            ),
            f"expected a positive scale, whose root divides its factors, found {site.hparams.scale}; set lora_alpha"
            " above 0": (
                self.kind.divides and not isinstance(site.hparams.scale, PerEntry) and site.hparams.scale <= 0
            ),
            "layer_replication may repeat its layer, and PEFT then takes a part out of the one shared weight for each"
            " repetition; choose an initialization that leaves the base as it is": (
                lora.changes_base(self.recipe.config) and self.recipe.config.get("layer_replication")
            ),
            f"expected an even rank, found {r}": self.kind.limit is None and r % 2,
            "PEFT decomposes a Conv1D's transposed weight, and its layer then fails or is wrong": (
                site.match.weight.fan_in_fan_out and not self.kind.conv1d
            ),
            f"rank {r} exceeds {max_rank}, the most for {out_size} x {in_size}": r > max_rank,
        }
        return met(obstacles)[:1]

    @property
    def pairs(self) -> list[Site]:
        """The sites whose A and B are computed, reduced to these two tensors."""
        return [factors.only_pair(site) for site in self.sites if self._has_matrices(site)]

    def _has_matrices(self, site: Site) -> bool:
        return (
            site.effects.weight != "replaces"
            and site.match.weight.kind in self.kind.kinds
            and factors.has_one_pair(factors.only_pair(site))
        )

    def module_values(self, site: Site, data: Mapping[str, Array] = MappingProxyType({})) -> dict[str, ModuleValues]:
        """Return the values of each module of a site that the initialization reads; `data` are those of each module."""
        leaf = self.weights[site.leaf]
        config = self.recipe.config
        modules = list(site.modules)
        assert isinstance(config, lora.LoraConfig)
        # The keys are independent of the other sites.
        one = None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(site.leaf.encode()))
        keys = [None] * len(modules) if one is None else jax.random.split(one, len(modules))
        weights = functools.cache(
            lambda: factors.site_weights(self.recipe.keymap, site, at_least_float32(jnp.asarray(leaf)))  # read on use
        )
        shared = factors.matrix_sizes(site)[0], leaf.dtype, _rank(site), site.hparams.scale
        return {
            module: ModuleValues(
                config, weights, module, *shared, key, data.get(module), site.match.weight.fan_in_fan_out
            )
            for module, key in zip(modules, keys, strict=True)
        }

    def factors(self, data: Mapping[str, Array] = MappingProxyType({})) -> dict[str, Factors]:
        """Compute the factors of each module; empty if they are random.

        Args:
            data: `{module: array}`: covariances, gradients or components.

        Raises `AttachError` naming the leaf whose data no factors fit.
        """
        if (compute := self.kind.factors) is None:
            return {}
        out: dict[str, Factors] = {}
        for site in self.pairs:
            with raise_as(AttachError, site.leaf, AttachError):
                out |= {module: compute(values) for module, values in self.module_values(site, data).items()}
        return out

    def gradients(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the gradient (out, in) of each module's PyTorch weight from the gradients of the base leaves."""
        out: dict[str, Array] = {}
        for site in self.pairs:
            expected = tuple(self.weights[site.leaf].shape)
            found = leaves.get(site.leaf)
            if found is None or tuple(found.shape) != expected:
                text = "none" if found is None else f"one of shape {tuple(found.shape)}"
                raise MismatchError(f"gradients: expected one of shape {expected} for {site.leaf}, found {text}")
            out |= factors.site_weights(self.recipe.keymap, site, at_least_float32(jnp.asarray(found)), power=-1)
        return out

    def assemble(
        self, computed: Mapping[str, Factors], dtype: Any, shardings: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter with these factors of modules, and the changed base weights {leaf: array}.

        Args:
            shardings: of the base leaves, by path.
        """
        config: Any = self.recipe.config
        plain = config.replace(
            init_lora_weights=True if self.kind.factors is not None else config.init_lora_weights, kasa_config=None
        )
        key = jax.random.key(0) if self.key is None else self.key  # then all random values are given
        init_values = functools.partial(
            initial_values.init_values, plain, self.sites, key, dtype, base_shardings=shardings
        )
        specs = init_values(abstract=True, base=self.weights)
        started = self.pairs if computed else []
        pairs = {
            module: factors.Pair(*factors.pad_rank(jnp.asarray(f.a), jnp.asarray(f.b), config.rank_of(module)), 1.0)
            for module, f in computed.items()
        }
        given = regions.put_on_devices(
            {path: x.astype(specs[path].dtype) for path, x in factors.pair_leaves(started, pairs).items()},
            initial_values.adapter_shardings(started, dict(shardings)),
        )
        base = self._changed_base(plain, computed, paths.unflatten(given))
        # DoRA's magnitudes follow from the changed base.
        values = init_values(base={**self.weights, **base}, given=given)
        return Adapter(config, paths.unflatten(values), self.recipe.keymap), base

    def _changed_base(
        self, plain: lora.LoraConfig, computed: Mapping[str, Factors], pairs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the base weights {leaf: array} that the initialization changes; `pairs` is the tree of As and Bs."""
        base: dict[str, Any] = {}
        if self.kind.base is not None:
            for site in self.pairs:
                values = self.module_values(site).items()
                weights = {module: self.kind.base(x, computed.get(module)) for module, x in values}
                base[site.leaf] = factors.with_site_weights(self.recipe.keymap, site, self.weights[site.leaf], weights)
        elif lora.changes_base(self.recipe.config):
            removed = Adapter(plain.replace(use_dora=False), pairs, self.recipe.keymap)
            with jax.default_matmul_precision("highest"):
                changes = base_merge.plan_changes(self.weights, removed, AppliedMethod.unweight, lambda _, x: x)
                base = {leaf: changed.value() for leaf, changed in changes.items()}
        return base


def _rank(site: Site) -> int:
    return dict(site.tensors[0].own)["r"]


# ---------------------------------------------------------------- start adapter


class Started(NamedTuple):
    """An initialized adapter and its base.

    Attributes:
        base: the parameters, with new arrays for the weights that the initialization changes and the same arrays
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
    """Initialize a LoRA adapter as `init_lora_weights` requires, or a prompt by `prompt_tuning_init`, as PEFT does.

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
        key: a JAX random key, for initializations that draw random numbers.
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
        key = nnx_adapters.draw_params_key(rngs)
    base = base_params(model)
    _check_arguments(config, method, key, data)

    plan = functools.partial(planning.plan_adapter, base, keymap=keymap, stack_axes=stack_axes, example=example)
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
    values = base.new_values(recipe, adapter_sites, key, dtype, given=given)
    adapter = Adapter.of_leaves(recipe.config, values, recipe.keymap)
    return _attach(held, adapter, adapter_sites, name, rngs, model)


_DATA = {
    "batches": "jaxadapt.initializers.Batches(inputs, forward)",
    "gradients": "the gradients of a loss, in a tree like the base parameters",
    "tokens": "the token ids of the text",
    "source": "the adapter to start from",
}
"""{what an initialization needs: the value of `data` for it}."""


def _check_arguments(config: Config, method: Method, key: Any, data: Any) -> None:
    """Raise `AttachError` unless `key` and `data` are what an initialization needs; a key is always allowed."""
    setting, needs = type(config).__name__, ("key",)
    if isinstance(config, lora.LoraConfig):
        setting, needs = lora.init_field(config), init_kind(config).needs
    elif isinstance(method, PromptMethod):
        setting, needs = method.start_setting(config)
    wanted = next((_DATA[name] for name in needs if name in _DATA), None)
    is_given = data is not None
    problems = {
        "data has no effect": is_given and wanted is None,
        f"data is needed: {wanted}": not is_given and wanted is not None,
        "key is needed": "key" in needs and key is None,
        f"data: expected {wanted}, found {type(data).__name__}": (
            is_given and wanted is not None and isinstance(data, Batches) != ("batches" in needs)
        ),
    }
    if found := met(problems):
        raise AttachError(f"{setting}: " + ", ".join(found))


def _prompt_values(
    recipe: Recipe,
    adapter_sites: Sites,
    method: PromptMethod,
    base: planning.BaseParams,
    key: Array,
    dtype: Any,
    data: Any,
) -> dict[str, Array]:
    """Return the tensors of a prompt that do not start from random values, `{path: array}`."""
    config = recipe.config
    tokens, source = (data if name in method.start_setting(config)[1] else None for name in ("tokens", "source"))
    table = functools.cache(lambda: token_table(recipe.keymap, base.leaves, config.peft_type))
    given = StartData(jax.random.fold_in(key, 1), table, tokens, _source_tensors(source))
    shapes = {each.tensor.name: each.entry.shape for each in adapter_sites.shared}
    where = initial_values.adapter_shardings(adapter_sites, base.shardings)
    started = method.start_values(config, shapes, given).items()
    cast = {paths.join(SHARED_NODE, name): x.astype(initial_values.new_dtype(dtype)) for name, x in started}
    return {path: regions.move_to(x, where[path]) if path in where else x for path, x in cast.items()}


def _compute_factors(
    first: Initialization, plan: Callable[[Config], tuple[Recipe, Sites]], model: Any, data: Any
) -> tuple[Initialization, dict[str, Factors]]:
    """Return the factors of each module, and the initialization with their ranks, which EVA chooses."""
    config: Any = first.recipe.config
    if "gradients" in first.kind.needs:
        leaves = {path: x for path, x in carrier(data).leaves().items() if x is not None}
        return first, first.factors(first.gradients(leaves))
    if "batches" not in first.kind.needs:
        return first, first.factors()
    if data.forward is None and not carrier(model).in_place:
        raise AttachError(
            "forward= is required for bare parameters, for example"
            " forward=lambda params, batch: module.apply({'params': params}, batch)"
        )
    forward = data.forward or _call_model
    if first.kind.name != "eva":
        if data.mask is not None:
            raise AttachError(f"{lora.init_field(config)}: mask has no effect")
        return first, first.factors(_covariances(first, model, data.inputs, forward))
    watch = functools.partial(statistics.make_observer, model, first.recipe, forward=forward)
    config, components = statistics.find_components(config, first.pairs, data.inputs, watch, data.mask)
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
        nnx_adapters.attach(held.tree, adapter.recipe, on, name, adapter.flat(), rngs)
        return Started(held.tree, jax.tree.map(lambda x: jnp.array(x, copy=True), adapter))
    return Started(base, trees.box_like_base(adapter, base_params(base).held))


# ---------------------------------------------------------------- from data


def _call_model(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _covariances(initialization: Initialization, base: Any, batches: Any, forward: Any) -> dict[str, Array]:
    """Return {module: covariance (in, in)}, averaged over the calls."""
    sites = initialization.pairs
    rows = {site.leaf: site.fan_in + 1 for site in sites}
    observe = statistics.make_observer(base, initialization.recipe, sites, statistics.gram, rows, forward)
    sums: dict[str, Array] = {}
    for batch in batches:
        sums = {leaf: sums[leaf] + x if sums else x for leaf, x in observe({}, batch).items()}
    if not sums:
        raise AttachError("CorDA needs at least one batch: data has none")
    found = ((m, sums[site.leaf][layer]) for site in sites for m, layer in site.layers.items())
    return {m: x[:-1] / x[-1, 0] for m, x in found}


# ---------------------------------------------------------------- original base


def for_original_base(trained: Any, first: Adapter, *, name: str = DEFAULT) -> Adapter:
    """Convert a trained adapter to a plain LoRA for the original base, before `start` changed it.

    Writes ΔW = s·(B·A − B₀·A₀) exactly as one product of twice the rank, A' = [A; A₀] and B' = [B, −B₀]. The scale
    stays: rank, alpha and their patterns are doubled (with `use_rslora` alpha is multiplied by √2). PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=…)` does the same. Reduce the rank with `resize_rank`.

    Args:
        trained: a model, variables or an `Adapter`, as in `extract`.
        first: `start(…).adapter`.

    Raises `ConfigError` if the start did not change the base or ΔW is not such a product (DoRA; rsLoRA with patterns,
    as in PEFT), `MismatchError` if `first` belongs to another adapter.

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
    if not lora.changes_base(config):
        raise ConfigError(
            f"cannot convert: {lora.init_field(config)}: this initialization did not change the base; nothing to undo"
        )
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

    Raises `ConfigError` for initializations that cannot be repeated, in PEFT either.
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
