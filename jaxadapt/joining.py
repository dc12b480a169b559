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

from jaxadapt import paths, pieces, targets
from jaxadapt.bind import Bound
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.errors import ConfigError, MismatchError

Array = Any


def joined(
    config: Config, bounds: Sequence[Bound], tensors: Mapping[str, Array], on_shared: str | None, call: str
) -> tuple[Config, dict[str, Array]]:
    """A plan's tensors as the file has them, and the configuration that goes with them.

    Args:
        bounds: the sites that the tensors are of.
        on_shared: "concat" puts As (or Bs) that differ side by side, which multiplies the module's rank by its parts.

    Raises `MismatchError` where they differ and nobody asked for that, or where some parts are not there.
    """
    if on_shared not in (None, "concat"):
        raise MismatchError(f'on_shared: expected None or "concat", found {on_shared!r}')
    found = {name: parts for name, parts in pieces.groups(tensors).items() if name not in tensors}
    missing = [name for name, parts in found.items() if len(parts) != _part(parts[0]).n]
    if missing:
        raise MismatchError("of these tensors only some parts are there:\n" + paths.listing(missing))
    shared = [name for name, parts in found.items() if _part(parts[0]).axis is None]
    apart = [name for name in shared if not _equal([tensors[key] for key in found[name]])]
    if apart and on_shared is None:
        counts = ", ".join(str(n) for n in sorted({_part(found[name][0]).n for name in apart}))
        raise MismatchError(
            "PEFT has one A for several of the weights here (queries, keys and values of an nn.MultiheadAttention, gate"
            " and up of experts; Llama 4's have one B), and theirs differ (or nobody can tell, inside jit):\n"
            f'{paths.listing(apart)}\nPass on_shared="concat" to {call}: with their ranks side by side the file'
            f" computes exactly the same, at {counts} times the rank"
        )
    out: dict[str, Array] = {name: tensors[name] for name in tensors if name not in found and pieces.read(name) is None}
    for name, parts in found.items():
        out[name] = pieces.together([tensors[key] for key in parts], parts, _xp(tensors[parts[0]]))
    grown: dict[str, int] = {}
    sites = _sites(bounds)
    for name in apart:
        bound, module = sites[found[name][0]]
        grown[module] = _part(found[name][0]).n
        _concatenate(bound, name, found, tensors, out)
    return (_with_ranks(config, bounds, grown) if grown else config), out


def _part(key: str) -> pieces.Piece:
    piece = pieces.read(key)
    assert piece is not None
    return piece


def _xp(x: Array) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _equal(arrays: Sequence[Array]) -> bool:
    if any(isinstance(x, Tracer) for x in arrays):
        return False
    return all(np.array_equal(np.asarray(arrays[0]), np.asarray(x)) for x in arrays[1:])


def _sites(bounds: Sequence[Bound]) -> dict[str, tuple[Bound, str]]:
    """`{a plan's key: its site, and the module or parameter that it is of}`."""
    return {
        key: (b, module)
        for b in bounds
        for e in b.entries
        for key, module in zip(e.keys, b.modules if len(e.keys) == len(b.modules) else [], strict=False)
    }


def _concatenate(
    bound: Bound, name: str, found: Mapping[str, list[str]], tensors: Mapping[str, Array], out: dict[str, Array]
) -> None:
    """Put the ranks of one module's parts side by side, in A and in B."""
    rank = dict(bound.tensors[0].own)["r"]
    module, dot, last = name.rpartition(".lora_")
    names = [f"{module}{dot}{side}{last[1:]}" for side in "AB"]
    for at, whole in enumerate(names):  # A's rows are (expert, rank), and B's columns (rank, expert)
        parts = found[whole]
        n = len(parts)
        wide: list[Array] = []
        for i, key in enumerate(parts):
            x = tensors[key]
            split = (x.shape[0] // rank, rank, x.shape[1]) if at == 0 else (x.shape[0], rank, x.shape[1] // rank)
            before = i * rank if _part(key).axis is not None else 0
            after = (n - 1 - i) * rank if _part(key).axis is not None else 0
            wide.append(_xp(x).pad(x.reshape(split), ((0, 0), (before, after), (0, 0))))
        if _part(parts[0]).axis is None:
            value = _xp(wide[0]).concatenate(wide, axis=1)
            out[whole] = value.reshape((-1, value.shape[2]) if at == 0 else (value.shape[0], -1))
        else:
            flat = [x.reshape((-1, x.shape[2]) if at == 0 else (x.shape[0], -1)) for x in wide]
            out[whole] = pieces.together(flat, parts, _xp(flat[0]))
    if bound.site.weight.kind == "attention":  # its output projection has the same rank
        n = len(found[name])
        a, b = (f"{module}.base_layer.out_proj{dot}{side}{last[1:]}" for side in "AB")
        out[a] = _xp(out[a]).pad(out[a], ((0, (n - 1) * rank), (0, 0)))
        out[b] = _xp(out[b]).pad(out[b], ((0, 0), (0, (n - 1) * rank)))


def _with_ranks(config: Config, bounds: Sequence[Bound], grown: Mapping[str, int]) -> Config:
    """The configuration with so many times the rank for some modules, and the scale that they had."""
    assert isinstance(config, LoraConfig)
    names = {m for b in bounds if not b.method.copies for m in b.modules}
    ranks = {m: targets.pattern_value(config.rank_pattern, m, config.r) * grown.get(m, 1) for m in names}
    alphas = {
        m: targets.pattern_value(config.alpha_pattern, m, config.lora_alpha)
        * ((math.sqrt(grown[m]) if config.use_rslora else grown[m]) if m in grown else 1)
        for m in names
    }
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        none: dict[str, Any] = {}
        return config.replace(
            r=ranks.popitem()[1], lora_alpha=alphas.popitem()[1], rank_pattern=none, alpha_pattern=none
        )
    new = config.replace(
        rank_pattern=_patterns(ranks, config.r), alpha_pattern=_patterns(alphas, config.lora_alpha)
    )
    wrong = [m for m in sorted(names) if targets.pattern_value(new.rank_pattern, m, new.r) != ranks[m]]
    wrong += [m for m in sorted(names) if targets.pattern_value(new.alpha_pattern, m, new.lora_alpha) != alphas[m]]
    if wrong:
        raise ConfigError(
            "rank_pattern and alpha_pattern cannot give these modules ranks of their own, since they are called like"
            " the end of others:\n" + paths.listing(wrong)
        )
    return new


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for each name whose value is another than the default; for all of one last name where they agree."""
    out: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        last = name.rpartition(".")[2]
        alike = {v for m, v in values.items() if m.rpartition(".")[2] == last}
        if value != default:
            out[last if len(alike) == 1 else name] = value
    return out
