"""What goes wrong silently in other libraries, and the test that shows it does not here.

`FAULTS` names one or more tests for each, and the tests below are those that had no better place. (What was run of the
libraries: qwix 0.1.8, google-tunix 0.1.7, maxtext 0.2.5, gemma 4.0.1, levanter 1.1, easydel 0.3.0, lorax 0.3.1,
SkyRL-tx 0.3.)
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt.keymaps import families
from jaxadapt.models import LoraTree
from tests.keymaps.families.specimens import values
from tests.models.foreign.cases import nest

TESTS = Path(__file__).resolve().parents[1]
REAL, DIALECTS, OTHERS = (
    "models/foreign/test_real.py",
    "models/foreign/test_dialects.py",
    "models/foreign/test_others.py",
)
TRAINED, PEFT = "models/foreign/test_trained.py", "reference/test_interchange.py"
HERE = "system/test_faults.py"

FAULTS: dict[str, tuple[str, ...]] = {
    # ---- Qwix and Tunix
    "Qwix: alpha is stored nowhere": (f"{DIALECTS}::test_the_scale", f"{TRAINED}::test_peft_opens_what_they_trained"),
    "Qwix: dot_general flattens heads, einsum keeps them": (
        f"{DIALECTS}::test_out",
        f"{REAL}::test_peft_computes_what_they_compute",
    ),
    "Qwix: stacked layers on the variable axis, (D,L,r)": (f"{TRAINED}::test_peft_opens_what_they_trained",),
    "Qwix: a plain nnx.scan fails": ("models/test_nnx_registry.py::test_equals_the_effective_weight",),
    "Qwix: Linen's nn.Einsum raises": ("models/test_linen_registry.py::test_computes_what_the_merged_weights_compute",),
    "Qwix: experts share one B": (f"{DIALECTS}::test_out", f"{DIALECTS}::TestShared.test_refused"),
    "Qwix: ragged_dot makes an A of (E·D, r)": (
        f"{DIALECTS}::test_ragged_dot_is_refused",
        "reference/test_experts.py::test_a_layer_of_experts_computes_what_its_merged_weights_do",
    ),
    "Qwix: no LoRA on embeddings": (
        "reference/test_lora_matrix.py::test_pefts_file_computes_here_what_it_computes_there",
    ),
    "Qwix: swaps process-wide functions": (f"{HERE}::test_no_function_of_anybodys_is_replaced",),
    "Tunix, gemma: k and v share one A": (
        f"{DIALECTS}::TestShared.test_refused",
        f"{REAL}::test_they_compute_what_peft_computes",
    ),
    "Tunix: exports merged weights only, deleting the folder first": (
        "persistence/test_store.py::test_the_card_is_written_once_and_other_files_stay",
        "export/test_base_weights.py::test_a_set_of_files_is_replaced_as_a_whole",
    ),
    "Tunix: the map for sglang scrambles the heads of o_proj": (f"{REAL}::test_peft_computes_what_they_compute",),
    "Tunix: wrong merges (PR 744)": ("export/test_base_weights.py::test_an_adapter_is_merged_on_the_way",),
    "Tunix: rope_theta is ignored": ("keymaps/families/test_proof.py::test_a_peft_adapter_gives_pefts_logits",),
    # ---- MaxText
    "MaxText: RoPE's interleaving and 1/√h are put in, never taken out": (
        f"{REAL}::test_peft_computes_what_they_compute",
    ),
    "MaxText: takes [:,0,:] of three axes, dropping heads": (
        f"{REAL}::test_peft_computes_what_they_compute",
        f"{DIALECTS}::test_out",
    ),
    "MaxText: guesses the layers' axis from sizes": (
        "keymaps/test_keymap.py::test_a_model_as_wide_as_it_is_deep_does_not_tell_the_stacked_axis",
        f"{HERE}::test_as_many_layers_as_dimensions",
    ),
    "MaxText: drops DoRA's magnitudes": (
        f"{DIALECTS}::test_a_leaf_nobody_claims_is_listed",
        f"{HERE}::test_what_such_a_tree_cannot_hold_is_refused",
        "reference/test_lora_matrix.py::test_pefts_file_computes_here_what_it_computes_there",
    ),
    "MaxText: does not read adapter_config.json": (f"{DIALECTS}::test_another_scale_in_the_file",),
    "MaxText: ignores use_rslora and patterns": (f"{HERE}::test_rslora_and_patterns_into_a_tree_that_knows_neither",),
    "MaxText: saves bfloat16": (
        f"{DIALECTS}::test_dtypes_are_kept_or_refused",
        "persistence/test_store.py::test_dtypes_are_kept",
    ),
    "MaxText: r and alpha are told once more at conversion (PR 3970)": (
        "models/test_nnx_training.py::test_the_configuration_survives",
    ),
    "MaxText: missing weights become zeros (PR 4341)": (
        "keymaps/test_plan.py::test_check_lists_missing_unexpected_and_misshaped_together",
        "export/test_base_weights.py::test_everything_that_does_not_fit_stands_in_one_error",
    ),
    # ---- the others
    "Levanter: a prefix that PEFT loads as nothing": (
        "models/foreign/test_nodes.py::test_levanter",
        f"{PEFT}::test_peft_loads_what_we_save",
    ),
    "Levanter, SkyRL-tx: no target_modules": (
        f"{DIALECTS}::test_target_modules_name_what_is_adapted_and_nothing_else",
        f"{OTHERS}::test_peft_computes_what_they_compute",
    ),
    "Levanter: dropout is always written as 0": (f"{HERE}::test_the_dropout_that_was_trained_with_is_in_the_file",),
    "gemma: no alpha, so it is the rank": (
        f"{DIALECTS}::test_the_scale",
        f"{REAL}::test_peft_opens_what_gemma_trained",
    ),
    "gemma: split_params leaves empty mappings": (f"{HERE}::test_empty_mappings_are_nothing",),
    "gemma: no way out to safetensors (gemma#254)": (f"{REAL}::test_peft_opens_what_gemma_trained",),
    "EasyDeL: no alpha, the base under base_module": (f"{OTHERS}::test_peft_computes_what_they_compute",),
    "EasyDeL: adapters sharded unlike their base (234)": (
        "adapters/test_sharding.py::test_adapters_follow_concrete_arrays",
    ),
    "EasyDeL: several hosts save wrongly (259)": (
        "persistence/test_processes.py::test_two_processes_write_the_file_of_one",
    ),
    "lorax: of a Flax kernel b is the inputs' side": ("models/foreign/test_nodes.py::test_lorax",),
    "openpi: a converter drops LoRA silently (958)": (f"{DIALECTS}::test_a_leaf_nobody_claims_is_listed",),
    "marin: a merged model at every save (5715)": (
        "system/test_invariants.py::test_invariant_4_only_adapter_leaves_are_trained_and_saved",
    ),
    "SkyRL, vLLM: layouts of experts": (
        "reference/test_experts.py::test_pefts_file_merges_to_pefts_weights_and_is_saved_as_it_was",
    ),
    # ---- Flax and Orbax
    "nnx.LoRA drops keyword arguments (flax#5412)": (f"{HERE}::test_keyword_arguments_reach_the_layer",),
    "nnx.LoRA: none for LinearGeneral (flax#4718)": ("models/test_nnx_registry.py::test_equals_the_effective_weight",),
    "Linen: another collection fails inside nn.scan": (
        "models/test_linen_registry.py::test_computes_what_the_merged_weights_compute",
    ),
    "Orbax: numbers become text, restores are partial (5030, 2972)": (
        "training/test_checkpoint.py::test_everything_that_does_not_fit_is_named_and_nothing_changes",
        "models/test_linen_config.py::test_orbax",
    ),
}


@functools.cache
def names(file: str) -> set[str]:
    """The tests of a file; those of a class with its name in front."""
    found: set[str] = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_that_is_named_is_there(fault: str):
    check(FAULTS[fault])


def check(tests: tuple[str, ...]) -> None:
    for test in tests:
        file, _, name = test.partition("::")
        assert name in names(file), test


# ---- those that had no better place ----------------------------------------------------------------------


def test_no_function_of_anybodys_is_replaced():
    """Attaching and running an adapter leaves every function and class of JAX and Flax as it was."""

    def held() -> dict[tuple[int, str], int]:
        spaces = (
            jax.lax,
            jnp,
            jax.nn,
            nn,
            nnx,
            nn.Dense,
            nn.Module,
            nnx.Linear,
            nnx.Module,
            flax.core,
            flax.linen.linear,
        )
        return {(id(space), name): id(value) for space in spaces for name, value in vars(space).items()}

    class Net(nnx.Module):
        def __init__(self):
            self.q = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
            self.e = nnx.Einsum("bi,io->bo", (6, 3), rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.e(self.q(x))

    before = held()
    model = jaxadapt.adapt(Net(), jaxadapt.LoraConfig(r=2, target_modules=["q", "e"]), rngs=nnx.Rngs(1))
    seen: list[bool] = []

    def run(model: Any, x: Any) -> Any:
        seen.append(held() == before)  # while it is traced, too
        return model(x).sum()

    nnx.jit(nnx.grad(run))(model, jnp.ones((2, 4)))
    jaxadapt.detach(model)
    assert seen == [True] * len(seen)
    assert seen
    assert held() == before


def test_as_many_layers_as_dimensions(tmp_path: Path):
    """Every axis has five entries: what the table says is followed, whichever axis the layers lie on."""
    size, config = 5, jaxadapt.LoraConfig(r=2, target_modules=["up_proj"])
    files = []
    for axis in (0, 1):
        table = families.get_family(f"maxtext:qwen3/scan{axis}")
        base = {"decoder": {"layers": {"mlp": {"wi_1": {"kernel": np.zeros((size,) * 3, "float32")}}}}}
        keys = [f"base_model.model.model.layers.{l}.mlp.up_proj.lora_{x}.weight" for l in range(size) for x in "AB"]
        tensors = {key: values(key, (2, size) if "_A" in key else (size, 2)) for key in keys}
        jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
        variables = jaxadapt.load(tmp_path / "in", {"params": base}, keymap=table)
        merged = jaxadapt.merge(base, jaxadapt.extract(variables))["decoder"]["layers"]["mlp"]["wi_1"]["kernel"]
        for l in range(size):
            a, b = (tensors[key] for key in keys[2 * l : 2 * l + 2])
            np.testing.assert_allclose(
                np.take(merged, l, axis), config.lora_alpha / 2 * (b @ a).T, rtol=1e-6, atol=1e-6
            )
        jaxadapt.save(variables, tmp_path / f"out{axis}")
        files.append((tmp_path / f"out{axis}" / "adapter_model.safetensors").read_bytes())
        found = jaxadapt.read(tmp_path / f"out{axis}").tensors
        assert all(np.array_equal(found[key], x) for key, x in tensors.items())
    assert files[0] == files[1]


def qwix(rank: int, *modules: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name in modules:
        leaves |= {f"{name}.kernel": np.ones((10, 14), "float32")}
        leaves |= {f"{name}.kernel_lora_{x}": np.ones(s, "float32") for x, s in (("a", (10, rank)), ("b", (rank, 14)))}
    return nest(leaves)


PLAIN = jaxadapt.KeyMap("plain", (jaxadapt.Weight("{path}.kernel", "m.{path}.weight", "i o -> o i"),))


def written(config: jaxadapt.LoraConfig, ranks: dict[str, int], folder: Path) -> dict[str, np.ndarray]:
    """PEFT's file of this configuration; and W's change by module, (out, in), each by its own rank and alpha."""
    tensors, changes = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name, r in ranks.items():
        key = f"base_model.model.m.{name}.lora_{{}}.weight"
        a, b = values(key.format("A"), (r, 10)), values(key.format("B"), (14, r))
        tensors |= {key.format("A"): a, key.format("B"): b}
        alpha = (config.alpha_pattern or {}).get(name, config.lora_alpha)
        changes[name] = (alpha / (r**0.5 if config.use_rslora else r)) * b @ a
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder)
    return changes


def test_rslora_and_patterns_into_a_tree_that_knows_neither(tmp_path: Path):
    """Scale and rank of each module are worked into what the tree holds, which has one rank and one alpha."""
    config = jaxadapt.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["up", "down", "q"],
        rank_pattern={"down": 2},
        alpha_pattern={"q": 3},
    )
    changes = written(config, {"up": 4, "down": 2, "q": 4}, tmp_path)
    with pytest.warns(UserWarning, match="rounded once"):
        tree = jaxadapt.load(tmp_path, LoraTree(qwix(4, "up", "down", "q"), lora_alpha=10), keymap=PLAIN)
    for name, change in changes.items():
        found = tree[name]["kernel_lora_a"] @ tree[name]["kernel_lora_b"] * (10 / 4)
        np.testing.assert_allclose(found.T, change, rtol=1e-5, atol=1e-6)


def test_what_such_a_tree_cannot_hold_is_refused(tmp_path: Path):
    """DoRA's magnitudes have no place in it, and nothing is left out silently."""
    config = jaxadapt.LoraConfig(r=2, use_dora=True, target_modules=["up"])
    base = {"up": {"kernel": jnp.ones((10, 14))}}
    jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0), keymap=PLAIN), tmp_path)
    with pytest.raises(jaxadapt.AdapterError, match="use_dora|magnitude"):
        jaxadapt.load(tmp_path, LoraTree(qwix(2, "up"), lora_alpha=10), keymap=PLAIN)


def test_the_dropout_that_was_trained_with_is_in_the_file(tmp_path: Path):
    told = jaxadapt.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.25, target_modules=["up"])
    jaxadapt.save(jaxadapt.models.LoraTree(qwix(2, "up"), config=told), tmp_path / "theirs", keymap=PLAIN)
    jaxadapt.save(jaxadapt.init(qwix(2, "up"), told, key=jax.random.key(0), keymap=PLAIN), tmp_path / "ours")
    for name in ("theirs", "ours"):
        assert jaxadapt.read_config(tmp_path / name).lora_dropout == 0.25


def test_empty_mappings_are_nothing(tmp_path: Path):
    """gemma's `split_params` leaves them where the other half's leaves were."""
    table = jaxadapt.KeyMap("g", (jaxadapt.Weight("{path}.w", "m.{path}.weight", "n d h -> (n h) d"),))
    lora = {"a": np.ones((4, 2), "float32"), "b": np.ones((2, 3, 5), "float32")}
    whole = {"q": {"_LoRAEinsum_0": {"lora": lora}}}
    stubs = {"q": {"_LoRAEinsum_0": {"lora": lora}, "other": {}}, "norm": {}, "mlp": {"up": {}}}
    jaxadapt.save(whole, tmp_path / "whole", keymap=table)
    jaxadapt.save(stubs, tmp_path / "stubs", keymap=table)
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stubs"))
    assert a == b
    back = jaxadapt.load(tmp_path / "whole", stubs, keymap=table)
    assert jax.tree.structure(back) == jax.tree.structure(stubs)


def test_keyword_arguments_reach_the_layer():
    class Shifted(nnx.Linear):
        def __call__(self, x: Any, *, by: float = 0.0) -> Any:
            return super().__call__(x) + by

    class Net(nnx.Module):
        def __init__(self):
            self.q = Shifted(4, 6, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.q(x, by=2.0)

    x, model = jnp.ones((3, 4)), Net()
    plain = model(x)
    jaxadapt.adapt(model, jaxadapt.LoraConfig(r=2, target_modules=["q"]), example=(x,), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), plain)
