"""T5 in NNX and in Linen, beside transformers' T5ForConditionalGeneration."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxadapt
from tests.support.twins import once

HEADS, SIZE, BUCKETS, FARTHEST = 4, 4, 8, 20


def bucket(distance: Any, bidirectional: bool) -> Any:
    """The number of the bucket of key position minus query position: exact near 0, then logarithmic."""
    count, number = BUCKETS, 0
    if bidirectional:
        count //= 2
        number = jnp.where(distance > 0, count, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = count // 2
    far = exact + jnp.log(jnp.maximum(distance, 1) / exact) / np.log(FARTHEST / exact) * (count - exact)
    return number + jnp.where(distance < exact, distance, jnp.minimum(far.astype(int), count - 1))


def biases(table: Any, queries: Any, keys: Any, bidirectional: bool) -> Any:
    """The bias of each head, (heads, queries, keys)."""
    return table[bucket(keys[None] - queries[:, None], bidirectional)].transpose(2, 0, 1)


ENCODER, DECODER = (functools.partial(biases, bidirectional=both) for both in (True, False))


def heads(x: Any) -> Any:
    return x.reshape(*x.shape[:2], HEADS, SIZE)


def stack(model: Any, name: str, x: Any, mask: Any, other: Any = None, other_mask: Any = None) -> Any:
    """The encoder, or the decoder over the encoder's outputs (`other`)."""
    decoder = other is not None
    table = model.table(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias")
    places = jnp.arange(x.shape[1])
    bias = jaxadapt.models.RelativeBias(DECODER if decoder else ENCODER, table, places, places)
    for i in range(model.decoder_layers if decoder else model.layers):
        at = f"{name}.block.{i}.layer"

        def attend(part: str, x: Any, source: Any, at: str = at, **options: Any) -> Any:
            q, k, v = (heads(model.layer(f"{at}.{part}.{p}")(y)) for p, y in (("q", x), ("k", source), ("v", source)))
            y = jaxadapt.models.attention(q * SIZE**0.5, k, v, **options)  # T5 does not scale
            return model.layer(f"{at}.{part}.o")(y.reshape(*y.shape[:2], -1))

        y = model.layer(f"{at}.0.layer_norm")(x)
        x = x + attend("0.SelfAttention", y, y, bias=bias, mask=mask, is_causal=decoder, prefix=decoder)
        if decoder:
            y = model.layer(f"{at}.1.layer_norm")(x)
            x = x + attend("1.EncDecAttention", y, other, mask=other_mask, prefix=False)
        last = f"{at}.{2 if decoder else 1}"
        y = jax.nn.relu(model.layer(f"{last}.DenseReluDense.wi")(model.layer(f"{last}.layer_norm")(x)))
        x = x + model.layer(f"{last}.DenseReluDense.wo")(y)
    return model.layer(f"{name}.final_layer_norm")(x)


def forward(model: Any, tokens: Any, decoder_tokens: Any, mask: Any, decoder_mask: Any, first: Any, second: Any) -> Any:
    """Tokens of the encoder and the decoder, or their embeddings, to the decoder's logits."""
    shared = model.layer("shared")
    seen, decoder_seen = (None if m is None else (m != 0)[:, None, None] for m in (mask, decoder_mask))
    x = stack(model, "encoder", shared(tokens) if first is None else first, seen)
    y = shared(decoder_tokens) if second is None else second
    y = stack(model, "decoder", y, decoder_seen, x, seen)
    return shared.attend(y * (HEADS * SIZE) ** -0.5)


class T5(once.OnceNnx):
    def __init__(self, modules: Any, layers: int, decoder_layers: int) -> None:
        super().__init__(modules, 1e-6)
        self.layers, self.decoder_layers = layers, decoder_layers

    def table(self, name: str) -> Any:
        return self.layer(name).embedding[...]

    def __call__(
        self, tokens: Any = None, decoder_tokens: Any = None, *, mask: Any = None, decoder_mask: Any = None,
        embeddings: Any = None, decoder_embeddings: Any = None,
    ) -> Any:  # fmt: skip
        return forward(self, tokens, decoder_tokens, mask, decoder_mask, embeddings, decoder_embeddings)


class LinenT5(once.OnceLinen):
    layers: int
    decoder_layers: int

    def table(self, name: str) -> Any:
        return self.layer(name)(jnp.arange(BUCKETS))

    def __call__(
        self, tokens: Any = None, decoder_tokens: Any = None, *, mask: Any = None, decoder_mask: Any = None,
        embeddings: Any = None, decoder_embeddings: Any = None,
    ) -> Any:  # fmt: skip
        return forward(self, tokens, decoder_tokens, mask, decoder_mask, embeddings, decoder_embeddings)


def torch_t5(layers: int = 3, decoder_layers: int | None = None) -> Any:
    """A random transformers T5 in eval mode."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=HEADS * SIZE, d_kv=SIZE, d_ff=24, num_layers=layers, num_decoder_layers=decoder_layers,
        num_heads=HEADS, relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=FARTHEST,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=1.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def twin_of(model: Any, api: str) -> Any:
    """The NNX model, or (module, variables) for "linen"."""
    tied = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    modules = once.modules_of(model.state_dict(), tied)
    depths = {"layers": model.config.num_layers, "decoder_layers": model.config.num_decoder_layers}
    return LinenT5.of(modules, 1e-6, **depths) if api == "linen" else T5(modules, **depths)
