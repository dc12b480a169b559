"""What several leaves hold of one tensor in PyTorch, put together for a file (`pieces` names and cuts the parts).

PEFT's adapter of such a module has one A for all parts, or one B where the parts are what A reads; here each leaf has
its own, and a file's is read into all of them. They stay equal only untrained, so to save them their ranks are put side
by side, which computes the same: A' = [Aq; Ak; Av], B' = diag(Bq, Bk, Bv).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.sites import Site
from jaxadapt.configs import Config, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.keymaps import parts as pieces

Array = Any


def join_tensors(
    config: Config, bounds: Sequence[Site], tensors: Mapping[str, Array], on_shared: str | None, call: str
) -> tuple[Config, dict[str, Array]]:
    """A plan's tensors as the file has them, and the configuration that goes with them.

    Args:
        bounds: the sites that the tensors are of.
        on_shared: "concat" puts As (or Bs) that differ side by side, which multiplies the module's rank by its parts.

    Raises `MismatchError` where they differ and nobody asked for that, or where some parts are not there.
    """
    if on_shared not in (None, "concat"):
        raise MismatchError(f'on_shared: expected None or "concat", found {on_shared!r}')
    found = {name: parts for name, parts in pieces.group_by_file_key(tensors).items() if name not in tensors}
    missing = [name for name, parts in found.items() if len(parts) != _part(parts[0]).n]
    if missing:
        raise MismatchError("of these tensors only some parts are there:\n" + paths.bullets(missing))
    shared = [name for name, parts in found.items() if _part(parts[0]).axis is None]
    apart = [name for name in shared if not bitwise_equal([tensors[key] for key in found[name]])]
    if apart and on_shared is None:
        counts = ", ".join(str(n) for n in sorted({_part(found[name][0]).n for name in apart}))
        raise MismatchError(
            "PEFT has one A for several of the weights here (queries, keys and values of an nn.MultiheadAttention, gate"
            " and up of experts; Llama 4's have one B), and theirs differ (or nobody can tell, inside jit):\n"
            f'{paths.bullets(apart)}\nPass on_shared="concat" to {call}: with their ranks side by side the file'
            f" computes exactly the same, at {counts} times the rank (of experts, keymap='FAMILY/per-expert' writes a"
            " LoRA for each instead)"
        )
    out: dict[str, Array] = {
        name: tensors[name] for name in tensors if name not in found and pieces.parse_part_key(name) is None
    }
    for name, parts in found.items():
        out[name] = pieces.join_parts([tensors[key] for key in parts], parts, array_namespace(tensors[parts[0]]))
    grown: dict[str, int] = {}
    sites = _sites(bounds)
    for name in apart:
        bound, module = sites[found[name][0]]
        grown[module] = _part(found[name][0]).n
        _concatenate(bound, name, found, tensors, out)
    return (_with_ranks(config, bounds, grown) if grown else config), out


def _part(key: str) -> pieces.Part:
    piece = pieces.parse_part_key(key)
    assert piece is not None
    return piece


def array_namespace(x: Array) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def bitwise_equal(arrays: Sequence[Array]) -> bool:
    """Whether they are, bit for bit; of traced arrays nobody can tell."""
    if any(isinstance(x, Tracer) for x in arrays):
        return False
    return all(np.array_equal(np.asarray(arrays[0]), np.asarray(x)) for x in arrays[1:])


def _sites(bounds: Sequence[Site]) -> dict[str, tuple[Site, str]]:
    """`{a plan's key: its site, and the module or parameter that it is of}`."""
    return {
        key: (b, module)
        for b in bounds
        for e in b.entries
        for key, module in zip(e.keys, b.modules if len(e.keys) == len(b.modules) else [], strict=False)
    }


def _concatenate(
    bound: Site, name: str, found: Mapping[str, list[str]], tensors: Mapping[str, Array], out: dict[str, Array]
) -> None:
    """Put the ranks of one module's parts side by side, in A and in B."""
    first = next(e for e in bound.entries if found[name][0] in e.keys)
    ranks = first.form.ranks
    rank = dict(bound.tensors[0].own)["r"] if ranks is None else ranks[first.keys.index(found[name][0])]
    module, dot, last = name.rpartition(".lora_")
    a, b = (f"{module}{dot}{side}{last[1:]}" for side in "AB")
    of_a, of_b = ([tensors[key] for key in found[whole]] for whole in (a, b))
    out[a], out[b] = concatenate_ranks(rank, of_a, of_b, found[a], found[b])
    if bound.match.weight.kind == "attention":  # its output projection has the same rank
        more = (len(found[name]) - 1) * rank
        a, b = (f"{module}.base_layer.out_proj{dot}{side}{last[1:]}" for side in "AB")
        out[a], out[b] = (
            array_namespace(out[a]).pad(out[a], ((0, more), (0, 0))),
            array_namespace(out[b]).pad(out[b], ((0, 0), (0, more))),
        )


def concatenate_ranks(
    rank: int, a: Sequence[Array], b: Sequence[Array], keys_a: Sequence[str], keys_b: Sequence[str]
) -> tuple[Array, Array]:
    """One A (experts · r, in) and one B (out, r · experts), from those of the parts that `keys` say they are.

    What is one for all parts goes side by side along the rank, and what is a part moves to its own place there.

    >>> a, b = [np.ones((1, 3))] * 2, [np.full((2, 1), 1.0), np.full((2, 1), 2.0)]
    >>> concatenate_ranks(1, a, b, ["a[=0/2]", "a[=1/2]"], ["b[0/2]", "b[1/2]"])[1].tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    """
    n, xp = len(a), array_namespace(a[0])
    # A's rows are (expert, rank), and B's columns (rank, expert): either way the rank is in the middle.
    wide_a = [x.reshape(x.shape[0] // rank, rank, x.shape[1]) for x in a]
    wide_b = [x.reshape(x.shape[0], rank, x.shape[1] // rank) for x in b]
    out: list[Array] = []
    for wide, keys, flat in ((wide_a, keys_a, (-1, a[0].shape[1])), (wide_b, keys_b, (b[0].shape[0], -1))):
        if _part(keys[0]).axis is None:
            out.append(xp.concatenate(wide, axis=1).reshape(flat))
            continue
        moved = [xp.pad(x, ((0, 0), (i * rank, (n - 1 - i) * rank), (0, 0))).reshape(flat) for i, x in enumerate(wide)]
        out.append(pieces.join_parts(moved, keys, xp))
    return out[0], out[1]


def _with_ranks(config: Config, bounds: Sequence[Site], grown: Mapping[str, int]) -> Config:
    """The configuration with so many times the rank for some modules, and the scale that they had."""
    assert isinstance(config, LoraConfig)
    names = {m for b in bounds if not b.method.copies for m in b.modules}
    ranks = {m: matching.pattern_value(config.rank_pattern, m, config.r) * grown.get(m, 1) for m in names}
    alphas = {
        m: matching.pattern_value(config.alpha_pattern, m, config.lora_alpha)
        * ((math.sqrt(grown[m]) if config.use_rslora else grown[m]) if m in grown else 1)
        for m in names
    }
    return with_ranks_and_alphas(config, ranks, alphas)


def with_ranks_and_alphas(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """The configuration by which these modules (or parameters) have these ranks and alphas.

    Raises `ConfigError` if no patterns say so.
    """
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        none: dict[str, Any] = {}
        return config.replace(
            r=next(iter(ranks.values())), lora_alpha=next(iter(alphas.values())), rank_pattern=none, alpha_pattern=none
        )
    new = config.replace(rank_pattern=_patterns(ranks, config.r), alpha_pattern=_patterns(alphas, config.lora_alpha))
    wrong = [m for m in sorted(ranks) if matching.pattern_value(new.rank_pattern, m, new.r) != ranks[m]]
    wrong += [m for m in sorted(ranks) if matching.pattern_value(new.alpha_pattern, m, new.lora_alpha) != alphas[m]]
    if wrong:
        raise ConfigError(
            "rank_pattern and alpha_pattern cannot give these modules ranks of their own, since they are called like"
            " the end of others:\n" + paths.bullets(wrong)
        )
    return new


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for each name whose value is another than the default; for all of one last name where they agree."""
    held: dict[str, set[Any]] = {}
    for name, value in values.items():
        held.setdefault(name.rpartition(".")[2], set()).add(value)
    out: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        last = name.rpartition(".")[2]
        if value != default:
            out[last if len(held[last]) == 1 else name] = value
    return out
