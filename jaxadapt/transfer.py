"""From the tensors of a file, or of memory, to device arrays in the model's layout.

The fast road of `load`: threads read one tensor at a time into a buffer that stays in the processor's cache, put
it transposed into memory that XLA's CPU client takes without a copy, and the caller's thread hands over what is
ready. So the data is in memory once, and neither planning nor the device waits for the whole file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.codecs import files
from jaxadapt.codecs.safetensors import TensorFile
from jaxadapt.plan import Encoded, Entry, Plan, Spec

# Leaves made by one job share one allocation: large enough for huge pages, small enough that threads share the work.
_JOB = 8 << 20
_THREADS = min(8, os.cpu_count() or 1)


def specs(tensors: Mapping[str, Any]) -> dict[str, Spec]:
    """Shapes and dtypes by key, without reading or making a tensor."""
    if isinstance(tensors, Encoded | TensorFile):
        found: Mapping[str, Any] = tensors.specs
    else:
        found = tensors
    return {key: Spec(tuple(x.shape), np.dtype(x.dtype)) for key, x in found.items()}


def arrays(plan: Plan, tensors: Mapping[str, Any], dtypes: Mapping[str, Any], dtype: Any = None) -> dict[str, Any]:
    """`{path: array}` on the default device from `{key: tensor}`.

    Args:
        tensors: an open file, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: of the tensors, by key.
        dtype: of the arrays; by default each leaf's tensors' own.
    """
    if not isinstance(tensors, TensorFile | Encoded) and any(isinstance(x, jax.Array) for x in tensors.values()):
        leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
        return leaves if dtype is None else {path: leaf.astype(dtype) for path, leaf in leaves.items()}
    wanted = {e.path: np.dtype(dtype) if dtype is not None else e.dtype(dtypes) for e in plan.entries}
    out: dict[str, Any] = {e.path: None for e in plan.entries}
    jobs = list(_jobs(plan, tensors, wanted))
    with ThreadPoolExecutor(max(1, min(_THREADS, len(jobs)))) as pool:
        for made in pool.map(lambda job: _make(job, tensors, wanted), jobs):
            # Aligned memory of our own, so it may be shared; a list at once, since each call costs a tenth of a ms.
            out.update(zip(made, jax.device_put(list(made.values()), may_alias=True), strict=True))
    return out


def _nbytes(entry: Entry, dtypes: Mapping[str, Any]) -> int:
    return entry.form.size * dtypes[entry.path].itemsize


def _jobs(plan: Plan, tensors: Mapping[str, Any], dtypes: Mapping[str, Any]) -> Iterator[list[Entry]]:
    """The leaves in the file's order, in portions."""
    place = {key: number for number, key in enumerate(tensors)}
    job: list[Entry] = []
    size = 0
    for entry in sorted(plan.entries, key=lambda e: place[e.keys[0]]):
        if job and size + _nbytes(entry, dtypes) > _JOB:
            yield job
            job, size = [], 0
        job.append(entry)
        size += _nbytes(entry, dtypes)
    if job:
        yield job


def _make(job: Sequence[Entry], tensors: Mapping[str, Any], dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    places = [-(-_nbytes(e, dtypes) // 64) * 64 for e in job]
    memory = files.aligned(sum(places))
    scratch: np.ndarray | None = None
    if isinstance(tensors, TensorFile):
        info = tensors.header.tensors
        scratch = files.aligned(max(info[key].nbytes for e in job for key in e.keys))
    made: dict[str, np.ndarray] = {}
    at = 0
    for entry, size in zip(job, places, strict=True):
        dtype = dtypes[entry.path]
        leaf = memory[at : at + _nbytes(entry, dtypes)].view(dtype).reshape(entry.shape)
        at += size
        for number, key in enumerate(entry.keys):
            if isinstance(tensors, TensorFile):
                entry.fill(leaf, number, tensors.read_into(key, scratch))
            else:
                entry.fill(leaf, number, np.asarray(tensors[key]))
        made[entry.path] = leaf
    return made
