"""What dtype an adapter's parameters have, in files and in memory, beside PEFT's `autocast_adapter_dtype`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from safetensors.torch import load_file, save_file

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import trees
from tests.support.twins.tiny import Net

pytestmark = pytest.mark.peft

NET = Net()
TABLE = NET.table("linen")
NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@functools.cache
def torch_net() -> Any:
    return NET.torch().eval()


def params(dtype: Any = "float32") -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), trees.nest(NET.leaves("linen", None, torch_net())))


def config(**fields: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_modules": ["lin"], **fields}


@pytest.fixture
def narrow(tmp_path):
    """A folder whose tensors have one dtype, written by torch."""

    def make(dtype: str) -> Any:
        harness.save(harness.make_peft(torch_net(), peft.LoraConfig(**config(modules_to_save=["head"]))), tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}, file, {"format": "pt"})
        return tmp_path

    return make


def kinds(tree: Any) -> dict[str, str]:
    return {path.rpartition(".")[2]: str(x.dtype) for path, x in jaxadapt.extract(tree).flat().items()}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_files_dtype_is_kept_unless_it_is_asked_for_pefts(dtype, api, narrow, tmp_path):
    """8 bits become 32 either way, as in PEFT: nothing can be computed in them."""
    folder = narrow(dtype)

    def loaded(**options: Any) -> Any:
        if api == "nnx":
            return jaxadapt.load(folder, NET.nnx(torch_net()), keymap=NET.table(), **options)
        return jaxadapt.load(folder, {"params": params()}, keymap=TABLE, **options)

    tree = loaded()
    kept = "float32" if dtype.startswith("float8") else dtype
    assert kinds(tree) == {"lora_A": kept, "lora_B": kept, "copy": dtype}
    wide = loaded(dtype="autocast")
    assert kinds(wide) == {"lora_A": "float32", "lora_B": "float32", "copy": dtype}
    both = (jax.tree.leaves(jaxadapt.extract(one)) for one in (tree, wide))
    for mine, other in zip(*both, strict=True):
        np.testing.assert_array_equal(mine.astype("float32"), other.astype("float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = harness.load(torch_net(), folder).model
    x = NET.input()
    with torch.no_grad():
        want = theirs(torch.from_numpy(x)).numpy()
    if api == "nnx":
        output = np.asarray(wide(NET.ours(x)))
    else:
        module = jaxadapt.adapt(NET.linen(), jaxadapt.extract(wide).config, keymap=TABLE)
        output = np.asarray(module.apply(wide, NET.ours(x)))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.save(tree, tmp_path / "again")
    found = {str(x.dtype) for k, x in jaxadapt.read(tmp_path / "again").tensors.items() if "lora" in k}
    assert found == {kept}


def test_arrays_in_memory_follow_the_same_rule(narrow):
    read = jaxadapt.read(narrow("float8_e4m3fn"))
    tensors = {key: jnp.asarray(x) for key, x in read.tensors.items()}
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(read.config, tensors), params(), keymap=TABLE)
    assert kinds(adapter) == {"lora_A": "float32", "lora_B": "float32", "copy": "float8_e4m3fn"}


@pytest.mark.parametrize("autocast", [True, False])
def test_fresh_parameters_have_pefts_dtypes(autocast):
    """float32, or the base's."""
    model = peft.get_peft_model(
        NET.torch().to(torch.bfloat16), peft.LoraConfig(**config(use_dora=True)), autocast_adapter_dtype=autocast
    )
    (theirs,) = {str(p.dtype).removeprefix("torch.") for n, p in model.named_parameters() if "lora_" in n}
    base = params("bfloat16")
    options = {"keymap": TABLE, "dtype": None if autocast else "base"}
    lora = jaxadapt.LoraConfig(**config(use_dora=True))
    assert set(kinds(jaxadapt.init(base, lora, key=jax.random.key(0), **options)).values()) == {theirs}
    assert set(kinds(jaxadapt.init(base, lora, **options)).values()) == {theirs}  # abstract
    module = jaxadapt.adapt(NET.linen(), lora, **options)
    specs = jax.eval_shape(module.init, jax.random.key(0), NET.ours(NET.input()))
    assert set(kinds(specs).values()) == {"float32"}  # of a base that is made in float32
    model = NET.nnx(torch_net())
    trees.fill(model, {k: v.astype(jnp.bfloat16) for k, v in NET.leaves("nnx", None, torch_net()).items()})
    jaxadapt.adapt(model, lora, rngs=nnx.Rngs(0), keymap=NET.table(), dtype=options["dtype"])
    assert set(kinds(model).values()) == {theirs}


def test_bfloat16_throughout_within_its_rounding(tmp_path):
    """Base and adapter in bfloat16: as near to PEFT's output as the base alone is to torch's (8 bits of mantissa)."""
    model = harness.make_peft(torch_net().to(torch.float32), peft.LoraConfig(**config()))
    harness.save(model.to(torch.bfloat16), tmp_path)
    x = NET.input()
    with torch.no_grad():
        want = model(torch.from_numpy(x).to(torch.bfloat16)).float().numpy()
    base = params("bfloat16")
    variables = jaxadapt.load(tmp_path, {"params": base}, keymap=TABLE)
    assert set(kinds(variables).values()) == {"bfloat16"}
    module = jaxadapt.adapt(NET.linen(), jaxadapt.extract(variables).config, keymap=TABLE)
    output = np.asarray(module.apply(variables, NET.ours(x).astype(jnp.bfloat16)).astype("float32"))
    np.testing.assert_allclose(output, want, rtol=0, atol=2**-6 * abs(want).max())
