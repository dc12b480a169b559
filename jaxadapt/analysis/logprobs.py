"""Decide if a server applies an adapter, from its log-probabilities and the expected ones of the same tokens.

A server may load an adapter without a warning and apply nothing of it, a part of it, or another adapter. The decision
takes four measurements of the same tokens: the server with and without the adapter, and a correct program with and
without it. Both programs differ without any adapter as well, in their dtypes and kernels. This noise is the unit of all
distances. The checks are those of `compare` in Tinker's cookbook (tinker-cookbook#928): the adapter is applied at all,
a request gets the adapter that it names, and the distance with it is at most twice the noise. Nothing is decided about
an adapter that changes the tokens by at most three times the noise: only beyond it, the answers without an adapter have
more than the allowed distance.

All distances are means of absolute differences over all tokens, in nats. Pure: numbers in, a verdict out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxadapt.arrays.tensor_source import is_float
from jaxadapt.core.errors import FormatError, MismatchError, raise_listed

Verdict = Literal["applied", "not applied", "another adapter", "applied otherwise", "undecided"]
Table = Sequence[Sequence[float | None] | np.ndarray] | np.ndarray
"""A list of log-probabilities for each text, one for each token."""

LEAST = 1e-4
"""The smallest noise in nats. Two programs in float32 differ by less, and not equally with and without an adapter."""
_ALLOWED, _APART = 2.0, 3.0  # multiples of the noise
_ROUNDING = 1e-3  # above 0, of a log-probability in 16 bits


@dataclasses.dataclass(frozen=True)
class Served:
    """The comparison of one served adapter.

    Attributes:
        name: the adapter's name.
        verdict: "applied" if the distance is at most twice the noise; "not applied" if the server answers as without an
            adapter; "another adapter" if as with another one; "applied otherwise" if with a change of its own;
            "undecided" if the adapter changes these tokens by at most three times the noise.
        nearest: the name whose answers are nearest, an adapter's or the base's.
        distance: between served and expected, in nats.
        noise: the same without an adapter, at least `LEAST`.
        change: between the server with and without the adapter.
        expected_change: between the expected ones with and without it.
        along: the served change along the expected one, as a multiple: 1 for an equal change, 0 for none.
    """

    name: str
    verdict: Verdict
    nearest: str
    distance: float
    noise: float
    change: float
    expected_change: float
    along: float

    def __str__(self) -> str:
        """Return the verdict as a sentence, with its numbers and what to do."""
        far = f"{self.distance:.3g} nats from the expected log-probabilities, with a noise of {self.noise:.3g}"
        texts: dict[Verdict, str] = {
            "applied": far,
            "not applied": f"the answers are those without an adapter; a change of {self.expected_change:.3g} nats is"
            " expected. See whether the server has loaded the adapter, and which of its keys it reads",
            "another adapter": f"the answers are those of {self.nearest}. See which adapter the request names",
            "applied otherwise": f"{far}; along the expected change, it is {self.along:.2f} times as large. See whether"
            " the server has the scale (lora_alpha, use_rslora) and all modules (experts, lm_head)",
            "undecided": f"the adapter changes these tokens by {self.expected_change:.3g} nats, at most three times the"
            f" noise of {self.noise:.3g}. Take texts that it was trained on",
        }
        return f"{self.name}: {self.verdict}: {texts[self.verdict]}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def compare_logprobs(served: Mapping[str, Table], expected: Mapping[str, Table], *, base: str = "base") -> list[Served]:
    """Tell for each adapter whether a server applies it, by log-probabilities of the same tokens.

    Args:
        served: {name: its table} of the server: of each adapter, and of the model without one under the name `base`. A
            table has a list for each text, with the log-probability (natural logarithm) of each token. The null that
            servers give for the first token of a text is left out.
        expected: the same names, texts and tokens from a program that is known to be right, such as PEFT or
            `jaxadapt serve`.
        base: the name of the tables without an adapter.

    Returns:
        One comparison for each adapter, in the order of `served`. `str` makes a sentence of it.

    Raises:
        MismatchError: the names differ, a table without an adapter is missing, or texts or tokens differ in number.
        FormatError: a value is not a log-probability.

    >>> served = {"base": [[-2.0, -1.0, -3.0]], "fr": [[-2.0, -1.0, -3.0]], "de": [[-0.5, -1.1, -2.0]]}
    >>> expected = {"base": [[-2.01, -1.0, -3.0]], "fr": [[-1.0, -0.2, -3.5]], "de": [[-0.51, -1.1, -2.0]]}
    >>> [each.verdict for each in compare_logprobs(served, expected)]
    ['not applied', 'applied']
    """
    raise_listed(
        MismatchError,
        f"expected the same names in both, with {base!r} for the tables without an adapter; only in one, or missing:",
        sorted({*served} ^ {*expected} | {base} - {*served}),
    )
    tables = {("served", name): _rows(f"served {name}", table) for name, table in served.items()} | {
        ("expected", name): _rows(f"expected {name}", expected[name]) for name in served
    }
    lengths = {key: [len(row) for row in rows] for key, rows in tables.items()}
    first = lengths["served", base]
    raise_listed(
        MismatchError,
        f"all tables need the tokens of the same texts, found {first} tokens in the served {base}, and",
        [f"{found} in the {of} {name}" for (of, name), found in lengths.items() if found != first],
    )
    if not sum(first):
        raise MismatchError("the tables have no tokens; give the log-probabilities of a few texts")
    flat = {key: np.concatenate(rows) for key, rows in tables.items()}
    ours, theirs = ({name: flat[of, name] for name in served} for of in ("served", "expected"))
    return [_compare(name, ours, theirs, base) for name in served if name != base]


def _compare(name: str, served: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], base: str) -> Served:
    noise = max(_mean(served[base] - expected[base]), LEAST)
    change, wanted = served[name] - served[base], expected[name] - expected[base]
    # A server whose answers vary from call to call is nearer to the expected base than to its own.
    as_base = min(_mean(change), _mean(served[name] - expected[base]))
    distances = {name: _mean(served[name] - expected[name]), base: as_base} | {
        other: _mean(served[name] - table)
        for other, table in expected.items()
        if other not in (name, base) and _mean(table - expected[name]) > _APART * noise
    }
    nearest = min(distances, key=distances.__getitem__)
    is_near = distances[nearest] <= _ALLOWED * noise
    verdict: Verdict = "applied otherwise"
    if _mean(wanted) <= _APART * noise:
        verdict = "undecided"
    elif as_base <= noise:
        verdict = "not applied"
    elif is_near:
        verdict = "applied" if nearest == name else "not applied" if nearest == base else "another adapter"
    norm = float(wanted @ wanted)
    along = float(change @ wanted) / norm if norm else 0.0
    return Served(name, verdict, nearest, distances[name], noise, _mean(change), _mean(wanted), along)


def _mean(differences: np.ndarray) -> float:
    return float(np.abs(differences).mean())


def _rows(where: str, table: Table) -> list[np.ndarray]:
    """Return the rows of a table as float64, without the null of a first token."""
    rows: list[np.ndarray] = []
    for number, row in enumerate(table):
        try:
            values = np.asarray(row[1:] if len(row) and row[0] is None else row)
        except (TypeError, ValueError, LookupError):  # a number instead of a list, lists of several lengths, a mapping
            values = np.asarray(None)
        if values.ndim != 1 or not (is_float(values.dtype) or values.dtype.kind == "i"):
            text = f"{row!r:.60}"
            raise FormatError(f"{where}, text {number}: expected a number for each token, found {text}")
        values = values.astype(np.float64)
        wrong = values[~(np.isfinite(values) & (values <= _ROUNDING))]
        if wrong.size:
            raise FormatError(
                f"{where}, text {number}: expected finite logarithms, at most 0, found {wrong[0]}; leave a token of"
                " probability 0 out of all tables"
            )
        rows.append(values)
    return rows
