"""The tensors that the adapters of a bank have in common, such as VeRA's random projections: one copy for all slots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt import methods
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.sites import Sites, sites_of
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods import Start

Shared = Mapping[str, np.ndarray]


def shared_of(adapter: Adapter, sites: Sites | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of the whole adapter, as arrays of numpy.

    Raises `AttachError` if training changes one, and `MismatchError` if one is too small for `sites`.
    """
    _require_fixed(adapter.config, sites_of(adapter))
    found = {name: np.asarray(x) for name, x in adapter.shared.items()}
    if found and sites is not None:
        targets, shapes = [site.target for site in sites], {name: x.shape for name, x in found.items()}
        methods.get_method(adapter.config).shared(adapter.config, targets, shapes)
    return found


def draw_shared(config: Config, sites: Sites) -> dict[str, np.ndarray]:
    """Return the tensors of a whole adapter that follow from its configuration.

    Raises `AttachError` if the configuration does not determine them, or if training changes one.
    """
    _require_fixed(config, sites)
    method, drawn = methods.get_method(config), dict[str, np.ndarray]()
    shapes = {each.tensor.name: each.entry.shape for each in sites.shared}
    for each in sites.shared:
        values = method.init(config, each.tensor, Start(each.entry.form.file_shape, shared=shapes))
        if isinstance(values, Draw):
            raise AttachError(
                f"cannot create the bank: {each.tensor.name} of {config.peft_type} does not follow from the"
                " configuration. Pass an adapter that has it in place of the configuration"
            )
        drawn[each.tensor.name] = np.asarray(values)
    return drawn


def _require_fixed(config: Config, sites: Sites) -> None:
    if trained := [each.tensor.name for each in sites.shared if each.tensor.trained]:
        raise AttachError(
            f"{config.peft_type} trains tensors of the whole adapter ({', '.join(trained)}), so the rows of a batch"
            " cannot each have their own"
        )


def find_shared(bank: Sequence[tuple[str, Shared]], adapter: Adapter) -> int | None:
    """Return the number of the bank's shared tensors that are those of an adapter; None for an adapter without any.

    Methods use the first rows and columns of a shared tensor, so of two sizes the common part must be equal.

    Raises `AttachError`, which says what differs, if the bank has no such tensors.
    """
    own = shared_of(adapter)
    if not own:
        return None
    config, closest = adapter.config, None
    for number, (peft_type, tensors) in enumerate(bank):
        if peft_type == config.peft_type:
            found = compare_shared(tensors, own)
            if not found:
                return number
            closest = found if closest is None or len(found) < len(closest) else closest
    if closest is None:
        closest = [f"the bank has no {name}" for name in own]
    rank = methods.get_method(config).plain_rank(config)
    plain = (
        "" if rank is None else f", or convert the adapter to a plain LoRA of rank {rank}, which computes the same"
        " (jaxadapt.merging.to_lora(adapter, params=base)), for a bank of LoRAs"
    )  # fmt: skip
    raise AttachError(
        f"cannot put the adapter into the bank: all adapters of a {config.peft_type} bank use one copy of the tensors"
        f" that belong to no module, and this adapter has others:\n{paths.bullets(closest)}\nCreate the bank with this"
        f" adapter beside or in place of the configuration (jaxadapt.serving.create(base, [config, adapter]))"
        f"{plain}"
    )


def compare_shared(bank: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor in whose common part an adapter differs from a bank."""
    problems: list[str] = []
    for name in sorted(bank.keys() | adapter.keys()):
        if name not in bank or name not in adapter:
            problems.append(f"{name}: {'the bank' if name in adapter else 'the adapter'} lacks it")
            continue
        ours, theirs = np.asarray(bank[name]), np.asarray(adapter[name])
        shapes = f"shape {list(theirs.shape)}, the bank's is {list(ours.shape)}"
        if ours.ndim != theirs.ndim:
            problems.append(f"{name}: {shapes}")
            continue
        common = tuple(slice(min(sizes)) for sizes in zip(ours.shape, theirs.shape, strict=True))
        if np.array_equal(ours[common], theirs[common]):
            continue
        distance = np.abs(ours[common].astype(np.float64) - theirs[common].astype(np.float64))
        count, largest = int((distance != 0).sum()), float(distance.max())  # NaN differs from every value
        total = math.prod(distance.shape)
        problems.append(f"{name}: {count} of {total} values differ, by up to {largest:.3g} ({shapes})")
    return problems
