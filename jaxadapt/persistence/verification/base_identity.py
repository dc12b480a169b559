"""The check that a base model is the one that an adapter was trained on, by the fingerprint in the adapter's file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jaxadapt.core.errors import FileError, FormatError
from jaxadapt.persistence import fingerprint
from jaxadapt.persistence.verification import base_checks, finding
from jaxadapt.persistence.verification.finding import Finding
from jaxadapt.storage import hf_model, location


def weight_names(stored: fingerprint.Fingerprint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """Return {weight of a fingerprint: its name in a base}; None if the base lacks one."""
    names = base_checks.names_in_base([key.removesuffix(".weight") for key in stored], shapes)
    return None if names is None else {f"{module}.weight": f"{name}.weight" for module, name in names.items()}


def check_identity(
    stored: fingerprint.Fingerprint, shapes: Mapping[str, tuple[int, ...]], base: str | os.PathLike[str]
) -> list[Finding]:
    """Return a finding if a base has other values than the one of the training, or cannot be compared.

    Args:
        stored: the fingerprint in the adapter's file.
        shapes: the shapes of the base's parameters.
        base: the folder or file of the base; a few values are read.
    """
    place = location.to_location(base)
    if place.suffix == ".json":
        return []
    keys = weight_names(stored, shapes)
    found = None
    if keys is not None:
        try:
            with hf_model.open_model(place) as tensors:
                hf_model.refuse_packed(tensors)
                found = fingerprint.of_file(tensors, keys)
        except (FileError, FormatError):  # the other checks have reported it, or the base is quantized
            found = None
    if found is None:
        return [finding.note("base-not-compared", stored, f"the values of {base} were not compared: it is quantized or"
                             " lacks modules of the adapter")]  # fmt: skip
    different = fingerprint.differences(stored, found)
    if not different:
        return [finding.note("base", stored, f"{base} is the base of the training, by {len(stored)} of its weights")]
    return [
        finding.error(
            "other-base", different, f"the adapter was trained on another base than {base}: {len(different)} of"
            f" {len(stored)} compared weights differ, such as {different[0]}", "the base of the training",
            "find the base that the adapter was trained on; on this one its outputs may be wrong",
        )
    ]  # fmt: skip
