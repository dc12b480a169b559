"""Leaves that are parts of one tensor in PyTorch, joined for a file (`keymaps.plan` names and cuts the parts).

PEFT's adapter of such a module has one A for all parts, or one B where A reads the parts. Here each leaf has its own,
and a file's shared factor is read into all of them. They are equal only until they are trained. To save trained ones,
their ranks are concatenated, which computes the same: A' = [Aq; Ak; Av], B' = diag(Bq, Bk, Bv).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.site import Site, adapted_modules
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.plan import Part, group_by_file_key, join_parts, parse_part_key

Array = Any


def join_tensors(
    config: Config, sites: Sequence[Site], tensors: Mapping[str, Array], on_shared: str | None
) -> tuple[Config, dict[str, Array]]:
    """Return a plan's tensors as the file holds them, and the configuration for them.

    Args:
        sites: the sites of the tensors.
        on_shared: "concat" concatenates As (or Bs) that differ, which multiplies the rank by the number of parts.

    Raises `MismatchError` if they differ and `on_shared` is None, or if parts are missing.
    """
    parts_of = {name: parts for name, parts in group_by_file_key(tensors).items() if name not in tensors}
    raise_listed(
        MismatchError,
        "some tensors are incomplete, since the adapter holds only some of their parts. Save all parts of each:",
        [name for name, parts in parts_of.items() if len(parts) != _parse_part(parts[0]).n],
    )
    shared = [name for name, parts in parts_of.items() if _parse_part(parts[0]).axis is None]
    different = [name for name in shared if not bitwise_equal([tensors[key] for key in parts_of[name]])]
    if different and on_shared is None:
        counts = ", ".join(str(n) for n in sorted({_parse_part(parts_of[name][0]).n for name in different}))
        raise MismatchError(
            "PEFT stores one A for several weights (queries, keys and values of an nn.MultiheadAttention; gate and up"
            " of experts) or one B (experts of Llama 4), but these tensors differ between the weights (or cannot be"
            f" compared inside jit):\n{paths.bullets(different)}\nPass"
            ' jaxadapt.models.LoraTree(tree, on_shared="concat") instead of the'
            " tree: it concatenates the ranks,"
            f" which is exact, and multiplies the rank by {counts}. For experts, keymap='FAMILY/per-expert' writes one"
            " LoRA for each expert instead"
        )
    joined: dict[str, Array] = {
        name: tensors[name] for name in tensors if name not in parts_of and parse_part_key(name) is None
    }
    for name, parts in parts_of.items():
        joined[name] = join_parts([tensors[key] for key in parts], parts, array_namespace(tensors[parts[0]]))
    growth: dict[str, int] = {}
    site_of = _sites_by_key(sites)
    for name in different:
        site, module = site_of[parts_of[name][0]]
        growth[module] = _parse_part(parts_of[name][0]).n
        _concatenate_module(site, name, parts_of, tensors, joined)
    return (_with_grown_ranks(config, sites, growth) if growth else config), joined


def _parse_part(key: str) -> Part:
    """Return the part that a plan's key names."""
    part = parse_part_key(key)
    assert part is not None
    return part


def array_namespace(x: Array) -> Any:
    """Return `jax.numpy` for a JAX array, else `numpy`."""
    return jnp if isinstance(x, jax.Array) else np


def bitwise_equal(arrays: Sequence[Array]) -> bool:
    """Return True if the arrays are equal; False for traced arrays, whose values are unknown."""
    if any(isinstance(x, Tracer) for x in arrays):
        return False
    return all(np.array_equal(np.asarray(arrays[0]), np.asarray(x)) for x in arrays[1:])


def _sites_by_key(sites: Sequence[Site]) -> dict[str, tuple[Site, str]]:
    """Return `{key of the plan: (site, module or parameter)}`."""
    return {
        key: (site, module)
        for site in sites
        for entry in site.entries
        for key, module in zip(entry.keys, site.modules if len(entry.keys) == len(site.modules) else [], strict=False)
    }


def _concatenate_module(
    site: Site, name: str, parts_of: Mapping[str, list[str]], tensors: Mapping[str, Array], out: dict[str, Array]
) -> None:
    """Concatenate the ranks of one module's parts, in A and in B."""
    entry = next(candidate for candidate in site.entries if parts_of[name][0] in candidate.keys)
    ranks = entry.form.ranks
    rank = dict(site.tensors[0].own)["r"] if ranks is None else ranks[entry.keys.index(parts_of[name][0])]
    module, dot, last = name.rpartition(".lora_")
    a, b = (f"{module}{dot}{side}{last[1:]}" for side in "AB")
    parts_a, parts_b = ([tensors[key] for key in parts_of[factor]] for factor in (a, b))
    out[a], out[b] = concatenate_ranks(rank, parts_a, parts_b, parts_of[a], parts_of[b])
    if site.match.weight.kind == "attention":  # the output projection has the same rank
        padding = (len(parts_of[name]) - 1) * rank
        a, b = (f"{module}.base_layer.out_proj{dot}{side}{last[1:]}" for side in "AB")
        out[a], out[b] = (
            array_namespace(out[a]).pad(out[a], ((0, padding), (0, 0))),
            array_namespace(out[b]).pad(out[b], ((0, 0), (0, padding))),
        )


def concatenate_ranks(
    rank: int, a: Sequence[Array], b: Sequence[Array], keys_a: Sequence[str], keys_b: Sequence[str]
) -> tuple[Array, Array]:
    """Return one A (experts · r, in) and one B (out, r · experts) from the parts that `keys_a` and `keys_b` name.

    A factor that all parts share is concatenated along the rank. A factor of one part moves to its own range of ranks.

    >>> a, b = [np.ones((1, 3))] * 2, [np.full((2, 1), 1.0), np.full((2, 1), 2.0)]
    >>> concatenate_ranks(1, a, b, ["a[=0/2]", "a[=1/2]"], ["b[0/2]", "b[1/2]"])[1].tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    """
    n, xp = len(a), array_namespace(a[0])
    # A's rows are (expert, rank) and B's columns (rank, expert): in both reshaped forms the rank is axis 1.
    wide_a = [x.reshape(x.shape[0] // rank, rank, x.shape[1]) for x in a]
    wide_b = [x.reshape(x.shape[0], rank, x.shape[1] // rank) for x in b]
    out: list[Array] = []
    for tensors, keys, flat_shape in ((wide_a, keys_a, (-1, a[0].shape[1])), (wide_b, keys_b, (b[0].shape[0], -1))):
        if _parse_part(keys[0]).axis is None:
            out.append(xp.concatenate(tensors, axis=1).reshape(flat_shape))
            continue
        padded = [
            xp.pad(x, ((0, 0), (i * rank, (n - 1 - i) * rank), (0, 0))).reshape(flat_shape)
            for i, x in enumerate(tensors)
        ]
        out.append(join_parts(padded, keys, xp))
    return out[0], out[1]


def _with_grown_ranks(config: Config, sites: Sequence[Site], growth: Mapping[str, int]) -> Config:
    """Return the configuration with the ranks of some modules multiplied, and their scales unchanged."""
    assert isinstance(config, LoraConfig)
    modules = adapted_modules(sites)
    ranks = {module: config.rank_of(module) * growth.get(module, 1) for module in modules}
    alphas = {
        module: config.alpha_of(module) * (config.scale_divisor(growth[module]) if module in growth else 1)
        for module in modules
    }
    return config.with_ranks(ranks, alphas)
