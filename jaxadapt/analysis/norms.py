"""How much an adapter changes each weight, by layer and module, from its file alone. numpy only.

For LoRA ΔW = s·B·A is never formed: with B = Qb·Rb and Aᵀ = Qa·Ra its singular values are those of the small s·Rb·Raᵀ.
The effective rank is exp of the entropy of the normalised singular values (Roy and Vetterli 2007): 1 for a rank-one
change, r where r directions count alike.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config, matching
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Norm:
    """One module, or one parameter of `target_parameters`, all experts of it together.

    `effective_rank`, `rank` and `scale` are None where the method has none; the first is the mean of the experts'.

    Attributes:
        norm: ‖ΔW‖ in the Frobenius norm; for IA3 the root mean square of l − 1, which is the relative change.
    """

    module: str
    norm: float
    effective_rank: float | None = None
    rank: int | None = None
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Norms:
    """All modules of an adapter, what the numbers are, what was left out, and which modules hold a NaN or infinity."""

    what: str
    modules: tuple[Norm, ...]
    left_out: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "what": self.what,
            "modules": [dataclasses.asdict(norm) for norm in self.modules],
            "left_out": list(self.left_out),
            "not_finite": list(self.not_finite),
        }


def measure_norms(tensors: PeftTensors) -> Norms:
    """The norms of an adapter's modules. Raises `ConfigError` for methods whose change depends on the base."""
    config = tensors.config
    if config.peft_type not in ("LORA", "IA3"):
        raise ConfigError(f"norms are known for LORA and IA3 without the base model, not for {config.peft_type}")
    held: dict[str, dict[str, Any]] = {}
    for key in tensors.tensors:
        for module, names in pytorch.adapted_shapes({key: ()}).items():
            held.setdefault(module, {}).update(dict.fromkeys(names, key))
    made: list[Norm] = []
    left: list[str] = []
    known = {key for keys in held.values() for key in keys.values()}
    for module, keys in held.items():
        arrays = {name: _wide(tensors.tensors[key]) for name, key in keys.items()}
        module = named_parameter(config, module)
        norm = _ia3(module, arrays) if config.peft_type == "IA3" else _lora(config, module, arrays)
        if norm is None:
            left.append(module)
        else:
            made.append(norm)
    left += [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors if key not in known]
    home = {key: named_parameter(config, module) for module, keys in held.items() for key in keys.values()}
    lost = [home.get(key, key.removeprefix(PEFT_PREFIX)) for key, x in tensors.tensors.items() if not _is_finite(x)]
    return Norms(_what(config), tuple(made), tuple(left), tuple(dict.fromkeys(lost)))


def _is_finite(x: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(_wide(x)).all())


def named_parameter(config: Config, module: str) -> str:
    """A module of a file, or the parameter of it that is meant: PEFT wraps once for each of `target_parameters`.

    The module's first parameter is innermost, so with gate_up_proj and down_proj "experts.base_layer" is the first.

    >>> from jaxadapt.configs import LoraConfig
    >>> config = LoraConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    >>> named_parameter(config, "0.experts.base_layer")
    '0.experts.gate_up_proj'
    """
    inner = len(module.split(".base_layer")) - 1
    owner = module.removesuffix(".base_layer" * inner)
    ends = dict.fromkeys(entry.rpartition(".")[2] for entry in config.get("target_parameters") or ())
    mine = sorted((end for end in ends if matching.is_parameter(config, f"{owner}.{end}")), key=_rank)
    at = len(mine) - 1 - inner
    return f"{owner}.{mine[at]}" if 0 <= at < len(mine) else module


def _what(config: Config) -> str:
    if config.peft_type == "IA3":
        return "relative change, rms of l − 1"
    return "‖s·B·A‖, before DoRA's normalisation" if config.get("use_dora") else "‖ΔW‖ = ‖s·B·A‖"


def _wide(x: Any) -> np.ndarray:
    import numpy as np

    return np.asarray(x).astype(np.float64)


def _ia3(module: str, arrays: Mapping[str, np.ndarray]) -> Norm | None:
    l = arrays.get("ia3_l")
    return None if l is None else Norm(module, float(((l - 1) ** 2).mean()) ** 0.5)


def _lora(config: Config, module: str, arrays: Mapping[str, np.ndarray]) -> Norm | None:
    import numpy as np

    kind = "lora" if "lora_A" in arrays else "lora_embedding"
    if not {f"{kind}_A", f"{kind}_B"} <= arrays.keys() or config.get("use_qalora") or config.get("use_bdlora"):
        return None
    a, b = arrays[f"{kind}_A"], arrays[f"{kind}_B"]
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    if "lora_diag" in arrays:
        a = arrays["lora_diag"][:, None] * a  # KaSA
    alpha = matching.pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    named = matching.pattern_value(config.get("rank_pattern") or {}, module, config.get("r"))
    scale = alpha / math.sqrt(named) if config.get("use_rslora") else alpha / named
    experts, rest = divmod(a.shape[0], named) if matching.is_parameter(config, module) else (1, 0)
    if rest or b.shape[1] != a.shape[0]:
        return None  # of a grouped convolution
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # a run that went astray: no decomposition ends
        return Norm(module, math.nan, None, a.shape[0] // experts, float(scale))
    # PEFT has the As of all experts below each other, and the Bs' columns in turns.
    each_a, each_b = a.reshape(experts, -1, a.shape[1]), np.moveaxis(b.reshape(b.shape[0], -1, experts), 2, 0)
    small: list[Any] = [np.linalg.qr(x, mode="r") for x in (each_b, np.swapaxes(each_a, 1, 2))]
    s = np.linalg.svd(small[0] @ np.swapaxes(small[1], 1, 2), compute_uv=False)
    effective = sum(map(_effective_rank, s)) / experts
    return Norm(module, abs(scale) * float(np.sqrt((s**2).sum())), effective, each_a.shape[1], float(scale))


def _effective_rank(s: np.ndarray) -> float:
    import numpy as np

    p = s[s > 0] / max(s.sum(), np.finfo(s.dtype).tiny)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


# ---------------------------------------------------------------- as a grid


@dataclasses.dataclass(frozen=True)
class Grid:
    """Modules by layer (rows) and place in the layer (columns); cells that nothing adapts are missing."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Norm]

    def values(self, name: str) -> list[list[float | None]]:
        """One number of each cell: "norm", "effective_rank", "rank" or "scale"."""
        return [
            [getattr(self.cells[r, c], name) if (r, c) in self.cells else None for c in self.columns] for r in self.rows
        ]

    def constant(self, name: str) -> float | None:
        """The value that all cells share, None if they differ or have none."""
        found = {getattr(cell, name) for cell in self.cells.values()}
        return next(iter(found)) if len(found) == 1 else None


def norms_grid(norms: Sequence[Norm]) -> Grid:
    """The grid of an adapter. The modules of several experts share a cell: norms add up in squares, ranks are averaged.

    >>> made = norms_grid([Norm("model.layers.0.q_proj", 3.0), Norm("model.layers.1.q_proj", 4.0)])
    >>> made.rows, made.columns, made.values("norm")
    (('0', '1'), ('q_proj',), [[3.0], [4.0]])
    """
    placed = [(*_place(norm.module), norm) for norm in norms]
    stacks = list(dict.fromkeys(stack for stack, number, _, _ in placed if number is not None))
    order = {stack: i for i, stack in enumerate(stacks)}
    placed.sort(key=lambda item: (item[1] is None, order.get(item[0], 0), item[1] or 0))
    groups: dict[tuple[str, str], list[Norm]] = {}
    for stack, number, label, norm in placed:
        row = "–" if number is None else str(number) if len(stacks) == 1 else f"{stack}.{number}"
        groups.setdefault((row, label), []).append(norm)
    inside = {label for row, label in groups if row != "–"}  # a head, an embedding come last
    labels = sorted(dict.fromkeys(label for _, label in groups), key=lambda label: (label not in inside, _rank(label)))
    short = _shortened(labels)
    cells = {(row, short[label]): _together(found) for (row, label), found in groups.items()}
    return Grid(tuple(dict.fromkeys(row for row, _ in cells)), tuple(short[label] for label in labels), cells)


# How data flows through a layer; names that are not here come after, in the file's order.
_FLOW = (
    "qkv_proj", "c_attn", "query_key_value", "q_proj", "query", "to_q", "q", "k_proj", "key", "to_k", "k", "v_proj",
    "value", "to_v", "v", "o_proj", "out_proj", "to_out", "o", "dense", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
    "fc1", "wi_0", "wi_1", "wi", "down_proj", "fc2", "wo",
)  # fmt: skip


def _rank(label: str) -> int:
    last = label.removesuffix(".*").rpartition(".")[2]
    return _FLOW.index(last) if last in _FLOW else len(_FLOW)


def _place(module: str) -> tuple[str, int | None, str]:
    """The stack a module is in, its layer, and its name in the layer."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "", None, module
    return ".".join(parts[:at]), int(parts[at]), re.sub(r"(?<![^.])\d+(?![^.])", "*", ".".join(parts[at + 1 :]))


def _shortened(labels: Sequence[str]) -> dict[str, str]:
    """The shortest endings that tell labels apart."""
    out: dict[str, str] = {}
    for label in labels:
        parts = label.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1) if parts[-n] != "*"]
        out[label] = next(
            (e for e in endings if not any(o != label and (o == e or o.endswith("." + e)) for o in labels)), label
        )
    return out


def number_text(value: float | None, digits: int = 3) -> str:
    """
    >>> number_text(2.1), number_text(0.00123456), number_text(123.4, 2), number_text(1e7), number_text(None)
    ('2.10', '0.00123', '123', '1.00e+07', '')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:#.{digits}g}".rstrip(".")


def _together(norms: Sequence[Norm]) -> Norm:
    if len(norms) == 1:
        return norms[0]
    first = norms[0]
    ranks = [n.effective_rank for n in norms if n.effective_rank is not None]
    return dataclasses.replace(
        first,
        norm=math.sqrt(sum(n.norm**2 for n in norms)),
        effective_rank=sum(ranks) / len(ranks) if ranks else None,
        rank=max(n.rank or 0 for n in norms) or None,
    )
