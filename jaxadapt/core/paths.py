"""Trees (nested dicts, FrozenDicts, NNX states) as flat `{"a.b.c": leaf}` mappings, and the comparison of two of them.

Path segments are strings. An integer key (a list index of an NNX model) becomes its decimal text, so Linen and NNX
give the same leaf the same path. `flatten` raises if two leaves would share one path.

`group_names` names many modules in one short line: numbers as ranges, and the ends of names in braces. `compare`
compares the tensors that a model or file must have with those that are found, by shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxadapt.core.errors import AdapterError, bullets

# ---------------------------------------------------------------- paths


SEPARATOR = "."
_K = TypeVar("_K")
_N = TypeVar("_N")
_V = TypeVar("_V")


def join(*parts: str) -> str:
    """Join path segments, leaving out empty ones.

    >>> join("", "layers", "0")
    'layers.0'
    """
    return SEPARATOR.join(p for p in parts if p)


def flatten(tree: Mapping[Any, Any], is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return `{"a.b.c": leaf}` of nested mappings, in the tree's order, without empty mappings.

    Raises `AdapterError` if two leaves would share a path (`{"a.b": x, "a": {"b": y}}`).

    >>> flatten({"a": {0: 1, "b": 2}})
    {'a.0': 1, 'a.b': 2}
    """
    out: dict[str, Any] = {}
    clashes: list[str] = []
    _flatten(tree, "", is_leaf, out, clashes, {dict: True})
    if clashes:
        raise AdapterError(
            f"cannot flatten the tree: two values share one dotted path: {sorted(set(clashes))}; rename one of them"
        )
    return out


def _flatten(
    node: Mapping[Any, Any],
    prefix: str,
    is_leaf: Callable[[Any], bool] | None,
    out: dict[str, Any],
    clashes: list[str],
    kinds: dict[type, bool],
) -> None:
    # A nested recursive function would be a reference cycle, which keeps `out` alive until the garbage collector runs.
    for key, value in node.items():
        text = str(key)
        path = f"{prefix}{SEPARATOR}{text}" if prefix and text else prefix or text
        cls = type(value)
        if cls not in kinds:  # once for each type, because the isinstance check of Mapping is slow
            kinds[cls] = issubclass(cls, Mapping)
        if kinds[cls] and not (is_leaf is not None and is_leaf(value)):
            _flatten(value, path, is_leaf, out, clashes, kinds)  # pyright: ignore[reportUnknownArgumentType]
        elif path in out:
            clashes.append(path)
        else:
            out[path] = value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts from `{"a.b.c": leaf}`: the inverse of `flatten` on string keys.

    Raises `AdapterError` if one path passes through the leaf of another path.

    >>> unflatten({"a.0": 1, "a.b": 2})
    {'a': {'0': 1, 'b': 2}}
    """
    out: dict[str, Any] = {}
    leaves: set[int] = set()
    node, prefix = out, ""  # of the path before, which often has the same
    for path, leaf in flat.items():
        parent, dot, last = path.rpartition(SEPARATOR)
        is_other = parent + dot != prefix
        if is_other:
            node, prefix = out, parent + dot
        for part in parent.split(SEPARATOR) if is_other and dot else ():
            node = node.setdefault(part, {})
            if not isinstance(node, dict) or id(node) in leaves:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise AdapterError(
                    f"cannot unflatten: path {path!r} passes through {part!r}, the value of another path; rename one"
                )
        if last in node:
            raise AdapterError(
                f"cannot unflatten: path {path!r} has a value and other paths below it; rename one of them"
            )
        node[last] = leaf
        if isinstance(leaf, dict):
            leaves.add(id(leaf))  # pyright: ignore[reportUnknownArgumentType]
    return out


# ---------------------------------------------------------------- many names in one line


def group_names(names: Iterable[str], limit: int = 6) -> str:
    """Return names in groups, each with the number of its names if it stands for several.

    Names that differ in their numbers or in their last part are one group if the group stands for no other names.

    Args:
        names: dotted names.
        limit: the number of groups to list.

    >>> names = [f"layers.{l}.mlp.{p}_proj" for l in (0, 1, 2, 5) for p in ("gate", "up", "down")]
    >>> group_names([*names, "lm_head"])
    'layers.{0-2,5}.mlp.{gate,up,down}_proj (12), lm_head'
    >>> group_names(["a..b", "", "h.01.x"])
    'a..b, , h.01.x'
    """
    numbers: dict[tuple[str | None, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        parts = name.split(".")
        # Numbers of layers and experts, without leading zeros; a name may hold very long ones.
        is_number = [part[:9].isdecimal() and part == str(int(part[:9])) for part in parts]
        template = tuple(None if known else part for part, known in zip(parts, is_number, strict=True))
        own = tuple(int(part) for part, known in zip(parts, is_number, strict=True) if known)
        numbers.setdefault(template, {})[own] = None
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    for template, found in numbers.items():
        for ranges, count in _ranges(list(found)):
            texts = iter(ranges)
            *start, end = (next(texts) if part is None else part for part in template)
            groups.setdefault((*start, str(count)), {})[end] = count
    lines: list[str] = []
    for (*start, _), ends in groups.items():
        count = sum(ends.values())
        lines.append(".".join((*start, _braces(list(ends)))) + (f" ({count})" if count > 1 else ""))
    more = f" and {len(lines) - limit} more groups" if len(lines) > limit else ""
    return ", ".join(lines[:limit]) + more


def _ranges(found: Collection[tuple[int, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Return (one text for each place, the number of tuples) of groups whose product is exactly the tuples."""
    if () in found:
        return [((), len(found))]
    rest_of = group((first, tuple(rest)) for first, *rest in found)
    equal = group((frozenset(rest), first) for first, rest in rest_of.items())
    return [
        ((_range(firsts), *texts), len(firsts) * count)
        for rest, firsts in equal.items()
        for texts, count in _ranges(rest)
    ]


def _range(numbers: Collection[int]) -> str:
    """Return numbers as runs.

    >>> _range([3, 0, 1, 2]), _range([7]), _range([0, 2])
    ('0-3', '7', '{0,2}')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def _braces(ends: list[str]) -> str:
    """Return the last parts of names in braces, without the end that all share."""
    if len(ends) == 1:
        return ends[0]
    tails = {end[end.rfind("_") :] if "_" in end else "" for end in ends}
    shared = tails.pop() if len(tails) == 1 else ""
    return "{" + ",".join(end.removesuffix(shared) for end in ends) + "}" + shared


# ---------------------------------------------------------------- compare


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
    findings = [finding for finding in findings if finding.name not in optional] + [
        Finding("unexpected", name, None, spec) for name, spec in found.items() if name not in expected
    ]
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


def group(pairs: Iterable[tuple[_K, _V]]) -> dict[_K, list[_V]]:
    """Return `{key: its values}` of (key, value) pairs, in their order.

    >>> group([("a", 1), ("b", 2), ("a", 3)])
    {'a': [1, 3], 'b': [2]}
    """
    groups: dict[_K, list[_V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def nest(triples: Iterable[tuple[_K, _N, _V]]) -> dict[_K, dict[_N, _V]]:
    """Return `{key: {name: value}}` of (key, name, value) triples, in their order; of equal names the last value.

    >>> nest([("a", "x", 1), ("b", "x", 2), ("a", "y", 3)])
    {'a': {'x': 1, 'y': 3}, 'b': {'x': 2}}
    """
    nested: dict[_K, dict[_N, _V]] = {}
    for key, name, value in triples:
        nested.setdefault(key, {})[name] = value
    return nested


def group_findings(findings: Iterable[Finding], missing: str = "missing", unexpected: str = "unexpected") -> list[str]:
    """Return one text for each kind of findings: their number, the kind and the tensors.

    Args:
        missing, unexpected: the titles of these kinds.

    >>> print(*group_findings([Finding("missing", "a", Spec((2,)))], missing="missing from the file"))
    1 missing from the file:
      a
    """
    titles = {"missing": missing, "unexpected": unexpected, **_TITLES}
    lines_by_title = group(
        (titles[x.kind], x.name if x.expected is None or x.found is None else str(x)) for x in findings
    )
    return [f"{len(lines)} {title}:\n{bullets(lines)}" for title, lines in lines_by_title.items()]
