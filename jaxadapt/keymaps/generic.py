"""Keymaps for models of no known family: the generic keymap, and entries made from a layer's axis roles."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxadapt.arrays.layout import Axes
from jaxadapt.configs.base import Config
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Kind, Weight

GENERIC = KeyMap(
    "generic",
    tuple(Weight(f"{prefix}kernel", f"{prefix}weight", "i o -> o i") for prefix in ("", "{path}.")),
)
"""The keymap for models of no known family: 2-D leaves called `kernel`, (in, out) as in Flax, named by their paths."""

MAIN_WEIGHT_NAMES = ("kernel", "w", "weight", "embedding")
"""Usual names of a module's main weight, which is named by its module alone; other parameters keep their own name."""


def entry_from_axes(
    leaf: str, shape: Sequence[int], axes: Axes, stack: Sequence[int] = (), kind: Kind = "linear", groups: int = 1
) -> Weight:
    """Return a literal entry for a leaf whose axis roles come from its class or a trace, not from a keymap.

    The PyTorch name is the JAX path. The index of a numbered axis (stacked layers, batch) is inserted before the last
    module name, so that targets still match by suffix.

    Args:
        leaf: the path of the leaf.
        shape: the shape of the leaf.
        axes: the axis roles, without the stacked axes.
        stack: positions of the stacked axes.
        kind: the kind of the weight.
        groups: the groups of a convolution.

    >>> entry_from_axes("blk.q.kernel", (3, 8, 2, 4), Axes((0,), (1, 2)), stack=(0,)).pattern
    '{s0} i0 o0 o1 -> (o0 o1) (i0)'
    """
    unstacked = [i for i in range(len(shape)) if i not in stack]
    names: dict[int, str] = {axis: f"{{s{n}}}" for n, axis in enumerate(stack)}
    for role, name in ((axes.in_axes, "i{}"), (axes.out_axes, "o{}"), (axes.batch_axes, "{{b{}}}")):
        names |= {unstacked[a]: name.format(n) for n, a in enumerate(role)}
    *head, last = leaf.split(".")
    module = head if last in MAIN_WEIGHT_NAMES else [*head, last]
    numbered = [names[i] for i in sorted(names) if names[i].startswith("{")]
    key = ".".join([*module[:-1], *numbered, *module[-1:], "weight"])
    left = " ".join(names[i] for i in range(len(shape)))
    out, inputs = (" ".join(names[unstacked[a]] for a in role) for role in (axes.out_axes, axes.in_axes))
    over: Any = {f"b{n}": [str(i) for i in range(shape[unstacked[a]])] for n, a in enumerate(axes.batch_axes)}
    right = {"embedding": f"({inputs}) ({out})", "conv": f"({out}) {inputs}"}.get(kind, f"({out}) ({inputs})")
    return Weight(leaf, key, f"{left} -> {right}", kind=kind, groups=groups, **over)


def keymap_from_paths(
    shapes: Mapping[str, Sequence[int]], entries: Iterable[Weight], custom: Collection[str] = ()
) -> tuple[KeyMap, list[str]]:
    """Return a keymap for a model whose paths are PyTorch's names, and its matrices of unknown orientation.

    The orientation of a matrix that is not square is visible from its shape in the file. A kernel with more than two
    axes gets no entry, unless `entries` has one.

    Args:
        shapes: the shapes of the model's weights.
        entries: the entries of the weights whose layers define the axis roles.
        custom: leaves of custom layers, which do not define the roles. Flax's own kernels are (in, out).

    >>> keymap, unsure = keymap_from_paths({"fc.kernel": (2, 3), "fc.bias": (3,), "out.weight": (3, 3)}, ())
    >>> keymap.match("fc.kernel").weight.pattern, unsure
    ('i o -> o i', ['out.weight'])
    """
    by_leaf = {entry.leaf: entry for entry in entries}
    unsure: list[str] = []
    for leaf, shape in shapes.items():
        module, _, last = leaf.rpartition(".")
        if leaf in by_leaf or (last in ("kernel", "w") and len(shape) > 2):
            continue
        by_leaf[leaf] = entry_for_copy(leaf, shape)
        if (
            len(shape) == 2
            and shape[0] == shape[1]
            and (last in ("w", "weight") or (last == "kernel" and leaf in custom))
        ):
            unsure.append(leaf)
        if last == "bias" and len(shape) > 1:  # axes for the heads and their features: one axis in PyTorch
            axes = " ".join(f"a{i}" for i in range(len(shape)))
            by_leaf[leaf] = Weight(leaf, f"{module}.bias".lstrip("."), f"{axes} -> ({axes})")
    return KeyMap(GENERIC.name, tuple(by_leaf.values())), unsure


def is_guess(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> bool:
    """Return True if no family's keymap defines a leaf's PyTorch layout, so that its entry assumes Flax's layout."""
    matched = keymap.match(leaf)
    if matched is None or len(matched.weight.left) != len(shape):
        return True
    return matched.weight in GENERIC.weights or _is_from_axes(matched.weight)


def _is_from_axes(entry: Weight) -> bool:
    """Return True if `entry_from_axes` made the entry."""
    axes = entry.axes
    return not axes.batch_axes and entry == entry_from_axes(
        entry.leaf, range(len(entry.left)), axes, entry.stack, entry.kind, entry.groups
    )


def is_square(matched: Match, shape: Sequence[int]) -> bool:
    """Return True if a linear weight has as many inputs as outputs, so that its shape also fits when transposed."""
    sizes = dict(zip(matched.weight.left, shape, strict=True))
    inputs, out = (math.prod(sizes[axis] for axis in matched.roles[role]) for role in ("in", "out"))
    return matched.weight.kind == "linear" and inputs == out


_C = TypeVar("_C", bound=Config)


def with_layout(config: _C, keymap: KeyMap, sites: Iterable[Match]) -> _C:
    """Return the configuration with `fan_in_fan_out` as PEFT sets it: by the last Conv1D or nn.Linear that it adapts.

    Modules are in the order of the keymap's entries. Modules without an entry of the family (a custom head) come last.
    """
    linear = [matched.weight for matched in sites if matched.weight.kind == "linear"]
    if "fan_in_fan_out" not in config.to_dict() or not any(w.fan_in_fan_out for w in keymap.weights) or not linear:
        return config
    order = {entry.leaf: i for i, entry in enumerate(keymap.weights)}
    turned = max(linear, key=lambda entry: (_is_from_axes(entry), order[entry.leaf])).fan_in_fan_out
    return config if bool(config.get("fan_in_fan_out")) == turned else config.replace(fan_in_fan_out=turned)


_RENAMED = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def entry_for_copy(leaf: str, shape: Sequence[int]) -> Weight:
    """Return a literal entry for a leaf that is only copied: 2-D kernels are transposed, others keep their layout.

    >>> entry_for_copy("score.kernel", (4, 2)).key, entry_for_copy("norm.scale", (4,)).pattern
    ('score.weight', 'a0 -> a0')
    """
    module, dot, last = leaf.rpartition(".")
    key = f"{module}{dot}{_RENAMED.get(last, last)}"
    if last == "kernel" and len(shape) == 2:
        return Weight(leaf, key, "i o -> o i")
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    return Weight(leaf, key, f"{axes} -> {axes}", kind="vector" if len(shape) == 1 else "other")


def linen_example(config: Config) -> str:
    """Return the lines that create an adapter's collection with the adapted Linen module."""
    name = config.peft_type.lower()
    return (
        f'\n  adapter = jaxadapt.adapt(module, config).init(key, x)["{name}"]  # or its shapes only: jax.eval_shape\n'
        f'  jaxadapt.load(path, {{"params": params, "{name}": adapter}})'
    )


def layout_advice(config: Config, leave_out: str) -> str:
    """Return the end of an error message about unknown layouts: the ways to define a layout."""
    return (
        "\nIn NNX, pass example=[inputs of one call]: the model's computation shows the layouts. Or pass"
        f" keymap=<family>, or a KeyMap with an entry for each; or {leave_out}. In Linen, create the collection with"
        f" the adapted module, whose call shows them:{linen_example(config)}"
    )
