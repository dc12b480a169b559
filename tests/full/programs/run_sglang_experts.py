"""Place adapters in a mixture of experts with SGLang's own code, on a CPU: the change of each weight.

python run_sglang_experts.py '{"model": "base/", "adapters": ["a/"], "modules": null, "out": "placed.npz"}'

SGLang computes LoRA of experts with Triton's kernels, which need a GPU. Everything before them is Python, and this
program runs it: it builds the model, reads an adapter, wraps the layers, renames and stacks the tensors, and copies
them into the memory pool. The result has the product of each buffer as "number of the adapter/module/slice"; an
adapter that SGLang refuses has "number/refused" with the error instead. "modules" is `--lora-target-modules`; null:
SGLang takes the modules from the adapter, as with `--lora-paths` alone.
"""

from __future__ import annotations

import json
import socket
import sys
import traceback
import types

import numpy as np
import torch

# A kernel of the attention, which SGLang takes from vLLM if no GPU is there. It is not called here.
sys.modules |= {name: types.ModuleType(name) for name in ("vllm", "vllm._custom_ops")}
sys.modules["vllm._custom_ops"].rotary_embedding = None
# Without a GPU, PyTorch has no pinned memory.
_tensor = torch.tensor
torch.tensor = lambda *args, pin_memory=False, **more: _tensor(*args, **more)
torch.Tensor.pin_memory = lambda self, *_: self

from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.layers.moe.utils import initialize_moe_config  # noqa: E402
from sglang.srt.lora.layers import FusedMoEWithLoRA  # noqa: E402
from sglang.srt.lora.lora_manager import LoRAManager  # noqa: E402
from sglang.srt.lora.lora_registry import LoRARef  # noqa: E402
from sglang.srt.lora.utils import get_target_module_name  # noqa: E402
from sglang.srt.model_loader.loader import _initialize_model  # noqa: E402
from sglang.srt.model_loader.utils import set_default_torch_dtype  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402


def products(a, b, rows: list[int]) -> list[np.ndarray]:
    """Return B·A of each slice of a buffer, whose A has the slices below one another; `rows`: the outputs of each."""
    rank = a.shape[-2] // len(rows)
    parts = zip(a.split(rank, -2), b.split(rows, -2), strict=True)
    return [(y @ x).numpy() for x, y in parts]


def deltas(manager, layer: int, name: str, module, slot: int) -> list[np.ndarray]:
    """Return the change of each slice of a wrapped layer: (out, in), or (experts, out, in)."""
    pool, rank = manager.memory_pool, manager.max_lora_rank
    if isinstance(module, FusedMoEWithLoRA):
        found = []
        for key in ("gate_up_proj_moe", "down_proj_moe"):
            a, b = pool.A_buffer[key][layer][slot], pool.B_buffer[key][layer][slot]
            slices = a.shape[-2] // rank
            found += products(a, b, [b.shape[-2] // slices] * slices)  # B has the scale already
        return found
    key = get_target_module_name(name, pool.target_modules)
    a, b = pool.A_buffer[key][layer][slot], pool.B_buffer[key][layer][slot]
    adapter = next(iter(manager.loras.values()))
    r, scale = adapter.config.r, adapter.scaling
    base = module.base_layer
    rows = list(getattr(base, "output_sizes", None) or [b.shape[-2]])
    if key == "fused_qkv_a_proj_with_mqa":
        first = module.first_output_dim
        rows = [first, b.shape[-2] - first]
    if sum(rows) != b.shape[-2]:  # the buffer has another width than the layer: the first rows are of this layer
        rows = [b.shape[-2] // len(rows)] * len(rows)
    return [scale * x for x in products(a[: r * len(rows)], b[:, :r], rows)]


def build(config: ModelConfig) -> torch.nn.Module:
    """Return SGLang's own model of a type; an error here is none of an adapter."""
    with set_default_torch_dtype(torch.float32):
        return _initialize_model(config, LoadConfig())


def place(
    model: torch.nn.Module, config: ModelConfig, args: ServerArgs, folder: str, modules: list[str] | None
) -> dict[str, np.ndarray]:
    """Return `{module/slice: change}` of one adapter, in a new model."""
    reference = LoRARef(lora_name="a", lora_path=folder, pinned=False)
    manager = LoRAManager(
        model, config.hf_config, 2, LoadConfig(), torch.float32, args, args.lora_backend,
        max_lora_rank=16 if modules else None, target_modules=set(modules) if modules else None, lora_paths=[reference],
    )  # fmt: skip
    manager.fetch_new_loras({reference.lora_id})
    slot = manager.memory_pool.get_buffer_id(reference.lora_id)
    return {
        f"{name}/{i}": delta
        for layer, own in enumerate(manager.lora_modules)
        for name, module in own.items()
        for i, delta in enumerate(deltas(manager, layer, name, module, slot))
    }


def main() -> None:
    request = json.loads(sys.argv[1])
    args = ServerArgs(
        model_path=request["model"], device="cpu", dtype="float32", enable_lora=True, lora_backend="triton",
        lora_target_modules=["all"], max_lora_rank=16, skip_tokenizer_init=True, moe_runner_backend="triton",
    )  # fmt: skip
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(1, 0, address, 0, "gloo")
    initialize_model_parallel("gloo")
    initialize_dp_attention(args)
    initialize_moe_config()
    config = ModelConfig.from_server_args(args)
    found: dict[str, np.ndarray] = {}
    for number, folder in enumerate(request["adapters"]):
        model = build(config)
        try:
            placed = place(model, config, args, folder, request["modules"])
        except Exception as error:  # the outcome to record
            traceback.print_exc()
            placed = {"refused": np.array(f"{type(error).__name__}: {error}")}
        found |= {f"{number}/{name}": value for name, value in placed.items()}
    np.savez(request["out"], **found)


main()
