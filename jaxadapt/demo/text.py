"""The text of the demo: the language reference in CPython's standard library, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Encode = Callable[[str], Sequence[int]]


RUN = 25  # number of consecutive paragraphs that are kept together


def python_topics() -> tuple[str, str]:
    """Return the text of ``help("topics")`` as (training text, held-out text).

    Topics repeat whole sections of each other, so each paragraph is used once. Every tenth run of
    paragraphs is held out, so no paragraph is in both texts.
    """
    from pydoc_data.topics import topics

    once: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            once.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = list(once.values())
    runs = ["\n\n".join(paragraphs[i : i + RUN]) for i in range(0, len(paragraphs), RUN)]
    kept = [run for number, run in enumerate(runs) if number % 10 != 5]
    return "\n\n".join(kept), "\n\n".join(runs[5::10])


def chunks(encode: Encode, text: str, length: int) -> np.ndarray:
    """Split a text's tokens into rows, (n, length) int32, without a shorter remainder.

    >>> chunks(lambda text: [ord(c) for c in text], "abcdefg", 3)
    array([[ 97,  98,  99], [100, 101, 102]], dtype=int32)
    """
    tokens = np.asarray(encode(text), np.int32)
    rows = len(tokens) // length
    return tokens[: rows * length].reshape(rows, length)


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches (size, length) without end, in a new random order on every pass over the rows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows at equal distances in the text."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]
