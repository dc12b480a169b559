"""Detection of NaN and infinity: from a diverged run, a damaged file, or an overflow in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from jaxadapt.core.errors import MismatchError, bullets, warn

_CHUNK = 1 << 18
"""The number of values per step, small enough that they fit in the processor's cache."""

_INFINITY = {np.dtype("float16"): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
"""{dtype: the bits of infinity}. Among those of one sign, only NaN has larger bits."""

_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


def names_not_finite(arrays: Mapping[str, Any]) -> list[str]:
    """Return the names of arrays that hold a NaN or an infinity.

    Arrays on accelerators are reduced there, and all results are fetched together. The result is empty if any array is
    traced, since it has no values yet. Values other than arrays of floats count as finite.
    """
    if any(isinstance(x, Tracer) for x in arrays.values()):
        return []
    finite: dict[str, Any] = {}
    with jax.ensure_compile_time_eval():  # a traced function may close over arrays with values
        for name, x in arrays.items():
            if not isinstance(x, np.ndarray | jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
                continue
            if isinstance(x, np.ndarray):
                finite[name] = is_finite(x)
            elif x.is_fully_addressable and {device.platform for device in x.devices()} == {"cpu"}:
                finite[name] = all(is_finite(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0)
            else:
                finite[name] = _all_finite(x)
        return [name for name, ok in finite.items() if not bool(ok)]


def require_finite(arrays: Mapping[str, Any], way_out: str, source: str = "") -> None:
    """Raise `MismatchError` for arrays that hold a NaN or an infinity; `source` stands before the message."""
    if names := names_not_finite(arrays):
        raise MismatchError(f"{source}{not_finite_message(names, way_out)}")


def is_finite(x: np.ndarray) -> bool:
    """Return True if an array on the host holds neither NaN nor infinity."""
    flat, infinity, largest = x.ravel(order="K"), _INFINITY.get(x.dtype), np.maximum.reduce
    if infinity is None and not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    for first in range(0, flat.size, _CHUNK):
        part = flat[first : first + _CHUNK]
        if infinity is None:
            if not np.isfinite(part).all():
                return False
        elif largest(part.view(np.int16)) >= infinity or largest(part.view(np.uint16)) >= infinity | 0x8000:
            return False  # NumPy's `isfinite` is slow for 16-bit dtypes
    return True


def count_not_finite(x: Any) -> int:
    """Return the number of values that are NaN or infinite, in a NumPy or JAX array of floats."""
    return int(x.size - (np if isinstance(x, np.ndarray) else jnp).isfinite(x).sum())


def count_lost(before: Any, after: Any) -> int:
    """Return the number of finite values that are NaN or infinite after a cast."""
    xp = np if isinstance(before, np.ndarray) else jnp
    return int((xp.isfinite(before) & ~xp.isfinite(after)).sum())


def cast_tree(tree: Any, dtype: Any, source: str) -> Any:
    """Return a tree with its arrays of floats in another dtype. Raises `MismatchError` as `overflow_error` does."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
        cast = {k: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for k, x in arrays.items()}
    lost = {name: count_lost(arrays[name], cast[name]) for name in names_not_finite(cast)}
    if any(lost.values()):
        raise overflow_error(lost, dtype, source)
    return jax.tree.unflatten(structure, cast.values())


def overflow_error(lost: Mapping[str, int], dtype: Any, source: str) -> MismatchError:
    """Return the error about finite values that are none in a dtype, from their number in each tensor."""
    lost = {name: number for name, number in lost.items() if number}
    dtype = np.dtype(dtype)
    return MismatchError(
        f"{source}: {sum(lost.values())} finite values overflow {dtype.name}, whose largest is"
        f" {float(ml_dtypes.finfo(dtype).max):g}; use bfloat16 or float32, or keep the dtype:\n"
        + bullets(f"{name}: {number}" for name, number in lost.items())
    )


def explain_not_finite(
    arrays: Iterable[tuple[Sequence[str], Any, int]], read: Callable[[str], Any], source: str
) -> dict[str, int]:
    """Return the number of NaN and infinite values in each tensor of a file, by key.

    Raises `MismatchError` if finite values of a tensor became so in its array, because its dtype cannot hold them.

    Args:
        arrays: for each array that is not finite, the keys of its tensors, its dtype and the number of such values, or
            0 if other values than the file's are in it.
        read: returns the tensor of a key.
        source: the file, for the message.
    """
    lost: dict[str, int] = {}
    counts: dict[str, int] = {}
    dtype = None
    for keys, dtype, number in arrays:
        tensors = {key: read(key) for key in keys}
        with np.errstate(over="ignore"):
            here = {key: count_lost(x, x.astype(dtype)) for key, x in tensors.items()}
        present = {key: count_not_finite(x) for key, x in tensors.items()}
        if number and not any((*here.values(), *present.values())):  # the factor of the layout made them so large
            here = {keys[0]: number}
        lost |= here
        counts |= present
    if any(lost.values()):
        raise overflow_error(lost, dtype, source)
    return counts


def warn_not_finite(counts: Mapping[str, int], source: str) -> None:
    """Warn of a file's tensors with NaN or infinite values, if there are any, from their number in each."""
    counts = {name: number for name, number in counts.items() if number}
    if counts:
        warn(
            f"{source}: {sum(counts.values())} values are NaN or infinite; the training diverged, or 16 bits"
            " overflowed. Take an earlier checkpoint:\n"
            + bullets(f"{name}: {number}" for name, number in counts.items())
        )


def check_while_reading(
    get: Callable[[str], np.ndarray], count: int, why: Callable[[list[str]], Exception]
) -> Callable[[str], np.ndarray]:
    """Wrap `get` so that reading the last of `count` arrays raises `why(keys)` for those that are not finite."""
    finite: dict[str, bool] = {}

    def get_checked(key: str) -> np.ndarray:
        value = get(key)
        finite[key] = is_finite(value)
        if len(finite) == count and not all(finite.values()):
            raise why([key for key, ok in finite.items() if not ok])
        return value

    return get_checked


def not_finite_message(names: Iterable[str], way_out: str) -> str:
    """Return the message of an error about arrays that are not finite."""
    return f"these tensors hold a NaN or an infinity; {way_out}:\n" + bullets(names)
