"""Detection of NaN and infinity: from a diverged run, a damaged file, or an overflow in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.core import paths

_CHUNK = 1 << 18
"""The number of values per step, small enough that their masks fit in the processor's cache."""

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""{dtype: mask}: the bits that are all set in NaN and infinity. NumPy's `isfinite` is slow for 16-bit dtypes."""

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


def is_finite(x: np.ndarray) -> bool:
    """Return True if an array on the host holds neither NaN nor infinity."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    flat = x.ravel(order="K")
    mask = _EXPONENT.get(x.dtype.name)
    bits = None if mask is None else flat.view("uint16")
    for first in range(0, flat.size, _CHUNK):
        part = slice(first, first + _CHUNK)
        finite = np.isfinite(flat[part]) if bits is None else (bits[part] & mask) != mask
        if not finite.all():
            return False
    return True


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
    return f"these tensors hold a NaN or an infinity; {way_out}:\n" + paths.bullets(names)
