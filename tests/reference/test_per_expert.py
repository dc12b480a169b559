"""Files with a LoRA for each expert, as PEFT wrote them for transformers 4, into models that hold all in one array."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import plan, pytorch
from jaxadapt.keymaps import plan as pieces
from jaxadapt.keymaps.families import get_family
from jaxadapt.models import LoraTree
from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME, recorded
from tests.support import peft_harness as harness
from tests.support import small

pytestmark = pytest.mark.peft

R, ALPHA, EXPERTS = 2, 3, 4
QWEN = ("gate_proj", "up_proj", "down_proj")
# How transformers 4 called gate, up and down of an expert, and the block they are in.
CALLED = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2")), "qwen3_moe": ("mlp", QWEN), "deepseek_v3": ("mlp", QWEN)}
ROUTED = ("mixtral", "qwen3_moe")
FUSED = ("mixtral", "qwen3_moe", "deepseek_v3")
SPLIT = ("maxtext-mixtral", "maxtext-qwen3_moe-scan1", "tunix-qwen3_moe")
EVERY = (*FUSED, *SPLIT)


def kind_of(name: str) -> str:
    return next(kind for kind in CALLED if kind in BY_NAME[name].table)


@functools.cache
def base(name: str) -> dict[str, Any]:
    specimen = BY_NAME[name]
    shapes = recorded(name)["leaves"] if name.startswith("maxtext") else jax_side.side(specimen).shapes
    return paths.unflatten(specimen_arrays.base_leaves(specimen, shapes))


def sparse_layers(name: str) -> list[int]:
    state = torch_side.state(BY_NAME[name])
    return [i for i in range(3) if f"model.layers.{i}.mlp.experts.down_proj" in state]


def sides_of(name: str, equal: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{module, as transformers 4 called it: (A, B)}`."""
    rng = np.random.default_rng(0)
    state = torch_side.state(BY_NAME[name])
    block, (gate, up, down) = CALLED[kind_of(name)]

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype("float32")

    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for i in sparse_layers(name):
        layer = f"model.layers.{i}."
        wide, narrow = (state[f"{layer}mlp.experts.{p}"] for p in ("gate_up_proj", "down_proj"))
        for e in range(EXPERTS):
            one = f"{layer}{block}.experts.{e}."
            a = draw(R, wide.shape[2])
            out[one + gate] = a, draw(wide.shape[1] // 2, R)
            out[one + up] = a if equal else draw(R, wide.shape[2]), draw(wide.shape[1] // 2, R)
            out[one + down] = draw(R, narrow.shape[2]), draw(narrow.shape[1], R)
        if kind_of(name) in ROUTED:
            out[f"{layer}{block}.gate"] = draw(R, wide.shape[2]), draw(EXPERTS, R)
        o_proj = state[f"{layer}self_attn.o_proj.weight"]
        out[f"{layer}self_attn.o_proj"] = draw(R, o_proj.shape[1]), draw(o_proj.shape[0], R)
    return out


def config_of(name: str, **more: Any) -> jaxadapt.LoraConfig:
    modules = [*CALLED[kind_of(name)][1], *(["gate"] if kind_of(name) in ROUTED else []), "o_proj"]
    only = sparse_layers(name)
    layers = {"layers_to_transform": only} if len(only) < 3 else {}
    return jaxadapt.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=modules, **layers, **more)


def file_of(name: str, equal: bool = False, **more: Any) -> jaxadapt.PeftTensors:
    tensors = {}
    for module, (a, b) in sides_of(name, equal).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    return jaxadapt.PeftTensors(config_of(name, **more), tensors)


def expected(name: str, equal: bool) -> dict[str, np.ndarray]:
    """The merged weights of transformers 5, expert by expert."""
    out = {key: x.copy() for key, x in torch_side.state(BY_NAME[name]).items()}
    block, (gate, up, down) = CALLED[kind_of(name)]
    for module, (a, b) in sides_of(name, equal).items():
        delta = ALPHA / R * b @ a
        layer, _, last = module.partition(f".{block}.experts.")
        if not last:
            out[f"{module.replace(block, 'mlp')}.weight"] += delta
            continue
        e, _, which = last.partition(".")
        if which == down:
            out[f"{layer}.mlp.experts.down_proj"][int(e)] += delta
        else:
            half = out[f"{layer}.mlp.experts.gate_up_proj"][int(e)].reshape(2, *delta.shape)
            half[(gate, up).index(which)] += delta
    return out


def merged(name: str, adapter: jaxadapt.Adapter) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(x) for path, x in paths.flatten(jaxadapt.merge(base(name), adapter)).items()}
    made = plan.base_plan(get_family(BY_NAME[name].table), {path: x.shape for path, x in flat.items()})
    back = made.encode(flat)
    groups = pieces.group_by_file_key(made.keys).items()
    return {key: pieces.join_parts([back[part] for part in parts], parts, np) for key, parts in groups}


def close(found: Any, wanted: Any) -> None:
    for key, x in found.items():
        np.testing.assert_allclose(x, wanted[key], rtol=0, atol=5e-6, err_msg=key)


@pytest.mark.parametrize("equal", [True, False], ids=["one A", "two As"])
@pytest.mark.parametrize("name", EVERY)
def test_such_a_file_computes_what_each_expert_says(name, equal):
    on_shared = "concat" if name in FUSED and not equal else None
    adapter = jaxadapt.from_peft(
        file_of(name, equal), LoraTree(base(name), on_shared=on_shared), keymap=BY_NAME[name].table
    )
    close(merged(name, adapter), expected(name, equal))
    ranks = {x.shape for path, x in adapter.flat().items() if path.endswith(("gate_up_proj.lora_A", "wi_0.lora_A"))}
    assert all((2 * R if on_shared else R) in shape for shape in ranks)


@pytest.mark.parametrize("name", EVERY)
def test_it_is_saved_as_it_was(name, tmp_path):
    """By "/per-expert", which needs no larger rank; without it as PEFT writes such adapters now."""
    equal = name in FUSED
    before = file_of(name, equal)
    table = BY_NAME[name].table
    adapter = jaxadapt.from_peft(before, base(name), keymap=table)
    after = jaxadapt.to_peft(adapter, keymap=f"{table}/per-expert")
    assert set(after.tensors) == set(before.tensors)
    for key, x in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[key], x, err_msg=key)
    jaxadapt.write(after, tmp_path)
    again = jaxadapt.from_peft(jaxadapt.read(tmp_path), base(name), keymap=table)
    assert after.config.get("target_parameters") is None
    close({key: np.asarray(x) for key, x in again.flat().items()}, adapter.flat())
    new = jaxadapt.to_peft(LoraTree(adapter, on_shared="concat"))
    assert not any(".experts.0." in key for key in new.tensors)
    close(merged(name, jaxadapt.from_peft(new, base(name), keymap=table)), expected(name, equal))


@pytest.mark.parametrize("name", ROUTED)
def test_peft_makes_the_same_of_it(name, tmp_path):
    jaxadapt.write(file_of(name), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = harness.load(torch_side.base(name), tmp_path)
    theirs = {key: x.numpy() for key, x in loaded.model.merge_and_unload().state_dict().items()}
    close(theirs, expected(name, False))


@pytest.mark.parametrize("name", FUSED)
def test_two_as_are_refused_where_the_model_has_one(name):
    with pytest.raises(jaxadapt.MismatchError, match=r'(?s)one A for both.*differ.*on_shared="concat"'):
        jaxadapt.from_peft(file_of(name), base(name), keymap=BY_NAME[name].table)


def test_what_is_missing_or_differs_is_listed():
    held = file_of("mixtral", True)
    some = {k: x for k, x in held.tensors.items() if ".1.block_sparse_moe.experts.2.w3." not in k}
    with pytest.raises(jaxadapt.MismatchError, match=r"model\.layers\.1\.block_sparse_moe\.experts\.2\.w3: missing"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(held.config, some), base("mixtral"))
    config = held.config.replace(alpha_pattern={r"experts\.1\.w2": 5})
    with pytest.raises(jaxadapt.MismatchError, match=r"experts\.down_proj: its experts differ in rank, alpha"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(config, held.tensors), base("mixtral"))


def test_a_number_that_no_model_has_is_no_reason_to_count_so_far():
    held, last = file_of("mixtral", True), f"experts.{10**12}."
    keys = {k: k.replace("experts.3.", last) for k in held.tensors}
    far = jaxadapt.PeftTensors(held.config, {keys[k]: x for k, x in held.tensors.items()})
    with pytest.raises(jaxadapt.MismatchError, match=r"experts\.3\.w1: missing"):
        jaxadapt.from_peft(far, base("mixtral"))
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w{n}.weight" for e in (0, 10**12) for n in (1, 2, 3)]
    with pytest.raises(jaxadapt.MismatchError, match=r"gate_up_proj: part 0 of expert 1\b"):
        pytorch.expert_rows(get_family("mixtral"), names, "a folder")


def test_two_spellings_of_one_expert_are_not_one_and_the_other_is_not_lost():
    held = file_of("mixtral", True)
    twice = {k.replace("experts.3.", "experts.03."): x for k, x in held.tensors.items()} | dict(held.tensors)
    both = jaxadapt.PeftTensors(held.config, twice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "w1" of the configuration matches no module
        with pytest.raises(jaxadapt.MismatchError, match=r"unexpected(.|\n)*experts\.03\.w1\.lora_A"):
            jaxadapt.from_peft(both, base("mixtral"))


def test_patterns_and_dropout():
    held = file_of("maxtext-mixtral", lora_dropout=0.05, use_rslora=True, alpha_pattern={"w2": 7, "o_proj": 5})
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.05 becomes 0"):
        adapter = jaxadapt.from_peft(held, base("maxtext-mixtral"), keymap="maxtext:mixtral")
    config = adapter.config
    assert (config.get("r"), config.get("lora_dropout"), config.get("target_modules")) == (R, 0.0, ("o_proj",))
    assert config.get("alpha_pattern") == {"down_proj": 7, "o_proj": 5}
    assert set(config.get("target_parameters")) == {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}


def test_a_pattern_that_names_the_experts_too():
    held = file_of("maxtext-mixtral")
    config = held.config.replace(target_modules=r".*\.(w[123]|gate|o_proj)")
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(config, held.tensors), base("maxtext-mixtral"))
    assert adapter.config.get("target_modules") == tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(3))
    close(merged("maxtext-mixtral", adapter), expected("maxtext-mixtral", False))


def test_rslora_where_the_rank_is_doubled():
    """The scale is α/√r, so that twice the rank needs √2 times the alpha."""
    held = file_of("mixtral")
    config = held.config.replace(use_rslora=True, lora_alpha=ALPHA / R**0.5)
    held = jaxadapt.PeftTensors(config, held.tensors)
    adapter = jaxadapt.from_peft(held, LoraTree(base("mixtral"), on_shared="concat"), keymap="mixtral")
    close(merged("mixtral", adapter), expected("mixtral", False))


def test_peft_changes_the_scale_of_rslora(tmp_path):
    """PEFT doubles rank and alpha of gate and up, which keeps α/r, and multiplies α/√r by √2."""
    held = file_of("mixtral")
    config = held.config.replace(use_rslora=True, lora_alpha=ALPHA / R**0.5)
    jaxadapt.write(jaxadapt.PeftTensors(config, held.tensors), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = harness.load(torch_side.base("mixtral"), tmp_path)
    wanted, before = expected("mixtral", False), torch_side.state(BY_NAME["mixtral"])
    wrong = {
        key: x + (2**0.5 - 1) * (x - before[key]) if key.endswith("experts.gate_up_proj") else x
        for key, x in wanted.items()
    }
    close({key: x.numpy() for key, x in loaded.model.merge_and_unload().state_dict().items()}, wrong)


def test_layers_to_transform_narrows_no_expert(tmp_path):
    """In PEFT it is of target_modules only; in a list of the experts' modules it would leave out the other layers."""
    config = jaxadapt.LoraConfig(
        r=R, target_modules=["o_proj"], layers_to_transform=[1], target_parameters=["experts.down_proj"]
    )
    adapter = small.noisy(jaxadapt.init(base("mixtral"), config, key=jax.random.key(0), keymap="mixtral"))
    file = jaxadapt.to_peft(adapter, keymap="mixtral/per-expert")
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.tensors}
    assert len(modules) == 1 + len(sparse_layers("mixtral")) * EXPERTS
    jaxadapt.write(file, tmp_path)
    assert not [found for found in jaxadapt.verify(tmp_path) if found.severity == "error"]  # all are targets
    back = jaxadapt.from_peft(file, base("mixtral"), keymap="mixtral")
    close({key: np.asarray(x) for key, x in back.flat().items()}, adapter.flat())
