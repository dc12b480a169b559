"""Which base parameter is the table of the token embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.prompt import BaseSizes


def input_embedding(keymap: KeyMap, leaves: Iterable[str]) -> str | None:
    """Return the leaf with the embeddings of the tokens; None if it is not the only candidate.

    The candidates are the embedding entries of the keymap, or for a model of no known family the leaves that Flax's
    embedding layers create. Of several, the one that the head is tied to in PyTorch's model is it.

    >>> from jaxadapt.keymaps.generic import GENERIC
    >>> input_embedding(GENERIC, ["embed.embedding", "layers.0.q.kernel"])
    'embed.embedding'
    """
    matched = {leaf: keymap.match(leaf) for leaf in leaves}
    keys = {leaf: m.weight.file_key for leaf, m in matched.items() if m is not None and m.weight.kind == "embedding"}
    keys = keys or {leaf: leaf for leaf in matched if leaf.rpartition(".")[2] == "embedding"}
    tied = {same for _, same in keymap.tied}
    found = list(keys) if len(keys) == 1 else [leaf for leaf, key in keys.items() if key in tied]
    return found[0] if len(found) == 1 else None


def with_width(sizes: BaseSizes, keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> BaseSizes:
    """Return the sizes of a base with the width of its token embeddings, where a base parameter shows it."""
    leaf = input_embedding(keymap, shapes)
    return sizes if leaf is None else dataclasses.replace(sizes, token_dim=shapes[leaf][-1])
