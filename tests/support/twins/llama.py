"""Tiny transformers Llamas beside the demo's Flax Llama with the same weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from jaxadapt.demo import llama


def torch_llama(
    *,
    vocab: int = 64,
    width: int = 32,
    inner: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    rope_theta: float = 10000.0,
    seed: int = 0,
) -> Any:
    """A random transformers Llama in eval mode, with grouped-query attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            tie_word_embeddings=tied,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    with torch.no_grad():  # norms away from 1, where a mistake could hide
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def config_of(torch_model: Any, *, scan: bool = False, scan_axis: int = 0) -> llama.LlamaConfig:
    """The demo's configuration of a transformers Llama."""
    c = torch_model.config
    return llama.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rope_theta=c.rope_parameters["rope_theta"],
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        max_position_embeddings=c.max_position_embeddings,
        scan=scan,
        scan_axis=scan_axis,
    )


def weights_of(torch_model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in torch_model.state_dict().items()}


def twin_of(torch_model: Any, api: str = "nnx", *, scan: bool = False, scan_axis: int = 0) -> Any:
    """The Flax model with the torch model's weights: an NNX model, or (module, {"params": …}) for "linen"."""
    config, weights = config_of(torch_model, scan=scan, scan_axis=scan_axis), weights_of(torch_model)
    if api == "linen":
        module: nn.Module = llama.LinenLlama(config)
        return module, llama.to_linen(config, weights)
    model: nnx.Module = llama.to_nnx(config, weights)
    return model


def make_llama(api: str = "nnx", *, scan: bool = False, scan_axis: int = 0, **numbers: Any) -> tuple[Any, Any]:
    """A torch Llama and its twin; `numbers` go to `torch_llama` (`tied`, `layers`, `seed` …)."""
    torch_model = torch_llama(**numbers)
    return torch_model, twin_of(torch_model, api, scan=scan, scan_axis=scan_axis)
