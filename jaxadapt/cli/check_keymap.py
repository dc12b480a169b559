"""`jaxadapt check-keymap`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from jaxadapt.cli import output
from jaxadapt.core.errors import KeyMapError

if TYPE_CHECKING:
    from jaxadapt.keymaps.check import KeyMapReport
    from jaxadapt.keymaps.keymap import KeyMap

Shapes = dict[str, tuple[int, ...]]

_TITLES = {
    "unclaimed": "no line of the table names",
    "missing": "missing in the checkpoint",
    "twice": "claimed twice",
    "misshapen": "of a shape that does not fit",
}
_SHOWN = 12


@click.command("check-keymap", short_help="Say whether a family's table fits a model, a checkpoint.")
@click.argument("family")
@click.option("--model", type=click.Path(), help="The JAX model's shapes: .json, .safetensors or an Orbax folder.")
@click.option("--checkpoint", type=click.Path(), help="A Hugging Face model: its folder, or one file of weights.")
@output.as_json
def command(family: str, model: str | None, checkpoint: str | None, as_json: bool) -> None:
    """Say whether a FAMILY's table fits a JAX model, a PyTorch checkpoint, or the two together.

    A table has a line for each kind of weight: its path in the JAX model, its name in PyTorch, and how their axes
    correspond (`jaxadapt families NAME` prints it). Only names and shapes are read. "auto" recognises the family of
    a model. A model's shapes are a JSON object {path: shape}, which this writes for parameters (Linen) or for
    nnx.to_pure_dict(nnx.state(model)):

    \b
      from jaxadapt import paths
      shapes = {p: x.shape for p, x in paths.flatten(params).items()}
      json.dump(shapes, open("shapes.json", "w"))

    A table of your own is FILE.py:NAME, a KeyMap in a Python file (which is run). Lines of which nothing fits are said
    to be wrong.

    The exit status is 1 where a weight has no line, is missing, has several lines, or is of another shape.

    \b
    Example:
      jaxadapt check-keymap llama --checkpoint SmolLM2-135M/
      jaxadapt check-keymap auto --model shapes.json
      jaxadapt check-keymap tunix:qwen3 --model shapes.json --checkpoint Qwen3-0.6B/
      jaxadapt check-keymap my_model.py:TABLE --model shapes.json --checkpoint Mine/
    """
    if model is None and checkpoint is None:
        raise click.UsageError("say what is checked: --model, --checkpoint, or both")
    if family == "auto" and model is None:
        raise click.UsageError("a family is recognised by its model: give --model, or say the family")
    from jaxadapt.keymaps import check, families

    leaves = None if model is None else _leaves(Path(model))
    tensors = None if checkpoint is None else _tensors(Path(checkpoint))
    table = _own(family) if ".py:" in family else families.resolve_keymap(family, leaves or {})
    if leaves is not None and tensors is not None:
        table = table.spelling_for(tensors, leaves)
    found = check.check_keymap(table, leaves, tensors)
    if as_json:
        output.print_json(found.to_dict())
    else:
        _show(found, leaves, tensors, own=".py:" in family)
    if not found.fits:
        sys.exit(1)


def _own(text: str) -> KeyMap:
    """The table that a Python file holds."""
    import runpy
    import traceback

    from jaxadapt.keymaps.keymap import KeyMap
    from jaxadapt.storage import location

    path, _, name = text.rpartition(":")
    location.read_text_bytes(Path(path))
    try:
        held = runpy.run_path(path)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{where.filename}, line {where.lineno}: " if not isinstance(error, SyntaxError) else ""
        raise KeyMapError(f"{path}: cannot be run: {at}{type(error).__name__}: {error}") from error
    if not isinstance(held.get(name), KeyMap):
        tables = [key for key, value in held.items() if isinstance(value, KeyMap)]
        found = type(held[name]).__name__ if name in held else ", ".join(tables) or "none"
        raise KeyMapError(f"{path}: expected a jaxadapt.KeyMap called {name!r}, found {found}")
    return held[name]


def _show(found: KeyMapReport, leaves: Shapes | None, tensors: Shapes | None, own: bool) -> None:
    rows = [("family", found.family)]
    if leaves is not None:
        rows.append(("model", f"{len(leaves)} leaves, {len(found.claims)} claimed"))
    if tensors is not None:
        named = {key for keys in found.claims.values() for key in keys}
        rows.append(("checkpoint", f"{len(tensors)} tensors, {len(named & tensors.keys())} claimed"))
    rows.append(("result", "fits" if found.fits else "does not fit"))
    output.print_pairs(rows)
    used = [(w.leaf, w.key, str(count)) for w, count in found.lines.items() if count]
    unused = [w.leaf for w, count in found.lines.items() if not count]
    if not used:
        raise KeyMapError(f"no line of the table {found.family!r} names any of it: it is of another family")
    click.echo()
    output.print_table(("leaf", "PyTorch's key", "found"), used, numbers=("found",))
    if unused and own:
        output.print_list(
            "lines of the table that name nothing here; is their spelling right?", _mistyped(found), _SHOWN
        )
    elif unused:
        output.print_words("not here (no fault: the models of a family differ)", unused)
    for kind, listed in found.problems.items():
        output.print_list(_TITLES[kind], listed, _SHOWN)
    lines = [f"{w.leaf} -> {w.key}, {w.pattern!r}" for w in found.wrong]
    if lines:
        output.print_list("wrong lines of the table, of which nothing fits", lines, _SHOWN)


def _mistyped(found: KeyMapReport) -> list[str]:
    """The lines that name nothing, each with what comes near of that which no line names."""
    from jaxadapt.core import suggest

    lines: list[str] = []
    for line in (w for w, count in found.lines.items() if not count):
        free = {re.sub(r"\b\d+\b", "{l}", name): name for name in found.unclaimed}
        close = [name for name in suggest.close_matches((line.leaf, line.key), list(free)) if name in free]
        lines.append(f"{line.leaf} -> {line.key}" + (f"; near: {suggest.quote_list(close)}" if close else ""))
    return lines


def _leaves(path: Path) -> Shapes:
    import json

    from jaxadapt.core import paths
    from jaxadapt.core.errors import FormatError
    from jaxadapt.storage import location, safetensors
    from jaxadapt.storage.safetensors_header import MAX_HEADER

    if location.is_dir(path):
        return _of_orbax(path)
    if path.suffix == ".safetensors":
        header = safetensors.read_header(path).tensors
        return {key.replace("/", "."): tuple(info.shape) for key, info in header.items()}
    try:
        held: Any = json.loads(location.read_text_bytes(path, MAX_HEADER).decode("utf-8"))
        flat: Mapping[str, Any] = paths.flatten(held)
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: expected a JSON object of shapes, {{leaf: [2, 3]}}, found: {error}") from error
    odd = [key for key, shape in flat.items() if not _is_shape(shape)]
    if odd:
        raise FormatError(f"{path}: expected a shape such as [2, 3] for each leaf, found another value at {odd[0]}")
    return {key: tuple(shape) for key, shape in flat.items()}


def _is_shape(value: Any) -> bool:
    sizes = cast("list[Any]", value) if isinstance(value, list) else [None]
    return all(isinstance(n, int) for n in sizes)


def _of_orbax(path: Path) -> Shapes:
    """The base weights of a training's checkpoint: what lies below "params", where anything does."""
    from jaxadapt.storage import orbax

    out: Shapes = {}
    for leaves in orbax.leaf_specs(path).values():
        below = any("params" in names for names in leaves)
        for names, (shape, _) in leaves.items():
            if below and "params" not in names:
                continue
            last = max((i + 1 for i, name in enumerate(names) if name == "params"), default=0)
            out[".".join(names[last:]).removesuffix(".value")] = tuple(shape)
    return out


def _tensors(path: Path) -> Shapes:
    from jaxadapt.storage import hf_model

    with hf_model.open_model(path) as held:
        return {key: tuple(spec.shape) for key, spec in held.specs.items()}
