"""Why an adapter cannot go into a bank, and what can be done with it instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxadapt.adapters.sites import Site
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError

MERGE = "Merge the adapter into a base of its own (jaxadapt.merge)"
APPROXIMATE = (
    "Approximate the adapter by a plain LoRA (jaxadapt.merging.to_lora returns its errors), or merge it into a base of"
    " its own (jaxadapt.merge)"
)
LOAD = "Load the adapter into a model of its own (jaxadapt.load)"
FIT = (
    "Create the bank with configurations that cover the adapter, convert the adapter to a plain LoRA that fits"
    " (jaxadapt.merging.to_lora), or merge it into a base of its own (jaxadapt.merge)"
)


def add_kind(config: Config, slots: int) -> str:
    """Return the way out for an adapter of a kind that a bank of as many slots has no room for."""
    return (
        "Create the bank with room for this kind, too: pass its configuration beside the present ones"
        f" (jaxadapt.serving.create(base, [..., {config!r}], slots={slots})). Or merge the adapter into a base of its"
        " own (jaxadapt.merge)"
    )


class Refusal(NamedTuple):
    """A reason against an adapter, and the way out."""

    problem: str
    way_out: str


def find_refusals(sites: Iterable[Site]) -> list[Refusal]:
    """Return why the rows of a batch cannot each have their own adapter, for each site where they cannot."""
    return [found for site in sites if (found := _refuse(site)) is not None]


def _refuse(site: Site) -> Refusal | None:
    method, peft_type = site.method, site.method.peft_type
    if method.copies:
        return Refusal(
            f"{site.leaf}: a full or partial copy of the weight (modules_to_save, bias, trainable_token_indices)", MERGE
        )
    way_out, form = APPROXIMATE if site.effects.bias is None else MERGE, "form with a separate adapter for each row"
    if method.rows == "no":
        return Refusal(f"{site.leaf}: {peft_type} has no {form}", way_out)
    if (kind := site.match.weight.kind) not in ("linear", "attention"):
        return Refusal(f"{site.leaf}: {peft_type} adapts a layer of kind {kind} here, not a matrix product", MERGE)
    try:
        effects = method.effects(method.row_hparams(site.hparams))
    except AttachError as error:
        return Refusal(f"{site.leaf}: {error}", LOAD)
    if effects.form == "weight" and method.rows == "call":
        return Refusal(f"{site.leaf}: this variant of {peft_type} has no {form}", way_out)
    return None


def raise_listed(refusals: Sequence[Refusal], what: str) -> None:
    """Raise `AttachError` with all refusals and their ways out, if there are any."""
    if refusals:
        ways_out = list(dict.fromkeys(each.way_out for each in refusals))
        raise AttachError(f"{what}:\n{paths.bullets([each.problem for each in refusals])}\n" + ". ".join(ways_out))
