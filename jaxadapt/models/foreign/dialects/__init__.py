"""The dialects, one file for each library that trains LoRA. A new dialect is a file and an item of `DIALECTS`."""

from __future__ import annotations

from collections.abc import Collection

from jaxadapt.core.errors import KeyMapError
from jaxadapt.core.paths import bullets
from jaxadapt.models.foreign.dialect import Dialect, is_like
from jaxadapt.models.foreign.dialects.flax import NNX_LORA
from jaxadapt.models.foreign.dialects.gemma import GEMMA
from jaxadapt.models.foreign.dialects.keras import KERAS
from jaxadapt.models.foreign.dialects.levanter import LEVANTER
from jaxadapt.models.foreign.dialects.lorax import LORAX
from jaxadapt.models.foreign.dialects.maxtext import MAXTEXT
from jaxadapt.models.foreign.dialects.openpi import OPENPI
from jaxadapt.models.foreign.dialects.qwix import QWIX
from jaxadapt.models.foreign.dialects.skyrl import SKYRL

DIALECTS: dict[str, Dialect] = {
    d.name: d for d in (QWIX, NNX_LORA, GEMMA, MAXTEXT, LEVANTER, LORAX, SKYRL, KERAS, OPENPI)
}
USED = {
    "tunix": QWIX.name,
    "maxtext": f"{QWIX.name}/flat",
    "gemma": GEMMA.name,
    "keras": KERAS.name,
    "openpi": OPENPI.name,
}
"""The dialect that trains the models of a family's library (the part of the family's name before the colon)."""


def get_dialect(name: str) -> Dialect:
    """Return a dialect by name: "qwix" for layers that call einsum, "qwix/flat" for layers that call dot_general."""
    base, _, change = name.partition("/")
    if base not in DIALECTS or change not in ("", "flat"):
        raise KeyMapError(
            f"no dialect is called {name!r}; known are {', '.join(sorted(DIALECTS))} (append /flat if the"
            " layers call dot_general, so that inputs and outputs are one axis each)"
        )
    return DIALECTS[base].flattened() if change else DIALECTS[base]


def recognize_dialect(paths: Collection[str]) -> Dialect | None:
    """Return the dialect that claims every path that looks like a LoRA leaf; None if no path does.

    Raises `KeyMapError` listing the paths that no dialect claims, or if several dialects claim all of them.

    >>> recognize_dialect(["q.kernel", "q.kernel_lora_a", "q.kernel_lora_b"]).name
    'qwix'
    """
    paths = frozenset(paths)
    like = {p for p in paths if is_like(p)}
    claimed = {d: d.owned(paths) for d in DIALECTS.values()}
    if not like:
        return None
    fitting = [d for d, mine in claimed.items() if mine and like <= mine]
    fitting = [d for d in fitting if d.named] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(d.name for d in fitting)
        raise KeyMapError(f"the LoRA leaves of this tree are ambiguous: they match the dialects {names}")
    best = max(claimed, key=lambda d: len(claimed[d]))
    known = f" (those of {best.name}: {len(claimed[best])})" if claimed[best] else ""
    left = sorted(like - claimed[best])
    raise KeyMapError(
        f"{len(like)} leaves of this tree look like LoRA leaves{known}, but no dialect matches these:\n"
        + bullets(left)
        + f"\nKnown dialects are {', '.join(DIALECTS)}. Remove these leaves from the tree if they are not part of the"
        " adapter"
    )
