"""Which arrays hold a NaN or an infinity: a run that went astray, a damaged file, a sum that 16 bits cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.core import paths

_CHUNK = 1 << 18
"""Numbers that are looked at together: of so many the masks stay in a processor's cache."""

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits that NaN and infinity have all set; numpy's own `isfinite` is slow in 16 bits."""

_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


def names_not_finite(arrays: Mapping[str, Any]) -> list[str]:
    """The names of arrays that hold a NaN or an infinity.

    An array on an accelerator is reduced there, and all results are fetched together. Where any array is traced nothing
    is looked at, since it has no values yet. What is no array of floats is finite.
    """
    if any(isinstance(x, Tracer) for x in arrays.values()):
        return []
    found: dict[str, Any] = {}
    with jax.ensure_compile_time_eval():  # arrays that a traced function closes over have values
        for name, x in arrays.items():
            if not isinstance(x, np.ndarray | jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
                continue
            if isinstance(x, np.ndarray):
                found[name] = is_finite(x)
            elif x.is_fully_addressable and {device.platform for device in x.devices()} == {"cpu"}:
                found[name] = all(is_finite(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0)
            else:
                found[name] = _all_finite(x)
        return [name for name, fine in found.items() if not bool(fine)]


def is_finite(x: np.ndarray) -> bool:
    """Whether an array on the host holds neither NaN nor infinity."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    flat = x.ravel(order="K")
    mask = _EXPONENT.get(x.dtype.name)
    bits = None if mask is None else flat.view("uint16")
    for first in range(0, flat.size, _CHUNK):
        part = slice(first, first + _CHUNK)
        fine = np.isfinite(flat[part]) if bits is None else (bits[part] & mask) != mask
        if not fine.all():
            return False
    return True


def check_while_reading(
    get: Callable[[str], np.ndarray], count: int, why: Callable[[list[str]], Exception]
) -> Callable[[str], np.ndarray]:
    """`get`, which looks at each of `count` arrays and raises `why(keys)` with the last, if any is not finite."""
    seen: dict[str, bool] = {}

    def looked(key: str) -> np.ndarray:
        value = get(key)
        seen[key] = is_finite(value)
        if len(seen) == count and not all(seen.values()):
            raise why([key for key, fine in seen.items() if not fine])
        return value

    return looked


def not_finite_message(names: Iterable[str], way_out: str) -> str:
    """The message of an error about arrays that are not finite."""
    return f"these hold a NaN or an infinity; {way_out}:\n" + paths.bullets(names)
