"""Random entries of a keymap with PEFT's files for them, and in numpy what PEFT makes of each: for property tests.

Nothing here uses the library's layouts: a file tensor is reshaped to PyTorch's axes and transposed to the leaf's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

import jaxadapt

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf called "w" and its modules in PyTorch.

    Attributes:
        left: the names of the leaf's axes; one in braces has a module for each index; "(c p)" is one axis of two.
        right: PyTorch's axes, as groups of names.
        sizes: the size of each name.
        modules: `{index over the braced axes: module}`.
        targets: the modules' last names that the adapter has.
        kind: see `Weight`.
    """

    left: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]
    sizes: dict[str, int]
    modules: dict[tuple[int, ...], str]
    targets: tuple[str, ...]
    keymap: jaxadapt.KeyMap
    kind: str = "linear"
    turned: bool = False
    factor: float = 1.0

    @property
    def braced(self) -> tuple[str, ...]:
        return tuple(name for name in self.left if name.startswith("{"))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[n] for n in name.strip("()").split()) for name in self.left)

    def size(self, group: tuple[str, ...]) -> int:
        return math.prod(self.sizes[n] for n in group)

    def to_leaf(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """The leaf from `{module: PyTorch's weight}`."""
        leaf = np.zeros(self.shape, "float32")
        plain = [n for name in self.left if not name.startswith("{") for n in name.strip("()").split()]
        flat = [n for group in self.right for n in group]
        for index, module in self.modules.items():
            at = dict(zip(self.braced, index, strict=True))
            place = tuple(at.get(name, slice(None)) for name in self.left)
            block = tensors[module].reshape([self.sizes[n] for n in flat]).transpose([flat.index(n) for n in plain])
            leaf[place] = block.reshape(leaf[place].shape) * self.factor
        return leaf

    def adapted(self) -> list[str]:
        return [name for name in self.modules.values() if name.rpartition(".")[2] in self.targets]


@st.composite
def entries(draw: Any, sizes: Callable[[int], st.SearchStrategy[int]] = lambda _: st.integers(1, 3)) -> Entry:
    """Stacked, fused, transposed, interleaved, scaled and turned weights; experts, embeddings and convolutions."""
    kind = draw(st.sampled_from(["linear"] * 5 + ["experts", "embedding", "conv"]))
    if kind == "conv":
        ins, outs, window = ["c"], ["o"], ["x", "y"]
    else:
        ins, outs, window = draw(st.sampled_from([["i"], ["n", "h"]])), draw(st.sampled_from([["o"], ["m", "k"]])), []
    if kind == "embedding":
        ins, outs = ["v"], ["d"]
    if kind == "experts":
        ins, outs = ["i"], ["o"]
    split = kind == "linear" and len(outs) == 1 and draw(st.booleans())
    named_outs = ["(c p)"] if split else outs
    outs = ["c", "p"] if split else outs
    stacked = ["{l}"] if kind != "experts" and draw(st.booleans()) else []
    experts = ["{e}"] if kind == "linear" and draw(st.integers(0, 3)) == 0 else []
    parts = draw(st.lists(st.sampled_from("qkv"), min_size=2, max_size=3, unique=True)) if kind == "linear" else []
    parts = parts if not experts and draw(st.booleans()) else []
    left = list(draw(st.permutations(ins + window + named_outs + (["{z}"] if parts else []) + experts)))
    if kind == "embedding":
        left = ["v", "d"]
    if kind == "experts":
        left = ["e", *left]
    if stacked:
        left.insert(draw(st.integers(0, 1)), "{l}")
    turned = kind == "linear" and draw(st.integers(0, 4)) == 0
    out_group, in_group = tuple(draw(st.permutations(outs))), tuple(draw(st.permutations(ins)))
    right = [in_group, out_group] if turned or kind == "embedding" else [out_group, in_group]
    right = [("e",), *right] if kind == "experts" else [*right, *((n,) for n in window)]
    names = dict.fromkeys([*ins, *outs, *window, *stacked, *experts, *(["e"] if kind == "experts" else [])])
    size = {name: draw(sizes(i)) for i, name in enumerate(names)} | ({"p": 2} if split else {})
    size |= {"{z}": len(parts)} if parts else {}
    scale = ("c" if split else outs[0], -0.5) if kind == "linear" and draw(st.integers(0, 3)) == 0 else None
    over: dict[str, Any] = {"z": tuple(parts)} if parts else {}
    over |= {"p": 2} if split else {}
    key = ".".join(["h", *(["{l}"] if stacked else []), *(["{e}"] if experts else []), "{z}" if parts else "q"])
    pattern = f"{' '.join(left)} -> {' '.join('(' + ' '.join(g) + ')' for g in right)}"
    weight = jaxadapt.Weight(
        "w", key if kind == "experts" else f"{key}.weight", pattern, fan_in_fan_out=turned, scale=scale,
        kind=None if kind == "linear" else kind, **over,
    )  # fmt: skip
    braced = [name for name in left if name.startswith("{")]
    modules = {}
    for index in itertools.product(*(range(size[name]) for name in braced)):
        text = {name[1:-1]: parts[i] if name == "{z}" else str(i) for name, i in zip(braced, index, strict=True)}
        modules[index] = key.format(**text)
    targets = tuple(draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))) if parts else ("q",)
    factor = 1.0 if scale is None else size[scale[0]] ** -0.5
    table = jaxadapt.KeyMap("t", (weight,))
    return Entry(tuple(left), tuple(right), size, modules, targets, table, kind, turned, factor)


@dataclasses.dataclass(frozen=True)
class Case:
    """An entry, PEFT's file of an adapter on it, and the change that PEFT's formula makes to a module's weight."""

    entry: Entry
    config: Any
    tensors: dict[str, np.ndarray]
    change: Callable[[str, np.ndarray], np.ndarray]


@st.composite
def lora_cases(draw: Any, entry: Entry) -> Case:
    """LoRA with ranks and alphas of each module's own."""
    experts = entry.kind == "experts"
    modules = entry.adapted()
    one_rank = experts or draw(st.booleans())
    r, alpha, rslora = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.booleans())
    ranks = {m: r if one_rank else draw(st.integers(1, 3)) for m in modules}
    alphas = {m: draw(st.integers(1, 5)) if draw(st.booleans()) and not experts else alpha for m in modules}
    where: dict[str, Any] = {"target_parameters": ["h.q"]} if experts else {"target_modules": list(entry.targets)}
    config = jaxadapt.LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=rslora, **where,
        rank_pattern={m: n for m, n in ranks.items() if n != r},
        alpha_pattern={m: n for m, n in alphas.items() if n != alpha},
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    right = list(entry.right)
    count = entry.sizes["e"] if experts else 1
    right = right[1:] if experts else right
    swapped = entry.turned or entry.kind == "embedding"
    out_size, in_size = (entry.size(g) for g in ((right[1], right[0]) if swapped else right[:2]))
    window = [entry.size(g) for g in right[2:]]
    tensors: dict[str, np.ndarray] = {}
    deltas: dict[str, np.ndarray] = {}
    for module in modules:
        n = ranks[module]
        a = rng.standard_normal((n * count, in_size, *window)).astype("float32")
        b = rng.standard_normal((out_size, n * count, *(1 for _ in window))).astype("float32")
        scale = alphas[module] / (math.sqrt(n) if rslora else n)
        if experts:  # A's rows by expert, B's columns by rank first
            delta = np.einsum("ore,eri->eoi", b.reshape(out_size, n, count), a.reshape(count, n, in_size))
        elif window:
            delta = np.einsum("or,rcxy->ocxy", b[:, :, 0, 0], a)
        else:
            delta = (b @ a).T if swapped else b @ a
        deltas[module] = scale * delta
        owner = module.rpartition(".")[0] if experts else module
        ends = (
            ("lora_embedding_A", "lora_embedding_B")
            if entry.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{PREFIX}{owner}.{ends[0]}": a, f"{PREFIX}{owner}.{ends[1]}": b}
    return Case(entry, config, tensors, lambda module, w: w + deltas[module].reshape(w.shape))


@st.composite
def ia3_cases(draw: Any, entry: Entry) -> Case:
    """IA3 on the outputs, or on the inputs (feedforward)."""
    feedforward = draw(st.booleans())
    config = jaxadapt.IA3Config(
        target_modules=list(entry.targets), feedforward_modules=list(entry.targets) if feedforward else []
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    out_size, in_size = (entry.size(g) for g in (entry.right[::-1] if entry.turned else entry.right))
    shape = (1, in_size) if feedforward else (out_size, 1)
    vectors = {m: (1 + rng.standard_normal(shape)).astype("float32") for m in entry.adapted()}
    tensors = {f"{PREFIX}{m}.ia3_l": x for m, x in vectors.items()}

    def change(module: str, w: np.ndarray) -> np.ndarray:
        return w * (vectors[module].T if entry.turned else vectors[module])

    return Case(entry, config, tensors, change)


KINDS = {"LORA": ("linear", "experts", "embedding", "conv"), "IA3": ("linear",)}
CASES: dict[str, Callable[[Entry], st.SearchStrategy[Case]]] = {"LORA": lora_cases, "IA3": ia3_cases}


@st.composite
def cases(draw: Any, peft_type: str, **options: Any) -> Case:
    """A case of one method, on a kind of weight that it adapts."""
    kinds = KINDS[peft_type]
    return draw(CASES[peft_type](draw(entries(**options).filter(lambda entry: entry.kind in kinds))))
