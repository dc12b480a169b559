"""The tables, one file a library that trains LoRA, and how a tree's is found. A new dialect is a file and a line."""

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
from jaxadapt.models.foreign.dialects.qwix import QWIX
from jaxadapt.models.foreign.dialects.skyrl import SKYRL

DIALECTS: dict[str, Dialect] = {d.name: d for d in (QWIX, NNX_LORA, GEMMA, MAXTEXT, LEVANTER, LORAX, SKYRL, KERAS)}
USED = {"tunix": QWIX.name, "maxtext": f"{QWIX.name}/flat", "gemma": GEMMA.name, "keras": KERAS.name}
"""What the models of a family's library (the part of its name before the colon) are trained with."""


def get_dialect(name: str) -> Dialect:
    """A dialect by its name; "qwix/flat" is Qwix on layers that call dot_general, where plain Qwix means einsums."""
    base, _, change = name.partition("/")
    if base not in DIALECTS or change not in ("", "flat"):
        raise KeyMapError(
            f"no dialect is called {name!r}; known are {', '.join(sorted(DIALECTS))} (add /flat where layers call"
            " dot_general, and so inputs and outputs are one axis each)"
        )
    return DIALECTS[base].flattened() if change else DIALECTS[base]


def recognize_dialect(paths: Collection[str]) -> Dialect | None:
    """The dialect whose lines claim every LoRA-like path among a tree's; None if there is no such path.

    Raises `KeyMapError` listing what no dialect claims, or where two claim the same.

    >>> recognize_dialect(["q.kernel", "q.kernel_lora_a", "q.kernel_lora_b"]).name
    'qwix'
    """
    paths = frozenset(paths)
    like = {p for p in paths if is_like(p)}
    claimed = {d: d.owned(paths) for d in DIALECTS.values()}
    if not like:
        return None
    fitting = [d for d, mine in claimed.items() if mine and like <= mine]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(d.name for d in fitting)
        raise KeyMapError(f"the LoRA leaves of this tree lie where several dialects have theirs: {names}")
    best = max(claimed, key=lambda d: len(claimed[d]))
    known = f"{best.name} claims {len(claimed[best])} of them, and " if claimed[best] else ""
    left = sorted(like - claimed[best])
    raise KeyMapError(
        f"{len(like)} leaves of this tree look like a LoRA's; {known}no dialect knows these:\n"
        + bullets(left)
        + f"\nKnown dialects are {', '.join(DIALECTS)}. Nothing is left out silently: take those leaves out of the tree"
        " if they are no part of the adapter"
    )


__all__ = ["DIALECTS", "get_dialect", "recognize_dialect"]
