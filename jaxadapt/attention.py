"""Tensors of a file that hold several leaves here: PyTorch's `nn.MultiheadAttention` keeps q, k and v in one.

The lines of `Weight.attention` name rows of such a tensor "key[0/3]", and one that is for all of them "key[=0/3]":
a plan stays a bijection, and the tensors are cut and put together here, at the file.

    plan.encode ──► {"attn.lora_B.weight[0/3]": …, …} ──joined──► {"attn.lora_B.weight": …}
    plan.decode ◄──                                   ◄──cut────

PEFT's adapter has one A for q, k and v; here each has its own, and a file's is read into all three. They stay equal
only untrained, so to save them their ranks are put side by side: A' = [Aq; Ak; Av], B' = diag(Bq, Bk, Bv).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import paths, targets
from jaxadapt.bind import Bound
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.errors import ConfigError, MismatchError

Array = Any

_PIECE = re.compile(r"(?P<key>.+)\[(?P<same>=?)(?P<i>\d+)/(?P<n>\d+)\]")


def has_pieces(keys: Any) -> bool:
    """Whether some of a plan's keys are parts of a file's tensors."""
    return any(key.endswith("]") for key in keys)


def whole(key: str) -> str:
    """The file's name of what a plan's key is a part of.

    >>> whole("attn.in_proj_weight[0/3]"), whole("head.weight")
    ('attn.in_proj_weight', 'head.weight')
    """
    found = _PIECE.fullmatch(key)
    return found["key"] if found else key


def groups(keys: Any) -> dict[str, list[str]]:
    """`{the file's key: a plan's keys that it is made of}`, these in order."""
    out: dict[str, list[str]] = {}
    for key in keys:
        out.setdefault(whole(key), []).append(key)
    return {name: sorted(parts) for name, parts in out.items()}


def stacked(parts: Sequence[str]) -> bool:
    """Whether these keys are rows of one tensor, all of them, and not the same tensor each."""
    found = [_PIECE.fullmatch(key) for key in parts]
    return all(match is not None and not match["same"] for match in found)


def cut(tensors: Mapping[str, Array], keys: Any) -> dict[str, Array]:
    """The tensors of a file as a plan's keys name them: rows and repetitions, views where it is memory.

    What cannot be cut keeps its name, and so is reported as any other tensor that does not fit.
    """
    wanted: dict[str, list[str]] = {}
    for key in keys:
        if key.endswith("]"):
            wanted.setdefault(whole(key), []).append(key)
    out: dict[str, Array] = {}
    for name in tensors:
        value = tensors[name]
        if name not in wanted:
            out[name] = value
            continue
        for key in wanted[name]:
            match = _PIECE.fullmatch(key)
            assert match is not None
            rows, odd = divmod(value.shape[0], int(match["n"])) if value.ndim else (0, 1)
            if match["same"]:
                out[key] = value
            elif odd:
                out[name] = value
            else:
                out[key] = value[int(match["i"]) * rows : (int(match["i"]) + 1) * rows]
    return out


def joined(
    config: Config,
    bounds: Sequence[Bound],
    tensors: Mapping[str, Array],
    prefix: str,
    on_shared: str | None,
    call: str,
) -> tuple[Config, dict[str, Array]]:
    """A plan's tensors as the file has them, and the configuration that goes with them.

    Args:
        bounds: the sites that the tensors are of.
        prefix: what stands before the names of modules.
        on_shared: "concat" puts As that differ side by side, which makes the module's rank three times what it was.

    Raises `MismatchError` where As differ and nobody asked for that.
    """
    if on_shared not in (None, "concat"):
        raise MismatchError(f'on_shared: expected None or "concat", found {on_shared!r}')
    found = groups(tensors)
    shared = {name: parts for name, parts in found.items() if name not in tensors and not stacked(parts)}
    missing = [name for name, parts in found.items() if name not in tensors and len(parts) != _count(parts[0])]
    if missing:
        raise MismatchError("of these tensors only some parts are there:\n" + paths.listing(missing))
    apart = [name for name, parts in shared.items() if not _equal([tensors[key] for key in parts])]
    if apart and on_shared is None:
        raise MismatchError(
            "PEFT's adapter of an nn.MultiheadAttention has one A for queries, keys and values, and these differ (or"
            f" nobody can tell, inside jit):\n{paths.listing(apart)}\n"
            f'Pass on_shared="concat" to {call}: with their ranks side by side the file computes exactly the same, at'
            " three times the rank"
        )
    out: dict[str, Array] = {}
    for name, parts in found.items():
        mine = [tensors[key] for key in parts]
        xp: Any = jnp if any(isinstance(x, jax.Array) for x in mine) else np
        out[name] = mine[0] if name in tensors or name in shared else xp.concatenate(mine)
    for name in apart:
        _concatenate(name, [tensors[key] for key in shared[name]], tensors, out)
    grown = {name.rpartition(".lora_A")[0].removeprefix(prefix) for name in apart}
    return _with_ranks(config, bounds, grown) if grown else config, out


def _count(key: str) -> int:
    match = _PIECE.fullmatch(key)
    assert match is not None
    return int(match["n"])


def _equal(arrays: Sequence[Array]) -> bool:
    if any(isinstance(x, Tracer) for x in arrays):
        return False
    return all(np.array_equal(np.asarray(arrays[0]), np.asarray(x)) for x in arrays[1:])


def _concatenate(name: str, mine: Sequence[Array], tensors: Mapping[str, Array], out: dict[str, Array]) -> None:
    """Put the As of one module side by side, and what else it has into the larger rank."""
    xp: Any = jnp if any(isinstance(x, jax.Array) for x in mine) else np
    module, dot, last = name.rpartition(".lora_A")
    b, n, r = f"{module}.lora_B{last}", len(mine), mine[0].shape[0]
    thirds = [tensors[f"{b}[{i}/{n}]"] for i in range(n)]
    out[name] = xp.concatenate(list(mine))
    out[b] = xp.concatenate([xp.pad(x, ((0, 0), (i * r, (n - 1 - i) * r))) for i, x in enumerate(thirds)])
    a, b = (f"{module}.base_layer.out_proj{dot}{last}".replace("lora_A", side) for side in ("lora_A", "lora_B"))
    out[a], out[b] = xp.pad(out[a], ((0, (n - 1) * r), (0, 0))), xp.pad(out[b], ((0, 0), (0, (n - 1) * r)))


def _with_ranks(config: Config, bounds: Sequence[Bound], grown: set[str]) -> Config:
    """The configuration with three times the rank for some modules, and the scale that they had."""
    assert isinstance(config, LoraConfig)
    names = {m for b in bounds if not b.method.copies for m in b.modules}
    ranks = {m: targets.pattern_value(config.rank_pattern, m, config.r) for m in names}
    alphas = {m: targets.pattern_value(config.alpha_pattern, m, config.lora_alpha) for m in names}
    more = math.sqrt(3) if config.use_rslora else 3
    ranks |= {m: 3 * ranks[m] for m in grown}
    alphas |= {m: more * alphas[m] for m in grown}
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        none: dict[str, Any] = {}
        return config.replace(
            r=ranks.popitem()[1], lora_alpha=alphas.popitem()[1], rank_pattern=none, alpha_pattern=none
        )
    new = config.replace(
        rank_pattern={m: r for m, r in sorted(ranks.items()) if r != config.r},
        alpha_pattern={m: alpha for m, alpha in sorted(alphas.items()) if alpha != config.lora_alpha},
    )
    wrong = [m for m in sorted(names) if targets.pattern_value(new.rank_pattern, m, new.r) != ranks[m]]
    wrong += [m for m in sorted(names) if targets.pattern_value(new.alpha_pattern, m, new.lora_alpha) != alphas[m]]
    if wrong:
        raise ConfigError(
            "rank_pattern and alpha_pattern cannot give these modules ranks of their own, since they are called like"
            " the end of others:\n" + paths.listing(wrong)
        )
    return new
