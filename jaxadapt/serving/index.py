"""Adapter folders by name, and slots and memory given to the most recently used ones. No JAX."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from jaxadapt.core.errors import AttachError, FileError, close_matches, warn
from jaxadapt.storage import hub, orbax

BASE = "__base__"  # PEFT's name of the base in `adapter_names`
_NAMES = (hub.CONFIG, *hub.WEIGHTS, hub.MLX_WEIGHTS, *orbax.MARKERS)  # other files are not the adapter's


class File(NamedTuple):
    """One file of an adapter at one time, as the file system describes it; all times are in ns.

    A file that replaces another one may have its name, size and time of writing, but not all of `changed`, which no
    program can set, `device` and `inode`.
    """

    name: str
    nbytes: int
    written: int
    changed: int
    device: int
    inode: int


Files = tuple[File, ...]


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of an adapter: the files of a folder at one time.

    Attributes:
        id: a number that no other version of the pool has or will have, such as for the keys of prefix caches.
        name: the adapter's name.
        path: the folder.
        files: the adapter's files.
    """

    id: int
    name: str
    path: Path
    files: Files

    @property
    def nbytes(self) -> int:
        """The bytes of the adapter's files."""
        return sum(file.nbytes for file in self.files)

    @functools.cached_property
    def config(self) -> Any:
        """The configuration, which has the rank (`r`) and the base's name. It is read when it is first asked for."""
        from jaxadapt.persistence.folder import read_config

        return read_config(self.path)


class Folders:
    """The newest version of each name. It is not thread-safe.

    Args:
        root: the folder of the adapters' folders; None to know only those that are added.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.newest: dict[str, Version] = {}
        self._root = root
        self._removed: set[str] = set()
        self._numbers = itertools.count(1)

    def add(self, name: str, path: str | os.PathLike[str]) -> Version:
        """Record a folder under a name; return its version, a new one if the folder or a file in it changed.

        Raises `FileError` if the folder cannot be read, and `AttachError` for the name of the base.
        """
        return self.record(name, path, list_files(path))

    def record(self, name: str, path: str | os.PathLike[str], files: Files) -> Version:
        """Record a folder under a name by the files that `list_files` found; return its version as `add` does."""
        if name == BASE:
            raise AttachError(f"{os.fspath(path)}: {BASE!r} is the name of the base; choose another name")
        self._removed.discard(name)
        known = self.newest.get(name)
        if known is None or (known.path, known.files) != (Path(path), files):
            known = self.newest[name] = Version(next(self._numbers), name, Path(path), files)
        return known

    def remove(self, name: str) -> None:
        """Forget a name until it is added again; raise `AttachError` for an unknown one."""
        del self.newest[self.get(name).name]
        self._removed.add(name)

    def path(self, name: str) -> Path:
        """Return the folder of a name, which may be new in the root; raise `AttachError` for an unknown name."""
        if name not in self.newest and name not in self._removed and self._root is not None:
            found = Path(self._root, name)
            if name == found.name and name not in ("", "..") and _is_adapter(found):  # the others lead elsewhere
                return found
        return self.get(name).path

    def get(self, name: str) -> Version:
        """Return the newest version of a name; raise `AttachError` for an unknown name."""
        version = self.newest.get(name)
        if version is None:
            similar = close_matches([name], list(self.newest))
            hint = f"; similar names are {', '.join(map(repr, similar))}" if similar else ""
            raise AttachError(f"the pool has no adapter {name!r} among {len(self.newest)}{hint}")
        return version


def find_folders(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Return `{name: folder}` of the adapter folders directly in a folder, sorted by name.

    A folder with the base's name is left out with a warning. Raises `FileError` if the folder cannot be read.
    """
    try:
        folders = {path.name: path for path in sorted(Path(root).iterdir())}
    except OSError as error:
        raise FileError(f"cannot list the adapters in {os.fspath(root)}: {error}") from error
    found = {name: path for name, path in folders.items() if _is_adapter(path)}
    if BASE in found:
        warn(f"{found.pop(BASE)}: {BASE!r} is the name of the base, so the adapter cannot be leased; rename the folder")
    return found


def _is_adapter(path: Path) -> bool:
    """Return True for a folder with a configuration; False also for a circular link."""
    return os.path.isfile(path / hub.CONFIG)  # noqa: PTH113 (`Path.is_file` raises errors)


def list_files(path: str | os.PathLike[str]) -> Files:
    """Return the adapter's files in a folder; raise `FileError` if the folder cannot be read.

    A file that cannot be described counts as missing: reading the adapter says why.
    """
    found: list[File] = []
    try:
        with os.scandir(path) as entries:
            own = [entry for entry in entries if entry.name in _NAMES]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileError(f"cannot read the adapter folder {os.fspath(path)}: {error}") from error
    for entry in own:
        with contextlib.suppress(OSError):
            at = entry.stat()
            found.append(File(entry.name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_dev, at.st_ino))
    return tuple(sorted(found))


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key within a budget; the least recently used ones that are not pinned make room. Not thread-safe.

    Attributes:
        budget: the largest cost of all values together.
        used: the cost of all values.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: collections.OrderedDict[Key, tuple[Value, int]] = collections.OrderedDict()
        self._pins: collections.Counter[Key] = collections.Counter()
        self.used = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __getitem__(self, key: Key) -> Value:
        """Return a value that is held, and count it as used now."""
        self._held.move_to_end(key)
        return self._held[key][0]

    def get(self, key: Key) -> Value | None:
        """Return a value and count it as used now; None if there is none."""
        return self[key] if key in self._held else None

    def make_room(self, cost: int) -> list[Value] | None:
        """Remove values until one of this cost fits, and return them; return None, removing nothing, if it cannot."""
        free = self.budget - self.used
        victims: list[Key] = []
        for key, (_, size) in self._held.items():
            if free >= cost:
                break
            if not self._pins[key]:
                victims.append(key)
                free += size
        if free < cost:
            return None
        self.used = self.budget - free
        return [self._held.pop(key)[0] for key in victims]

    def add(self, key: Key, value: Value, cost: int) -> None:
        """Hold a value that `make_room` made room for."""
        self._held[key] = value, cost
        self.used += cost

    def pin(self, keys: Iterable[Key]) -> None:
        """Keep these values until `unpin` is called as often."""
        self._pins.update(keys)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Undo one `pin`."""
        self._pins.subtract(keys)
        self._pins += collections.Counter()

    def pinned(self) -> Mapping[Key, int]:
        """Return the number of pins of each pinned key."""
        return dict(self._pins)
