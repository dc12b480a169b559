"""Named tensors that are read on demand: the interface of files, of views over files, and of encoded leaves."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Any


class TensorSource(Mapping[str, Any]):
    """Tensors by key, each read or computed when it is needed.

    A subclass defines `specs` and `read`, and those of the other methods that it can do with less memory or fewer
    bytes. Several threads may read at once.
    """

    source: str = "these tensors"
    """The origin of the tensors, for messages."""

    @functools.cached_property
    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """The shapes and dtypes by key. No tensor is read."""
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by key. No tensor is read."""
        return {key: tuple(spec.shape) for key, spec in self.specs.items()}

    @abstractmethod
    def read(self, key: str) -> Any:
        """Return one tensor. Raises `KeyError` if there is none of this name."""

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """Return one tensor on the host.

        It is in the first bytes of `memory` (uint8, aligned for the dtype), or elsewhere if that takes no copy.
        """
        import numpy as np

        return np.asarray(self.read(key))

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """Return a part of one tensor on the host.

        Args:
            key: the tensor.
            slices: one slice for each axis. Missing slices at the end select whole axes.
            shape: another shape for the same elements in C order, to which `slices` refer.
        """
        array = self.read_into(key, None)
        return array.reshape(array.shape if shape is None else shape)[tuple(slices)]

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Return several tensors. `progress` is called with the number of bytes read since its last call."""
        out: dict[str, Any] = {}
        for key in keys:
            out[key] = self.read(key)
            progress(out[key].nbytes)
        return out

    def nbytes(self, key: str) -> int:
        """Return the number of bytes of one tensor. No tensor is read."""
        shape, dtype = self.specs[key]
        return math.prod(shape) * dtype.itemsize

    def __getitem__(self, key: str) -> Any:
        return self.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs  # Mapping.__contains__ would read the tensor
