"""Names: the modules that a configuration selects, the tensors in files of all methods, and the methods themselves.

Modules are selected with PEFT's rules for targets, patterns and exclusions. Names of modules are paths such as
"model.layers.0.self_attn.q_proj": PyTorch's paths if a keymap of the model family is known, and JAX paths otherwise.
These functions work on names and never inspect a model.

The methods are those that jaxadapt computes, and those whose files pass through it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.frozen import thaw
from jaxadapt.configs.table import FACTS, MethodFacts
from jaxadapt.configs.validation import match
from jaxadapt.core import errors

# ---------------------------------------------------------------- matching


_C = TypeVar("_C", bound=Config)

ALL_LINEAR = "all-linear"

_MAX_DIGITS = 640  # the smallest limit on the digits of an integer that Python can be set to

_RESTRICTIONS = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")

_COLLAPSE_FROM = 20  # from this many names on, PEFT stores the shortest suffixes that select the same modules


def is_target(config: Config, name: str) -> bool:
    """Return True if the module `name` is a target of `config`, by PEFT's rules.

    A string in `target_modules` must match the whole name as a regular expression. In a list, an entry must equal the
    name or be its end after a dot. `exclude_modules` and `modules_to_save` take precedence over it.
    `layers_to_transform` keeps only the modules of those layers, except modules that the list names in full. Without
    `target_modules` nothing matches. "all-linear" must be resolved first (see `resolve_targets`).

    Raises:
        ConfigError: a regular expression is invalid (if the configuration's class did not check it).

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    >>> [is_target(config, f"model.layers.{l}.self_attn.q_proj") for l in range(3)]
    [False, True, False]
    """
    targets: str | tuple[str, ...] | None = config.get("target_modules")
    if is_excluded(config, name) or targets is None:
        return False
    if isinstance(targets, str):
        return match("target_modules", targets, name) is not None
    names = config.names("target_modules")
    return name in names or (_ends_in(name, names) and in_layers(config, name))


def is_parameter(config: Config, name: str) -> bool:
    """Return True if `target_parameters` names this parameter, in full or by its end after a dot.

    As in PEFT, `exclude_modules` and `layers_to_transform` do not apply to parameters.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> is_parameter(LoraConfig(target_parameters=["experts.gate_up_proj"]), "layers.0.mlp.experts.gate_up_proj")
    True
    """
    entries = config.names("target_parameters")
    return bool(entries) and (name in entries or _ends_in(name, entries))


HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""{task type: heads}: the untrained heads that PEFT trains in full for a task, if the model has them."""


def with_task_heads(config: _C) -> _C:
    """Add the heads of the task to `modules_to_save`, as PEFT does for a new adapter.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> with_task_heads(LoraConfig(task_type="SEQ_CLS")).modules_to_save
    ('classifier', 'score')
    """
    heads = HEADS.get(config.task_type or "", ())
    saved: tuple[str, ...] = config.get("modules_to_save") or ()
    missing = [name for name in heads if name not in saved]
    if not missing or "modules_to_save" not in config.to_dict():
        return config
    return config.with_value("modules_to_save", (*saved, *missing))


def with_default_targets(config: _C, family: str) -> _C:
    """Set `target_modules` to PEFT's default for a model family, if the configuration names no targets.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> with_default_targets(LoraConfig(), "llama/scan0").target_modules
    ('q_proj', 'v_proj')
    """
    if config.get("target_modules") is not None:
        return config
    for pattern, values in FACTS[config.peft_type].default_targets.items():
        if re.search(rf"\b({pattern})", family):
            return config.replace(**{name: value for name, value in values.items() if config.get(name) is None})
    return config


def is_saved(config: Config, module: str) -> bool:
    """Return True if `modules_to_save` matches this module or one of its parents."""
    return bool(saving_entries(config, module))


def is_feedforward(config: Config, name: str) -> bool:
    """Return True if the IA3 vector of the target `name` scales the module's inputs.

    A string must match the whole name. An entry of a list must be the name's end; as in PEFT, without a dot before it.

    Raises:
        TargetError: `feedforward_modules` is null, for which PEFT has defaults by model type.
        ConfigError: a regular expression is invalid.
    """
    inputs: str | tuple[str, ...] | None = config.get("feedforward_modules")
    if inputs is None:
        raise errors.TargetError(
            "feedforward_modules: expected names, found null, which selects PEFT's default only if target_modules is"
            " null too; list the targets whose vectors scale inputs, or write [] for none"
        )
    if isinstance(inputs, str):
        return match("feedforward_modules", inputs, name) is not None
    return name.endswith(inputs)


def saving_entries(config: Config, module: str) -> frozenset[str]:
    """Return the entries of `modules_to_save` that end the path of a module or a parent (not only after a dot)."""
    return config.names("modules_to_save") & {
        module[end - size : end]
        for size in config.sizes("modules_to_save")
        for end in range(size, len(module) + 1)
        if module[end : end + 1] in (".", "")
    }


def resolve_targets(
    config: _C, names: Iterable[str], *, linear: Collection[str] | None, output: str | None = None
) -> _C:
    """Replace "all-linear" in `target_modules` by names; return any other configuration unchanged.

    The result is what PEFT stores: the full names of all linear modules except the output layer (or except the head of
    a sequence classifier without an output layer). If there are 20 or more names, it is the shortest suffixes that
    select the same modules.

    Args:
        names: the modules of the model. Their parents follow from the names.
        linear: the modules among them that are linear layers; None if unknown.
        output: the output layer (`lm_head`), if there is one.

    Raises:
        TargetError: `target_modules` is "all-linear", and `linear` is None or holds only the output layer.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_modules="all-linear")
    >>> resolve_targets(config, ["q", "norm", "lm_head"], linear={"q", "lm_head"}, output="lm_head").target_modules
    ('q',)
    """
    if not is_all_linear(config):
        return config
    if linear is None:
        raise errors.TargetError(
            'target_modules: cannot resolve "all-linear", because it is unknown which modules are linear; list the'
            " modules instead"
        )
    all_modules = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}.union(names)
    left_out = {output}
    if config.task_type == "SEQ_CLS" and output not in all_modules:
        left_out = {next((head for head in ("score", "classifier") if head in all_modules), None)}
    chosen = sorted(set(linear) - left_out)
    if not chosen:
        raise errors.TargetError(
            'target_modules: "all-linear" matches nothing: the model has no linear layer besides the output layer;'
            " list the modules instead"
        )
    if len(chosen) >= _COLLAPSE_FROM and FACTS[config.peft_type].shortens_targets:
        # A suffix must not match a parent module either (such as the layer "0"), which PEFT would fail to adapt.
        shorter = shortest_suffixes(chosen, all_modules.difference(chosen))
        chosen = shorter if len(shorter) < len(chosen) else chosen
    return config.with_targets(chosen)


def select_names(
    config: Config,
    names: Sequence[str],
    *,
    linear: Collection[str] | None = None,
    output: str | None = None,
    advice: Callable[[], str] = str,
) -> tuple[str, ...]:
    """Return the names that `config` targets, in their order.

    As in PEFT, an entry of `target_modules` may match nothing as long as another entry matches (see
    `adapters.selection.unmatched_targets`). No match at all is an error, unless `target_parameters` is set.

    Args:
        names: the modules that can be adapted.
        linear, output: see `resolve_targets`; used for "all-linear" only.
        advice: returns a line for the error if nothing matches.

    Raises:
        TargetError: nothing matches, or `target_modules` is null.
        ConfigError: a regular expression is invalid.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> select_names(LoraConfig(target_modules=["q", "v"]), ["a.q", "a.k", "a.v", "b.q"])
    ('a.q', 'a.v', 'b.q')
    """
    resolved = resolve_targets(config, names, linear=linear, output=output)
    chosen = tuple(name for name in names if is_target(resolved, name))
    if chosen or config.get("target_parameters"):
        return chosen
    if config.get("target_modules") is None:
        raise errors.TargetError(
            "target_modules: expected names or an expression, found null, and PEFT has no default for this model; list"
            f" the modules. Available are {errors.describe_available(names)}"
        )
    raise errors.TargetError("\n  ".join(filter(None, (_no_match_message(resolved, names), advice()))))


def is_excluded(config: Config, name: str) -> bool:
    """Return True if `exclude_modules` or `modules_to_save` excludes a module from the targets."""
    excluded: str | tuple[str, ...] | None = config.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and match("exclude_modules", excluded, name):
            return True
    elif excluded and (name in (names := config.names("exclude_modules")) or _ends_in(name, names)):
        return True
    # A module that is trained in full cannot carry an adapter as well. PEFT reads these entries as expressions that may
    # match any segments of the path.
    return bool(config.get("modules_to_save")) and config.index("modules_to_save").first(name) is not None


def _ends_in(name: str, entries: Collection[str]) -> bool:
    """Return True if a name ends in one of the entries after a dot."""
    return any(name[i + 1 :] in entries for i, letter in enumerate(name) if letter == ".")


def in_layers(config: Config, name: str) -> bool:
    """Return True if `layers_to_transform` includes the layer of `name`: the first number after the layer list."""
    layers: int | tuple[int, ...] | None = config.get("layers_to_transform")
    if layers is None or layers == ():
        return True
    wanted: Collection[int] = (layers,) if isinstance(layers, int) else config.names("layers_to_transform")
    patterns: str | tuple[str, ...] | None = config.get("layers_pattern")
    if not patterns:
        # Any layer list: a segment, a number, and more. As in PEFT, another segment must precede it.
        hit = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        entries = (patterns,) if isinstance(patterns, str) else patterns
        hit = next(filter(None, (match("layers_pattern", entry, name) for entry in entries)), None)
    # An alternation ("layers|h") can match without reaching the number; then the layer is unknown.
    number = None if hit is None else hit["idx"]
    # Python refuses to convert numbers of very many digits.
    return number is not None and len(number) <= _MAX_DIGITS and int(number) in wanted


def is_all_linear(config: Config) -> bool:
    """Return True if `target_modules` is "all-linear", in any case of letters."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def shortest_suffixes(targets: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return the shortest suffixes (split at dots) that match all of `targets` and none of `others`."""
    excluded = {suffix for other in others for suffix in path_suffixes(other)}
    chosen: set[str] = set()
    for target in sorted(targets, key=path_suffixes):
        endings = path_suffixes(target)
        if chosen.isdisjoint(endings):
            # The full name is always allowed, because no target is one of the others.
            chosen.add(next((ending for ending in endings if ending not in excluded), target))
    return sorted(chosen)


def path_suffixes(name: str) -> list[str]:
    """Return the endings of a name at its dots, shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _no_match_message(config: Config, names: Sequence[str]) -> str:
    """Return the message for targets that match nothing: the targets, similar names and available names."""
    targets = cast("str | tuple[str, ...]", config.get("target_modules"))
    wanted = repr(targets) if isinstance(targets, str) else ", ".join(map(repr, targets)) or "an empty list"
    lines = [f"target_modules: expected to match a module, found none that matches {wanted}"]
    unrestricted = functools.reduce(_without, _RESTRICTIONS, config)
    hidden = [name for name in names if is_target(unrestricted, name)]
    if hidden:
        rules = ", ".join(
            f"{key}={thaw(config.get(key))!r}"
            for key in _RESTRICTIONS
            if config.get(key)  # an empty value excludes nothing
            or (key == "layers_to_transform" and config.get(key) == 0)
        )
        lines.append(f"{len(hidden)} modules match but are excluded by {rules}: {errors.quote_list(hidden)}")
    close = errors.close_matches((targets,) if isinstance(targets, str) else targets, names)
    if close:
        lines.append(f"near misses: {errors.quote_list(close)}")
    if isinstance(targets, str) and not hidden:
        lines.append("a string is a regular expression for the whole name; to give names, write a list")
    lines.append(f"available are {errors.describe_available(names)}")
    return "\n  ".join(lines)


def _without(config: Config, key: str) -> Config:
    """Return the configuration without the value of a key."""
    # layers_pattern requires layers_to_transform.
    for name in ("layers_pattern", key) if key == "layers_to_transform" else (key,):
        if config.get(name) is not None:
            config = config.with_value(name, None)
    return config


# ---------------------------------------------------------------- tensor names


def prefix_of(peft_type: str) -> str | None:
    """Return the start of the names of a method's tensors in modules; None if no module has any.

    >>> prefix_of("LOHA"), prefix_of("PREFIX_TUNING")
    ('hada_', None)
    """
    facts = FACTS[peft_type]
    return None if facts.file_tensors else facts.tensor_prefix or f"{peft_type.lower()}_"


class TensorNames(NamedTuple):
    """The names of several methods' file tensors.

    Attributes:
        prefixes: the first parts of the names of tensors in modules, the longest first.
        with_parts: the names of tensors that consist of parts.
        whole: the keys of tensors that belong to no module.
    """

    prefixes: tuple[str, ...]
    with_parts: frozenset[str]
    whole: frozenset[str]


@functools.cache
def tensor_names(types: tuple[str, ...]) -> TensorNames:
    """Return the names of the file tensors of these types; `tuple(FACTS)` has all of them.

    >>> tensor_names(("OSF", "LORA", "PREFIX_TUNING")).prefixes
    ('lora_', 'osf_')
    """
    prefixes = {prefix for peft_type in types if (prefix := prefix_of(peft_type)) is not None}
    return TensorNames(
        tuple(sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))),
        frozenset(part for peft_type in types for part in FACTS[peft_type].tensor_parts),
        frozenset(key for peft_type in types for key in FACTS[peft_type].file_tensors),
    )


def has_fractions(key: str) -> bool:
    """Return True for a tensor of floating-point numbers: each tensor of a method but its indices.

    >>> has_fractions("base_model.model.q.shira_weight"), has_fractions("base_model.model.q.shira_indices")
    (True, False)
    """
    prefixes = tensor_names(tuple(FACTS)).prefixes
    return any(part.startswith(prefixes) and "indices" not in part for part in key.split("."))


# ---------------------------------------------------------------- methods


PASSING: Mapping[str, str] = {
    "ADAMSS": "its rows come from scikit-learn's KMeans on PyTorch's SVD and are not in the file",
    "XLORA": "it runs the model twice and scales whole LoRA adapters",
    "SHADOW": "it trains a second decoder beside the model",
    "FINEGATES": "no release of PEFT has it",
    "PSOFT": "its file lacks the weight's singular vectors, whose signs depend on the machine's linear algebra",
    "LILY": "its router averages over all tokens of a batch, so the output of a row depends on the other rows",
    "POLY": "it needs a task for each row of a call, and draws random gates in training",
    "GLORA": "its change of a layer's bias depends on the layer's weight",
    "FROD": "it shares matrices among the modules of one name, with sparse indices of 64 bits",
}
"""Reasons not to compute a type, by type."""

NOT_YET = "it is not implemented"

PEFT_TYPES = (
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FINEGATES FOURIERFT FROD GLORA GRALORA HIRA"
    " HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING"
    " PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA"
    " VBLORA VERA WAVEFT XLORA"
).split()
"""The types of PEFT 0.21.2, and those announced for the next."""


_SHOWN = ("trains", "rows", "merges", "merges_files", "learning_rate", "demo", "accuracy", "time")


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        peft_type: PEFT's name of the method.
        summary: a description of the change.
        paper: the address of its paper; "" if it has none.
        source: PEFT's code of the method, a folder in PEFT's package; "" for a method of another package.
        facts: whether it merges, PEFT's figures and more.
    """

    peft_type: str
    summary: str
    paper: str
    source: str
    facts: MethodFacts

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "facts"}
        return {**own, **{name: getattr(self.facts, name) for name in _SHOWN}, "demo": dict(self.facts.demo)}


def describe_methods() -> tuple[MethodInfo, ...]:
    """Return every method that jaxadapt computes, sorted by type, also those registered by other packages.

    >>> [info.paper for info in describe_methods() if info.peft_type == "VERA"]
    ['https://arxiv.org/abs/2310.11454']
    """
    return tuple(
        _describe(peft_type, cls)
        for peft_type in sorted({*FACTS, *Config.classes})
        if (cls := class_of(peft_type)) is not None
    )


def passing_types() -> dict[str, str]:
    """Return `{type: reason}` of PEFT's methods whose files pass through, but which jaxadapt does not compute.

    >>> passing_types()["XLORA"]
    'it runs the model twice and scales whole LoRA adapters'
    """
    known = {info.peft_type for info in describe_methods()}
    return {name: PASSING.get(name, NOT_YET) for name in PEFT_TYPES if name not in known}


def _describe(peft_type: str, cls: type[Config]) -> MethodInfo:
    """Describe a method by the first line of its configuration's docstring, "Name (arXiv:…): what it changes."."""
    first = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
    number = re.search(r"arXiv:(\d+\.\d+)", first)
    title, colon, text = first.partition(": ")
    summary = (text if colon else title).removesuffix(".")
    return MethodInfo(
        peft_type,
        summary,
        f"https://arxiv.org/abs/{number[1]}" if number else "",
        f"peft/tuners/{peft_type.lower()}" if peft_type in PEFT_TYPES else "",
        FACTS[peft_type],
    )
