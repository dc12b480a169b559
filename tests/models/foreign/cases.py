"""Small sites of each dialect, with what they compute written out by hand: the delta, and PyTorch's weights.

Shapes are those that the libraries make (the real ones are beside this file where they install); no size is
another's multiple where it could be, so that a swapped axis does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxadapt import KeyMap, Weight

D, F, N, K, H, L, E, R = 10, 14, 4, 2, 3, 5, 6, 7
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One site.

    Args:
        base: `{path: shape}` of its base leaf, as its library has it; `line` the family's line for it.
        a, b: paths and shapes of the two arrays.
        delta: `(a, b) -> delta W`, in the base leaf's layout, without the scale.
        torch: `delta -> {module: (out, in)}`.
        shared: whether one of the arrays serves several modules.
        leaf: the base leaf in the family's words, where they differ from the tree's.
    """

    dialect: str
    name: str
    line: Weight
    base: tuple[str, tuple[int, ...]]
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]
    delta: Callable[[Array, Array], Array]
    torch: Callable[[Array], dict[str, Array]]
    shared: bool = False
    leaf: str = ""

    def __str__(self) -> str:
        return f"{self.dialect}-{self.name}"

    @property
    def table(self) -> KeyMap:
        return KeyMap("case", (self.line,))

    def tree(self, seed: int = 0, base: bool = True, rank: int = R, dtype: str = "float32") -> dict[str, Any]:
        """The tree as its library would have it, with random values."""
        rng = np.random.RandomState(seed)
        leaves = {
            path: rng.standard_normal([rank if size == R else size for size in shape]).astype(dtype)
            for path, shape in (self.base, self.a, self.b)
        }
        if not base:
            del leaves[self.base[0]]
        return nest(leaves)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return out


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        out |= flat(node, f"{path}.") if isinstance(node, dict) else {path: node}
    return out


def one(name: str, f: Callable[[Array], Array]) -> Callable[[Array], dict[str, Array]]:
    return lambda w: {name: f(w)}


def many(name: str, count: int, f: Callable[[Array, int], Array]) -> Callable[[Array], dict[str, Array]]:
    return lambda w: {name.format(i): f(w, i) for i in range(count)}


def ein(equation: str) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.einsum(equation, a, b)


Q = Weight("q.kernel", "m.q.weight", "d n h -> (n h) d")
O = Weight("o.kernel", "m.o.weight", "n h d -> d (n h)")
DENSE = Weight("up.kernel", "m.up.weight", "i o -> o i")
KV = Weight("kv.w", "m.{p}.weight", "{p} k d h -> (k h) d", p=("k", "v"))
GATE = Weight("gating_einsum", "m.{p}.weight", "{p} f d -> f d", p=("gate", "up"))
GATE_T = Weight("gating_einsum", "m.{p}.weight", "{p} d f -> f d", p=("gate", "up"))
EXPERTS = Weight("e.w", "m.experts.{e}.up.weight", "{e} d f -> f d")


def q_torch(w: Array) -> dict[str, Array]:
    return {"m.q": w.reshape(D, N * H).T}


def o_torch(w: Array) -> dict[str, Array]:
    return {"m.o": w.reshape(N * H, D).T}


def kv_torch(w: Array) -> dict[str, Array]:
    return {f"m.{p}": np.stack([w[i, k, :, h] for k in range(K) for h in range(H)]) for i, p in enumerate("kv")}


def experts_torch(w: Array) -> dict[str, Array]:
    return {f"m.experts.{e}.up": w[e].T for e in range(E)}


def scanned(line: Weight, axis: int) -> Weight:
    return Weight("{l}." + line.leaf, line.key.replace("m.", "m.{l}."), line.pattern).scanned(axis)


def layers(torch: Callable[[Array], dict[str, Array]], axis: int) -> Callable[[Array], dict[str, Array]]:
    def f(w: Array) -> dict[str, Array]:
        each = [torch(np.take(w, layer, axis)) for layer in range(L)]
        return {k.replace("m.", f"m.{layer}."): x for layer, found in enumerate(each) for k, x in found.items()}

    return f


def per_layer(delta: Callable[[Array, Array], Array], axis: int) -> Callable[[Array, Array], Array]:
    """What each layer computes, stacked where the base weight has its layers."""
    return lambda a, b: np.stack([delta(np.take(a, layer, axis), np.take(b, layer, axis)) for layer in range(L)], axis)


def at(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], L, *shape[axis:])


# ---- Qwix ------------------------------------------------------------------------------------------------


def qwix(name: str, line: Weight, shape: tuple[int, ...], a: Any, b: Any, delta: Any, torch: Any, **more: Any) -> Case:
    leaf = line.leaf
    return Case("qwix", name, line, (leaf, shape), (f"{leaf}_lora_a", a), (f"{leaf}_lora_b", b), delta, torch, **more)


def flat_q(a: Array, b: Array) -> Array:
    return (a @ b).reshape(D, N, H)


def flat_o(a: Array, b: Array) -> Array:
    return (a @ b).reshape(N, H, D)


QWIX = [
    qwix("dense", DENSE, (D, F), (D, R), (R, F), ein("ir,ro->io"), one("m.up", lambda w: w.T)),
    qwix("dot_general-q", Q, (D, N, H), (D, R), (R, N * H), flat_q, q_torch),
    qwix("dot_general-o", O, (N, H, D), (N * H, R), (R, D), flat_o, o_torch),
    qwix("einsum-q", Q, (D, N, H), (D, R), (R, N, H), ein("dr,rnh->dnh"), q_torch),
    qwix("einsum-o", O, (N, H, D), (N, H, R), (R, D), ein("nhr,rd->nhd"), o_torch),
    qwix("einsum-kv", KV, (2, K, D, H), (D, R), (R, 2, K, H), ein("dr,rpkh->pkdh"), kv_torch, shared=True),
    qwix("einsum-experts", EXPERTS, (E, D, F), (E, D, R), (R, F), ein("edr,rf->edf"), experts_torch, shared=True),
    qwix("vmap-experts", EXPERTS, (E, D, F), (E, D, R), (E, R, F), ein("edr,erf->edf"), experts_torch),
    *(
        qwix(
            f"scan{axis}-dense", scanned(DENSE, axis), at((D, F), axis), at((D, R), axis), at((R, F), axis),
            per_layer(ein("ir,ro->io"), axis), layers(one("m.up", lambda w: w.T), axis),
        )
        for axis in (0, 1, 2)
    ),
    *(
        qwix(
            f"scan{axis}-dot_general-o", scanned(O, axis), at((N, H, D), axis), at((N * H, R), axis), at((R, D), axis),
            per_layer(flat_o, axis), layers(o_torch, axis),
        )
        for axis in (0, 1)
    ),
    qwix(
        "scan1-einsum-q", scanned(Q, 1), at((D, N, H), 1), at((D, R), 1), at((R, N, H), 1),
        per_layer(ein("dr,rnh->dnh"), 1), layers(q_torch, 1),
    ),
]  # fmt: skip

# ---- gemma -----------------------------------------------------------------------------------------------


def gemma(
    name: str, line: Weight, shape: tuple[int, ...], at: str, a: Any, b: Any, delta: Any, torch: Any, **more: Any
) -> Case:
    return Case("gemma", name, line, (line.leaf, shape), (f"{at}lora.a", a), (f"{at}lora.b", b), delta, torch, **more)


GEMMA_Q = Weight("q.w", "m.q.weight", "n d h -> (n h) d")
GEMMA_O = Weight("o.w", "m.o.weight", "n h d -> d (n h)")


def gates_torch(w: Array) -> dict[str, Array]:
    return {"m.gate": w[0], "m.up": w[1]}


GEMMA = [
    gemma("q", GEMMA_Q, (N, D, H), "q._LoRAEinsum_0.", (D, R), (R, N, H), ein("dr,rnh->ndh"),
          one("m.q", lambda w: w.transpose(0, 2, 1).reshape(N * H, D))),
    gemma("kv", KV, (2, K, D, H), "kv._LoRAEinsum_0.", (D, R), (R, 2, K, H), ein("dr,rpkh->pkdh"), kv_torch,
          shared=True),
    gemma("o", GEMMA_O, (N, H, D), "o._LoRAEinsum_0.", (N, H, R), (R, D), ein("nhr,rd->nhd"), o_torch),
    gemma("gate", GATE, (2, F, D), "_LoRAEinsum_gating_einsum.", (D, R), (R, 2, F), ein("dr,rpf->pfd"), gates_torch,
          shared=True),
    gemma("gate-transposed", GATE_T, (2, D, F), "_LoRAEinsum_gating_einsum.", (D, R), (R, 2, F), ein("dr,rpf->pdf"),
          lambda w: gates_torch(w.transpose(0, 2, 1)), shared=True),
    gemma("linear", Weight("mlp.linear", "m.down.weight", "f d -> d f"), (F, D), "mlp._LoRAEinsum_linear.", (F, R),
          (R, D), ein("fr,rd->fd"), one("m.down", lambda w: w.T)),
    gemma("dense", DENSE, (D, F), "up.", (D, R), (R, F), ein("ir,ro->io"), one("m.up", lambda w: w.T)),
    gemma("dense-general", Q, (D, N, H), "q.", (D, R), (R, N, H), ein("dr,rnh->dnh"), q_torch),
]  # fmt: skip

# ---- Flax ------------------------------------------------------------------------------------------------

FLAX = [
    Case("nnx.LoRA", "wrapper", DENSE, ("up.base_module.kernel", (D, F)), ("up.lora_a", (D, R)), ("up.lora_b", (R, F)),
         ein("ir,ro->io"), one("m.up", lambda w: w.T), leaf="up.kernel"),
    Case("nnx.LoRA", "LoRALinear", DENSE, ("up.kernel", (D, F)), ("up.lora.lora_a", (D, R)),
         ("up.lora.lora_b", (R, F)), ein("ir,ro->io"), one("m.up", lambda w: w.T)),
]  # fmt: skip

# ---- recorded: MaxText 0.2.5, Levanter 1.1 with haliax 1.3, lorax 0.3.1 ------------------------------------

MAXTEXT = [
    Case("maxtext", "query", scanned(Q, 1), ("q.kernel", at((D, N, H), 1)), ("q.lora_a.kernel", (D, L, R)),
         ("q.lora_b.kernel", (R, L, N, H)), per_layer(ein("dr,rnh->dnh"), 1), layers(q_torch, 1)),
    Case("maxtext", "out", scanned(O, 1), ("o.kernel", at((N, H, D), 1)), ("o.lora_a.kernel", (N, L, H, R)),
         ("o.lora_b.kernel", (R, L, D)), per_layer(ein("nhr,rd->nhd"), 1), layers(o_torch, 1)),
    Case("maxtext", "unrolled-out", O, ("o.kernel", (N, H, D)), ("o.lora_a.kernel", (N, H, R)),
         ("o.lora_b.kernel", (R, D)), ein("nhr,rd->nhd"), o_torch),
]  # fmt: skip

LEVANTER_Q = Weight("{l}.q.weight", "m.{l}.q.weight", "k g h d -> (k g h) d").scanned(0)
LEVANTER_O = Weight("{l}.o.weight", "m.{l}.o.weight", "d n h -> d (n h)").scanned(0)
G = N // K


def levanter_q(w: Array) -> dict[str, Array]:
    return {f"m.{layer}.q": w[layer].reshape(N * H, D) for layer in range(L)}


def levanter_o(w: Array) -> dict[str, Array]:
    return {f"m.{layer}.o": w[layer].reshape(D, N * H) for layer in range(L)}


LEVANTER = [
    Case("levanter", "q", LEVANTER_Q, ("q.wrapped.weight", (L, K, G, H, D)), ("q.lora.lora_A.weight", (L, R, D)),
         ("q.lora.lora_B.weight", (L, K, G, H, R)), ein("lrd,lkghr->lkghd"), levanter_q, leaf="q.weight"),
    Case("levanter", "o", LEVANTER_O, ("o.wrapped.weight", (L, D, N, H)), ("o.lora.lora_A.weight", (L, R, N, H)),
         ("o.lora.lora_B.weight", (L, D, R)), ein("lrnh,ldr->ldnh"), levanter_o, leaf="o.weight"),
]  # fmt: skip

# (Here under the names that the tree is read by; `test_lorax.py` has the nodes themselves.)
LORAX = [
    Case("lorax", "kernel", DENSE, ("up.kernel.LoraWeight.w", (D, F)), ("up.kernel.LoraWeight.b", (D, R)),
         ("up.kernel.LoraWeight.a", (R, F)), ein("ir,ro->io"), one("m.up", lambda w: w.T), leaf="up.kernel"),
    Case("lorax", "weight", Weight("up.weight", "m.up.weight", "o i -> o i"), ("up.weight.LoraWeight.w", (F, D)),
         ("up.weight.LoraWeight.a", (R, D)), ("up.weight.LoraWeight.b", (F, R)), ein("ri,or->oi"),
         one("m.up", lambda w: w), leaf="up.weight"),
]  # fmt: skip

KERAS = [  # (queries, keys and values, whose heads have an A each, are in `test_real.py`)
    Case("keras", "dense", DENSE, ("up.kernel", (D, F)), ("up.lora_kernel_a", (D, R)), ("up.lora_kernel_b", (R, F)),
         ein("ir,ro->io"), one("m.up", lambda w: w.T)),
    Case("keras", "out", O, ("o.kernel", (N, H, D)), ("o.lora_kernel_a", (N, H, R)), ("o.lora_kernel_b", (R, D)),
         ein("nhr,rd->nhd"), o_torch),
]  # fmt: skip

CASES: list[Case] = [*QWIX, *GEMMA, *FLAX, *MAXTEXT, *LEVANTER, *LORAX, *KERAS]
