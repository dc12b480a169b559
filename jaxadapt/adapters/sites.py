"""A configuration bound to shapes: the adapted leaves, the copies of a model's own weights, and the base's embeddings.

`sites_from_shapes` starts from an adapter without a model (saving), `selection.select_sites` from a model (attaching,
loading). Both return the same `Site` values, which define the parameters' specs and the plan of the file.

A configuration adapts some parameters by their own names: PEFT's `target_parameters`. PEFT wraps the module that holds
such a parameter. If a module holds several, the wrappers nest: the first parameter in the module's own order is
innermost. With two parameters, `experts.base_layer.lora_A.weight` belongs to the first and `experts.lora_A.weight` to
the second. A keymap's entries are in that order.

An adapter copies leaves in full or in part: saved modules, biases, rows of tokens. A tied head shares the weight of the
token embedding. Here both are one leaf, in PEFT two modules. With `ensure_weight_tying` PEFT keeps one adapter for both
and writes it twice, once under each name. Without it, an adapter or copy under one name does not affect the weight's
use under the other name. A keymap lists the modules that can be tied (`KeyMap.tied`); a model ties them if it has no
leaf for the head. Nothing here reads a model.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxadapt.adapters.adapter import (
    SHARED_NODE,
    Adapter,
    BoundTensor,
    Index,
    Shape,
    Site,
    Sites,
    adapted_modules,
    bind_shared,
    bind_site,
    by_leaf,
    entry_shapes,
    single_entry_sizes,
)
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    AttachError,
    ConfigError,
    KeyMapError,
    MismatchError,
    TargetError,
    bullets,
    raise_listed,
    warn,
)
from jaxadapt.keymaps.keymap import (
    GENERIC,
    KeyMap,
    Match,
    entry_for_copy,
    fitting_match,
    is_guess,
    is_square,
    layout_advice,
    tied_heads,
)
from jaxadapt.keymaps.plan import Encoded, PlanEntry, axis_sizes, make_plan, plan_entry, stack_sizes
from jaxadapt.keymaps.weight import MethodTensor, Modules, Weight
from jaxadapt.methods.base import METHODS, Method, Target, get_method
from jaxadapt.methods.copies import ROWS, FullCopy, RowCopy

# ---------------------------------------------------------------- tied


_C = TypeVar("_C", bound=Config)

NAMES = ("embed_tokens", "lm_head")
"""The module names that PEFT recognizes as embeddings."""


def resolve_tying(config: _C, keymap: KeyMap, leaves: Collection[str]) -> _C:
    """Return a configuration with `ensure_weight_tying` as PEFT rewrites it: the token embedding replaces the head.

    PEFT ties nothing if the embedding is adapted under another name than those it knows; the result then says so.

    Raises `ConfigError` if, by its keymap, the model ties no weights.
    """
    tied = tied_heads(keymap, leaves)
    if not tied:
        raise ConfigError(
            f"ensure_weight_tying=True has no effect: by the keymap {keymap.name!r} this model has no tied weights (a"
            " head without a parameter of its own). Leave the field out, or list the tied weights in KeyMap(tied=...)"
        )
    for field in ("modules_to_save", "target_modules"):
        names: Any = config.get(field) or ()
        # A name that PEFT knows as that of an embedding, or the full name that it adds for it.
        if not isinstance(names, str) and any(
            name.rpartition(".")[2] in NAMES or name in tied.values() for name in names
        ):
            return config.replace(**{field: _with_embeddings(names, tied)})
    targets: Any = config.get("target_modules")
    if isinstance(targets, str):
        (embedding,) = set(tied.values())
        suffix = f"|^{re.escape(embedding)}$)"
        if any(re.fullmatch(targets, name) for name in NAMES):
            return config.replace(target_modules=targets if targets.endswith(suffix) else f"(?:{targets}{suffix}")
    if config.get("trainable_token_indices") is None:
        warn(
            "ensure_weight_tying=True has no effect: neither target_modules nor modules_to_save names the embeddings"
            f" {' or '.join(NAMES)}, which are the only names that PEFT ties",
        )
    return config.replace(
        ensure_weight_tying=not any(
            matching.is_target(config, name) or matching.is_saved(config, name) for name in tied.values()
        )
    )


def _with_embeddings(names: Sequence[str], tied: Mapping[str, str]) -> list[str]:
    """Return these names with the token embeddings in place of the heads."""
    replaced = [*names, *(embedding for embedding in dict.fromkeys(tied.values()) if embedding not in names)]
    for head in tied:
        first = next((name for name in replaced if re.match(rf"(^|.*\.){name}($|\..*)", head)), None)
        replaced = [name for name in replaced if name != first]
    return replaced


def repeat_for_heads(config: Config, entries: Iterable[PlanEntry], keymap: KeyMap) -> list[PlanEntry]:
    """Return the entries that a file repeats under the head's name, as the method says (`Method.as_head`)."""
    method = METHODS.get(config.peft_type)
    as_head = {"weight": "weight", "base_layer.weight": "base_layer.weight"}
    as_head |= {} if method is None else method.as_head
    repeated: list[PlanEntry] = []
    for head, embedding in keymap.tied:
        embedding_prefix, head_prefix = (f"{keymap.prefix}{key.removesuffix('weight')}" for key in (embedding, head))
        for entry in entries:
            suffix = entry.keys[0].removeprefix(embedding_prefix)
            if not entry.keys[0].startswith(embedding_prefix) or suffix not in as_head:
                continue
            turned = dataclasses.replace(entry.form, right=entry.form.right[::-1])
            form = entry.form if suffix == as_head[suffix] else turned
            repeated.append(PlanEntry(entry.path, form, (f"{head_prefix}{as_head[suffix]}",)))
    return repeated


# ---------------------------------------------------------------- full copies


TENSORS = frozenset({"copy", ROWS})
"""The names of such tensors in an adapter."""

INPUTS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "shared", "embed_in")
"""The usual names of a language model's token embedding, to tell it from embeddings of positions and of types."""


def _copies_targets(config: Config) -> bool:
    """Return True if the configuration's method trains copies of its targets' parameters."""
    method = METHODS.get(config.peft_type)
    return method is not None and method.scope == "copies"


def trained_rows(config: Config, module: str, inputs: str | None = None) -> tuple[int, ...] | None:
    """Return the tokens whose rows are trained in a module.

    None if the configuration neither names the module nor gives a bare list for it; a bare list is for the token
    embedding (`inputs`).
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        return next((indices for name, indices in given.items() if module.endswith(name)), None)
    return given if module == inputs else None


def copy_method(
    config: Config, module: str, parameter: str, adapted: Mapping[str, int], inputs: str | None = None, kind: str = ""
) -> Method | None:
    """Return how one parameter is copied, None if it is not.

    PEFT wraps an adapted module, so the name of its bias contains "base_layer".

    Args:
        adapted: `{module: number of PEFT's wrappers around it}` of the modules that carry an adapter.
    """
    if matching.is_saved(config, module):
        return FullCopy("modules_to_save", lookup=kind == "lookup")
    if _copies_targets(config) and matching.is_target(config, module):
        return METHODS[config.peft_type].copy_of(config, parameter, kind == "lookup")
    if parameter == "weight" and (indices := trained_rows(config, module, inputs)) is not None:
        return RowCopy(indices)
    mode = config.get("bias", "none")
    if parameter != "bias" or mode == "none":
        return None
    wrappers = adapted.get(module, 0)
    return FullCopy("bias", ".base_layer" * wrappers) if wrappers or mode == "all" else None


def copied_entries(
    config: Config, match: Match, sizes: Mapping[str, int], adapted: Mapping[str, int], inputs: str | None = None
) -> dict[Index, Method]:
    """Return the copied entries of one leaf, by index over its stacked axes and fused axis.

    Raises `ConfigError` if they are copied in different ways.
    """
    entries = {
        index: method
        for index, (module, parameter) in match.parameters(sizes).items()
        if (method := copy_method(config, module, parameter, adapted, inputs, match.weight.kind)) is not None
    }
    if len(set(entries.values())) > 1:
        raise ConfigError(
            f"{match.leaf!r} holds several parameters of PyTorch in one array, and modules_to_save and bias treat"
            " them differently (with bias='all', biases of adapted modules have other names than the rest). Use an"
            " unrolled model, or treat them alike"
        )
    return entries


WRAPPERS = (".modules_to_save", ".original_module")
"""The parts of PEFT's wrapper of a fully trained module, as they occur in keys."""


def match_for_copy(keymap: KeyMap, leaf: str, shape: Shape) -> Match:
    """Return the leaf's match in the keymap, or else one under its JAX path; a copy needs no roles."""
    return fitting_match(keymap, leaf, shape) or Match(leaf, entry_for_copy(leaf, shape))


def _sized_matches(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> list[tuple[Match, dict[str, int]]]:
    """Return the matches of a model's leaves, and their sizes, as copies see them."""
    # The copy of a tied token embedding replaces the weight in the lookup only, since PEFT's head is another module.
    tied = set[str]() if config.get("ensure_weight_tying") else set(tied_heads(keymap, shapes).values())
    found: list[tuple[Match, dict[str, int]]] = []
    for leaf, shape in shapes.items():
        match = match_for_copy(keymap, leaf, shape)
        sizes = axis_sizes(match, shape)
        module = "" if match.braced else match.parameter({})[0]
        if module in tied and isinstance(copy_method(config, module, "weight", {}), FullCopy):
            old = match.weight
            key = ".".join(match.parameter({}))
            match = Match(leaf, Weight(leaf, key, old.pattern, kind="lookup", fan_in_fan_out=True, scale=old.scale))
        found.append((match, sizes))
    return found


def bind_copies(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Sequence[Site]) -> list[Site]:
    """Return the sites of the leaves of a model that are copied in full or in part, in the order of `shapes`."""
    copies_any = (
        config.get("modules_to_save")
        or config.get("trainable_token_indices") is not None
        or config.get("bias", "none") != "none"
        or _copies_targets(config)
    )
    if not copies_any:
        return []
    found = _sized_matches(config, keymap, shapes)
    inputs, counts = _token_embedding(config, found), wrapper_counts(adapted)
    _check_token_indices(config, found, inputs)
    copies = [
        (match, sizes, copied)
        for match, sizes in found
        if (copied := copied_entries(config, match, sizes, counts, inputs))
    ]
    _check_layouts(config, keymap, {match.leaf: shapes[match.leaf] for match, _, _ in copies})
    _warn_of_tables(config, keymap, shapes, [match for match, _, _ in copies])
    adapted_leaves = {site.leaf for site in adapted}
    raise_listed(
        TargetError,
        "target_modules selects weights that modules_to_save or trainable_token_indices copies; name each in one of"
        " them:",
        [match.leaf for match, _, _ in copies if match.leaf in adapted_leaves],
    )
    return [
        bind_site(config, next(iter(copied.values())), keymap, (match, sizes, parameter_names(match, sizes)), copied)
        for match, sizes, copied in copies
    ]


def _warn_of_tables(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], copied: Iterable[Match]) -> None:
    """Warn of copied token embeddings that may be the head too, where no keymap tells."""
    for match in copied if keymap.name == GENERIC.name else ():
        if (
            match.leaf.rpartition(".")[2] == "embedding"
            and not match.braced
            and matching.is_saved(config, match.parameter({})[0])
            and not any(
                shapes[match.leaf][0] in shape
                for leaf, shape in shapes.items()
                if leaf != match.leaf and len(shape) > 1
            )
        ):
            warn(
                f"modules_to_save copies {match.leaf}, and no other weight has as many rows or columns. If the model"
                " computes its logits with it too (`attend`), the copy is used there as well, but PEFT copies the"
                " lookup only. Pass a KeyMap with entries for both, and list them in its tied="
            )


def _check_layouts(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> None:
    """Raise `KeyMapError` for weights whose PyTorch layout is unknown: a copy could fit the file transposed."""
    kernels = {leaf: shape for leaf, shape in shapes.items() if leaf.rpartition(".")[2] == "kernel"}
    problems: list[str] = []
    for leaf, shape in shapes.items():
        match = keymap.match(leaf)
        fits = match is not None and len(match.weight.left) == len(shape)
        if not fits and leaf in kernels and len(shape) > 2:
            problems.append(
                f"{leaf} {shape}: no entry with as many axes (a ConvTranspose of PyTorch flips its window, which no"
                " pattern can express)"
            )
        elif not fits and match is not None:
            problems.append(f"{leaf} {shape}: its entry has another number of axes")
    if config.get("fan_in_fan_out"):
        problems += [
            f"{leaf} {shape}: square, and with fan_in_fan_out its layout is ambiguous: (in, out) as in Conv1D of"
            " transformers, or (out, in) as in nn.Linear. Give Weight(leaf, key, 'i o -> i o', fan_in_fan_out=True) for"
            " a Conv1D, Weight(leaf, key, 'i o -> o i') for an nn.Linear"
            for leaf, shape in kernels.items()
            if is_guess(keymap, leaf, shape) and is_square(match_for_copy(keymap, leaf, shape), shape)
        ]
    raise_listed(
        KeyMapError,
        f"cannot copy these weights in full: the keymap {keymap.name!r} does not define their PyTorch layout:",
        problems,
        layout_advice(config, "leave them out of modules_to_save"),
    )


def _token_embedding(config: Config, matches: Collection[tuple[Match, Mapping[str, int]]]) -> str | None:
    """Return the module of the token embedding if the configuration has a bare list of indices, else None.

    Raises `TargetError` if the model has no such module, or several candidates.
    """
    if not isinstance(config.get("trainable_token_indices"), tuple):
        return None
    embeddings = [
        module
        for match, sizes in matches
        if match.weight.kind == "embedding"
        for module in match.modules(sizes).values()
    ]
    for names in (embeddings, [name for name in embeddings if name.rpartition(".")[2] in INPUTS]):
        if len(names) == 1:
            return names[0]
    raise TargetError(
        "trainable_token_indices: a bare list of indices is for the model's token embedding, and that module is"
        f" ambiguous here (embeddings: {embeddings or 'none'}). Name it: {{'embed_tokens': [indices]}}"
    )


def _check_token_indices(
    config: Config, matches: Collection[tuple[Match, Mapping[str, int]]], inputs: str | None
) -> None:
    """Raise `TargetError` for tokens outside a vocabulary or given twice, and for names that match no module."""
    given = config.get("trainable_token_indices")
    if given is None:
        return
    problems: list[str] = []
    with_rows = [*_modules_with_rows(config, matches, inputs)]
    for module, indices, size in with_rows:
        if matching.is_saved(config, module):
            problems.append(f"{module}: modules_to_save already trains all its rows")
        problems += [
            f"{module}: token {i} is given twice" for i, count in sorted(Counter(indices).items()) if count > 1
        ] + [f"{module}: token {i} is outside the vocabulary of {size}" for i in indices if not 0 <= i < size]
    if isinstance(given, Mapping):
        problems += [
            f"{name}: no module has this name"
            for name in given
            if not any(module.endswith(name) for module, *_ in with_rows)
        ]
    raise_listed(
        TargetError,
        "trainable_token_indices does not fit this model: each index must be a row of the embedding and occur once."
        " Resize the model's vocabulary if the adapter's was resized, or drop these tokens (and their rows of the"
        " file):",
        problems,
    )


def _modules_with_rows(
    config: Config, matches: Iterable[tuple[Match, Mapping[str, int]]], inputs: str | None
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield each module that trains some rows only, with their tokens and the size of the vocabulary."""
    for match, sizes in matches:
        axes = match.roles["in" if match.weight.kind == "embedding" else "out"]
        for module, parameter in match.parameters(sizes).values():
            indices = trained_rows(config, module, inputs) if parameter == "weight" else None
            if indices is not None:
                yield module, indices, sizes[axes[0]] if axes else 0


# ---------------------------------------------------------------- embeddings of the base

# If an adapter is on the embeddings, PEFT writes the base's token embedding and head to the adapter's file; on request
# it does so for any adapter, for a vocabulary that was resized (`save_embedding_layers`). PEFT loads them into the
# base. Here the file is written alike, but loading never changes the base (`persistence.rules`).


def is_embedding(keymap: KeyMap, match: Match | None) -> bool:
    """Return True for a token embedding or a head."""
    if match is None or match.braced:
        return False
    module, parameter = match.parameter({})
    name = module.rpartition(".")[2]
    return parameter == "weight" and (
        (match.weight.kind == "embedding" and name in INPUTS) or module == keymap.output or name in NAMES
    )


def _targets_embedding(config: Config, modules: Sequence[str]) -> bool:
    """Return True if PEFT sees an embedding among the targets; it only knows the usual names."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(module.rpartition(".")[2] in NAMES and matching.is_target(config, module) for module in modules)
    return any(name in (names or ()) for name in NAMES)


def may_need_embeddings(config: Config, mode: bool | str) -> bool:
    """Return True if the file may need embeddings, judging by the configuration only.

    Raises `ConfigError` for an unknown `mode` (PEFT's `save_embedding_layers`).
    """
    if mode not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: expected true, false or 'auto', found {mode!r}")
    return mode is True or (
        mode == "auto" and (isinstance(config.get("target_modules"), str) or _targets_embedding(config, ()))
    )


def add_embeddings(
    tensors: Encoded,
    config: Config,
    keymap: KeyMap,
    sites: Sequence[Site],
    base: Mapping[str, Any] | None,
    mode: bool | str,
) -> Encoded:
    """Return an adapter's tensors with the embeddings that PEFT would save with them.

    Args:
        base: `{leaf: array}` of the base parameters; None for an adapter without a model.
        mode: as PEFT's `save_embedding_layers`: "auto", true or false.
    """
    if base is None and mode is True:
        raise AttachError(
            "save_embedding_layers=True: an adapter without its model does not hold the embeddings; save the model"
        )
    if base is None or not mode:
        return tensors
    modules = {
        match.module({}): match
        for leaf, match in zip(base, map(keymap.match, base), strict=True)
        if match is not None and is_embedding(keymap, match) and len(match.weight.left) == base[leaf].ndim
    }
    adapted = set(adapted_modules(sites))
    targeted = _targets_embedding(config, list(modules))
    if mode == "auto" and (not targeted or config.get("trainable_token_indices") is not None):
        return tensors
    entries, leaves = [*tensors.plan.entries], dict(tensors.leaves)
    for module, match in modules.items():
        inner = ".base_layer" if module in adapted else ""
        tensor = MethodTensor("base", inner, (), (), is_copy=True, scale_power=1)
        entry = plan_entry(keymap, match, tensor, axis_sizes(match, base[match.leaf].shape))
        if (inner or not targeted) and tensors.plan.keys.keys().isdisjoint(entry.keys):
            entries.append(entry)
            leaves[entry.path] = base[match.leaf]
    return dataclasses.replace(tensors, plan=make_plan(entries), leaves=leaves)


def vocabulary_axes(site: Site, keymap: KeyMap) -> tuple[str, ...]:
    """Return the names of the axis that counts tokens, of a token embedding or of the head; empty for other weights."""
    roles = site.match.weight.torch_roles
    if site.match.weight.kind in ("embedding", "lookup"):
        return roles["in"]
    module = site.match.module({}) if not site.match.braced else ""
    return roles["out"] if module and (module == keymap.output or module.rpartition(".")[2] in NAMES) else ()


# ---------------------------------------------------------------- sites


def parameter_names(match: Match, sizes: Mapping[str, int]) -> dict[Index, str]:
    """Return the full names of a leaf's PyTorch parameters, by index over its braced axes."""
    return {index: paths.join(*name) for index, name in match.parameters(sizes).items()}


def expert_parameters(keymap: KeyMap, shapes: Mapping[str, Shape], kinds: Collection[str] = ("experts",)) -> list[str]:
    """Return PyTorch's names of the parameters of all experts among a model's leaves.

    Args:
        kinds: the kinds of entries; "parameter" are routers.

    >>> from jaxadapt.keymaps.families.moe import LLAMA4
    >>> shapes = {"model.layers.3.feed_forward.experts.down_proj": (4, 6, 2), "model.norm.weight": (2,)}
    >>> expert_parameters(LLAMA4, shapes)
    ['model.layers.3.feed_forward.experts.down_proj']
    """
    if all(weight.kind not in kinds for weight in keymap.weights):
        return []
    matches = ((keymap.match(leaf), shape) for leaf, shape in shapes.items())
    found = ((match, shape) for match, shape in matches if match is not None and match.weight.kind in kinds)
    names = (parameter_names(match, axis_sizes(match, shape)).values() for match, shape in found)
    return list(dict.fromkeys(name for own in names for name in own))


def wrapper_depths(keymap: KeyMap, matches: Iterable[Match]) -> dict[str, int]:
    """Return `{leaf: number of PEFT's wrappers outside its own}` for the leaves that one adapter adapts by name."""
    order = {weight.leaf: i for i, weight in enumerate(keymap.weights)}
    positions: dict[str, dict[str, int]] = {}  # parameters of each module, in the keymap's order; leaves may share one
    names: dict[str, tuple[str, str]] = {}
    for match in matches:
        owner, name = names[match.leaf] = match.parameter({axis.strip("{}"): axis for axis in match.braced})
        positions.setdefault(owner, {})[name] = order[match.weight.leaf]
    ranked = {owner: sorted(parameters, key=parameters.__getitem__) for owner, parameters in positions.items()}
    return {leaf: len(ranked[owner]) - 1 - ranked[owner].index(name) for leaf, (owner, name) in names.items()}


def wrapper_counts(sites: Iterable[Site]) -> Counter[str]:
    """Return the number of PEFT's wrappers around each adapted module: one, or one for each adapted parameter."""
    modules = {name for site in sites if not site.method.on_parameters for name in site.modules}
    parameters = {name for site in sites if site.method.on_parameters for name in site.modules}
    return Counter(modules) | Counter(name.rpartition(".")[0] for name in parameters)


def sites_from_shapes(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> Sites:
    """Return the sites of an adapter from its own tensors, `{base leaf: {tensor: shape}}`.

    The leaf "~shared" has the tensors of the whole adapter.

    Raises `KeyMapError` for a leaf without an entry. Raises `MismatchError` if shapes contradict each other or the
    configuration.
    """
    flat = ((f"{leaf}.{name}", shape) for leaf, shapes in leaves.items() for name, shape in shapes.items())
    return _recover_sites(config, keymap, tuple(flat))


def sites_of(adapter: Adapter) -> Sites:
    """Return the sites of an adapter, with its shared tensors."""
    return _recover_sites(adapter.config, adapter.keymap, tuple(adapter.leaf_shapes.items()))


@functools.lru_cache(maxsize=64)  # every save of a run needs the same sites, and every call outside jit
def _recover_sites(config: Config, keymap: KeyMap, tensors: tuple[tuple[str, Shape], ...]) -> Sites:
    """Return the sites of an adapter's leaves, from `(path, shape)` pairs: adapted ones first, then copies."""
    method = get_method(config)
    leaves = by_leaf(dict(tensors))
    found_shared = leaves.pop(SHARED_NODE, {})
    matches = {leaf: match for leaf in leaves if (match := keymap.match(leaf)) is not None}
    copied = [match for leaf, match in matches.items() if not TENSORS.isdisjoint(leaves[leaf])]
    sites = _recover_adapted(config, method, keymap, matches.values(), leaves)
    adapted = wrapper_counts(sites)
    sites += [_recover_copy(config, keymap, match, leaves[match.leaf], adapted) for match in copied]
    raise_listed(
        KeyMapError,
        f"the keymap {keymap.name!r} has no entry for these adapted weights:",
        [leaf for leaf in leaves if leaf not in matches],
        "\nPass the same module that was adapted (neither a part of it nor a module around it), or its keymap=,"
        " extract(model).keymap",
    )
    shared = bind_shared(config, method, sites, found_shared) if found_shared else ()
    _check_shared(shared, found_shared)
    untargeted = (
        name
        for site in sites
        if not site.method.copies
        for name in site.modules
        if not _is_targeted(config, site.method, name)
    )
    return Sites(sites, shared, method, keymap, untargeted)


def _check_shared(shared: Sequence[BoundTensor], found: Mapping[str, Shape]) -> None:
    """Raise `MismatchError` for each shared tensor that is missing, unknown or wrongly shaped."""
    differences = paths.compare(
        {each.tensor.name: paths.Spec(each.entry.shape) for each in shared},
        {name: paths.Spec(shape) for name, shape in found.items()},
        {each.tensor.name for each in shared if not each.tensor.trained},  # a tree of the trained parameters lacks them
    )
    raise_listed(MismatchError, "the adapter's shared tensors contradict its configuration:", map(str, differences))


def _recover_adapted(
    config: Config, method: Method, keymap: KeyMap, matches: Iterable[Match], shapes: Mapping[str, Mapping[str, Shape]]
) -> list[Site]:
    """Return the sites of the leaves that are adapted, not copied, from the shapes of their tensors."""
    # The sizes depend on which entries are targeted, and the entries on the sizes, so the stacked sizes come first.
    sized = [
        (match, _stacked_sizes(config, method, match, shapes[match.leaf]))
        for match in matches
        if TENSORS.isdisjoint(shapes[match.leaf])
    ]
    by_name = (
        match
        for match, sizes in (sized if config.get("target_parameters") else ())
        if any(matching.is_parameter(config, name) for name in parameter_names(match, sizes).values())
    )
    depths = wrapper_depths(keymap, by_name)
    sites: list[Site] = []
    for match, sizes in sized:
        depth = depths.get(match.leaf)
        own = method if depth is None else method.for_parameter(depth)
        names = match.modules(sizes) if depth is None else parameter_names(match, sizes)
        targeted = [index for index, name in names.items() if _is_targeted(config, own, name)]
        sites.append(bind_site(config, own, keymap, (match, sizes, names), targeted, shapes=shapes[match.leaf]))
    return sites


def _recover_copy(
    config: Config, keymap: KeyMap, match: Match, shapes: Mapping[str, Shape], adapted: Mapping[str, int]
) -> Site:
    """Return the site of one leaf that is copied in full or in part; raise `MismatchError` if nothing asks for it."""
    # A bare list of tokens is for the leaf that holds their rows.
    inputs = match.module({}) if "copy" not in shapes and not match.braced else None
    sizes = single_entry_sizes(match)
    if "copy" in shapes and len(shapes["copy"]) == len(match.weight.left):
        leaf_sizes = dict(zip(match.weight.left, shapes["copy"], strict=True))
        sizes |= {axis: leaf_sizes[axis] for axis in match.braced if match.weight.index_names(axis) is None}
    entries = copied_entries(config, match, sizes, adapted, inputs)
    if not entries:
        raise MismatchError(
            f"{match.leaf!r}: the adapter holds {', '.join(shapes)}, which the configuration does not ask for: none"
            " of modules_to_save, bias and trainable_token_indices names it"
        )
    return bind_site(
        config,
        next(iter(entries.values())),
        keymap,
        (match, sizes, parameter_names(match, sizes)),
        entries,
        shapes=shapes,
    )


def require_complete(leaves: Mapping[str, Any], sites: Sites) -> None:
    """Raise `AttachError` if an adapter's `{path: array}` lacks tensors, as a state with only the trained ones does."""
    missing = [entry.path for site in sites for entry in site.entries if entry.path not in leaves]
    method = sites.method
    if method is not None and method.has_shared and not sites.shared:
        missing.append(f"{SHARED_NODE}: the tensors of the whole adapter")
    missing += [each.entry.path for each in sites.shared if each.entry.path not in leaves]
    if method is not None and method.scope == "site" and not sites:
        missing.append("the tensors of its modules")
    if missing:
        raise AttachError(
            "this adapter lacks tensors, as a tree with only the trained parameters does; pass the model or all its"
            f" variables:\n{bullets(missing)}"
        )


def _stacked_sizes(config: Config, method: Method, match: Match, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the sizes of all braced axes; those of numbered axes come from the tensors' shapes."""
    sizes = single_entry_sizes(match)
    # Modules may differ in other axes; the stacked axes are in the same place for all.
    names = list(match.modules(sizes).values())
    probed = [name for name in names if matching.is_target(config, name)] or names
    found = entry_shapes(match, shapes)
    probe = [
        tensor for name in probed for tensor in method.tensors(config, Target(match, Modules((name,)), found=found))
    ]
    return sizes | stack_sizes(match, probe, shapes)


def _is_targeted(config: Config, method: Method, name: str) -> bool:
    """Return True if the configuration selects a module, or a parameter of a method that adapts these."""
    return matching.is_parameter(config, name) if method.on_parameters else matching.is_target(config, name)
