"""Setuptools' build backend, whose wheels also have a list of their dependencies in CycloneDX's format (PEP 770)."""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the wheel's `.dist-info` folder, with `sboms/`, into `metadata_directory`; return its name."""
    name = build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    folder = Path(metadata_directory, name)
    bom = list_dependencies((folder / "METADATA").read_text(encoding="utf-8"))
    (folder / "sboms").mkdir(exist_ok=True)
    path = folder / "sboms" / f"{bom['metadata']['component']['name']}.cdx.json"
    path.write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")
    return name


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build the wheel with that `.dist-info` folder; return its file name."""
    if metadata_directory is not None:
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    with tempfile.TemporaryDirectory() as made:
        name = prepare_metadata_for_build_wheel(made, config_settings)
        return build_meta.build_wheel(wheel_directory, config_settings, str(Path(made, name)))


def list_dependencies(metadata: str) -> dict[str, Any]:
    """Return the CycloneDX 1.6 document for a METADATA file. The same file gives the same document."""
    fields = HeaderParser().parsestr(metadata)
    name, version = fields["Name"], fields["Version"]
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    own = f"pkg:pypi/{name}@{version}"
    parts = [_component(line) for line in sorted(required)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, "\n".join([own, *sorted(required)])).urn,
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": name,
                "version": version,
                "description": fields["Summary"],
                "licenses": [{"expression": fields["License-Expression"]}],
                "purl": own,
            },
        },
        "components": parts,
        "dependencies": [{"ref": own, "dependsOn": [part["bom-ref"] for part in parts]}]
        + [{"ref": part["bom-ref"]} for part in parts],
        # The user's installer chooses the versions, and what the dependencies themselves require.
        "compositions": [{"aggregate": "incomplete_first_party_only", "assemblies": [own]}],
    }


def _component(requirement: str) -> dict[str, Any]:
    """Return the component for one line of Requires-Dist; the range of versions is a property."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    name = re.sub(r"[-_.]+", "-", found[0]).lower()
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}",
        "name": name,
        "purl": f"pkg:pypi/{name}",
        "properties": [{"name": "requirement", "value": requirement}],
    }
