"""The real models of `tests/keymaps/families`, with their library's own LoRA on them; each function imports its own.

The LoRA leaves have the values that their paths say, as the weights there have, so that only shapes and logits need to
be kept where a library is in another environment (`recorded/`, written by `record.py`).
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import importlib.util
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxadapt
from jaxadapt.models import LoraTree
from jaxadapt.models.foreign import like_pattern
from tests.keymaps.families import jax_side, specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, HEADS, IDS, Specimen, values
from tests.support.twins import trees

RECORDED = Path(__file__).parent / "recorded"
RANK, ALPHA = 3, 6.0
NAMES = (
    "tunix-qwen3-tied",
    "tunix-gemma3",
    "gemma-gemma3",
    "gemma-gemma3-mha",
    "maxtext-llama3.1",
    "maxtext-llama3.1-scan1",
    "maxtext-qwen3-scan0",
    "keras-llama",
    "keras-gemma3",
)
"""The specimens that are trained with LoRA here; Tunix' others differ in nothing that LoRA meets."""


@dataclasses.dataclass(frozen=True)
class Real:
    """A model with its library's LoRA: the tree, how it runs, and the options of its `LoraTree`."""

    tree: Any
    logits: Callable[[Any], Any]
    told: dict[str, Any]


def specimen(name: str) -> Specimen:
    return BY_NAME[name]


def here(name: str) -> bool:
    """Whether this environment has the library, and Qwix where it trains with that."""
    library = specimen(name).side
    own = library in ("gemma", "keras")
    return jax_side.here(specimen(name)) and (own or importlib.util.find_spec("qwix") is not None)


def told(name: str, rank: int = RANK) -> dict[str, Any]:
    scale = {} if name.startswith("gemma") else {"lora_alpha": ALPHA * rank / RANK}
    apart = {"on_shared": "concat"} if name.startswith("keras") else {}  # each head has an A
    return {**scale, **apart}


def make(name: str, rank: int = RANK) -> Real:
    """The model with the specimen's base weights, and LoRA leaves that do something."""
    if name.startswith("keras"):
        return Real(*_keras(name, rank), told(name, rank))
    side = jax_side.side(specimen(name))
    base = specimen_arrays.base_leaves(specimen(name), side.shapes)
    found = _gemma(side, base, rank) if name.startswith("gemma") else _qwix(name, side, base, rank)
    return Real(found[0], found[1], told(name, rank))


def _gemma(side: jax_side.Side, base: Mapping[str, np.ndarray], rank: int) -> tuple[Any, Callable[[Any], Any]]:
    gm = importlib.import_module("gemma.gm")
    jax.clear_caches()  # gemma jits inside its model, where the rank is no part of the key: the first one would stay
    module = gm.nn.LoRA(rank=rank, model=side.module, dtype=jnp.float32)
    fresh = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(IDS, jnp.int32)))

    def value(path: Any, spec: Any) -> Any:
        name = ".".join(str(key.key) for key in path[1:])
        return jnp.asarray(base[name] if name in base else values(name, spec.shape))

    return jax.tree_util.tree_map_with_path(value, fresh), lambda tree: side.run(module, tree)


def _qwix(
    name: str, side: jax_side.Side, base: Mapping[str, np.ndarray], rank: int
) -> tuple[Any, Callable[[Any], Any]]:
    qwix = importlib.import_module("qwix")
    where = "(attn|mlp).*" if name.startswith("tunix") else "(self_attention/(query|key|value|out)|mlp/w.*)"
    provider = qwix.LoraProvider(module_path=f".*{where}", rank=rank, alpha=ALPHA * rank / RANK)
    model = qwix.apply_lora_to_model(side.make(base), provider, *_inputs(name), rngs=nnx.Rngs(1))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable.set_value(jnp.asarray(values(".".join(map(str, path)), variable.shape)))
        if name.startswith("maxtext"):  # its own apply_lora_to_model does this: Qwix copies names of axes that are gone
            variable.set_metadata(sharding=jax.sharding.PartitionSpec(), out_sharding=None, sharding_names=None)
    return model, side.run if name.startswith("maxtext") else nnx.jit(side.run)


def _keras(name: str, rank: int) -> tuple[Any, Callable[[Any], Any]]:
    """LoRA on all seven, of keras' usual query and value."""
    backbone = jax_side.keras_backbone(specimen(name))
    base = specimen_arrays.base_leaves(
        specimen(name), {v.path.replace("/", "."): tuple(v.shape) for v in backbone.weights}
    )
    layers = {v.path.split("/")[-2] for v in backbone.weights if v.path.endswith("/kernel")}
    backbone.enable_lora(rank, target_layer_names=sorted(layers))
    for layer in backbone._flatten_layers(include_self=False):  # where its own enable_lora finds them
        if layer.name in layers:
            layer.lora_alpha = ALPHA * rank / RANK
    shapes = {v.path.replace("/", "."): tuple(v.shape) for v in backbone.weights}
    leaves = {path: base[path] if path in base else values(path, shape) for path, shape in shapes.items()}
    return {"params": trees.nest(leaves)}, lambda tree: jax_side.run_keras(backbone, tree)


TRAINED = "gemma-gemma3"
"""The model whose LoRA is really trained for a record, since PyTorch is in another environment than gemma."""


def train(made: Real, steps: int = 4) -> Any:
    """The tree after some steps of Adam on its LoRA leaves alone, as gemma's users take them (Linen)."""
    import optax

    params = made.tree["params"]
    mask = jax.tree_util.tree_map_with_path(lambda path, _: str(path[-2].key) == "lora", params)
    optimizer = optax.multi_transform({True: optax.adam(0.05), False: optax.set_to_zero()}, mask)
    state = optimizer.init(params)
    gradient = jax.jit(jax.grad(lambda params: -jax.nn.log_softmax(made.logits({"params": params}))[..., 3].mean()))
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    return {"params": params}


def packed(tree: Any) -> dict[str, str]:
    """The LoRA leaves' float32 numbers, as text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    named = {".".join(str(key.key) for key in path): x for path, x in leaves}
    kept = {path: np.asarray(x, "<f4").tobytes() for path, x in named.items() if ".lora." in path}
    return {path: base64.b64encode(x).decode() for path, x in kept.items()}


def unpacked(leaves: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {path: np.frombuffer(base64.b64decode(x), "<f4").reshape(shapes[path]) for path, x in leaves.items()}


def loaded(name: str, folder: Path) -> tuple[Real, Any]:
    """A model of keras' whose rank has room for the heads, and its tree with the PEFT file of a folder."""
    made = make(name, RANK * HEADS)
    return made, jaxadapt.load(folder, LoraTree(made.tree, **made.told), keymap=specimen(name).keymap)


def crcs(tree: Any) -> dict[str, int]:
    """Of the LoRA leaves' bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    named = {".".join(str(key.key) for key in path): np.ascontiguousarray(x) for path, x in leaves}
    return {path: zlib.crc32(x.tobytes()) for path, x in named.items() if like_pattern().search(path)}


def _inputs(name: str) -> tuple[Any, ...]:
    ids, length = jnp.asarray(IDS, jnp.int32), IDS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), IDS.shape)
    if name.startswith("maxtext"):
        return ids, positions
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(IDS), length, length))
    return ids, positions, None, mask


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the LoRA leaves of a `Real`'s tree."""
    if isinstance(tree, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(tree, nnx.LoRAParam))
        return {".".join(map(str, path)): tuple(v.shape) for path, v in flat}
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    named = {".".join(str(key.key) for key in path): tuple(x.shape) for path, x in leaves}
    return {path: shape for path, shape in named.items() if like_pattern().search(path)}


def recorded(name: str) -> dict[str, Any]:
    found = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    found["lora"] = {path: tuple(shape) for path, shape in found["lora"].items()}
    return found
