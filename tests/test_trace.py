"""The jaxpr interpreter: whatever a function does with a weight, `rewrite` equals the effective weight.

The oracle everywhere is the plain function given the weight `W + s·A·B` (or `W·l`), computed by numpy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt.axes import LETTERS, RANK, Axes, Use
from jaxadapt.errors import AttachError
from jaxadapt.trace import Contraction, Other, rewrite, roles, uses

R = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """LoRA as a hook; `met` lists what `rewrite` did: the uses it saw, and "weight"."""

    axes: Axes
    a: jax.Array
    b: jax.Array
    s: float = 2.0
    met: list[Any] = dataclasses.field(default_factory=list)

    def input(self, use: Use, x: Any) -> Any:
        for letters, array in ((use.x, x), (use.w, None)):
            assert array is None or len(letters) == array.ndim
            assert RANK not in letters and len(set(letters)) == len(letters)
        self.met.append(use)
        return x

    def output(self, use: Use, x: Any, y: Any) -> Any:
        assert len(use.y) == y.ndim
        batch = use.letters("batch")
        first = self.a, batch + use.letters("inn") + RANK
        last = self.b, batch + RANK + use.letters("out")
        if use.transposed:
            first, last = last, first
        free = set(use.w) - set(use.x) - set(batch)
        mid = "".join(c for c in use.y if c not in free)
        mid += "".join(c for c in batch if c not in mid) + RANK
        h = jnp.einsum(f"{use.x},{first[1]}->{mid}", x.astype(first[0].dtype), first[0]) * self.s
        return (y + jnp.einsum(f"{mid},{last[1]}->{use.y}", h, last[0])).astype(y.dtype)

    def weight(self, w: Any) -> Any:
        self.met.append("weight")
        return (w + self.s * product(self.axes, self.a, self.b, jnp.einsum)).astype(w.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class IA3:
    axes: Axes
    l: jax.Array
    feedforward: bool = False

    def spread(self, use: Use, letters: str) -> Any:
        own = use.letters("inn" if self.feedforward else "out")
        return jnp.einsum(f"{own}->{''.join(c for c in letters if c in own)}", self.l).reshape(
            [self.l.shape[own.index(c)] if c in own else 1 for c in letters]
        )

    def input(self, use: Use, x: Any) -> Any:
        return x * self.spread(use, use.x) if self.feedforward else x

    def output(self, use: Use, x: Any, y: Any) -> Any:
        return y if self.feedforward else y * self.spread(use, use.y)

    def weight(self, w: Any) -> Any:
        role = self.axes.inn if self.feedforward else self.axes.out
        return w * self.l.reshape([w.shape[i] if i in role else 1 for i in range(w.ndim)])


def product(axes: Axes, a: Any, b: Any, einsum: Callable[..., Any] = np.einsum) -> Any:
    inn, out, batch = ("".join(LETTERS[i] for i in role) for role in (axes.inn, axes.out, axes.batch))
    return einsum(f"{batch}{inn}Z,{batch}Z{out}->{LETTERS[: axes.rank]}", a, b)


def array(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype) * 0.3


def lora(w: Any, axes: Axes) -> Lora:
    sizes = {role: axes.of(role, w.shape) for role in ("batch", "inn", "out")}
    return Lora(
        axes,
        array(1, *sizes["batch"], *sizes["inn"], R),
        array(2, *sizes["batch"], R, *sizes["out"]),
    )


def effective(w: Any, hook: Lora) -> jax.Array:
    a, b = np.asarray(hook.a, np.float64), np.asarray(hook.b, np.float64)
    return jnp.asarray(np.asarray(w, np.float64) + hook.s * product(hook.axes, a, b), w.dtype)


def close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        scale = float(np.abs(np.asarray(w, np.float64)).max()) + 1e-30
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(w, np.float64), rtol, rtol * scale)


def check(f: Callable[..., Any], w: Any, axes: Axes, *args: Any, op_level: bool | None = True) -> Lora:
    """Values and gradients equal those of the effective weight, eagerly and under jit."""
    hook = lora(w, axes)

    def call(ws: Any, *args: Any) -> Any:
        return f(ws["w"], *args)

    def ours(ab: Any, *args: Any) -> Any:
        return rewrite(call, {"w": w}, {"w": dataclasses.replace(hook, a=ab[0], b=ab[1])}, *args)

    def plain(ab: Any, *args: Any) -> Any:
        return f((w + hook.s * product(axes, *ab, jnp.einsum)).astype(w.dtype), *args)

    def loss(g: Callable[..., Any]) -> Any:
        return jax.grad(
            lambda ab: sum((y.astype(jnp.float32) ** 2).sum() for y in jax.tree.leaves(g(ab, *args)))
        )

    ab, want = (hook.a, hook.b), f(effective(w, hook), *args)
    close(ours(ab, *args), want)
    close(jax.jit(ours)(ab, *args), want)
    close(jax.jit(loss(ours))(ab), loss(plain)(ab), 1e-4)
    hook.met.clear()
    ours(ab, *args)
    assert op_level is None or ("weight" not in hook.met) == op_level, hook.met
    assert ("weight" in hook.met) == any(
        isinstance(use, Other) or not _fits(use, axes) for use in uses(call, {"w": w}, *args)["w"]
    )
    return hook


def _fits(use: Contraction, axes: Axes) -> bool:
    return set(use.inn) in (set(axes.inn), set(axes.out)) and set(use.batch) <= set(axes.batch)


# ---------------------------------------------------------------- einsums and other single uses

W2 = Axes((0,), (1,))
EINSUMS = [
    ("BD,DF->BF", (2, 4), (4, 5), W2),
    ("BTD,DNH->BTNH", (2, 3, 4), (4, 2, 5), Axes((0,), (1, 2))),
    ("BTD,NDH->BTNH", (2, 3, 4), (2, 4, 5), Axes((1,), (0, 2))),
    ("BTNH,NHD->BTD", (2, 3, 4, 5), (4, 5, 6), Axes((0, 1), (2,))),
    ("BTNH,HND->BTD", (2, 3, 4, 5), (5, 4, 6), Axes((1, 0), (2,))),
    ("BSD,CKDH->CBSKH", (2, 3, 4), (2, 3, 4, 5), Axes((2,), (1, 3), (0,))),
    ("BSD,CKDH->CBSKH", (2, 3, 4), (2, 3, 4, 5), Axes((2,), (0, 1, 3))),
    ("BSD,SKDH->SBKH", (2, 3, 4), (3, 3, 4, 5), None),  # S is in both, and shapes do not agree: see below
    ("BTF,NHF->BTNH", (2, 3, 4), (2, 5, 4), Axes((2,), (0, 1))),
    ("F,NHF->NH", (4,), (2, 5, 4), Axes((2,), (0, 1))),
    ("ebd,edf->ebf", (2, 3, 4), (2, 4, 5), Axes((1,), (2,), (0,))),
    ("bed,edf->bef", (3, 2, 4), (2, 4, 5), Axes((1,), (2,), (0,))),
    ("gecd,edf->gecf", (2, 3, 2, 4), (3, 4, 5), Axes((1,), (2,), (0,))),
    ("BD,DF->FB", (2, 4), (4, 5), W2),
    ("BF,DF->BD", (2, 5), (4, 5), W2),  # transposed use
    ("BTNH,DNH->BTD", (2, 3, 2, 5), (4, 2, 5), Axes((0,), (1, 2))),  # transposed use
    ("ebf,edf->ebd", (2, 3, 5), (2, 4, 5), Axes((1,), (2,), (0,))),  # transposed, with experts
    ("BTD,KDH->BTKH", (2, 3, 4), (1, 4, 5), Axes((1,), (0, 2))),  # one kv head
    ("BTD,KDH->BTKH", (2, 3, 4), (1, 4, 5), Axes((1,), (2,), (0,))),  # one fused part
    ("BTD,DH->BTH", (2, 3, 1), (1, 5), W2),
    ("BTD,DH->BTH", (2, 3, 4), (4, 1), W2),
    ("ebd,edf->ebf", (1, 3, 4), (1, 4, 5), Axes((1,), (2,), (0,))),  # one expert
]


@pytest.mark.parametrize(("string", "x", "w", "axes"), [e for e in EINSUMS if e[3] is not None])
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(string: str, x: tuple[int, ...], w: tuple[int, ...], axes: Axes, swapped: bool) -> None:
    left, right = string.split("->")
    flipped = ",".join(reversed(left.split(","))) + "->" + right

    def f(w: Any, x: Any) -> Any:
        return jnp.einsum(flipped, w, x) if swapped else jnp.einsum(string, x, w)

    check(f, array(3, *w), axes, array(4, *x))
