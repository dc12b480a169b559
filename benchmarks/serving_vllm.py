"""The batch of serving.py in vLLM on CPU, in an environment of its own.

    python tests/full/programs/environments.py FOLDER vllm
    FOLDER/vllm/bin/pip install peft==0.21.2
    FOLDER/vllm/bin/python benchmarks/serving_vllm.py [--layers 6] [--rows 64] [--tokens 32] [--eager]

The same shapes with random weights, in float32, and PEFT's files. Every row has a prompt of 16 tokens and generates as
many as `--tokens` says; prefill is the time of one new token, a decode step the rest divided by the other tokens. It
imports neither jax nor jaxadapt, whose versions of torch and numpy may differ from vLLM's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, PROMPT = 8, 16


def write_model(folder: Path, layers: int, adapters: int) -> None:
    """Save a random Llama with the widths of SmolLM2-135M, and LoRAs for it, as transformers and PEFT do."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=576, num_hidden_layers=layers, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    fields = LoraConfig(r=RANK, target_modules=PROJECTIONS, init_lora_weights=False)
    adapted = get_peft_model(model, fields, adapter_name="t0")
    for number in range(1, adapters):
        adapted.add_adapter(f"t{number}", fields)
    adapted.save_pretrained(folder / "adapters")


def compare() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write_model(Path(root), given.layers, given.rows)
        llm: Any = LLM(
            model=f"{root}/base", skip_tokenizer_init=True, dtype="float32", enable_lora=True, max_loras=given.rows,
            max_lora_rank=RANK, max_num_seqs=given.rows, max_model_len=256, enable_prefix_caching=False, seed=0,
            enforce_eager=given.eager, disable_log_stats=True,
        )  # fmt: skip
        prompts = [
            TokensPrompt(prompt_token_ids=[(7 * row + n) % 64 for n in range(PROMPT)]) for row in range(given.rows)
        ]
        requests = [LoRARequest(f"t{n}", n + 1, f"{root}/adapters/t{n}") for n in range(given.rows)]

        def seconds(count: int, tokens: int) -> np.ndarray:
            """The median times of one batch whose rows have this many adapters, 0 for the base: by the clock, and of
            the processor."""
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            chosen = [requests[row % count] for row in range(given.rows)] if count else None
            times: list[tuple[float, float]] = []
            for _ in range(given.rounds + 1):
                start, used = time.perf_counter(), time.process_time()
                llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)
                times.append((time.perf_counter() - start, time.process_time() - used))
            return np.median(times[1:], axis=0)

        print("| adapters | prefill, median ms | CPU ms | a decode step, median ms | CPU ms |")
        print("|---|---:|---:|---:|---:|")
        for count in sorted({0, 1, 8, given.rows}):
            first, whole = seconds(count, 1), seconds(count, given.tokens)
            (prefill, used), (step, step_used) = 1e3 * first, 1e3 * (whole - first) / (given.tokens - 1)
            print(f"| {count} | {prefill:.1f} | {used:.1f} | {step:.2f} | {step_used:.2f} |", flush=True)


if __name__ == "__main__":
    compare()
