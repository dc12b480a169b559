"""What holds for every entry of a keymap, every method and every sharding; each check draws one case."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt import KeyMapError
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import Site, make_file_plan
from tests.support import entries

AXES = {"x": 2, "y": 4}


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


def site_of(case: entries.Case) -> Site:
    try:
        (site,) = selection.select_sites(case.config, case.entry.keymap, {"w": case.entry.shape})
    except KeyMapError as error:  # documented: A has fewer axes than the leaf
        assume("stacks its layers on axis" not in str(error))
        raise
    return site


def file_and_back(peft_type: str, data: st.DataObject) -> None:
    """Decoding and encoding are inverse, bit for bit, in both directions."""
    case = data.draw(entries.cases(peft_type))
    plan = make_file_plan([site_of(case)])
    plan.check({key: x.shape for key, x in case.tensors.items()})
    leaves = plan.decode(case.tensors)
    back = dict(plan.encode(leaves))
    exact = all(entry.form.is_exact for entry in plan.entries)
    for key, x in case.tensors.items():
        if exact:
            np.testing.assert_array_equal(back[key], x, err_msg=key)
        else:
            np.testing.assert_allclose(back[key], x, rtol=3e-7, err_msg=key)  # twice rounded
    if exact:
        again = plan.decode(back)
        for path, x in leaves.items():
            np.testing.assert_array_equal(again[path], x, err_msg=path)


def pefts_formula(peft_type: str, data: st.DataObject) -> None:
    """Loaded from PEFT's file and merged, the leaf is what PEFT's formula makes of PyTorch's weights."""
    case = data.draw(entries.cases(peft_type))
    site_of(case)
    entry, rng = case.entry, np.random.default_rng(1)
    shape = tuple(entry.size(group) for group in entry.right)
    weights = {module: rng.standard_normal(shape).astype("float32") for module in entry.modules.values()}
    adapted = set(entry.adapted())
    changed = {m: case.change(m, w) if m in adapted else w for m, w in weights.items()}
    base = {"w": entry.to_leaf(weights)}
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(case.config, case.tensors), base, keymap=entry.keymap)
    merged = jaxadapt.merge(base, adapter)["w"]
    np.testing.assert_allclose(merged, entry.to_leaf(changed), rtol=2e-5, atol=2e-5)  # sums in another order


def shardings_follow(peft_type: str, data: st.DataObject) -> None:
    """An axis that a tensor shares with its base is split as the base's, and every other axis is whole.

    Every axis has a size of its own, so that sizes tell which axis of the base a tensor's axis is.
    """
    case = data.draw(entries.cases(peft_type, sizes=lambda i: st.just(8 * (i + 1))))
    entry, site = case.entry, site_of(case)
    assume(len(set(entry.shape)) == len(entry.shape))
    spec = _draw_spec(entry.shape, data)
    base = NamedSharding(_mesh(), spec)
    found = initial_values.adapter_shardings([site], {"w": base})
    of_size = dict(zip(entry.shape, itertools.chain(spec, itertools.repeat(None)), strict=False))
    parts = dict(zip(entry.left, entry.shape, strict=True)).get("{z}")
    assume(parts not in {case.config.get("r"), *(case.config.get("rank_pattern") or {}).values()})
    for plan_entry in site.entries:
        want = [of_size.get(n) for n in plan_entry.shape]
        if parts is not None and len(entry.targets) == parts:
            assert of_size[parts] in want
        given = found[plan_entry.path]
        assert given.mesh == base.mesh
        assert list(given.spec) == want, (plan_entry.path, plan_entry.shape, given.spec, spec)
        given.shard_shape(plan_entry.shape)  # raises where the mesh does not divide the tensor


def sharded_file_and_back(peft_type: str, data: st.DataObject) -> None:
    """From a file onto eight devices as the base lies there, and back to the same file."""
    case = data.draw(entries.cases(peft_type, sizes=lambda _: st.sampled_from([2, 4])))
    entry = case.entry
    site_of(case)
    base = {
        "w": jax.ShapeDtypeStruct(entry.shape, "f4", sharding=NamedSharding(_mesh(), _draw_spec(entry.shape, data)))
    }
    file = jaxadapt.PeftTensors(case.config, case.tensors)
    adapter = jaxadapt.from_peft(file, base, keymap=entry.keymap)
    leaves: dict[str, Any] = adapter.flat()
    assert all(len(x.sharding.device_set) == 8 for x in leaves.values())
    back = jaxadapt.to_peft(adapter).tensors
    for key, x in case.tensors.items():
        np.testing.assert_allclose(np.asarray(back[key]), x, rtol=3e-7 if entry.factor != 1 else 0, err_msg=key)


CHECKS: dict[Callable[[str, st.DataObject], None], int] = {
    file_and_back: 40, pefts_formula: 8, shardings_follow: 30, sharded_file_and_back: 3,
}  # fmt: skip
"""Each check, and its examples in CI."""


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * len(AXES))


def _draw_spec(shape: tuple[int, ...], data: st.DataObject) -> PartitionSpec:
    """Each mesh axis on an axis of the leaf that it divides, or on none."""
    names: list[list[str]] = [[] for _ in shape]
    for name, size in AXES.items():
        fitting = [i for i, n in enumerate(shape) if n % (size * np.prod([AXES[m] for m in names[i]], dtype=int)) == 0]
        place = data.draw(st.sampled_from([None, *fitting]))
        if place is not None:
            names[place].append(name)
    return PartitionSpec(*(tuple(n) if len(n) > 1 else n[0] if n else None for n in names))
