"""A new adapter's tensors are distributed as PEFT's: the same constants, the same mean and spread, for every method."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import methods
from tests.methods.one_layer import numbers
from tests.support.configs import class_of

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.save_and_load import get_peft_model_state_dict

pytestmark = pytest.mark.peft
OUTPUTS, INPUTS = 96, 64
# Fields that choose between two ways to begin.
SWITCHES = ("init_weights", "init_lora_weights", "init_ia3_weights")
UNDEFINED = ("TINYLORA",)  # PEFT begins these with whatever its memory holds, if the switch is off


def cases() -> list[Any]:
    """Each example of each method that changes weights, and the other way to begin of the first one."""
    found: list[Any] = []
    for name in sorted(methods.METHODS):
        if methods.METHODS[name].scope != "site" or name not in PEFT_TYPE_TO_CONFIG_MAPPING:
            continue  # prompts: tests/reference/test_prompts.py; copies begin with the base's values
        examples: list[Any] = list(methods.METHODS[name].examples)
        fields = getattr(class_of(name), "__dataclass_fields__", {})
        switches = () if name in UNDEFINED else SWITCHES
        examples += [{**examples[0], switch: False} for switch in switches if switch in fields]
        found += [pytest.param(name, fields, id=f"{name}-{i}") for i, fields in enumerate(examples)]
    return found


def pefts(peft_type: str, fields: dict[str, Any]) -> dict[str, np.ndarray]:
    layer = torch.nn.Linear(INPUTS, OUTPUTS)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(numbers(OUTPUTS, INPUTS)))
    torch.manual_seed(0)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**copy.deepcopy(fields))
    base = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": layer})})
    model = get_peft_model(base, config)
    return {key: x.detach().numpy() for key, x in get_peft_model_state_dict(model).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("peft_type", "fields"), cases())
def test_new_tensors_are_distributed_as_pefts(peft_type: str, fields: dict[str, Any]):
    fields = {"target_modules": ["q"], **{k: v for k, v in fields.items() if k != "target_modules"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pefts(peft_type, fields)
    base = {"a": {"q": {"kernel": numbers(OUTPUTS, INPUTS).T}}}
    adapter = jaxadapt.init(base, class_of(peft_type)(**fields), key=jax.random.key(3))
    ours = {key: np.asarray(x) for key, x in jaxadapt.to_peft(adapter).tensors.items()}
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    for key, want in theirs.items():
        got = ours[key]
        assert got.dtype.kind == want.dtype.kind, key
        if want.dtype.kind != "f":  # positions, some of them random
            continue
        if (want == want.flat[0]).all():
            np.testing.assert_array_equal(got, want, key)
            continue
        n, spread = want.size, want.std()
        # The means of two samples differ by more than 6 of their deviations once in 10^8 times, their deviations by
        # more than 6/sqrt(n) even for heavier tails than a normal's.
        assert abs(got.mean() - want.mean()) <= 6 * spread * np.sqrt(2 / n), key
        assert abs(got.std() / spread - 1) <= 6 / np.sqrt(n), key
