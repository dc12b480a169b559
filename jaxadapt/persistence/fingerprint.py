"""The fingerprint of a base model: the shapes and a few values of some adapted weights, to tell two bases apart.

A save writes it into the header of the weights; a load and `verify` compare it with the base at hand. The values are
taken at PyTorch's coordinates, through the keymap, and rounded to bfloat16. So one base has one fingerprint in every
layout, sharding and floating-point dtype, and in its Hugging Face folder. A quantized base has none, and neither has an
adapter that changed its base (PiSSA, …) or adapts no weight.

    {"model.layers.0.self_attn.q_proj.weight": {"shape": [2048, 2048], "bf16": "3c1fbc…"}, …}

If the base is spread over several processes, each takes the values that its devices hold, and "????" stands for the
others; `merge` joins the fingerprints of all processes.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from jaxadapt.arrays.tensor_source import TensorSource, numpy_dtype
from jaxadapt.core.errors import MismatchError, warn
from jaxadapt.core.lazy import jax, np

if TYPE_CHECKING:
    from jaxadapt.keymaps.keymap import KeyMap

Fingerprint = Mapping[str, Mapping[str, Any]]

FIELD = "base"
"""The key of a fingerprint in jaxadapt's document in the header."""

MODULES, VALUES = 8, 8
"""The number of weights, and of values in each: 64 values tell two bases apart, and cost no time."""

_ELSEWHERE = "????"
"""In place of the digits of a value that only other processes hold."""

_HEADS = ("lm_head", "embed_out")  # absent in the files of a model that ties them to its embedding


def choose_modules(modules: Iterable[str]) -> list[str]:
    """Return some modules, the same ones in any order of the names.

    >>> choose_modules(["q", "k", "lm_head"]) == choose_modules(["k", "q"])
    True
    """
    names = sorted({*modules}, key=lambda name: (zlib.crc32(name.encode()), name))
    return sorted([name for name in names if name.rpartition(".")[2] not in _HEADS][:MODULES])


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
    adapted: Iterable[Any] | Mapping[str, str],
    keys: Iterable[str] | None = None,
) -> Fingerprint | None:
    """Return the fingerprint of a model's base, as far as this process holds its values; None if the base has none.

    Args:
        leaves: returns the base parameters at some paths; those that the base lacks are missing.
        keymap: the keymap that names them.
        adapted: the adapted weights, as sites or as `{module: leaf}`.
        keys: the weights to take, in place of the chosen ones; None is returned unless all of them are there.
    """
    from jaxadapt.keymaps import plan

    leaf_of = (
        adapted
        if isinstance(adapted, Mapping)
        else {module: site.leaf for site in adapted if not site.method.copies for module in site.modules}
    )
    modules = choose_modules(leaf_of) if keys is None else [key.removesuffix(".weight") for key in keys]
    if any(module not in leaf_of for module in modules):
        return None
    requests: dict[str, _Request] = {}
    arrays = leaves({leaf_of[module] for module in modules})
    for module in modules:
        array, key = arrays.get(leaf_of[module]), f"{module}.weight"
        entry = plan.base_plan_entry(keymap, leaf_of[module], tuple(array.shape)) if _has_values(array) else None
        if entry is None:
            return None
        members = [i for i, name in enumerate(entry.keys) if plan.file_key(name) == key]
        if len(members) != 1 or entry.keys[members[0]] != key:
            continue  # an expert's parameter, or a part of PyTorch's tensor
        if 0 in entry.form.file_shape:
            return None
        requests[key] = array, entry.form.locate(members[0], positions(key, entry.form.file_shape)), entry.form
    if not requests or (keys is not None and len(requests) < len(modules)):
        return None
    digits = _take(requests)
    return {key: {"shape": list(form.file_shape), "bf16": digits[key]} for key, (_, _, form) in requests.items()}


def is_complete(found: Fingerprint) -> bool:
    """Return True if no value is missing because only other processes hold it."""
    return all(_ELSEWHERE not in each["bf16"] for each in found.values())


def merge(parts: Sequence[Fingerprint | None]) -> Fingerprint | None:
    """Return one fingerprint from those of all processes; None if one of them has none, or a value is missing.

    >>> here, there = ({"q.weight": {"shape": [2, 2], "bf16": digits}} for digits in ("3c1f????", "????bc00"))
    >>> merge([here, there])
    {'q.weight': {'shape': [2, 2], 'bf16': '3c1fbc00'}}
    """
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or any(part.keys() != known[0].keys() for part in known):
        return None
    merged: dict[str, dict[str, Any]] = {}
    for key, each in known[0].items():
        columns = zip(*(_split(part[key]["bf16"]) for part in known), strict=True)
        digits = (next((x for x in column if x != _ELSEWHERE), _ELSEWHERE) for column in columns)
        merged[key] = {"shape": each["shape"], "bf16": "".join(digits)}
    return merged if is_complete(merged) else None


def of_file(tensors: TensorSource, names: Mapping[str, str]) -> Fingerprint | None:
    """Return the fingerprint of a base's files; None if a weight is not there.

    Args:
        tensors: the base's tensors.
        names: {key in the fingerprint: key in the files}.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, name in names.items():
        if name not in tensors or tensors.specs[name].dtype.kind in "iub":
            return None
        shape = tuple(tensors.specs[name].shape)
        values = [
            tensors.read_slice(name, tuple(slice(i, i + 1) for i in position)).reshape(())
            for position in positions(key, shape)
        ]
        found[key] = {"shape": list(shape), "bf16": _hex(values)}
    return found


def differences(stored: Fingerprint, found: Fingerprint) -> list[str]:
    """Return the weights in which two bases differ, as far as the values of both are known.

    A value may differ by one unit in its last place of bfloat16, because a keymap's factor adds a rounding; but not
    most values.
    """
    different: list[str] = []
    rounded = total = 0
    for key, one in stored.items():
        other = found.get(key, {})
        if list(one.get("shape", ())) != list(other.get("shape", ())):
            different.append(f"{key}: {one.get('shape')} in training, {other.get('shape')} here")
            continue
        digits = [_split(each.get("bf16", "")) for each in (one, other)]
        if len(digits[0]) != len(digits[1]):
            different.append(f"{key}: no values")
            continue
        pairs = [(_value(x), _value(y)) for x, y in zip(*digits, strict=True) if _ELSEWHERE not in (x, y)]
        unequal = [(x, y) for x, y in pairs if x != y and not (math.isnan(x) and math.isnan(y))]
        far = sum(not abs(x - y) <= 2.0**-7 * max(abs(x), abs(y)) < math.inf for x, y in unequal)
        rounded, total = rounded + len(unequal) - far, total + len(pairs)
        if far:
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
                f'strict="base": cannot compare the bases: {place}. jaxadapt.save writes a fingerprint if the base'
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
        raise MismatchError(f'{text}. Load the adapter onto its own base, or without strict="base"')
    warn(f"{text}. Its outputs on this base may be wrong")


def parse(value: Any) -> Fingerprint | None:
    """Return the fingerprint in a header's document; None if it has none or a damaged one."""

    def is_sound(weight: object) -> bool:
        match weight:
            case {"shape": list(shape), "bf16": str(text)}:
                is_shape = all(type(n) is int and n > 0 for n in shape)
                return is_shape and re.fullmatch(rf"[0-9a-f]{{{4 * VALUES}}}", text) is not None
            case _:
                return False

    return value if isinstance(value, dict) and value and all(map(is_sound, value.values())) else None


# ---------------------------------------------------------------- values


def _has_values(array: Any) -> TypeGuard[Any]:
    """Return True for arrays of floating-point numbers that can be read here."""
    if isinstance(array, jax.Array) and (isinstance(array, jax.core.Tracer) or array.is_deleted()):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return (
        isinstance(array, jax.Array | np.ndarray)
        and array.dtype.itemsize > 1  # floats of 8 bits may have a scale
        and bool(jax.numpy.issubdtype(array.dtype, jax.numpy.floating))
    )


_Request = tuple[Any, list[tuple[int, ...]], Any]
"""An array, indices into it, and its layout in the file."""


def _take(requests: Mapping[str, _Request]) -> dict[str, str]:
    """Return the digits of the values at some indices of each array, in the file's scale."""
    from jaxadapt.arrays.layout import to_file_scale

    parts = [(key, *part) for key, (array, where, _) in requests.items() for part in _read_parts(array, where)]
    found = {key: dict.fromkeys(range(len(indices)), _ELSEWHERE) for key, (_, indices, _) in requests.items()}
    for (key, numbers, _), values in zip(parts, jax.device_get([values for _, _, values in parts]), strict=True):
        form = requests[key][2]
        in_file = _hex(to_file_scale(values[: len(numbers)], form.factor, form.shift))
        found[key] |= zip(numbers, _split(in_file), strict=True)
    return {key: "".join(digits.values()) for key, digits in found.items()}


def _read_parts(array: Any, indices: list[tuple[int, ...]]) -> list[tuple[list[int], Any]]:
    """Return the values at some indices of an array in parts, each with the numbers of its indices.

    Arrays in the host's memory are read in place. The others are read on their devices, each shard on its own: on a
    device `VALUES` values, the last ones repeated. A value that only other processes hold is in no part.
    """
    left, parts = dict(enumerate(indices)), list[tuple[list[int], Any]]()
    if not isinstance(array, jax.Array):
        return [(list(left), array[tuple(zip(*indices, strict=True))])]
    is_on_host = all(device.platform == "cpu" for device in array.sharding.device_set)
    for shard in array.addressable_shards:
        bounds = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
        where = {
            number: tuple(i - low for i, (low, _) in zip(index, bounds, strict=True))
            for number, index in left.items()
            if all(low <= i < high for i, (low, high) in zip(index, bounds, strict=True))
        }
        if where:
            local = [*where.values()]
            padded = local if is_on_host else [*local, *local[-1:] * (VALUES - len(local))]
            axes = tuple(np.asarray(axis, np.int32) for axis in zip(*padded, strict=True))
            parts.append((list(where), (np.asarray(shard.data) if is_on_host else shard.data)[axes]))
            left = {number: index for number, index in left.items() if number not in where}
    return parts


def _hex(values: Any) -> str:
    """Return values as bfloat16, in hexadecimal digits."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(values).astype(np.float32).astype(numpy_dtype("BF16")).view(np.uint16)
    return "".join(f"{int(x):04x}" for x in bits.ravel())


def _split(digits: str) -> list[str]:
    """Return the digits of each value."""
    return [digits[i : i + 4] for i in range(0, len(digits), 4)]


def _value(digits: str) -> float:
    """Return the number of bfloat16 that has these digits."""
    return struct.unpack(">f", bytes.fromhex(f"{digits}0000"))[0]
