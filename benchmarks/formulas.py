"""The multiplications that one training step of a method needs on paper, for each module that it adapts.

A product with a trained matrix is computed three times: forward, for the gradient of its input, and for that of the
matrix. One with a frozen matrix is computed twice. A method that only has an effective weight needs the gradient of the
whole weight, once. Methods that are not in the table have no products, or are not made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.train import BATCH, LENGTH
from jaxadapt.demo.llama import LlamaConfig, hf_shapes
from jaxadapt.methods.matrix import split_size

# (inputs, outputs, tokens, configuration) -> multiplications
Formula = Callable[[int, int, int, Any], float]


def _lokr(i: int, o: int, t: int, c: Any) -> float:
    (l, k), (m, n) = (split_size(size, c.decompose_factor) for size in (o, i))
    second = m * n * k if c.r >= max(k, n) / 2 else m * c.r * (n + k)
    return 3 * t * (second + m * k * l)


def _randlora(i: int, o: int, t: int, c: Any) -> float:
    small, large = min(i, o), max(i, o)
    return c.r * -(-small // c.r) * t * (3 * small + 2 * large)


def _osf(i: int, o: int, t: int, c: Any) -> float:
    kept = c.effective_rank or min(i, o) // 2
    low = min(i, o) - kept
    projections = 2 * kept * low * (i + o)  # of the gradients
    return 2 * t * 2 * o * kept + 3 * t * low * (i + o) + projections


FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(("lora", "delora", "gralora", "unilora", "vblora"), lambda i, o, t, c: 3 * t * c.r * (i + o)),
    **dict.fromkeys(("ia3", "road", "ln_tuning", "fourierft", "waveft"), lambda i, o, t, c: 0),
    **dict.fromkeys(("shira", "supertuning"), lambda i, o, t, c: t * i * o),
    **dict.fromkeys(("pvera", "tinylora", "vera"), lambda i, o, t, c: 2 * t * c.r * (i + o)),
    "adalora": lambda i, o, t, c: 3 * t * c.init_r * (i + o),
    "boft": lambda i, o, t, c: 3 * t * i * c.boft_block_size,
    # Complex numbers, counted as one multiplication each, as for real ones.
    "c3a": lambda i, o, t, c: 3 * t * (i // c.block_size) * (o // c.block_size) * (c.block_size // 2 + 1),
    "deft": lambda i, o, t, c: 3 * t * c.r * (i + 2 * o),
    "hira": lambda i, o, t, c: t * i * o + 3 * c.r * i * o,
    "hra": lambda i, o, t, c: 3 * t * 2 * i * c.r,
    "loha": lambda i, o, t, c: t * i * o + 6 * c.r * i * o,
    "lokr": _lokr,
    "miss": lambda i, o, t, c: 3 * t * c.r * o,
    "oft": lambda i, o, t, c: 3 * t * i * c.oft_block_size + 9 * i * c.oft_block_size**2,
    "osf": _osf,
    "peanut": lambda i, o, t, c: t * i * o + 5 * c.r * i * o,
    "randlora": _randlora,
}


def base_flops(config: LlamaConfig) -> float:
    """FLOPs of a step's products without an adapter's: frozen weights pass gradients on, and get none."""
    tokens, width = BATCH * LENGTH, config.num_heads * config.head_dim
    frozen = sum(i * o for o, i in _matrices(config).values()) + config.vocab_size * config.hidden_size
    return 2.0 * tokens * (2 * frozen + 3 * 2 * LENGTH * width * config.num_layers)


def adapter_flops(method: str, config: LlamaConfig, adapter: Any) -> float | None:
    """FLOPs of the products that the adapter adds to a step, None if the table has no formula."""
    formula, targets = FORMULAS.get(method), adapter.get("target_modules") or ()
    if formula is None:
        return None
    adapted = [shape for name, shape in _matrices(config).items() if name.split(".")[-2] in targets]
    return 2.0 * sum(formula(i, o, BATCH * LENGTH, adapter) for o, i in adapted)


def _matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The weights (outputs, inputs) of the layers' linear modules."""
    return {n: (s[0], s[1]) for n, s in hf_shapes(config).items() if len(s) == 2 and "embed_tokens" not in n}
