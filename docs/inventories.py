"""The addresses of other libraries' names, as the inventories that Sphinx reads, so that a build needs no network.

A name that the signatures newly mention is one more row: the build with `-n` names it.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_OPTAX = "api/transformations.html#optax.GradientTransformation"
LIBRARIES: dict[str, tuple[str, dict[str, str]]] = {
    "python": (
        "https://docs.python.org/3/",
        {
            "py:class collections.abc.Mapping": "library/collections.abc.html#collections.abc.Mapping",
            "py:class collections.abc.Collection": "library/collections.abc.html#collections.abc.Collection",
            "py:class collections.abc.Sequence": "library/collections.abc.html#collections.abc.Sequence",
            "py:class collections.abc.Callable": "library/collections.abc.html#collections.abc.Callable",
            "py:class collections.abc.Generator": "library/collections.abc.html#collections.abc.Generator",
            "py:class collections.abc.Iterable": "library/collections.abc.html#collections.abc.Iterable",
            "py:class collections.abc.Hashable": "library/collections.abc.html#collections.abc.Hashable",
            "py:class collections.abc.Iterator": "library/collections.abc.html#collections.abc.Iterator",
            "py:class os.PathLike": "library/os.html#os.PathLike",
            "py:class re.Pattern": "library/re.html#re.Pattern",
            "py:class pathlib.Path": "library/pathlib.html#pathlib.Path",
            "py:class contextlib.AbstractContextManager": "library/contextlib.html#contextlib.AbstractContextManager",
            "py:class concurrent.futures._base.Future": "library/concurrent.futures.html#concurrent.futures.Future",
            "py:class abc.ABC": "library/abc.html#abc.ABC",
        },
    ),
    "jax": (
        "https://docs.jax.dev/en/latest/",
        {
            "py:class jax.Array": "_autosummary/jax.Array.html",
            "py:class jax.jaxlib._jax.Array": "_autosummary/jax.Array.html",
            "py:class jax.ShapeDtypeStruct": "_autosummary/jax.ShapeDtypeStruct.html",
            "py:class jax.sharding.NamedSharding": "jax.sharding.html#jax.sharding.NamedSharding",
        },
    ),
    "flax": (
        "https://flax.readthedocs.io/en/latest/",
        {
            "py:class flax.nnx.variablelib.Param": "api_reference/flax.nnx/variables.html#flax.nnx.Param",
            "py:class flax.nnx.variablelib.Variable": "api_reference/flax.nnx/variables.html#flax.nnx.Variable",
            "py:class flax.nnx.nn.lora.LoRAParam": "api_reference/flax.nnx/nn/lora.html#flax.nnx.LoRAParam",
            "py:class flax.nnx.filterlib.All": "api_reference/flax.nnx/filterlib.html#flax.nnx.All",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        dict.fromkeys(("py:class numpy.ndarray", "py:class np.ndarray"), "reference/generated/numpy.ndarray.html"),
    ),
    "optax": (
        "https://optax.readthedocs.io/en/latest/",
        {
            "py:class optax._src.base.GradientTransformation": _OPTAX,
            "py:class optax._src.base.GradientTransformationExtraArgs": _OPTAX + "ExtraArgs",
        },
    ),
    "orbax": ("https://orbax.readthedocs.io/en/latest/", {}),
}
"""{library: (address, {role and name: page})}."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file by one rename, unless it has these bytes already: two builds may run at once."""
    if not path.exists() or path.read_bytes() != data:
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(data)
        new.replace(path)


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write one inventory a library, and return Sphinx's `intersphinx_mapping`."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, (_, names) in LIBRARIES.items():
        rows = "".join(f"{key.split()[1]} {key.split()[0]} 1 {page} -\n" for key, page in names.items())
        head = f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        write_file(folder / f"{library}.inv", head.encode() + zlib.compress(rows.encode()))
    return {library: (address, str(folder / f"{library}.inv")) for library, (address, _) in LIBRARIES.items()}
