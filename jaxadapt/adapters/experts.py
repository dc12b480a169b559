"""Leaves that are parts of one tensor in PyTorch, and LoRA for each expert: joined and split for files.

PEFT's adapter of queries, keys and values in one tensor, or of gate and up, has one A for all parts, or one B where
A reads the parts (`keymaps.plan` names and cuts the parts). Here each leaf has its own, and a file's shared factor
is read into all of them. They are equal only until they are trained. To save trained ones, their ranks are
concatenated, which computes the same: A' = [Aq; Ak; Av], B' = diag(Bq, Bk, Bv).

transformers 5 holds all experts of a layer in one parameter, with gate and up in its halves. PEFT names these
parameters in `target_parameters`. For transformers 4 it wrote one LoRA for each expert. A keymap lists the modules
of the single experts (`KeyMap.expert_modules`).

    {"…experts.3.up_proj.lora_A.weight": …} ──fuse_experts───► {"…experts.base_layer.lora_A.weight": …}
                                            ◄──split_experts──

A's rows are in the order (expert, rank), B's columns in the order (rank, expert). Gate and up share one A there. If
theirs are equal, they stay unchanged. Otherwise their ranks are concatenated, at twice the rank, which computes the
same (on loading, PEFT always does so: `utils/transformers_weight_conversion.py`). A model with gate and up in two
leaves needs neither.

Pure: it works on anything with reshape and transpose.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Site, adapted_modules
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import Array, cut_parts, file_key, group_by_file_key, join_parts, parse_part_key, part_key
from jaxadapt.keymaps.weight import Weight, name_regex

# ---------------------------------------------------------------- parts of one tensor


def join_tensors(
    config: Config, sites: Sequence[Site], tensors: Mapping[str, Array], on_shared: str | None
) -> tuple[Config, dict[str, Array]]:
    """Return a plan's tensors as the file holds them, and the configuration for them.

    Args:
        sites: the sites of the tensors.
        on_shared: "concat" concatenates As (or Bs) that differ, which multiplies the rank by the number of parts.

    Raises `MismatchError` if they differ and `on_shared` is None, or if parts are missing.
    """
    groups = group_by_file_key(tensors)
    parts_of = {name: parts for name, parts in groups.items() if name not in tensors}
    first = {name: parse_part_key(parts[0]) for name, parts in parts_of.items()}
    raise_listed(
        MismatchError,
        "some tensors are incomplete, since the adapter holds only some of their parts. Save all parts of each:",
        [name for name, part in first.items() if len(parts_of[name]) != part.n],
    )
    different = [
        name
        for name, part in first.items()
        if part.axis is None and not bitwise_equal([tensors[key] for key in parts_of[name]])
    ]
    growth_factors = ", ".join(map(str, sorted({first[name].n for name in different})))
    raise_listed(
        MismatchError,
        "PEFT stores one A for several weights (queries, keys and values in one module; gate and up in one, or of"
        " experts) or one B (experts of Llama 4), but these tensors differ between the weights (or cannot be"
        " compared inside jit):",
        different if on_shared is None else (),
        '\nPass jaxadapt.models.LoraTree(tree, on_shared="concat") instead of the tree: it concatenates the ranks,'
        f" which is exact, and multiplies the rank by {growth_factors}. For experts,"
        " keymap='FAMILY/per-expert' writes one LoRA for each expert instead",
    )
    joined = {name: tensors[name] for name in groups if name not in parts_of} | {
        name: join_parts([tensors[key] for key in parts], parts, tensors[parts[0]].__array_namespace__())
        for name, parts in parts_of.items()
    }
    if not different:
        return config, joined
    assert isinstance(config, LoraConfig)
    places = {
        key: (site, entry, i)
        for site in sites
        for entry in site.entries
        for i, key in enumerate(entry.keys if len(entry.keys) == len(site.modules) else ())
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in different:
        site, entry, number = places[parts_of[name][0]]
        module, growth = site.modules[number], first[name].n
        ranks[module] = config.rank_of(module) * growth
        alphas[module] = config.alpha_of(module) * config.scale_divisor(growth)
        rank = dict(site.tensors[0].own)["r"] if entry.form.ranks is None else entry.form.ranks[number]
        _concatenate_module(name, rank, site.match.weight.kind == "attention", parts_of, tensors, joined)
    return _with_ranks(config, adapted_modules(sites), ranks, alphas), joined


def bitwise_equal(arrays: Sequence[Array]) -> bool:
    """Return True if the arrays are equal; False for traced arrays, whose values are unknown."""
    known = not any(isinstance(x, Tracer) for x in arrays)
    return known and all(np.array_equal(np.asarray(arrays[0]), np.asarray(x)) for x in arrays[1:])


def _concatenate_module(
    name: str,
    rank: int,
    is_attention: bool,
    parts_of: Mapping[str, list[str]],
    tensors: Mapping[str, Array],
    out: dict[str, Array],
) -> None:
    """Concatenate the ranks of one module's parts, in A and in B; in attention also those of its output projection."""
    module, dot, last = name.rpartition(".lora_")
    a, b = (f"{module}{dot}{side}{last[1:]}" for side in "AB")
    parts_a, parts_b = ([tensors[key] for key in parts_of[factor]] for factor in (a, b))
    out[a], out[b] = concatenate_ranks(rank, parts_a, parts_b, parts_of[a], parts_of[b])
    if is_attention:  # the output projection has the same rank
        padding = (len(parts_of[name]) - 1) * rank
        a, b = (f"{module}.base_layer.out_proj{dot}{side}{last[1:]}" for side in "AB")
        out[a], out[b] = (
            out[a].__array_namespace__().pad(out[a], ((0, padding), (0, 0))),
            out[b].__array_namespace__().pad(out[b], ((0, 0), (0, padding))),
        )


def concatenate_ranks(
    rank: int, a: Sequence[Array], b: Sequence[Array], keys_a: Sequence[str], keys_b: Sequence[str]
) -> tuple[Array, Array]:
    """Return one A (experts · r, in) and one B (out, r · experts) from the parts that `keys_a` and `keys_b` name.

    A factor that all parts share is concatenated along the rank. A factor of one part moves to its own range of ranks.

    >>> a, b = [np.ones((1, 3))] * 2, [np.full((2, 1), 1.0), np.full((2, 1), 2.0)]
    >>> concatenate_ranks(1, a, b, ["a[=0/2]", "a[=1/2]"], ["b[0/2]", "b[1/2]"])[1].tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    """
    xp = a[0].__array_namespace__()
    # A's rows are (expert, rank) and B's columns (rank, expert): in both reshaped forms the rank is axis 1.
    wide_a = [x.reshape(x.shape[0] // rank, rank, x.shape[1]) for x in a]
    wide_b = [x.reshape(x.shape[0], rank, x.shape[1] // rank) for x in b]
    out: list[Array] = []
    for tensors, keys, flat_shape in ((wide_a, keys_a, (-1, a[0].shape[1])), (wide_b, keys_b, (b[0].shape[0], -1))):
        if parse_part_key(keys[0]).axis is None:
            out.append(xp.concatenate(tensors, axis=1).reshape(flat_shape))
            continue
        padded = [
            xp.pad(x, ((0, 0), (i * rank, (len(a) - 1 - i) * rank), (0, 0))).reshape(flat_shape)
            for i, x in enumerate(tensors)
        ]
        out.append(join_parts(padded, keys, xp))
    return out[0], out[1]


def _with_ranks(
    config: LoraConfig, modules: Sequence[str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> LoraConfig:
    """Return the configuration with some ranks and alphas, by module or parameter, and those that `modules` have."""
    all_ranks = {module: config.rank_of(module) for module in modules} | dict(ranks)
    return config.with_ranks(all_ranks, {module: config.alpha_of(module) for module in modules} | dict(alphas))


# ---------------------------------------------------------------- expert parameters


@dataclasses.dataclass(frozen=True)
class ExpertParameter:
    """One parameter that holds all experts of a layer, and the modules of single experts that its parts correspond to.

    If a module has several parameters, PEFT wraps the first in `order` innermost. `parts` are the modules' places in
    the parameter. `split`: each part is a leaf of its own. `turned`: PEFT's A is a single expert's B (`is_transposed`).
    """

    name: str
    modules: tuple[str, ...]
    order: int
    parts: tuple[str, ...]
    split: bool
    turned: bool = False

    def keys(self, side: str) -> list[str]:
        """Return the suffix of A's or B's key for each part; no suffix for the only one."""
        shared, axis = ("B", 1) if self.turned else ("A", 0)
        parts = [part_key("", None if side == shared else axis, part) for part in self.parts]
        return parts if len(parts) > 1 else [""]

    @property
    def owner(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    def module(self, name: str, part: int, expert: int) -> str:
        """Return the module of a single expert, for a part of the parameter with the full name `name`."""
        match = name_regex(self.name).fullmatch(name)
        return self.modules[part].format(**({} if match is None else match.groupdict()), e=expert)

    def in_module(self, module: str) -> str | None:
        """Return the full name of this parameter in a module; None if the module is of another kind."""
        match = name_regex(self.owner).fullmatch(module)
        return None if match is None else self.name.format(**match.groupdict())


def list_parameters(keymap: KeyMap, layout: KeyMap | None = None) -> list[ExpertParameter]:
    """Return the expert parameters of a keymap.

    Args:
        layout: the keymap that tells the parts of the leaves, `keymap` by default.
    """
    entries = [entry for entry in (layout or keymap).weights if entry.kind == "experts"]
    parameters: list[ExpertParameter] = []
    for order, (name, modules) in enumerate(keymap.expert_modules):
        own = [entry for entry in entries if entry.file_key == name]
        parts = sorted(entry.part for entry in own if entry.part)
        places = tuple(parts or sorted(f"{part}/{len(modules)}" for part in range(len(modules))))
        parameters.append(ExpertParameter(name, modules, order, places, bool(parts), any(map(is_transposed, own))))
    return parameters


def is_transposed(entry: Weight) -> bool:
    """Return True if an entry of experts has its A on the outputs: Llama 4's, as PEFT adapts it."""
    roles = entry.torch_roles
    return entry.kind == "experts" and (roles["out"], roles["in"]) == tuple((axis,) for axis in entry.left[-2:])


# ---------------------------------------------------------------- experts


def per_expert_keymap(keymap: KeyMap) -> KeyMap:
    """Return the keymap with one module for each expert, named after the parameter, to read other libraries' trees.

    Their A and B may be one for all experts. A router becomes a Linear.

    >>> from jaxadapt.keymaps.weight import Weight
    >>> entry = Weight("w_up", "experts.gate_up[f 1/2]", "e d f -> e f d", kind="experts")
    >>> keymap = per_expert_keymap(KeyMap("tiny", (entry,)))
    >>> keymap.weights[0].key, keymap.weights[0].pattern
    ('experts.gate_up.{e}.1.weight', '{e} d f -> f d')
    """
    entries: list[Weight] = []
    modules_of: dict[str, list[str]] = {}
    for entry in keymap.weights:
        if entry.kind == "parameter":
            modules_of[entry.file_key] = [entry.module]
            options: dict[str, Any] = {**entry.options, "kind": "linear"}
            entries.append(Weight(entry.leaf, entry.key, entry.pattern, **options))
        elif entry.kind == "experts":
            (expert,) = entry.torch_roles["experts"]
            sides = ("in", "out") if is_transposed(entry) else ("out", "in")
            part = entry.part.partition("/")[0].partition(":")[0]
            module = f"{entry.file_key}.{{e}}" + (f".{part}" if part else "")
            modules_of.setdefault(entry.file_key, []).append(module)
            left = " ".join("{e}" if axis == expert else axis for axis in entry.left)
            right = " ".join(
                group[0] if len(group) == 1 else f"({' '.join(group)})"
                for group in map(entry.torch_roles.__getitem__, sides)
            )
            options: dict[str, Any] = {"kind": "linear", "scale": entry.scale, **dict(entry.sizes)}
            entries.append(Weight(entry.leaf, f"{module}.weight", f"{left} -> {right}", **options))
        else:
            entries.append(entry)
    expert_modules = tuple((name, tuple(modules)) for name, modules in modules_of.items())
    return dataclasses.replace(keymap, weights=tuple(entries), expert_modules=expert_modules, per_expert=False)


# ---------------------------------------------------------------- fuse

Fused = tuple[ExpertParameter, dict[tuple[int, int], dict[str, Array]]]
"""A parameter, and `{(part, expert): {"A": …, "B": …}}` of it."""

_SIDES = {"A.weight": "A", "B.weight": "B"}


def fuse_experts(
    tensors: PeftTensors,
    keymap: KeyMap,
    on_shared: str | None,
    model_keymap: KeyMap | None = None,
    others: Collection[str] | None = None,
    parts: bool = True,
) -> PeftTensors:
    """Return a file's adapters of single experts as adapters of parameters.

    Returns `tensors` itself if it has no such adapters, or the keymap no names for single experts.

    Args:
        keymap: the keymap with the names of single experts.
        on_shared: "concat" concatenates the ranks of gate and up where the model has one A for both.
        model_keymap: the keymap of the model, if it is another one.
        others: the parameters that are not adapted, if known.
        parts: if gate and up are two leaves, leave them as two parts.

    Raises one `MismatchError` for all experts that are missing or differ in rank or scale, and one for differing As
    that the model stores as one.
    """
    config = tensors.config
    if not keymap.expert_modules or not isinstance(config, LoraConfig):
        return tensors
    candidates = list_parameters(keymap, model_keymap)
    fused, rest = _find_factors(tensors, config, keymap, candidates)
    if not fused:
        return tensors
    ranks, alphas = _checked_ranks(config, fused, tensors.source)
    new_tensors = {key: tensors.tensors[key] for key in rest}
    for name, (parameter, factors) in fused.items():
        parameter = dataclasses.replace(parameter, split=parameter.split and parts)
        arrays, growth = _stack_factors(parameter, factors, ranks[name], on_shared, f"{tensors.source}: {name}")
        outer = (each for each in candidates if each.owner == parameter.owner and each.order > parameter.order)
        owner = name.rpartition(".")[0]
        place = f"{keymap.prefix}{owner}" + ".base_layer" * sum(each.in_module(owner) in fused for each in outer)
        new_tensors |= {f"{place}.lora_{side}.weight{bracket}": array for (side, bracket), array in arrays.items()}
        ranks[name], alphas[name] = ranks[name] * growth, alphas[name] * config.scale_divisor(growth)
    config = _with_target_parameters(config, _lora_modules(rest, keymap), ranks, alphas, others)
    return PeftTensors(config, new_tensors, tensors.source)


def _lora_modules(keys: Iterable[str], keymap: KeyMap) -> list[str]:
    """Return the modules of the keys of LoRA, each once."""
    stems = (key.removeprefix(keymap.prefix).rpartition(".lora_") for key in keys)
    return list(dict.fromkeys(module for module, dot, _ in stems if dot))


def _find_factors(
    tensors: PeftTensors, config: LoraConfig, keymap: KeyMap, candidates: Sequence[ExpertParameter]
) -> tuple[dict[str, Fused], list[str]]:
    """Return the factors of single experts by the name of their parameter, and the other keys of a file."""
    fused: dict[str, Fused] = {}
    rest: list[str] = []
    for key in tensors.tensors:
        module, _, suffix = key.removeprefix(keymap.prefix).rpartition(".lora_")
        places = ((each, pytorch.find_expert(each.name, each.modules, module)) for each in candidates)
        found = next(((each, *place) for each, place in places if place is not None), None)
        if found is None or suffix not in _SIDES or matching.is_parameter(config, found[1]):
            rest.append(key)
            continue
        parameter, name, part, expert = found
        factors = fused.setdefault(name, (parameter, {}))[1].setdefault((part, expert or 0), {})
        side, array = _SIDES[suffix], tensors.tensors[key]
        factors[{"A": "B", "B": "A"}[side] if parameter.turned else side] = array.T if parameter.turned else array
    return fused, rest


def _checked_ranks(
    config: LoraConfig, fused: Mapping[str, Fused], source: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank and the alpha of each parameter.

    Raises one `MismatchError` for everything that is missing or differs.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for name, (parameter, factors) in fused.items():
        places = itertools.product(
            range(len(parameter.modules)), pytorch.expert_numbers([expert for _, expert in factors])
        )
        modules = {place: parameter.module(name, *place) for place in places}
        complete = {place: each for place in modules if len(each := factors.get(place, {})) == len(_SIDES)}
        problems += [f"{modules[place]}: missing" for place in modules if place not in complete]
        values = {(config.rank_of(modules[place]), config.alpha_of(modules[place])) for place in complete}
        shapes = {(tuple(each["A"].shape), tuple(each["B"].shape)) for each in complete.values()}
        if len(values) > 1 or len(shapes) > 1:
            problems.append(f"{name}: its experts differ in rank, alpha or shape: {sorted(values)}, {sorted(shapes)}")
            continue
        for (rank, alpha), (a, b) in zip(values, shapes, strict=False):
            ranks[name], alphas[name] = rank, alpha
            if a[0] != rank or b[1] != rank:
                problems.append(f"{name}: expected rank {rank}, found A {a} and B {b}")
    raise_listed(
        MismatchError,
        f"{source}: the model stores all experts of a layer in one array, so the file must hold an adapter for"
        " each, with one rank, alpha and shape:",
        problems,
    )
    return ranks, alphas


def _stack_factors(
    parameter: ExpertParameter,
    factors: Mapping[tuple[int, int], Mapping[str, Array]],
    rank: int,
    on_shared: str | None,
    name: str,
) -> tuple[dict[tuple[str, str], Array], int]:
    """Return `{(side, suffix of the part): array}`, and the factor by which the rank has grown."""
    count = len(parameter.modules)
    xp = factors[0, 0]["A"].__array_namespace__()
    numbers = range(len(factors) // count)
    a = [xp.concatenate([factors[part, e]["A"] for e in numbers]) for part in range(count)]
    # (expert, out, rank) -> (out, rank, expert)
    b = [
        xp.stack([factors[part, e]["B"] for e in numbers], axis=-1).reshape(-1, rank * len(numbers))
        for part in range(count)
    ]
    sides = {side: dict(zip(parameter.keys(side), parts, strict=True)) for side, parts in (("A", a), ("B", b))}
    if parameter.split or count == 1:
        return {(side, key): array for side, parts in sides.items() for key, array in parts.items()}, 1
    shared = "B" if parameter.turned else "A"
    if bitwise_equal(list(sides[shared].values())):
        return {(side, ""): join_parts(list(parts.values()), parts, xp) for side, parts in sides.items()}, 1
    if on_shared != "concat":
        raise MismatchError(
            f"{name}: the model stores gate and up in one array with one {shared} for both, but the file has two"
            f" {shared}s, and they differ (or cannot be compared inside jit). Pass jaxadapt.models.LoraTree(model,"
            ' on_shared="concat") instead of the model (jaxadapt convert: --on-shared concat): it concatenates the'
            f" ranks of the two, which is exact, and multiplies the rank by {count}"
        )
    joint_a, joint_b = concatenate_ranks(rank, a, b, parameter.keys("A"), parameter.keys("B"))
    return {("A", ""): joint_a, ("B", ""): joint_b}, count


def _with_target_parameters(
    config: LoraConfig,
    modules: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    others: Collection[str] | None,
) -> LoraConfig:
    """Return the configuration that names parameters, and only those modules that remain."""
    if config.lora_dropout:
        warn(
            f"lora_dropout={config.lora_dropout} becomes 0: PEFT has no dropout for experts in one parameter (trained"
            " outputs do not depend on it)",
        )
    targets = config.target_modules
    if isinstance(targets, str):  # it may match the experts' modules too
        remaining: Any = list(modules)
    else:
        remaining = [
            entry
            for entry in targets or ()
            if any(module == entry or module.endswith(f".{entry}") for module in modules)
        ]
    # The last two parts of the parameters' names; the full names if not every layer is adapted.
    ends = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in ranks))
    is_partial = config.layers_to_transform is not None or isinstance(targets, str) or config.exclude_modules
    is_ambiguous = is_partial if others is None else any(name.endswith(ends) for name in others)
    parameters = [*(config.target_parameters or ()), *(ranks if is_ambiguous else ends)]
    config = config.replace(target_modules=remaining, target_parameters=parameters, lora_dropout=0.0)
    return _with_ranks(config, modules, ranks, alphas)


# ---------------------------------------------------------------- split


def split_experts(
    config: Config, tensors: Mapping[str, Array], keymap: KeyMap, model_keymap: KeyMap | None = None
) -> tuple[Config, dict[str, Array]]:
    """Return the configuration and tensors with adapters of single experts' modules, under transformers 4's names.

    Args:
        tensors: those of a plan, under the keymap's names; the parts of a tensor need not be joined.
        keymap, model_keymap: as in `fuse_experts`.

    Raises `ConfigError` if the configuration is not LoRA's.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{keymap.name}: adapters of single experts must be LoRA, found {config.peft_type}")
    parameters = list_parameters(keymap, model_keymap)
    new_tensors: dict[str, Array] = {}
    factors: dict[tuple[ExpertParameter, str], dict[str, list[Array]]] = {}
    for key in sorted(tensors):  # parts of a tensor in order
        found = _find_parameter(key, config, keymap, parameters)
        if found is None:
            new_tensors[key] = tensors[key]
            continue
        parameter, name, side = found
        names = [f"x{part}" for part in parameter.keys(side)]
        is_whole = len(names) > 1 and parse_part_key(key).n == 1
        pieces = cut_parts({"x": tensors[key]}, names) if is_whole else {"x": tensors[key]}
        sides = factors.setdefault((parameter, name), {})
        sides.setdefault(side, []).extend(pieces.values())
    if not factors:
        return config, dict(tensors)
    modules = _lora_modules(new_tensors, keymap)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    experts: dict[str, str] = {}
    for (parameter, name), sides in factors.items():
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        for part, (template, a, b) in enumerate(zip(parameter.modules, sides["A"], sides["B"], strict=True)):
            count = a.shape[0] // rank
            rows, columns = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
            for expert in range(count):
                module, one_a, one_b = parameter.module(name, part, expert), rows[expert], columns[:, :, expert]
                stem = f"{keymap.prefix}{module}.lora_"
                new_tensors[f"{stem}A.weight"] = one_b.T if parameter.turned else one_a
                new_tensors[f"{stem}B.weight"] = one_a.T if parameter.turned else one_b
                ranks[module], alphas[module] = rank, alpha
                experts[module] = template
    return _with_ranks(_with_target_modules(config, keymap, modules, experts), modules, ranks, alphas), new_tensors


def _find_parameter(
    key: str, config: LoraConfig, keymap: KeyMap, parameters: Iterable[ExpertParameter]
) -> tuple[ExpertParameter, str, str] | None:
    """Return the expert parameter of a plan's key, its full name and the side; None for another tensor."""
    module, _, suffix = file_key(key).removeprefix(keymap.prefix).rpartition(".lora_")
    owner = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.removeprefix(owner).count(".base_layer")
    adapted = [
        (each, name)
        for each in parameters
        if (name := each.in_module(owner)) is not None and matching.is_parameter(config, name)
    ]
    return (*adapted[len(adapted) - 1 - depth], _SIDES[suffix]) if suffix in _SIDES and depth < len(adapted) else None


def _with_target_modules(
    config: LoraConfig, keymap: KeyMap, other_modules: Sequence[str], experts: Mapping[str, str]
) -> LoraConfig:
    """Return the configuration that names the modules of single experts instead of parameters."""
    parameters = {name.rpartition(".")[2] for name, _ in keymap.expert_modules}
    remaining = [name for name in config.target_parameters or () if name.rpartition(".")[2] not in parameters] or None
    ends = list(dict.fromkeys(template.rpartition(".")[2] for template in experts.values()))
    targets = config.target_modules or ()
    can_list = not isinstance(targets, str) and not any(name.isdecimal() or "{" in name for name in ends)
    others = _ends_of_others(keymap, other_modules)
    if can_list and config.layers_to_transform is None and not others.intersection(ends):
        return config.replace(target_modules=[*targets, *ends], target_parameters=remaining)
    # Modules that are not adapted end in the same names: only a pattern can exclude them.
    layers = sorted({_layer_pattern(template, module) for module, template in experts.items()})
    return config.replace(
        target_modules="|".join(dict.fromkeys([*map(re.escape, other_modules), *layers])),
        target_parameters=remaining,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _ends_of_others(keymap: KeyMap, modules: Iterable[str]) -> set[str]:
    """Return the last parts of the names of modules that are no experts."""
    plain = (entry.module for entry in keymap.weights if entry.adaptable and not entry.by_parameter)
    return {name.rpartition(".")[2] for name in (*plain, *modules)}


def _layer_pattern(template: str, module: str) -> str:
    """Return a pattern for all experts of one layer."""
    match = name_regex(template).fullmatch(module)
    assert match is not None
    return re.escape(template.format(**(match.groupdict() | {"e": "{e}"}))).replace(r"\{e\}", r"\d+")
