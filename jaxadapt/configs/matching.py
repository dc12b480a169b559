"""Which modules a configuration means: PEFT's matching of `target_modules`, patterns and exclusions.

Names are module paths such as "model.layers.0.self_attn.q_proj": PyTorch's where a table of names is known,
the JAX paths themselves elsewhere. Nothing here looks at a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from jaxadapt.configs import Config, FrozenDict
from jaxadapt.configs.name_patterns import PatternIndex
from jaxadapt.configs.validation import match
from jaxadapt.core import suggest
from jaxadapt.core.errors import TargetError

_C = TypeVar("_C", bound=Config)
_T = TypeVar("_T")

ALL_LINEAR = "all-linear"

_DIGITS = 640  # the least that Python's limit on the digits of an integer can be set to

# From this many names on PEFT stores the shortest suffixes that mean the same modules.
_COLLAPSE_FROM = 20


def matches(config: Config, name: str) -> bool:
    """Whether the module `name` is a target of `config`, by PEFT's rules.

    A string in `target_modules` must match the whole name as a regular expression; an entry of a list must
    equal the name or be its end after a dot. `exclude_modules` and `modules_to_save` win.
    `layers_to_transform` keeps only modules of those layers, but does not bear on a module that the list
    names in full. Without `target_modules` nothing matches. "all-linear" must have been resolved (see
    `resolve_targets`).

    Raises:
        ConfigError: an invalid regular expression (where the configuration's class did not check it).

    >>> from jaxadapt.configs import LoraConfig
    >>> config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    >>> [matches(config, f"model.layers.{l}.self_attn.q_proj") for l in range(3)]
    [False, True, False]
    """
    if _excluded(config, name):
        return False
    targets: str | tuple[str, ...] | None = config.get("target_modules")
    if targets is None:
        return False
    if isinstance(targets, str):
        return match("target_modules", targets, name) is not None
    names = config.names("target_modules")
    if name in names:
        return True
    return _ends_in(name, names) and in_layers(config, name)


def is_parameter(config: Config, name: str) -> bool:
    """Whether `target_parameters` names this parameter, in full or by its end after a dot.

    PEFT lets neither `exclude_modules` nor `layers_to_transform` bear on that.

    >>> from jaxadapt.configs import LoraConfig
    >>> is_parameter(LoraConfig(target_parameters=["experts.gate_up_proj"]), "layers.0.mlp.experts.gate_up_proj")
    True
    """
    entries = config.names("target_parameters")
    return bool(entries) and (name in entries or _ends_in(name, entries))


def pattern_value(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    """The value of the first pattern that matches the module `name`; `default` if none does.

    For `rank_pattern` and `alpha_pattern`. A pattern must match the whole name, or its end after a dot.

    Raises:
        ConfigError: an invalid regular expression.

    >>> pattern_value({"q_proj": 4, r"layers\\.\\d+\\.v_proj": 2}, "model.layers.7.v_proj", 8)
    2
    """
    if not patterns:
        return default
    index = _index(patterns)
    order = index.first(name)
    # A key that is no expression for itself ("a+b") still holds for the module of exactly that name.
    return patterns.get(name, default) if order is None else patterns[index.keys[order]]


def matching(patterns: Mapping[str, Any], name: str) -> list[str]:
    """All patterns that hold for the module `name`, of which the first counts."""
    index = _index(patterns)
    found = [index.keys[order] for order in index.matching(name)]
    return [*found, name] if name in patterns and name not in found else found


def _index(patterns: Mapping[str, Any]) -> PatternIndex:
    return patterns.index if isinstance(patterns, FrozenDict) else PatternIndex("rank_pattern", patterns)


HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The heads that PEFT trains in full for a task, where the model has them: a base model's are not trained yet."""


def with_task_heads(config: _C) -> _C:
    """The configuration with the heads of its task among `modules_to_save`, as PEFT adds them to a new adapter.

    >>> from jaxadapt.configs import LoraConfig
    >>> with_task_heads(LoraConfig(task_type="SEQ_CLS")).modules_to_save
    ('classifier', 'score')
    """
    heads = HEADS.get(config.task_type or "", ())
    given: tuple[str, ...] = config.get("modules_to_save") or ()
    missing = [name for name in heads if name not in given]
    if not missing or "modules_to_save" not in config.to_dict():
        return config
    return _replaced(config, "modules_to_save", (*given, *missing))


_DEFAULTS: Mapping[str, Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "LORA": {
        "gpt2": (("c_attn",), ()),
        "bert|roberta": (("query", "value"), ()),
        "t5": (("q", "v"), ()),
        "gpt_neo|gptj": (("q_proj", "v_proj"), ()),
        r"llama(?!4)|mi[sx]tral|qwen(?!\d_moe)|gemma": (("q_proj", "v_proj"), ()),
    },
    "IA3": {
        "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
        "bert|roberta": (("key", "value", "output.dense"), ("output.dense",)),
        "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
        "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
        # "llama" alone is Qwen2's table as well, for which PEFT chooses otherwise: nothing tells which it is.
        r"llama[123]|mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
        r"qwen(?!\d_moe)|gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    },
}
"""What PEFT chooses for its model types where target_modules is null: targets, and those that scale their inputs.

(For GPT-OSS, DeepSeek, Qwen 3 MoE and the language model of Llama 4 it has no choice.)
"""


def with_default_targets(config: _C, family: str) -> _C:
    """The configuration with PEFT's own choice for a model family where it names no targets.

    >>> from jaxadapt.configs import LoraConfig
    >>> with_default_targets(LoraConfig(), "llama/scan0").target_modules
    ('q_proj', 'v_proj')
    """
    if config.get("target_modules") is not None:
        return config
    for pattern, (names, inputs) in _DEFAULTS.get(config.peft_type, {}).items():
        if re.search(rf"\b({pattern})", family):
            changes: dict[str, Any] = {"target_modules": names}
            if config.peft_type == "IA3" and config.get("feedforward_modules") is None:
                changes["feedforward_modules"] = inputs
            return config.replace(**changes)
    return config


def is_saved(config: Config, module: str) -> bool:
    """Whether `modules_to_save` names this module or one that it is in: by how their paths end (no dot needed)."""
    return bool(saving(config, module))


def saving(config: Config, module: str) -> set[str]:
    """The entries of `modules_to_save` that name this module or one that it is in."""
    entries = config.names("modules_to_save")
    if not entries:
        return set()
    sizes = config.sizes("modules_to_save")
    ends = [*(i for i, letter in enumerate(module) if letter == "."), len(module)]
    tails = {module[end - size : end] for end in ends for size in sizes if size <= end}
    return tails & entries


def is_feedforward(config: Config, name: str) -> bool:
    """Whether the IA3 vector of the target `name` scales the module's inputs.

    A string must match the whole name; an entry of a list must be the name's end (PEFT asks for no dot).

    Raises:
        TargetError: `feedforward_modules` is null: PEFT then chooses by the model's type.
        ConfigError: an invalid regular expression.
    """
    inputs: str | tuple[str, ...] | None = config.get("feedforward_modules")
    if inputs is None:
        raise TargetError(
            "feedforward_modules: expected names, found null, where PEFT chooses by the type of model; "
            "name the modules whose inputs are scaled (a part of target_modules), or write [] for none"
        )
    if isinstance(inputs, str):
        return match("feedforward_modules", inputs, name) is not None
    return name.endswith(inputs)


def resolve_targets(
    config: _C, names: Iterable[str], *, linear: Collection[str] | None, output: str | None = None
) -> _C:
    """The configuration with "all-linear" replaced by names; any other is returned as it is.

    As PEFT stores it: the full names of all linear modules except the output layer (in a model without one that
    classifies sequences, its head), and where those are 20 or more, the shortest suffixes that mean the same.

    Args:
        names: the modules of the model; what holds them is known by their names.
        linear: those of them that are linear layers; None where that is not known.
        output: the output layer (`lm_head`), if there is one.

    Raises:
        TargetError: "all-linear" is asked for where `linear` is None or leaves nothing.

    >>> from jaxadapt.configs import LoraConfig
    >>> config = LoraConfig(target_modules="all-linear")
    >>> resolve_targets(config, ["q", "norm", "lm_head"], linear={"q", "lm_head"}, output="lm_head").target_modules
    ('q',)
    """
    if not is_all_linear(config):
        return config
    if linear is None:
        raise TargetError(
            'target_modules: "all-linear" needs to know which modules are linear, which is unknown here; '
            "name the modules instead"
        )
    holders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    every = holders.union(names)
    left_out = {output}
    if config.task_type == "SEQ_CLS" and output not in every:
        left_out = {next((head for head in ("score", "classifier") if head in every), None)}
    chosen = sorted(set(linear) - left_out)
    if not chosen:
        raise TargetError(
            'target_modules: "all-linear" names nothing: there is no linear layer besides the output layer'
        )
    if len(chosen) >= _COLLAPSE_FROM and config.peft_type != "IA3":
        # A suffix must not mean what holds modules either ("0", a layer of many): PEFT would adapt that, and cannot.
        shorter = shortest_suffixes(chosen, every.difference(chosen))
        chosen = shorter if len(shorter) < len(chosen) else chosen
    return _with_targets(config, chosen)


def select_names(
    config: Config,
    names: Sequence[str],
    *,
    linear: Collection[str] | None = None,
    output: str | None = None,
) -> tuple[str, ...]:
    """The names that `config` targets, in their order.

    One entry of `target_modules` that matches nothing is no error as long as another does (see
    `selection_warnings.unmatched_targets`);
    PEFT does the same. Nothing at all is one, except where `target_parameters` says what to adapt.

    Args:
        names: the modules that could be adapted.
        linear, output: as in `resolve_targets`; needed for "all-linear" only.

    Raises:
        TargetError: nothing matches, or `target_modules` is null.
        ConfigError: an invalid regular expression.

    >>> from jaxadapt.configs import LoraConfig
    >>> select_names(LoraConfig(target_modules=["q", "v"]), ["a.q", "a.k", "a.v", "b.q"])
    ('a.q', 'a.v', 'b.q')
    """
    resolved = resolve_targets(config, names, linear=linear, output=output)
    chosen = tuple(name for name in names if matches(resolved, name))
    if chosen or config.get("target_parameters"):
        return chosen
    targets = config.get("target_modules")
    if targets is None:
        raise TargetError(
            "target_modules: expected names or an expression, found null, and this is no model of a family for"
            f" which PEFT's own choice is known; name them. Available are {suggest.describe_available(names)}"
        )
    raise TargetError(_nothing(resolved, names))


def _excluded(config: Config, name: str) -> bool:
    excluded: str | tuple[str, ...] | None = config.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and match("exclude_modules", excluded, name):
            return True
    elif excluded and (name in (names := config.names("exclude_modules")) or _ends_in(name, names)):
        return True
    # A module trained in full cannot carry an adapter as well. PEFT reads these entries as expressions, and a
    # hit anywhere on the path counts.
    return bool(config.get("modules_to_save")) and config.index("modules_to_save").first(name) is not None


def _ends_in(name: str, entries: Collection[str]) -> bool:
    """Whether a name ends in one of the entries after a dot."""
    return any(name[i + 1 :] in entries for i, letter in enumerate(name) if letter == ".")


def in_layers(config: Config, name: str) -> bool:
    """Whether `layers_to_transform` lets `name` through. The first number after the layer list counts."""
    layers: int | tuple[int, ...] | None = config.get("layers_to_transform")
    if layers is None or layers == ():
        return True
    wanted: Collection[int] = (layers,) if isinstance(layers, int) else config.names("layers_to_transform")
    patterns: str | tuple[str, ...] | None = config.get("layers_pattern")
    if not patterns:
        # Any list of layers: a segment, a number, and more. Needs something before the segment, as PEFT does.
        hit = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        entries = (patterns,) if isinstance(patterns, str) else patterns
        hits = (match("layers_pattern", entry, name) for entry in entries)
        hit = next((found for found in hits if found), None)
    # An alternation ("layers|h") can match without reaching the number; then no layer is known.
    number = None if hit is None else hit["idx"]
    # Of more digits than Python converts it is no layer's number.
    return number is not None and len(number) <= _DIGITS and int(number) in wanted


def is_all_linear(config: Config) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _with_targets(config: _C, targets: Sequence[str]) -> _C:
    inputs = config.get("feedforward_modules")
    if isinstance(inputs, tuple) and "feedforward_modules" not in config.extra:
        # IA3 wants these to be some of the targets, so they have to be spelt like them. (PEFT leaves them and
        # then refuses the file it has written.)
        inputs = [name for name in targets if is_feedforward(config, name)]
        return config.replace(target_modules=targets, feedforward_modules=inputs)
    return _replaced(config, "target_modules", targets)


def _replaced(config: _C, key: str, value: Any) -> _C:
    if key in config.extra:  # a GenericConfig
        return config.replace(extra={**config.extra, key: value})
    return config.replace(**{key: value})


def shortest_suffixes(targets: Sequence[str], others: Iterable[str]) -> list[str]:
    """The shortest suffixes (at dots) that cover `targets` and end none of `others`."""
    taken = {suffix for other in others for suffix in suffixes(other)}
    chosen: set[str] = set()
    for target in sorted(targets, key=suffixes):
        mine = suffixes(target)
        if chosen.isdisjoint(mine):
            # The full name is always free: it is a target, and so none of the others.
            chosen.add(next((ending for ending in mine if ending not in taken), target))
    return sorted(chosen)


def suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _nothing(config: Config, names: Sequence[str]) -> str:
    """What to say when nothing matched: what was asked for, what comes near, what there is."""
    targets = cast("str | tuple[str, ...]", config.get("target_modules"))
    asked = repr(targets) if isinstance(targets, str) else ", ".join(map(repr, targets)) or "an empty list"
    lines = [f"target_modules: expected to match a module, found none that matches {asked}"]
    bare = config
    for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        bare = _without(bare, key)
    hidden = [name for name in names if matches(bare, name)]
    if hidden:
        rules = ", ".join(
            f"{key}={suggest.tuple_to_list(config.get(key))!r}"
            for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
            if config.get(key)  # what is empty excludes nothing
            or (key == "layers_to_transform" and config.get(key) == 0)
        )
        lines.append(f"{len(hidden)} modules match but are left out by {rules}: {suggest.quote_list(hidden)}")
    close = suggest.close_matches((targets,) if isinstance(targets, str) else targets, names)
    if close:
        lines.append(f"near misses: {suggest.quote_list(close)}")
    if isinstance(targets, str) and not hidden:
        lines.append("a string is a regular expression for the whole name: for names, write a list")
    lines.append(f"available are {suggest.describe_available(names)}")
    return "\n  ".join(lines)


def _without(config: Config, key: str) -> Config:
    if config.get(key) is None:
        return config
    if key in config.extra:
        return config.replace(extra={k: v for k, v in config.extra.items() if k != key})
    # Two fields that may only be set together go together.
    return config.replace(**{key: None, **({"layers_pattern": None} if key == "layers_to_transform" else {})})
