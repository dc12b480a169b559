"""Convert adapter files between families, spellings and libraries, without a model.

Every conversion is from or to a PEFT folder. The other side may be a tree: a safetensors file of the LoRA leaves of
another library under their dotted paths, `save_file({".".join(path): leaf, …})`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import Config, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, FileError, FormatError, KeyMapError, raise_listed
from jaxadapt.core.progress import Progress
from jaxadapt.export import file_formats
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.models.foreign import blank, dialects
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.foreign.dialect import Dialect, is_like
from jaxadapt.persistence import folder, image_files, mlx_files, orbax_folder
from jaxadapt.storage import atomic, location, safetensors
from jaxadapt.storage.location import Location

NOTE = "jaxadapt_tree"
"""The metadata key for the scale of a tree, which its leaves do not contain."""


@dataclasses.dataclass(frozen=True)
class ConvertedFile:
    """A converted adapter. A tree's model must be built with its rank and alpha."""

    path: str
    tensors: int
    dialect: str | None
    rank: int | None
    lora_alpha: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@atomic.cleans("target")
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
    format: str | None = None,  # noqa: A002 (as in `save`)
    dtype: str | None = None,
    progress: Progress = None,
) -> ConvertedFile:
    """Convert an adapter from a PEFT folder or a tree (`*.safetensors`) to a PEFT folder or a tree.

    An Orbax checkpoint written by `save` and mlx-lm's folder are read like a folder. Without a tree, only the format
    changes: `file_formats.convert_format`.

    Args:
        source: the PEFT folder, Orbax checkpoint, mlx-lm folder or tree to read.
        target: the PEFT folder or tree to write.
        from_keymap: the family of a source tree (default: recognized by its paths), or the spelling of a source folder.
        to_keymap: the family of a target tree, or another spelling for a target folder.
        dialect: the LoRA layout of a target tree. Default: the one of the family's library.
        lora_alpha: the alpha of a source tree whose file does not contain it.
        like: a safetensors file with the base weights of the target tree, or else of the source tree. Only the shapes
            in its header are read.
        sizes: in place of `like`, the sizes of ambiguous axes by their letters in the family's entries.
        on_shared: as in `load`; the rank grows as needed.
        format: "bin" writes a folder with PyTorch's adapter_model.bin; "orbax" an Orbax checkpoint with PyTorch's names
            in place of a folder, which any model can load; "kohya-ss" and "diffusers" the file of an image adapter.
        dtype: as in `convert_format`.
        progress: as in `read` and `write`, for folders.

    Raises:
        AdapterError: the conversion is impossible, and nothing is written. The message names the options of
            `jaxadapt convert`.
    """
    trees = [location.to_location(path).suffix == ".safetensors" for path in (source, target)]
    if not any(trees) and (like is not None or sizes):
        raise ConfigError("--like and --axis need a tree (a file ending in .safetensors) as source or target")
    keymaps_given = from_keymap is not None or to_keymap is not None
    is_adapter = trees[0] and (image_files.is_image_file(source) or mlx_files.is_file(source))
    if is_adapter or (not keymaps_given and not trees[0] and (not trees[1] or format in file_formats.FILES)):
        given = {"--from": from_keymap, "--to": to_keymap, "--dialect": dialect, "--on-shared": on_shared}
        _refuse_tree_options(given | {"--lora-alpha": lora_alpha}, source)
        (done, *more) = file_formats.convert_format(source, target, format=format, dtype=dtype, progress=progress)
        return ConvertedFile(str(target), sum(part.tensors for part in (done, *more)), None, done.rank, done.lora_alpha)
    if dtype is not None:
        raise ConfigError("--dtype cannot be combined with --from or --to; convert the result again with --dtype")
    format = format or "safetensors"  # noqa: A001
    if format not in file_formats.FOLDERS or (trees[1] and format != "safetensors"):
        raise ConfigError(f"--format {format}: expected safetensors, or bin or orbax with a folder as the target")
    tensors = _read(source, from_keymap, lora_alpha, None if trees[1] else like, sizes or {}, progress, on_shared)
    if not trees[1]:
        respell = from_keymap is not None and to_keymap is not None and not trees[0]
        keymaps = [families.resolve_keymap(keymap, {}) for keymap in (from_keymap, to_keymap)] if respell else []
        converts_experts = respell and keymaps[0].per_expert != keymaps[1].per_expert
        if dialect is not None or (on_shared is not None and not trees[0] and not converts_experts):
            raise ConfigError("--dialect and --on-shared need a tree (a file ending in .safetensors)")
        if converts_experts and keymaps[1].per_expert:
            tensors = PeftTensors(*experts.split_experts(tensors.config, tensors.tensors, keymaps[1]), tensors.source)
        elif converts_experts:
            tensors = experts.fuse_experts(tensors, keymaps[0], on_shared, parts=False)
        elif respell:
            tensors = _respell(tensors, *keymaps)
        elif to_keymap is not None:
            raise ConfigError("--to needs a tree (.safetensors) as target; to rename a folder's modules, add --from")
        config = _require_lora(tensors.config, "a folder").replace(inference_mode=True)
        tensors = dataclasses.replace(tensors, config=config)
        if format == "orbax":
            orbax_folder.write(file_formats.with_pytorch_names(tensors), target, alone=True)
        else:
            folder.write(tensors, target, format=format, progress=progress)
        return ConvertedFile(str(target), len(tensors.tensors), None, config.r, config.lora_alpha)
    if to_keymap is None:
        raise ConfigError("a target tree needs its family: pass --to, for example --to tunix:qwen3")
    keymap = families.resolve_keymap(to_keymap, {})
    return _write_tree(tensors, location.to_location(target), keymap, dialect, like, sizes or {}, on_shared)


def _refuse_tree_options(options: Mapping[str, Any], source: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given == ["--lora-alpha"]:
        raise ConfigError(f"{source}: --lora-alpha is for a source tree; the folder of an adapter contains alpha")
    if given:
        raise ConfigError(
            f"{', '.join(given)}: --dialect and --on-shared need a tree (a file ending in .safetensors), and --from and"
            " --to a tree or a folder of PEFT's"
        )


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
            raise ConfigError(f"{path}: --lora-alpha is for a source tree; the folder of an adapter contains alpha")
        return folder.read(source, progress=progress)
    leaves = _with_dotted_paths(safetensors.read(path), path)
    note = _read_note(path)
    if lora_alpha is None and note:
        lora_alpha = note["lora_alpha"]
    if not any(map(is_like, leaves)):
        raise FileError(f"{path}: expected a tree with LoRA leaves, found no leaf that looks like one")
    tree = foreign.find_lora(leaves)
    if tree is None:
        raise FileError(f"{path}: {foreign.describe_unknown(leaves).strip()}")
    tree = dataclasses.replace(tree, base={**tree.base, **_base_shapes(like, tree.dialect)}, sizes=sizes)
    tensors, _ = foreign.tree_to_peft(tree, None, keymap, lora_alpha, on_shared)
    return dataclasses.replace(tensors, source=str(path))


def _read_note(path: Location) -> dict[str, Any]:
    text = safetensors.read_header(path).metadata.get(NOTE, "{}")
    try:
        note = json.loads(text)
        alpha = note.get("lora_alpha")
    except (ValueError, AttributeError):
        return {}
    return note if isinstance(alpha, int | float) and not isinstance(alpha, bool) else {}


def _with_dotted_paths(leaves: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Replace slashes in paths by dots; raise `FormatError` if two paths become equal."""
    dotted: dict[str, Any] = {}
    duplicates: list[str] = []
    for path, leaf in leaves.items():
        name = path.replace("/", ".")
        if name in dotted:
            duplicates.append(path)
        dotted[name] = leaf
    raise_listed(FormatError, f"{source}: two leaves have the same path if slashes are read as dots:", duplicates)
    return dotted


def _require_lora(config: Config, target: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"cannot convert {config.peft_type} to {target}: trees of other libraries support LoRA only")
    return config


def _respell(tensors: PeftTensors, source: KeyMap, target: KeyMap) -> PeftTensors:
    """Rename the modules of an adapter from the spelling of one keymap to that of another."""
    config = tensors.config
    pairs = _lora_pairs(tensors)
    names = blank.respell_modules(source, target, list(pairs))
    stale = [f for f in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform") if config.get(f)]
    if stale and set(names) != set(names.values()):
        raise ConfigError(
            f"{tensors.source}: cannot rename the modules, because {', '.join(stale)} of the configuration use the old"
            " names; edit the configuration first"
        )
    if not all(matching.is_target(config, m) for m in names.values()):
        config = _require_lora(config, "another spelling").replace(target_modules=sorted(names.values()))
    new = {
        f"{PEFT_PREFIX}{names[m]}.lora_{side}.weight": x
        for m, pair in pairs.items()
        for side, x in zip("AB", pair, strict=True)
    }
    return PeftTensors(config, new, tensors.source)


def _write_tree(
    tensors: PeftTensors,
    path: Location,
    keymap: KeyMap,
    name: str | None,
    like: Any,
    sizes: Mapping[str, int],
    on_shared: str | None,
) -> ConvertedFile:
    """Write a tree for the dialect `name` of the model family `keymap`."""
    config = _require_lora(tensors.config, "a tree")
    library = keymap.name.partition(":")[0]
    if name is None and library not in dialects.USED:
        raise ConfigError(
            f"the LoRA layout of a {keymap.name!r} tree is ambiguous: pass --dialect, one of"
            f" {', '.join(dialects.DIALECTS)}"
        )
    dialect = dialects.get_dialect(name or dialects.USED[library])
    if dialect.slots is not None:
        raise ConfigError(
            f"cannot write a {dialect.name} tree, because it contains several adapters; load the adapter into the model"
        )
    known_shapes = _base_shapes(like, dialect)
    leaves = known_shapes or [w.leaf.replace("{l}", "0") for w in keymap.weights]
    keymap = keymap.spelling_for([key.removeprefix(PEFT_PREFIX) for key in tensors.tensors], leaves)
    layer_keymap, layer_tensors = keymap, tensors
    if tensors.config.get("target_parameters") or experts.may_have_experts(tensors.tensors):
        layer_keymap = experts.per_expert_keymap(keymap)
        fused = experts.fuse_experts(tensors, keymap, on_shared)
        layer_tensors = PeftTensors(
            *experts.split_experts(fused.config, fused.tensors, layer_keymap, keymap), tensors.source
        )
    pairs = _lora_pairs(layer_tensors)
    shapes = {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in pairs.items()}
    adapted = blank.find_adapted_leaves(layer_keymap, shapes, known_shapes)

    def blank_tree(rank: int) -> foreign.ForeignTree:
        arrays: dict[str, tuple[int, ...]] = {}
        for leaf in adapted:
            arrays |= blank.blank_arrays(dialect, leaf, shapes, rank, known_shapes.get(leaf.match.leaf), sizes)
        dtype = np.result_type(*(a.dtype for a, _ in pairs.values()))
        # Broadcast scalars need no memory; their values are never read.
        leaves = {p: np.broadcast_to(np.zeros((), dtype), shape) for p, shape in arrays.items()}
        return foreign.ForeignTree(leaves, dialect, leaves, lambda new: {**leaves, **new}, known_shapes, {}, sizes)

    rank = max(a[0] for a, _ in shapes.values())
    if on_shared is not None or dialect.heads:
        rank = foreign.needed_rank(blank_tree(rank), keymap, layer_tensors.tensors, pairs)
    scale = config.lora_alpha / config.r
    alpha = None if dialect.unscaled else scale * rank
    tree = foreign.fill_tree(
        blank_tree(rank),
        config,
        tensors.tensors,
        keymap=keymap,
        lora_alpha=alpha,
        on_shared=on_shared,
        source=tensors.source,
    )
    arrays = {p: np.asarray(x) for p, x in tree.items()}
    note = {NOTE: json.dumps({"dialect": dialect.name, "keymap": keymap.name, "lora_alpha": alpha})}
    specs = {p: (x.dtype, x.shape) for p, x in arrays.items()}
    safetensors.write(path, specs, arrays.__getitem__, {} if alpha is None else note)
    return ConvertedFile(str(path), len(arrays), dialect.name, rank, float(rank if alpha is None else alpha))


def _lora_pairs(tensors: PeftTensors) -> dict[str, tuple[Any, Any]]:
    """Return `{module: (A, B)}`; raise `KeyMapError` for all other tensors."""
    pairs: dict[str, dict[str, Any]] = {}
    unsupported: list[str] = []
    for key, x in tensors.tensors.items():
        module, separator, suffix = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if separator and suffix in ("A.weight", "B.weight"):
            pairs.setdefault(module, {})[suffix[0]] = x
        else:
            unsupported.append(key)
    incomplete = [m for m, pair in pairs.items() if len(pair) != 2]
    if unsupported or incomplete:
        problems = [*unsupported, *(f"{m}: A or B is missing" for m in incomplete)]
        raise KeyMapError(
            f"{tensors.source}: cannot convert these tensors; a tree holds only pairs of LoRA's A and B:\n"
            + paths.bullets(problems)
        )
    return {m: (pair["A"], pair["B"]) for m, pair in pairs.items()}


def _base_shapes(like: Any, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """Return `{base leaf: shape}` from the header of a safetensors file."""
    if like is None:
        return {}
    header = safetensors.read_header(like).tensors
    leaves = _with_dotted_paths({path: info.shape for path, info in header.items()}, like)
    return {dialect.base(p): tuple(shape) for p, shape in leaves.items() if not is_like(p)}
