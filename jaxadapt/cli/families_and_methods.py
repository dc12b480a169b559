"""Commands that list what jaxadapt knows: `families`, `check-keymap`, `methods`, and `completion` for the shell."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import jaxadapt
from jaxadapt.cli import output
from jaxadapt.core import errors, paths

if TYPE_CHECKING:
    from jaxadapt.keymaps.check import KeyMapReport


# ---------------------------------------------------------------- families


@click.command("families", short_help="List the known model families.")
@click.argument("name", required=False)
@output.as_json
def families_command(name: str | None, as_json: bool) -> None:
    """List the known model families, or the keymap of the family NAME.

    A keymap has one entry for each kind of weight: the parameter's path in JAX, its key in PyTorch, and a pattern that
    relates their axes. It is "proved" if a test maps the weights of a real model in both directions, bit for bit.

    A family's name is the value of keymap= in Python, of `jaxadapt convert --to` and of `jaxadapt check-keymap`. Append
    /scan0, /scan1, … if the model stacks its layers along that axis.

    \b
    Example:
      jaxadapt families
      jaxadapt families llama
      jaxadapt families llama/scan0 --json
    """
    from jaxadapt.keymaps.families import FAMILIES, get_family

    if name is None:
        keymaps = list(FAMILIES.values())
        rows = [(k.name, str(len(k.weights)), "yes" if k.proved else "no") for k in keymaps]
        output.print_result(
            as_json,
            [{"name": k.name, "lines": len(k.weights), "proved": k.proved} for k in keymaps],
            lambda: output.print_table(("family", "entries", "proved"), rows, numbers=("entries",)),
        )
        return
    keymap = get_family(name)
    rows = [(w.leaf, w.key, w.pattern) for w in keymap.weights]
    output.print_result(
        as_json,
        [dict(zip(("leaf", "key", "pattern"), row, strict=True)) for row in rows],
        lambda: output.print_table(("leaf", "PyTorch key", "pattern"), rows),
    )


# ---------------------------------------------------------------- check keymap


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
def check_keymap_command(family: str, model: str | None, checkpoint: str | None, as_json: bool) -> None:
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
    output.print_result(as_json, report.to_dict(), lambda: _print_report(report, leaves, tensors, is_custom))
    if not report.fits:
        sys.exit(1)


def _run_keymap_file(text: str) -> jaxadapt.KeyMap:
    """Run a Python file and return the keymap that it defines, for FILE.py:NAME."""
    import runpy
    import traceback

    from jaxadapt.storage import location

    path, _, name = text.rpartition(":")
    location.read_text_bytes(Path(path))
    try:
        variables = runpy.run_path(path)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        position = f"line {frames[-1].lineno}: " if frames else ""  # a SyntaxError names its line itself
        raise jaxadapt.KeyMapError(f"{path}: cannot be run: {position}{type(error).__name__}: {error}") from error
    if not isinstance(variables.get(name), jaxadapt.KeyMap):
        keymaps = [key for key, value in variables.items() if isinstance(value, jaxadapt.KeyMap)]
        found = type(variables[name]).__name__ if name in variables else ", ".join(keymaps) or "none"
        raise jaxadapt.KeyMapError(f"{path}: expected a jaxadapt.KeyMap called {name!r}, found {found}")
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
        raise jaxadapt.KeyMapError(
            f"no entry of the keymap {report.family!r} matches any weight: the model is of another family, or its"
            " paths begin elsewhere; `jaxadapt families` lists the families"
        )
    click.echo()
    output.print_table(("leaf", "PyTorch key", "matches"), used, numbers=("matches",))
    if is_custom:
        output.print_list("entries that match nothing; check their spelling", _describe_unused(report), _MAX_ITEMS)
    elif unused:
        output.print_words("absent here (not an error: models of one family differ)", unused)
    for kind, names in report.problems.items():
        output.print_list(_TITLES[kind], names, _MAX_ITEMS)
    wrong = [f"{w.leaf} -> {w.key}, {w.pattern!r}" for w in report.wrong]
    output.print_list("wrong entries: none of their matches fits", wrong, _MAX_ITEMS)


def _describe_unused(report: KeyMapReport) -> list[str]:
    """Describe each entry that matches nothing, with similar names among the unmatched weights."""
    texts: list[str] = []
    for entry in (w for w, count in report.counts.items() if not count):
        free = {re.sub(r"\b\d+\b", "{l}", name): name for name in report.unclaimed}
        close = [name for name in errors.close_matches((entry.leaf, entry.key), list(free)) if name in free]
        texts.append(f"{entry.leaf} -> {entry.key}" + (f"; near: {errors.quote_list(close)}" if close else ""))
    return texts


def read_model_shapes(path: Path) -> Shapes:
    """Read `{leaf: shape}` of a model from a .json or .safetensors file or an Orbax folder."""
    import json

    from jaxadapt.storage import location, safetensors

    if location.is_dir(path):
        return _read_orbax_shapes(path)
    if path.suffix == ".safetensors":
        header = safetensors.read_header(path).tensors
        return {key.replace("/", "."): tuple(info.shape) for key, info in header.items()}
    try:
        document: Any = json.loads(location.read_text_bytes(path, safetensors.MAX_HEADER).decode("utf-8"))
        flat: Mapping[str, Any] = paths.flatten(document)
    except (ValueError, AttributeError, RecursionError) as error:
        raise jaxadapt.FormatError(
            f"{path}: expected a JSON object of shapes such as {{leaf: [2, 3]}}, but reading failed: {error}"
        ) from error
    invalid = [
        key for key, sizes in flat.items() if not isinstance(sizes, list) or not all(isinstance(n, int) for n in sizes)
    ]
    if invalid:
        raise jaxadapt.FormatError(
            f"{path}: expected a shape such as [2, 3] for each leaf, found another value at {invalid[0]}"
        )
    return {key: tuple(shape) for key, shape in flat.items()}


def _read_orbax_shapes(path: Path) -> Shapes:
    """Read the shapes of the base weights from an Orbax checkpoint of a training run.

    If any leaf is below a key "params", only leaves below one are read, by the rest of their path.
    """
    from jaxadapt.storage import orbax

    shapes: Shapes = {}
    for leaves in orbax.leaf_specs(path).values():
        chosen = [names for names in leaves if "params" in names] or leaves
        shapes |= {orbax.parameter_path(names): leaves[names][0] for names in chosen}
    return shapes


def _read_checkpoint_shapes(path: Path) -> Shapes:
    """Read `{key: shape}` of a Hugging Face model from the headers of its files."""
    from jaxadapt.storage import hf_model

    with hf_model.open_model(path) as model:
        return model.shapes


# ---------------------------------------------------------------- methods


@click.command("methods", short_help="List the methods, with PEFT's figures.")
@click.option(
    "--model", type=click.Path(), help="Shapes of a JAX model, as for check-keymap: adds each adapter's size."
)
@output.as_json
def methods_command(model: str | None, as_json: bool) -> None:
    """List the methods that jaxadapt computes, and the types whose files only pass through.

    "rows" tells if the rows of a batch may each have their own adapter: "call" if they are chosen in the call, "put" if
    a server must prepare the adapter. "accuracy" and "time" are those of PEFT's own benchmark (Llama 3.2 3B on
    MetaMathQA); the time is divided by LoRA's. With --model, "size" counts the trained parameters of the default
    configuration on that model.

    \b
    Example:
      jaxadapt methods
      jaxadapt methods --model shapes.json --json
    """
    from jaxadapt.configs import listing

    found, passing = listing.describe_methods(), listing.passing_types()
    sizes = None if model is None else _sizes(Path(model))
    if as_json:
        values: list[dict[str, Any]] = [
            {**info.to_dict(), **({} if sizes is None else _size_value(sizes.get(info.peft_type)))} for info in found
        ]
        output.print_json({"methods": values, "passing": passing})
        return
    columns = ["method", "what it does", "merges", "rows", "accuracy", "time"]
    rows = [
        [
            info.peft_type,
            info.summary,
            "yes" if info.facts.merges else "no",
            info.facts.rows,
            _number(info.facts.accuracy),
            _number(info.facts.time),
            *([] if sizes is None else [_size_text(sizes.get(info.peft_type))]),
        ]
        for info in found
    ]
    columns += [] if sizes is None else ["size"]
    output.print_table(columns, rows, numbers=("accuracy", "time", "size"))
    click.echo("\nTrained tensors:")
    output.print_pairs([(info.peft_type, info.facts.trains) for info in found if info.facts.trains])
    click.echo("\nPapers and PEFT's code:")
    output.print_pairs([(info.peft_type, ", ".join(filter(None, (info.paper, info.source)))) for info in found])
    click.echo("\nFiles of these types can be read and written, but not applied:")
    output.print_pairs(list(passing.items()))


def _sizes(path: Path) -> dict[str, int | str]:
    from jaxadapt.models import summary_table

    return summary_table.method_sizes(read_model_shapes(path))


def _size_value(size: int | str | None) -> dict[str, Any]:
    return {"size": size if isinstance(size, int) else None, **({"reason": size} if isinstance(size, str) else {})}


def _size_text(size: int | str | None) -> str:
    return f"{size:,}" if isinstance(size, int) else "–"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# ---------------------------------------------------------------- completion


@click.command("completion", short_help="Print a shell completion script, for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output.as_json
@click.pass_context
def completion_command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options and paths in SHELL.

    Add the script to the startup file of your shell, as in the example, and open a new shell. zsh also needs the line
    `autoload -Uz compinit && compinit` above the script.

    \b
    Example:
      jaxadapt completion bash >> ~/.bashrc
      jaxadapt completion zsh >> ~/.zshrc
      jaxadapt completion fish > ~/.config/fish/completions/jaxadapt.fish
    """
    from click.shell_completion import get_completion_class

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    script = completion_class(ctx.find_root().command, {}, "jaxadapt", "_JAXADAPT_COMPLETE").source()
    script = script.replace('string split ","', 'string split -m 1 ","')  # fish cuts a help text at its first comma
    output.print_result(as_json, {"shell": shell, "script": script}, lambda: click.echo(script))
