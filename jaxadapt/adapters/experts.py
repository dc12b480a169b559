"""LoRA for each expert, as PEFT wrote it for transformers 4 (`experts.3.up_proj.lora_A.weight`): fuse and split.

transformers 5 holds all experts of a layer in one parameter, with gate and up in its halves. PEFT names these
parameters in `target_parameters`. A keymap lists the modules of the single experts (`KeyMap.expert_modules`).

    {"…experts.3.up_proj.lora_A.weight": …} ──fuse_experts───► {"…experts.base_layer.lora_A.weight": …}
                                            ◄──split_experts──

A's rows are in the order (expert, rank), B's columns in the order (rank, expert). Gate and up share one A there. If
theirs are equal, they stay unchanged. Otherwise their ranks are concatenated, at twice the rank, which computes the
same (on loading, PEFT always does so: `utils/transformers_weight_conversion.py`). A model with gate and up in two
leaves needs neither.

`expert_parameters` finds the parameters of experts in a keymap. Pure: it works on anything with reshape and transpose.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.adapters import joint_tensors, sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps import plan, pytorch
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import cut_parts, file_key, join_parts, parse_part_key, part_key
from jaxadapt.keymaps.weight import Weight, name_regex

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
        """Return the suffix of A's or B's key for each part."""
        return [part_key("", None if side == "A" else 0, part) for part in self.parts]

    @property
    def owner(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    def find(self, module: str) -> tuple[str, int, int] | None:
        """Return the full name of the parameter, the part and the expert's number for a single expert's module."""
        for part, template in enumerate(self.modules):
            match = re.fullmatch(name_regex(template), module)
            if match:
                texts = match.groupdict()
                return self.name.format(**texts), part, int(texts.get("e", 0))
        return None

    def texts(self, name: str) -> dict[str, str] | None:
        """Return the texts that fill the placeholders of the parameter's name; None for another parameter's name."""
        match = re.fullmatch(name_regex(self.name), name)
        return None if match is None else match.groupdict()

    def in_module(self, module: str) -> str | None:
        """Return the full name of this parameter in a module; None if the module is of another kind."""
        match = re.fullmatch(name_regex(self.owner), module)
        return None if match is None else self.name.format(**match.groupdict())

    def in_module_of(self, name: str) -> str:
        """Return the full name of this parameter in the module of the parameter `name`."""
        return f"{name.rpartition('.')[0]}.{self.name.rpartition('.')[2]}"


def list_parameters(keymap: KeyMap, layout: KeyMap | None = None) -> list[ExpertParameter]:
    """Return the expert parameters of a keymap.

    Args:
        layout: the keymap that tells the parts of the leaves, `keymap` by default.
    """
    parts: dict[str, list[str]] = {}
    for entry in (layout or keymap).weights:
        if entry.part and entry.kind == "experts":
            parts.setdefault(entry.file_key, []).append(entry.part)
    parameters: list[ExpertParameter] = []
    for i, (name, modules) in enumerate(keymap.expert_modules):
        default_parts = [f"{part}/{len(modules)}" for part in range(len(modules))]
        turned = any(entry.file_key == name and is_transposed(entry) for entry in (layout or keymap).weights)
        parameters.append(
            ExpertParameter(name, modules, i, tuple(sorted(parts.get(name, default_parts))), name in parts, turned)
        )
    return parameters


def is_transposed(entry: Weight) -> bool:
    """Return True if an entry of experts has its A on the outputs: Llama 4's, as PEFT adapts it."""
    roles = entry.torch_roles
    return entry.kind == "experts" and (roles["out"], roles["in"]) == tuple((axis,) for axis in entry.left[-2:])


# ---------------------------------------------------------------- experts


Array = Any
_SIDES = ("A", "B")


def expert_parameters(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the given leaves' parameters, for leaves that PEFT adapts by parameter name."""
    matches = ((keymap.match(leaf), shape) for leaf, shape in shapes.items())
    expert_matches = ((match, shape) for match, shape in matches if match is not None and match.weight.by_parameter)
    return [
        name
        for match, shape in expert_matches
        for name in sites.parameter_names(match, plan.axis_sizes(match, shape)).values()
    ]


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
            (expert,), out, inputs = entry.torch_roles["experts"], entry.torch_roles["out"], entry.torch_roles["in"]
            if is_transposed(entry):
                out, inputs = inputs, out
            part = entry.part.partition("/")[0].partition(":")[0]
            module = f"{entry.file_key}.{{e}}" + (f".{part}" if part else "")
            modules_of.setdefault(entry.file_key, []).append(module)
            left = " ".join("{e}" if axis == expert else axis for axis in entry.left)
            right = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in (out, inputs))
            options: dict[str, Any] = {"kind": "linear", "scale": entry.scale, **dict(entry.sizes)}
            entries.append(Weight(entry.leaf, f"{module}.weight", f"{left} -> {right}", **options))
        else:
            entries.append(entry)
    expert_modules = tuple((name, tuple(modules)) for name, modules in modules_of.items())
    return dataclasses.replace(keymap, weights=tuple(entries), expert_modules=expert_modules, per_expert=False)


_LOOKS_LIKE_EXPERTS = re.compile(r"\.experts\.|\.gate\.lora_")


def may_have_experts(keys: Iterable[str]) -> bool:
    """Return True if some keys look like those of adapters of experts."""
    return any(_LOOKS_LIKE_EXPERTS.search(key) for key in keys)


# ---------------------------------------------------------------- fuse

PartFactors = dict[int, dict[int, dict[str, Array]]]
"""`{part: {expert: {"A": …, "B": …}}}` of one parameter."""


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
    fused: dict[str, tuple[ExpertParameter, PartFactors]] = {}
    other_keys: list[str] = []
    for key in tensors.tensors:
        module, dot, suffix = key.removeprefix(keymap.prefix).rpartition(".lora_")
        location = (
            next(
                ((candidate, place) for candidate in candidates if (place := candidate.find(module)) is not None), None
            )
            if dot
            else None
        )
        if location is None or suffix not in ("A.weight", "B.weight") or matching.is_parameter(config, location[1][0]):
            other_keys.append(key)
            continue
        parameter, (name, part, expert) = location
        factors = fused.setdefault(name, (parameter, {}))[1]
        side, array = suffix[0], tensors.tensors[key]
        side, array = ("B" if side == "A" else "A", array.T) if parameter.turned else (side, array)
        factors.setdefault(part, {}).setdefault(expert, {})[side] = array
    if not fused:
        return tensors
    ranks, alphas = _checked_ranks(config, fused, tensors.source)
    new_tensors = {key: tensors.tensors[key] for key in other_keys}
    for name, (parameter, factors) in fused.items():
        parameter = dataclasses.replace(parameter, split=parameter.split and parts)
        arrays, growth = _stack_factors(parameter, factors, ranks[name], on_shared, f"{tensors.source}: {name}")
        outer = (
            candidate
            for candidate in candidates
            if candidate.owner == parameter.owner and candidate.order > parameter.order
        )
        depth = sum(candidate.in_module_of(name) in fused for candidate in outer)
        place = f"{keymap.prefix}{parameter.owner.format(**(parameter.texts(name) or {}))}{'.base_layer' * depth}"
        new_tensors |= {f"{place}.lora_{side}.weight{bracket}": array for (side, bracket), array in arrays.items()}
        ranks[name], alphas[name] = ranks[name] * growth, alphas[name] * config.scale_divisor(growth)
    modules = dict.fromkeys(
        key.removeprefix(keymap.prefix).rpartition(".lora_")[0] for key in other_keys if ".lora_" in key
    )
    return PeftTensors(
        _with_target_parameters(config, list(modules), ranks, alphas, others), new_tensors, tensors.source
    )


def _checked_ranks(
    config: LoraConfig, fused: Mapping[str, tuple[ExpertParameter, PartFactors]], source: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank and the alpha of each parameter.

    Raises one `MismatchError` for everything that is missing or differs.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for name, (parameter, parts) in fused.items():
        numbers = pytorch.expert_numbers([expert for experts in parts.values() for expert in experts])
        texts = parameter.texts(name) or {}
        modules = {
            (part, expert): template.format(**texts, e=expert)
            for part, template in enumerate(parameter.modules)
            for expert in numbers
        }
        complete = {
            place: factors
            for place in modules
            if len(factors := parts.get(place[0], {}).get(place[1], {})) == len(_SIDES)
        }
        problems += [f"{module}: missing" for place, module in modules.items() if place not in complete]
        values = {
            (config.rank_of(module), config.alpha_of(module)) for place, module in modules.items() if place in complete
        }
        shapes = {tuple(tuple(factors[side].shape) for side in _SIDES) for factors in complete.values()}
        if len(values) > 1 or len(shapes) > 1:
            problems.append(f"{name}: its experts differ in rank, alpha or shape: {sorted(values)}, {sorted(shapes)}")
        elif values:
            ranks[name], alphas[name] = values.pop()
            if (shape := next(iter(shapes)))[0][0] != ranks[name] or shape[1][1] != ranks[name]:
                problems.append(f"{name}: expected rank {ranks[name]}, found A {shape[0]} and B {shape[1]}")
    raise_listed(
        MismatchError,
        f"{source}: the model stores all experts of a layer in one array, so the file must hold an adapter for"
        " each, with one rank, alpha and shape:",
        problems,
    )
    return ranks, alphas


def _stack_factors(
    parameter: ExpertParameter, parts: PartFactors, rank: int, on_shared: str | None, name: str
) -> tuple[dict[tuple[str, str], Array], int]:
    """Return `{(side, suffix of the part): array}`, and the factor by which the rank has grown."""
    count = len(parameter.modules)
    a: list[Array] = []
    b: list[Array] = []
    for part in range(count):
        experts = [parts[part][number] for number in range(len(parts[part]))]
        xp = joint_tensors.array_namespace(experts[0]["A"])
        a.append(xp.concatenate([expert["A"] for expert in experts]))
        # (expert, out, rank) -> (out, rank, expert)
        stacked = xp.stack([expert["B"] for expert in experts], axis=-1)
        b.append(stacked.reshape(stacked.shape[0], -1))
    keys = {side: parameter.keys(side) for side in _SIDES}
    if count == 1:
        return {("A", ""): a[0], ("B", ""): b[0]}, 1
    if parameter.split:
        return {
            (side, key): array
            for side, arrays in (("A", a), ("B", b))
            for key, array in zip(keys[side], arrays, strict=True)
        }, 1
    xp = joint_tensors.array_namespace(a[0])
    if joint_tensors.bitwise_equal(a):
        return {("A", ""): a[0], ("B", ""): join_parts(b, [f"B{key}" for key in keys["B"]], xp)}, 1
    if on_shared != "concat":
        raise MismatchError(
            f"{name}: the model stores gate and up in one array with one A for both, but the file has two As, and they"
            ' differ (or cannot be compared inside jit). Pass jaxadapt.models.LoraTree(model, on_shared="concat")'
            " instead of the model (jaxadapt convert: --on-shared concat): it concatenates the ranks of the two,"
            f" which is exact, and multiplies the rank by {count}"
        )
    joint_a, joint_b = joint_tensors.concatenate_ranks(
        rank, a, b, [f"A{key}" for key in keys["A"]], [f"B{key}" for key in keys["B"]]
    )
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
    all_ranks = {module: config.rank_of(module) for module in modules} | dict(ranks)
    all_alphas = {module: config.alpha_of(module) for module in modules} | dict(alphas)
    targets = config.target_modules
    if isinstance(targets, str):  # it may match the experts' modules too
        remaining: Any = list(modules)
    else:
        remaining = [
            entry
            for entry in targets or ()
            if any(module == entry or module.endswith(f".{entry}") for module in modules)
        ]
    parameters = [*(config.target_parameters or ()), *_shorten_names(list(ranks), config, others)]
    config = config.replace(target_modules=remaining, target_parameters=parameters, lora_dropout=0.0)
    return config.with_ranks(all_ranks, all_alphas)


def _shorten_names(names: Sequence[str], config: LoraConfig, others: Collection[str] | None) -> list[str]:
    """Return the last two parts of the parameters' names; the full names if not every layer is adapted."""
    ends = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    is_partial = (
        config.layers_to_transform is not None or isinstance(config.target_modules, str) or config.exclude_modules
    )
    if is_partial if others is None else any(name.endswith(ends) for name in others):
        return list(names)
    return list(ends)


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
        part = parse_part_key(key)
        module, dot, suffix = file_key(key).removeprefix(keymap.prefix).rpartition(".lora_")
        owner, depth = module, 0
        while owner.endswith(".base_layer"):
            owner, depth = owner.removesuffix(".base_layer"), depth + 1
        candidates = [
            (parameter, name)
            for parameter in parameters
            if (name := parameter.in_module(owner)) and matching.is_parameter(config, name)
        ]
        if not dot or len(candidates) <= depth or suffix not in ("A.weight", "B.weight"):
            new_tensors[key] = tensors[key]
            continue
        target = candidates[len(candidates) - 1 - depth]
        sides, side = factors.setdefault(target, {}), suffix[0]
        if part is None and len(target[0].modules) > 1:
            names = [f"x{part}" for part in target[0].keys(side)]
            arrays = cut_parts({"x": tensors[key]}, names)
            sides[side] = [arrays[name] for name in names]
        else:
            sides.setdefault(side, []).append(tensors[key])
    if not factors:
        return config, dict(tensors)
    other_modules = dict.fromkeys(
        key.removeprefix(keymap.prefix).rpartition(".lora_")[0] for key in new_tensors if ".lora_" in key
    )
    ranks = {name: config.rank_of(name) for name in other_modules}
    alphas = {name: config.alpha_of(name) for name in other_modules}
    experts: dict[str, str] = {}
    for (target, name), sides in factors.items():
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        for template, a, b in zip(target.modules, sides["A"], sides["B"], strict=True):
            count = a.shape[0] // rank
            rows, columns = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
            for expert in range(count):
                module = template.format(**(target.texts(name) or {}), e=expert)
                pair = (
                    (columns[:, :, expert].T, rows[expert].T)
                    if target.turned
                    else (rows[expert], columns[:, :, expert])
                )
                new_tensors |= {
                    f"{keymap.prefix}{module}.lora_{side}.weight": array for side, array in zip("AB", pair, strict=True)
                }
                ranks[module], alphas[module] = rank, alpha
                experts[module] = template
    new_config = _with_target_modules(config, keymap, list(other_modules), experts).with_ranks(ranks, alphas)
    return new_config, new_tensors


def _with_target_modules(
    config: LoraConfig, keymap: KeyMap, other_modules: Sequence[str], experts: Mapping[str, str]
) -> LoraConfig:
    """Return the configuration that names the modules of single experts instead of parameters."""
    parameters = {
        name for parameter in list_parameters(keymap) for name in (parameter.name.rpartition(".")[2], parameter.name)
    }
    remaining = [entry for entry in config.target_parameters or () if entry.rpartition(".")[2] not in parameters]
    templates = list(dict.fromkeys(experts.values()))
    ends = list(dict.fromkeys(template.rpartition(".")[2] for template in templates))
    plain = (entry for entry in keymap.weights if entry.adaptable and not entry.by_parameter)
    others = {name.rpartition(".")[2] for name in (*(entry.module for entry in plain), *other_modules)}
    targets = config.target_modules or ()
    can_list = not isinstance(targets, str) and not any(name.isdecimal() or "{" in name for name in ends)
    if can_list and config.layers_to_transform is None and not others.intersection(ends):
        return config.replace(target_modules=[*targets, *ends], target_parameters=remaining or None)
    # Modules that are not adapted end in the same names: only a pattern can exclude them.
    layers = sorted(
        {re.sub(r"\{e\}", r"\\d+", _layer_pattern(template, module)) for module, template in experts.items()}
    )
    every = "|".join(dict.fromkeys([*map(re.escape, other_modules), *layers]))
    return config.replace(
        target_modules=every, target_parameters=remaining or None, layers_to_transform=None, layers_pattern=None
    )


def _layer_pattern(template: str, module: str) -> str:
    """Return a pattern for all experts of one layer."""
    match = re.fullmatch(name_regex(template), module)
    assert match is not None
    return re.escape(template.format(**(match.groupdict() | {"e": "{e}"}))).replace(r"\{e\}", "{e}")
