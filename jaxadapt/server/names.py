"""Names of adapters that come from clients: each is a folder directly inside one root, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from jaxadapt.core.errors import FileError

MAX_BYTES = 255
CONFIG = "adapter_config.json"
BASE = "__base__"  # PEFT's name of the base, which the pool knows


def find(root: Path, name: str) -> Path:
    """Return the adapter folder of a name.

    Args:
        root: the folder of the adapters.
        name: the name of a folder directly inside it.

    Raises:
        FileError: the name is no plain folder name, there is no adapter of this name, or the folder or a file in it
            is a link that leaves the root.

    >>> find(Path("/adapters"), "../etc")
    Traceback (most recent call last):
        ...
    jaxadapt.core.errors.FileError: '../etc' is not the name of an adapter: expected a folder's name without separators,
    control characters or a dot at the start
    """
    plain = name != BASE and name.isprintable() and not {"/", "\\", os.sep} & {*name} and not name.startswith(".")
    if not name or not plain or len(os.fsencode(name)) > MAX_BYTES:
        raise FileError(
            f"{name[:80]!r} is not the name of an adapter: expected a folder's name without separators, control"
            " characters or a dot at the start"
        )
    path, inside = root / name, Path(os.path.realpath(root))
    if not (path / CONFIG).is_file():
        raise FileError(f"there is no adapter {name!r}: expected a folder of this name with {CONFIG}")
    leaves = [each for each in (path, *path.rglob("*")) if inside not in Path(os.path.realpath(each)).parents]
    if leaves:
        raise FileError(
            f"the adapter {name!r} contains links to files outside the adapters' folder; copy the files into it"
        )
    return path


def scan(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return `{name: folder}` of the adapters in a folder, sorted, and the reasons for which others are left out.

    Raises:
        FileError: the folder cannot be listed.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    try:
        entries = sorted(path.name for path in root.iterdir() if (path / CONFIG).is_file())
    except OSError as error:
        raise FileError(f"cannot list the adapters in {root}: {error}") from error
    for name in entries:
        try:
            found[name] = find(root, name)
        except FileError as error:
            problems.append(str(error))
    return found, problems
