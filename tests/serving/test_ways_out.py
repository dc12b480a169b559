"""Every method: its adapters go into a bank, or the error names a way out, which then works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, serving
from jaxadapt.core import paths
from jaxadapt.demo.llama import Llama, LlamaConfig
from jaxadapt.methods import METHODS
from tests.support.configs import class_of

IDS = np.array([[1, 3, 0], [2, 2, 1]])
SIZES = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
KEYMAP = jaxadapt.KeyMap(
    "net",
    (
        jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
        jaxadapt.Weight("{path}.bias", "{path}.bias", "o -> o"),
        jaxadapt.Weight("{path}.scale", "{path}.weight", "o -> o"),
        jaxadapt.Weight("{path}.embedding", "{path}.weight", "v d -> v d", kind="embedding"),
    ),
    order=("emb", "norm", "q", "up"),
)
KEYS = {"num_virtual_tokens": 2, "token_dim": 4, "num_layers": 2, "num_attention_heads": 1}
PROMPTS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "CARTRIDGE": KEYS,
    "CPT": {"cpt_token_ids": [7, 3], "cpt_tokens_type_mask": [1, 2]},
    "PREFIX_TUNING": KEYS,
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2, "num_tasks": 2, "num_ranks": 1},
}
TARGETS = {"LN_TUNING": ["norm"], "TRAINABLE_TOKENS": ["emb"]}


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.emb, self.norm = nnx.Embed(24, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.q, self.up = (
            nnx.Linear(i, o, rngs=rngs, bias_init=nnx.initializers.normal(1.0)) for i, o in ((8, 16), (16, 8))
        )

    def __call__(self, ids: Any) -> Any:
        return self.up(jnp.tanh(self.q(self.norm(self.emb(ids)))))


def trained(model: Any, config: Any) -> tuple[Any, jaxadapt.Adapter]:
    """The model with an adapter of other values, and the adapter."""
    options = {"keymap": KEYMAP} if isinstance(model, Net) else {}
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), **options)
    adapter, rng = jaxadapt.extract(model), np.random.default_rng(2)
    roles = METHODS[config.peft_type].roles
    values = {
        path: x
        if roles.get(path.rpartition(".")[2]) == "frozen" or not jnp.issubdtype(x.dtype, jnp.floating)
        else x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
        for path, x in adapter.flat().items()
    }
    adapter = jaxadapt.Adapter(config=adapter.config, params=paths.unflatten(values), keymap=adapter.keymap)
    jaxadapt.inject(model, adapter)
    model.eval()
    return model, adapter


def served(bank: serving.Bank) -> np.ndarray:
    """The output of the second row with slot 1, and of the first with the base."""
    model = serving.attach(Net(), bank)
    with serving.route(model, bank.select([0, 1])):
        return np.asarray(model(IDS))


def close(got: Any, want: Any) -> None:
    # The same float32 sums in products of other shapes.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("peft_type", sorted(METHODS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_put_works_or_its_error_names_a_way_that_works(peft_type: str, tmp_path: Path):
    method = METHODS[peft_type]
    if method.scope == "model":
        check_prompt(peft_type, tmp_path)
        return
    fields = {**method.examples[0], "target_modules": TARGETS.get(peft_type, ["q", "up"])}
    model, adapter = trained(Net(), class_of(peft_type)(**fields))
    want = np.asarray(model(IDS))
    assert np.abs(want - Net()(IDS)).max() > 1e-2
    room = jaxadapt.LoraConfig(r=9, target_modules=["q", "up"])
    bank = serving.create(Net(), room, slots=2, keymap=KEYMAP)
    try:
        bank = serving.put(bank, 1, adapter, Net())
        message = ""
    except AttachError as error:
        message = str(error)
    if "Create the bank with" in message and method.rows != "no":
        bank = serving.put(serving.create(Net(), [room, adapter], slots=2, keymap=KEYMAP), 1, adapter, Net())
        message = ""
    if not message:
        assert method.rows != "no"
        y = served(bank)
        close(y[1], want[1])
        np.testing.assert_allclose(y[0], Net()(IDS)[0], rtol=1e-6, atol=1e-6)
        return
    assert method.rows == "no"
    merged = jaxadapt.merge(Net(), adapter)
    assert "(jaxadapt.merge)" in message
    close(merged(IDS), want)
    if "to_lora" in message:
        lora, error = jaxadapt.merging.to_lora(adapter, 1, params=Net())
        serving.put(bank, 1, lora)
        check_errors(merged, lora, error)


def check_errors(merged: Any, lora: jaxadapt.Adapter, error: dict[str, float]) -> None:
    """The errors are those of the difference of the weights, by numpy."""
    base, near = Net(), jaxadapt.merge(Net(), lora)
    for name in ("q", "up"):
        start, exact, other = (np.asarray(getattr(m, name).kernel[...], "f8") for m in (base, merged, near))
        assert error[name] == pytest.approx(np.linalg.norm(exact - other) / np.linalg.norm(exact - start), abs=1e-4)
        assert error[name] > 1e-3


def check_prompt(peft_type: str, tmp_path: Path) -> None:
    fields = {"task_type": "CAUSAL_LM", **PROMPTS.get(peft_type, {"num_virtual_tokens": 2})}
    base = Llama(SIZES, rngs=nnx.Rngs(0))
    config = class_of(peft_type)(**fields)
    if peft_type == "CPT":
        adapter = jaxadapt.initializers.start(Llama(SIZES, rngs=nnx.Rngs(0)), config, key=jax.random.key(0)).adapter
    else:
        adapter = jaxadapt.extract(jaxadapt.adapt(Llama(SIZES, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))
    bank = serving.create(base, jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), slots=2)
    with pytest.raises(AttachError, match=rf"{peft_type} changes no weight.*\(jaxadapt\.load\)"):
        serving.put(bank, 1, adapter)
    jaxadapt.save(adapter, tmp_path)
    loaded = jaxadapt.to_peft(jaxadapt.extract(jaxadapt.load(tmp_path, base))).tensors
    assert loaded.keys() == jaxadapt.to_peft(adapter).tensors.keys()


@pytest.mark.full
def test_an_adapter_with_a_part_without_rows_is_refused_with_its_own_way_out():
    """A copy of a norm beside a VB-LoRA, whose weights alone could go into the bank."""
    fields = {**METHODS["VBLORA"].examples[0], "target_modules": ["q"], "modules_to_save": ["norm"]}
    model, adapter = trained(Net(), class_of("VBLORA")(**fields))
    bank = serving.create(Net(), jaxadapt.LoraConfig(r=4, target_modules=["q"]), slots=2, keymap=KEYMAP)
    with pytest.raises(AttachError, match=r"(?s)copy of the weight.*Merge the adapter") as caught:
        serving.put(bank, 1, adapter)
    assert "to_lora" not in str(caught.value)
    close(jaxadapt.merge(Net(), adapter)(IDS), model(IDS))
