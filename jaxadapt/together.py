"""Saving arrays of which every process holds a part: each writes what it owns, into one file.

`sharding.owners` says who owns what, `sharding.pieces` where in the file that lies, `codecs.parallel` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxadapt import folder, sharding
from jaxadapt.adapter import PeftTensors
from jaxadapt.codecs import parallel, places, safetensors
from jaxadapt.codecs.group import Group
from jaxadapt.codecs.parallel import Part
from jaxadapt.plan import Encoded, Entry
from jaxadapt.sharding import Box


def spread(leaves: Iterable[Any]) -> bool:
    """Whether some of these arrays are partly in other processes."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves)


def write(tensors: PeftTensors, path: str | os.PathLike[str], shared: bool | None, timeout: float) -> None:
    """`folder.write`, called by all processes; `tensors` are those of a plan.

    Args:
        shared: whether all processes see the folder; None: find out. If not, all goes through process 0.
        timeout: in seconds, for each answer of another process.

    Raises:
        FileError: in all processes, if one of them failed, died, or did not call; then the old adapter is still there.
    """
    encoded: Encoded = tensors.tensors  # pyright: ignore[reportAssignmentType]
    target = places.at(path)
    group = Group(str(target), timeout, ("plan", "mode", "result"))

    def parts(common: bool) -> Iterator[Part]:
        return _own(encoded, group.index) if common else _gathered(encoded, group.index)

    if group.index == 0:
        try:
            folder.write(
                tensors,
                target,
                lambda file, specs, metadata: parallel.lead(
                    os.fspath(file), safetensors.named_specs(specs), metadata, parts, group, shared
                ),
            )
        except BaseException as error:
            group.fail(error)
            raise
        group.tell("result")
    else:
        specs = {key: (spec.dtype, spec.shape) for key, spec in encoded.specs.items()}
        parallel.follow(os.fspath(target / folder.WEIGHTS), safetensors.named_specs(specs), parts, group)
        group.hear("result")


def _own(encoded: Encoded, process: int) -> Iterator[Part]:
    """What this process is to write of a shared file, in the order of the file."""
    owned = sharding.owners(encoded.leaves)
    mine = {path: [box for box, owner in boxes.items() if owner == process] for path, boxes in owned.items()}
    entries = [e for e in sorted(encoded.plan.entries, key=lambda e: e.keys[0]) if mine[e.path]]
    for entry in entries:
        leaf = encoded.leaves[entry.path]
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            for shard in leaf.addressable_shards:
                if sharding.box_of(shard.index, entry.shape) in mine[entry.path]:
                    shard.data.copy_to_host_async()
    for entry in entries:
        leaf = encoded.leaves[entry.path]
        held = _held(leaf, mine[entry.path])
        for outer, members in sharding.merged(held).items():
            if len(members) == 1:
                whole = held[outer]
            else:
                whole = np.empty(sharding.extent(outer), leaf.dtype)
                for box in members:
                    whole[sharding.within(box, outer)] = held[box]
            yield from _parts(encoded, entry, outer, whole)


def _held(leaf: Any, boxes: Iterable[Box]) -> dict[Box, np.ndarray]:
    """The values of these boxes, from the shards of this process; each is fetched once."""
    shape = tuple(leaf.shape)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return {sharding.whole(shape): np.asarray(leaf)}
    here = {sharding.box_of(shard.index, shape): shard for shard in leaf.addressable_shards}
    return {box: np.asarray(here[box].data) for box in boxes}


def _gathered(encoded: Encoded, process: int) -> Iterator[Part]:
    """Everything, one leaf after the other, for process 0; the others only send."""
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        leaf = encoded.leaves[entry.path]
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        value = np.asarray(leaf if local else multihost_utils.process_allgather(leaf, tiled=True))
        if process == 0:
            yield from _parts(encoded, entry, sharding.whole(entry.shape), value)


def _parts(encoded: Encoded, entry: Entry, box: Box, held: np.ndarray) -> Iterator[Part]:
    for piece in sharding.pieces(entry.form, box):
        tile = piece.encode(held[sharding.within(piece.region, box)])
        if encoded.dtype is not None:
            tile = tile.astype(encoded.dtype, copy=False)
        yield Part(entry.keys[piece.number], piece.shape, piece.box, tile)

