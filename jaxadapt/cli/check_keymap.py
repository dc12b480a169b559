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
    "unclaimed": "matched by no entry of the keymap",
    "missing": "missing in the checkpoint",
    "twice": "matched by more than one entry",
    "misshapen": "with a shape that does not fit",
}
_MAX_ITEMS = 12


@click.command("check-keymap", short_help="Check a keymap against a model, a checkpoint, or both.")
@click.argument("family")
@click.option("--model", type=click.Path(), help="Shapes of the JAX model: .json, .safetensors or an Orbax folder.")
@click.option("--checkpoint", type=click.Path(), help="The Hugging Face model: its folder, or one file of weights.")
@output.as_json
def command(family: str, model: str | None, checkpoint: str | None, as_json: bool) -> None:
    """Check that the keymap FAMILY fits a JAX model, a PyTorch checkpoint, or both together.

    A keymap has one entry for each kind of weight: its path in the JAX model, its key in PyTorch, and a pattern that
    relates their axes (`jaxadapt families NAME` prints them). Only names and shapes are read.

    FAMILY is a name from `jaxadapt families`, or "auto" to recognize the family of --model, or FILE.py:NAME for a
    jaxadapt.KeyMap of your own. FILE.py is executed.

    The shapes of a model are a JSON object {path: shape}. This writes it for Linen parameters, or for
    nnx.to_pure_dict(nnx.state(model)):

    \b
      from jaxadapt.core import paths
      shapes = {p: x.shape for p, x in paths.flatten(params).items()}
      json.dump(shapes, open("shapes.json", "w"))

    The exit status is 1 if a weight matches no entry or several, is missing, or has another shape.

    \b
    Example:
      jaxadapt check-keymap llama --checkpoint SmolLM2-135M/
      jaxadapt check-keymap auto --model shapes.json
      jaxadapt check-keymap tunix:qwen3 --model shapes.json --checkpoint Qwen3-0.6B/
      jaxadapt check-keymap my_model.py:KEYMAP --model shapes.json --checkpoint MyModel/
    """
    if model is None and checkpoint is None:
        raise click.UsageError("nothing to check the keymap against: give --model, --checkpoint or both")
    if family == "auto" and model is None:
        raise click.UsageError("'auto' recognizes the family of a model: give --model, or name the family")
    from jaxadapt.keymaps import check, families

    leaves = None if model is None else read_model_shapes(Path(model))
    tensors = None if checkpoint is None else _read_checkpoint_shapes(Path(checkpoint))
    is_custom = ".py:" in family
    keymap = _run_keymap_file(family) if is_custom else families.resolve_keymap(family, leaves or {})
    if leaves is not None and tensors is not None:
        keymap = keymap.spelling_for(tensors, leaves)
    report = check.check_keymap(keymap, leaves, tensors)
    if as_json:
        output.print_json(report.to_dict())
    else:
        _print_report(report, leaves, tensors, is_custom)
    if not report.fits:
        sys.exit(1)


def _run_keymap_file(text: str) -> KeyMap:
    """Run a Python file and return the keymap that it defines, for FILE.py:NAME."""
    import runpy
    import traceback

    from jaxadapt.keymaps.keymap import KeyMap
    from jaxadapt.storage import location

    path, _, name = text.rpartition(":")
    location.read_text_bytes(Path(path))
    try:
        variables = runpy.run_path(path)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        position = f"line {frames[-1].lineno}: " if frames else ""  # a SyntaxError names its line itself
        raise KeyMapError(f"{path}: cannot be run: {position}{type(error).__name__}: {error}") from error
    if not isinstance(variables.get(name), KeyMap):
        keymaps = [key for key, value in variables.items() if isinstance(value, KeyMap)]
        found = type(variables[name]).__name__ if name in variables else ", ".join(keymaps) or "none"
        raise KeyMapError(f"{path}: expected a jaxadapt.KeyMap called {name!r}, found {found}")
    return variables[name]


def _print_report(report: KeyMapReport, leaves: Shapes | None, tensors: Shapes | None, is_custom: bool) -> None:
    rows = [("family", report.family)]
    if leaves is not None:
        rows.append(("model", f"{len(leaves)} leaves, {len(report.claims)} matched"))
    if tensors is not None:
        keys = {key for claimed in report.claims.values() for key in claimed}
        rows.append(("checkpoint", f"{len(tensors)} tensors, {len(keys & tensors.keys())} matched"))
    rows.append(("result", "fits" if report.fits else "does not fit"))
    output.print_pairs(rows)
    used = [(w.leaf, w.key, str(count)) for w, count in report.counts.items() if count]
    unused = [w.leaf for w, count in report.counts.items() if not count]
    if not used:
        raise KeyMapError(
            f"no entry of the keymap {report.family!r} matches any weight: the model is of another family, or its"
            " paths begin elsewhere; `jaxadapt families` lists the families"
        )
    click.echo()
    output.print_table(("leaf", "PyTorch key", "matches"), used, numbers=("matches",))
    if unused and is_custom:
        output.print_list("entries that match nothing; check their spelling", _describe_unused(report), _MAX_ITEMS)
    elif unused:
        output.print_words("absent here (not an error: models of one family differ)", unused)
    for kind, names in report.problems.items():
        output.print_list(_TITLES[kind], names, _MAX_ITEMS)
    wrong = [f"{w.leaf} -> {w.key}, {w.pattern!r}" for w in report.wrong]
    if wrong:
        output.print_list("wrong entries: none of their matches fits", wrong, _MAX_ITEMS)


def _describe_unused(report: KeyMapReport) -> list[str]:
    """Describe each entry that matches nothing, with similar names among the unmatched weights."""
    from jaxadapt.core import errors

    texts: list[str] = []
    for entry in (w for w, count in report.counts.items() if not count):
        free = {re.sub(r"\b\d+\b", "{l}", name): name for name in report.unclaimed}
        close = [name for name in errors.close_matches((entry.leaf, entry.key), list(free)) if name in free]
        texts.append(f"{entry.leaf} -> {entry.key}" + (f"; near: {errors.quote_list(close)}" if close else ""))
    return texts


def read_model_shapes(path: Path) -> Shapes:
    """Read `{leaf: shape}` of a model from a .json or .safetensors file or an Orbax folder."""
    import json

    from jaxadapt.core import paths
    from jaxadapt.core.errors import FormatError
    from jaxadapt.storage import location, safetensors
    from jaxadapt.storage.safetensors import MAX_HEADER

    if location.is_dir(path):
        return _read_orbax_shapes(path)
    if path.suffix == ".safetensors":
        header = safetensors.read_header(path).tensors
        return {key.replace("/", "."): tuple(info.shape) for key, info in header.items()}
    try:
        document: Any = json.loads(location.read_text_bytes(path, MAX_HEADER).decode("utf-8"))
        flat: Mapping[str, Any] = paths.flatten(document)
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected a JSON object of shapes such as {{leaf: [2, 3]}}, but reading failed: {error}"
        ) from error
    invalid = [key for key, shape in flat.items() if not _is_shape(shape)]
    if invalid:
        raise FormatError(f"{path}: expected a shape such as [2, 3] for each leaf, found another value at {invalid[0]}")
    return {key: tuple(shape) for key, shape in flat.items()}


def _is_shape(value: Any) -> bool:
    sizes = cast("list[Any]", value) if isinstance(value, list) else [None]
    return all(isinstance(n, int) for n in sizes)


def _read_orbax_shapes(path: Path) -> Shapes:
    """Read the shapes of the base weights from an Orbax checkpoint of a training run.

    If any leaf is below a key "params", only leaves below one are read, by the rest of their path.
    """
    from jaxadapt.storage import orbax

    shapes: Shapes = {}
    for leaves in orbax.leaf_specs(path).values():
        has_params = any("params" in names for names in leaves)
        for names, (shape, _) in leaves.items():
            if has_params and "params" not in names:
                continue
            shapes[orbax.parameter_path(names)] = tuple(shape)
    return shapes


def _read_checkpoint_shapes(path: Path) -> Shapes:
    """Read `{key: shape}` of a Hugging Face model from the headers of its files."""
    from jaxadapt.storage import hf_model

    with hf_model.open_model(path) as model:
        return model.shapes
