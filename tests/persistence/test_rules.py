"""The rules by which a file's tensors become those that a model expects, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import MismatchError
from jaxadapt.arrays.tensor_source import TensorSource, as_source
from jaxadapt.models import planning
from jaxadapt.persistence import rules
from jaxadapt.persistence.rules import Expected, Options

PREFIX = "base_model.model."
BASE = {"q": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6), "bias": np.ones(6, np.float32)}}
ADAPTER = jaxadapt.init(BASE, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
OWN = dict(jaxadapt.to_peft(ADAPTER).tensors)
A, B = f"{PREFIX}q.lora_A.weight", f"{PREFIX}q.lora_B.weight"
WEIGHT = f"{PREFIX}q.base_layer.weight"


def expected(tensors: dict[str, Any], **options: Any) -> Expected:
    base = planning.read_params(BASE)
    file = jaxadapt.PeftTensors(ADAPTER.config, tensors, "a file")
    recipe, sites = planning.plan_adapter(base, ADAPTER.config, ADAPTER.keymap)
    return Expected(file, recipe, sites, base, Options(**options))


def follow(rule: Callable[[TensorSource, Expected], TensorSource], wanted: Expected) -> list[str]:
    """The keys that a rule leaves."""
    return sorted(rule(as_source(wanted.file.tensors), wanted))


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_keeps_a_file_that_fits(rule: Callable[[TensorSource, Expected], TensorSource]):
    wanted = expected(OWN)
    source = as_source(OWN)
    assert rule(source, wanted) is source
    assert not wanted.refusals


def test_weights_of_the_base_are_left_out():
    wanted = expected({**OWN, WEIGHT: BASE["q"]["kernel"].T, f"{PREFIX}q.base_layer.bias": BASE["q"]["bias"]})
    assert follow(rules.drop_base_weights, wanted) == [A, B]
    assert not wanted.refusals


@pytest.mark.parametrize(("strict", "left"), [(True, [A, B]), (False, sorted([A, B, WEIGHT]))])
def test_other_weights_of_the_base_are_refused_or_count_as_unexpected(strict: bool, left: list[str]):
    wanted = expected({**OWN, WEIGHT: BASE["q"]["kernel"].T + 1}, strict=strict)
    assert follow(rules.drop_base_weights, wanted) == left
    assert len(wanted.refusals) == strict
    assert all("base weights that differ" in text and WEIGHT in text for text in wanted.refusals)


TABLE = np.arange(1, 37, dtype=np.float32).reshape(6, 6).astype("bfloat16")
SCALED = jaxadapt.KeyMap(
    "scaled",
    (
        jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),
        jaxadapt.Weight("wte.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding", scale=("d", 0.5)),
    ),
)


def times(table: Any, factor: float) -> Any:
    return (table.astype(np.float32) * np.float32(factor)).astype("bfloat16")


@pytest.mark.parametrize(
    ("base", "keymap", "key", "right", "wrong"),
    [
        ({"lm_head": {"kernel": TABLE}}, None, "lm_head.weight", TABLE.T, TABLE),
        ({"wte": {"embedding": times(TABLE, 6**0.5)}}, SCALED, "embed_tokens.weight", TABLE, times(TABLE, 1.02)),
    ],
    ids=["transposed, where the layout is a guess", "almost equal, where the keymap has a factor"],
)
def test_embeddings_of_a_file_must_equal_the_models(base: Any, keymap: Any, key: str, right: Any, wrong: Any):
    adapter = {**OWN, f"{PREFIX}{key}": right}
    jaxadapt.from_peft(jaxadapt.PeftTensors(ADAPTER.config, adapter), {**BASE, **base}, keymap=keymap)
    adapter[f"{PREFIX}{key}"] = wrong
    with pytest.raises(MismatchError, match=r"embeddings that differ(.|\n)*its values differ from the base's"):
        jaxadapt.from_peft(jaxadapt.PeftTensors(ADAPTER.config, adapter), {**BASE, **base}, keymap=keymap)


def test_all_that_does_not_fit_stands_in_one_error():
    tensors = {A: OWN[A][:1], WEIGHT: BASE["q"]["kernel"].T + 1, "other": np.ones(2)}
    with pytest.raises(MismatchError) as caught:
        rules.fit(expected(tensors))
    for text in ("base weights that differ", B, "other", "[2, 4]"):
        assert text in str(caught.value)


def test_integers_in_place_of_floats_are_unusable():
    wanted = expected({**OWN, A: OWN[A].astype(np.int32)})
    rules.require_fit(as_source(wanted.file.tensors), wanted)
    (text,) = wanted.refusals
    assert f"{A}: int32, expected floats" in text


def test_missing_tensors_start_as_in_a_new_adapter_if_the_caller_asks_for_it():
    with pytest.warns(UserWarning, match="start as in a fresh adapter"):
        source = rules.fit(expected({A: OWN[A].astype(np.float16)}, strict=False))
    assert sorted(source) == [A, B]
    assert source[B].dtype == np.float16
    assert not np.any(source[B])


def test_a_configuration_may_not_ask_for_huge_tensors():
    config = jaxadapt.LoraConfig(r=2**23, target_modules=["q"])
    base = planning.read_params(BASE)
    recipe, sites = planning.plan_adapter(base, config, ADAPTER.keymap)
    file = jaxadapt.PeftTensors(config, {}, "a file")
    with pytest.raises(MismatchError, match="asks for 83886080 values"):
        rules.create_missing(as_source({}), Expected(file, recipe, sites, base, Options()))


TIED = jaxadapt.KeyMap(
    "tied",
    (jaxadapt.Weight("wte.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding"),),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
)


def test_traced_tensors_are_never_said_to_differ():
    base = {"wte": {"embedding": np.ones((6, 4), np.float32)}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    file = jaxadapt.to_peft(jaxadapt.init(base, config, key=jax.random.key(0), keymap=TIED))
    assert f"{PREFIX}lm_head.lora_A.weight" in file.tensors

    def values(tensors: dict[str, Any]) -> Any:
        return jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, tensors), base, keymap=TIED).params

    values(dict(file.tensors))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(values)(dict(file.tensors))
