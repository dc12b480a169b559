"""Run llama.cpp, in an environment with llama-cpp-python: the logits of a prompt, with and without adapters.

python run_llama.py '{"model": "base.gguf", "adapters": [null, "a.gguf"], "tokens": [1, 2, 3], "out": "logits.npy"}'
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np


def logits(model, adapter: str | None, tokens: list[int]) -> np.ndarray:
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = 0  # it rounds to float16
    params.type_k = params.type_v = 0  # float32
    context = llama.llama_init_from_model(model, params)
    assert context, "no context"
    if adapter is not None:
        loaded = llama.llama_adapter_lora_init(model, adapter.encode())
        assert loaded, f"{adapter}: llama.cpp refuses it"
        pointers = (llama.llama_adapter_lora_p_ctypes * 1)(loaded)
        assert llama.llama_set_adapters_lora(context, pointers, 1, (ctypes.c_float * 1)(1.0)) == 0
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(tokens))]
    llama.llama_free(context)
    return np.stack(rows)


def main() -> None:
    request = json.loads(sys.argv[1])
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.use_mmap = False
    model = llama.llama_model_load_from_file(request["model"].encode(), params)
    assert model, f"{request['model']}: llama.cpp refuses it"
    found = [logits(model, adapter, request["tokens"]) for adapter in request["adapters"]]
    np.save(request["out"], np.stack(found))


main()
