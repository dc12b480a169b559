"""Parts of file tensors: the keys of file tensors that hold several leaves of a model.

PyTorch's `nn.MultiheadAttention` stores queries, keys and values in one tensor, and mixtures of experts store gate and
up in one (concatenated; in GPT-OSS interleaved). JAX libraries use an array for each. So that a plan remains a
bijection, its keys denote parts of such tensors: "key[0/3]" is the first third of the rows, "key[1:0/2]" the first half
along axis 1, "key[0::2]" every second row, and "key[=0/3]" a tensor that all parts share. This module splits and joins
the tensors when a file is read or written.

    plan.encode ──► {"attn.lora_B.weight[0/3]": …, …} ──join_parts──► {"attn.lora_B.weight": …}
    plan.decode ◄──                                   ◄──cut_parts──

It works on anything with a shape and indexing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Array = Any

_PART_KEY = re.compile(r"(?P<key>.+)\[(?P<same>=?)(?:(?P<axis>\d+):)?(?P<i>\d+)(?P<how>/|::)(?P<n>\d+)\]")


class Part(NamedTuple):
    """Part `i` of `n` of a file tensor.

    Attributes:
        key: the file tensor.
        axis: the axis along which it is split; None if all parts share the tensor.
        i: the number of the part.
        n: the number of parts.
        turns: True if the parts are interleaved, False if they are concatenated.
    """

    key: str
    axis: int | None
    i: int
    n: int
    turns: bool


def part_key(key: str, axis: int | None, part: str) -> str:
    """Return the plan's key of a part ("0/3" or "0::2") along an axis; without an axis, all parts share the tensor.

    >>> part_key("b.weight", 0, "1/3"), part_key("w", 2, "0::2"), part_key("a.weight", None, "1/3")
    ('b.weight[1/3]', 'w[2:0::2]', 'a.weight[=1/3]')
    """
    prefix = "=" if axis is None else f"{axis}:" if axis else ""
    return f"{key}[{prefix}{part}]"


def parse_part_key(key: str) -> Part | None:
    """Return the part that a plan's key denotes, or None if the key denotes a whole tensor."""
    match = _PART_KEY.fullmatch(key) if key.endswith("]") else None
    if match is None:
        return None
    axis = None if match["same"] else int(match["axis"] or 0)
    return Part(match["key"], axis, int(match["i"]), int(match["n"]), match["how"] == "::")


def has_parts(keys: Iterable[str]) -> bool:
    """Return True if some of a plan's keys denote parts of file tensors."""
    return any(key.endswith("]") for key in keys)


def file_key(key: str) -> str:
    """Return the key of the file tensor of a plan's key.

    >>> file_key("attn.in_proj_weight[0/3]"), file_key("head.weight")
    ('attn.in_proj_weight', 'head.weight')
    """
    part = parse_part_key(key)
    return part.key if part else key


def group_by_file_key(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return `{file key: keys of a plan that are its parts}`, the parts in order.

    >>> group_by_file_key(["w[10/12]", "w[2/12]", "b"])
    {'w': ['w[2/12]', 'w[10/12]'], 'b': ['b']}
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        part = parse_part_key(key)
        groups.setdefault(part.key if part else key, []).append((part.i if part else 0, key))
    return {name: [key for _, key in sorted(parts)] for name, parts in groups.items()}


def joined_shape(parts: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a file tensor from the keys of its parts and the shape of one part.

    >>> joined_shape(["w[1:0/2]", "w[1:1/2]"], (4, 3))
    (4, 6)
    """
    first = parse_part_key(parts[0])
    if first is None or first.axis is None:
        return tuple(shape)
    return (*shape[: first.axis], shape[first.axis] * first.n, *shape[first.axis + 1 :])


def cut_parts(tensors: Mapping[str, Array], keys: Iterable[str]) -> dict[str, Array]:
    """Return the tensors of a file under the keys of a plan; the parts of arrays in memory are views.

    A tensor that cannot be split keeps its name, so that it is reported with the other tensors that do not fit.
    """
    groups = group_by_file_key(key for key in keys if key.endswith("]"))
    out: dict[str, Any] = {}
    for name in tensors:
        value = tensors[name]
        if name not in groups:  # not to be split, or a part already
            out[name] = value
        for key in groups.get(name, ()):
            part = parse_part_key(key)
            if part is None or part.axis is None:
                out[key] = value
            elif len(shape := value.shape) <= part.axis or shape[part.axis] % part.n:
                out[name] = value
            else:
                out[key] = value[_part_index(shape, part)]
    return out


def locate_parts(
    shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str]
) -> dict[str, tuple[str, tuple[slice, ...]]]:
    """Return `{part key: (file key, index of the part)}` for the parts of tensors whose shapes can be split.

    >>> locate_parts({"w": (4, 6)}, ["w[1:1/2]", "v"])
    {'w[1:1/2]': ('w', (slice(None, None, None), slice(3, 6, None)))}
    """
    out: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for key in keys:
        part = parse_part_key(key)
        if part is not None and part.axis is not None and part.key in shapes:
            shape = shapes[part.key]
            if len(shape) > part.axis and shape[part.axis] % part.n == 0:
                out[key] = part.key, _part_index(shape, part)
    return out


def _part_index(shape: tuple[int, ...], part: Part) -> tuple[slice, ...]:
    assert part.axis is not None
    size = shape[part.axis] // part.n
    part_slice = slice(part.i, None, part.n) if part.turns else slice(part.i * size, (part.i + 1) * size)
    return (*(slice(None) for _ in range(part.axis)), part_slice)


def join_parts(parts: Sequence[Array], keys: Collection[str], xp: Any) -> Array:
    """Return a file tensor from its parts in order; `xp` is `numpy` or `jax.numpy`."""
    part = parse_part_key(next(iter(keys)))
    if part is None or part.axis is None:
        return parts[0]
    if not part.turns:
        return xp.concatenate(parts, axis=part.axis)
    return xp.stack(parts, axis=part.axis + 1).reshape(joined_shape(tuple(keys), parts[0].shape))
