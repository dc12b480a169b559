"""Files alone: an adapter from one family, spelling or library's layout into another, with no model at hand.

A PEFT folder is the form between all of them. The other is a safetensors file of a tree's leaves under their dotted
paths, `save_file({".".join(path): leaf, …})`, as another library's users keep it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.configs import Config, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, FormatError, KeyMapError
from jaxadapt.core.progress import Progress
from jaxadapt.keymaps import families, pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.models.foreign import blank as laying
from jaxadapt.models.foreign import dialects
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.foreign.dialect import Dialect, is_like
from jaxadapt.persistence import folder, orbax_folder
from jaxadapt.storage import location, safetensors
from jaxadapt.storage.location import Place

NOTE = "jaxadapt_tree"
"""The key of the note in a tree's file: the scale that the tree itself does not keep."""


@dataclasses.dataclass(frozen=True)
class ConvertedFile:
    """What was written: for a tree, what its model must be built with."""

    path: str
    tensors: int
    dialect: str | None
    rank: int
    lora_alpha: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    from_keymap: KeyMap | str | None = None,
    to_keymap: KeyMap | str | None = None,
    dialect: str | None = None,
    lora_alpha: float | None = None,
    like: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    on_shared: str | None = None,
    format: str = "safetensors",  # noqa: A002 (as in `save`)
    progress: Progress = None,
) -> ConvertedFile:
    """Re-lay an adapter: from a PEFT folder or a tree's file (`*.safetensors`) into a PEFT folder or a tree's file.

    An Orbax checkpoint that `save` wrote is read as a folder is.

    Args:
        from_keymap: the family of a tree that is read; by default the one its paths show. Of a folder: the spelling.
        to_keymap: the family of a tree that is written; of a folder, another spelling.
        dialect: of a tree that is written; by default what the family's library trains with.
        lora_alpha: of a tree that is read, where its file does not say it.
        like: a safetensors file with the base weights' shapes of the tree that is written, or else read (its header
            is all that is read).
        sizes: else those of axes that a file does not tell apart, by the letters of the family's lines.
        on_shared: as in `load`; the rank grows as is needed.
        format: "orbax" for an Orbax checkpoint instead of a folder: under PyTorch's names, which any model loads.
        progress: as in `read` and `write`, of a folder that is read or written.

    Raises `AdapterError`, and then nothing is written. It speaks of the command's options (`jaxadapt convert`).
    """
    trees = [location.to_location(path).suffix == ".safetensors" for path in (source, target)]
    if not any(trees) and (like is not None or sizes):
        raise ConfigError("--like and --axis are for trees (a file ending in .safetensors)")
    if format not in ("safetensors", "orbax") or (trees[1] and format == "orbax"):
        raise ConfigError(f"--format {format}: expected safetensors, or orbax with a folder as the target")
    tensors = _read(source, from_keymap, lora_alpha, None if trees[1] else like, sizes or {}, progress, on_shared)
    if not trees[1]:
        spelt = from_keymap is not None and to_keymap is not None and not trees[0]
        tables = [families.resolve_keymap(keymap, {}) for keymap in (from_keymap, to_keymap)] if spelt else []
        apart = spelt and tables[0].single != tables[1].single
        if dialect is not None or (on_shared is not None and not trees[0] and not apart):
            raise ConfigError("--dialect and --concat are for trees (a file ending in .safetensors)")
        if apart and tables[1].single:
            tensors = PeftTensors(*experts.split_experts(tensors.config, tensors.tensors, tables[1]), tensors.source)
        elif apart:
            tensors = experts.fuse_experts(tensors, tables[0], on_shared, "convert(source, target", parts=False)
        elif spelt:
            tensors = _respelt(tensors, *tables)
        elif to_keymap is not None:
            raise ConfigError("--to is for trees, or with --from for another spelling of the same family")
        config = _lora(tensors.config, "a folder").replace(inference_mode=True)
        tensors = dataclasses.replace(tensors, config=config)
        if format == "orbax":
            orbax_folder.write(_under_pytorchs_names(tensors), target, alone=True)
        else:
            folder.write(tensors, target, progress=progress)
        return ConvertedFile(str(target), len(tensors.tensors), None, config.r, config.lora_alpha)
    if to_keymap is None:
        raise ConfigError("a tree needs its family: --to tunix:qwen3, say")
    table = families.resolve_keymap(to_keymap, {})
    return _write_tree(tensors, location.to_location(target), table, dialect, like, sizes or {}, on_shared)


def _under_pytorchs_names(tensors: PeftTensors) -> Adapter:
    """The adapter of a model whose parameters are called and laid out as PyTorch's are."""
    from jaxadapt.persistence import peft  # which brings Flax, that nothing else here needs

    shapes = {key: tuple(x.shape) for key, x in tensors.tensors.items()}
    weights = pytorch.weight_shapes(shapes)
    base = paths.unflatten({leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in weights.items()})
    return peft.from_peft(tensors, base, keymap=pytorch.state_dict_keymap(weights, shapes, tensors.source))


def _read(
    source: str | os.PathLike[str],
    keymap: KeyMap | str | None,
    lora_alpha: float | None,
    like: Any,
    sizes: Mapping[str, int],
    progress: Progress,
    on_shared: str | None = None,
) -> PeftTensors:
    path = location.to_location(source)
    if path.suffix != ".safetensors":
        if lora_alpha is not None:
            raise ConfigError(f"{path}: --lora-alpha is for a tree's file; an adapter's folder has its own")
        return folder.read(source, progress=progress)
    leaves = _dotted(safetensors.read(path), path)
    note = _note(path)
    if lora_alpha is None and note:
        lora_alpha = note["lora_alpha"]
    if not any(map(is_like, leaves)):
        raise FileError(f"{path}: expected the leaves of a tree with LoRA in it, found none that looks like one")
    found = foreign.find_lora(leaves)
    if found is None:
        raise FileError(f"{path}: {foreign.describe_unknown(leaves).strip()}")
    found = dataclasses.replace(found, base={**found.base, **_shapes(like, found.dialect)}, sizes=sizes)
    config, _, tensors = foreign.tree_to_peft(
        found, None, keymap, lora_alpha, "convert(source, target", None, on_shared
    )
    return PeftTensors(config, tensors, str(path))


def _note(path: Place) -> dict[str, Any]:
    text = safetensors.read_header(path).metadata.get(NOTE, "{}")
    try:
        found = json.loads(text)
        alpha = found.get("lora_alpha")
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(alpha, int | float) and not isinstance(alpha, bool) else {}


def _dotted(leaves: Mapping[str, Any], source: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    twice: list[str] = []
    for path, leaf in leaves.items():
        dotted = path.replace("/", ".")
        if dotted in out:
            twice.append(path)
        out[dotted] = leaf
    if twice:
        raise FormatError(f"{source}: two leaves have one path, with dots or slashes in it:\n" + paths.bullets(twice))
    return out


def _lora(config: Config, what: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{config.peft_type} cannot be converted to {what}: trees of other libraries hold LoRA only")
    return config


def _respelt(tensors: PeftTensors, source: KeyMap, target: KeyMap) -> PeftTensors:
    config = tensors.config
    pairs = _pairs(tensors)
    names = laying.respell_modules(source, target, list(pairs))
    stale = [f for f in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform") if config.get(f)]
    if stale and set(names) != set(names.values()):
        raise ConfigError(f"{tensors.source}: {', '.join(stale)} speak of the old names; write them anew")
    if not all(matching.matches(config, m) for m in names.values()):
        config = _lora(config, "another spelling").replace(target_modules=sorted(names.values()))
    new = {
        f"{PEFT_PREFIX}{names[m]}.lora_{side}.weight": x
        for m, pair in pairs.items()
        for side, x in zip("AB", pair, strict=True)
    }
    return PeftTensors(config, new, tensors.source)


def _write_tree(
    tensors: PeftTensors,
    path: Place,
    keymap: KeyMap,
    name: str | None,
    like: Any,
    sizes: Mapping[str, int],
    on_shared: str | None,
) -> ConvertedFile:
    config = _lora(tensors.config, "a tree")
    library = keymap.name.partition(":")[0]
    if name is None and library not in dialects.USED:
        known = ", ".join(dialects.DIALECTS)
        raise ConfigError(f"say which dialect (--dialect) the tree of {keymap.name!r} has: {known}")
    dialect = dialects.get_dialect(name or dialects.USED[library])
    if dialect.slots is not None:
        raise ConfigError(f"{dialect.name} keeps several adapters in one tree; load into its model instead")
    known = _shapes(like, dialect)
    leaves = known or [w.leaf.replace("{l}", "0") for w in keymap.weights]
    keymap = keymap.spelling_for([key.removeprefix(PEFT_PREFIX) for key in tensors.tensors], leaves)
    single, whole = keymap, tensors
    if tensors.config.get("target_parameters") or experts.may_have_experts(tensors.tensors):
        single = experts.per_expert_keymap(keymap)
        whole = experts.fuse_experts(tensors, keymap, on_shared, "convert(source, target")
        whole = PeftTensors(*experts.split_experts(whole.config, whole.tensors, single, keymap), tensors.source)
    pairs = _pairs(whole)
    shapes = {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in pairs.items()}
    adapted = laying.find_adapted_leaves(single, shapes, known)

    def blank(rank: int) -> foreign.ForeignTree:
        arrays: dict[str, tuple[int, ...]] = {}
        for one in adapted:
            arrays |= laying.blank_arrays(dialect, one, shapes, rank, known.get(one.site.leaf), sizes)
        # (What is never written is never read, so that only the shapes cost anything.)
        dtype = np.result_type(*(a.dtype for a, _ in pairs.values()))
        leaves = {p: np.broadcast_to(np.zeros((), dtype), shape) for p, shape in arrays.items()}
        return foreign.ForeignTree(leaves, dialect, leaves, lambda new: {**leaves, **new}, known, {}, sizes)

    rank = max(a[0] for a, _ in shapes.values())
    if on_shared is not None or dialect.per_head:
        rank = foreign.needed_rank(blank(rank), keymap, whole.tensors, pairs)
    scale = config.lora_alpha / config.r
    alpha = None if dialect.unscaled else scale * rank
    tree = foreign.fill_tree(
        blank(rank), config, tensors.tensors, keymap=keymap, lora_alpha=alpha, on_shared=on_shared,
        source=tensors.source, call="convert(source, target",
    )  # fmt: skip
    written = {p: np.asarray(x) for p, x in tree.items()}
    note = {NOTE: json.dumps({"dialect": dialect.name, "keymap": keymap.name, "lora_alpha": alpha})}
    specs = {p: (x.dtype, x.shape) for p, x in written.items()}
    safetensors.write(path, specs, written.__getitem__, {} if alpha is None else note)
    return ConvertedFile(str(path), len(written), dialect.name, rank, float(rank if alpha is None else alpha))


def _pairs(tensors: PeftTensors) -> dict[str, tuple[Any, Any]]:
    """`{module: (A, B)}`; what is neither is refused."""
    found: dict[str, dict[str, Any]] = {}
    odd: list[str] = []
    for key, x in tensors.tensors.items():
        module, middle, last = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if middle and last in ("A.weight", "B.weight"):
            found.setdefault(module, {})[last[0]] = x
        else:
            odd.append(key)
    half = [m for m, pair in found.items() if len(pair) != 2]
    if odd or half:
        listed = [*odd, *(f"{m}: A or B is missing" for m in half)]
        raise KeyMapError(f"{tensors.source}: no place in a tree for\n" + paths.bullets(listed))
    return {m: (pair["A"], pair["B"]) for m, pair in found.items()}


def _shapes(like: Any, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """`{base leaf: shape}` of a file with a tree's shapes."""
    if like is None:
        return {}
    header = safetensors.read_header(like).tensors
    leaves = _dotted({path: info.shape for path, info in header.items()}, like)
    return {dialect.base(p): tuple(shape) for p, shape in leaves.items() if not is_like(p)}
