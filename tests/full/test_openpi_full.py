"""openpi's own Gemma, with two experts and LoRA, beside PEFT; and its own conversion of the base to PyTorch.

It needs a checkout of github.com/Physical-Intelligence/openpi, and is skipped without it:

    JAXADAPT_OPENPI=FOLDER python -m pytest tests/full/test_openpi_full.py

Three files of the checkout run: `gemma.py`, `lora.py` and the functions of `convert_jax_model_to_pytorch.py`. The
packages that they import only for annotations and shardings are replaced. Not run: the vision tower, π0's own
projections, and the attention of both experts together, which has no weights of its own.
"""

from __future__ import annotations

import ast
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.export import export_base
from jaxadapt.models import LoraTree

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = os.environ.get("JAXADAPT_OPENPI")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.slow,
    pytest.mark.usefixtures("foreign_model"),
    pytest.mark.filterwarnings("ignore"),  # the keymap is not proved by a specimen
    pytest.mark.skipif(not FOLDER, reason="needs a checkout of openpi; the docstring has the command"),
]
HEADS, HEAD, WIDTH, OTHER, DEPTH, RANK, ALPHA, VOCABULARY = 4, 8, 32, 20, 2, 3, 8.0, 64
PREFIX = "paligemma_with_expert."
MODELS = (f"{PREFIX}paligemma.model.language_model.", f"{PREFIX}gemma_expert.model.")


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __getitem__(self, item: Any) -> Any:
        return Any


@pytest.fixture(scope="module")
def gemma() -> Any:
    """openpi's module `gemma`, which imports its `lora`."""
    source = Path(str(FOLDER)) / "src/openpi/models"
    names = ("openpi", "openpi.models", "openpi.shared", "openpi.training")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    typing = modules["openpi.shared.array_typing"] = types.ModuleType("array_typing")
    vars(typing).update(typecheck=lambda x: x, Float=_Anything(), Int=_Anything(), Bool=_Anything(), Array=jax.Array)
    sharding = modules["openpi.training.sharding"] = types.ModuleType("sharding")
    vars(sharding).update(activation_sharding_constraint=lambda x: x)
    with mock.patch.dict(sys.modules, modules):
        for name in ("lora", "gemma"):
            module = types.ModuleType(f"openpi.models.{name}")
            sys.modules[module.__name__] = module
            for parent, child in (("openpi", "models"), ("openpi", "shared"), ("openpi", "training")):
                setattr(sys.modules[parent], child, sys.modules[f"{parent}.{child}"])
            vars(modules["openpi.shared"])["array_typing"] = typing
            vars(modules["openpi.training"])["sharding"] = sharding
            exec(compile((source / f"{name}.py").read_text(), f"{name}.py", "exec"), vars(module))
            setattr(modules["openpi.models"], name, module)
        yield modules["openpi.models"].gemma


def converters() -> Any:
    """The two functions with which openpi converts its base."""
    text = (Path(str(FOLDER)) / "examples/convert_jax_model_to_pytorch.py").read_text()
    wanted = ("slice_paligemma_state_dict", "slice_gemma_state_dict")
    body = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(body, []), "convert_jax_model_to_pytorch.py", "exec"), space)
    return [space[name] for name in wanted]


def experts(gemma: Any) -> list[Any]:
    lora = gemma.lora.LoRAConfig(rank=RANK, alpha=ALPHA)
    return [
        gemma.Config(width=width, depth=DEPTH, mlp_dim=mlp, num_heads=HEADS, num_kv_heads=1, head_dim=HEAD,
                     lora_configs={"attn": lora, "ffn": lora})
        for width, mlp in ((WIDTH, 24), (OTHER, 28))
    ]  # fmt: skip


def built(gemma: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The model and its parameters by their dotted paths, with random values."""
    gemma.PALIGEMMA_VOCAB_SIZE = VOCABULARY
    model = gemma.Module(configs=experts(gemma), embed_dtype="float32")

    def create(module: Any) -> None:
        module.embed(jnp.zeros((1, 1), jnp.int32))
        inputs = [jnp.zeros((1, 1, WIDTH)), jnp.zeros((1, 1, OTHER))]
        module(inputs, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2, 2), bool))

    params = nn.init(create, model)(jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(x.shape).astype("float32") * 0.3 for path, x in paths.flatten(params).items()}
    return model, flat


def outputs(model: Any, flat: dict[str, np.ndarray], expert: int, x: np.ndarray) -> np.ndarray:
    length = x.shape[1]
    mask = np.tril(np.ones((length, length), bool))[None].repeat(len(x), 0)
    positions = np.arange(length, dtype="int32")[None].repeat(len(x), 0)
    embedded = [x, None] if expert == 0 else [None, x]

    def call(module: Any) -> Any:
        return module(embedded, positions, mask)

    found, _ = nn.apply(call, model)({"params": paths.unflatten(flat)})
    return np.asarray(found[expert])


def openpis_own(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The base's weights by openpi's conversion; the vision tower is left out."""
    slice_paligemma, slice_gemma = converters()
    params = {f"llm/{path.replace('.', '/')}": x for path, x in flat.items() if "lora" not in path}
    sizes = {"num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "head_dim": HEAD, "hidden_size": WIDTH}
    config = types.SimpleNamespace(
        text_config=types.SimpleNamespace(**sizes),
        vision_config=types.SimpleNamespace(num_hidden_layers=0, hidden_size=WIDTH),
    )

    class WithVision(dict[str, Any]):
        def pop(self, key: str, *default: Any) -> Any:
            return np.zeros((1, 1, 1, WIDTH), "float32") if key.startswith("img/") else super().pop(key, *default)

    found, rest = slice_paligemma(WithVision(params), config)
    other = types.SimpleNamespace(width=OTHER, depth=DEPTH, num_heads=HEADS, head_dim=HEAD)
    found |= slice_gemma(rest, other, num_expert=1, checkpoint_dir="pi0", pi05=False)
    return {key: x.numpy() for key, x in found.items() if key.startswith(MODELS)}


def in_pytorch(weights: dict[str, np.ndarray]) -> Any:
    """transformers' Gemma for both experts, under the names of openpi's PyTorch model."""
    root = torch.nn.Module()
    for name, width, mlp in ((MODELS[0], WIDTH, 24), (MODELS[1], OTHER, 28)):
        config = transformers.GemmaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=mlp, num_hidden_layers=DEPTH, pad_token_id=0,
            num_attention_heads=HEADS, num_key_value_heads=1, head_dim=HEAD, hidden_activation="gelu_pytorch_tanh",
        )  # fmt: skip
        node = root
        *parents, last = name.rstrip(".").split(".")
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, torch.nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, transformers.GemmaModel(config).eval())
    missing, unexpected = root.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in weights.items()}, False)
    assert not unexpected
    assert missing == [f"{MODELS[1]}embed_tokens.weight"]  # the expert has no embedding of its own
    return root.eval()


def run(model: Any, expert: int, x: np.ndarray) -> np.ndarray:
    gemma_model = model.get_submodule(MODELS[expert].rstrip("."))
    with torch.no_grad():
        return gemma_model(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()


@pytest.mark.filterwarnings("ignore:.*has no config.json")
def test_two_experts_with_lora(gemma: Any, tmp_path: Path) -> None:
    model, flat = built(gemma)
    tree = {f"PaliGemma.llm.{path}": x for path, x in flat.items()}
    base = {path: x for path, x in tree.items() if "lora" not in path}
    wanted = openpis_own(flat)
    export_base(paths.unflatten(base), tmp_path / "base", keymap="openpi:pi0")
    found = load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_array_equal(found[key], x, err_msg=key)
    lora = {path: x for path, x in tree.items() if "lora" in path}
    jaxadapt.save(LoraTree(lora, lora_alpha=ALPHA, on_shared="concat"), tmp_path / "peft", keymap="openpi:pi0")
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((2, 5, width)).astype("float32") for width in (WIDTH, OTHER)]
    without = {path: x if "lora" not in path else x * 0 for path, x in flat.items()}
    plain = in_pytorch(wanted)
    adapted = peft.PeftModel.from_pretrained(in_pytorch(wanted), tmp_path / "peft").eval()
    for expert, x in enumerate(inputs):
        np.testing.assert_allclose(run(plain, expert, x), outputs(model, without, expert, x), rtol=1e-4, atol=1e-5)
        got, want = run(adapted.base_model.model, expert, x), outputs(model, flat, expert, x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 on both sides
        assert abs(got - run(plain, expert, x)).max() > 0.1
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 2 * 2 * 7 * DEPTH
