"""Thousands of adapter folders on disk, some of them in host memory, and those that batches use in a bank's slots."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.core.errors import AdapterError, AttachError, FileError, bullets, close_matches, raise_as, warn
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.applied import Implementation
from jaxadapt.models.call import Rows
from jaxadapt.models.carriers import carrier
from jaxadapt.persistence.folder import read, read_config
from jaxadapt.persistence.load_adapter import from_peft
from jaxadapt.serving.bank import Bank, RowsByName, prepare, weights_read, write_slot
from jaxadapt.serving.layout import Tensors
from jaxadapt.storage import atomic, location

# ---------------------------------------------------------------- index


BASE = "__base__"  # PEFT's name of the base in `adapter_names`
FILES = (location.CONFIG, *location.FOLDER_WEIGHTS, *location.ORBAX_MARKERS)
"""The names of an adapter's files; other files in its folder are not the adapter's."""

Files = tuple[tuple[str, tuple[int, ...]], ...]
"""Of each file of an adapter at one time: its name, and (bytes, time of writing, time of change, device, inode).

The times are in ns. A file that replaces another one may have its name, size and time of writing, but not all of the
time of change, which no program can set, the device and the inode.
"""


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
        return sum(nbytes for _, (nbytes, *_) in self.files)

    @functools.cached_property
    def config(self) -> Any:
        """The configuration, which has the rank (`r`) and the base's name. It is read when it is first asked for."""
        return read_config(self.path)


def find_folders(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Return `{name: folder}` of the adapter folders directly in a folder, sorted by name.

    A folder with the base's name is left out with a warning. Raises `FileError` if the folder cannot be read, or is
    itself that of an adapter.
    """
    with raise_as(FileError, f"cannot list the adapters in {os.fspath(root)}", OSError):
        found = {path.name: path for path in sorted(Path(root).iterdir()) if is_adapter(path)}
    if not found and is_adapter(Path(root)):
        raise FileError(f"{os.fspath(root)} is the folder of one adapter; give the folder that contains it")
    if BASE in found:
        warn(f"{found.pop(BASE)}: {BASE!r} is the name of the base, so the adapter cannot be leased; rename the folder")
    return found


def is_adapter(path: Path) -> bool:
    """Return True for a folder with a configuration; False also for a circular link."""
    return os.path.isfile(path / location.CONFIG)  # noqa: PTH113 (`Path.is_file` raises errors)


def list_files(path: str | os.PathLike[str]) -> Files:
    """Return the adapter's files in a folder; raise `FileError` if the folder cannot be read.

    A file that cannot be described counts as missing: reading the adapter says why.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    with (
        raise_as(FileError, f"cannot read the adapter folder {os.fspath(path)}", OSError, ValueError),  # a NUL in it
        os.scandir(path) as entries,
    ):
        own = [entry for entry in entries if entry.name in FILES]
    for entry in own:
        with contextlib.suppress(OSError):
            at = entry.stat()
            found.append((entry.name, (at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_dev, at.st_ino)))
    return tuple(sorted(found))


# ---------------------------------------------------------------- pool


_Prepared = tuple[Tensors, ...]
_Loaded = TypeVar("_Loaded")
_NO_SLOT = -1  # its rows are NaN


@dataclasses.dataclass(frozen=True, eq=False)
class Lease(Sequence[int]):
    """The slots of a batch's rows, as integers; they are valid until the lease ends.

    Attributes:
        slots: int32 (rows); -1 for a row whose adapter failed.
        versions: for each row the id of the adapter's version, 0 for the base. No other version has it, ever: use it in
            the keys of prefix and KV caches.
    """

    slots: np.ndarray
    versions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: Any) -> Any:
        return self.slots[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.slots, dtype)


class AdapterPool(RowsByName):
    """Adapters by name, loaded from their folders into the slots of a bank when a batch needs them.

    All methods may be called from several threads. One lock covers the bank and the tables; files are read outside it.

    Args:
        bank: the bank. The pool owns it from now on, because `put` donates its arrays.
        base: the NNX model, Linen variables or base parameters that the bank was created for.
        folders: a folder of adapter folders, whose names they get, or `{name: folder}`. A folder that is added to the
            former later is found when a lease names it.
        host_bytes: the budget for prepared adapters in host memory, each of `bank.layout.slot_bytes`.
        keymap: as in `jaxadapt.load`.

    Raises `FileError` if a folder cannot be listed.

    >>> import tempfile, jax, jax.numpy as jnp, jaxadapt
    >>> base, config = {"q": {"kernel": jnp.ones((4, 6))}}, jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> root = tempfile.TemporaryDirectory()
    >>> jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0)), root.name + "/fr")
    >>> pool = AdapterPool(jaxadapt.serving.create(base, config, slots=3), base, root.name)
    >>> with pool.lease(["fr", None, "fr"]) as ids:
    ...     ids.slots.tolist(), pool.select(ids).arrays[0]["scale"].tolist()
    ([1, 0, 1], [4.0, 0.0, 4.0])
    >>> root.cleanup()
    """

    def __init__(
        self,
        bank: Bank,
        base: Any,
        folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        *,
        host_bytes: int = 1 << 30,
        keymap: KeyMap | str | None = None,
    ) -> None:
        self._bank = bank
        self._weights = weights_read(bank, base)
        self._shapes, self._keymap = carrier(base).abstract(), keymap
        self._root = None if isinstance(folders, Mapping) else folders
        self._newest: dict[str, Version] = {}  # by name
        self._removed: set[str] = set()
        self._numbers = itertools.count(1)
        # By the id of a version; the one that was used last is at the end.
        self._host: collections.OrderedDict[int, concurrent.futures.Future[_Prepared]] = collections.OrderedDict()
        self._host_room = host_bytes // max(1, bank.layout.slot_bytes)
        self._slots: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._pins: collections.Counter[int] = collections.Counter()  # leases of each version in a slot
        self._free = list(range(bank.slots - 1, 0, -1))
        self._changed = threading.Condition(threading.RLock())
        self._queue: dict[object, float] = {}  # {ticket: when it ends to wait}, of the leases without slots
        self._threads = concurrent.futures.ThreadPoolExecutor(2, "adapter-pool")
        for name, path in (folders if isinstance(folders, Mapping) else find_folders(folders)).items():
            self.add(name, path)

    # ------------------------------------------------------------ names

    def add(self, name: str, path: str | os.PathLike[str]) -> Version:
        """Give a name to a folder, or a new version to a name whose folder changed; return the version.

        Leases that exist keep the old version, new ones get the new one. Raises `FileError` if the folder cannot be
        read, and `AttachError` for the name of the base.
        """
        with self._changed:
            return self._record(name, path, list_files(path))

    def remove(self, name: str) -> None:
        """Forget a name until `add`; raise `AttachError` for an unknown one. Leases keep its version until they end."""
        with self._changed:
            del self._newest[self.version(name).name]
            self._removed.add(name)

    def names(self) -> list[str]:
        """Return the names that the pool knows, which include those of a folder that leases have found."""
        with self._changed:
            return list(self._newest)

    def version(self, name: str) -> Version:
        """Return the newest version of a name: its id, folder, size and configuration.

        Raises `AttachError` for an unknown name.
        """
        with self._changed:
            if (version := self._newest.get(name)) is not None:
                return version
            similar = close_matches([name], list(self._newest))
            hint = f"; similar names are {', '.join(map(repr, similar))}" if similar else ""
            raise AttachError(f"the pool has no adapter {name!r}; it has {len(self._newest)} others{hint}")

    def resident(self) -> list[str]:
        """Return the names whose newest version is in a slot."""
        with self._changed:
            return [name for name, version in self._newest.items() if version.id in self._slots]

    def _record(self, name: str, path: str | os.PathLike[str], files: Files) -> Version:
        """Give a name to a folder with the files that `list_files` found; return its version."""
        if name == BASE:
            raise AttachError(f"{os.fspath(path)}: {BASE!r} is the name of the base; choose another name")
        self._removed.discard(name)
        known = self._newest.get(name)
        if known is None or (known.path, known.files) != (Path(path), files):
            known = self._newest[name] = Version(next(self._numbers), name, Path(path), files)
        return known

    def _find(self, name: str) -> Path:
        """Return the folder of a name, which may be new in the root; raise `AttachError` for an unknown name."""
        if name not in self._newest and name not in self._removed and self._root is not None:
            found = Path(self._root, name)
            if name == found.name and name not in ("", "..") and is_adapter(found):  # the others lead elsewhere
                return found
        return self.version(name).path

    # ------------------------------------------------------------ leases

    @contextlib.contextmanager
    def lease(
        self, names: Sequence[str | None], *, failed: dict[str, AdapterError] | None = None, wait: float = 0.0
    ) -> Generator[Lease]:
        """Bring the adapters of a batch's rows into slots, and keep them there within a context.

        A lease gets all of its slots at once, and holds none while it waits. Leases get slots in the order in which
        they ask for them: none overtakes one that waits. So do not wait for a lease inside another one.

        If an adapter's own files changed, a lease gets a new version of it, also where the old one is in a slot. If
        they change while they are read, they are read once more. An adapter whose folder is gone cannot be leased.

        Args:
            names: the adapter of each row; None, or PEFT's "__base__", for the base.
            failed: a dictionary for the errors of adapters that cannot be loaded. Their rows get the id -1, which gives
                NaN. Without it, an error of one adapter ends the whole call.
            wait: the seconds to wait, after loading, until other leases end, if they hold too many slots.

        Raises the errors of `jaxadapt.load` and `put` for adapters that cannot be loaded, and `AttachError` if slots
        are lacking or a name is no text.
        """
        _check_names(names)
        errors: dict[str, AdapterError] = {}
        wanted: dict[str, Version] = {}
        prepared: dict[int, _Prepared] = {}
        pinned: list[int] = []
        slots: dict[str, int] | None = None
        ticket = object()
        names = [None if name == BASE else name for name in names]
        different = list(dict.fromkeys(name for name in names if name is not None))
        try:
            for name in different:
                with _collect(name, errors):
                    wanted[name] = self._refresh(name)
            while slots is None:
                self._load_missing(wanted, prepared, errors)
                if errors and failed is None:
                    _raise_together({name: errors[name] for name in different if name in errors})
                slots = self._take_slots(ticket, wanted, prepared, pinned, wait)
            if failed is not None:
                failed.update(errors)
            yield Lease(
                np.array([0 if name is None else slots.get(name, _NO_SLOT) for name in names], np.int32),
                tuple(wanted[name].id if name in wanted else 0 for name in names),
            )
        finally:
            with self._changed:
                self._queue.pop(ticket, None)
                self._pins -= collections.Counter(pinned)
                self._changed.notify_all()

    def prefetch(self, names: Iterable[str]) -> dict[str, concurrent.futures.Future[Version]]:
        """Load adapters into host memory in the background; return `{name: future}`, whose results are the versions."""
        return {name: self._threads.submit(self._prefetch, name) for name in names}

    def _prefetch(self, name: str) -> Version:
        return self._settle(self._refresh(name), self._load)[0]

    def _load_missing(
        self, wanted: dict[str, Version], prepared: dict[int, _Prepared], errors: dict[str, AdapterError]
    ) -> None:
        """Load the wanted versions that are not in slots; move the names that cannot be loaded to the errors."""
        with self._changed:
            missing = {n: v for n, v in wanted.items() if v.id not in self._slots and v.id not in prepared}
        for name, version in missing.items():
            with _collect(name, errors):
                wanted[name], found = self._settle(version, self._load)
                prepared[wanted[name].id] = found
            if name in errors:
                del wanted[name]

    def _take_slots(
        self,
        ticket: object,
        wanted: Mapping[str, Version],
        prepared: Mapping[int, _Prepared],
        pinned: list[int],
        wait: float,
    ) -> dict[str, int] | None:
        """Wait for the ticket's turn and for enough slots; return the slot of each name, and append to `pinned`.

        Returns None if a version has left its slot meanwhile and is not prepared. The ticket then keeps its turn.
        """
        own = {version.id for version in wanted.values()}
        room = self._bank.slots - 1
        if len(own) > room:
            raise AttachError(
                f"cannot lease {len(own)} adapters at once: the bank has {room} slots beside the base's."
                " Create the bank with more slots, or split the batch"
            )
        with self._changed:
            deadline = self._queue.setdefault(ticket, time.monotonic() + wait)
            while (first := next(iter(self._queue))) is not ticket or len(own | self._pins.keys()) > room:
                if (left := deadline - time.monotonic()) <= 0:
                    reason = (
                        f"other leases hold {len(self._pins.keys() - own)} of the {room} slots"
                        if first is ticket
                        else "an earlier lease waits for slots"
                    )
                    raise AttachError(
                        f"cannot bring {', '.join(map(repr, wanted))} into slots: {reason}. End some leases, create the"
                        " bank with more slots, or pass a longer wait="
                    )
                self._changed.wait(left)
            missing = [version for version in wanted.values() if version.id not in self._slots]
            if any(version.id not in prepared for version in missing):
                return None
            del self._queue[ticket]
            self._pins.update(own)  # so none of them makes room for another
            pinned.extend(own)
            for version in missing:
                self._write(version, prepared[version.id])
            for version in wanted.values():
                self._slots.move_to_end(version.id)
            self._changed.notify_all()
            return {name: self._slots[version.id] for name, version in wanted.items()}

    def _write(self, version: Version, prepared: _Prepared) -> None:
        """Write a pinned version into a free slot or that of the least recently used version without a pin."""
        slot = self._free.pop() if self._free else self._slots.pop(next(n for n in self._slots if n not in self._pins))
        try:
            self._bank = write_slot(self._bank, prepared, slot, self._weights)
        except BaseException:
            self._free.append(slot)
            raise
        self._slots[version.id] = slot

    # ------------------------------------------------------------ the bank

    def select(self, ids: Any, *, weights: Any = None, implementation: Implementation | None = None) -> Rows:
        """Return `Bank.select` of the present bank.

        The result of "gather" stays valid when slots change. All other implementations use the bank's own arrays, so
        select and call the model within `with pool.bank():`.
        """
        with self._changed:
            return self._bank.select(ids, weights=weights, implementation=implementation)

    @contextlib.contextmanager
    def rows(self, adapter_names: Sequence[str | Mapping[str, float] | None], *, wait: float = 0.0) -> Generator[Rows]:
        """Lease the adapters of a batch's rows by name and return their tensors, for `route`.

        Args:
            adapter_names: for each row a name, None or "__base__" for the base, or `{name: weight}` for the sum of
                several adapters' changes with these weights.
            wait: as in `lease`.

        Raises the errors of `lease` and `Bank.select`.
        """
        each = [name if isinstance(name, Mapping) else {name: 1.0} for name in adapter_names]
        mixed = any(isinstance(name, Mapping) for name in adapter_names)
        width = max([len(of) for of in each], default=1)
        names: list[str | None] = [name for of in each for name in [*of, *[None] * (width - len(of))]]
        weights = np.array([[*of.values(), *[0.0] * (width - len(of))] for of in each], np.float32)
        with self.lease(names, wait=wait) as ids:
            slots = ids.slots.reshape(len(each), width)
            yield self.select(slots, weights=weights) if mixed else self.select(slots[:, 0])

    @contextlib.contextmanager
    def bank(self) -> Generator[Bank]:
        """Return the present bank within a context that no other thread can change it in: dispatch, and leave."""
        with self._changed:
            yield self._bank

    def adapter(self, name: str) -> Adapter:
        """Return the newest version of an adapter, read from its folder, for `jaxadapt.merge`, `inject` and others.

        If all requests of a server name one adapter, a merged copy of the base has no cost in a call.
        """
        return self._settle(self._refresh(name), self._read_adapter)[1]

    def close(self) -> None:
        """Stop the threads that prefetch."""
        self._threads.shutdown(cancel_futures=True)

    # ------------------------------------------------------------ host memory

    def _refresh(self, name: str) -> Version:
        """Return the newest version of a name, a new one if files of its folder changed; list them without the lock."""
        while True:
            with self._changed:
                known = self._newest.get(name)
                path = self._find(name)
            files = list_files(path)
            with self._changed:
                if self._newest.get(name) is known:  # so no one saw later files meanwhile
                    return self._record(name, path, files)

    def _settle(self, version: Version, load: Callable[[Version], _Loaded]) -> tuple[Version, _Loaded]:
        """Load a version of an adapter; if its files change meanwhile, load the newest one, once.

        The second reading takes its turn among the writers of jaxadapt, which lock the folder, so none disturbs it.
        """
        try:
            return version, load(version)
        except AdapterError:
            if self._refresh(version.name) == version:
                raise
        with atomic.lock_directory(version.path):
            version = self._refresh(version.name)
            return version, load(version)

    def _load(self, version: Version) -> _Prepared:
        """Return an adapter's padded tensors, from host memory or from its folder, which one thread reads."""
        with self._changed:
            known = self._host.get(version.id)
            mine = self._host.setdefault(version.id, concurrent.futures.Future())
            self._host.move_to_end(version.id)
        if known is not None:
            return known.result()
        try:
            mine.set_result(prepare(self._bank, self._read_adapter(version)))
        except BaseException as error:
            with self._changed:
                self._host.pop(version.id, None)
            mine.set_exception(error)
            raise
        with self._changed:
            complete = (number for number, each in self._host.items() if each.done())  # others are still being read
            for number in list(itertools.islice(complete, max(0, len(self._host) - self._host_room))):
                del self._host[number]
        return mine.result()

    def _read_adapter(self, version: Version) -> Adapter:
        adapter = from_peft(read(version.path), self._shapes, keymap=self._keymap)
        if self._refresh(version.name) != version:
            raise FileError(f"{version.path}: the adapter changed while it was read; request it again")
        return adapter


def _check_names(names: Sequence[Any]) -> None:
    if wrong := [name for name in names if not isinstance(name, str | None)]:
        raise AttachError(f"names: expected the name of each row's adapter, or None for the base, found {wrong[0]!r}")


@contextlib.contextmanager
def _collect(name: str, errors: dict[str, AdapterError]) -> Generator[None]:
    """Add an error of the block to `errors`."""
    try:
        yield
    except AdapterError as error:
        errors[name] = error


def _raise_together(errors: Mapping[str, AdapterError]) -> None:
    """Raise the only error, or one that lists all."""
    if len(errors) == 1:
        raise next(iter(errors.values()))
    raise AttachError("cannot load these adapters:\n" + bullets([f"{name}: {error}" for name, error in errors.items()]))
