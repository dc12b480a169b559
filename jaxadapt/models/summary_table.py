"""What an adapted model looks like: which weights, at what rank and scale, how, and what it costs."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt import methods
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters.adapter import Adapter, is_array
from jaxadapt.arrays.quantized import is_quantized
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.core.terminal import escape_text
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import attachment
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import abstract_call, survey
from jaxadapt.models.nnx import attach as nnx


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf. `how` says whether its layer's own class or a trace follows the weight.

    `parameters` are those that are trained; `entries` says how many of the leaf's layers and parts are adapted, if not
    all.
    """

    adapter: str
    leaf: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]
    dtype: str
    hparams: Any
    how: str
    parameters: int
    entries: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The adapted leaves of a model, and how many parameters are trained out of how many.

    `str(summary)` is a table; alike layers share a line. `families` are the tables that name the weights, by adapter.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    active: tuple[str, ...]
    families: Mapping[str, KeyMap] = dataclasses.field(default_factory=dict[str, KeyMap])

    @property
    def trainable(self) -> int:
        """Parameters of the adapters."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("adapter", "weight", "count", "shape", "tensors", "dtype", "scale", "how"):
            table.add_column(column, overflow="fold")
        for pattern, rows in self._alike().items():
            first = rows[0]
            cells = (
                first.adapter + ("" if first.adapter in self.active else " (inactive)"),
                pattern,
                str(len(rows)),
                _by(first.shape),
                ", ".join(f"{name} {_by(shape)}" for name, shape in first.tensors.items()),
                first.dtype,
                ", ".join(filter(None, (_static(first.hparams), first.entries))),
                first.how,
            )
            table.add_row(*(Text(escape_text(cell)) for cell in cells))  # no markup: "[b]" may be a part of a name
        total = self.base_parameters + self.trainable
        share = 100 * self.trainable / total if total else 0.0
        text = io.StringIO()
        Console(file=text, width=160, force_terminal=False, force_jupyter=False).print(table)
        lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
        lines += [f"names by the table {table}" for table in dict.fromkeys(map(_called, self.families.values()))]
        lines += [
            f"{leaf} is PyTorch's times {factor:.6g}, no power of two: saving and loading round once"
            for leaf, factor in self._rounded().items()
        ]
        return "\n".join([*lines, f"trainable {self.trainable:,} of {total:,} parameters ({share:.2f} %)"])

    def _rounded(self) -> dict[str, float]:
        """The lines whose factor is no power of two, so that the way to PyTorch and back does not keep every bit."""
        found: dict[str, float] = {}
        for row in self.rows:
            site = self.families[row.adapter].match(row.leaf) if row.adapter in self.families else None
            if site is not None and len(row.shape) == len(site.weight.left):
                factor = site.weight.factor(plan.axis_sizes(site, row.shape))
                if math.frexp(factor)[0] != 0.5:
                    found[site.weight.leaf] = factor
        return found

    def _alike(self) -> dict[str, list[Row]]:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            stem = ".".join("*" if p.isdecimal() else p for p in row.leaf.split("."))
            same = (
                row.adapter,
                stem,
                row.shape,
                tuple(row.tensors.items()),
                row.dtype,
                row.hparams,
                row.how,
                row.entries,
            )
            groups.setdefault(same, []).append(row)
        out: dict[str, list[Row]] = {}
        for same, rows in groups.items():
            label = same[1] if len(rows) > 1 else rows[0].leaf
            while label in out:  # two groups of one pattern (another adapter, rank or shape)
                label += " "
            out[label] = rows
        return out


def _called(table: KeyMap) -> str:
    return f"{table.name!r}" + ("" if table.proved else ", which is not proved against the real models")


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _static(static: Any) -> str:
    """What a site's arithmetic needs, as far as it is not the usual."""
    shown: list[str] = []
    for field in dataclasses.fields(static):
        value = getattr(static, field.name)
        if value and value != field.default and field.name != "used":  # which layers, `entries` says
            shown.append(value_text(value) if field.name == "scale" else f"{field.name} {value}")
    return ", ".join(shown)


def value_text(scale: float | methods.PerEntry) -> str:
    """A scale; where it differs between layers, from the smallest to the largest."""
    return f"{scale:g}" if isinstance(scale, float) else str(scale)


def summary(tree: Any, *inputs: Any) -> Summary:
    """A table of what is adapted: weights, ranks, scales, dtypes, how each is computed, trainable and total.

    Args:
        tree: an adapted NNX model, or Linen variables, or an adapted Linen module.
        inputs: of one call, after the variables for a Linen module. With them the column "how" says where
            a custom layer's weight is used in a way that needs the effective weight: exact, but the
            backward pass then makes a gradient of the weight's own size.

    Raises `AttachError` if nothing is adapted.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> found = summary({"params": base, **adapter.collection})
    >>> found.trainable, found.base_parameters
    (20, 24)
    """
    if isinstance(tree, wrapper.Adapted):
        if not inputs:
            raise AttachError("a Linen module holds no parameters: summary(module, variables, *inputs)")
        variables, *rest = inputs
        if not isinstance(variables, Mapping):
            found = type(variables).__name__
            raise AttachError(f"summary(module, variables, *inputs): expected variables, found {found}")
        return _of_variables(variables, tree.active, tree.notes(variables, *rest) if rest else {})
    if isinstance(tree, nnx.nnx.Module):
        return _of_model(tree, inputs)
    if isinstance(tree, Mapping):
        return _of_variables(tree, None, {})
    raise AttachError(f"expected an adapted model or variables, found {type(tree).__name__}")


def _rows(name: str, adapter: Adapter, base: Mapping[str, tuple[int, ...]], how: Mapping[str, str]) -> list[Row]:
    sites = adapter.sites
    shapes = adapter.shapes
    return [
        Row(
            name,
            bound.leaf,
            base.get(bound.leaf, ()),
            bound.modules,
            shapes[bound.leaf],
            str(next(iter(sites[bound.leaf].values())).dtype),
            bound.hparams,
            how.get(bound.leaf, ""),
            sum(math.prod(e.form.shape_of(i)) for e in bound.entries for i in range(e.form.count)),
            "" if bound.named.all else f"{len(bound.modules)} of {len(bound.named.names)} modules",
        )
        for bound in bind.sites_of(adapter)
    ]


def _of_model(model: Any, inputs: Sequence[Any]) -> Summary:
    walked = survey.walk_model(model)
    owners = walked.leaves
    shapes = {**survey.base_shapes(owners), **walked.loose}
    how = {leaf: survey.describe_use(module) for leaf, (module, _) in owners.items()}
    if inputs:
        of = {path: var for by_path in nnx.adapter_variables(model).values() for path, var in by_path.items()}
        attached = {path.rpartition(".")[0]: var.get_metadata()["adapter"] for path, var in of.items()}
        hooks = {leaf: methods.AppliedMethod(at.method, at.hparams, {}, at.axes) for leaf, at in attached.items()}
        how |= abstract_call.record_uses(
            model, {leaf: hook for leaf, hook in hooks.items() if not hook.replaces}, inputs
        )
    adapters = {name: attachment.extract(model, name) for name in nnx.adapter_names(model)}
    rows = [row for name, adapter in adapters.items() for row in _rows(name, adapter, shapes, how)]
    if not rows:
        raise AttachError("this model carries no adapter")
    tables = {name: adapter.keymap for name, adapter in adapters.items()}
    return Summary(tuple(rows), sum(math.prod(s) for s in shapes.values()), nnx.active_names(model), tables)


def _of_variables(variables: Mapping[str, Any], active: tuple[str, ...] | None, how: Mapping[str, str]) -> Summary:
    flat = paths.flatten(collections.unbox_tree(variables.get("params", {})))
    base = {path: tuple(leaf.shape) for path, leaf in flat.items() if is_array(leaf) or is_quantized(leaf)}
    tables: dict[str, KeyMap] = {}
    rows: list[Row] = []
    for collection in methods.COLLECTIONS:
        for name, tree in dict(variables.get(collection, {})).items():
            adapter = collections.read_collection(tree, name)
            tables[name] = adapter.keymap
            rows += _rows(name, adapter, base, how)
    if not rows:
        raise AttachError("these variables hold no adapter")
    active = tuple(tables) if active is None else active
    return Summary(tuple(rows), sum(math.prod(s) for s in base.values()), active, tables)
