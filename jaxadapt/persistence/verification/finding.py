"""A finding: one fact about an adapter's files, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

SEVERITIES = ("error", "warning", "note")
"""From bad to harmless: readers refuse or misread the file; the file is suspicious; a fact about a sound file."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding of `verify`. All problems of one kind are one finding.

    Attributes:
        severity: "error" if readers refuse the adapter, lose a part of it or compute something else; "warning" if the
            adapter loads but something is suspicious; "note" for a fact about a sound adapter.
        code: the kind of the finding, one word for programs, such as "missing" or "not-finite".
        subjects: the tensors, modules, fields or files concerned, in the file's order.
        found: a sentence about the file.
        expected: what a sound file has; "" for a note.
        remedy: what to do; "" if there is nothing to do.
        repairable: True if `repair` corrects it, because only one original is possible.
    """

    severity: str
    code: str
    subjects: tuple[str, ...]
    found: str
    expected: str = ""
    remedy: str = ""
    repairable: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "subjects": list(self.subjects)}


def count(items: int | Collection[object], noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "module"), count(["a", "b"], "module")
    ('1 module', '2 modules')
    """
    number = items if isinstance(items, int) else len(items)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def error(
    code: str, subjects: Iterable[str], found: str, expected: str, remedy: str, *, repairable: bool = False
) -> Finding:
    """Return a finding of severity "error"."""
    return Finding("error", code, tuple(subjects), found, expected, remedy, repairable)


def warning(
    code: str, subjects: Iterable[str], found: str, expected: str, remedy: str, *, repairable: bool = False
) -> Finding:
    """Return a finding of severity "warning"."""
    return Finding("warning", code, tuple(subjects), found, expected, remedy, repairable)


def note(code: str, subjects: Iterable[str], found: str, remedy: str = "") -> Finding:
    """Return a finding of severity "note"."""
    return Finding("note", code, tuple(subjects), found, "", remedy)
