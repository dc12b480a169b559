"""Adapters whose leaves are parts of one tensor in PyTorch, written, read, merged and combined inside jit."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import families
from jaxadapt.models import LoraTree
from tests.reference import test_attention as attention
from tests.reference import test_per_expert as experts
from tests.support import peft_harness as harness
from tests.support.twins import trees

pytestmark = pytest.mark.peft

NOBODY = "inside jit"


def attention_adapter() -> jaxadapt.Adapter:
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=["attn", "head"])
    twin = attention.Twin("linen").adapt(config).trained()
    return jaxadapt.extract(twin.tree)


def traced_to_peft(adapter: jaxadapt.Adapter, on_shared: str | None = None, **options: Any) -> jaxadapt.PeftTensors:
    """What `to_peft` gives inside jit."""
    configs: list[Any] = []

    @jax.jit
    def run(adapter: jaxadapt.Adapter) -> dict[str, jax.Array]:
        held = jaxadapt.to_peft(LoraTree(adapter, on_shared=on_shared), **options)
        assert all(isinstance(x, jax.core.Tracer) for x in held.tensors.values())
        configs.append(held.config)
        return dict(held.tensors)

    tensors = run(adapter)
    return jaxadapt.PeftTensors(configs[-1], tensors)


def same(found: Any, wanted: Any) -> None:
    """Bit for bit: values only change places."""
    assert set(found) == set(wanted)
    for key, x in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(x), err_msg=key)


def test_peft_computes_with_what_was_put_together_inside_jit(tmp_path: Any) -> None:
    adapter = attention_adapter()
    held = traced_to_peft(adapter, on_shared="concat")
    jaxadapt.write(held, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no base model's name
        loaded = harness.load(attention.torch_net(), tmp_path)
    assert loaded.missing == loaded.unexpected == []
    base = trees.nest(attention.leaves())
    attention.close(
        attention.LinenNet().apply({"params": jax.jit(jaxadapt.merge)(base, adapter)}, attention.X),
        attention.peft_output(loaded.model),
    )
    same(held.tensors, jaxadapt.to_peft(LoraTree(adapter, on_shared="concat")).tensors)
    back = jax.jit(lambda t: jaxadapt.from_peft(jaxadapt.PeftTensors(held.config, t), base, keymap=attention.TABLE))
    again = jaxadapt.from_peft(held, base, keymap=attention.TABLE)
    same(back(held.tensors).flat(), again.flat())


def test_differentiated_and_mapped_it_is_the_same() -> None:
    """A penalty on PEFT's matrices has the gradient of that on ours; a batch of adapters is moved at once."""
    adapter = attention_adapter()

    def penalty(adapter: jaxadapt.Adapter) -> jax.Array:
        return sum(jnp.sum(x**2) for x in jaxadapt.to_peft(LoraTree(adapter, on_shared="concat")).tensors.values()) / 2

    for path, slope in jax.grad(penalty)(adapter).flat().items():  # of Σx²/2 it is x
        np.testing.assert_array_equal(np.asarray(slope), np.asarray(adapter.flat()[path]), err_msg=path)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
    mapped = jax.vmap(lambda a: dict(jaxadapt.to_peft(LoraTree(a, on_shared="concat")).tensors))(many)
    same(
        {k: x[0] for k, x in mapped.items()},
        jaxadapt.to_peft(LoraTree(adapter, on_shared="concat")).tensors,
    )


def test_whether_leaves_share_a_factor_nobody_can_tell_inside_jit() -> None:
    """Each error says so, and the way out; what needs no such knowledge works."""
    adapter = attention_adapter()
    with pytest.raises(jaxadapt.MismatchError, match=rf'(?s){NOBODY}.*layers\.0\.attn\.lora_A.*on_shared="concat"'):
        jax.jit(lambda a: dict(jaxadapt.to_peft(a).tensors))(adapter)
    with pytest.raises(jaxadapt.AttachError, match=rf"(?s){NOBODY}.*outside jit.*attn\[0"):
        jax.jit(lambda a: jaxadapt.combine([a, a], [0.5, 0.5], method="svd"))(adapter)
    for method in ("cat", "linear"):
        mixed = jax.jit(lambda a, method=method: jaxadapt.combine([a, a], [0.5, 0.25], method=method))(adapter)
        same(mixed.flat(), jaxadapt.combine([adapter, adapter], [0.5, 0.25], method=method).flat())


@pytest.mark.parametrize("name", experts.EVERY)
def test_experts_inside_jit(name: str) -> None:
    table, base = experts.BY_NAME[name].table, experts.base(name)
    file = experts.file_of(name)
    tensors = {key: jnp.asarray(x) for key, x in file.tensors.items()}

    def read(tensors: Any, on_shared: str | None) -> jaxadapt.Adapter:
        held = jaxadapt.PeftTensors(file.config, tensors)
        return jaxadapt.from_peft(held, LoraTree(base, on_shared=on_shared), keymap=table)

    if name in experts.FUSED:
        with pytest.raises(jaxadapt.MismatchError, match=rf'(?s){NOBODY}.*on_shared="concat"'):
            jax.jit(lambda t: read(t, None))(tensors)
    adapter = jax.jit(lambda t: read(t, "concat"))(tensors)
    same(adapter.flat(), read(file.tensors, "concat").flat())
    # Merged inside jit it is what the file says of each expert.
    merged = jax.jit(jaxadapt.merge)(base, adapter)
    flat = {path: np.asarray(x) for path, x in paths.flatten(merged).items()}
    whole = jaxadapt.merge(base, adapter)
    for path, x in paths.flatten(whole).items():
        np.testing.assert_allclose(flat[path], x, rtol=0, atol=2e-7, err_msg=path)  # a sum's order
    experts.close(experts.merged(name, adapter), experts.expected(name, False))
    # And back under PEFT's names, together and apart.
    same(
        traced_to_peft(adapter, on_shared="concat").tensors,
        jaxadapt.to_peft(LoraTree(adapter, on_shared="concat")).tensors,
    )
    assert families.get_family(f"{table}/per-expert").per_expert
    apart = traced_to_peft(adapter, keymap=f"{table}/per-expert")
    same(apart.tensors, jaxadapt.to_peft(adapter, keymap=f"{table}/per-expert").tensors)
