"""The weights that a configuration would adapt in a model, those that adapters adapt, and numbers of parameters.

`select` returns the first as a value, before anything is attached, and `summary` the second. `method_sizes` returns
the sizes of the adapters of each method on one model.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, is_array, tensor_entries
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays.quantized import is_quantized
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, TargetError, escape_text
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.base import METHODS, get_method
from jaxadapt.models import attachment, planning
from jaxadapt.models.carriers import Wrapper, carrier

# ---------------------------------------------------------------- target selection


@dataclasses.dataclass(frozen=True)
class Target:
    """One base leaf that a configuration selects.

    Attributes:
        leaf: the path of the base weight in the model.
        shape: its shape, stacked layers included.
        modules: the PyTorch modules (or parameters) in the leaf that are adapted.
        tensors: {name: shape} of the tensors that the method keeps for the leaf.

    >>> Target("q_proj.kernel", (4, 6), ("q_proj",), {"lora_A": (2, 4), "lora_B": (6, 2)}).parameters
    20
    """

    leaf: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """The number of parameters in the tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def __str__(self) -> str:
        tensors = ", ".join(f"{name} {shape}" for name, shape in self.tensors.items())
        more = len(self.modules) - 1
        return f"{self.modules[0]}{f' and {more} more' if more else ''}: {self.leaf} {self.shape}; {tensors}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The weights of a model that a configuration selects; `str(selection)` lists them.

    Attributes:
        config: the configuration as it would be attached: "all-linear" and null targets resolved.
        keymap: the keymap that names the weights.
        targets: one value a base leaf, in the model's order.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> select(base, jaxadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).leaves
    ('q_proj.kernel',)
    """

    config: Config
    keymap: KeyMap
    targets: tuple[Target, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the selected base weights."""
        return tuple(target.leaf for target in self.targets)

    @property
    def modules(self) -> tuple[str, ...]:
        """The PyTorch modules (or parameters) that are adapted."""
        return tuple(module for target in self.targets for module in target.modules)

    @property
    def parameters(self) -> int:
        """The number of parameters that the adapter would have."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        return (
            f"{self.config.peft_type} on {len(self.modules)} modules in {len(self.targets)} weights,"
            f" {self.parameters:,} parameters (keymap {self.keymap.name!r}):\n"
            f"{paths.bullets(map(str, self.targets), 40)}"
        )


def select(
    model: Any,
    config: Config,
    *,
    keymap: KeyMap | str | None = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Selection:
    """Return what a configuration would adapt in a model, without attaching anything.

    Args:
        model: an NNX model, Linen variables or base parameters, or the shapes of any of them.
        config: for example a `LoraConfig`.
        keymap, stack_axes, example: as in `jaxadapt.adapt`.

    Raises `TargetError` if the configuration selects nothing adaptable, and `ConfigError`, `KeyMapError` or
    `AttachError` for what `jaxadapt.adapt` would refuse.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> found = select(base, jaxadapt.LoraConfig(r=2, target_modules="all-linear"))
    >>> found.modules, found.parameters
    (('q_proj',), 20)
    >>> print(found)
    LORA on 1 modules in 1 weights, 20 parameters (keymap 'generic'):
      q_proj: q_proj.kernel (4, 6); lora_A (2, 4), lora_B (6, 2)
    """
    get_method(config)  # raises if the arguments are exchanged
    base = carrier(model).base()
    recipe, sites = planning.plan_adapter(base, config, keymap, stack_axes, example)
    return Selection(
        recipe.config,
        recipe.keymap,
        tuple(Target(site.leaf, base.shapes[site.leaf], site.modules, site.shapes) for site in sites),
    )


# ---------------------------------------------------------------- summary of adapters


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    `how` names the source of the weight's use: its layer class, or a trace. `parameters` counts the trained
    parameters. `entries` gives the number of adapted layers and parts of the leaf, if not all are adapted.
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
    """The adapted leaves of a model, and the numbers of trained and of all parameters.

    `str(summary)` is a table, with one row for all layers of a kind; "count" is their number of modules in PyTorch.
    `families` are the adapters' keymaps, by name.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    active: tuple[str, ...]
    families: Mapping[str, KeyMap] = dataclasses.field(default_factory=dict[str, KeyMap])

    @property
    def trainable(self) -> int:
        """The number of parameters of the adapters."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("adapter", "weight", "count", "shape", "tensors", "dtype", "scale", "how"):
            table.add_column(column, overflow="fold")
        for pattern, rows in self._group_rows():
            first = rows[0]
            cells = (
                first.adapter + ("" if first.adapter in self.active else " (inactive)"),
                pattern,
                str(sum(len(row.modules) or 1 for row in rows)),
                "×".join(map(str, first.shape)),
                ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in first.tensors.items()),
                first.dtype,
                ", ".join(filter(None, (_describe_hparams(first.hparams), first.entries))),
                first.how,
            )
            # As Text, because a name may contain "[b]", which is markup.
            table.add_row(*(Text(escape_text(cell)) for cell in cells))
        total = self.base_parameters + self.trainable
        share = 100 * self.trainable / total if total else 0.0
        text = io.StringIO()
        Console(file=text, width=160, force_terminal=False, force_jupyter=False).print(table)
        lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
        unproved = ", which is not tested against the real models"
        keymaps = (
            "the names in the file are the model's own paths (keymap 'generic')"
            if keymap.name == "generic"
            else f"PyTorch names by the keymap {keymap.name!r}{'' if keymap.proved else unproved}"
            for keymap in self.families.values()
        )
        lines += dict.fromkeys(keymaps)
        lines += [
            f"{leaf} is PyTorch's weight times {factor:.6g}, not a power of two: saving and loading round once"
            for leaf, factor in self._inexact_factors().items()
        ]
        return "\n".join([*lines, f"trainable {self.trainable:,} of {total:,} parameters ({share:.2f} %)"])

    def _inexact_factors(self) -> dict[str, float]:
        """Return `{leaf: factor}` of the entries whose factor is not a power of two, so that conversion rounds."""
        factors: dict[str, float] = {}
        for row in self.rows:
            match = self.families[row.adapter].match(row.leaf) if row.adapter in self.families else None
            if match is not None and len(row.shape) == len(match.weight.left):
                factor = match.weight.factor(plan.axis_sizes(match, row.shape))
                if math.frexp(factor)[0] != 0.5:
                    factors[match.weight.leaf] = factor
        return factors

    def _group_rows(self) -> list[tuple[str, list[Row]]]:
        """Return `(leaf, or its pattern, rows)` of the rows that differ only in the numbers of their layers."""
        stems = (".".join("*" if p.isdecimal() else p for p in row.leaf.split(".")) for row in self.rows)
        groups = paths.group(
            (
                (
                    stem,
                    row.adapter,
                    row.shape,
                    tuple(row.tensors.items()),
                    row.dtype,
                    row.hparams,
                    row.how,
                    row.entries,
                ),
                row,
            )
            for stem, row in zip(stems, self.rows, strict=True)
        )
        return [(stem if len(rows) > 1 else rows[0].leaf, rows) for (stem, *_), rows in groups.items()]


def _describe_hparams(hparams: Any) -> str:
    """Return a site's hyperparameters that are not the defaults, as text."""
    shown: list[str] = []
    for field in () if hparams is None else dataclasses.fields(hparams):
        value = getattr(hparams, field.name)
        if field.name == "own":  # the method's, in a dataclass within `MatrixHparams`
            shown += filter(None, [_describe_hparams(value)])
        elif value and value != field.default and field.name != "used":  # `entries` shows the used layers
            text = f"{value:g}" if isinstance(value, float) else str(value)
            shown.append(text if field.name == "scale" else f"{field.name} {value}")
    return ", ".join(shown)


def summary(model: Any, *inputs: Any) -> Summary:
    """Summarize an adapted model: weights, ranks, scales, dtypes, how each is computed, trained and all parameters.

    Args:
        model: an adapted NNX model, Linen variables, or an adapted Linen module.
        inputs: the inputs of one call; for a Linen module, the variables first. With them the column "how" shows the
            custom layers that need the effective weight. Those are exact, but the backward pass computes a gradient of
            the weight's size.

    Raises `AttachError` if the model has no adapter.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> table = summary({"params": base, **adapter.collection})
    >>> table.trainable, table.base_parameters
    (20, 24)
    """
    held = carrier(model)
    if isinstance(held, Wrapper):
        if not inputs:
            raise AttachError(
                "cannot summarize a Linen module without its variables: call summary(module, variables, *inputs)"
            )
        variables, *rest = inputs
        if not isinstance(variables, Mapping):
            raise AttachError(
                f"summary(module, variables, *inputs): expected variables, found {type(variables).__name__}"
            )
        base, how = carrier(variables), model.notes(variables, *rest) if rest else {}
    else:
        base, how = held, planning.describe_uses(held.walked, inputs)
    leaves = base.leaves() if base.has_base else {}
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items() if is_array(leaf) or is_quantized(leaf)}
    if (walk := base.walked) is not None:
        shapes |= walk.unowned
    adapters = base.adapters()
    rows = [row for name, adapter in adapters for row in _rows(name, adapter, shapes, how)]
    if not rows:
        raise AttachError(f"cannot summarize: this {type(base.tree).__name__} has no adapter")
    return Summary(
        tuple(rows),
        sum(map(math.prod, shapes.values())),
        tuple(held.active()),
        {name: adapter.keymap for name, adapter in adapters},
    )


def _rows(name: str, adapter: Adapter, base: Mapping[str, tuple[int, ...]], how: Mapping[str, str]) -> list[Row]:
    tensors, shapes, sites = adapter.sites, adapter.shapes, sites_of(adapter)
    use = "the model's input" if get_method(adapter.config).scope == "model" else "all its modules"
    shared = [
        Row(name, SHARED_NODE, (), (), shapes[SHARED_NODE], str(x.dtype), None, use, count)
        for x in [*adapter.shared.values()][:1]
        if (count := sum(math.prod(each.entry.shape) for each in sites.shared if each.tensor.trained))
    ]
    return shared + [
        Row(
            name,
            site.leaf,
            base.get(site.leaf, ()),
            site.modules,
            shapes[site.leaf],
            str(next(iter(tensors[site.leaf].values())).dtype),
            site.hparams,
            how.get(site.leaf, ""),
            sum(math.prod(e.form.shape_of(i)) for e in site.entries for i in range(e.form.count)),
            "" if site.named.all else f"{len(site.modules)} of {len(site.named.names)} modules",
        )
        for site in sites
    ]


# ---------------------------------------------------------------- sizes of methods


def count_trained(adapter: Adapter) -> int:
    """Return the number of trained parameters of an adapter, with or without values.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> count_trained(attachment.init(base, LoraConfig(r=2, target_modules=["q"])))
    20
    """
    trained = {t.name for t, _ in tensor_entries(sites_of(adapter)) if t.trained}
    return sum(math.prod(x.shape) for path, x in adapter.flat().items() if path.rpartition(".")[2] in trained)


def method_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | str]:
    """Return `{type: trained parameters, or the error that prevents an adapter}` for a model `{path: shape}`.

    Each method has its default configuration, with PEFT's default targets for the model's family, or else all linear
    modules.
    """
    base = paths.unflatten({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    return {peft_type: _size(peft_type, base) for peft_type in sorted(METHODS)}


def _size(peft_type: str, base: Any) -> int | str:
    cls = class_of(peft_type)
    assert cls is not None
    everywhere: dict[str, Any] = {name: () for names in FACTS[peft_type].default_targets.values() for name in names}
    everywhere["target_modules"] = matching.ALL_LINEAR
    try:
        try:
            return count_trained(attachment.init(base, cls()))
        except TargetError:
            return count_trained(attachment.init(base, cls(**everywhere)))
    except AdapterError as error:
        return str(error).partition("\n")[0]
