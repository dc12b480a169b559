"""Whether arrays are finite: of every dtype, and on several devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxadapt.arrays import regions

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_each_dtype_as_numpy_says(dtype):
    x = RNG.standard_normal((513, 1031)).astype(dtype)
    for array in (x, x.T, x[::2, ::3], x[:0], x[0, 0, None]):
        assert regions.is_finite(array) is bool(np.isfinite(array).all())
    for value in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[-1, -1] = value
        assert regions.is_finite(y) is bool(np.isfinite(y).all())
        assert regions.is_finite(y.T) is regions.is_finite(y)
    if np.dtype(dtype).itemsize == 2:  # all there are
        every = np.arange(1 << 16, dtype="uint16").view(dtype)
        with np.errstate(invalid="ignore"):  # ml_dtypes', of signalling NaNs
            want = np.isfinite(every).tolist()
        assert [regions.is_finite(every[i : i + 1]) for i in range(1 << 16)] == want
    assert regions.is_finite(np.arange(3))


def test_arrays_of_several_devices_are_looked_at_where_they_are():
    mesh = jax.make_mesh((8,), ("x",))
    x = jnp.ones((16, 4)).at[13, 2].set(jnp.nan)
    for spec in (jax.P("x"), jax.P()):
        put = jax.device_put(x, jax.NamedSharding(mesh, spec))
        assert regions.names_not_finite({"a": put, "b": jnp.ones(3), "c": np.ones(3), "d": jnp.arange(2)}) == ["a"]
