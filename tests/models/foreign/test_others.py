"""SkyRL-tx and EasyDeL, as recorded from them: PEFT computes what they do, and they what PEFT does; and slots."""

from __future__ import annotations

import importlib.util
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.models import LoraTree
from tests.keymaps.families.specimens import IDS, PROJ
from tests.models.foreign import others
from tests.models.foreign.cases import flat, nest

if importlib.util.find_spec("peft") is not None:
    from tests.keymaps.families import torch_side
    from tests.support import peft_harness as harness

CLOSE = {"rtol": 0, "atol": 1e-4}  # as in tests/keymaps/families
each = pytest.mark.parametrize("name", others.TORCH)


def leaves_of(name: str) -> dict[str, Any]:
    found = others.recorded(name)
    unwrapped = {p.replace(".base_module", ""): shape for p, shape in found["base"].items()}
    base = others.base(unwrapped)
    whole = {path: base[path.replace(".base_module", "")] for path in found["base"]}
    return whole | {path: others.value(path, shape) for path, shape in found["lora"].items()}


def logits_of(name: str, which: str) -> np.ndarray:
    return np.array(others.recorded(name)[which], np.float32).reshape(*IDS.shape, -1)


@pytest.mark.peft
@each
def test_peft_computes_what_they_compute(name: str, tmp_path):
    jaxadapt.save(others.tree_of(name, nest(leaves_of(name))), tmp_path, keymap="llama")
    config = jaxadapt.read_config(tmp_path)
    assert (config.r, config.lora_alpha) == ((3, 5) if "skyrl" in name else (3, 3))
    assert set(config.target_modules) - {"embed_tokens"} == set(PROJ)  # SkyRL-tx adapts that too
    loaded = harness.load(torch_side.base(others.TORCH[name]), tmp_path)
    # (PEFT says that SkyRL-tx' embeddings are tied, and only they adapted, not the head: so it is there too.)
    assert not [text for text in loaded.complaints if "tied" not in text]
    found = harness.logits(loaded.model, IDS)
    np.testing.assert_allclose(found, logits_of(name, "logits"), **CLOSE)
    assert np.abs(found - torch_side.logits(others.TORCH[name], adapter=False)).max() > 0.1


def test_easydels_own_table_is_recognized_in_its_tree(tmp_path):
    """Below what wraps its layers; and the adapter has the names that the test above gives it."""
    tree = others.tree_of("easydel-llama", nest(leaves_of("easydel-llama")))
    assert jaxadapt.extract(tree).keymap.name == "easydel:llama"
    own, told = jaxadapt.to_peft(tree), jaxadapt.to_peft(tree, keymap="llama")
    assert set(own.tensors) == set(told.tensors)
    assert own.config == told.config


@pytest.mark.peft
@each
def test_they_compute_what_peft_computes(name: str, tmp_path):
    """What was loaded when they ran is what is loaded now, bit for bit."""
    expected = torch_side.logits(others.TORCH[name], adapter=True)
    np.testing.assert_allclose(logits_of(name, "loaded"), expected, **CLOSE)
    found = others.recorded(name)
    others.write_peft(name, {p.replace(".base_module", ""): shape for p, shape in found["base"].items()}, tmp_path)
    tree = nest(leaves_of(name))
    if "skyrl" in name:
        back = jaxadapt.load(tmp_path, LoraTree(tree, slot=others.INTO))
    else:
        with pytest.warns(UserWarning, match="rounded once"):  # EasyDeL does not scale: 5/3 goes into B
            back = jaxadapt.load(tmp_path, tree, keymap="llama")
    crcs = {p: zlib.crc32(np.ascontiguousarray(x).tobytes()) for p, x in flat(back).items() if p in found["crc"]}
    assert crcs == found["crc"]


# ---- slots -----------------------------------------------------------------------------------------------


def skyrl(slots: int = 3, room: int = 8, rank: int = 3, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A tree of two modules, of which slot 1 has a rank, and slot 2 nothing."""
    rng = np.random.RandomState(seed)
    leaves: dict[str, Any] = {}
    for name, (inputs, out) in {"q_proj": (4, 6), "o_proj": (6, 4)}.items():
        a, b = rng.standard_normal((slots, inputs, room)), rng.standard_normal((slots, room, out))
        for slot, used in ((1, rank), (2, 0)):
            a[slot, :, used:], b[slot, used:] = 0, 0
        leaves |= {
            f"{name}.kernel": np.ones((inputs, out), "f4"), f"{name}.lora_A": a.astype("f4"),
            f"{name}.lora_B": b.astype("f4"), f"{name}.lora_ranks": np.array([room, rank, 0], np.int32),
            f"{name}.lora_scaling": np.array([1, 5 / rank, 0], "f4"),
        }  # fmt: skip
    return nest(leaves | more)


def moved(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flat(tree).items()}


def test_one_slot_out_and_into_another(tmp_path):
    """The rank in use and the scale go along; no other slot, and nothing of the base, changes by a bit."""
    tree = skyrl()
    jaxadapt.save(LoraTree(tree, slot=1), tmp_path)
    found = jaxadapt.read(tmp_path)
    assert (found.config.r, found.config.lora_alpha) == (3, 5)
    np.testing.assert_array_equal(
        found.tensors["base_model.model.q_proj.lora_A.weight"], tree["q_proj"]["lora_A"][1, :, :3].T
    )
    back = moved(jaxadapt.load(tmp_path, LoraTree(skyrl(seed=1), slot=2)))
    for path, x in moved(skyrl(seed=1)).items():
        if "lora_" not in path:
            np.testing.assert_array_equal(back[path], x)
            continue
        np.testing.assert_array_equal(back[path][:2], x[:2])
        np.testing.assert_array_equal(back[path][2], moved(tree)[path][1], err_msg=path)
        assert back[path].dtype == x.dtype
    again = jaxadapt.to_peft(LoraTree(nest(back), slot=2))
    assert again.config == jaxadapt.to_peft(LoraTree(tree, slot=1)).config
    for key, x in again.tensors.items():
        np.testing.assert_array_equal(x, found.tensors[key])


def test_a_module_the_file_does_not_adapt_gets_rank_0(tmp_path):
    jaxadapt.save(LoraTree(skyrl(), slot=1), tmp_path)
    whole = jaxadapt.read(tmp_path)
    some = {key: x for key, x in whole.tensors.items() if "q_proj" in key}
    jaxadapt.write(jaxadapt.PeftTensors(whole.config.replace(target_modules=["q_proj"]), some), tmp_path / "q")
    back = jaxadapt.load(tmp_path / "q", LoraTree(skyrl(), slot=0))
    assert (back["o_proj"]["lora_ranks"][0], back["o_proj"]["lora_scaling"][0]) == (0, 0)
    assert not back["o_proj"]["lora_A"][0].any()
    assert not back["o_proj"]["lora_B"][0].any()
    (key,) = {key.split(".")[2] for key in jaxadapt.to_peft(LoraTree(back, slot=0)).tensors}
    assert key == "q_proj"


def test_a_model_is_filled_in_place(tmp_path):
    """An `nnx.Module`: the ranks and scales are variables that are no parameters."""

    class Linear(nnx.Module):
        def __init__(self, leaves: dict[str, Any]):
            for name in ("kernel", "lora_A", "lora_B"):
                setattr(self, name, nnx.Param(jnp.asarray(leaves[name])))
            for name in ("lora_ranks", "lora_scaling"):
                setattr(self, name, nnx.Variable(jnp.asarray(leaves[name])))

    class Net(nnx.Module):
        def __init__(self, leaves: dict[str, Any]):
            self.q_proj, self.o_proj = Linear(leaves["q_proj"]), Linear(leaves["o_proj"])

    jaxadapt.save(LoraTree(skyrl(), slot=1), tmp_path)
    model = Net(skyrl())
    adapter = jaxadapt.extract(LoraTree(model, slot=1))
    assert jaxadapt.load(tmp_path, LoraTree(model, slot=2)) is model
    other = Net(skyrl())
    assert jaxadapt.inject(LoraTree(other, slot=2), adapter) is other
    for one in (model, other):
        assert int(one.q_proj.lora_ranks[2]) == 3
        np.testing.assert_array_equal(one.q_proj.lora_B[2], one.q_proj.lora_B[1])
        np.testing.assert_array_equal(one.q_proj.lora_scaling[2], one.q_proj.lora_scaling[1])


def test_layers_may_be_stacked_before_the_slots():
    """As later versions do; the ranks say on which axis the slots are."""
    one = moved(skyrl())
    stacked = nest({f"layers.{path}": np.stack([x, x + ("lora_A" in path and x != 0)]) for path, x in one.items()})
    table = jaxadapt.KeyMap("mine", (jaxadapt.Weight("layers.{path}.kernel", "{l}.{path}.weight", "{l} i o -> o i"),))
    tensors = jaxadapt.to_peft(LoraTree(stacked, slot=1), keymap=table).tensors
    key = "base_model.model.{}.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[key.format(1)], tensors[key.format(0)] + 1)
    np.testing.assert_array_equal(tensors[key.format(0)], one["q_proj.lora_A"][1, :, :3].T)


def test_experts_and_embeddings():
    line = jaxadapt.Weight("mlp.experts.up_proj.weight", "mlp.experts.{e}.up_proj.weight", "{e} d f -> f d")
    embed = jaxadapt.Weight("embed_tokens.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding")
    rng = np.random.RandomState(0)
    at = "mlp.experts.up_proj."
    leaves = {
        f"{at}weight": np.zeros((5, 4, 6), "f4"),
        f"{at}lora_A": rng.standard_normal((2, 5, 4, 3)).astype("f4"),
        f"{at}lora_B": rng.standard_normal((2, 5, 3, 6)).astype("f4"),
        "embed_tokens.embedding": np.zeros((9, 4), "f4"),
        "embed_tokens.lora_A": rng.standard_normal((2, 9, 3)).astype("f4"),
        "embed_tokens.lora_B": rng.standard_normal((2, 3, 4)).astype("f4"),
    }
    for module in (at, "embed_tokens."):
        leaves |= {f"{module}lora_ranks": np.array([3, 3]), f"{module}lora_scaling": np.ones(2, "f4")}
    tree = LoraTree(nest(leaves), slot=1)
    tensors = jaxadapt.to_peft(tree, keymap=jaxadapt.KeyMap("mine", (line, embed))).tensors
    for e in range(5):
        delta = (
            tensors[f"base_model.model.mlp.experts.{e}.up_proj.lora_B.weight"]
            @ (tensors[f"base_model.model.mlp.experts.{e}.up_proj.lora_A.weight"])
        )
        expected = leaves[f"{at}lora_A"][1, e] @ leaves[f"{at}lora_B"][1, e]
        np.testing.assert_allclose(delta, expected.T, rtol=1e-6, atol=1e-6)  # float32, another order of the sum
    found = tensors["base_model.model.embed_tokens.lora_embedding_A"]
    np.testing.assert_array_equal(found, leaves["embed_tokens.lora_A"][1].T)


def test_what_cannot_be_is_refused(tmp_path):
    tree = skyrl()
    with pytest.raises(jaxadapt.AttachError, match=r"holds several. Pass jaxadapt.models.LoraTree\(tree, slot=0\)"):
        jaxadapt.save(tree, tmp_path)
    with pytest.raises(jaxadapt.MismatchError, match="slot 2 .*is empty"):
        jaxadapt.to_peft(LoraTree(tree, slot=2))
    with pytest.raises(jaxadapt.MismatchError, match="expected a slot from 0 to 2, found 3"):
        jaxadapt.to_peft(LoraTree(tree, slot=3))
    with pytest.raises(jaxadapt.MismatchError, match="found -1"):
        jaxadapt.to_peft(LoraTree(tree, slot=-1))
    with pytest.raises(jaxadapt.AttachError, match="found no LoRA parameters"):
        jaxadapt.to_peft(LoraTree({"q": {"kernel": np.ones((2, 2))}}, slot=0))
    with pytest.raises(jaxadapt.ConfigError, match="SkyRL-tx stores its alpha; leave it out"):
        jaxadapt.to_peft(LoraTree(tree, slot=1, lora_alpha=3))
    stale = moved(skyrl())
    stale["q_proj.lora_A"][1, 0, 5], stale["q_proj.lora_B"][1, 5, 0] = 1, 1
    with pytest.raises(jaxadapt.MismatchError, match="expected zeros beyond the rank 3"):
        jaxadapt.to_peft(LoraTree(nest(stale), slot=1))
    del stale["q_proj.lora_ranks"]
    with pytest.raises(jaxadapt.MismatchError, match="q_proj.lora_ranks: missing"):
        jaxadapt.to_peft(LoraTree(nest(stale), slot=0))
    jaxadapt.save(LoraTree(tree, slot=0), tmp_path)
    with pytest.raises(jaxadapt.MismatchError, match="rank is too small"):
        jaxadapt.load(tmp_path, LoraTree(skyrl(room=4), slot=1))
    with pytest.raises(jaxadapt.MismatchError, match="expected a concrete array"):
        jax.jit(lambda t: dict(jaxadapt.to_peft(LoraTree(t, slot=1)).tensors))(jax.tree.map(jnp.asarray, tree))


def test_a_scale_that_the_tree_cannot_hold(tmp_path):
    """bfloat16 has no 5/3: the nearest there is, and what is left goes into B, with a warning."""
    tensors = jaxadapt.to_peft(LoraTree(skyrl(), slot=1))
    jaxadapt.write(jaxadapt.PeftTensors(tensors.config.replace(lora_alpha=5), tensors.tensors), tmp_path)
    half = {p: jnp.asarray(x, "bfloat16") if "scaling" in p else x for p, x in flat(skyrl()).items()}
    with pytest.warns(UserWarning, match="rounded once"):
        back = jaxadapt.load(tmp_path, LoraTree(nest(half), slot=0))
    scale = float(back["q_proj"]["lora_scaling"][0])
    found = scale * back["q_proj"]["lora_B"][0, :3].astype("f8")
    # B is float32
    np.testing.assert_allclose(found, 5 / 3 * skyrl()["q_proj"]["lora_B"][1, :3].astype("f8"), rtol=1e-7)
    assert scale == float(jnp.bfloat16(5 / 3))
    assert jaxadapt.to_peft(LoraTree(back, slot=0)).config.lora_alpha == 3 * scale
