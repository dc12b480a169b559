"""Tensors of a file that hold several leaves here, and what their parts are called in a plan.

PyTorch's `nn.MultiheadAttention` keeps queries, keys and values above each other, and its mixtures of experts keep gate
and up side by side (GPT-OSS: in turns), where JAX libraries have an array each. A plan stays a bijection: its keys name
parts of such tensors. "key[0/3]" is the first third of the rows, "key[1:0/2]" the first half along axis 1, "key[0::2]"
every second row, "key[=0/3]" what is one for all parts. Tensors are cut and put together here, at the file.

    plan.encode ──► {"attn.lora_B.weight[0/3]": …, …} ──joined──► {"attn.lora_B.weight": …}
    plan.decode ◄──                                   ◄──cut────

Pure: it works on anything that has a shape and indexing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Array = Any

_PIECE = re.compile(r"(?P<key>.+)\[(?P<same>=?)(?:(?P<axis>\d+):)?(?P<i>\d+)(?P<how>/|::)(?P<n>\d+)\]")


class Part(NamedTuple):
    """Part `i` of `n` of the tensor `key`, along `axis` (None: it is the same for all parts)."""

    key: str
    axis: int | None
    i: int
    n: int
    turns: bool


def part_key(key: str, axis: int | None, part: str) -> str:
    """A plan's key: of `part` "0/3" or "0::2", along an axis, or of what is one for all parts.

    >>> part_key("b.weight", 0, "1/3"), part_key("w", 2, "0::2"), part_key("a.weight", None, "1/3")
    ('b.weight[1/3]', 'w[2:0::2]', 'a.weight[=1/3]')
    """
    where = "=" if axis is None else f"{axis}:" if axis else ""
    return f"{key}[{where}{part}]"


def parse_part_key(key: str) -> Part | None:
    """What a plan's key is a part of; None if it is a tensor of its own."""
    found = _PIECE.fullmatch(key) if key.endswith("]") else None
    if found is None:
        return None
    axis = None if found["same"] else int(found["axis"] or 0)
    return Part(found["key"], axis, int(found["i"]), int(found["n"]), found["how"] == "::")


def has_parts(keys: Iterable[str]) -> bool:
    """Whether some of a plan's keys are parts of a file's tensors."""
    return any(key.endswith("]") for key in keys)


def file_key(key: str) -> str:
    """The file's name of what a plan's key is a part of.

    >>> file_key("attn.in_proj_weight[0/3]"), file_key("head.weight")
    ('attn.in_proj_weight', 'head.weight')
    """
    found = parse_part_key(key)
    return found.key if found else key


def group_by_file_key(keys: Iterable[str]) -> dict[str, list[str]]:
    """`{the file's key: a plan's keys that it is made of}`, these in order.

    >>> group_by_file_key(["w[10/12]", "w[2/12]", "b"])
    {'w': ['w[2/12]', 'w[10/12]'], 'b': ['b']}
    """
    out: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        piece = parse_part_key(key)
        out.setdefault(piece.key if piece else key, []).append((piece.i if piece else 0, key))
    return {name: [key for _, key in sorted(parts)] for name, parts in out.items()}


def joined_shape(parts: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a file's tensor whose parts have this one.

    >>> joined_shape(["w[1:0/2]", "w[1:1/2]"], (4, 3))
    (4, 6)
    """
    one = parse_part_key(parts[0])
    if one is None or one.axis is None:
        return tuple(shape)
    return (*shape[: one.axis], shape[one.axis] * one.n, *shape[one.axis + 1 :])


def cut_parts(tensors: Mapping[str, Array], keys: Iterable[str]) -> dict[str, Array]:
    """The tensors of a file as a plan's keys name them: parts and repetitions, views where it is memory.

    What cannot be cut keeps its name, and so is reported as any other tensor that does not fit.
    """
    wanted = group_by_file_key(key for key in keys if key.endswith("]"))
    out: dict[str, Any] = {}
    for name in tensors:
        value = tensors[name]
        if name not in wanted:  # whole, or a part already
            out[name] = value
        for key in wanted.get(name, ()):
            piece = parse_part_key(key)
            if piece is None or piece.axis is None:
                out[key] = value
            elif len(shape := value.shape) <= piece.axis or shape[piece.axis] % piece.n:
                out[name] = value
            else:
                out[key] = _part(value, piece)
    return out


def locate_parts(
    shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str]
) -> dict[str, tuple[str, tuple[slice, ...]]]:
    """`{a plan's key: (the file's tensor, where in it)}` of parts, as far as tensors of these shapes can be cut.

    >>> locate_parts({"w": (4, 6)}, ["w[1:1/2]", "v"])
    {'w[1:1/2]': ('w', (slice(None, None, None), slice(3, 6, None)))}
    """
    out: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for key in keys:
        piece = parse_part_key(key)
        if piece is not None and piece.axis is not None and piece.key in shapes:
            shape = shapes[piece.key]
            if len(shape) > piece.axis and shape[piece.axis] % piece.n == 0:
                out[key] = piece.key, _where(shape, piece)
    return out


def _where(shape: tuple[int, ...], piece: Part) -> tuple[slice, ...]:
    assert piece.axis is not None
    size = shape[piece.axis] // piece.n
    mine = slice(piece.i, None, piece.n) if piece.turns else slice(piece.i * size, (piece.i + 1) * size)
    return (*(slice(None) for _ in range(piece.axis)), mine)


def _part(tensor: Array, piece: Part) -> Array:
    return tensor[_where(tensor.shape, piece)]


def join_parts(parts: Sequence[Array], keys: Collection[str], xp: Any) -> Array:
    """The tensor of a file, from its parts in order; `xp` is numpy or `jax.numpy`."""
    piece = parse_part_key(next(iter(keys)))
    if piece is None or piece.axis is None:
        return parts[0]
    if not piece.turns:
        return xp.concatenate(parts, axis=piece.axis)
    return xp.stack(parts, axis=piece.axis + 1).reshape(joined_shape(tuple(keys), parts[0].shape))
