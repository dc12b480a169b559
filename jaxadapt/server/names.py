"""Names and paths of adapters that come from clients: each is a folder inside one root, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from jaxadapt.core.errors import FileError
from jaxadapt.serving.index import BASE
from jaxadapt.storage import hub

MAX_BYTES = 255
CONFIG = hub.CONFIG
FILES = (hub.CONFIG, *hub.WEIGHTS, hub.MLX_WEIGHTS)


def find(root: Path, name: str, given: str | None = None) -> Path:
    """Return the adapter folder of a name, or the one at a path that a client gave.

    Args:
        root: the folder of the adapters.
        name: the name of the adapter.
        given: a path inside the root, absolute, or from the root or the working folder. None for the folder directly in
            the root that has the name.

    Raises:
        FileError: the name is no plain folder name, there is no adapter at the path, or the path, the folder or a file
            in it is a link that leaves the root.

    >>> find(Path("/adapters"), "../etc")
    Traceback (most recent call last):
        ...
    jaxadapt.core.errors.FileError: '../etc' is not the name of an adapter: expected a folder's name without separators,
    control characters or a dot at the start
    """
    if not is_plain(name):
        raise FileError(
            f"{name[:80]!r} is not the name of an adapter: expected a folder's name without separators, control"
            " characters or a dot at the start"
        )
    places = (root / name,) if given is None else (root / given, Path(given)) if given.isprintable() else ()
    inside = [path for path in places if given is None or _is_inside(root, path)]
    path = next((path for path in inside if os.path.isfile(path / CONFIG)), None)  # noqa: PTH113 (`is_file` may raise)
    if path is None:
        raise FileError(
            f"there is no adapter {(given or name)[:80]!r}: expected a folder in the adapters' folder, with {CONFIG}"
        )
    if not all(_is_inside(root, each) for each in (path, *path.rglob("*"))):
        raise FileError(
            f"the adapter {name!r} contains links to files outside the adapters' folder; copy the files into it"
        )
    return path


def is_plain(name: str) -> bool:
    """Return True for a name that an adapter may have."""
    plain = name not in ("", BASE) and name.isprintable() and not {"/", "\\", os.sep} & {*name}
    return plain and not name.startswith(".") and len(os.fsencode(name)) <= MAX_BYTES


def is_there(root: Path, path: Path) -> bool:
    """Return True if a folder that `find` returned is still there, and its adapter's files inside the root.

    It looks at these files only: it is called at each request.
    """
    return os.path.isfile(path / CONFIG) and all(_is_inside(root, path / name) for name in FILES)  # noqa: PTH113


def _is_inside(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents


def scan(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return `{name: folder}` of the adapters in a folder, sorted, and the reasons for which others are left out.

    Raises:
        FileError: the folder cannot be listed.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    try:
        entries = sorted(path.name for path in root.iterdir() if os.path.isfile(path / CONFIG))  # noqa: PTH113
    except OSError as error:
        raise FileError(f"cannot list the adapters in {root}: {error}") from error
    for name in entries:
        try:
            found[name] = find(root, name)
        except FileError as error:
            problems.append(str(error))
    return found, problems
