"""Commands that only show: `inspect`, `verify`, `diff`, `families`, `check-keymap`, `methods`, `completion`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import jaxadapt
from jaxadapt.cli import (
    atomic,
    changes,
    check,
    consumers,
    families,
    folder,
    heat_maps,
    hf_model,
    matching,
    orbax,
    output,
    run_folder,
    summary_table,
)
from jaxadapt.core import errors
from jaxadapt.storage import location

if TYPE_CHECKING:
    from jaxadapt.persistence.formats import Finding


# ---------------------------------------------------------------- inspect


_TITLES = {"wrong": "misread by", "refused": "refused by", "unknown": "not known"}
"""{verdict about a program: title of its row}."""


def check_png(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check that the value of an option names a PNG file."""
    if value is not None and not value.lower().endswith(".png"):
        raise click.BadParameter(f"expected a file name ending in .png, found {value!r}")
    return value


@click.command("inspect", short_help="Show the settings, targets and size of an adapter.")
@click.argument("folder", type=click.Path())
@output.as_json
@click.option("--base", type=click.Path(), help="The base model: its folder or its config.json.")
@click.option("--tensors", is_flag=True, help="Also list every tensor with its dtype and shape.")
@click.option("--norms", is_flag=True, help="Also show how much each weight changes, by layer and module.")
@click.option(
    "--plot",
    type=click.Path(),
    metavar="FILE.png",
    callback=check_png,
    help="Write these changes as a heat map (needs matplotlib).",
)
def inspect_command(folder: str, base: str | None, as_json: bool, tensors: bool, norms: bool, plot: str | None) -> None:
    """Show the method, base model, targets and size of the adapter in FOLDER, and which programs read it.

    FOLDER is an adapter of jaxadapt, PEFT or mlx-lm, or an address: hf://org/name@revision/subfolder, s3://…, gs://….
    No model is needed. Only the configuration and the header of the weights are read, unless --norms or --plot is
    given.

    Some verdicts depend on the model: that of vLLM on experts, and that of llama.cpp on an adapted embedding. With
    --base, they are those for this model.

    "misread by" lists programs that load the adapter without a message and compute something else than PEFT, with the
    setting that they ignore and what helps. --json names the version of each program.

    For LoRA, the change of a weight is ΔW = s·B·A. Its norm measures the size of the change. Its effective rank
    measures the number of directions: 1 for a single direction, r if all r directions contribute equally.

    \b
    Example:
      jaxadapt inspect out/
      jaxadapt inspect out/ --base Qwen3-30B-A3B/
      jaxadapt inspect out/ --json | jq .config.r
      jaxadapt inspect out/ --plot norms.png
    """
    info = jaxadapt.inspect(folder, progress=True)
    is_measured = norms or plot is not None
    found = jaxadapt.analysis.measure_norms(jaxadapt.read(folder, progress=True)) if is_measured else None
    if found is not None and plot is not None:
        atomic.write_bytes(plot, jaxadapt.analysis.norms_png(found, info.config))
    model = {} if base is None else hf_model.read_model_config(location.to_location(base))
    if model is None:
        raise jaxadapt.FileError(f"{base}: no config.json; pass the folder of the base model, or its config.json")
    tied, kind = (hf_model.is_tied(model), str(model.get("model_type"))) if model else (None, None)
    readers = consumers.judge_readers(info.config, info.tensors, tied, kind)
    measured = {} if found is None else {"norms": found.to_dict()}
    document = info.to_dict() | {"readers": [reader.to_dict() for reader in readers]} | measured
    output.print_result(as_json, document, lambda: _print_info(info, readers, found, tensors))


def _print_info(
    info: folder.Info, readers: Sequence[consumers.Reader], found: changes.Norms | None, tensors: bool
) -> None:
    config, targets = info.config, info.config.get("target_modules")
    dtypes, size, count = "/".join(info.dtypes), consumers.size_text(info.file_bytes), len(info.tensors)
    rows = [
        ("method", config.peft_type + (f", {config.task_type}" if config.task_type else "")),
        ("format", None if info.form == "PEFT" else f"{info.form}; the programs below read it after jaxadapt convert"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("targets", None if targets is None else _value_text(targets)),
        *((name, _value_text(value)) for name, value in config.shown_fields().items()),
        ("adapted", ", ".join(info.modules) or None),
        ("size", f"{info.parameters:,} parameters in {count} tensor{'s' if count != 1 else ''}, {dtypes}, {size}"),
        ("peft version", config.peft_version or None),
    ]
    output.print_pairs([*rows, *reader_rows(readers)])
    if tensors:
        click.echo()
        output.print_table(
            ("tensor", "dtype", "shape"),
            [(key, dtype, " × ".join(map(str, shape)) or "scalar") for key, (dtype, shape) in info.tensors.items()],
        )
    if found is not None:
        _print_norms(found)


def reader_rows(readers: Sequence[consumers.Reader]) -> list[tuple[str, str]]:
    """Return rows of (title, text): the programs that read an adapter, and the others with reasons and what helps."""
    right = [reader.name for reader in readers if reader.verdict == consumers.RIGHT]
    rows = [("read by", ", ".join(right) or "no known program as it is")]
    last = ""
    for verdict, names, reasons, remedy in consumers.grouped(readers):
        way_out = f". What helps: {remedy}" if remedy else ""
        rows.append(("" if verdict == last else _TITLES[verdict], f"{names}: {'; '.join(reasons)}{way_out}"))
        last = verdict
    return rows


def _value_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _print_norms(norms: changes.Norms) -> None:
    cells = norms.grid()
    scale, rank = cells.constant("scale"), cells.constant("rank")
    for name, title in (("norm", norms.what), ("effective_rank", "effective rank"), ("scale", "scale s")):
        values = cells.values(name)
        if all(v is None for row in values for v in row) or (name == "scale" and scale is not None):
            continue
        output.print_heat(title, cells.rows, cells.columns, values)
    if scale is not None and rank is not None:
        click.echo(f"\nrank {rank:g} and scale {scale:.4g} in all modules")
    output.print_list("modules with a NaN or an infinity", norms.not_finite, 8)
    output.print_list("left out, because these tensors alone do not tell the change", norms.left_out, 8)


# ---------------------------------------------------------------- verify


_COLORS = {"error": "red", "warning": "yellow", "note": "green"}


@click.command("verify", short_help="Find the problems of an adapter's files.")
@click.argument("path", type=click.Path())
@click.option(
    "--base",
    metavar="BASE",
    help="The base model: its Hugging Face folder, a file of its weights, shapes as .json, or a family's name.",
)
@output.as_json
def verify_command(path: str, base: str | None, as_json: bool) -> None:
    """Check the adapter in PATH, and print each problem with its remedy.

    PATH is an adapter's folder, one of its files, or an address: hf://org/name, s3://…, gs://…. It may also be a
    damaged file or a file of another program. The command checks:

    \b
      - the configuration: valid, of a known method and version of PEFT, equal to the copy in the weights' header;
      - the keys: PEFT's names, without the names of wrappers (_orig_mod., module.) or of adapters (.default.);
      - the tensors: none missing, unexpected, empty (DeepSpeed ZeRO-3) or stored twice, with the stated ranks;
      - the values: no NaN or infinity, not untrained, no huge changes;
      - with --base: every module is in the base, with fitting sizes; no target is left out; the base has the values
        of the base that the adapter was trained on, if the file has a fingerprint.

    Files of MLX, kohya-ss and diffusers, whole models and the folder of a training run are recognized. PATH may be the
    one file of an image adapter (kohya-ss, LyCORIS, diffusers). mlx-lm's folder is an error, because PEFT does not read
    it; its content is checked too, and "jaxadapt convert" writes PEFT's folder.

    The command reads only names, sizes and a few values of BASE. A .json file of shapes is an object {key: shape} of
    PyTorch's parameters. `jaxadapt families` lists the families.

    "jaxadapt repair" repairs the findings that are marked with it. The exit status is 1 if there is an error; warnings
    and notes leave it at 0.

    \b
    Example:
      jaxadapt verify out/
      jaxadapt verify out/ --base SmolLM2-135M/
      jaxadapt verify hf://org/name --base llama
      jaxadapt verify out/ --json | jq '.findings[] | select(.severity == "error")'
    """
    findings = jaxadapt.verify(path, base, progress=True)
    counts = {kind: sum(f.severity == kind for f in findings) for kind in _COLORS}
    if as_json:
        output.print_json({"path": path, **counts, "findings": [found.to_dict() for found in findings]})
    else:
        for found in findings:
            print_finding(found)
        words = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n and kind != "note"]
        click.echo()
        output.print_lines(f"{path}: {', '.join(words) if words else 'no problem found'}")
        if codes := dict.fromkeys(found.code for found in findings if found.repairable):
            output.print_lines(f"jaxadapt repair {path} repairs {', '.join(codes)}")
    if counts["error"]:
        sys.exit(1)


def print_finding(found: Finding) -> None:
    """Print a finding: what was found, and below it what was expected, what to do, and the names concerned."""
    click.secho(f"{found.severity}", fg=_COLORS[found.severity], bold=True, nl=False)
    if found.severity == "note":
        output.print_lines(f"  {found.found}")
        return
    output.print_lines(f"  {found.code}")
    output.print_indented(found.found)
    for title, text in (("expected", found.expected), ("to do", found.remedy)):
        if text:
            output.print_indented(f"{title}: {text}")
    if any(subject not in found.found for subject in found.subjects):
        groups = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", subject) for subject in found.subjects)
        names = output.shorten([f"{name} ({n})" if n > 1 else name for name, n in groups.items()])
        output.print_indented(f"names: {', '.join(names)}")


# ---------------------------------------------------------------- diff


@click.command("diff", short_help="Compare two adapters, or two steps of a training run.")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@output.as_json
@click.option("--modules", is_flag=True, help="Also list every module with its norms, cosine, ranks and angles.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", callback=check_png, help="Write heat maps (needs matplotlib)."
)
def diff_command(first: str, second: str, as_json: bool, modules: bool, plot: str | None) -> None:
    """Compare the adapters FIRST and SECOND: their settings, their modules, and what they change in each weight.

    FIRST and SECOND are adapters' folders or addresses, or checkpoints of a run (run/step-000000100.safetensors). No
    model is needed. LoRA is compared by the changes ΔW = s·B·A, so that equal changes with other factors have the
    distance 0:

    \b
      distance   ‖ΔW₁ − ΔW₂‖ ÷ ‖ΔW₁‖: 0 for equal changes, 1.41 for unrelated ones of equal size
      cosine     1 for the same direction, 0 for unrelated changes, −1 for opposite ones
      angles     between the spaces of outputs (of B) and of inputs (of A): smallest and largest, in degrees

    The exit status is 0 if the adapters are equal, 1 if they differ, and 2 after an error.

    \b
    Example:
      jaxadapt diff out/ hf://org/name
      jaxadapt diff run/step-000000100.safetensors run/step-000000200.safetensors --plot diff.png
      jaxadapt diff a/ b/ --json | jq .totals
    """
    with _open(first) as one, _open(second) as two:
        found = jaxadapt.analysis.diff(one, two, progress=True)
    if plot is not None:
        atomic.write_bytes(plot, heat_maps.difference_png(found, (first, second)))
    document = {"first": first, "second": second, **found.to_dict()}
    output.print_result(as_json, document, lambda: _print_difference(found, modules))
    if not found.is_equal:
        sys.exit(1)


def _open(path: str) -> contextlib.AbstractContextManager[jaxadapt.PeftTensors]:
    """Open an adapter, or the only adapter of a run's step."""
    place = location.to_location(path)
    step = run_folder.number_in(place.name)
    if step is None:
        return folder.open_adapter(path)
    tensors = jaxadapt.to_peft(jaxadapt.CheckpointManager(place.parent).adapter(step))
    return contextlib.nullcontext(dataclasses.replace(tensors, source=path))


def _print_difference(found: changes.Difference, modules: bool) -> None:
    output.print_lines(*str(found).splitlines())
    grid = found.grid()
    if grid is not None and any(v for row in grid.values("relative") for v in row):
        for title, name in (("distance ÷ norm of the first", "relative"), ("cosine", "cosine")):
            output.print_heat(title, grid.rows, grid.columns, grid.values(name))
    if modules:
        click.echo()
        _print_modules(found)


def _print_modules(found: changes.Difference) -> None:
    def angles(pair: tuple[float, float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.1f}–{pair[1]:.1f}°"

    columns = ("module", "norms", "distance", "cosine", "ranks", "angles out", "angles in")
    rows = [
        (
            m.module,
            f"{m.norms[0]:.4g}, {m.norms[1]:.4g}",
            f"{m.relative:.4g}",
            f"{m.cosine:.4g}",
            "" if m.ranks is None else f"{m.ranks[0]}, {m.ranks[1]}",
            angles(m.output_angles),
            angles(m.input_angles),
        )
        for m in found.modules
    ]
    output.print_table(columns, rows, numbers=("distance", "cosine"))


# ---------------------------------------------------------------- families


@click.command("families", short_help="List the known model families.")
@click.argument("name", required=False, shell_complete=output.completed(lambda: families.FAMILIES))
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
    if name is None:
        keymaps = list(families.FAMILIES.values())
        rows = [(k.name, str(len(k.weights)), "yes" if k.proved else "no") for k in keymaps]
        output.print_result(
            as_json,
            [{"name": k.name, "entries": len(k.weights), "proved": k.proved} for k in keymaps],
            lambda: output.print_table(("family", "entries", "proved"), rows, numbers=("entries",)),
        )
        return
    rows = [(w.leaf, w.key, w.pattern) for w in families.get_family(name).weights]
    output.print_result(
        as_json,
        [dict(zip(("leaf", "key", "pattern"), row, strict=True)) for row in rows],
        lambda: output.print_table(("leaf", "PyTorch key", "pattern"), rows),
    )


# ---------------------------------------------------------------- check keymap


Shapes = dict[str, tuple[int, ...]]

_FAULTS = {
    "unclaimed": "matched by no entry of the keymap",
    "missing": "missing in the checkpoint",
    "twice": "matched by more than one entry",
    "misshapen": "with a shape that does not fit",
}
_MAX_ITEMS = 12


@click.command("check-keymap", short_help="Check a keymap against a model, a checkpoint, or both.")
@click.argument("family", shell_complete=output.completed(lambda: ("auto", *families.FAMILIES)))
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
    leaves = None if model is None else read_model_shapes(Path(model))
    tensors = None if checkpoint is None else hf_model.read_shapes(Path(checkpoint))
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


def _print_report(report: check.KeyMapReport, leaves: Shapes | None, tensors: Shapes | None, is_custom: bool) -> None:
    keys = set[str]().union(*report.claims.values()) & (tensors or {}).keys()
    output.print_pairs(
        [
            ("family", report.family),
            ("model", None if leaves is None else f"{len(leaves)} parameters, {len(report.claims)} matched"),
            ("checkpoint", None if tensors is None else f"{len(tensors)} tensors, {len(keys)} matched"),
            ("result", "fits" if report.fits else "does not fit"),
        ]
    )
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
        output.print_list(_FAULTS[kind], names, _MAX_ITEMS)
    output.print_list(
        "wrong entries: none of their matches fits",
        [f"{w.leaf} -> {w.key}, {w.pattern!r}" for w in report.wrong],
        _MAX_ITEMS,
    )


def _describe_unused(report: check.KeyMapReport) -> list[str]:
    """Describe each entry that matches nothing, with similar names among the unmatched weights."""
    texts: list[str] = []
    for entry in (w for w, count in report.counts.items() if not count):
        free = {re.sub(r"\b\d+\b", "{l}", name): name for name in report.unclaimed}
        close = [name for name in errors.close_matches((entry.leaf, entry.key), list(free)) if name in free]
        texts.append(f"{entry.leaf} -> {entry.key}" + (f"; near: {errors.quote_list(close)}" if close else ""))
    return texts


def read_model_shapes(path: Path) -> Shapes:
    """Read `{leaf: shape}` of a model: an Orbax folder, a .safetensors file, or JSON under any other name."""
    if location.is_dir(path):  # of a training run; if any leaf is below a key "params", only such leaves are the base
        shapes: Shapes = {}
        for leaves in orbax.leaf_specs(path).values():
            chosen = [names for names in leaves if "params" in names] or leaves
            shapes |= {orbax.parameter_path(names): leaves[names][0] for names in chosen}
        return shapes
    if path.suffix == ".safetensors":
        return {key.replace("/", "."): shape for key, shape in hf_model.read_shapes(path).items()}
    return hf_model.read_json_shapes(path)


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
    found, passing = matching.describe_methods(), matching.passing_types()
    sizes = None if model is None else summary_table.method_sizes(read_model_shapes(Path(model)))
    if as_json:
        values: list[dict[str, Any]] = [
            {**info.to_dict(), **({} if sizes is None else _size_value(sizes.get(info.peft_type)))} for info in found
        ]
        output.print_json({"methods": values, "passing": passing})
        return
    columns = ("method", "what it does", "merges", "rows", "accuracy", "time", *([] if sizes is None else ["size"]))
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
    output.print_table(columns, rows, numbers=("accuracy", "time", "size"))
    click.echo("\nTrained tensors:")
    output.print_pairs([(info.peft_type, info.facts.trains) for info in found if info.facts.trains])
    click.echo("\nPapers and PEFT's code:")
    output.print_pairs([(info.peft_type, ", ".join(filter(None, (info.paper, info.source)))) for info in found])
    click.echo("\nFiles of these types can be read and written, but not applied:")
    output.print_pairs(list(passing.items()))


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
    """Print the script that completes commands, options, names and paths in SHELL.

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
