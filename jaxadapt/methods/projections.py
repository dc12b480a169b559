"""Random projections that the modules of an adapter share: their specifications and their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.methods.matrix import Array, MethodTensor, Shapes, Target, Targets, TorchRandom, own_tensor


def draw_projections(seed: int, a: Sequence[int], b: Sequence[int]) -> tuple[Array, Array]:
    """Return projections of these shapes by PyTorch's Kaiming-uniform of the last axis; B's numbers follow A's."""
    random = TorchRandom(seed)
    first, second = (random.uniform(x, -math.sqrt(6 / x[-1]), math.sqrt(6 / x[-1])) for x in (a, b))
    return first, second


def projections(prefix: str, config: Any, targets: Targets, found: Shapes, rows: int) -> tuple[MethodTensor, ...]:
    """Return the specifications of A (rows, inputs) and B (outputs, r), for the largest modules of a new adapter."""
    names, saved = (f"{prefix}_A", f"{prefix}_B"), config.save_projection
    a, b = (found.get(name) for name in names)
    inputs = max(target.in_size for target in targets) if a is None else a[-1]
    outputs = max(target.out_size for target in targets) if b is None else b[0]
    check_projections(
        targets,
        (
            (names[0], inputs, "inputs", lambda target: target.in_size),
            (names[1], outputs, "outputs", lambda target: target.out_size),
        ),
    )
    shapes = zip(names, ((rows, inputs), (outputs, config.r)), strict=True)
    return tuple(own_tensor(name, x, trained=False, optional=True, in_file=saved) for name, x in shapes)


def check_projections(targets: Targets, needs: Sequence[tuple[str, int, str, Callable[[Target], int]]]) -> None:
    """Raise `MismatchError` if shared projections are too small for a module of the base.

    Args:
        needs: `(tensor, size, name of the size, function of the size that a module needs)`.
    """
    raise_listed(
        MismatchError,
        "the adapter's shared tensors are too small for these modules, so the adapter is of another base model:",
        [
            f"{next(iter(target.modules))} has {needed} {axis}, {name} has {size}"
            for target in targets
            if target.is_known
            for name, size, axis, need in needs
            if (needed := need(target)) > size
        ],
    )
