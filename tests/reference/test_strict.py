"""Files that lack tensors, or have some too many: `strict=False` takes what fits, as PEFT does with any file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from tests.support.twins import gpt2

IDS = np.random.RandomState(0).randint(0, 64, (2, 5))
NUMBERS = {"layers": 2, "width": 16, "heads": 2}
FIELDS = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
EXTRA = "base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"
LACKS = (r"(?s)strict=False loads the tensors that fit.*are missing, and start as in a fresh adapter.*{}.*"
         r"have no place in the model, and are ignored:\s+{}")  # fmt: skip


def changed(source: Path, folder: Path, without: tuple[str, ...], more: dict[str, Any]) -> list[str]:
    """A copy of PEFT's folder whose tensors lack those whose names have one of these parts; returns what it lacks."""
    held = jaxadapt.read(source)
    lost = [key for key in held.tensors if any(part in key for part in without)]
    kept = {key: x for key, x in held.tensors.items() if key not in lost}
    jaxadapt.write(jaxadapt.PeftTensors(held.config, {**kept, **more}), folder)
    return lost


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    pytest.importorskip("peft")
    from peft import LoraConfig

    from tests.support import peft_harness as harness

    def make(**fields: Any) -> Any:
        base = gpt2.torch_gpt2(gpt2.Shape(**NUMBERS))
        model = harness.make_peft(base, LoraConfig(**FIELDS, **fields))
        harness.save(model, tmp_path / "peft")
        return base

    return make


@pytest.mark.peft
@pytest.mark.parametrize("scan", [None, 0])
@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("fields", "without"),
    [({}, ("h.1.attn.c_attn",)), ({}, ("h.0.mlp.c_fc.lora_B",)), ({"use_dora": True}, ("h.1.mlp.c_fc.lora_",))],
    ids=["module", "B", "dora"],
)
def test_what_is_missing_begins_as_in_peft(fields, without, api, scan, theirs, tmp_path):
    from tests.support import peft_harness as harness

    base = theirs(**fields)
    lost = changed(tmp_path / "peft", tmp_path / "less", without, {EXTRA: np.ones((2, 16), "float32")})
    assert lost
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of the missing keys
        want = harness.logits(harness.load(base, tmp_path / "less").model, IDS)
    twin = gpt2.make_gpt2(api, scan, **NUMBERS)[1]
    model, target = (None, twin) if api == "nnx" else twin
    with pytest.raises(
        jaxadapt.MismatchError, match=r"(?s)missing from.*unexpected.*strict=False loads only the tensors that fit"
    ):
        jaxadapt.load(tmp_path / "less", target)
    with pytest.warns(UserWarning, match="strict=False") as caught:
        loaded = jaxadapt.load(tmp_path / "less", target, strict=False)
    (said,) = [str(w.message) for w in caught]
    assert all(f"  {key}" in said for key in (*lost, EXTRA))
    ids = jnp.asarray(IDS)
    if model is None:
        found = loaded(ids)
    else:
        found = jaxadapt.adapt(model, jaxadapt.extract(loaded).config).apply(loaded, ids)
    np.testing.assert_allclose(np.asarray(found), want, rtol=0, atol=1e-5 * abs(want).max())


BASE = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"kernel": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((4, 3))}}
PREFIX = "base_model.model."


def tensors(**fields: Any) -> jaxadapt.PeftTensors:
    config = jaxadapt.LoraConfig(r=2, target_modules=["a", "b"], **fields)
    adapter = jaxadapt.init(BASE, config, key=jax.random.key(1))
    return jaxadapt.to_peft(jax.tree.map(lambda x: x + 1, adapter))


def test_what_fits_is_taken_in_memory_too():
    whole = tensors(modules_to_save=["head"])
    kept = {k: np.asarray(v, "float16") for k, v in whole.tensors.items() if ".a." in k}
    held = jaxadapt.PeftTensors(whole.config, {**kept, "odd": np.ones(3, "int32")})
    with pytest.warns(UserWarning, match=LACKS.format(r"b\.lora_A\.weight.*b\.lora_B\.weight.*head\.weight", "odd")):
        adapter = jaxadapt.from_peft(held, BASE, strict=False)
    flat = adapter.flat()
    np.testing.assert_array_equal(flat["a.kernel.lora_A"], kept[f"{PREFIX}a.lora_A.weight"])
    assert not flat["b.kernel.lora_B"].any()
    assert flat["b.kernel.lora_A"].any()
    assert flat["b.kernel.lora_A"].dtype == flat["b.kernel.lora_B"].dtype == jnp.float16  # as the file's
    np.testing.assert_array_equal(flat["head.kernel.copy"], BASE["head"]["kernel"])
    with pytest.warns(UserWarning, match="strict=False"):
        again = jaxadapt.from_peft(held, BASE, strict=False)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True))


def test_a_whole_file_is_taken_without_a_word():
    whole = tensors()
    strict, loose = (jaxadapt.from_peft(whole, BASE, strict=strict) for strict in (True, False))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(strict), jax.tree.leaves(loose), strict=True))


def test_wrong_shapes_and_other_files_are_refused_all_the_same():
    whole = tensors()
    held = dict(whole.tensors)
    wrong = jaxadapt.PeftTensors(whole.config, {**held, f"{PREFIX}a.lora_A.weight": np.ones((2, 5), "float32")})
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)wrongly shaped.*expected \[2, 4\], found \[2, 5\]"):
        jaxadapt.from_peft(wrong, BASE, strict=False)
    other = jaxadapt.PeftTensors(whole.config, {key.replace(PREFIX, "x."): x for key, x in held.items()})
    with pytest.raises(jaxadapt.MismatchError, match="(?s)missing from.*unexpected"):
        jaxadapt.from_peft(other, BASE, strict=False)


def test_what_begins_from_more_than_random_numbers_is_not_made_up(tmp_path: Path):
    whole = tensors()
    held = {k: np.asarray(v) for k, v in whole.tensors.items() if ".a." in k}
    jaxadapt.write(jaxadapt.PeftTensors(whole.config, held), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_lora_weights": "eva"}
    half = jaxadapt.PeftTensors(jaxadapt.LoraConfig.from_dict(config), held)
    with (
        pytest.raises(jaxadapt.ConfigError, match="cannot initialize the missing tensors"),
        pytest.warns(UserWarning, match="strict=False"),
    ):
        jaxadapt.from_peft(half, BASE, strict=False)


def test_targets_with_another_librarys_leaves_know_no_strict(tmp_path: Path):
    jaxadapt.write(
        jaxadapt.PeftTensors(tensors().config, {k: np.asarray(v) for k, v in tensors().tensors.items()}), tmp_path
    )
    guest = {"a": {"kernel": jnp.ones((4, 6)), "kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 6))}}
    with pytest.raises(jaxadapt.AttachError, match="strict"):
        jaxadapt.load(tmp_path, guest, strict=False)
