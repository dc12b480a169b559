"""The fingerprint of a base model: the shapes and a few values of some adapted weights, to tell two bases apart.

A save writes it into the header of the weights; a load and `verify` compare it with the base at hand. The values are
taken at PyTorch's coordinates, through the keymap, and rounded to bfloat16. So one base has one fingerprint in every
layout, sharding and floating-point dtype, and in its Hugging Face folder. A quantized base has none, and neither has a
base that is spread over several processes, or an adapter that changed its base (PiSSA, …) or adapts no weight.

    {"model.layers.0.self_attn.q_proj.weight": {"shape": [2048, 2048], "bf16": "3c1fbc…"}, …}
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxadapt.core.errors import MismatchError, warn

if TYPE_CHECKING:
    from jaxadapt.adapters.site import Site
    from jaxadapt.keymaps.keymap import KeyMap
    from jaxadapt.storage.source import TensorSource

Fingerprint = Mapping[str, Mapping[str, Any]]

FIELD = "base"
"""The key of a fingerprint in jaxadapt's document in the header."""

MODULES, VALUES = 8, 8
"""The number of weights, and of values in each: 64 values tell two bases apart, and cost no time."""

_HEADS = ("lm_head", "embed_out")  # absent in the files of a model that ties them to its embedding


def choose_modules(modules: Iterable[str]) -> list[str]:
    """Return some modules, the same ones in any order of the names.

    >>> choose_modules(["q", "k", "lm_head"]) == choose_modules(["k", "q"])
    True
    """
    names = {name for name in modules if name.rpartition(".")[2] not in _HEADS}
    return sorted(sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))[:MODULES])


def positions(key: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the coordinates of the values of one weight.

    >>> positions("q.weight", (4, 6)) == positions("q.weight", (4, 6)), len(positions("q.weight", (4, 6)))
    (True, 8)
    """
    state, found = zlib.crc32(key.encode()), list[tuple[int, ...]]()
    for _ in range(VALUES):
        position: list[int] = []
        for size in shape:
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            position.append((state >> 33) % size)
        found.append(tuple(position))
    return found


def of_base(
    leaves: Callable[[Collection[str]], Mapping[str, Any]],
    keymap: KeyMap,
    sites: Iterable[Site],
    keys: Iterable[str] | None = None,
) -> Fingerprint | None:
    """Return the fingerprint of a model's base; None if the base has none.

    Args:
        leaves: returns the base parameters at some paths.
        keymap: the keymap that names them.
        sites: the adapted weights.
        keys: the weights to take, in place of the chosen ones; None is returned unless all of them are there.
    """
    from jaxadapt.keymaps import parts, plan

    by_module = {module: site for site in sites if not site.method.copies for module in site.modules}
    modules = choose_modules(by_module) if keys is None else [key.removesuffix(".weight") for key in keys]
    found: dict[str, dict[str, Any]] = {}
    entries: dict[str, plan.PlanEntry | None] = {}
    requests: list[tuple[Any, list[tuple[int, ...]], Any]] = []
    if any(module not in by_module for module in modules):
        return None
    arrays = leaves({by_module[module].leaf for module in modules})
    for module in modules:
        leaf = by_module[module].leaf
        if leaf not in entries:
            entries[leaf] = plan.base_plan_entry(keymap, leaf, tuple(arrays[leaf].shape))
        entry, key = entries[leaf], f"{module}.weight"
        array = arrays[leaf]
        if entry is None or not _has_values(array):
            return None
        members = [i for i, name in enumerate(entry.keys) if parts.file_key(name) == key]
        if len(members) != 1 or entry.keys[members[0]] != key:
            continue  # an expert's parameter, or a part of PyTorch's tensor
        shape = entry.form.file_shape
        if 0 in shape:
            return None
        found[key] = {"shape": list(shape), "bf16": ""}
        requests.append((array, [entry.form.locate(members[0], p) for p in positions(key, shape)], entry.form))
    if not found or (keys is not None and len(found) < len(modules)):
        return None
    for each, taken in zip(found.values(), _take(requests), strict=True):
        each["bf16"] = _hex(taken)
    return found


def of_file(tensors: TensorSource, names: Mapping[str, str]) -> Fingerprint | None:
    """Return the fingerprint of a base's files; None if a weight is not there.

    Args:
        tensors: the base's tensors.
        names: {key in the fingerprint: key in the files}.
    """
    import numpy as np

    found: dict[str, dict[str, Any]] = {}
    for key, name in names.items():
        if name not in tensors or tensors.specs[name].dtype.kind in "iub":
            return None
        shape = tuple(tensors.specs[name].shape)
        taken = [
            tensors.read_slice(name, tuple(slice(i, i + 1) for i in position)) for position in positions(key, shape)
        ]
        values = np.asarray([np.asarray(x).reshape(()) for x in taken])
        found[key] = {"shape": list(shape), "bf16": _hex(values)}
    return found


def differences(stored: Fingerprint, found: Fingerprint) -> list[str]:
    """Return the weights in which two bases differ.

    A value may differ by one unit in its last place of bfloat16, because a keymap's factor adds a rounding; but not
    most values.
    """
    import numpy as np

    different: list[str] = []
    rounded = total = 0
    for key, one in stored.items():
        other = found.get(key, {})
        if list(one.get("shape", ())) != list(other.get("shape", ())):
            different.append(f"{key}: {one.get('shape')} in training, {other.get('shape')} here")
            continue
        x, y = _values(one.get("bf16", "")), _values(other.get("bf16", ""))
        if x.shape != y.shape:
            different.append(f"{key}: no values")
            continue
        unequal = x != y
        with np.errstate(invalid="ignore", over="ignore"):  # infinities
            near = np.abs(x - y) <= 2.0**-7 * np.maximum(np.abs(x), np.abs(y))
        rounded, total = rounded + int((unequal & near).sum()), total + x.size
        if not (near | ~unequal | (np.isnan(x) & np.isnan(y))).all():
            different.append(f"{key}: other values")
    if not different and 4 * rounded > total:
        different.append("all weights: values that differ in the last place")
    return different


def check(stored: Fingerprint | None, found: Fingerprint | None, source: str, *, strict: bool) -> None:
    """Warn if an adapter was trained on another base, or raise `MismatchError` if `strict`.

    With `strict`, a fingerprint that is missing in the file or of this base is an error too.
    """
    if stored is None or found is None:
        if strict:
            place = f"{source} has no fingerprint of its base" if stored is None else "this base has no fingerprint"
            raise MismatchError(
                f"strict_base=True: cannot compare the bases: {place}. jaxadapt.save writes a fingerprint if the base"
                " has values, except for a quantized base and for an adapter that changed its base"
            )
        return
    different = differences(stored, found)
    if not different:
        return
    text = (
        f"{source}: the adapter was trained on another base: {len(different)} of {len(stored)} compared weights differ,"
        f" such as {different[0]}"
    )
    if strict:
        raise MismatchError(f"{text}. Load the adapter onto its own base, or without strict_base=True")
    warn(f"{text}. Its outputs on this base may be wrong")


def parse(value: Any) -> Fingerprint | None:
    """Return the fingerprint in a header's document; None if it has none or a damaged one."""
    if not isinstance(value, dict) or not value:
        return None
    for key, each in value.items():
        if not isinstance(key, str) or not isinstance(each, dict):
            return None
        shape, text = each.get("shape"), each.get("bf16")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            return None
        if not isinstance(text, str) or len(text) != 4 * VALUES or set(text) - set("0123456789abcdef"):
            return None
    return value


# ---------------------------------------------------------------- values


def _has_values(array: Any) -> bool:
    """Return True for arrays of floating-point numbers that can be read here."""
    import jax
    import numpy as np
    from jax.core import Tracer

    if isinstance(array, Tracer) or not isinstance(array, np.ndarray | jax.Array):
        return False
    if isinstance(array, jax.Array) and (array.is_deleted() or not array.is_fully_addressable):
        return False  # partly in other processes: the same answer in all of them
    return bool(jax.numpy.issubdtype(array.dtype, jax.numpy.floating))


def _take(requests: Sequence[tuple[Any, list[tuple[int, ...]], Any]]) -> list[Any]:
    """Return the values at some indices of each array, in the file's scale.

    Arrays in the host's memory are read in place. The others are read on their devices, all at once.
    """
    import jax
    import numpy as np

    from jaxadapt.arrays.layout import to_file_scale

    taken: list[Any] = []
    gather = jax.jit(_values_at)
    for array, indices, _ in requests:
        values = _on_host(array, indices)
        where = tuple(np.asarray(axis, np.int32) for axis in zip(*indices, strict=True))
        taken.append(gather(array, where) if values is None else values)
    host = [np.asarray(x) for x in jax.device_get(taken)]
    forms = [form for _, _, form in requests]
    return [to_file_scale(x, form.factor, form.shift) for x, form in zip(host, forms, strict=True)]


def _values_at(array: Any, where: tuple[Any, ...]) -> Any:
    return array[where]


def _on_host(array: Any, indices: list[tuple[int, ...]]) -> Any:
    """Return the values if the host's memory has them; None otherwise."""
    import numpy as np

    if isinstance(array, np.ndarray):
        return array[tuple(zip(*indices, strict=True))]
    if any(device.platform != "cpu" for device in array.sharding.device_set):
        return None
    if len(array.sharding.device_set) == 1:
        return np.asarray(array)[tuple(zip(*indices, strict=True))]
    values: list[Any] = [None] * len(indices)
    for shard in array.addressable_shards:
        bounds = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
        for n, index in enumerate(indices):
            if values[n] is None and all(low <= i < high for i, (low, high) in zip(index, bounds, strict=True)):
                local = tuple(i - low for i, (low, _) in zip(index, bounds, strict=True))
                values[n] = np.asarray(shard.data)[local]
    return np.asarray(values)


def _hex(values: Any) -> str:
    """Return values as bfloat16, in hexadecimal digits."""
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(values).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return "".join(f"{int(x):04x}" for x in bits.ravel())


def _values(text: str) -> Any:
    import ml_dtypes
    import numpy as np

    bits = np.asarray([int(text[i : i + 4], 16) for i in range(0, len(text), 4)], np.uint16)
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)
