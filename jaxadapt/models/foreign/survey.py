"""The LoRA sites of a foreign tree: the axes and the PEFT keys of each array, and the configuration that they imply.

The sites are bound to a family's keymap, from a tree's arrays or, for a tree to create, from a file's tensors. The
configuration is inferred from the tree, and completed with the user's values. Uses only names and shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxadapt.arrays.layout import RANK, Array, FileLayout, axis_parts
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.lora import LoraConfig, fields_set
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError, bullets, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries, with_layout
from jaxadapt.keymaps.weight import EXPERTS, MethodTensor, Weight, template_regex
from jaxadapt.methods.base import Shape, Target, get_method
from jaxadapt.models.foreign import Claim, Dialect, Dims, Pair, layouts
from jaxadapt.models.foreign.forms import head_axes, stored_alpha

# ---------------------------------------------------------------- sites


@dataclasses.dataclass(frozen=True)
class PackedLayout(FileLayout):
    """The layout of an array that may have flattened axes.

    `packed` is the array's shape in its tree, `shape` its shape with all axes separate.
    """

    packed: Shape = ()

    def encode(self, leaf: Array, i: int) -> Array:
        return super().encode(leaf.reshape(self.shape), i)

    @functools.cached_property
    def file_rank(self) -> int:
        """The position of the rank's axis in the file's tensors."""
        return self.right.index((RANK,))


@dataclasses.dataclass(frozen=True)
class FactorArray(plan.PlanEntry):
    """One array of a site, A or B, with its keys and their PyTorch modules.

    Each subarray (over `form.split`) stands for `shared` tensors of the file.
    """

    form: PackedLayout
    modules: tuple[str, ...] = ()

    @property
    def shared(self) -> int:
        return len(self.keys) // self.form.count

    @property
    def rank(self) -> int:
        return self.shape[self.form.rank_axis]


@dataclasses.dataclass(frozen=True)
class ForeignSite:
    """One site of a foreign tree: its base leaf and its two arrays.

    Attributes:
        base_shape: the shape of the base leaf; None if it does not follow from the arrays.
        alpha: the alpha by which the library scales; None if neither the tree nor the dialect defines it.
        growth: the rank over that of the arrays in the tree, if the As of heads are concatenated.
    """

    match: Match
    a: FactorArray
    b: FactorArray
    base_shape: Shape | None
    alpha: float | None = None
    growth: float = 1


@dataclasses.dataclass(frozen=True)
class ForeignSites:
    """All LoRA sites of a foreign tree, with its dialect, keymap and base weights.

    `real` is the keymap with one name for all experts of a layer, if `keymap` has one for each expert
    (`experts.per_expert_keymap`). `unread` says why the scale of some sites cannot be read.
    """

    dialect: Dialect
    keymap: KeyMap
    sites: tuple[ForeignSite, ...]
    base: Mapping[str, Shape]
    real: KeyMap | None = None
    unread: Sequence[str] = ()

    @property
    def own_keymap(self) -> KeyMap:
        """The keymap of the tree, with one name for all experts of a layer if it has them in one array."""
        return self.real or self.keymap

    @functools.cached_property
    def arrays(self) -> list[FactorArray]:
        """The arrays of all sites, A before B."""
        return [half for site in self.sites for half in (site.a, site.b)]

    @functools.cached_property
    def plan(self) -> plan.Plan:
        """The bijection of arrays and file keys; a shared array has one key for each module that shares it."""
        return plan.make_plan(self.arrays)

    @functools.cached_property
    def site_of(self) -> dict[str, ForeignSite]:
        """`{module: its site}` of every PyTorch module that the tree adapts."""
        return {m: site for site in self.sites for m in site.a.modules}

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """`{module: rank}` of the same modules."""
        return {m: site.a.rank for m, site in self.site_of.items()}

    @property
    def lacks_alpha(self) -> bool:
        """True if the caller must pass the alpha of some sites."""
        return any(site.alpha is None for site in self.sites)

    @property
    def defines_alpha(self) -> bool:
        """True if the tree or the dialect defines the alpha of every site, so that the caller need not pass it."""
        return not self.lacks_alpha and not any(pair.unscaled for pair in self.dialect.pairs)

    def alphas(self, given: Callable[[str], float]) -> dict[str, float]:
        """Return `{module: alpha}`, with `given(module)` where neither the tree nor the dialect defines it."""
        return {
            m: given(m) * site.growth if site.alpha is None else site.alpha
            for site in self.sites
            for m in site.a.modules
        }

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All modules of the base in the keymap, adapted or not; empty without a base."""
        matches = ((self.keymap.match(leaf), shape) for leaf, shape in self.base.items())
        modules = (
            match.modules(plan.axis_sizes(match, shape))
            for match, shape in matches
            if match and len(match.weight.left) == len(shape) and match.weight.key.rpartition(".")[2] == "weight"
        )
        return frozenset(name for names in modules for name in names.values())


def survey_sites(
    dialect: Dialect,
    keymap: KeyMap,
    arrays: Mapping[str, Shape],
    base: Mapping[str, Shape],
    stored: Mapping[str, Any] = MappingProxyType({}),
    sizes: Mapping[str, int] = MappingProxyType({}),
    growth: Mapping[str, float] = MappingProxyType({}),
) -> ForeignSites:
    """Bind the LoRA arrays of a tree, `{path: shape}`, to a family's keymap.

    Args:
        base: `{the family's path of a base leaf: shape}`; empty if the tree has only LoRA leaves.
        stored: `{base leaf: alpha or scale}`, if the tree stores it.
        sizes: `{letter of the keymap's patterns: size}` of axes, if `base` is empty.
        growth: `{base leaf: `ForeignSite.growth`}` where it is not 1.

    Raises one `KeyMapError` with every leaf that no entry of the keymap matches, or whose shape matches no layout of
    the dialect.
    """
    out: list[ForeignSite] = []
    problems: list[str] = []
    for leaf, candidates in dialect.claim(arrays).items():
        match = keymap.match(leaf)
        if match is None:
            names = sorted({path for claim in candidates for path in (claim.a, claim.b)})
            problems.append(f"{', '.join(names)}: the keymap {keymap.name!r} has no entry for {leaf!r}")
            continue
        try:
            site = _bind_site(
                dialect, keymap, match, candidates, arrays, base.get(leaf), _known_sizes(match, base.get(leaf), sizes)
            )
        except KeyMapError as error:
            problems.append(str(error))
            continue
        pair, grown, alpha = candidates[0].pair, growth.get(leaf, 1), None
        if dialect.unscaled or pair.unscaled:
            alpha = site.a.rank
        elif leaf in stored:
            alpha = stored_alpha(pair, stored[leaf], round(site.a.rank / grown)) * grown
        out.append(dataclasses.replace(site, alpha=alpha, growth=grown))
    raise_listed(
        KeyMapError,
        f"these {dialect.name} LoRA parameters have no exact equivalent in a PEFT file:",
        problems,
        "\nPass the model's family as keymap=, or a KeyMap with an entry for each base weight",
    )
    return ForeignSites(dialect, keymap, tuple(out), dict(base))


def _known_sizes(match: Match, base: Shape | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of a weight's axes: those of its base leaf, or those of fused axes and of letters with sizes.

    "(c p)" has a size if c and p have one.
    """
    weight = match.weight
    if base is not None:
        return plan.axis_sizes(match, base)
    letters = {**sizes, **dict(weight.sizes), "{place}": weight.places}
    hinted = {axis: [letters.get(n) for n in axis_parts(axis)] for axis in weight.left}
    fused = {axis: len(weight.index_names(axis) or ()) for axis in match.roles["fused"]}
    return {axis: math.prod(filter(None, found)) for axis, found in hinted.items() if all(found)} | fused


def _bind_site(
    dialect: Dialect,
    keymap: KeyMap,
    match: Match,
    candidates: Sequence[Claim],
    arrays: Mapping[str, Shape],
    base: Shape | None,
    sizes: Mapping[str, int],
) -> ForeignSite:
    tried: list[str] = []
    fits: list[ForeignSite] = []
    for claim in candidates:
        for dims_a, dims_b in layouts(claim.pair, match.weight, dialect.shares):
            tried.append(f"A ({_layout_text(dims_a)}), B ({_layout_text(dims_b)})")
            given = (claim.a, dims_a), (claim.b, dims_b)
            known = _solve_sizes([(dims, arrays[path]) for path, dims in given], sizes)
            if known is not None:
                tensors = get_method(_DEFAULT).tensors(_DEFAULT, Target(match))  # their rank is a symbolic axis
                a, b = (
                    _bind_array(keymap, match, tensor, path, arrays[path], dims, known)
                    for tensor, (path, dims) in zip(tensors, given, strict=True)
                )
                shape = (
                    tuple(known[axis] for axis in match.weight.left) if known.keys() >= {*match.weight.left} else None
                )
                fits.append(ForeignSite(match, a, b, shape))
    if not fits:
        path_a, path_b = candidates[0].a, candidates[0].b
        beside = "" if base is None else f" beside {match.leaf} {base}"
        raise KeyMapError(
            f"{path_a} {arrays[path_a]} and {path_b} {arrays[path_b]}{beside} with axes"
            f" ({' '.join(match.weight.left)}): expected {' or '.join(tried) or 'another kind of weight'}"
        )
    # Several layouts of one shape may be equivalent (an axis of size 1). Otherwise the shapes are ambiguous.
    different = {(site.a.form, site.b.form) for site in fits}
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
    if any(len(dims) != len(shape) for dims, shape in pairs):
        return None
    for dims, shape in (*pairs, *pairs):  # sizes from the second array may split an axis of the first
        for dim, size in zip(dims, shape, strict=True):
            unknown = [n for n in dim if n not in known]
            rest = math.prod(known[n] for n in dim if n in known)
            if (rest and size % rest) or (not unknown and rest != size):
                return None
            if len(unknown) == 1 and rest:
                known[unknown[0]] = size // rest
    return known


def _bind_array(
    keymap: KeyMap, match: Match, tensor: MethodTensor, path: str, packed: Shape, dims: Dims, sizes: Mapping[str, int]
) -> FactorArray:
    right = list(plan.tensor_layout(match, tensor)[1])
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
    texts = index_entries(match.weight, missing + [left[i] for i in split], sizes)
    try:
        factor = plan.scale_factor(keymap, match, tensor, sizes)
    except KeyError as error:
        raise KeyMapError(
            f"{path}: PyTorch's {match.leaf!r} is scaled by the size of an axis, which its LoRA parameters do not show."
            " Pass the whole tree, with its base weights"
        ) from error
    form = PackedLayout(tuple(shape), tuple(left), tuple(right), split, factor, match.weight.sizes, packed=packed)
    return FactorArray(
        path,
        form,
        tuple(plan.tensor_key(keymap.prefix, match, tensor, text) for _, text in texts),
        tuple(match.module(text) for _, text in texts),
    )


# ---------------------------------------------------------------- trees to create


def find_adapted_leaves(
    keymap: KeyMap, modules: Mapping[str, tuple[Shape, Shape]], leaves: Mapping[str, Shape] | None = None
) -> dict[str, dict[str, Mapping[str, str]]]:
    """Return the base leaves of a family that hold the weights of these PyTorch modules.

    Args:
        modules: `{module: (shape of A, shape of B)}` in the file.
        leaves: the base leaves of the target, `{leaf: shape}`, if known. They decide between entries that match the
            same module.

    Returns `{base leaf: {module: {axis: text}}}` with the texts of the leaf's braced axes. Raises one `KeyMapError`
    with every module that no entry, or several entries, match.
    """
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for module, w in itertools.product(modules, keymap.weights):
        texts = w.match_key(f"{module}.weight") if w.kind == "linear" else None
        if texts is not None and (leaf := _find_leaf(keymap, w, texts, leaves)):
            found.setdefault(leaf, {})[module] = texts
    # The parts of a fused leaf have one size, so an entry that fuses q, k and v is wrong if their shapes differ.
    sizes = {leaf: {(modules[m][0][1], modules[m][1][0]) for m in texts} for leaf, texts in found.items()}
    found = {leaf: texts for leaf, texts in found.items() if len(sizes[leaf]) == 1}
    raise_listed(
        KeyMapError,
        f"the keymap {keymap.name!r} does not map each of these modules to one base weight:",
        [
            f"{module}: matches {', '.join(hits)}" if hits else f"{module}: no entry matches"
            for module in modules
            if len(hits := [leaf for leaf, texts in found.items() if module in texts]) != 1
        ],
        "\nIf several weights match, or if PyTorch's names do not tell a weight's whole path (Keras numbers the blocks"
        " of experts), pass a file of the target's shapes (--like)",
    )
    return found


def _find_leaf(keymap: KeyMap, w: Weight, texts: Mapping[str, str], leaves: Mapping[str, Shape] | None) -> str:
    """Return the leaf of an entry's weight: one of `leaves`, or of the layers that the keymap counts; "" if none is."""
    leaf = w.fill_leaf(texts)
    if not leaves:
        limits = {entry.layers: n for counted, n in keymap.counts for entry in keymap.weights if entry.leaf == counted}
        is_layer = "l" not in texts or w.model_number("l", texts) < limits.get(w.layers, math.inf)
        return leaf if is_layer and "{" not in leaf else ""
    if "{" in leaf:  # PyTorch's name does not tell a part of the path
        leaf = next(filter(template_regex(leaf, {}).fullmatch, leaves), "")
    sizes = dict(zip(w.left, leaves.get(leaf, ()), strict=False))
    stack = [axis for axis in w.roles["stack"] if axis in sizes]
    return leaf if leaf in leaves and all(w.model_number(axis, texts) < sizes[axis] for axis in stack) else ""


def blank_arrays(
    dialect: Dialect,
    keymap: KeyMap,
    leaf: str,
    shapes: Mapping[str, tuple[Shape, Shape]],
    axis_names: Mapping[str, Mapping[str, str]],
    rank: int,
    base: Shape | None,
    sizes: Mapping[str, int],
) -> dict[str, Shape]:
    """Return `{path: shape}` of the two arrays of a base leaf, in the first layout of its entry.

    Args:
        shapes: `{module: (shape of A, shape of B)}` in the file.
        axis_names: `{module: {axis: text}}` of the leaf's modules, as `find_adapted_leaves` returns it.
        base: the shape of the base leaf, if known.
        sizes: `{axis: size}` of axes that the file has flattened into one, if `base` is not known.

    Raises `KeyMapError` if a size is missing or contradicts the file.
    """
    match, lora_paths = keymap.match(leaf), dialect.paths(leaf)
    if match is None or lora_paths is None:
        raise KeyMapError(f"cannot store the LoRA of {leaf!r}: {dialect.name} has no path for it")
    weight, (path_a, path_b, pair) = match.weight, lora_paths
    choices = _possible_layouts(dialect, pair, weight)
    if not choices:
        raise KeyMapError(f"cannot store the LoRA of {leaf!r}: {dialect.name} has no layout for {weight.pattern!r}")
    a, b = next(iter(shapes[m] for m in axis_names))
    totals = {weight.roles["in"]: a[1], weight.roles["out"]: b[0]}
    known = _known_sizes(match, base, sizes)
    if base is None:
        for axis in (*weight.roles["stack"], *({EXPERTS} & set(weight.left))):
            known.setdefault(axis, 1 + max(weight.model_number(axis, texts) for texts in axis_names.values()))
        solved = _solve_sizes([((axes,), (total,)) for axes, total in totals.items()], known)
        if solved is None:
            wanted = " and ".join(f"{' '.join(axes)} must multiply to {total}" for axes, total in totals.items())
            raise KeyMapError(f"{leaf!r}: by the file the axes {wanted}, which contradicts the sizes {known}")
        known = solved
    known[RANK] = rank
    # If axes are flattened in another order than in PyTorch, filling the tree needs their sizes and raises an error.
    flat_sizes = {frozenset(axes): size for axes, size in totals.items()}

    def size_of(path: str, dim: tuple[str, ...]) -> int:
        unknown = [n for n in dim if n not in known]
        if unknown and frozenset(dim) not in flat_sizes:
            raise KeyMapError(
                f"{path}: the size of axis {unknown[0]!r} of {weight.pattern!r} does not follow from the file; pass"
                f" it (--axis {unknown[0]}=…), or a file of the target's shapes (--like)"
            )
        return flat_sizes[frozenset(dim)] if unknown else math.prod(known[n] for n in dim)

    return {
        path: tuple(size_of(path, dim) for dim in dims) for path, dims in zip((path_a, path_b), choices[0], strict=True)
    }


def _possible_layouts(dialect: Dialect, pair: Pair, weight: Weight) -> list[tuple[Dims, Dims]]:
    """Return the layouts in which a dialect may hold any file's tensors of a weight."""
    if dialect.heads == "shared" and head_axes(weight, True):
        *rest, last = ((axis,) for axis in weight.left)
        return [] if weight.stack else [((*rest, (RANK,)), ((RANK,), last))]
    if dialect.heads == "own":
        *rest, first, last = ((axis,) for axis in weight.left)
        return [((*rest, first, (RANK,)), (*rest, (RANK,), last))]
    choices = layouts(pair, weight, dialect.shares)
    return [both for both in choices if all((EXPERTS,) in dims for dims in both)] or choices  # these hold any file


def respell_modules(source: KeyMap, target: KeyMap, modules: Sequence[str]) -> dict[str, str]:
    """Return `{module: its name in another spelling of the same keymap}`."""
    entries = [pair for pair in zip(source.weights, target.weights, strict=False) if pair[0].leaf == pair[1].leaf]
    names = paths.group(
        (module, new.fill_key(texts).removesuffix(".weight"))
        for module, (old, new) in itertools.product(modules, entries)
        if (texts := old.match_key(f"{module}.weight")) is not None
    )
    raise_listed(
        KeyMapError,
        f"cannot rename these modules: no entry of {source.name!r} matches them, or {target.name!r} is another family:",
        [module for module in modules if module not in names],
        "\n`jaxadapt rename` renames them by the beginning of their names, or as in a base",
    )
    return {module: first for module, (first, *_) in names.items()}


# ---------------------------------------------------------------- config


_DEFAULT = LoraConfig()


def _require_alpha(sites: ForeignSites, is_given: bool, note: str = "") -> None:
    """Raise `ConfigError` if the alpha of some sites is unknown and the caller has not given it."""
    dialect = sites.dialect
    why = f", and its scale cannot be read:\n{bullets(sites.unread)}\n" if sites.unread else " and stores no alpha. "
    if sites.lacks_alpha and not is_given:
        raise ConfigError(
            f"the alpha of this tree is unknown: {dialect.name} scales by alpha/r{why}Pass {dialect.scale}, for example"
            " jaxadapt.models.LoraTree(tree, lora_alpha=16) instead of the tree (jaxadapt convert: --lora-alpha 16)"
            + note
        )


def _resolve_alpha(config: Config | None, lora_alpha: float | None) -> float | None:
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
    dialect, given = sites.dialect, _resolve_alpha(config, lora_alpha)
    # A scale that is there but cannot be read is not the default of a configuration.
    _require_alpha(sites, given is not None or (config is not None and not sites.unread))
    config = config or _DEFAULT
    problems = _unsupported(config, dialect)
    if config.use_rslora:
        problems.append(f"use_rslora=True, but {dialect.name} divides by r, not by its square root")
    if not config.rank_pattern and config.r == _DEFAULT.r:
        rank, pattern = _factor_patterns(sites.ranks)
        config = config.replace(r=rank, rank_pattern=pattern)
    problems += _contradictions("rank", sites.ranks, config.rank_of)
    config = config.replace(lora_alpha=_DEFAULT.lora_alpha if given is None else given)
    alphas = sites.alphas(config.alpha_of)
    if differences := _contradictions("lora_alpha", alphas, config.alpha_of):
        if not sites.defines_alpha:
            problems += _named_in_vain(sites, config)
        elif given is not None or config.alpha_pattern:
            problems += [f"{each} ({dialect.name} {_why_known(dialect)}; leave it out)" for each in differences]
        alpha, pattern = _factor_patterns(alphas)
        config = config.replace(lora_alpha=alpha, alpha_pattern=pattern)
        problems += _contradictions("lora_alpha", alphas, config.alpha_of)
    config, target_problems = _complete_targets(sites, config)
    raise_listed(
        ConfigError,
        f"the configuration and the {dialect.name} tree contradict each other:",
        problems + target_problems,
    )
    get_method(config)  # raises for a field that LoRA would ignore
    return config


def _named_in_vain(sites: ForeignSites, config: LoraConfig) -> list[str]:
    """Return the modules whose alpha the library defines and the configuration's patterns contradict.

    (Its `lora_alpha` is for the others.)
    """
    defined = {m: site.alpha for site in sites.sites if site.alpha is not None for m in site.a.modules}
    named = _contradictions("lora_alpha", defined, lambda m: find_pattern_value(config.alpha_pattern, m, defined[m]))
    return [f"{each} ({sites.dialect.name} defines it; leave it out of alpha_pattern)" for each in named]


def _why_known(dialect: Dialect) -> str:
    """Return why the alpha of a tree is known, for messages."""
    return "does not scale, so that lora_alpha equals the rank" if dialect.unscaled else "stores its alpha"


def _unsupported(config: LoraConfig, dialect: Dialect) -> list[str]:
    """Return the settings of a configuration for which no tree of the dialect has tensors."""
    return [
        *(f"{name}, but {dialect.name} adapts every token" for name in fields_set(config, "token")),
        *(
            f"{name}={value!r}, but {dialect.name} has no tensors for it"
            for name, value in fields_set(config, "tensor", "copy").items()
        ),
    ]


def _factor_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for each other value."""
    counts = collections.Counter(values.values())
    most_common = max(counts, key=lambda value: (counts[value], value))
    patterns: dict[str, Any] = {}
    for value in counts.keys() - {most_common}:
        modules = sorted(m for m, v in values.items() if v == value)
        others = [m for m, v in values.items() if v != value]
        patterns |= dict.fromkeys(matching.shortest_suffixes(modules, others), value)
    return most_common, dict(sorted(patterns.items()))


def _contradictions(field: str, values: Mapping[str, float], wanted: Callable[[str], float]) -> list[str]:
    """Return the modules whose value in the tree is not the one that the configuration has for them."""
    return [
        f"{module}: {field} {found:g} in the tree, {wanted(module):g} in the configuration"
        for module, found in values.items()
        if wanted(module) != found
    ]


def _complete_targets(sites: ForeignSites, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """Return the configuration with target_modules, and the problems of the target_modules passed in it."""
    adapted = list(sites.ranks)
    config = with_layout(config, sites.keymap, [guest.match for guest in sites.sites])
    if config.target_modules is None or matching.is_all_linear(config):
        names = sorted(adapted)
        if sites.modules:  # without the base, a short name might also match other modules
            names = matching.shortest_suffixes(names, sites.modules - set(adapted))
        return config.replace(target_modules=names), []
    left_out = [
        f"{m}: adapted in the tree, but not in target_modules" for m in adapted if not matching.is_target(config, m)
    ]
    empty = [
        f"{m}: in target_modules, but has no LoRA parameters in the tree"
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
        raise ConfigError(
            f"cannot store a {config.peft_type} adapter in {dialect.name} parameters: they hold only LoRA"
        )
    get_method(config)
    raise_listed(
        ConfigError,
        f"cannot store this adapter in {dialect.name} parameters, which hold only A and B; the adapter has:",
        _unsupported(config, dialect),
    )
    alphas = {
        module: alpha
        for module, alpha in sites.alphas(lambda _: lora_alpha or 0.0).items()
        if matching.is_target(config, module)
    }
    contradicting = sorted(
        {alpha for alpha in alphas.values() if sites.defines_alpha and lora_alpha not in (None, alpha)}
    )
    if contradicting:
        raise ConfigError(
            f"lora_alpha={lora_alpha} contradicts the tree: {dialect.name} {_why_known(dialect)}, {contradicting};"
            " leave it out"
        )
    _require_alpha(sites, lora_alpha is not None, f"\n(The file has lora_alpha={config.lora_alpha:g}, r={config.r}.)")
    if not all(alphas.values()):
        raise ConfigError(
            f"cannot store an adapter in {dialect.name} parameters with lora_alpha=0, which multiplies them by 0"
        )
    ratios = {module: config.scale_of(module) / (alpha / sites.ranks[module]) for module, alpha in alphas.items()}
    return {module: 1.0 if abs(ratio - 1) < 2**-23 else ratio for module, ratio in ratios.items()}  # equal in float32
