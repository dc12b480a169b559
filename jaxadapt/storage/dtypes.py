"""Dtypes of tensors by safetensors' names and by numpy's. numpy is imported only when it is needed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from jaxadapt.core.errors import ConfigError, FileError, FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64",
    "I64": "int64", "U64": "uint64",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
NAMES = {name: code for names in (_NUMPY, _ML_DTYPES) for code, name in names.items()}
_FLOATS = tuple(name for name in NAMES if name.startswith(("float", "bfloat")) and name != "float8_e8m0fnu")
_SPELLINGS = {NAMES[name].lower(): name for name in _FLOATS} | {f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)}
"""{spelling: name}: safetensors' names in lower case, and PyTorch's and transformers' short ones."""


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a safetensors dtype name.

    Raises:
        FormatError: numpy has no such dtype (the 4- and 6-bit types, whose elements share bytes).

    >>> numpy_dtype("BF16"), numpy_dtype("F32")
    (dtype(bfloat16), dtype('float32'))
    """
    import numpy as np

    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    if name in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
    raise FormatError(f"dtype {name}: no numpy array can hold it; expected one of {', '.join([*_NUMPY, *_ML_DTYPES])}")


def dtype_name(dtype: npt.DTypeLike) -> str:
    """Return the safetensors name of a numpy dtype of either byte order.

    Raises:
        FileError: the format has no such dtype.

    >>> dtype_name("float16")
    'F16'
    """
    import numpy as np

    name = np.dtype(dtype).name
    if name not in NAMES:
        raise FileError(f"dtype {name}: safetensors files cannot hold it; convert to one of {', '.join(NAMES)}")
    return NAMES[name]


def float_dtype(dtype: Any, option: str = "dtype") -> np.dtype:
    """Return the floating-point dtype that a caller names; "bf16", "fp16" and safetensors' names are accepted too.

    Raises:
        ConfigError: it is no dtype, or one of integers or booleans; `option` names the argument in the message.

    >>> float_dtype("bf16"), float_dtype("float16")
    (dtype(bfloat16), dtype('float16'))
    """
    import numpy as np

    name = dtype.lower() if isinstance(dtype, str) else None
    name = _SPELLINGS.get(name or "", name)
    if name not in _FLOATS:
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError):
            name = None
    if name not in _FLOATS:
        raise ConfigError(f"{option}={dtype!r}: expected a floating-point dtype: {', '.join(_FLOATS)}")
    return numpy_dtype(NAMES[name])


def is_float(dtype: npt.DTypeLike) -> bool:
    """Return True for a dtype of floating-point numbers, also of the 8- and 16-bit ones that numpy lacks."""
    import numpy as np

    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat", "float"))


def can_hold(dtype: npt.DTypeLike) -> bool:
    """Return True if safetensors files can hold this dtype."""
    import numpy as np

    return np.dtype(dtype).name in NAMES
