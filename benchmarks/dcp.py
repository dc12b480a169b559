"""The adapter of `benchmarks.io` in torch, spread over processes of gloo as `benchmarks.sharded` spreads it in JAX.

PyTorch's DCP (`torch.distributed.checkpoint`) saves and loads it: into its own format, and by its writer for Hugging
Face into one safetensors file, which it puts together after each process has written a part. Both flush their files;
the file that is put together is not flushed. Loading is into tensors that exist.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint, device_mesh, tensor

from benchmarks.measure import Way, serve


def state(modules: Mapping[str, tuple[int, int]], rank: int, values: bool) -> dict[str, Any]:
    """The tensors by PEFT's keys. Each process holds half of one factor and the whole of the other, as in JAX."""
    mesh = device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)

    def make(shape: tuple[int, int], axis: int | None) -> Any:
        whole = torch.randn(shape) if values else torch.zeros(shape)
        place = tensor.Replicate() if axis is None else tensor.Shard(axis)
        return tensor.distribute_tensor(whole.to(torch.bfloat16), mesh, [place])

    out: dict[str, Any] = {}
    for module, (inputs, outputs) in modules.items():
        turned = module.endswith(("o_proj", "down_proj"))
        out[f"base_model.model.{module}.lora_A.weight"] = make((rank, inputs), None if turned else 1)
        out[f"base_model.model.{module}.lora_B.weight"] = make((outputs, rank), 0 if turned else None)
    return out


def save(one_file: bool, tensors: dict[str, Any], folder: Path) -> None:
    if not one_file:
        checkpoint.save(tensors, checkpoint_id=folder / "dcp")
        return
    writer = checkpoint.HuggingFaceStorageWriter(
        str(folder / "dcp-hf"), save_distributed=True, enable_consolidation=True, thread_count_consolidation=2
    )
    checkpoint.save(tensors, storage_writer=writer)


def load(one_file: bool, tensors: dict[str, Any], folder: Path) -> None:
    if not one_file:
        checkpoint.load(tensors, checkpoint_id=folder / "dcp")
    else:
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder / "dcp-hf")))


def way(kind: str, one_file: bool, modules: Mapping[str, tuple[int, int]], rank: int, folder: Path) -> Way:
    full = state(modules, rank, values=True)
    if kind == "save":
        return Way(lambda _: save(one_file, full, folder), dist.barrier)
    empty = state(modules, rank, values=False)
    save(one_file, full, folder)
    load(one_file, empty, folder)
    if not all(torch.equal(full[key].to_local(), empty[key].to_local()) for key in full):
        raise SystemExit("DCP loads other values than it saved")
    return Way(lambda _: load(one_file, empty, folder), dist.barrier)


def worker(index: int, count: int, port: int, folder: str, **what: Any) -> None:
    warnings.simplefilter("ignore")  # that a checkpoint is replaced
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
    serve(way(folder=Path(folder), **what))
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(**json.loads(sys.argv[1]))
