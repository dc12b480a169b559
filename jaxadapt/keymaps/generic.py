"""What serves where no family's table does: the generic map, and lines made from a layer's own roles."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxadapt.arrays.axes import Axes
from jaxadapt.configs import Config
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Weight

GENERIC = KeyMap(
    "generic",
    tuple(Weight(f"{at}kernel", f"{at}weight", "i o -> o i") for at in ("", "{path}.")),
)
"""The map for models no table knows: 2-D leaves called `kernel`, Flax's own (in, out); names are the JAX paths."""

PLAIN = ("kernel", "w", "weight", "embedding")
"""What a module's only weight is usually called: it goes by its module's name, any other by its own."""


def entry_from_axes(
    leaf: str, shape: Sequence[int], axes: Axes, stack: Sequence[int] = (), kind: str = "linear", groups: int = 1
) -> Weight:
    """A literal line for a leaf whose roles come from its class or a trace, not from a table.

    The PyTorch name is the JAX path; numbered axes (stacked layers, batch) put their index before the
    last module name, so that suffix matching still sees it.

    >>> entry_from_axes("blk.q.kernel", (3, 8, 2, 4), Axes((0,), (1, 2)), stack=(0,)).pattern
    '{s0} i0 o0 o1 -> (o0 o1) (i0)'
    """
    ndim = len(shape)
    own = [i for i in range(ndim) if i not in stack]
    names: dict[int, str] = {axis: f"{{s{n}}}" for n, axis in enumerate(stack)}
    for role, letter in (("in", "i"), ("out", "o")):
        names |= {own[a]: f"{letter}{n}" for n, a in enumerate(getattr(axes, f"{role}_axes"))}
    names |= {own[a]: f"{{b{n}}}" for n, a in enumerate(axes.batch_axes)}
    *head, last = leaf.split(".")
    module = [*head] if last in PLAIN else [*head, last]
    numbered = [names[i] for i in sorted(names) if names[i].startswith("{")]
    key = ".".join([*module[:-1], *numbered, *module[-1:], "weight"])
    left = " ".join(names[i] for i in range(ndim))
    out, inputs = (" ".join(names[own[a]] for a in role) for role in (axes.out_axes, axes.in_axes))
    over: Any = {f"b{n}": [str(i) for i in range(shape[own[a]])] for n, a in enumerate(axes.batch_axes)}
    right = f"({out}) ({inputs})"
    if kind == "embedding":
        right = f"({inputs}) ({out})"
    elif kind == "conv":
        right = f"({out}) {inputs}"
    return Weight(leaf, key, f"{left} -> {right}", kind=kind, groups=groups, **over)


def own_names(
    shapes: Mapping[str, Sequence[int]], lines: Iterable[Weight], custom: Collection[str] = ()
) -> tuple[KeyMap, list[str]]:
    """The table of a model whose paths are PyTorch's names already, and the matrices that may lie either way round.

    Args:
        shapes: of the model's weights.
        lines: of the weights whose roles their layers tell.
        custom: leaves of layers that tell nothing. Flax's own kernels are (in, out).

    A matrix that is not square is given away by its shape in the file. A kernel of more than two axes has no line.

    >>> table, unsure = own_names({"fc.kernel": (2, 3), "fc.bias": (3,), "out.weight": (3, 3)}, ())
    >>> table.match("fc.kernel").weight.pattern, unsure
    ('i o -> o i', ['out.weight'])
    """
    made = {line.leaf: line for line in lines}
    unsure: list[str] = []
    for leaf, shape in shapes.items():
        module, _, last = leaf.rpartition(".")
        if leaf in made or (last in ("kernel", "w") and len(shape) > 2):
            continue
        made[leaf] = entry_for_copy(leaf, shape)
        if (
            len(shape) == 2
            and shape[0] == shape[1]
            and (last in ("w", "weight") or (last == "kernel" and leaf in custom))
        ):
            unsure.append(leaf)
        if last == "bias" and len(shape) > 1:  # of heads and their entries: one axis in PyTorch
            axes = " ".join(f"a{i}" for i in range(len(shape)))
            made[leaf] = Weight(leaf, f"{module}.bias".lstrip("."), f"{axes} -> ({axes})")
    return KeyMap(GENERIC.name, tuple(made.values())), unsure


def is_guess(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> bool:
    """Whether no table says how PyTorch lays a leaf out: the line follows from Flax's own layout alone."""
    site = keymap.match(leaf)
    if site is None or len(site.weight.left) != len(shape):
        return True
    return site.weight in GENERIC.weights or _is_made(site.weight)


def _is_made(line: Weight) -> bool:
    """Whether `entry_from_axes` made it, of roles alone."""
    axes = line.axes
    return not axes.batch_axes and line == entry_from_axes(
        line.leaf, range(len(line.left)), axes, line.stack, line.kind, line.groups
    )


def is_square(site: Match, shape: Sequence[int]) -> bool:
    """Whether a linear weight has as many inputs as outputs, so that it fits PyTorch's transposed as well."""
    sizes = dict(zip(site.weight.left, shape, strict=True))
    inputs, out = (math.prod(sizes[axis] for axis in site.roles[role]) for role in ("in", "out"))
    return site.weight.kind == "linear" and inputs == out


_C = TypeVar("_C", bound=Config)


def with_layout(config: _C, keymap: KeyMap, sites: Iterable[Match]) -> _C:
    """The configuration with `fan_in_fan_out` as PEFT sets it: by the last Conv1D or nn.Linear that it adapts.

    Modules are in the order of the table's lines; those that no table knows (a head of one's own) come last.
    """
    linear = [site.weight for site in sites if site.weight.kind == "linear"]
    if "fan_in_fan_out" not in config.to_dict() or not any(w.fan_in_fan_out for w in keymap.weights) or not linear:
        return config
    order = {line.leaf: i for i, line in enumerate(keymap.weights)}
    said = max(linear, key=lambda line: (_is_made(line), order[line.leaf])).fan_in_fan_out
    return config if bool(config.get("fan_in_fan_out")) == said else config.replace(fan_in_fan_out=said)


_RENAMED = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def entry_for_copy(leaf: str, shape: Sequence[int]) -> Weight:
    """A literal line for a leaf of which only a copy is kept: Flax's kernels are turned, all else lies as it does here.

    >>> entry_for_copy("score.kernel", (4, 2)).key, entry_for_copy("norm.scale", (4,)).pattern
    ('score.weight', 'a0 -> a0')
    """
    module, dot, last = leaf.rpartition(".")
    key = f"{module}{dot}{_RENAMED.get(last, last)}"
    if last == "kernel" and len(shape) == 2:
        return Weight(leaf, key, "i o -> o i")
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    return Weight(leaf, key, f"{axes} -> {axes}", kind="vector" if len(shape) == 1 else "other")


MADE = (
    '\n  made = jaxadapt.adapt(module, config).init(key, x)["lora"]  # for load its shapes are enough: jax.eval_shape\n'
    '  jaxadapt.load(path, {"params": params, "lora": made})'
)


def ways_out(leave_out: str) -> str:
    """Say how a layout becomes known, where no table tells."""
    return (
        "\nLet the model's own computation tell, name the family with keymap=, give a KeyMap with a line for each, or"
        f" {leave_out}. NNX: pass example=[inputs]. Linen: let the adapted module make the collection,{MADE}"
    )
