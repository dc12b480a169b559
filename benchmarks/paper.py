"""What a save costs on 1,024 hosts, on paper: which host writes what, counted from the library's own shardings.

    python -m benchmarks.paper [--hosts 1024] [--chips 4] [--tp 8] [--rank 16]

LoRA on all seven projections of a Llama-3-70B, its base cut over (hosts * chips / tp) by FSDP and tp by tensor
parallelism. Nothing runs on those devices: they are names. Counted are bytes, and pieces that lie in one run of the
file; the times are these counts times what is assumed below.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import jaxadapt
from benchmarks.measure import parsed, table
from jaxadapt.arrays import regions
from jaxadapt.persistence import save_adapter

LAYERS, HIDDEN, KEYS, INNER = 80, 8192, 1024, 28672
OUT_CUT = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KEYS), "v_proj": (HIDDEN, KEYS),
           "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER)}  # fmt: skip
IN_CUT = {"o_proj": (HIDDEN, HIDDEN), "down_proj": (INNER, HIDDEN)}

# Assumed: a parallel file system as clusters have them, and JAX's coordination service as it answers on this machine.
HOST, STORE = 1e9, 100e9  # bytes a second that one host, and all together, can write
CALL, META, FLUSH, ANSWER = 10e-6, 100e-6, 20e-3, 0.13e-3  # seconds a write, an open file, a flush, a message
LEAF, PART = 50e-6, 20e-6  # seconds of Python a leaf while the loop waits, and a device's small array to the host


@dataclasses.dataclass(frozen=True)
class Cost:
    total: int
    most: int  # bytes of the host that writes most
    calls: int  # of the host that makes most
    leaves: int  # which every host looks at
    parts: int  # arrays of single devices, of the host that takes most to its memory


def adapter(fsdp: int, tp: int, rank: int) -> dict[str, Any]:
    """The shapes and shardings of one layer's adapter."""
    mesh = AbstractMesh((fsdp, tp), ("fsdp", "tp"))

    def spec(shape: tuple[int, int], axes: tuple[str, str]) -> dict[str, Any]:
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return {"kernel": jax.ShapeDtypeStruct(shape, np.float32, sharding=place)}

    base = {name: spec(shape, ("fsdp", "tp")) for name, shape in OUT_CUT.items()}
    base |= {name: spec(shape, ("tp", "fsdp")) for name, shape in IN_CUT.items()}
    config = jaxadapt.LoraConfig(r=rank, target_modules=list(base))
    return jaxadapt.init(base, config).flat()


def cut_up(spec: Any, fsdp: int, tp: int) -> dict[regions.Region, list[int]]:
    """`{part: numbers of the devices that hold it}`, the mesh laid out row by row over the hosts."""
    cut = {"fsdp": fsdp, "tp": tp}
    axes = [*spec.sharding.spec, *[None] * (spec.ndim - len(spec.sharding.spec))]
    found: dict[regions.Region, list[int]] = {}
    for device in range(fsdp * tp):
        at = {"fsdp": device // tp, "tp": device % tp}
        box = tuple(
            (0, size) if axis is None else (at[axis] * size // cut[axis], (at[axis] + 1) * size // cut[axis])
            for size, axis in zip(spec.shape, axes, strict=True)
        )
        found.setdefault(box, []).append(device)
    return found


def cost(hosts: int, chips: int, tp: int, rank: int, width: int, copies: int) -> Cost:
    """`copies` trees as the adapter's, of `width` bytes a number: it and the moments of its optimizer."""
    fsdp = hosts * chips // tp
    load: Counter[int] = Counter(dict.fromkeys(range(hosts), 0))
    calls: Counter[int] = Counter()
    arrays: Counter[int] = Counter()
    leaves = 0
    for spec in adapter(fsdp, tp, rank).values():
        leaves += LAYERS * copies
        groups: dict[tuple[int, ...], list[regions.Region]] = {}
        for box, devices in cut_up(spec, fsdp, tp).items():
            groups.setdefault(tuple(sorted({d // chips for d in devices})), []).append(box)
        for _ in range(LAYERS * copies):
            for holders, parts in groups.items():  # as `regions.assign_owners` does
                owner = min(holders, key=lambda host: (load[host], host))
                load[owner] += width * sum(map(regions.region_size, parts))
                arrays[owner] += len(parts)
                found = save_adapter.cover_regions(tuple(parts), spec.shape, width)
                calls[owner] += sum(runs(box, spec.shape) for box, _ in found)
    return Cost(sum(load.values()), max(load.values()), max(calls.values()), leaves, max(arrays.values()))


def runs(box: regions.Region, shape: tuple[int, ...]) -> int:
    """In how many pieces a part lies in its tensor."""
    inner = len(shape) - 1
    while inner and box[inner] == (0, shape[inner]):
        inner -= 1
    return math.prod(regions.region_shape(box)[:inner])


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hosts", 1024), ("chips", 4), ("tp", 8), ("rank", 16)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = parsed(options, hosts=4)
    rows: list[list[object]] = []
    for what, width, copies in (("the adapter, bfloat16", 2, 1), ("the adapter and Adam's moments, float32", 4, 3)):
        one = cost(given.hosts, given.chips, given.tp, given.rank, width, copies)
        writing = max(one.most / HOST, one.total / STORE) + one.calls * CALL
        talking, opening = 3 * given.hosts * ANSWER, given.hosts * META
        rows.append([
            what, f"{one.total / 1e6:,.0f}", f"{one.most / 1e6:.2f}", f"{one.leaves:,}", f"{one.parts:,}",
            f"{one.calls:,}", f"{given.hosts + 4:,}", f"{6 * given.hosts:,}",
            f"{one.leaves * LEAF + one.parts * PART:.2f}", f"{writing:.2f}",
            f"{opening + 2 * FLUSH:.2f}", f"{talking:.2f}", f"{writing + opening + 2 * FLUSH + talking:.1f}",
        ])  # fmt: skip
    head = ["what", "MB", "MB a host", "leaves", "arrays a host", "writes a host", "files opened", "messages",
            "stall s", "writing s", "files s", "messages s", "total s"]  # fmt: skip
    fsdp = given.hosts * given.chips // given.tp
    mesh = f"FSDP {fsdp} × TP {given.tp}, rank {given.rank}"
    print(table(f"**{given.hosts:,} hosts of {given.chips} chips, {mesh}**", head, rows))


if __name__ == "__main__":
    main()
