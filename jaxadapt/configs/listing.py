"""A list of PEFT's methods: those that jaxadapt computes, and those whose files pass through it. No JAX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.table import FACTS, MethodFacts

PASSING: Mapping[str, str] = {
    "ADAMSS": "its rows come from scikit-learn's KMeans on PyTorch's SVD and are not in the file",
    "XLORA": "it runs the model twice and scales whole LoRA adapters",
    "SHADOW": "it trains a second decoder beside the model",
    "FINEGATES": "no release of PEFT has it",
    "PSOFT": "its file lacks the weight's singular vectors, whose signs depend on the machine's linear algebra",
    "LILY": "its router averages over all tokens of a batch, so the output of a row depends on the other rows",
    "POLY": "it needs a task for each row of a call, and draws random gates in training",
    "GLORA": "its change of a layer's bias depends on the layer's weight",
    "FROD": "it shares matrices among the modules of one name, with sparse indices of 64 bits",
}
"""Reasons not to compute a type, by type."""

NOT_YET = "it is not implemented"

PEFT_TYPES = (
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FINEGATES FOURIERFT FROD GLORA GRALORA HIRA"
    " HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING"
    " PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA"
    " VBLORA VERA WAVEFT XLORA"
).split()
"""The types of PEFT 0.21.2, and those announced for the next."""


_SHOWN = ("trains", "rows", "merges", "merges_files", "learning_rate", "demo", "accuracy", "time")


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        peft_type: PEFT's name of the method.
        summary: a description of the change.
        paper: the address of its paper; "" if it has none.
        source: PEFT's code of the method, a folder in PEFT's package; "" for a method of another package.
        facts: whether it merges, PEFT's figures and more.
    """

    peft_type: str
    summary: str
    paper: str
    source: str
    facts: MethodFacts

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "facts"}
        facts = {name: getattr(self.facts, name) for name in _SHOWN}
        return {**own, **facts, "demo": dict(self.facts.demo)}


def describe_methods() -> tuple[MethodInfo, ...]:
    """Return every method that jaxadapt computes, sorted by type, also those registered by other packages.

    >>> [info.paper for info in describe_methods() if info.peft_type == "VERA"]
    ['https://arxiv.org/abs/2310.11454']
    """
    return tuple(
        _describe(peft_type, cls)
        for peft_type in sorted({*FACTS, *Config.classes})
        if (cls := class_of(peft_type)) is not None
    )


def passing_types() -> dict[str, str]:
    """Return `{type: reason}` of PEFT's methods whose files pass through, but which jaxadapt does not compute.

    >>> passing_types()["XLORA"]
    'it runs the model twice and scales whole LoRA adapters'
    """
    known = {info.peft_type for info in describe_methods()}
    return {name: PASSING.get(name, NOT_YET) for name in PEFT_TYPES if name not in known}


def reason_not_applied(peft_type: str) -> str:
    """Return why jaxadapt does not compute a type.

    >>> reason_not_applied("MINE")
    'it is no type of PEFT'
    """
    return passing_types().get(peft_type, "it is no type of PEFT")


def _describe(peft_type: str, cls: type[Config]) -> MethodInfo:
    """Describe a method by the first line of its configuration's docstring, "Name (arXiv:…): what it changes."."""
    first = " ".join(str(cls.__doc__).strip().partition("\n\n")[0].split())
    number = re.search(r"arXiv:(\d+\.\d+)", first)
    title, colon, text = first.partition(": ")
    summary = (text if colon else title).removesuffix(".")
    return MethodInfo(
        peft_type,
        summary,
        f"https://arxiv.org/abs/{number[1]}" if number else "",
        f"peft/tuners/{peft_type.lower()}" if peft_type in PEFT_TYPES else "",
        FACTS[peft_type],
    )
