"""A file for an attached adapter takes the attached adapter's sites. The result must be as if they were planned again.

An explicit keymap= makes `load` plan, so it gives what to compare with. No method is named: all of `METHODS` run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import tensor_entries
from jaxadapt.core.errors import AdapterError
from jaxadapt.methods import METHODS
from tests.methods.test_conformance_model import begun, trained
from tests.support import house
from tests.support.configs import class_of

PACKAGE = Path(jaxadapt.__file__).parent
CASES = [pytest.param(t, i, id=f"{t}-{i}") for t in sorted(METHODS) for i in range(len(METHODS[t].examples))]


def targets(peft_type: str) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "v_proj"]} if METHODS[peft_type].scope == "site" else {}


def outcome(folder: Path, held: Any, **options: Any) -> Any:
    """The loaded adapter or the error, and whether anything was planned."""
    copy = nnx.clone(held) if isinstance(held, nnx.Module) else held
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(jaxadapt.extract(jaxadapt.load(folder, copy, **options)))
        except AdapterError as error:
            found.append(str(error))

    walked = house.walk(PACKAGE, call)
    return found[0], str(PACKAGE / "adapters" / "selection.py") in walked.files


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize(("peft_type", "i"), CASES)
def test_every_method_loads_as_if_it_were_planned_again(peft_type: str, i: int, api: str, tmp_path: Path) -> None:
    config = class_of(peft_type)(**{**targets(peft_type), **METHODS[peft_type].examples[i]})
    new = begun(config, "nnx", spread=False)[2]
    model, variables, adapter = begun(new.config, api, spread=False)
    held = model if variables is None else variables
    held = jaxadapt.inject(held, trained(adapter))
    jaxadapt.save(held, tmp_path)
    found, was_planned = outcome(tmp_path, held)
    wanted, is_planned = outcome(tmp_path, held, keymap=adapter.keymap)
    assert is_planned
    if METHODS[peft_type].scope == "site":  # prompts and copies may have other tensors in the file
        assert was_planned is not all(tensor.in_file for tensor, _ in tensor_entries(sites.sites_of(adapter)))
    if isinstance(wanted, str):
        assert found == wanted
        return
    if api == "nnx":  # with rngs= the layers are made anew, from these sites
        models = [
            jaxadapt.load(tmp_path, nnx.clone(held), rngs=nnx.Rngs(0), **given)
            for given in ({}, {"keymap": adapter.keymap})
        ]
        made, planned = (nnx.state(model) for model in models)
        assert jax.tree.structure(made) == jax.tree.structure(planned)
        assert nnx.graphdef(models[0]) == nnx.graphdef(models[1])
    assert found.recipe == wanted.recipe
    assert sites.sites_of(found) == sites.sites_of(wanted)
    assert found.flat().keys() == wanted.flat().keys()
    for path, x in wanted.flat().items():
        np.testing.assert_array_equal(found.flat()[path], x, err_msg=path)
        assert found.flat()[path].dtype == x.dtype, path


def adapted(out: int = 6) -> dict[str, Any]:
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], task_type="CAUSAL_LM")
    base = {name: {"kernel": jnp.ones((4, out))} for name in ("q", "score")}
    return {"params": base, **jaxadapt.init(base, config, key=jax.random.key(0)).collection}


def save(variables: dict[str, Any], folder: Path, **fields: Any) -> None:
    """Save the adapter with other values of these fields of its configuration."""
    adapter = jaxadapt.extract(variables)
    jaxadapt.save(jaxadapt.Adapter(adapter.config.replace(**fields), adapter.params, adapter.keymap), folder)


def test_the_origin_is_that_of_the_file(tmp_path: Path) -> None:
    variables = adapted()
    save(variables, tmp_path, base_model_name_or_path="org/base", revision="abc")
    found, was_planned = outcome(tmp_path, variables)
    assert not was_planned
    assert (found.config.base_model_name_or_path, found.config.revision) == ("org/base", "abc")


@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"lora_alpha": 3}, {"use_rslora": True}])
def test_another_configuration_is_planned(fields: dict[str, Any], tmp_path: Path) -> None:
    """A task adds its head to the targets, though two configurations that differ only in it are equal."""
    variables = adapted()
    save(variables, tmp_path, **fields)
    found, was_planned = outcome(tmp_path, variables)
    assert was_planned
    assert isinstance(found, str)


def test_another_base_is_planned_and_refused(tmp_path: Path) -> None:
    """The parameters were exchanged beside the adapter, as by a checkpoint of another size."""
    variables = adapted()
    save(variables, tmp_path)
    found, was_planned = outcome(tmp_path, {**variables, "params": adapted(out=8)["params"]})
    assert was_planned
    assert "q.lora_B.weight" in found


def adapted_layers(count: int, api: str) -> Any:
    """A model of so many layers, or its variables, with an adapter on each."""
    config, names = jaxadapt.LoraConfig(r=2, target_modules=["q"]), [f"{i}" for i in range(count)]
    if api == "nnx":
        layers = {name: nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))) for name in names}
        return jaxadapt.adapt(nnx.Dict(layers=nnx.Dict(layers)), config, rngs=nnx.Rngs(1))
    base = {"layers": {name: {"q": {"kernel": jnp.ones((4, 6))}} for name in names}}
    return {"params": base, **jaxadapt.init(base, config, key=jax.random.key(0)).collection}


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_model_that_got_a_layer_since_is_planned_and_refused(api: str, tmp_path: Path) -> None:
    held = adapted_layers(2, api)
    jaxadapt.save(held, tmp_path)
    if api == "nnx":
        held.layers["2"] = nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    else:
        held = {**held, "params": adapted_layers(3, api)["params"]}
    found, was_planned = outcome(tmp_path, held)
    assert was_planned
    assert "layers.2.q.lora_A.weight" in found


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_file_replaces_an_adapter_that_contradicts_its_configuration(api: str, tmp_path: Path) -> None:
    """Its arrays have another rank, as those of several adapters stacked by vmap have another axis."""
    held = adapted_layers(2, api)
    jaxadapt.save(held, tmp_path)
    wanted = jaxadapt.extract(held).flat()
    if api == "nnx":
        variables = held.layers["0"]["q"].lora["default"]["kernel"]
        variables["lora_A"].set_value(jnp.ones((5, 4)))
    else:
        held["lora"]["default"]["layers"]["0"]["q"]["kernel"]["lora_A"] = jnp.ones((5, 4))
    found, _ = outcome(tmp_path, held)
    assert {path: x.shape for path, x in found.flat().items()} == {path: x.shape for path, x in wanted.items()}
    np.testing.assert_array_equal(found.flat()["layers.0.q.kernel.lora_A"], wanted["layers.0.q.kernel.lora_A"])


def test_a_file_replaces_an_adapter_that_lacks_a_tensor(tmp_path: Path) -> None:
    held = adapted_layers(2, "linen")
    jaxadapt.save(held, tmp_path)
    wanted = jaxadapt.extract(held).flat()
    del held["lora"]["default"]["layers"]["0"]["q"]["kernel"]["lora_A"]
    found, _ = outcome(tmp_path, held)
    assert found.flat().keys() == wanted.keys()
