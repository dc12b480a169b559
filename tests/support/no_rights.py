"""What a user without rights is told: `python -m tests.support.no_rights FOLDER`, which any user may look into.

Every way to read and to write meets folders and files that are closed, and names that are too long. Root may do all,
so it becomes another user when everything is imported. Prints JSON: `[[operation, obstacle, path, error, message]]`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxadapt
from jaxadapt.export import adapter_files, merge_files
from tests.support import small
from tests.support.small import CONFIG

NOBODY = 65534
BASE = small.base()["params"]
TABLE = jaxadapt.KeyMap(
    "plain",
    (
        jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
        jaxadapt.Weight("{path}.bias", "{path}.bias", "o -> o"),
    ),
)
Operation = Callable[[Path], Any]


def readers(good: Path) -> dict[str, Operation]:
    """By name; each takes the folder, made by `full`, that it reads. `good` holds such folders that are open."""
    return {
        "inspect": jaxadapt.inspect,
        "read": jaxadapt.read,
        "read_config": jaxadapt.read_config,
        "read_config of a file": lambda path: jaxadapt.read_config(path / CONFIG),
        "load": lambda path: jaxadapt.load(path, small.net()),
        "load, by a name": lambda path: jaxadapt.load(path, small.net(), name="other"),
        "restore": lambda path: jaxadapt.CheckpointManager(path).restore(small.trained()),
        "adapter of a step": lambda path: jaxadapt.CheckpointManager(path).adapter(1),
        "import_base": lambda path: jaxadapt.export.import_base(path, BASE, keymap=TABLE),
        "merge, base": lambda path: merge_files.merge_folder(path, good / "adapter", good / "merged"),
        "merge, adapter": lambda path: merge_files.merge_folder(good / "base", path, good / "merged"),
        "combine": lambda path: adapter_files.combine_folders([path, good / "adapter"], [1.0, 1.0], good / "combined"),
        "push": lambda path: jaxadapt.push(path, "org/name"),
    }


def writers(good: Path) -> dict[str, Operation]:
    return {
        "save": lambda path: jaxadapt.save(small.adapter(), path),
        "save, by a name": lambda path: jaxadapt.save(small.trained(name="other"), path, name="other"),
        "save, orbax": lambda path: jaxadapt.save(small.adapter(), path / "new", format="orbax"),
        "write": lambda path: jaxadapt.write(jaxadapt.to_peft(small.adapter()), path),
        "step": lambda path: _step(path),
        "export_base": lambda path: jaxadapt.export.export_base(BASE, path, keymap=TABLE),
        "export_base, shards": lambda path: jaxadapt.export.export_base(BASE, path, keymap=TABLE, max_shard_size=100),
        "merge, out": lambda path: merge_files.merge_folder(good / "base", good / "adapter", path),
        "combine, out": lambda path: adapter_files.combine_folders([good / "adapter"] * 2, [1.0, 1.0], path),
    }


def _step(path: Path) -> None:
    with jaxadapt.CheckpointManager(path) as manager:
        manager.save(2, small.adapter())


def full(kind: str, path: Path) -> Path:
    """A folder that the operation would read, or write over."""
    if kind in ("import_base", "merge, base", "export_base", "export_base, shards", "merge, out"):
        jaxadapt.export.export_base(BASE, path, keymap=TABLE)
    elif kind in ("restore", "adapter of a step", "step"):
        with jaxadapt.CheckpointManager(path) as manager:
            manager.save(1, small.trained())
    else:
        jaxadapt.save(small.adapter(), path)
    return path


def _closed_files(path: Path) -> Path:
    for file in path.iterdir():
        file.chmod(0)
    return path


def _with_mode(mode: int) -> Callable[[Path], Path]:
    def close(path: Path) -> Path:
        path.chmod(mode)
        return path

    return close


def _below_closed(path: Path) -> Path:
    path.parent.chmod(0)
    return path


def _below_read_only(path: Path) -> Path:
    path.parent.chmod(0o555)
    return path.parent / "new"


LONG = "n" * 300
READING: dict[str, Callable[[Path], Path]] = {
    "closed folder": _with_mode(0),
    "folder that is listed and not entered": _with_mode(0o444),
    "closed files": _closed_files,
    "below a closed folder": _below_closed,
    "long name": lambda path: path / LONG,
    "below a long name": lambda path: path / LONG / "below",
}
WRITING: dict[str, Callable[[Path], Path]] = {
    "closed folder": _with_mode(0),
    "read-only folder": _with_mode(0o555),
    "folder that is written to and not read": _with_mode(0o333),
    "folder that is listed and not entered": _with_mode(0o444),
    "below a closed folder": _below_closed,
    "below a read-only folder": _below_read_only,
    "long name": lambda path: path / LONG,
    "below a long name": lambda path: path / LONG / "below",
}


def main() -> None:
    root = Path(sys.argv[1])
    good = root / "good"
    full("read", good / "adapter")
    full("import_base", good / "base")
    ways = [(readers(good), READING, "read"), (writers(good), WRITING, "write")]
    tasks: list[tuple[str, str, Path, Operation]] = []
    for operations, obstacles, way in ways:
        for name, operation in operations.items():
            own = full(name, root / "warm" / way / name)  # what is imported when it runs is imported now
            if name not in ("save, orbax", "push"):
                operation(own)
            for obstacle, close in obstacles.items():
                path = full(name, root / way / name / obstacle / "folder")
                tasks.append((name, obstacle, close(path), operation))
    operations["save, orbax"](root / "warm" / "orbax")
    for name in jaxadapt.__all__:
        getattr(jaxadapt, name)  # loads its module: afterwards the checkout may be closed to this process
    for path, folders, names in os.walk(root):
        if os.geteuid() == 0:
            for name in (*folders, *names):
                os.chown(Path(path) / name, NOBODY, NOBODY)
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    told: list[list[str]] = []
    for name, obstacle, path, operation in tasks:
        error: BaseException | None = None
        try:
            operation(path)
        except Exception as raised:
            error = raised
        ours = isinstance(error, jaxadapt.AdapterError)
        told.append([name, obstacle, str(path), "ours" if ours else type(error).__name__, str(error)])
    print("told", json.dumps(told))


if __name__ == "__main__":
    main()
