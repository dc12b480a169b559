"""Size of the change that an adapter makes to each weight, and the difference of two adapters.

The change of LoRA is ΔW = s·B·A, which is never computed; most other methods have their own `Method.measure_change`.
With B = Qb·Rb and Aᵀ = Qa·Ra, the singular values of ΔW are those of the small matrix s·Rb·Raᵀ. The effective rank is
exp of the entropy of the normalized singular values (Roy and Vetterli 2007): 1 to r, which is r equal directions.

Norms and products of two adapters follow from small Gram matrices, as ⟨B₁·A₁, B₂·A₂⟩ = tr(B₁ᵀB₂ · A₂A₁ᵀ), and
‖ΔW₁ − ΔW₂‖² = ‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩. Two steps of one run, whose factors are nearly equal, would lose their
digits in this sum. With equal ranks, ΔW₁ − ΔW₂ = (B₁ − B₂)·A₁ + B₂·(A₁ − A₂) keeps them. The angles between two
subspaces have the cosines σ(Q₁ᵀQ₂), with orthonormal bases Q (Björck and Golub 1973), which follow from the Gram
matrices as well. These are in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.configs import matching
from jaxadapt.configs.base import Change, Config, effective_rank
from jaxadapt.configs.full_rank import IA3Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import (
    AttachError,
    ConfigError,
    MismatchError,
    Progress,
    bullets,
    byte_counter,
    escape_text,
    raise_listed,
    reporter,
)
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging.pairs import PairKeys, read_pairs

# ---------------------------------------------------------------- norms


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm of one module, or of one parameter in `target_parameters` with all its experts.

    Attributes:
        module: the path of the module or parameter.
        norm, effective_rank, rank, scale: as in `Change`; the effective rank is averaged over experts.
    """

    module: str
    norm: float
    effective_rank: float | None = None
    rank: int | None = None
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms of all modules of an adapter.

    Attributes:
        what: a description of the numbers, such as "‖ΔW‖ = ‖s·B·A‖".
        modules: the norms, one per module.
        left_out: the modules and tensors whose change cannot be computed from the file.
        not_finite: the modules that hold a NaN or an infinity.
    """

    what: str
    modules: tuple[Norm, ...]
    left_out: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    def grid(self) -> Grid[Norm]:
        """Return the norms by layer and module.

        Modules of several experts share a cell, with the root of the sum of squared norms and the mean effective rank.

        >>> grid = Norms("", (Norm("model.layers.0.q_proj", 3.0), Norm("model.layers.1.q_proj", 4.0))).grid()
        >>> grid.rows, grid.columns, grid.values("norm")
        (('0', '1'), ('q_proj',), [[3.0], [4.0]])
        """
        return make_grid(self.modules, _combine_norms)

    def to_dict(self) -> dict[str, Any]:
        """Return the norms as plain JSON values."""
        return {
            "what": self.what,
            "modules": [dataclasses.asdict(norm) for norm in self.modules],
            "left_out": list(self.left_out),
            "not_finite": list(self.not_finite),
        }


def measure_norms(tensors: PeftTensors) -> Norms:
    """Compute the Frobenius norm of the change of each module's weight, in float64, and its effective rank.

    Raises `ConfigError` for methods whose change depends on the base.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=1, lora_alpha=2, target_modules=["q"])
    >>> a, b = np.ones((1, 4)), np.ones((9, 1))
    >>> tensors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    >>> [norm.norm for norm in measure_norms(jaxadapt.PeftTensors(config, tensors)).modules]
    [12.0]
    """
    config = tensors.config
    what, measure = measure_of(config)
    if what is None:
        raise ConfigError(
            f"cannot compute norms for {config.peft_type}: the file alone does not determine the change of a weight,"
            " which depends on the base model. Compare the weights before and after jaxadapt.merge"
        )
    module_keys = pytorch.adapted_keys(tensors.tensors)
    norms: list[Norm] = []
    left_out: list[str] = []
    for module, keys in module_keys.items():
        arrays = {name: as_float64(tensors.tensors[key]) for name, key in keys.items()}
        module = pytorch.named_parameter(config, module)
        change = measure(module, arrays) if all(x.ndim and x.size for x in arrays.values()) else None
        if change is None:
            left_out.append(module)
        else:
            norms.append(Norm(module, **dataclasses.asdict(change)))
    owner = {
        key: pytorch.named_parameter(config, module) for module, keys in module_keys.items() for key in keys.values()
    }
    left_out += [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors if key not in owner]
    bad = [
        owner.get(key, key.removeprefix(PEFT_PREFIX))
        for key, x in tensors.tensors.items()
        if not np.isfinite(as_float64(x)).all()
    ]
    return Norms(what, tuple(norms), tuple(left_out), tuple(dict.fromkeys(bad)))


def measure_of(config: Config) -> tuple[str | None, Callable[[str, Mapping[str, Any]], Change | None]]:
    """Return a description of the norm, None if a file does not tell it, and the function that measures one module."""
    if isinstance(config, LoraConfig):
        what = "‖s·B·A‖, before DoRA's normalization" if config.use_dora else "‖ΔW‖ = ‖s·B·A‖"
        return what, functools.partial(_measure_lora, config)
    if isinstance(config, IA3Config):
        return "relative change, rms of l − 1", _measure_ia3
    from jaxadapt.methods.base import METHODS  # imports JAX, which the norms of LoRA and IA3 do not need

    if config.peft_type not in METHODS:
        return None, lambda module, arrays: None
    method = METHODS[config.peft_type]
    return method.describe_change(config), functools.partial(method.measure_change, config)


def _measure_ia3(module: str, arrays: Mapping[str, Any]) -> Change | None:
    return Change(float(((arrays["ia3_l"] - 1) ** 2).mean()) ** 0.5) if "ia3_l" in arrays else None


def _measure_lora(config: LoraConfig, module: str, arrays: Mapping[str, Any]) -> Change | None:
    """Return the size of s·B·A; None if the tensors are no two factors with a product."""
    shapes = {name: tuple(x.shape) for name, x in arrays.items()}
    if config.use_qalora or config.use_bdlora or not _has_change({name: name for name in arrays}, shapes):
        return None
    a, b, scale = _factors(config, module, arrays)
    if matching.is_parameter(config, module) and a.shape[1] % config.rank_of(module):
        return None
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # a diverged run, on which decompositions fail
        return Change(math.nan, None, a.shape[1], scale)
    inner, outer = (np.asarray(np.linalg.qr(x.swapaxes(1, 2), mode="r")) for x in (a, b))
    s = np.linalg.svd(outer @ inner.swapaxes(1, 2), compute_uv=False)
    return Change(abs(scale) * float(np.sqrt((s**2).sum())), sum(map(effective_rank, s)) / len(s), a.shape[1], scale)


def as_float64(x: Any) -> np.ndarray:
    """Return an array in float64."""
    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------- grid

_Cell = TypeVar("_Cell", Norm, "ModuleDifference")


@dataclasses.dataclass(frozen=True)
class Grid(Generic[_Cell]):
    """Measures by layer (rows) and by module within the layer (columns). Modules without an adapter have no cell."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], _Cell]

    def values(self, name: str) -> list[list[float | None]]:
        """Return one attribute of each cell, such as "norm", "effective_rank", "rank" or "scale" of a `Norm`."""
        return [
            [getattr(self.cells[r, c], name) if (r, c) in self.cells else None for c in self.columns] for r in self.rows
        ]

    def constant(self, name: str) -> float | None:
        """Return the value that all cells share; None if they differ or have none."""
        distinct = {getattr(cell, name) for cell in self.cells.values()}
        return next(iter(distinct)) if len(distinct) == 1 else None


def make_grid(measures: Sequence[_Cell], combine: Callable[[Sequence[_Cell]], _Cell]) -> Grid[_Cell]:
    """Return the grid of the measures of an adapter's modules; `combine` makes one of several experts'."""
    located = [(*_split_module(measure.module), measure) for measure in measures]
    stacks = list(dict.fromkeys(stack for stack, number, _, _ in located if number is not None))
    order = {stack: i for i, stack in enumerate(stacks)}
    located.sort(key=lambda item: (item[1] is None, order.get(item[0], 0), item[1] or 0))
    groups: dict[tuple[str, str], list[_Cell]] = {}
    for stack, number, label, measure in located:
        row = "–" if number is None else str(number) if len(stacks) == 1 else f"{stack}.{number}"
        groups.setdefault((row, label), []).append(measure)
    in_layers = {label for row, label in groups if row != "–"}
    labels = sorted(  # heads and embeddings, which are in no layer, come last
        dict.fromkeys(label for _, label in groups),
        key=lambda label: (label not in in_layers, pytorch.flow_position(label)),
    )
    short = _shorten_labels(labels)
    cells = {
        (row, short[label]): members[0] if len(members) == 1 else combine(members)
        for (row, label), members in groups.items()
    }
    return Grid(tuple(dict.fromkeys(row for row, _ in cells)), tuple(short[label] for label in labels), cells)


def _shorten_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return the shortest distinct ending of each label."""
    counts = Counter(ending for label in labels for ending in matching.path_suffixes(label))
    return {
        label: next((e for e in matching.path_suffixes(label) if counts[e] == 1 and e.partition(".")[0] != "*"), label)
        for label in labels
    }


def _split_module(module: str) -> tuple[str, int | None, str]:
    """Return the path of the layer stack of a module, its layer index, and its name in the layer."""
    parts = module.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) <= 18), None)
    if position is None:
        return "", None, module
    name = ".".join(parts[position + 1 :])
    return ".".join(parts[:position]), int(parts[position]), re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def number_text(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, large integers in full; "" for None.

    >>> number_text(2.1), number_text(0.00123456), number_text(123.4, 2), number_text(1e7), number_text(None)
    ('2.10', '0.00123', '123', '1.00e+07', '')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:#.{digits}g}".rstrip(".")


def _combine_norms(norms: Sequence[Norm]) -> Norm:
    """Combine the norms of the experts in one cell."""
    ranks = [n.effective_rank for n in norms if n.effective_rank is not None]
    return dataclasses.replace(
        norms[0],
        norm=math.sqrt(sum(n.norm**2 for n in norms)),
        effective_rank=sum(ranks) / len(ranks) if ranks else None,
        rank=max(n.rank or 0 for n in norms) or None,
    )


# ---------------------------------------------------------------- differences


class _Grams(NamedTuple):
    """XᵀX, XᵀY and YᵀY of each expert, in float64."""

    x: np.ndarray
    xy: np.ndarray
    y: np.ndarray


def _grams(x: np.ndarray, y: np.ndarray) -> _Grams:
    """Return the Gram matrices of the rows of two factors (experts, rows, n)."""
    columns = y.swapaxes(1, 2)
    return _Grams(x @ x.swapaxes(1, 2), x @ columns, y @ columns)


Factors = tuple[np.ndarray, np.ndarray, float]  # A (experts, r, in), Bᵀ (experts, r, out), in float64; the scale s


def _factors(config: Config, module: str, arrays: Mapping[str, Any]) -> Factors:
    """Return the factors of a module, in one memory layout, so that equal values have equal sums."""
    assert isinstance(config, LoraConfig)
    kind = "lora" if "lora_A" in arrays else "lora_embedding"
    pair = read_pairs(arrays, {module: PairKeys(f"{kind}_A", f"{kind}_B")}, config)[module]
    a, b = (np.array(x if x.ndim == 3 else x[None], float, order="C") for x in (pair.a, pair.b))
    if "lora_diag" in arrays:
        a *= as_float64(arrays["lora_diag"])[:, None]
    return a, b.swapaxes(1, 2), float(pair.scale)


def _compare_products(module: str, one: Factors, other: Factors) -> ModuleDifference:
    """Compare s₁·B₁·A₁ with s₂·B₂·A₂ of the same sizes and number of experts; the norms are over all experts."""
    a1, b1, s1 = one
    a2, b2, s2 = other
    b = _grams(b1, b2)
    a = _Grams(*(scale * gram for scale, gram in zip((s1 * s1, s1 * s2, s2 * s2), _grams(a1, a2), strict=True)))
    squares = [max(float((p * q).sum()), 0.0) for p, q in ((a.x, b.x), (a.y, b.y))]
    norms = math.sqrt(squares[0]), math.sqrt(squares[1])
    product = float((a.xy * b.xy).sum())
    square = squares[0] + squares[1] - 2 * product
    if a1.shape == a2.shape and square < _NEAR * (squares[0] + squares[1]):
        # ΔW₁ − ΔW₂ = F·A₁ + B₂·E, with F = B₁ − B₂, E = A₁ − A₂ and A₁ = A₂ + E
        e, f = _grams(s1 * a1 - s2 * a2, s2 * a2), _grams(b1 - b2, b2)
        square = float((f.x * a.x).sum() + 2 * (f.xy * (e.x + e.xy.swapaxes(1, 2))).sum() + (f.y * e.x).sum())
    return ModuleDifference(
        module,
        "LoRA",
        norms,
        distance=math.sqrt(max(square, 0.0)),
        cosine=_cosine(product, *norms),
        ranks=(a1.shape[1], a2.shape[1]),
        output_angles=_angles(b),
        input_angles=_angles(a),
    )


_NEAR = 1e-4
"""Ratio of the squared distance to the squared norms below which it is computed from the factors' differences."""
_SMALLEST = 1e-13
"""Ratio to the largest eigenvalue of a Gram matrix below which a direction counts as none; about 3e-7 of the factor."""
_WELL_CONDITIONED = 1e-3
"""Ratio of the diagonal of a Cholesky factor above which the angles follow from it to about 1e-10."""


def _angles(grams: _Grams) -> tuple[float, float] | None:
    """Return the smallest and largest principal angle over all experts, in degrees; None if a factor is zero."""
    if not all(np.isfinite(gram).all() for gram in grams):
        return None
    (one, ranks), (other, other_ranks) = _orthonormalize(grams.x), _orthonormalize(grams.y)
    shared = np.minimum(ranks, other_ranks)
    if not shared.all():
        return None
    cosines = np.linalg.svd(one.swapaxes(1, 2) @ grams.xy @ other, compute_uv=False)
    # A direction that is left out has the cosine 0, and so comes last.
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))[np.arange(cosines.shape[1]) < shared[:, None]]
    return float(angles.min()), float(angles.max())


def _orthonormalize(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return W with Wᵀ·XᵀX·W = 1 for each expert, with zeros for directions that X lacks, and the ranks of X."""
    with contextlib.suppress(np.linalg.LinAlgError):  # of a singular matrix, whose eigenvectors follow below
        factor = np.linalg.cholesky(gram)
        diagonal = factor.diagonal(axis1=1, axis2=2)
        if (diagonal.min(1) > _WELL_CONDITIONED * diagonal.max(1)).all():  # several times as fast
            return np.linalg.inv(factor).swapaxes(1, 2), np.full(len(gram), gram.shape[1])
    values, vectors = np.linalg.eigh(gram)
    is_kept = values > _SMALLEST * np.maximum(values[:, -1:], 0)
    return vectors * np.where(is_kept, 1 / np.sqrt(np.where(is_kept, values, 1)), 0)[:, None], is_kept.sum(1)


@dataclasses.dataclass(frozen=True)
class ModuleDifference:
    """The difference of one module, or of one tensor that has no other meaning.

    Attributes:
        module: the path of the module or parameter, or the key of the tensor.
        kind: "LoRA" (of ΔW = s·B·A), "IA3" (of l − 1) or "tensor" (of the stored values).
        norms: the Frobenius norms in both adapters.
        distance: the Frobenius norm of the difference.
        cosine: the cosine of the angle between the changes; NaN if one of them is zero.
        ranks: the ranks of LoRA; None for other kinds.
        output_angles, input_angles: the smallest and the largest principal angle, in degrees, between the spaces that
            the columns of B, and the rows of A, span; None for other kinds and for a zero factor.
    """

    module: str
    kind: str
    norms: tuple[float, float]
    distance: float
    cosine: float
    ranks: tuple[int, int] | None = None
    output_angles: tuple[float, float] | None = None
    input_angles: tuple[float, float] | None = None

    @property
    def relative(self) -> float:
        """The distance in units of the first adapter's norm: infinite if that is zero and the distance is not."""
        if self.norms[0]:
            return self.distance / self.norms[0]
        return math.inf if self.distance else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "relative": self.relative}


_NAMES = {"LoRA": "modules with LoRA", "IA3": "modules with IA3", "tensor": "other tensors"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two adapters; `str(difference)` lists it, without the numbers of each module.

    Attributes:
        settings: {field of the configuration: both values}, for the fields that differ.
        modules: the modules and tensors that both adapters have and can be compared.
        only: the modules and tensors that only the first, and only the second adapter has.
        other_shapes: those whose sizes differ, with both shapes.
    """

    settings: Mapping[str, tuple[Any, Any]]
    modules: tuple[ModuleDifference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    other_shapes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.is_equal:
            return "equal: the same settings, modules and values"
        settings = [
            f"{name}: {' and '.join(json.dumps(value, ensure_ascii=False) for value in pair)}"
            for name, pair in self.settings.items()
        ]
        lists = {
            "settings that differ": settings,
            "only in the first": self.only[0],
            "only in the second": self.only[1],
            "of other sizes": self.other_shapes,
        }
        texts = (f"{title}: {len(x)}\n{bullets(map(escape_text, x))}" for title, x in lists.items() if x)
        return "\n\n".join([*map(self._total_text, self.totals()), *texts])

    def _total_text(self, kind: str) -> str:
        """Return the lines about all modules of one kind."""
        total = self.totals()[kind]
        distances = [module.distance for module in self.modules if module.kind == kind]
        changed = sum(distance != 0 for distance in distances)
        unknown = sum(not math.isfinite(distance) for distance in distances)
        return (
            f"compared  {len(distances)} {_NAMES[kind]}; {changed or 'none'} of them differ"
            f"{f', {unknown} with a NaN or an infinity' if unknown else ''}\n"
            f"norms     {total.norms[0]:.4g} and {total.norms[1]:.4g}\n"
            f"distance  {total.relative:.4g} × the norm of the first\n"
            f"cosine    {total.cosine:.4g}"
        )

    @property
    def is_equal(self) -> bool:
        """True if the adapters compute the same: equal settings, modules and values."""
        return not (self.settings or any(self.only) or self.other_shapes) and all(
            module.distance == 0 for module in self.modules
        )

    def total(self, kind: str = "LoRA") -> ModuleDifference | None:
        """Return the difference over all modules of one kind together; None if there are none."""
        return self.totals().get(kind)

    def totals(self) -> dict[str, ModuleDifference]:
        """Return `{kind: the difference over all modules of the kind together}`."""
        kinds = dict.fromkeys(module.kind for module in self.modules)
        return {kind: combine_differences([m for m in self.modules if m.kind == kind]) for kind in kinds}

    def grid(self) -> Grid[ModuleDifference] | None:
        """Return the grid of the modules of one kind, LoRA if there are any; None if the adapters share no module."""
        members = modules_of_one_kind(self)
        return make_grid(members, combine_differences) if members else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "equal": self.is_equal,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "totals": {kind: total.to_dict() for kind, total in self.totals().items()},
            "modules": [module.to_dict() for module in self.modules],
            "only_first": list(self.only[0]),
            "only_second": list(self.only[1]),
            "other_shapes": list(self.other_shapes),
        }


def combine_differences(members: Sequence[ModuleDifference]) -> ModuleDifference:
    """Return the difference over several modules of one kind together."""
    norms = [math.sqrt(sum(m.norms[side] ** 2 for m in members)) for side in (0, 1)]
    products = sum(m.cosine * m.norms[0] * m.norms[1] for m in members if not math.isnan(m.cosine))
    distance = math.sqrt(sum(m.distance**2 for m in members))
    return ModuleDifference("all", members[0].kind, (norms[0], norms[1]), distance, _cosine(products, *norms))


def modules_of_one_kind(difference: Difference) -> list[ModuleDifference]:
    """Return the modules of LoRA, or else those of IA3, or else the other tensors."""
    by_kind = ([module for module in difference.modules if module.kind == kind] for kind in ("LoRA", "IA3", "tensor"))
    return next(filter(None, by_kind), [])


def _cosine(product: float, norm: float, other: float) -> float:
    """Return the cosine of the angle between two changes from their inner product; NaN if one is zero or not finite."""
    cosine = product / (norm * other) if norm and other else math.nan
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def diff(first: PeftTensors, second: PeftTensors, *, progress: Progress = None) -> Difference:
    """Compare two adapters: their settings, modules, and the change of each weight.

    Args:
        first, second: the adapters. Tensors may be read on demand, those of one module at a time.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("diff", bytes done, bytes in all).

    LoRA is compared by ΔW, because two runs with other seeds are alike only in ΔW, not in A and B. A distance between
    adapters of different ranks is exact to about 1e-8 of the norms. Other tensors are compared as they are.

    Raises `MismatchError` if the adapters are of different methods, `AttachError` if one is no `PeftTensors`.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
    >>> def adapter(a):
    ...     keys = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    ...     return jaxadapt.PeftTensors(config, dict(zip(keys, (np.array([a]), np.array([[2.0]])))))
    >>> found = diff(adapter([3.0, 0.0]), adapter([3.0, 4.0]))
    >>> found.modules[0].norms, found.modules[0].distance, found.modules[0].cosine
    ((6.0, 10.0), 8.0, 0.6)
    """
    raise_listed(
        AttachError,
        "diff: expected two PeftTensors, of jaxadapt.read(folder), found:",
        (type(each).__name__ for each in (first, second) if not isinstance(each, PeftTensors)),  # pyright: ignore[reportUnnecessaryIsInstance]
    )
    if first.config.peft_type != second.config.peft_type:
        raise MismatchError(
            f"cannot compare {first.source} with {second.source}: their methods are {first.config.peft_type} and"
            f" {second.config.peft_type}; compare adapters of one method"
        )
    ours, theirs = _tensors_by_module(first), _tensors_by_module(second)
    found: list[ModuleDifference | str] = []
    with reporter(progress) as report:
        sources = as_source(first.tensors), as_source(second.tensors)
        count = byte_counter(report, "diff", sum(source.nbytes(key) for source in sources for key in source))
        for name in (name for name in ours if name in theirs):
            result, nbytes = _compare(name, (first, second), (ours[name], theirs[name]))
            found.append(result)
            count(nbytes)
    return Difference(
        _changed_settings(first.config, second.config),
        tuple(each for each in found if isinstance(each, ModuleDifference)),
        (_without(ours, theirs), _without(theirs, ours)),
        tuple(each for each in found if isinstance(each, str)),
    )


def _changed_settings(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Return {field: both values} of the fields that differ, with lists of names sorted.

    PEFT holds names in sets, which have a random order in its file.
    """
    ours, theirs = (
        {k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for k, v in values.items()}
        for values in (first.to_dict(), second.to_dict())
    )
    return {
        name: (ours.get(name), theirs.get(name))
        for name in first.changed_keys(second)
        if not isinstance(ours.get(name), list) or ours[name] != theirs.get(name)
    }


_COMPARED = "lora_A", "lora_B", "lora_embedding", "lora_diag", "ia3_l"
_TensorKeys = Mapping[str, str]
"""{tensor: key} of a module with LoRA's factors or IA3's vector; {"": key} of another tensor."""


def _tensors_by_module(tensors: PeftTensors) -> dict[str, _TensorKeys]:
    """Return the tensors of an adapter by module, the parameters of experts by their names; other tensors by key."""
    names: dict[str, dict[str, str]] = {}
    adapted = pytorch.adapted_keys(tensors.tensors) if tensors.config.peft_type in ("LORA", "IA3") else {}
    for module, keys in adapted.items():
        used = {name: key for name, key in keys.items() if name.startswith(_COMPARED)}
        names.setdefault(pytorch.named_parameter(tensors.config, module), {}).update(used)
    shapes = as_source(tensors.tensors).shapes
    modules: dict[str, _TensorKeys] = {module: keys for module, keys in names.items() if _has_change(keys, shapes)}
    in_modules = {key for keys in modules.values() for key in keys.values()}
    return modules | {key: {"": key} for key in tensors.tensors if key not in in_modules}


def _without(ours: Mapping[str, _TensorKeys], theirs: Mapping[str, _TensorKeys]) -> tuple[str, ...]:
    """Return the modules and tensors of one adapter that the other lacks."""
    return tuple(
        name.removeprefix(PEFT_PREFIX) if "" in keys else name for name, keys in ours.items() if name not in theirs
    )


def _has_change(keys: _TensorKeys, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True for IA3's vector, and for two factors with a product; a convolution with groups has none."""
    for kind in ("lora", "lora_embedding"):
        if {f"{kind}_A", f"{kind}_B"} <= keys.keys():
            a, b = (shapes[keys[f"{kind}_{side}"]] for side in "AB")
            diagonal = shapes[keys["lora_diag"]] if "lora_diag" in keys else a[:1]
            return len(a) > 1 < len(b) and 0 not in a + b and a[:1] == diagonal == b[1:2] == (math.prod(b[1:]),)
    return "ia3_l" in keys


def _compare(
    name: str, adapters: tuple[PeftTensors, PeftTensors], keys: tuple[_TensorKeys, _TensorKeys]
) -> tuple[ModuleDifference | str, int]:
    """Return the difference of a module or tensor, or text on two shapes that differ, and the number of bytes read."""
    x, y = (
        {tensor: np.asarray(adapter.tensors[key]) for tensor, key in own.items()}
        for adapter, own in zip(adapters, keys, strict=True)
    )
    nbytes = sum(array.nbytes for arrays in (x, y) for array in arrays.values())
    if "" in x:
        return _compare_tensor(name.removeprefix(PEFT_PREFIX), as_float64(x[""]), as_float64(y[""]), "tensor"), nbytes
    if "ia3_l" in x:
        return _compare_tensor(name, as_float64(x["ia3_l"]) - 1, as_float64(y["ia3_l"]) - 1, "IA3"), nbytes
    one, other = (_factors(adapter.config, name, own) for adapter, own in zip(adapters, (x, y), strict=True))
    sizes = [(b.shape[2], a.shape[2]) for a, b, _ in (one, other)]
    if sizes[0] != sizes[1] or len(one[0]) != len(other[0]):
        return f"{name}: {list(sizes[0])} and {list(sizes[1])}", nbytes
    return _compare_products(name, one, other), nbytes


def _compare_tensor(name: str, x: np.ndarray, y: np.ndarray, kind: str) -> ModuleDifference | str:
    if x.shape != y.shape:
        return f"{name}: {list(x.shape)} and {list(y.shape)}"
    norms = math.sqrt(float((x * x).sum())), math.sqrt(float((y * y).sum()))
    distance = math.sqrt(float(((x - y) ** 2).sum()))
    return ModuleDifference(name, kind, norms, distance, _cosine(float((x * y).sum()), *norms))
