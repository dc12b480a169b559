"""VB-LoRA's second form of file, which PEFT writes with `save_only_topk_weights`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import ConfigError
from jaxadapt.methods.vblora import choose_vectors

X = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")
FIELDS: dict[str, Any] = {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 3, "target_modules": ["q"]}
BASE = {"q": {"kernel": np.random.default_rng(1).standard_normal((8, 12)).astype("float32")}}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    made: dict[str, np.ndarray] = {"base_model.vblora_vector_bank": rng.standard_normal((6, 4)).astype("float32")}
    for side, shape in (("A", (2, 2)), ("B", (3, 2))):
        key = f"base_model.model.q.vblora_logits_{side}"
        made[f"{key}_topk_indices"] = rng.permuted(np.tile(np.arange(6), (*shape, 1)), axis=-1)[..., :3].astype("uint8")
        made[f"{key}_topk_weights"] = (0.4 * rng.random((*shape, 2))).astype("float32")
    return made


def by_hand(file: dict[str, np.ndarray]) -> np.ndarray:
    """The change of the weight (out, in), part by part."""
    bank, full = file["base_model.vblora_vector_bank"], {}
    for side in "AB":
        key = f"base_model.model.q.vblora_logits_{side}"
        weights = file[f"{key}_topk_weights"]
        for index in np.ndindex(weights.shape[:2]):
            mix = [*weights[index], 1 - weights[index].sum()]
            chosen = file[f"{key}_topk_indices"][index]
            full[side, index] = sum(w * bank[i] for w, i in zip(mix, chosen, strict=True))
    a, b = np.zeros((2, 8)), np.zeros((12, 2))
    for (side, (i, j)), vector in full.items():
        if side == "A":
            a[i, 4 * j : 4 * j + 4] = vector
        else:
            b[4 * i : 4 * i + 4, j] = vector
    return b @ a


def test_a_file_of_chosen_vectors(tmp_path: Any):
    config = jaxadapt.VBLoRAConfig(save_only_topk_weights=True, **FIELDS)
    file = jaxadapt.PeftTensors(config, tensors())
    adapter = jaxadapt.from_peft(file, BASE)
    merged = jaxadapt.merge(BASE, adapter)["q"]["kernel"]
    np.testing.assert_allclose(merged.T, BASE["q"]["kernel"].T + by_hand(tensors()), rtol=1e-5, atol=1e-5)
    jaxadapt.save(adapter, tmp_path)
    again = jaxadapt.read(tmp_path).tensors
    assert {k: (v.dtype, v.shape) for k, v in again.items()} == {k: (v.dtype, v.shape) for k, v in tensors().items()}
    for key, value in tensors().items():
        np.testing.assert_array_equal(again[key], value)
    with pytest.raises(ConfigError, match="cannot create an adapter with save_only_topk_weights"):
        jaxadapt.init(BASE, config, key=jax.random.key(0))


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_vectors", [6, 300])
def test_pefts_file_of_chosen_vectors(num_vectors: int, tmp_path: Any):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 12, bias=False)

        def forward(self, x: Any) -> Any:
            return self.q(x)

    net, fields = Net(), {**FIELDS, "num_vectors": num_vectors}
    kernel = net.q.weight.detach().numpy().T.copy()
    model = peft.get_peft_model(net, peft.VBLoRAConfig(save_only_topk_weights=True, init_logits_std=2.0, **fields))
    with torch.no_grad():
        want = model.eval()(torch.from_numpy(X)).numpy()
    model.save_pretrained(tmp_path)
    adapter = jaxadapt.from_peft(jaxadapt.read(tmp_path), {"q": {"kernel": kernel}})
    merged = jaxadapt.merge({"q": {"kernel": kernel}}, adapter)["q"]["kernel"]
    np.testing.assert_allclose(X @ merged, want, rtol=1e-5, atol=1e-5)
    jaxadapt.save(adapter, tmp_path / "ours")
    theirs, ours = jaxadapt.read(tmp_path).tensors, jaxadapt.read(tmp_path / "ours").tensors
    assert {k: v.dtype for k, v in theirs.items()} == {k: v.dtype for k, v in ours.items()}


def test_sizes_and_choices():
    config = jaxadapt.VBLoRAConfig(**{**FIELDS, "vector_length": 5})
    with pytest.raises(ConfigError, match="vector_length=5 does not divide 8"):
        jaxadapt.init(BASE, config)
    with pytest.raises(ConfigError, match="topk: expected at most num_vectors"):
        jaxadapt.VBLoRAConfig(**{**FIELDS, "topk": 7})
    indices, weights = choose_vectors(jnp.array([[0.0, 2.0, 1.0]]), 2)
    np.testing.assert_array_equal(indices, [[1, 2]])
    np.testing.assert_allclose(weights, [[np.e / (1 + np.e), 1 / (1 + np.e)]], rtol=1e-6)
