"""openpi's LoRA: what its layers compute, written out with the equations of its source, and PEFT's tensors for it.

openpi itself needs packages that the tests do not install. `lora.Einsum` computes `einsum(eqn_a)`, then
`einsum(eqn_b)`: eqn_a has the rank's letter in place of the weight's last axis (in the weight and the output), and
eqn_b in place of its last but one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.export.conversion import TreeOptions, convert
from jaxadapt.models import LoraTree
from jaxadapt.models.foreign import recognize_dialect

L, D, F, N, K, H, R, ALPHA = 3, 10, 14, 4, 1, 6, 2, 8.0
P = "base_model.model.paligemma_with_expert.paligemma.model.language_model.layers."
ROOT = "PaliGemma.llm.layers."
SHAPES = {
    "attn.q_einsum.lora_a": (L, N, D, R), "attn.q_einsum.lora_b": (L, N, R, H),
    "attn.kv_einsum.lora_a": (L, 2, K, D, R), "attn.kv_einsum.lora_b": (L, 2, K, R, H),
    "attn.attn_vec_einsum.lora_a": (L, N, H, R), "attn.attn_vec_einsum.lora_b": (L, N, R, D),
    "mlp.gating_einsum_lora_a": (L, 2, D, R), "mlp.gating_einsum_lora_b": (L, 2, R, F),
    "mlp.linear_lora_a": (L, F, R), "mlp.linear_lora_b": (L, R, D),
    "attn.q_einsum_1.lora_a": (L, N, D + 1, R + 1), "attn.q_einsum_1.lora_b": (L, N, R + 1, H),
}  # fmt: skip
Arrays = dict[str, np.ndarray[Any, Any]]


def leaves(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {ROOT + path: rng.standard_normal(shape).astype("float32") for path, shape in SHAPES.items()}


def changes(tree: Arrays) -> Arrays:
    """{PyTorch module: what the layer adds to the output, as a matrix (out, in)}, by feeding the unit vectors."""
    x, out = {path.removeprefix(ROOT): np.asarray(value).astype(np.float64) for path, value in tree.items()}, Arrays()

    def run(eqn_a: str, eqn_b: str, a: np.ndarray, b: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        return np.einsum(eqn_b, np.einsum(eqn_a, inputs, a), b)

    for layer in range(L):
        eye, scale = np.eye(D)[None], ALPHA / R
        a, b = (x[f"attn.q_einsum.lora_{side}"][layer] for side in "ab")
        q = run("BTD,NDL->BTNL", "BTNL,NLH->BTNH", a, b, eye)[0]
        out[f"{layer}.self_attn.q_proj"] = scale * q.reshape(D, N * H).T
        a, b = (x[f"attn.kv_einsum.lora_{side}"][layer] for side in "ab")
        kv = run("BSD,2KDL->2BSKL".replace("2", "P"), "PBSKL,PKLH->PBSKH", a, b, eye)[:, 0]
        for name, value in zip("kv", kv, strict=True):
            out[f"{layer}.self_attn.{name}_proj"] = scale * value.reshape(D, K * H).T
        a, b = (x[f"attn.attn_vec_einsum.lora_{side}"][layer] for side in "ab")
        o = run("BTNH,NHL->BTL", "BTL,NLD->BTD", a, b, np.eye(N * H).reshape(1, N * H, N, H))[0]
        out[f"{layer}.self_attn.o_proj"] = scale * o.T
        a, b = (x[f"mlp.gating_einsum_lora_{side}"][layer] for side in "ab")
        for i, name in enumerate(("gate", "up")):
            out[f"{layer}.mlp.{name}_proj"] = (a[i] @ b[i]).T
        out[f"{layer}.mlp.down_proj"] = (x["mlp.linear_lora_a"][layer] @ x["mlp.linear_lora_b"][layer]).T
    return out


def peft_changes(tensors: jaxadapt.PeftTensors) -> Arrays:
    """{module: s·B·A} as PEFT computes it."""
    out: Arrays = {}
    for key in tensors.tensors:
        module, end, _ = key.partition(".lora_A.weight")
        if end:
            a, b = (np.asarray(tensors.tensors[f"{module}.lora_{s}.weight"], "float64") for s in "AB")
            name = module.removeprefix("base_model.model.")
            out[module.removeprefix(P)] = tensors.config.scale_of(name) * b @ a
    return out


def test_every_layer_computes_the_same_in_peft():
    tree = leaves()
    with pytest.warns(UserWarning, match="openpi:pi0"):
        tensors = jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA, on_shared="concat"), keymap="openpi:pi0")
    found = peft_changes(tensors)
    expert = [name for name in found if "gemma_expert" in name]
    assert len(expert) == L
    for module, change in changes(tree).items():
        np.testing.assert_allclose(found[module], change, rtol=1e-5, atol=1e-5, err_msg=module)
    assert len(found) == len(changes(tree)) + L
    assert tensors.tensors[f"{P}0.self_attn.q_proj.lora_A.weight"].shape == (N * R, D)
    assert tensors.tensors[f"{P}0.self_attn.o_proj.lora_A.weight"].shape == (R, N * H)


def test_heads_that_differ_ask(tmp_path: Path):
    with pytest.raises(jaxadapt.MismatchError, match='LoraTree.tree, on_shared="concat"'):
        jaxadapt.to_peft(LoraTree(leaves(), lora_alpha=ALPHA), keymap="openpi:pi0")
    with pytest.raises(jaxadapt.ConfigError, match="times √rank with rslora"):
        jaxadapt.to_peft(LoraTree(leaves(), on_shared="concat"), keymap="openpi:pi0")


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_a_pattern_gives_alpha_to_the_heads_and_not_to_the_feed_forward():
    """A pattern for modules that openpi scales is multiplied with their rank; one for others is refused."""

    module = f"{P}0.self_attn.q_proj".removeprefix("base_model.model.")

    def scale(patterns: dict[str, float]) -> float:
        config = jaxadapt.LoraConfig(lora_alpha=ALPHA, alpha_pattern=patterns)
        tree = LoraTree(leaves(), config=config, on_shared="concat")
        return jaxadapt.to_peft(tree, keymap="openpi:pi0").config.scale_of(module)

    assert (scale({}), scale({"q_proj": 3 * ALPHA})) == (ALPHA / R, 3 * ALPHA / R)
    says = (
        r"0\.mlp\.up_proj: lora_alpha 2 in the tree, 9 in the configuration .openpi defines it; leave it out of alpha_p"
    )
    with pytest.raises(jaxadapt.ConfigError, match=says):
        scale({"up_proj": 9.0})


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_there_and_back(tmp_path: Path):
    """The same bits, but for the output projection, of whose heads only the sum of the Bs matters."""
    tree = leaves()
    save_file(tree, tmp_path / "a.safetensors")
    convert(
        tmp_path / "a.safetensors",
        tmp_path / "peft",
        TreeOptions(from_keymap="openpi:pi0", lora_alpha=ALPHA, on_shared="concat"),
    )
    target = {path: np.zeros_like(x) for path, x in tree.items()}
    back = jaxadapt.load(tmp_path / "peft", LoraTree(target, lora_alpha=ALPHA, on_shared="concat"), keymap="openpi:pi0")
    for path, x in tree.items():
        if "attn_vec" in path and path.endswith("_b"):
            np.testing.assert_array_equal(back[path].sum(1), x.sum(1))
        else:
            np.testing.assert_array_equal(back[path], x, err_msg=path)
    sizes = {"h": H, "n": N, "k": K}
    with pytest.warns(UserWarning, match="rounded once"):
        done = convert(
            tmp_path / "peft",
            tmp_path / "b.safetensors",
            TreeOptions(to_keymap="openpi:pi0", sizes=sizes, on_shared="concat"),
        )
    again = load_file(tmp_path / "b.safetensors")
    # A tree without rank patterns: its rank is the largest of the ranks that the leaves need.
    assert {x.shape[-1] for path, x in again.items() if path.endswith("_a")} == {R + 1}
    assert done.lora_alpha is not None
    scale = done.lora_alpha / done.rank / (ALPHA / R)
    for module, change in changes(tree).items():
        module_change = changes({path: x for path, x in again.items() if "_1." not in path})[module]
        factor = 1 if "mlp" in module else scale
        np.testing.assert_allclose(factor * module_change, change, rtol=1e-5, atol=1e-5, err_msg=module)


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_a_file_of_pefts_fills_a_tree(tmp_path: Path):
    """A PEFT adapter of rank r needs no larger rank: each head gets the whole A."""
    rng, tensors = np.random.default_rng(3), Arrays()
    sizes = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
    for layer in range(L):
        for name, (out, inn) in sizes.items():
            module = f"{P}{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((R, inn)).astype("float32")
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((out, R)).astype("float32")
    config = jaxadapt.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(sizes))
    adapter = jaxadapt.PeftTensors(config, tensors)
    jaxadapt.write(adapter, tmp_path)
    target = {path: np.zeros_like(x) for path, x in leaves().items() if "_1." not in path}
    filled = jaxadapt.load(tmp_path, LoraTree(target, lora_alpha=ALPHA), keymap="openpi:pi0")
    found, expected = changes(filled), peft_changes(adapter)
    for module, change in expected.items():
        np.testing.assert_allclose(found[module], change, rtol=1e-5, atol=1e-5, err_msg=module)
    back = jaxadapt.to_peft(LoraTree(filled, lora_alpha=ALPHA), keymap="openpi:pi0")  # all heads have one A
    for key, x in tensors.items():
        np.testing.assert_array_equal(back.tensors[key], x)


def whole() -> Arrays:
    """The LoRA leaves among those of the base: both experts, norms and embedding."""
    sizes = {}
    for end, d in (("", D), ("_1", D + 1)):
        sizes |= {
            f"layers.attn.q_einsum{end}.w": (L, N, d, H), f"layers.attn.kv_einsum{end}.w": (L, 2, K, d, H),
            f"layers.attn.attn_vec_einsum{end}.w": (L, N, H, d), f"layers.mlp{end}.gating_einsum": (L, 2, d, F),
            f"layers.mlp{end}.linear": (L, F, d), f"layers.pre_attention_norm{end}.scale": (L, d),
            f"layers.pre_ffw_norm{end}.scale": (L, d), f"final_norm{end}.scale": (d,),
        }  # fmt: skip
    base = {f"PaliGemma.llm.{path}": np.zeros(shape, "float32") for path, shape in sizes.items()}
    return base | {"PaliGemma.llm.embedder.input_embedding": np.zeros((9, D), "float32")} | leaves()


def test_without_a_keymap_the_one_choice_is_named():
    with pytest.raises(jaxadapt.KeyMapError, match="pass keymap='openpi:pi0' to use it"):
        jaxadapt.to_peft(LoraTree(whole(), lora_alpha=ALPHA, on_shared="concat"))


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_the_paths_of_openpis_checkpoints_end_in_value(tmp_path: Path):
    keymap, options = "openpi:pi0", {"lora_alpha": ALPHA, "on_shared": "concat"}
    stored = {f"{path}.value": x for path, x in whole().items()}
    wanted = jaxadapt.to_peft(LoraTree(whole(), **options), keymap=keymap).tensors
    for tree in (stored, paths.unflatten(stored)):
        found = jaxadapt.to_peft(LoraTree(tree, **options), keymap=keymap).tensors
        assert found.keys() == wanted.keys()
        for key, x in wanted.items():
            np.testing.assert_array_equal(found[key], x)
    jaxadapt.save(LoraTree(stored, **options), tmp_path, keymap=keymap)
    zeros = {path: np.zeros_like(x) for path, x in stored.items()}
    back = jaxadapt.load(tmp_path, LoraTree(zeros, **options), keymap=keymap)
    np.testing.assert_array_equal(back[f"{ROOT}mlp.linear_lora_a.value"], stored[f"{ROOT}mlp.linear_lora_a.value"])


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_pi0_fast_has_the_names_of_the_one_expert():
    """As LeRobot's PI0FastPytorch: paligemma_with_expert.paligemma, without gemma_expert."""
    tree = {path: x for path, x in whole().items() if "_1." not in path}
    tensors = jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA, on_shared="concat"), keymap="openpi:pi0").tensors
    assert {key.partition(".layers.")[0] for key in tensors} == {P.removesuffix(".layers.")}


@pytest.mark.filterwarnings("ignore:.*not been verified")
def test_extract_takes_heads_that_differ():
    with pytest.raises(jaxadapt.MismatchError, match=r'LoraTree\(tree, on_shared="concat"\) instead'):
        jaxadapt.extract(LoraTree(whole(), lora_alpha=ALPHA), keymap="openpi:pi0")
    tree = LoraTree(whole(), lora_alpha=ALPHA, on_shared="concat")
    found, wanted = (f(tree, keymap="openpi:pi0") for f in (jaxadapt.extract, jaxadapt.to_peft))
    for key, x in jaxadapt.to_peft(found).tensors.items():
        np.testing.assert_array_equal(x, wanted.tensors[key])


def test_it_is_recognized_before_dialects_with_any_module():
    for names in (leaves(), [p for p in leaves() if "attn" in p], [p for p in leaves() if "mlp" in p]):
        found = recognize_dialect(list(names))
        assert found is not None
        assert found.name == "openpi"
