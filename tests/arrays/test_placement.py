"""Shardings of annotations."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxadapt.arrays import regions


@pytest.mark.parametrize(
    ("spec", "named"),
    [(("x", None), True), ((("x", "y"), None), True), ((None,), True), (("z",), False), ((("x", "z"),), False)],
)
def test_an_annotation_is_placed_where_the_mesh_has_all_its_axes(spec, named):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    found = regions.sharding_from_spec(spec, mesh)
    assert (found is not None) is named
    if found is not None:
        assert found.spec == PartitionSpec(*spec)
        assert found.mesh == mesh
    assert regions.sharding_from_spec(spec) is None  # without a mesh
