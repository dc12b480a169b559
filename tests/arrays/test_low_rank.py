"""Products of low rank, beside numpy's einsum: shardings of explicit meshes, experts, operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxadapt import AttachError
from jaxadapt.arrays import products
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LAYER, Operation, PerEntry, Use, transposed_axes


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_product_on_an_explicit_mesh_is_placed_as_its_first_operand_with_each_axis(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    a, b = put(numbers(2, 8), "x", "y"), put(numbers(8, 4), None, "y")
    found = products.explicit_sharding("bo", (a, "bi"), (b, "io"))
    assert products.explicit_sharding("bo", (numbers(2, 8), "bi")) is None
    if kind == AxisType.Auto:
        assert found is None
        return
    assert found is not None
    assert tuple(found.spec) == ("x", "y")
    assert tuple(products.explicit_sharding("zi", (a, "bi"), (b, "io")).spec) == (None, "y")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [2.0, "array"])
def test_experts_in_an_operation(transposed, scale):
    """An operation contracts expert by expert, as a ragged product does; the scale may differ between experts."""
    axes = Axes((1,), (2,), (0,))
    a, b = numbers(3, 2, 4), numbers(3, 5, 2, seed=1)  # (e, r, in), (e, out, r)
    scales = np.array([1.0, 2.0, 3.0], "float32") if scale == "array" else np.full(3, 2.0, "float32")
    x = numbers(3, 7, 5 if transposed else 4, seed=2)

    def run(x, w):
        return jnp.einsum("enr,eqr->enq" if transposed else "enr,erq->enq", x, w)

    use = Operation(run, 2, axes, transposed=transposed)
    delta = products.low_rank_delta(use, 2.0 if scale == 2.0 else jnp.asarray(scales), 1, a, b, x, x)
    weight = np.einsum("e,eor,eri->eio", scales, b, a)
    expected = np.einsum("eno,eio->eni" if transposed else "eni,eio->eno", x, weight)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, "array"])
def test_fused_parts_in_a_product(scale):
    axes = Axes((1,), (2,), (0,))
    a, b, x = numbers(3, 2, 4), numbers(3, 5, 2, seed=1), numbers(7, 4, seed=2)
    scales = np.array([1.0, 2.0, 3.0], "float32") if scale == "array" else np.full(3, 2.0, "float32")
    use = Use("ni", "pio", "pno", axes)
    delta = products.low_rank_delta(use, 2.0 if scale == 2.0 else jnp.asarray(scales), 1, a, b, x, numbers(3, 7, 5))
    expected = np.einsum("p,por,pri,ni->pno", scales, b, a, x)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    merged = products.add_product(axes, jnp.zeros((3, 4, 5)), 2.0 if scale == 2.0 else jnp.asarray(scales), a, b)
    np.testing.assert_allclose(merged, np.einsum("p,por,pri->pio", scales, b, a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [16, 17])
def test_the_sum_is_the_same_on_either_side_of_the_largest_rank_in_terms(r):
    a, b, w = numbers(r, 4), numbers(6, r, seed=1), numbers(4, 6, seed=2)
    merged = products.add_product(Axes((0,), (1,)), w, 0.5, a, b)
    np.testing.assert_allclose(merged, np.asarray(w) + 0.5 * (np.asarray(b) @ np.asarray(a)).T, rtol=1e-4, atol=1e-5)


def test_a_use_runs_with_another_weight():
    axes, x, w = Axes((0,), (1,)), numbers(3, 4), numbers(4, 6, seed=1)
    use = Use("bi", "io", "bo", axes)
    np.testing.assert_allclose(products.run_use(use, x, w), np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-6)
    operation = Operation(lambda x, w: (x, w), 1, axes)
    assert products.run_use(operation, x, w) == (x, w)
    assert not operation.transposed
    vector = jnp.arange(6.0)
    assert products.expand_over_outputs(Operation(lambda x, w: x, 1, axes), vector, 3).shape == (1, 6, 1)
    assert products.expand_over_outputs(use, vector, 2).shape == (1, 6)


@pytest.mark.parametrize(
    ("uses", "shape", "expected"),
    [
        ([], (4, 4), None),
        (["straight"], (4, 4), None),
        (["turned"], (4, 4), "turned"),
        (["turned", "straight"], (4, 4), None),
        (["turned"], (1, 4), None),
        (["turned", "turned"], (4, 6), "turned"),
    ],
)
def test_axes_by_a_weights_products(uses, shape, expected):
    kinds = {"straight": Axes((0,), (1,)), "turned": Axes((1,), (0,))}
    if shape == (1, 4):
        kinds["turned"] = Axes((0, 1), ())
        kinds["straight"] = Axes((1,), (0,))
    found = transposed_axes(kinds["straight"], [kinds[name] for name in uses], shape)
    assert found == (kinds[expected] if expected else None)


def test_each_layer_looks_up_its_own_numbers():
    values = PerEntry((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (2,))
    assert values.layers == 3
    assert str(values) == "1 to 6"
    for layer in range(3):
        found = values.layer_values({LAYER: jnp.array([layer])})
        np.testing.assert_array_equal(found, [2 * layer + 1, 2 * layer + 2])
    np.testing.assert_array_equal(PerEntry((1.0, 2.0), (2,)).layer_values({}), [1, 2])
    with pytest.raises(AttachError, match="the 3 layers of this adapter differ.*found none"):
        values.layer_values({})
    with pytest.raises(AttachError, match=r"found numbers of shape \[3\]"):
        values.layer_values({LAYER: jnp.arange(3)})
