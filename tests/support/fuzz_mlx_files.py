"""Random adapters of mlx-lm: strange names, shapes and settings, and damaged configurations.

    python -m tests.support.fuzz_mlx_files 1000000 [SEED]

An adapter is refused by an `AdapterError`, or read. Then every tensor of the file is there once, with its values, and
the scale is that of the file.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import numpy as np

from jaxadapt import AdapterError
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.persistence.formats import mlx_files

Arrays = dict[str, np.ndarray[Any, Any]]
MODULES = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.h.0.attn.c_attn", "model.h.0.mlp.dense_x",
    "transformer.h.0.attn.c_attn", "language_model.model.layers.0.q", "model.language_model.layers.0.q", "lm_head",
    "model.embed_tokens", "model.wte", "model.embed_out", "model.layers.0.mlp.switch_mlp.up_proj", "q", "", ".", "é",
)  # fmt: skip
ENDS = ("lora_a", "lora_b", "m", "weight", "lora_a.0", "")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 0.5, 1.0, 2.3, 20.0, 1e308, -0.0, float("nan"), float("inf"), 10**400, "lora", "full",
    "dora", "", [], {}, [1], {"rank": 2}, "8",
)  # fmt: skip
FIELDS = ("fine_tune_type", "use_dora", "lora_parameters", "model", "num_layers", "peft_type", "lora_layers")


def draw(rng: random.Random) -> tuple[str, Arrays]:
    """Return a random configuration, and tensors that often fit it."""
    rank, dora = rng.randint(1, 3), rng.random() < 0.4
    parameters: dict[str, Any] = {"rank": rank, "scale": rng.choice((20.0, 2.3, 1, 0.1)), "dropout": 0.1}
    document: dict[str, Any] = {"lora_parameters": parameters, "num_layers": 4, "model": "org/base"}
    if rng.random() < 0.9:
        document["fine_tune_type"] = "dora" if dora else "lora"
    if rng.random() < 0.3:
        parameters[rng.choice(("rank", "scale", "dropout", "alpha", "keys"))] = rng.choice(VALUES)
    if rng.random() < 0.2:
        document[rng.choice(FIELDS)] = rng.choice(VALUES)
    text = json.dumps(document)
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text))]
    arrays: Arrays = {}
    for module in rng.sample(MODULES, rng.randint(1, 3)):
        shapes: dict[str, tuple[int, ...]] = {"lora_a": (4, rank), "lora_b": (rank, 5)} | ({"m": (5,)} if dora else {})
        if rng.random() < 0.15:
            shapes[rng.choice(ENDS)] = tuple(rng.choices((0, 1, 2, 4), k=rng.randint(0, 3)))
        if rng.random() < 0.1:
            shapes.pop(rng.choice(list(shapes)))
        for end, shape in shapes.items():
            dtype = rng.choice(("float32", "float16"))
            arrays[f"{module}.{end}"] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    return text, arrays


def check(text: str, arrays: Arrays) -> str:
    """Read an adapter; return what became of it."""
    try:
        settings = mlx_files.parse_settings(text, "a file")
        found = mlx_files.read_tensors(as_source(arrays), settings, "a file")
    except AdapterError:
        return "refused"
    values = [np.asarray(x) for x in found.tensors.values()]
    assert sorted(x.T.tobytes() for x in values) == sorted(x.tobytes() for x in arrays.values()), arrays.keys()
    assert all(key.startswith("base_model.model.") for key in found.tensors)
    config: Any = found.config
    scale = json.loads(text)["lora_parameters"]["scale"]
    assert config.lora_alpha / config.r == scale or abs(config.lora_alpha / config.r - scale) <= np.spacing(scale)
    return "DoRA" if config.use_dora else "LoRA"


def main(count: int, seed: int = 1) -> Counter[str]:
    """Check random adapters; return how many had which outcome."""
    rng = random.Random(seed)
    return Counter(check(*draw(rng)) for _ in range(count))


if __name__ == "__main__":
    print(main(int(sys.argv[1]), *map(int, sys.argv[2:])))
