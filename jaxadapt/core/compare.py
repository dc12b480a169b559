"""Comparison of the tensors that a model or file must have with those that are found. Shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jaxadapt.core import paths


class Spec(NamedTuple):
    """The shape and dtype of a tensor. In an expectation, None accepts any size, any shape or any dtype.

    >>> str(Spec((3, None), "float32"))
    'float32 [3, any]'
    """

    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape or ())
        return f"{self.dtype or ''} [{sizes}]".lstrip()

    def accepts_shape(self, found: Spec) -> bool:
        """Return True if a tensor with this expectation may have the shape of `found`."""
        if self.shape is None or found.shape is None or self.shape == found.shape:
            return True
        return len(self.shape) == len(found.shape) and all(
            size in (None, found_size) for size, found_size in zip(self.shape, found.shape, strict=True)
        )


class Finding(NamedTuple):
    """One difference between expected and found tensors.

    Attributes:
        kind: "missing", "unexpected", "shape" or "dtype".
        name: the tensor.
        expected: its expected shape and dtype; None for an unexpected tensor.
        found: the shape and dtype that it has; None for a missing tensor.

    >>> str(Finding("shape", "a", Spec((2, 3)), Spec((3, 2))))
    'a: expected [2, 3], found [3, 2]'
    """

    kind: str
    name: str
    expected: Spec | None = None
    found: Spec | None = None

    def __str__(self) -> str:
        if self.expected is None or self.found is None:
            return f"{self.name}: {self.kind}"
        return f"{self.name}: expected {self.expected}, found {self.found}"


def compare(expected: Mapping[str, Spec], found: Mapping[str, Spec], optional: Collection[str] = ()) -> list[Finding]:
    """Return every tensor that is missing, unexpected, wrongly shaped or of another dtype, in this order by kind.

    Args:
        expected: the specs of the tensors that there must be, by name.
        found: the specs of the tensors that there are.
        optional: names of expected tensors that may be missing.

    >>> [str(f) for f in compare({"a": Spec((2,)), "b": Spec((2,))}, {"b": Spec((3,)), "c": Spec((2,))})]
    ['a: missing', 'c: unexpected', 'b: expected [2], found [3]']
    """
    findings = [Finding("missing", *item) for item in expected.items() if item[0] not in found]
    findings = [finding for finding in findings if finding.name not in optional]
    findings += [Finding("unexpected", name, None, spec) for name, spec in found.items() if name not in expected]
    common = [(name, spec, found[name]) for name, spec in expected.items() if name in found]
    findings += [Finding("shape", *item) for item in common if not item[1].accepts_shape(item[2])]
    return findings + [
        Finding("dtype", *item)
        for item in common
        if item[1].accepts_shape(item[2]) and item[1].dtype not in (None, item[2].dtype)
    ]


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Spec]:
    """Return the shapes of arrays by name, without their dtypes."""
    return {name: Spec(tuple(array.shape)) for name, array in arrays.items()}


_TITLES = {"shape": "wrongly shaped", "dtype": "of another dtype"}


def group_findings(findings: Iterable[Finding], missing: str = "missing", unexpected: str = "unexpected") -> list[str]:
    """Return one text for each kind of findings: their number, the kind and the tensors.

    Args:
        missing, unexpected: the titles of these kinds.

    >>> print(*group_findings([Finding("missing", "a", Spec((2,)))], missing="missing from the file"))
    1 missing from the file:
      a
    """
    titles = {"missing": missing, "unexpected": unexpected, **_TITLES}
    groups: dict[str, list[str]] = {}
    for finding in findings:
        both = finding.expected is not None and finding.found is not None
        groups.setdefault(titles[finding.kind], []).append(str(finding) if both else finding.name)
    return [f"{len(lines)} {title}:\n{paths.bullets(lines)}" for title, lines in groups.items()]
