"""Arrays of a foreign tree built from a file's tensors: their dtypes, contents and devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import is_array
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.models.foreign.fill import Placed
from jaxadapt.models.foreign.survey import FactorArray


def bitwise_same(a: Any, b: Any) -> bool:
    """Return True if two arrays are bitwise equal, so that a NaN equals itself and 0.0 differs from -0.0."""
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


def same_object(a: Any, b: Any) -> bool:
    """Return True for one object; traced arrays cannot be compared by value."""
    return a is b


def choose_dtypes(
    leaves: Mapping[str, Any], placed: Mapping[str, tuple[FactorArray, Placed]], dtype: Any, source: str
) -> dict[str, Any]:
    """Return each array's dtype: `dtype`, or the tree's own, which must represent the file's numbers exactly."""
    out: dict[str, Any] = {}
    lossy: list[str] = []
    for path, (_, contents) in placed.items():
        own = np.dtype(leaves[path].dtype)
        out[path] = own if dtype is None else np.dtype(dtype)
        file_dtypes = {np.dtype(tensor.dtype) for tensor, _, _ in contents.values()}
        lossy += [f"{path}: {own.name}, in the file {d.name}" for d in file_dtypes if not _is_exact(d, own)]
    if lossy and dtype is None:
        raise MismatchError(
            f"{source}: the dtypes of the target's LoRA leaves cannot represent these tensors exactly. Pass"
            " dtype= to choose"
            f" one, with rounding if necessary:\n{paths.bullets(lossy)}"
        )
    return out


def _is_exact(stored: np.dtype, own: np.dtype) -> bool:
    """Return True if a dtype represents the numbers of a file's dtype exactly; JAX promotes no 8-bit floats."""
    return own == stored or (own.itemsize > 1 and (stored.itemsize == 1 or jnp.promote_types(stored, own) == own))


def build_array(half: FactorArray, contents: Placed, current: Any, keep: bool, dtype: Any, traced: bool) -> Any:
    """Build the new array in the tree's shape; rows without a tensor are zero, or unchanged if `keep`."""
    keep = keep and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct)
    if traced:
        out: Any = jnp.asarray(current, dtype).reshape(half.shape) if keep else jnp.zeros(half.shape, dtype)
    else:
        out = np.array(current, dtype).reshape(half.shape) if keep else np.zeros(half.shape, dtype)
    done: set[tuple[int, int]] = set()
    for i, (tensor, rows, factor) in contents.items():
        position = (i // half.shared, rows.start)
        if position in done:  # the same tensor, for another module that shares it
            continue
        done.add(position)
        piece = half.form.unit(rows.stop - rows.start).decode(tensor if traced else np.asarray(tensor))
        if factor != 1.0:  # at most one rounding
            wide = np.dtype(np.float32 if traced else np.float64)
            piece = piece.astype(wide) * wide.type(factor)
        index = list(half.form.index(i))
        index[half.form.rank] = rows
        if traced:
            out = out.at[tuple(index)].set(piece.astype(dtype))
        else:
            out[tuple(index)] = piece.astype(dtype)
    return out.reshape(half.form.packed)


def place_like(leaf: Any, value: Any) -> Any:
    """Place the value on the leaf's devices, if it has any."""
    if isinstance(value, Tracer):
        return value
    placed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer)
    return jax.device_put(value, leaf.sharding if placed else None)
