"""A server's bank has room for the adapters of its folder, also for those that share tensors."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import jaxadapt
from jaxadapt import serving
from jaxadapt.demo import llama
from jaxadapt.demo.llama import PROJECTIONS
from jaxadapt.server.engine import make_room
from tests.support.configs import class_of

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide": ("VERA", {"r": 3, "target_modules": ["q_proj", "o_proj"]}),
    "narrow": ("VERA", {"r": 3, "target_modules": ["v_proj", "q_proj"]}),
    "others": ("VERA", {"r": 3, "target_modules": ["q_proj"], "projection_prng_key": 5}),
    "one vector": ("UNILORA", {"r": 3, "theta_d_length": 9, "target_modules": ["up_proj"]}),
    "hadamard": ("LOHA", {"r": 2, "target_modules": ["v_proj"]}),
    "rotations": ("ROAD", {"group_size": 2, "target_modules": ["v_proj"]}),
    "hira": ("HIRA", {"target_modules": ["v_proj"]}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_adapter_of_the_folder_fits(base, tmp_path):
    model = llama.to_nnx(base.config, base.weights)
    made = {
        name: jaxadapt.init(model, class_of(peft_type)(**fields), key=jax.random.key(0))
        for name, (peft_type, fields) in ADAPTERS.items()
    }
    for name, adapter in made.items():
        jaxadapt.save(adapter, tmp_path / name)
    room = make_room(model, [tmp_path / name for name in made], 2, PROJECTIONS)
    assert [each.r for each in room if isinstance(each, jaxadapt.LoraConfig)] == [4]
    bank = serving.create(model, room, slots=2)
    assert len(bank.shared) == 2
    for name, adapter in made.items():
        if name != "hira":
            bank = serving.put(bank, 1, adapter, model)


def test_a_rank_of_a_pattern_has_room(base, tmp_path):
    model = llama.to_nnx(base.config, base.weights)
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 8})
    jaxadapt.save(adapter := jaxadapt.init(model, config, key=jax.random.key(0)), tmp_path / "a")
    (room,) = make_room(model, [tmp_path / "a"], 2, PROJECTIONS)
    assert room.r == 8
    serving.prepare(serving.create(model, room, slots=2), adapter)
