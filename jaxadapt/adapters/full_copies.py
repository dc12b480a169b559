"""Which leaves an adapter holds a copy of, in full or in part: modules trained in full, biases, rows of tokens.

PEFT's rules, on PyTorch names. Nothing here looks at a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxadapt.adapters import tied
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError, MismatchError, TargetError
from jaxadapt.keymaps import generic, plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods import trainable_tokens
from jaxadapt.methods.full_copy import FullCopy
from jaxadapt.methods.trainable_tokens import TrainableTokens

Shape = tuple[int, ...]
Index = tuple[int, ...]

Replaced = FullCopy | TrainableTokens

TENSORS = frozenset({"copy", trainable_tokens.NAME})
"""What such tensors are called in an adapter."""

LOOKUP = "lookup"
"""The kind of a table of tokens of which a copy counts in the lookup alone, though it is the head as well."""

INPUTS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "shared", "embed_in")
"""What a language model calls its table of tokens, where it has further tables (of positions, of types)."""


def has_copies(config: Config) -> bool:
    """Whether the configuration asks for any copies at all."""
    more = config.get("modules_to_save") or config.get("trainable_token_indices") is not None
    return bool(more) or config.get("bias", "none") != "none"


def trained_rows(config: Config, module: str, inputs: str | None = None) -> tuple[int, ...] | None:
    """The tokens whose rows are trained in a module, None if it is not the table of tokens (`inputs`) or named."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        return next((indices for name, indices in given.items() if module.endswith(name)), None)
    return given if module == inputs else None


def copy_method(
    config: Config, module: str, parameter: str, adapted: Collection[str], inputs: str | None = None, kind: str = ""
) -> Replaced | None:
    """How one parameter is copied, None if it is not; `adapted` are the modules with an adapter of their own.

    PEFT wraps an adapted module, so the name of its bias has "base_layer" in it.
    """
    if matching.is_saved(config, module):
        return FullCopy("modules_to_save", lookup=kind == LOOKUP)
    if parameter == "weight" and (indices := trained_rows(config, module, inputs)) is not None:
        return TrainableTokens(indices)
    mode = config.get("bias", "none")
    if parameter != "bias" or mode == "none":
        return None
    wrapped = module in adapted
    return FullCopy("bias", wrapped) if wrapped or mode == "all" else None


def copied_entries(
    config: Config, site: Match, sizes: Mapping[str, int], adapted: Collection[str], inputs: str | None = None
) -> dict[Index, Replaced]:
    """The copied entries of one leaf, by index over its stacked axes and fused axis."""
    found = {
        index: copied
        for index, (module, parameter) in site.parameters(sizes).items()
        if (copied := copy_method(config, module, parameter, adapted, inputs, site.weight.kind)) is not None
    }
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"leaf {site.leaf!r} holds several parameters in one array, which modules_to_save and bias treat"
            " differently (bias='all' names the biases of adapted modules otherwise than the others); use an unrolled"
            " model, or treat them alike"
        )
    return found


def redundant_keys(tensors: Mapping[str, Any], known: Collection[str], source: str) -> set[str]:
    """The keys of a file that say nothing new of modules trained in full; `MismatchError` where they do.

    With bias="all" PEFT writes the biases of such a module twice more, under the names that they have inside its
    wrapper: as they were trained, and the base's own, which nothing computes with.
    """
    found = {key: "".join(key.rsplit(part, 1)) for part in WRAPPERS for key in tensors if f"{part}." in key}
    found = {key: plain for key, plain in found.items() if key not in known and plain in known and plain in tensors}
    trained = [key for key in found if f"{WRAPPERS[0]}." in key]
    apart = [key for key in trained if not np.array_equal(np.asarray(tensors[key]), np.asarray(tensors[found[key]]))]
    if apart:
        raise MismatchError(
            f"{source}: these repeat tensors, and differ from them:\n"
            + paths.bullets([f"{key} and {found[key]}" for key in apart])
        )
    return set(found)


WRAPPERS = (".modules_to_save", ".original_module")
"""What PEFT's wrapper of a module trained in full calls its parts."""


def match_for_copy(keymap: KeyMap, leaf: str, shape: Shape) -> Match:
    """The leaf's site, by its table or else under its JAX path; a copy needs no roles."""
    site = keymap.match(leaf)
    fits = site is not None and len(site.weight.left) == len(shape)
    return site if site is not None and fits else Match(leaf, generic.entry_for_copy(leaf, shape))


def _of_lookup(site: Match) -> Match:
    line = site.weight
    key = ".".join(site.parameter({}))
    return Match(site.leaf, Weight(site.leaf, key, line.pattern, kind=LOOKUP, fan_in_fan_out=True, scale=line.scale))


def select_copies(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Collection[str]
) -> list[tuple[Match, dict[str, int], dict[Index, Replaced]]]:
    """`(site, sizes, copied entries)` of every leaf that is copied, in the order of `shapes`."""
    if not has_copies(config):
        return []
    sites = [
        (s, plan.axis_sizes(s, shape)) for leaf, shape in shapes.items() for s in [match_for_copy(keymap, leaf, shape)]
    ]
    alone = tied.lookup_only_tables(config, keymap, shapes)
    sites = [(_of_lookup(s) if not s.braced and s.parameter({})[0] in alone else s, sizes) for s, sizes in sites]
    inputs = _inputs(config, sites)
    found = [(site, sizes, copied_entries(config, site, sizes, adapted, inputs)) for site, sizes in sites]
    _check_tokens(config, sites, inputs)
    _check_layouts(config, keymap, {site.leaf: shapes[site.leaf] for site, _, copied in found if copied})
    return [(site, sizes, copied) for site, sizes, copied in found if copied]


def _check_layouts(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> None:
    """Refuse kernels whose layout in PyTorch is not known, where a copy might fit the file transposed."""
    kernels = {leaf: shape for leaf, shape in shapes.items() if leaf.rpartition(".")[2] == "kernel"}
    problems = [
        f"{leaf} {shape}: no line, and more than two axes (PyTorch turns the window of a ConvTranspose round, which no"
        " pattern says)"
        for leaf, shape in kernels.items()
        if len(shape) > 2 and ((site := keymap.match(leaf)) is None or len(site.weight.left) != len(shape))
    ]
    if config.get("fan_in_fan_out"):
        problems += [
            f"{leaf} {shape}: square, and fan_in_fan_out says that some modules store (in, out), as Conv1D of"
            " transformers does, not which; give Weight(leaf, key, 'i o -> i o', fan_in_fan_out=True) for a Conv1D,"
            " 'i o -> o i' for an nn.Linear"
            for leaf, shape in kernels.items()
            if generic.is_guess(keymap, leaf, shape) and generic.is_square(match_for_copy(keymap, leaf, shape), shape)
        ]
    if problems:
        raise KeyMapError(
            f"the adapter would hold full copies of these weights, and the table {keymap.name!r} does not know how"
            " PyTorch lays them out:\n"
            + paths.bullets(problems)
            + generic.ways_out("leave them out of modules_to_save")
        )


def _inputs(config: Config, sites: Collection[tuple[Match, Mapping[str, int]]]) -> str | None:
    """The name of the table of tokens, where a list of indices means it without saying so."""
    if not isinstance(config.get("trainable_token_indices"), tuple):
        return None
    tables = [m for site, sizes in sites if site.weight.kind == "embedding" for m in site.modules(sizes).values()]
    usual = [name for name in tables if name.rpartition(".")[2] in INPUTS]
    for names in (tables, usual):
        if len(names) == 1:
            return names[0]
    raise TargetError(
        "trainable_token_indices: a list of indices means rows of the model's table of tokens, and which weight that is"
        f" does not show (tables here: {tables or 'none'}); name it: {{'embed_tokens': [indices]}}"
    )


def _check_tokens(config: Config, sites: Collection[tuple[Match, Mapping[str, int]]], inputs: str | None) -> None:
    """Refuse tokens beyond a vocabulary or given twice, and names that no module has."""
    given = config.get("trainable_token_indices")
    if given is None:
        return
    problems: list[str] = []
    met: set[str] = set()
    for site, sizes in sites:
        for module, parameter in site.parameters(sizes).values():
            indices = trained_rows(config, module, inputs) if parameter == "weight" else None
            if indices is None:
                continue
            met.add(module)
            role = "in" if site.weight.kind == "embedding" else "out"
            size = sizes[site.roles[role][0]] if site.roles[role] else 0
            if matching.is_saved(config, module):
                problems.append(f"{module}: modules_to_save trains all its rows already")
            twice = sorted(i for i, count in Counter(indices).items() if count > 1)
            problems += [f"{module}: token {i} is given twice" for i in twice]
            problems += [f"{module}: token {i}, of a vocabulary of {size}" for i in indices if not 0 <= i < size]
    if isinstance(given, Mapping):
        problems += [f"{name}: no module is called so" for name in given if not any(m.endswith(name) for m in met)]
    if problems:
        raise TargetError(
            "trainable_token_indices cannot be had here: it is for rows that the model's table has, each once."
            " Resize the model's vocabulary if theirs was, or leave such tokens out (and their rows of the file):\n"
            + paths.bullets(problems)
        )
