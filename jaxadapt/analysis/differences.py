"""The difference of two adapters: configurations, modules, and how far the changes of each weight are apart.

LoRA is compared by the products ΔW = s·B·A of the factors.

ΔW is never computed. Norms and products follow from small Gram matrices, as
⟨B₁·A₁, B₂·A₂⟩ = tr(B₁ᵀB₂ · A₂A₁ᵀ), and ‖ΔW₁ − ΔW₂‖² = ‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩. Two steps of one run, whose
factors are nearly equal, would lose their digits in this sum. With the scales in the As and equal ranks,
ΔW₁ − ΔW₂ = (B₁ − B₂)·A₁ + B₂·(A₁ − A₂) keeps them. The angles between two subspaces have the cosines σ(Q₁ᵀQ₂), with
orthonormal bases Q (Björck and Golub 1973), which follow from the Gram matrices as well. These are in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.analysis.norms import Grid, HeatMap, as_float64, draw_maps, make_grid, named_parameter
from jaxadapt.arrays.tensor_source import TensorSource, as_source
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import AdapterError, MismatchError, bullets
from jaxadapt.core.progress import Progress, byte_counter, reporter
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging.pairs import PairKeys, read_pairs
from jaxadapt.storage import local_files

# ---------------------------------------------------------------- low rank difference


class Factors(NamedTuple):
    """s·A and B of a module, or of each of its experts, in the dtypes of the file."""

    a: np.ndarray
    """(experts, r, in)"""
    b: np.ndarray
    """(experts, out, r)"""
    scale: np.ndarray
    """(experts, r, 1), float64; the rows of A are multiplied by it."""


_NEAR = 1e-4
"""Ratio of the squared distance to the squared norms below which it is computed from the factors' differences."""


class _Grams(NamedTuple):
    """XᵀX, XᵀY and YᵀY of each expert, in float64."""

    x: np.ndarray
    xy: np.ndarray
    y: np.ndarray


def _grams(
    x: np.ndarray, y: np.ndarray, s: np.ndarray | float = 1.0, t: np.ndarray | float = 1.0, differ: bool = False
) -> _Grams:
    """Return the Gram matrices of the rows of s·x and t·y; those of s·x − t·y and t·y if `differ`.

    Args:
        x, y: (experts, rows, n), in any memory layout.
        s, t: (experts, rows, 1), or a number.
        differ: True to take the difference for s·x. It is formed before it is multiplied, so it keeps its digits.
    """
    # In one memory layout, so that equal values have equal sums.
    x, y = (np.array(factor, np.float64, order="C") * scale for factor, scale in ((x, s), (y, t)))
    x = x - y if differ else x
    columns = y.swapaxes(1, 2)
    return _Grams(x @ x.swapaxes(1, 2), x @ columns, y @ columns)


def compare_products(module: str, one: Factors, other: Factors) -> ModuleDifference:
    """Compare s₁·B₁·A₁ with s₂·B₂·A₂ of the same sizes and number of experts; the norms are over all experts."""
    a = _grams(one.a, other.a, one.scale, other.scale)
    b = _grams(one.b.swapaxes(1, 2), other.b.swapaxes(1, 2))
    squares = [max(float((p * q).sum()), 0.0) for p, q in ((a.x, b.x), (a.y, b.y))]
    norms = math.sqrt(squares[0]), math.sqrt(squares[1])
    product = float((a.xy * b.xy).sum())
    square = squares[0] + squares[1] - 2 * product
    if one.a.shape == other.a.shape and square < _NEAR * (squares[0] + squares[1]):
        # ΔW₁ − ΔW₂ = F·A₁ + B₂·E, with F = B₁ − B₂, E = A₁ − A₂ and A₁ = A₂ + E
        e = _grams(one.a, other.a, one.scale, other.scale, differ=True)
        f = _grams(one.b.swapaxes(1, 2), other.b.swapaxes(1, 2), differ=True)
        square = float((f.x * a.x).sum() + 2 * (f.xy * (e.x + e.xy.swapaxes(1, 2))).sum() + (f.y * e.x).sum())
    distance, ranks = math.sqrt(max(square, 0.0)), (one.a.shape[1], other.a.shape[1])
    return ModuleDifference(module, "LoRA", norms, distance, _cosine(product, *norms), ranks, *_angles(b, a))


_SMALLEST = 1e-13
"""Ratio to the largest eigenvalue of a Gram matrix below which a direction counts as none; about 3e-7 of the factor."""
_WELL_CONDITIONED = 1e-3
"""Ratio of the diagonal of a Cholesky factor above which the angles follow from it to about 1e-10."""


def _angles(*sides: _Grams) -> list[tuple[float, float] | None]:
    """Return the smallest and largest principal angle of each side over all experts, in degrees."""
    x, xy, y = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    cosines = _cosines_by_cholesky(x, xy, y)
    if cosines is None:
        return [_angles_by_eigenvectors(*side) for side in sides]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1))).reshape(len(sides), -1)
    return [(float(row.min()), float(row.max())) for row in angles]


def _cosines_by_cholesky(x: np.ndarray, xy: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Return the singular values of L⁻¹·XᵀY·M⁻ᵀ for XᵀX = L·Lᵀ, YᵀY = M·Mᵀ; None if one is nearly singular."""
    try:
        factors = [np.linalg.cholesky(gram) for gram in (x, y)]
    except np.linalg.LinAlgError:
        return None
    for factor in factors:
        diagonal = factor.diagonal(axis1=1, axis2=2)
        if not (diagonal.min(1, initial=np.inf) > _WELL_CONDITIONED * diagonal.max(1, initial=0)).all():
            return None  # also for NaN
    half = np.linalg.solve(factors[0], xy)
    return np.linalg.svd(np.linalg.solve(factors[1], half.swapaxes(1, 2)), compute_uv=False)


def _angles_by_eigenvectors(x: np.ndarray, xy: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Return the smallest and largest angle of factors that may lack ranks."""
    found: list[float] = []
    for one, mixed, other in zip(x, xy, y, strict=True):
        bases: list[Any] = []
        for gram in (one, other):
            if not np.isfinite(gram).all():
                return None
            values, vectors = np.linalg.eigh(gram)
            kept = values > _SMALLEST * max(values[-1], 0.0)
            bases.append(vectors[:, kept] / np.sqrt(values[kept]))
        if not bases[0].shape[1] or not bases[1].shape[1]:
            return None
        cosines = np.linalg.svd(bases[0].T @ mixed @ bases[1], compute_uv=False)
        found += np.degrees(np.arccos(np.clip(cosines, -1, 1))).tolist()
    return (min(found), max(found)) if found else None


# ---------------------------------------------------------------- differences


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
        return _ratio(self.distance, self.norms[0])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "relative": self.relative}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two adapters.

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

    @property
    def is_equal(self) -> bool:
        """True if the adapters compute the same: equal settings, modules and values."""
        return not (self.settings or any(self.only) or self.other_shapes) and all(
            module.distance == 0 for module in self.modules
        )

    def total(self, kind: str = "LoRA") -> ModuleDifference | None:
        """Return the difference over all modules of one kind together; None if there are none."""
        members = [module for module in self.modules if module.kind == kind]
        return _combine(members) if members else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kinds = dict.fromkeys(module.kind for module in self.modules)
        totals = {kind: total.to_dict() for kind in kinds if (total := self.total(kind)) is not None}
        return {
            "equal": self.is_equal,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "totals": totals,
            "modules": [module.to_dict() for module in self.modules],
            "only_first": list(self.only[0]),
            "only_second": list(self.only[1]),
            "other_shapes": list(self.other_shapes),
        }


def _combine(members: Sequence[ModuleDifference]) -> ModuleDifference:
    """Return the difference over several modules of one kind together."""
    norms = [math.sqrt(sum(m.norms[side] ** 2 for m in members)) for side in (0, 1)]
    products = sum(m.cosine * m.norms[0] * m.norms[1] for m in members if not math.isnan(m.cosine))
    distance = math.sqrt(sum(m.distance**2 for m in members))
    return ModuleDifference("all", members[0].kind, (norms[0], norms[1]), distance, _cosine(products, *norms))


def _modules_of_one_kind(difference: Difference) -> list[ModuleDifference]:
    """Return the modules of LoRA, or else those of IA3, or else the other tensors."""
    kinds = ("LoRA", "IA3", "tensor")
    by_kind = ([module for module in difference.modules if module.kind == kind] for kind in kinds)
    return next(filter(None, by_kind), [])


def difference_grid(difference: Difference) -> Grid[ModuleDifference] | None:
    """Return the grid of the modules of one kind, LoRA if there are any; None if the adapters share no module."""
    members = _modules_of_one_kind(difference)
    return make_grid(members, _combine) if members else None


def _cosine(product: float, norm: float, other: float) -> float:
    """Return the cosine of the angle between two changes from their inner product; NaN if one is zero or not finite."""
    cosine = product / (norm * other) if norm and other else math.nan
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def diff(first: PeftTensors, second: PeftTensors, *, progress: Progress = None) -> Difference:
    """Compare two adapters: their settings, modules, and the change of each weight.

    Args:
        first, second: the adapters. Tensors may be read on demand: each thread holds those of one module.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("diff", bytes done, bytes in all).

    Two steps of a run, or two ranks of one training, can be compared; the values of two runs with other seeds are alike
    only in ΔW, not in A and B, so LoRA is compared by ΔW. A distance between adapters of different ranks is exact to
    about 1e-8 of the norms. DoRA's magnitudes, copies of modules and other methods' tensors are compared as they are.

    Raises `MismatchError` if the adapters are of different methods.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
    >>> def adapter(a):
    ...     keys = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    ...     return jaxadapt.PeftTensors(config, dict(zip(keys, (np.array([a]), np.array([[2.0]])))))
    >>> found = diff(adapter([3.0, 0.0]), adapter([3.0, 4.0]))
    >>> found.modules[0].norms, found.modules[0].distance, found.modules[0].cosine
    ((6.0, 10.0), 8.0, 0.6)
    """
    if first.config.peft_type != second.config.peft_type:
        raise MismatchError(
            f"cannot compare {first.source} with {second.source}: their methods are {first.config.peft_type} and"
            f" {second.config.peft_type}; compare adapters of one method"
        )
    ours, theirs = _contents(first), _contents(second)
    configs = first.config, second.config
    jobs = [
        _Job(functools.partial(_compare, module, *configs), (keys, theirs.modules[module]))
        for module, keys in ours.modules.items()
        if module in theirs.modules
    ]
    jobs += [
        _Job(functools.partial(_compare_stored, key.removeprefix(PEFT_PREFIX)), ({"": key}, {"": key}))
        for key in ours.others
        if key in theirs.others
    ]
    found = _run(jobs, (as_source(first.tensors), as_source(second.tensors)), progress)
    values = [each.config.to_dict() for each in (first, second)]
    return Difference(
        {name: (values[0].get(name), values[1].get(name)) for name in first.config.changed_keys(second.config)},
        tuple(each for each in found if isinstance(each, ModuleDifference)),
        (ours.without(theirs), theirs.without(ours)),
        tuple(each for each in found if isinstance(each, str)),
    )


def _run(
    jobs: Sequence[_Job], sources: tuple[TensorSource, TensorSource], progress: Progress
) -> list[ModuleDifference | str]:
    """Return the results of the comparisons in order; several threads compute them."""
    found: list[ModuleDifference | str] = []
    with reporter(progress) as report:
        count = byte_counter(report, "diff", sum(source.nbytes(key) for source in sources for key in source))
        tasks = (functools.partial(job.run, sources) for job in jobs)
        with contextlib.closing(local_files.run_in_order(tasks, len(jobs))) as results:
            for result, nbytes in results:
                found.append(result)
                count(nbytes)
    return found


_Arrays = Mapping[str, Any]
"""The tensors of one module by their names."""


class _Job(NamedTuple):
    """The comparison of one module or tensor, which needs the tensors of these keys by their names."""

    compare: Callable[[_Arrays, _Arrays], ModuleDifference | str]
    keys: tuple[Mapping[str, str], Mapping[str, str]]

    def run(self, sources: tuple[TensorSource, TensorSource]) -> tuple[ModuleDifference | str, int]:
        """Return the difference, or text on two shapes that differ, and the number of bytes read."""
        one, other = (
            {name: np.asarray(source[key]) for name, key in keys.items()}
            for source, keys in zip(sources, self.keys, strict=True)
        )
        return self.compare(one, other), sum(x.nbytes for arrays in (one, other) for x in arrays.values())


_COMPARED = "lora_A", "lora_B", "lora_embedding", "lora_diag", "ia3_l"


class _Contents(NamedTuple):
    """The tensors of an adapter: {module: {tensor: key}} of LoRA's factors and IA3's vectors, and the other keys."""

    modules: Mapping[str, Mapping[str, str]]
    others: Sequence[str]

    def without(self, other: _Contents) -> tuple[str, ...]:
        """Return the modules and tensors that another adapter lacks."""
        keys = (key.removeprefix(PEFT_PREFIX) for key in self.others if key not in other.others)
        return (*(module for module in self.modules if module not in other.modules), *keys)


def _contents(tensors: PeftTensors) -> _Contents:
    """Return the tensors of an adapter by module, the parameters of experts by their names."""
    names: dict[str, dict[str, str]] = {}
    adapted = pytorch.adapted_keys(tensors.tensors) if tensors.config.peft_type in ("LORA", "IA3") else {}
    for module, keys in adapted.items():
        used = {name: key for name, key in keys.items() if name.startswith(_COMPARED)}
        if used:
            names.setdefault(named_parameter(tensors.config, module), {}).update(used)
    shapes = as_source(tensors.tensors).shapes
    modules = {module: keys for module, keys in names.items() if _has_change(keys, shapes)}
    used = {key for keys in modules.values() for key in keys.values()}
    return _Contents(modules, [key for key in tensors.tensors if key not in used])


def _has_change(keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True for IA3's vector, and for two factors with a product; a convolution with groups has none."""
    for kind in ("lora", "lora_embedding"):
        if {f"{kind}_A", f"{kind}_B"} <= keys.keys():
            a, b = (shapes[keys[f"{kind}_{side}"]] for side in "AB")
            diagonal = shapes[keys["lora_diag"]] if "lora_diag" in keys else a[:1]
            return len(a) > 1 < len(b) and 0 not in a + b and a[:1] == diagonal == (math.prod(b[1:]),)
    return "ia3_l" in keys


def _compare(module: str, config: Config, other: Config, x: _Arrays, y: _Arrays) -> ModuleDifference | str:
    if "ia3_l" in x:
        return _compare_tensor(module, as_float64(x["ia3_l"]) - 1, as_float64(y["ia3_l"]) - 1, "IA3")
    pair = _factors(config, module, x), _factors(other, module, y)
    sizes = [(factors.b.shape[1], factors.a.shape[2]) for factors in pair]
    if sizes[0] != sizes[1] or len(pair[0].a) != len(pair[1].a):
        return f"{module}: {list(sizes[0])} and {list(sizes[1])}"
    return compare_products(module, *pair)


def _compare_stored(name: str, x: _Arrays, y: _Arrays) -> ModuleDifference | str:
    return _compare_tensor(name, as_float64(x[""]), as_float64(y[""]), "tensor")


def _factors(config: Config, module: str, arrays: _Arrays) -> Factors:
    assert isinstance(config, LoraConfig)
    kind = "lora" if "lora_A" in arrays else "lora_embedding"
    pair = read_pairs(arrays, {module: PairKeys(f"{kind}_A", f"{kind}_B")}, config)[module]
    a, b = (x if x.ndim == 3 else x[None] for x in (pair.a, pair.b))
    scale = np.full((len(a), pair.rank, 1), pair.scale)
    if "lora_diag" in arrays:
        scale *= as_float64(arrays["lora_diag"])[:, None]  # KaSA
    return Factors(a, b, scale)


def _compare_tensor(name: str, x: np.ndarray, y: np.ndarray, kind: str) -> ModuleDifference | str:
    if x.shape != y.shape:
        return f"{name}: {list(x.shape)} and {list(y.shape)}"
    norms = math.sqrt(float((x * x).sum())), math.sqrt(float((y * y).sum()))
    distance = math.sqrt(float(((x - y) ** 2).sum()))
    return ModuleDifference(name, kind, norms, distance, _cosine(float((x * y).sum()), *norms))


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm else (math.inf if distance else 0.0)


# ---------------------------------------------------------------- plot


def difference_png(difference: Difference, names: tuple[str, str]) -> bytes:
    """Return two heat maps as a PNG: relative distances and cosines. The same adapters give the same bytes.

    Args:
        difference: the difference.
        names: the adapters, for the title.

    Raises `AdapterError` if matplotlib is missing, or if the adapters share no module.
    """
    members = _modules_of_one_kind(difference)
    if not members:
        raise AdapterError(
            "nothing to draw: the adapters share no module; they have:\n"
            + bullets([*difference.only[0], *difference.only[1]])
        )
    grid, total = make_grid(members, _combine), _combine(members)
    relative = grid.values("relative")
    largest = max((v for row in relative for v in row if v is not None and v < float("inf")), default=1)
    maps = (
        HeatMap("distance ÷ norm of the first", relative, (0, largest or 1)),
        HeatMap("cosine", grid.values("cosine"), (-1, 1)),
    )
    overall = f"in all: distance ÷ norm {total.relative:.3g}, cosine {total.cosine:.3g}"
    return draw_maps(grid, maps, f"{names[0]} and {names[1]}\n{overall}")
