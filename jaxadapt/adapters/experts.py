"""Adapters with a LoRA for each expert, as PEFT wrote them for transformers 4 (`experts.3.up_proj.lora_A.weight`).

transformers 5 holds all experts of a layer in one parameter, and gate and up in the halves of one; PEFT names these in
`target_parameters`. What the modules of single experts were called is in a table (`KeyMap.each`).

    {"…experts.3.up_proj.lora_A.weight": …} ──fused──► {"…experts.base_layer.lora_A.weight": …}
                                            ◄─apart───

A's rows are in order of the experts, B's columns in order of the rank. Gate and up share an A there: if theirs are
equal they stay as they are; else they go side by side, at twice the rank, which computes the same (so PEFT does on
loading such a file, equal or not: `utils/transformers_weight_conversion.py`). A model with gate and up in two leaves
needs neither.

Pure: it works on anything with reshape and transpose.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.adapters import joint_tensors
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError, warn
from jaxadapt.keymaps import expert_names, plan
from jaxadapt.keymaps import parts as pieces
from jaxadapt.keymaps.expert_names import name_regex
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

Array = Any
_SIDES = ("A", "B")


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One parameter of a table, and what its parts are in modules of single experts.

    Of the parameters of one module PEFT wraps the first in `order` innermost. `parts` are their places in it; `split`:
    each is a leaf of its own; `turned`: PEFT's A is what a single expert has as B (`_is_turned`).
    """

    name: str
    modules: tuple[str, ...]
    order: int
    parts: tuple[str, ...]
    split: bool
    turned: bool = False

    def keys(self, side: str) -> list[str]:
        """What follows the key of A or B for each part."""
        return [pieces.part_key("", None if side == "A" else 0, part) for part in self.parts]

    @property
    def owner(self) -> str:
        return self.name.rpartition(".")[0]

    def find(self, module: str) -> tuple[str, int, int] | None:
        """Of a module of one expert: the parameter in full, its part and the expert's number."""
        for part, template in enumerate(self.modules):
            found = re.fullmatch(name_regex(template), module)
            if found:
                texts = found.groupdict()
                return self.name.format(**texts), part, int(texts.get("e", 0))
        return None

    def texts(self, name: str) -> dict[str, str] | None:
        """What fills the holes of a parameter's name."""
        found = re.fullmatch(name_regex(self.name), name)
        return None if found is None else found.groupdict()


def _parameters(table: KeyMap, lines: KeyMap | None = None) -> list[_Parameter]:
    """`lines`: of the table that says in what parts the leaves are, `table` itself by default."""
    parts: dict[str, list[str]] = {}
    for w in (lines or table).weights:
        if w.part and w.kind == "experts":
            parts.setdefault(w.file_key, []).append(w.part)
    found: list[_Parameter] = []
    for i, (name, modules) in enumerate(table.each):
        usual = [f"{part}/{len(modules)}" for part in range(len(modules))]
        turned = any(w.file_key == name and _is_turned(w) for w in (lines or table).weights)
        found.append(_Parameter(name, modules, i, tuple(sorted(parts.get(name, usual))), name in parts, turned))
    return found


def _is_turned(w: Weight) -> bool:
    """Whether a line of experts says that their A is on the outputs: Llama 4's, as PEFT alone takes it."""
    roles = w.torch_roles
    return w.kind == "experts" and (roles["out"], roles["in"]) == tuple((n,) for n in w.left[-2:])


def expert_parameters(table: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters that these leaves are, of those that PEFT adapts by their names."""
    found = ((table.match(leaf), shape) for leaf, shape in shapes.items())
    mine = ((site, shape) for site, shape in found if site is not None and site.weight.kind in ("experts", "parameter"))
    return [paths.join(*p) for site, shape in mine for p in site.parameters(plan.axis_sizes(site, shape)).values()]


def per_expert_keymap(table: KeyMap) -> KeyMap:
    """The same table with a module for each expert, named after the parameter: how other libraries' trees are read.

    Their A and B may be one for all experts. A router is the Linear that it was.

    >>> from jaxadapt.keymaps.weight import Weight
    >>> line = Weight("w_up", "experts.gate_up[f 1/2]", "e d f -> e f d", kind="experts")
    >>> made = per_expert_keymap(KeyMap("tiny", (line,)))
    >>> made.weights[0].key, made.weights[0].pattern
    ('experts.gate_up.{e}.1.weight', '{e} d f -> f d')
    """
    lines: list[Weight] = []
    each: dict[str, list[str]] = {}
    for w in table.weights:
        if w.kind == "parameter":
            each[w.file_key] = [w.module]
            turned: dict[str, Any] = {**w.options, "kind": "linear"}
            lines.append(Weight(w.leaf, w.key, w.pattern, **turned))
        elif w.kind == "experts":
            (expert,), out, inputs = w.torch_roles["experts"], w.torch_roles["out"], w.torch_roles["in"]
            if _is_turned(w):
                out, inputs = inputs, out
            part = w.part.partition("/")[0].partition(":")[0]
            module = f"{w.file_key}.{{e}}" + (f".{part}" if part else "")
            each.setdefault(w.file_key, []).append(module)
            left = " ".join("{e}" if n == expert else n for n in w.left)
            right = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in (out, inputs))
            options: dict[str, Any] = {"kind": "linear", "scale": w.scale, **dict(w.sizes)}
            lines.append(Weight(w.leaf, f"{module}.weight", f"{left} -> {right}", **options))
        else:
            lines.append(w)
    names = tuple((name, tuple(modules)) for name, modules in each.items())
    return dataclasses.replace(table, weights=tuple(lines), each=names, single=False)


_LIKE = re.compile(r"\.experts\.|\.gate\.lora_")


def may_have_experts(keys: Iterable[str]) -> bool:
    """Whether a file may have adapters of experts, by a glance."""
    return any(_LIKE.search(key) for key in keys)


# ---------------------------------------------------------------- into parameters of all experts

Parts = dict[int, dict[int, dict[str, Array]]]
"""`{part: {expert: {"A": …, "B": …}}}` of one parameter."""


def fuse_experts(
    tensors: PeftTensors,
    table: KeyMap,
    on_shared: str | None,
    call: str,
    lines: KeyMap | None = None,
    others: Collection[str] | None = None,
    parts: bool = True,
) -> PeftTensors:
    """A file's adapters of single experts as those of parameters; itself where it has none, or the table no names.

    Args:
        table: says what single experts are called.
        on_shared: "concat" puts the As of gate and up side by side where the model has one.
        lines: the table of the model, if it is another one.
        others: parameters that are not adapted, if that is known.
        parts: where gate and up are two leaves they are left as two parts.

    Raises one `MismatchError` with all experts that are missing, or differ in rank or scale, and one for As that differ
    where they would have to be one.
    """
    config = tensors.config
    if not table.each or not isinstance(config, LoraConfig):
        return tensors
    known = _parameters(table, lines)
    found: dict[str, tuple[_Parameter, Parts]] = {}
    rest: list[str] = []
    for key in tensors.tensors:
        module, dot, last = key.removeprefix(table.prefix).rpartition(".lora_")
        hit = next(((p, at) for p in known if (at := p.find(module)) is not None), None) if dot else None
        if hit is None or last not in ("A.weight", "B.weight") or matching.is_parameter(config, hit[1][0]):
            rest.append(key)
            continue
        one, (name, part, expert) = hit
        held = found.setdefault(name, (one, {}))[1]
        side, x = last[0], tensors.tensors[key]
        side, x = ("B" if side == "A" else "A", x.T) if one.turned else (side, x)
        held.setdefault(part, {}).setdefault(expert, {})[side] = x
    if not found:
        return tensors
    ranks, alphas = _checked(config, found, tensors.source)
    out = {key: tensors.tensors[key] for key in rest}
    for name, (one, held) in found.items():
        one = dataclasses.replace(one, split=one.split and parts)
        made, times = _stacked(one, held, ranks[name], on_shared, f"{tensors.source}: {name}", call)
        above = (p for p in known if p.owner == one.owner and p.order > one.order)
        inner = sum(_beside(name, p) in found for p in above)
        at = f"{table.prefix}{one.owner.format(**(one.texts(name) or {}))}{'.base_layer' * inner}"
        out |= {f"{at}.lora_{side}.weight{bracket}": x for (side, bracket), x in made.items()}
        ranks[name], alphas[name] = ranks[name] * times, alphas[name] * (times**0.5 if config.use_rslora else times)
    modules = dict.fromkeys(key.removeprefix(table.prefix).rpartition(".lora_")[0] for key in rest if ".lora_" in key)
    return PeftTensors(_with_parameters(config, list(modules), ranks, alphas, others), out, tensors.source)


def _beside(name: str, other: _Parameter) -> str:
    """The full name of another parameter of the same module."""
    return f"{name.rpartition('.')[0]}.{other.name.rpartition('.')[2]}"


def _checked(
    config: LoraConfig, found: Mapping[str, tuple[_Parameter, Parts]], source: str
) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and alpha of each parameter; one error for all that is missing or differs."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for name, (one, parts) in found.items():
        numbers = expert_names.expert_numbers([e for experts in parts.values() for e in experts])
        texts = one.texts(name) or {}
        modules = {
            (part, e): template.format(**texts, e=e) for part, template in enumerate(one.modules) for e in numbers
        }
        whole = {at: pair for at in modules if len(pair := parts.get(at[0], {}).get(at[1], {})) == len(_SIDES)}
        problems += [f"{module}: missing" for at, module in modules.items() if at not in whole]
        values = {
            (
                matching.pattern_value(config.rank_pattern, module, config.r),
                matching.pattern_value(config.alpha_pattern, module, config.lora_alpha),
            )
            for at, module in modules.items()
            if at in whole
        }
        shapes = {tuple(tuple(pair[side].shape) for side in _SIDES) for pair in whole.values()}
        if len(values) > 1 or len(shapes) > 1:
            problems.append(f"{name}: its experts differ in rank, alpha or shape: {sorted(values)}, {sorted(shapes)}")
        elif values:
            ranks[name], alphas[name] = values.pop()
            if (shape := next(iter(shapes)))[0][0] != ranks[name] or shape[1][1] != ranks[name]:
                problems.append(f"{name}: expected rank {ranks[name]}, found A {shape[0]} and B {shape[1]}")
    if problems:
        raise MismatchError(
            f"{source}: the model holds all experts of a layer in one array, and so needs all of them, alike:\n"
            + paths.bullets(problems)
        )
    return ranks, alphas


def _stacked(
    one: _Parameter, parts: Parts, rank: int, on_shared: str | None, what: str, call: str
) -> tuple[dict[tuple[str, str], Array], int]:
    """`{(side, part's place in the tensor): array}`, and by how much the rank has grown."""
    n = len(one.modules)
    a: list[Array] = []
    b: list[Array] = []
    for part in range(n):
        experts = [parts[part][e] for e in range(len(parts[part]))]
        xp = joint_tensors.array_namespace(experts[0]["A"])
        a.append(xp.concatenate([pair["A"] for pair in experts]))
        # (expert, out, rank) -> (out, rank, expert)
        wide = xp.stack([pair["B"] for pair in experts], axis=-1)
        b.append(wide.reshape(wide.shape[0], -1))
    keys = {side: one.keys(side) for side in _SIDES}
    if n == 1:
        return {("A", ""): a[0], ("B", ""): b[0]}, 1
    if one.split:
        return {(s, key): x for s, xs in (("A", a), ("B", b)) for key, x in zip(keys[s], xs, strict=True)}, 1
    xp = joint_tensors.array_namespace(a[0])
    if joint_tensors.bitwise_equal(a):
        return {("A", ""): a[0], ("B", ""): pieces.join_parts(b, [f"B{key}" for key in keys["B"]], xp)}, 1
    if on_shared != "concat":
        raise MismatchError(
            f"{what}: the model holds gate and up in one array, with one A for both, and the file's differ (or nobody"
            f' can tell, inside jit). Pass on_shared="concat" to {call}: with their ranks side by side it computes'
            f" exactly the same, at {n} times the rank"
        )
    wide_a, wide_b = joint_tensors.concatenate_ranks(
        rank, a, b, [f"A{k}" for k in keys["A"]], [f"B{k}" for k in keys["B"]]
    )
    return {("A", ""): wide_a, ("B", ""): wide_b}, n


def _with_parameters(
    config: LoraConfig,
    modules: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    others: Collection[str] | None,
) -> LoraConfig:
    """The configuration that names parameters, and of its modules those that are left."""
    if config.lora_dropout:
        warn(
            f"lora_dropout={config.lora_dropout} becomes 0: PEFT has none for experts that are one parameter, which a"
            " dropout of single experts' inputs would have to be (it makes no difference to trained outputs)",
        )
    all_ranks = {m: matching.pattern_value(config.rank_pattern, m, config.r) for m in modules} | dict(ranks)
    all_alphas = {m: matching.pattern_value(config.alpha_pattern, m, config.lora_alpha) for m in modules} | dict(alphas)
    given = config.target_modules
    if isinstance(given, str):  # it may name the experts' modules as well
        left: Any = list(modules)
    else:
        left = [entry for entry in given or () if any(m == entry or m.endswith(f".{entry}") for m in modules)]
    named = [*(config.target_parameters or ()), *_short(list(ranks), config, others)]
    config = config.replace(target_modules=left, target_parameters=named, lora_dropout=0.0)
    return joint_tensors.with_ranks_and_alphas(config, all_ranks, all_alphas)


def _short(names: Sequence[str], config: LoraConfig, others: Collection[str] | None) -> list[str]:
    """The names of parameters by their ends, where no layer was left out."""
    short = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    some = config.layers_to_transform is not None or isinstance(config.target_modules, str) or config.exclude_modules
    if some if others is None else any(name.endswith(short) for name in others):
        return list(names)
    return list(short)


# ---------------------------------------------------------------- and apart again


def split_experts(
    config: Config, tensors: Mapping[str, Array], table: KeyMap, lines: KeyMap | None = None
) -> tuple[Config, dict[str, Array]]:
    """Adapters of parameters as those of the single experts' modules, under the names that transformers 4 had.

    Args:
        tensors: a plan's, by the table's names; parts of a tensor need not be put together.
        table, lines: as in `fuse_experts`.

    Raises `ConfigError` if the configuration is no LoRA's.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{table.name}: adapters of single experts are LoRA's, found {config.peft_type}")
    known = _parameters(table, lines)
    out: dict[str, Array] = {}
    held: dict[tuple[_Parameter, str], dict[str, list[Array]]] = {}
    for key in sorted(tensors):  # parts in order
        piece = pieces.parse_part_key(key)
        module, dot, last = pieces.file_key(key).removeprefix(table.prefix).rpartition(".lora_")
        owner, depth = module, 0
        while owner.endswith(".base_layer"):
            owner, depth = owner.removesuffix(".base_layer"), depth + 1
        mine = [(p, name) for p in known if (name := _of(p, owner)) and matching.is_parameter(config, name)]
        if not dot or len(mine) <= depth or last not in ("A.weight", "B.weight"):
            out[key] = tensors[key]
            continue
        one = mine[len(mine) - 1 - depth]
        sides, side = held.setdefault(one, {}), last[0]
        if piece is None and len(one[0].modules) > 1:
            names = [f"x{part}" for part in one[0].keys(side)]
            parts = pieces.cut_parts({"x": tensors[key]}, names)
            sides[side] = [parts[name] for name in names]
        else:
            sides.setdefault(side, []).append(tensors[key])
    if not held:
        return config, dict(tensors)
    rest = dict.fromkeys(key.removeprefix(table.prefix).rpartition(".lora_")[0] for key in out if ".lora_" in key)
    ranks = {m: matching.pattern_value(config.rank_pattern, m, config.r) for m in rest}
    alphas = {m: matching.pattern_value(config.alpha_pattern, m, config.lora_alpha) for m in rest}
    experts: dict[str, str] = {}
    for (one, name), sides in held.items():
        rank = matching.pattern_value(config.rank_pattern, name, config.r)
        alpha = matching.pattern_value(config.alpha_pattern, name, config.lora_alpha)
        for template, a, b in zip(one.modules, sides["A"], sides["B"], strict=True):
            count = a.shape[0] // rank
            rows, columns = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
            for e in range(count):
                module = template.format(**(one.texts(name) or {}), e=e)
                pair = (columns[:, :, e].T, rows[e].T) if one.turned else (rows[e], columns[:, :, e])
                out |= {f"{table.prefix}{module}.lora_{side}.weight": x for side, x in zip("AB", pair, strict=True)}
                ranks[module], alphas[module] = rank, alpha
                experts[module] = template
    return joint_tensors.with_ranks_and_alphas(_with_modules(config, table, list(rest), experts), ranks, alphas), out


def _of(one: _Parameter, owner: str) -> str | None:
    """The full name of the parameter of that kind that a module has."""
    return one.name.format(**found.groupdict()) if (found := re.fullmatch(name_regex(one.owner), owner)) else None


def _with_modules(config: LoraConfig, table: KeyMap, rest: Sequence[str], experts: Mapping[str, str]) -> LoraConfig:
    """The configuration that names the modules of single experts instead of parameters."""
    named = {name for p in _parameters(table) for name in (p.name.rpartition(".")[2], p.name)}
    left = [entry for entry in config.target_parameters or () if entry.rpartition(".")[2] not in named]
    templates = list(dict.fromkeys(experts.values()))
    lasts = list(dict.fromkeys(template.rpartition(".")[2] for template in templates))
    plain = (w for w in table.weights if w.adaptable and w.kind not in ("parameter", "experts"))
    others = {name.rpartition(".")[2] for name in (*(w.module for w in plain), *rest)}
    given = config.target_modules or ()
    spelt = not isinstance(given, str) and not any(name.isdecimal() or "{" in name for name in lasts)
    if spelt and config.layers_to_transform is None and not others.intersection(lasts):
        return config.replace(target_modules=[*given, *lasts], target_parameters=left or None)
    # Other modules are called like these, and need not be adapted: only a pattern tells them apart.
    layers = sorted({re.sub(r"\{e\}", r"\\d+", _filled(t, m)) for m, t in experts.items()})
    every = "|".join(dict.fromkeys([*map(re.escape, rest), *layers]))
    return config.replace(
        target_modules=every, target_parameters=left or None, layers_to_transform=None, layers_pattern=None
    )


def _filled(template: str, module: str) -> str:
    """A pattern for all experts of one layer."""
    found = re.fullmatch(name_regex(template), module)
    assert found is not None
    return re.escape(template.format(**(found.groupdict() | {"e": "{e}"}))).replace(r"\{e\}", "{e}")
