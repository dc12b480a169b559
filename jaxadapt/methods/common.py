"""Orthogonal changes of the inputs: block-diagonal matrices, which OFT and BOFT train, and their convolutions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxadapt.methods.base import Array, Target, at_least_float32


def check_window(target: Target, method: str) -> None:
    """Raise `ConfigError` for the convolutions whose inputs PEFT does not rotate."""
    window, groups = target.window, target.match.weight.groups
    if window and (len(window) != 2 or window[0] != window[1] or groups > 1):
        raise target.refuse(
            f"{method} adapts 2-D convolutions with a square window and one group; found window {window} and"
            f" {groups} groups. Remove the module from target_modules"
        )


def skew(vectors: Array) -> Array:
    """Return the skew-symmetric blocks (blocks, b, b) with these upper triangles (blocks, b·(b−1)/2), row by row.

    The result is float32 or wider, because there is no inverse in 16 bits.

    >>> skew(jnp.array([[5.0]])).tolist()
    [[[0.0, 5.0], [-5.0, 0.0]]]
    """
    size = round((1 + math.sqrt(1 + 8 * vectors.shape[-1])) / 2)
    rows, columns = np.triu_indices(size, 1)
    vectors = at_least_float32(vectors)
    upper = jnp.zeros((len(vectors), size, size), vectors.dtype).at[:, rows, columns].set(vectors)
    return upper - jnp.swapaxes(upper, 1, 2)


def cayley(k: Array) -> Array:
    """Return the orthogonal blocks (I − K)·(I + K)⁻¹ of skew-symmetric blocks (blocks, b, b)."""
    eye = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), k.shape)
    return jnp.linalg.solve(eye + k, eye - k)


def cayley_series(k: Array, terms: int) -> Array:
    """Return PEFT's series for (I + K)·(I − K)⁻¹: I + 2·K + 2·K² + … + Kⁿ, with the factor 1 for the last power.

    It has the power K³ with three terms, as with four.
    """
    r = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), k.shape)
    if terms > 1:
        r = r + 2 * k
    if terms > 2:
        power = k
        for _ in range(2, max(3, terms - 1)):
            power = power @ k
            r = r + 2 * power
        r = r + power @ k
    return r


def turn(rows: Array, blocks: Array) -> Array:
    """Return the rows (…, n) times the block-diagonal matrix of blocks (n/b, b, b)."""
    split = rows.reshape(*rows.shape[:-1], len(blocks), -1).astype(blocks.dtype)
    return jnp.einsum("...rk,rkc->...rc", split, blocks).reshape(rows.shape)
