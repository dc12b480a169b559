"""Place adapters in a mixture of experts with vLLM's own code, on a CPU: the change of each weight.

python run_vllm_experts.py '{"model": "base/", "adapters": ["a/"], "mixed": false, "out": "placed.npz"}'

vLLM computes LoRA of experts with Triton's kernels, which need a GPU. Everything before them is Python, and this
program runs it: it builds the model, wraps its layers, reads an adapter, renames, packs and copies its tensors into
the buffers of the layers. The result has B·A of each buffer, as "number of the adapter/module/slice"; an adapter that
vLLM refuses has "number/refused" with the error instead. `placed.npz.modules.json` has the names of the modules that
it reads, by layer. "mixed" starts vLLM with `--enable-mixed-moe-lora-format` and
requests with `is_3d_lora_weight`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # DeepSeek's own attention; its module names are the same

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype


def deltas(module) -> list[np.ndarray]:
    """Return B·A of each slice of a layer with LoRA, (out, in) or (experts, out, in)."""
    if hasattr(module, "w13_lora_a_stacked"):
        a = (*module.w13_lora_a_stacked, *module.w2_lora_a_stacked)
        b = (*module.w13_lora_b_stacked, *module.w2_lora_b_stacked)
    else:
        a, b = module.lora_a_stacked, module.lora_b_stacked
        a, b = (each if isinstance(each, tuple | list) else (each,) for each in (a, b))
    # The A of an embedding is (slots, vocabulary, rank).
    pairs = ((x[0] if x.ndim == 4 else x[0].T, y[0]) for x, y in zip(a, b, strict=True))
    return [(y @ x).squeeze(0).float().numpy() for x, y in pairs]


def main() -> None:
    request = json.loads(sys.argv[1])
    mixed = {"enable_mixed_moe_lora_format": True} if request["mixed"] else {}
    args = EngineArgs(
        request["model"], dtype="float32", enable_lora=True, max_lora_rank=16, max_model_len=32, enforce_eager=True,
        skip_tokenizer_init=True, load_format="dummy", max_loras=1, max_cpu_loras=64, **mixed,
    )  # fmt: skip
    config = args.create_engine_config()
    found: dict[str, np.ndarray] = {}
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{request['out']}.rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        manager = WorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        manager.create_lora_manager(model, config)
        inner = manager._adapter_manager
        names = {name: inner.packed_modules.get(name, [name]) for name in inner.modules}
        Path(f"{request['out']}.modules.json").write_text(json.dumps(names, indent=1))
        for number, adapter in enumerate(request["adapters"]):
            flag = {"is_3d_lora_weight": True} if request["mixed"] else {}
            try:
                manager.add_adapter(LoRARequest(f"a{number}", number + 1, adapter, **flag))
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                found[f"{number}/refused"] = np.array(text)
            else:
                for name, module in inner.modules.items():
                    for i, delta in enumerate(deltas(module)):
                        found[f"{number}/{name}/{i}"] = delta
            manager.remove_all_adapters()
    np.savez(request["out"], **found)


main()
