"""The demo's text: the language reference that every CPython carries, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Encode = Callable[[str], Sequence[int]]


def python_topics() -> tuple[str, str]:
    """What ``help("topics")`` shows, as (training text, held-out text).

    Every tenth topic, in alphabetical order, is held out: whole topics, so that no sentence stands on both
    sides.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[5::10]
    kept = [name for name in names if name not in held_out]
    return "\n\n".join(topics[name] for name in kept), "\n\n".join(topics[name] for name in held_out)


def chunks(encode: Encode, text: str, length: int) -> np.ndarray:
    """Cut a text's tokens into rows: (n, length) int32; a shorter rest is left out.

    >>> chunks(lambda text: [ord(c) for c in text], "abcdefg", 3)
    array([[ 97,  98,  99], [100, 101, 102]], dtype=int32)
    """
    tokens = np.asarray(encode(text), np.int32)
    rows = len(tokens) // length
    return tokens[: rows * length].reshape(rows, length)


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches (size, length), in a new random order on every pass over the rows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows at equal distances, from all over the text."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]
