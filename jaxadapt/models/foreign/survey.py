"""The LoRA sites of a foreign tree: the axes and the PEFT keys of each array, and the configuration that they imply.

The sites are bound to a family's keymap. The configuration is inferred from the tree, and completed with the user's
values.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.arrays.layout import FileLayout, axis_parts
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import FrozenDict, find_pattern_value
from jaxadapt.configs.lora import LoraConfig, fields_set
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import with_layout
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries
from jaxadapt.keymaps.plan import axis_sizes, scale_factor, tensor_key, tensor_layout
from jaxadapt.keymaps.weight import MethodTensor, Weight
from jaxadapt.methods.base import Target
from jaxadapt.methods.registry import get_method
from jaxadapt.models.foreign.dialects import RANK, Dialect, Dims, layouts

# ---------------------------------------------------------------- survey


Shape = tuple[int, ...]
Array = Any


@dataclasses.dataclass(frozen=True)
class PackedLayout(FileLayout):
    """The layout of an array that may have flattened axes, or may be shared by several keys.

    `packed` is the array's shape in its tree, `shape` its shape with all axes separate. Each subarray (over `split`)
    stands for `shared` tensors of the file, which are consecutive.
    """

    packed: Shape = ()
    shared: int = 1

    def index(self, i: int) -> tuple[Any, ...]:
        return super().index(i // self.shared)

    def encode(self, leaf: Array, i: int) -> Array:
        return super().encode(leaf.reshape(self.shape), i)

    @functools.cached_property
    def file_rank(self) -> int:
        """The position of the rank's axis in the file's tensors."""
        return self.right.index((RANK,))

    @functools.cached_property
    def _by_rank(self) -> dict[int, FileLayout]:
        return {}

    def unit(self, rank: int) -> FileLayout:
        """Return the layout that converts one key's tensor of this rank to its subarray."""
        layout = self._by_rank.get(rank)
        if layout is None:
            keep = [axis for axis in range(len(self.left)) if axis not in self.split]
            shape = tuple(rank if axis == self.rank_axis else self.shape[axis] for axis in keep)
            left = tuple(self.left[axis] for axis in keep)
            layout = self._by_rank[rank] = FileLayout(shape, left, self.right, (), self.factor, self.sizes)
        return layout


@dataclasses.dataclass(frozen=True)
class FactorArray(plan.PlanEntry):
    """One array of a site, A or B, with its keys and their PyTorch modules."""

    form: PackedLayout
    modules: tuple[str, ...] = ()

    def keys_of(self, i: int) -> tuple[str, ...]:
        """Return the consecutive keys that share subarray `i`."""
        return self.keys[i * self.shared : (i + 1) * self.shared]

    def tensor_number(self, key_number: int) -> int:
        """Return the position of the key itself: `PackedLayout.index` finds its subarray."""
        return key_number

    @property
    def shared(self) -> int:
        return self.form.shared

    @property
    def rank(self) -> int:
        return self.shape[self.form.rank_axis]


@dataclasses.dataclass(frozen=True)
class ForeignSite:
    """One site of a foreign tree: its base leaf, its two arrays, and the known sizes of the base's axes."""

    match: Match
    a: FactorArray
    b: FactorArray
    sizes: tuple[tuple[str, int], ...]

    @property
    def base_shape(self) -> Shape | None:
        """The shape of the base leaf; None if it does not follow from the arrays."""
        sizes = dict(self.sizes)
        left = self.match.weight.left
        return tuple(sizes[n] for n in left) if all(n in sizes for n in left) else None


@dataclasses.dataclass(frozen=True)
class ForeignSites:
    """All LoRA sites of a foreign tree, with its dialect, keymap and base weights.

    `stored` is the alpha of each base leaf, if the tree stores it. `real` is the keymap with one name for all experts
    of a layer, if `keymap` has one for each expert (`experts.per_expert_keymap`).
    """

    dialect: Dialect
    keymap: KeyMap
    sites: tuple[ForeignSite, ...]
    base: Mapping[str, Shape]
    stored: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    real: KeyMap | None = None

    @property
    def own_keymap(self) -> KeyMap:
        """The keymap of the tree, with one name for all experts of a layer if it has them in one array."""
        return self.real or self.keymap

    @functools.cached_property
    def leaves(self) -> frozenset[str]:
        """The base leaves that the tree adapts."""
        return frozenset(site.match.leaf for site in self.sites)

    @functools.cached_property
    def arrays(self) -> list[FactorArray]:
        """The arrays of all sites, A before B."""
        return [half for site in self.sites for half in (site.a, site.b)]

    @functools.cached_property
    def plan(self) -> plan.Plan:
        """The bijection of arrays and file keys; a shared array has one key for each module that shares it."""
        return plan.make_plan(self.arrays)

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """`{module: rank}` of every PyTorch module that the tree adapts."""
        return {m: site.a.rank for site in self.sites for m in site.a.modules}

    @functools.cached_property
    def alphas(self) -> dict[str, float]:
        """`{module: alpha}` if the dialect or the tree defines it, else empty."""
        if self.dialect.unscaled:
            return dict(self.ranks)
        alphas = [(site, self.stored[leaf]) for site in self.sites if (leaf := site.match.leaf) in self.stored]
        return {m: alpha for site, alpha in alphas for m in site.a.modules}

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All modules of the base in the keymap, adapted or not; empty without a base."""
        out: set[str] = set()
        for leaf, shape in self.base.items():
            match = self.keymap.match(leaf)
            if match and len(match.weight.left) == len(shape) and match.weight.key.rpartition(".")[2] == "weight":
                out |= set(match.modules(axis_sizes(match, shape)).values())
        return frozenset(out)


def survey_sites(
    dialect: Dialect,
    keymap: KeyMap,
    arrays: Mapping[str, Shape],
    base: Mapping[str, Shape],
    stored: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ForeignSites:
    """Bind the LoRA arrays of a tree, `{path: shape}`, to a family's keymap.

    Args:
        base: `{the family's path of a base leaf: shape}`; empty if the tree has only LoRA leaves.
        stored: `{base leaf: alpha}`, if the tree stores it.
        sizes: `{letter of the keymap's patterns: size}` of axes, if `base` is empty.

    Raises one `KeyMapError` with every leaf that no entry of the keymap matches, or whose shape matches no layout of
    the dialect.
    """
    out: list[ForeignSite] = []
    problems: list[str] = []
    for leaf, candidates in dialect.claim(arrays).items():
        match = keymap.match(leaf)
        names = sorted({path for a, b, _ in candidates for path in (a, b)})
        if match is None:
            problems.append(f"{', '.join(names)}: the keymap {keymap.name!r} has no entry for {leaf!r}")
            continue
        try:
            hints = hinted_sizes(match.weight, sizes or {})
            out.append(_bind_site(dialect, keymap, match, candidates, arrays, base.get(leaf), hints))
        except KeyMapError as error:
            problems.append(str(error))
    raise_listed(
        KeyMapError,
        f"these {dialect.name} LoRA leaves have no exact equivalent in a PEFT file:",
        problems,
        "\nPass the model's family as keymap=, or a KeyMap with an entry for each base weight",
    )
    return ForeignSites(dialect, keymap, tuple(out), dict(base), stored or {})


def hinted_sizes(weight: Weight, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of an entry's axes whose letters have sizes; "(c p)" has one if c and p do."""
    known = {**sizes, **dict(weight.sizes)}
    return {
        axis: math.prod(known[n] for n in axis_parts(axis))
        for axis in weight.left
        if set(axis_parts(axis)) <= set(known)
    }


def _bind_site(
    dialect: Dialect,
    keymap: KeyMap,
    match: Match,
    candidates: Sequence[tuple[str, str, int]],
    arrays: Mapping[str, Shape],
    base: Shape | None,
    hints: Mapping[str, int],
) -> ForeignSite:
    sizes = {**hints, **{axis: len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"]}}
    if base is not None:
        sizes = axis_sizes(match, base)
    tried: list[str] = []
    fits: list[ForeignSite] = []
    for path_a, path_b, number in candidates:
        pair = dialect.pairs[number]
        for dims_a, dims_b in layouts(pair, match.weight, dialect.shares):
            known = _solve_sizes(((dims_a, arrays[path_a]), (dims_b, arrays[path_b])), sizes)
            tried.append(f"A ({_layout_text(dims_a)}), B ({_layout_text(dims_b)})")
            if known is not None:
                a, b = (
                    _bind_array(keymap, match, tensor, path, arrays[path], dims, known)
                    for tensor, path, dims in zip(_lora_tensors(match), (path_a, path_b), (dims_a, dims_b), strict=True)
                )
                fits.append(ForeignSite(match, a, b, tuple(sorted(known.items()))))
    if not fits:
        path_a, path_b, _ = candidates[0]
        shape = "" if base is None else f" beside {match.leaf} {base}"
        raise KeyMapError(
            f"{path_a} {arrays[path_a]} and {path_b} {arrays[path_b]}{shape} with axes"
            f" ({' '.join(match.weight.left)}): expected {' or '.join(tried) or 'another kind of weight'}"
        )
    # Several layouts of one shape may be equivalent (an axis of size 1). Otherwise the shapes are ambiguous.
    different = {(g.a.form, g.b.form) for g in fits}
    if len(different) > 1:
        raise KeyMapError(
            f"{fits[0].a.path} {fits[0].a.form.packed} and {fits[0].b.path} {fits[0].b.form.packed} are"
            f" ambiguous between {len(different)} layouts: {' or '.join(tried)}. Pass the whole tree, with its"
            " base weights"
        )
    return fits[0]


def _layout_text(dims: Dims) -> str:
    return " ".join(f"({' '.join(d)})" if len(d) != 1 else "".join(d).strip("~") for d in dims)


def _solve_sizes(pairs: Sequence[tuple[Dims, Shape]], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Return all axis sizes that follow from the arrays' shapes; None if these contradict each other or `sizes`."""
    known = dict(sizes)
    for _ in range(2):  # sizes from the second array may split an axis of the first
        for dims, shape in pairs:
            if len(dims) != len(shape):
                return None
            for dim, size in zip(dims, shape, strict=True):
                unknown = [n for n in dim if n not in known]
                rest = math.prod(known[n] for n in dim if n in known)
                if len(unknown) == 1 and rest and size % rest == 0:
                    known[unknown[0]] = size // rest
                elif not unknown and rest != size:
                    return None
    return known


def _lora_tensors(match: Match) -> tuple[MethodTensor, MethodTensor]:
    """Return PEFT's two tensors of a site. Their rank is a symbolic axis, so its value in the config is arbitrary."""
    config = LoraConfig(r=1)
    a, b = get_method(config).tensors(config, Target(match))
    return a, b


def _bind_array(
    keymap: KeyMap, match: Match, tensor: MethodTensor, path: str, packed: Shape, dims: Dims, sizes: Mapping[str, int]
) -> FactorArray:
    right = list(tensor_layout(match, tensor)[1])
    left: list[str] = []
    shape: list[int] = []
    for dim, size in zip(dims, packed, strict=True):
        if all(n in sizes for n in dim):
            left += dim
            shape += [sizes[n] for n in dim]
        elif dim in right:  # flattened as in PyTorch, so that it can stay one axis
            right[right.index(dim)] = (" ".join(dim),)
            left.append(" ".join(dim))
            shape.append(size)
        else:
            raise KeyMapError(
                f"{path} {packed} has {' and '.join(dim)} of {match.leaf!r} flattened into one axis, in another order"
                " than PyTorch, and their sizes are not known. Pass the whole tree, with its base weights"
            )
    split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
    missing = [n for n in match.braced if n not in left]
    texts = index_entries(match.weight, [left[i] for i in split] + missing, sizes)
    modules = tuple(match.module(text) for _, text in texts)
    keys = tuple(tensor_key(keymap, match, tensor, text) for _, text in texts)
    try:
        factor = scale_factor(keymap, match, tensor, sizes)
    except KeyError as error:
        raise KeyMapError(
            f"{path}: PyTorch's {match.leaf!r} is scaled by the size of an axis, which its LoRA leaves do not"
            " show. Pass"
            " the whole tree, with its base weights"
        ) from error
    shared = math.prod(sizes[n] for n in missing)
    form = PackedLayout(
        tuple(shape), tuple(left), tuple(right), split, factor, match.weight.sizes, packed=packed, shared=shared
    )
    return FactorArray(path, form, keys, modules)


# ---------------------------------------------------------------- config


_DEFAULT = LoraConfig()


def missing_alpha(dialect: Dialect) -> ConfigError:
    """Return the error for a missing scale."""
    return ConfigError(
        f"the alpha of this tree is unknown: {dialect.name} scales by alpha/r and stores no alpha. Pass"
        f" {dialect.scale}, for example jaxadapt.models.LoraTree(tree, lora_alpha=16) instead of the tree (jaxadapt"
        " convert: --lora-alpha 16)"
    )


def resolve_alpha(config: Config | None, lora_alpha: float | None) -> float | None:
    """Return the alpha passed in `lora_alpha` or in a configuration; raise `ConfigError` if the two differ."""
    from_config = (config or _DEFAULT).get("lora_alpha")
    from_config = None if from_config == _DEFAULT.lora_alpha else from_config
    if lora_alpha is not None and from_config not in (None, lora_alpha):
        raise ConfigError(
            f"lora_alpha={lora_alpha} contradicts lora_alpha={from_config} of the configuration; pass one of them"
        )
    return from_config if lora_alpha is None else lora_alpha


def infer_config(sites: ForeignSites, config: Config | None = None, lora_alpha: float | None = None) -> LoraConfig:
    """Return the configuration of a tree's LoRA leaves, completed with the caller's values.

    Args:
        config: fields that the tree does not show (task type, dropout, …). Fields at PEFT's default (r=8,
            lora_alpha=8, target_modules=None) count as unset if the tree or the dialect defines them.
        lora_alpha: only the alpha, instead of `config`.

    Raises `ConfigError` if the alpha is unknown, or `config` or `lora_alpha` contradicts the tree.
    """
    if config is not None and not isinstance(config, LoraConfig):
        raise ConfigError(
            f"expected a LoraConfig, because {sites.dialect.name} trains LoRA, found {type(config).__name__}"
        )
    dialect, stored = sites.dialect, sites.alphas
    problems: list[str] = []
    given = resolve_alpha(config, lora_alpha)
    if not stored and config is None and lora_alpha is None:
        raise missing_alpha(dialect)
    config = config or LoraConfig()
    problems += _unsupported(config, dialect)
    if config.rank_pattern or config.r != _DEFAULT.r:
        problems += _contradictions("rank", sites.ranks, config.rank_pattern, config.r)
    else:
        rank, pattern = _factor_patterns(sites.ranks)
        config = config.replace(r=rank, rank_pattern=pattern)
        problems += _contradictions("rank", sites.ranks, pattern, rank)
    if not stored:
        config = config.replace(lora_alpha=_DEFAULT.lora_alpha if given is None else given)
    else:
        problems += _contradicted_alphas(config, given, stored, dialect)
        alpha, pattern = _factor_patterns(stored)
        config = config.replace(lora_alpha=alpha, alpha_pattern=pattern)
        problems += _contradictions("lora_alpha", stored, pattern, alpha)
    config, target_problems = _complete_targets(sites, config)
    if problems or target_problems:
        raise ConfigError(
            f"the configuration and the {dialect.name} tree contradict each other:\n"
            + paths.bullets(problems + target_problems)
        )
    get_method(config)
    return config


def _contradicted_alphas(
    config: LoraConfig, given: float | None, stored: Mapping[str, float], dialect: Dialect
) -> list[str]:
    """Return the alphas of the tree that the caller's contradict."""
    if given is None and not config.alpha_pattern:
        return []
    default = config.lora_alpha if given is None else given
    why = "does not scale, so that lora_alpha equals the rank" if dialect.unscaled else "stores its alpha"
    differences = _contradictions("lora_alpha", stored, config.alpha_pattern, default)
    return [f"{problem} ({dialect.name} {why}; leave it out)" for problem in differences]


def _unsupported(config: LoraConfig, dialect: Dialect) -> list[str]:
    """Return what a configuration asks for that no tree of the dialect has."""
    rslora = [f"use_rslora=True, but {dialect.name} divides by r, not by its square root"] if config.use_rslora else []
    tokens = [f"{name}, but {dialect.name} adapts every token" for name in fields_set(config, "token")]
    others = fields_set(config, "tensor", "copy").items()
    return [
        *rslora,
        *tokens,
        *(f"{name}={value!r}, but {dialect.name} has no tensors for it" for name, value in others),
    ]


def _factor_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for each other value."""
    counts = collections.Counter(values.values())
    most_common = max(counts, key=lambda value: (counts[value], value))
    patterns: dict[str, Any] = {}
    for value in counts:
        if value != most_common:
            modules = sorted(m for m, v in values.items() if v == value)
            others = [m for m, v in values.items() if v != value]
            patterns |= dict.fromkeys(matching.shortest_suffixes(modules, others), value)
    return most_common, dict(sorted(patterns.items()))


def _contradictions(field: str, values: Mapping[str, Any], patterns: Mapping[str, Any], default: Any) -> list[str]:
    if not isinstance(patterns, FrozenDict):
        patterns = FrozenDict(patterns)  # its lookups do not try every pattern
    return [
        f"{module}: {field} {found:g} in the tree, {want:g} in the configuration"
        for module, found in values.items()
        if (want := find_pattern_value(patterns, module, default)) != found
    ]


def _complete_targets(sites: ForeignSites, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """Return the configuration with target_modules, and the problems of the target_modules passed in it."""
    adapted = list(sites.ranks)
    config = with_layout(config, sites.keymap, [guest.match for guest in sites.sites])
    if config.target_modules is None or matching.is_all_linear(config):
        others = sites.modules - set(adapted)
        # Without the base, a short name might also match other modules.
        names = matching.shortest_suffixes(sorted(adapted), others) if sites.modules else sorted(adapted)
        return config.replace(target_modules=names), []
    unnamed = [m for m in adapted if not matching.is_target(config, m)]
    left_out = [f"{m}: adapted in the tree, but not in target_modules" for m in unnamed]
    empty = [
        f"{m}: in target_modules, but has no LoRA leaves in the tree"
        for m in sorted(sites.modules - set(adapted))
        if matching.is_target(config, m)
    ]
    return config, left_out + empty


def scale_ratios(sites: ForeignSites, config: Config, lora_alpha: float | None) -> dict[str, float]:
    """Return `{module: the file's scale / the tree's scale}` of the tree's modules that the file adapts.

    Raises `ConfigError` if the tree's scale is unknown.
    """
    dialect = sites.dialect
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"cannot store a {config.peft_type} adapter in {dialect.name} leaves: they hold only LoRA")
    get_method(config)
    if unsupported := fields_set(config, "tensor", "copy"):
        raise ConfigError(
            f"cannot store this adapter in {dialect.name} leaves: they hold only A and B, and it has"
            f" {', '.join(unsupported)}"
        )
    if fields_set(config, "token"):
        raise ConfigError(
            f"cannot store this adapter in {dialect.name} leaves: alora_invocation_tokens limits it to some tokens, and"
            f" {dialect.name} adapts every token"
        )
    _require_alphas(sites, config, lora_alpha)
    out: dict[str, float] = {}
    for module, rank in sites.ranks.items():
        if matching.is_target(config, module):
            ratio = config.scale_of(module) / (sites.alphas.get(module, lora_alpha or 0.0) / rank)
            out[module] = 1.0 if abs(ratio - 1) < 2**-23 else ratio  # equal in float32
    return out


def _require_alphas(sites: ForeignSites, config: LoraConfig, lora_alpha: float | None) -> None:
    """Raise `ConfigError` unless the alpha of each site is known, by one of the tree and the caller, and not 0."""
    dialect, stored = sites.dialect, sites.alphas
    contradicting = sorted({alpha for alpha in stored.values() if lora_alpha not in (None, alpha)})
    if contradicting:
        why = "does not scale, so that it equals the rank" if dialect.unscaled else "stores its own"
        raise ConfigError(
            f"lora_alpha={lora_alpha} contradicts the tree: {dialect.name} {why}, {contradicting}; leave it out"
        )
    if not stored and lora_alpha is None:
        r, alpha = config.r, config.lora_alpha
        raise ConfigError(f"{missing_alpha(dialect)}\n(The file has lora_alpha={alpha:g}, r={r}.)")
    if not all(stored.values()) or lora_alpha == 0:
        raise ConfigError(
            f"cannot store an adapter in {dialect.name} leaves with lora_alpha=0, which multiplies them by 0"
        )
