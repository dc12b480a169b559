"""The parts that rotations of a weight's inputs share: their effect, and block-diagonal orthogonal matrices."""

from __future__ import annotations

import abc
from typing import Any

import jax.numpy as jnp

from jaxadapt.methods.matrix import Array, Effects, MatrixMethod, Params, Target


def check_window(target: Target, method: str) -> None:
    """Raise `ConfigError` for the convolutions whose inputs PEFT does not rotate."""
    window, groups = target.window, target.match.weight.groups
    if window and (len(window) != 2 or window[0] != window[1] or groups > 1):
        raise target.refuse(
            f"{method} adapts 2-D convolutions with a square window and one group; found window {window} and"
            f" {groups} groups. Remove the module from target_modules"
        )


def cayley(k: Array) -> Array:
    """Return the orthogonal blocks (I − K)·(I + K)⁻¹ of skew-symmetric blocks (blocks, b, b)."""
    eye = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), k.shape)
    return jnp.linalg.solve(eye + k, eye - k)


def turn(rows: Array, blocks: Array) -> Array:
    """Return the rows (…, n) times the block-diagonal matrix of blocks (n/b, b, b)."""
    split = rows.reshape(*rows.shape[:-1], len(blocks), -1).astype(blocks.dtype)
    return jnp.einsum("...rk,rkc->...rc", split, blocks).reshape(rows.shape)


class Rotation(MatrixMethod):
    """A rotation of the inputs. A convolution's kernel is one matrix (out, channels·window)."""

    kinds = frozenset({"linear", "conv"})

    def effect(self, own: Any) -> Effects:
        return Effects("changes", form="use", reads=True)

    @abc.abstractmethod
    def turned(self, own: Any, params: Params, flat: Array, undo: bool) -> Array:
        """Return the effective weight of a weight (out, in), or with `undo` the weight of an effective one."""

    def matrix(self, own: Any, params: Params, w: Array) -> Array:
        return self.turned(own, params, w.reshape(len(w), -1), undo=False).reshape(w.shape)

    def unmatrix(self, own: Any, params: Params, w: Array) -> Array:
        return self.turned(own, params, w.reshape(len(w), -1), undo=True).reshape(w.shape)
