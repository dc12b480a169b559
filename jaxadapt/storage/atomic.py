"""Durable, atomic replacement of files: at any moment a reader finds either the old bytes or the new ones.

The new bytes go to a temporary file in the same directory. It is flushed to the disk and renamed over the target; then
the directory is flushed. Files that belong together (`replacing_all`) are all flushed before the first rename. Folders
are created and flushed in the same way, so that they survive a crash.

A writer holds a lock on its temporary file. An unlocked temporary file is therefore a leftover of a killed writer, even
on a disk that several machines share. The next write of the same target removes these leftovers, and the empty folders
beside them. A target that is a symbolic link is replaced, not followed: it may point into a cache.

An address (see `location`) is replaced by one PUT of the store, which is also atomic and leaves no leftovers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from jaxadapt.core.errors import FileError
from jaxadapt.storage import location
from jaxadapt.storage.local_files import MAX_CALL, close, file_error, file_errors

# ---------------------------------------------------------------- flush


_FOLDER = os.O_RDONLY | os.O_DIRECTORY


def make_folder(folder: location.Location) -> list[Path]:
    """Create a folder and its missing parents durably. Return the new folders, innermost first.

    Does nothing for an address, since object stores have no folders.

    Raises:
        FileError: no permission, or a part of the path is a file. Then no new folder remains.
    """
    if isinstance(folder, location.Address):
        return []
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with _removed_if_failed(new):
            folder.mkdir(parents=True, exist_ok=True)
            for path in new:
                # A writable folder need not be readable, and a folder that cannot be opened cannot be flushed.
                with contextlib.suppress(PermissionError):
                    flush_directory(path.parent)
    except (OSError, ValueError) as error:
        raise file_error("create the folder", str(folder), error, "choose another path") from error
    return new


@contextlib.contextmanager
def _removed_if_failed(folders: Sequence[Path]) -> Generator[None]:
    """Remove the empty ones of these folders, innermost first, if the block raises an exception."""
    try:
        yield
    except BaseException:
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()
        raise


def flush_tree(folder: Path, display_path: Path) -> None:
    """Flush every file and directory under a folder to the disk.

    Args:
        folder: the folder to flush.
        display_path: the name of the folder in errors.

    Raises:
        FileError: the disk reports an error.
    """

    def fail(error: OSError) -> None:
        raise error

    with write_errors(str(display_path)):
        for directory, _, names in os.walk(folder, onerror=fail):
            for name in names:
                with opened(Path(directory, name), os.O_RDONLY) as fd:
                    flush_fd(fd)
            flush_directory(Path(directory))


def flush_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk, if its file system can. Raises `OSError`."""
    with opened(directory, _FOLDER) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush directories
                raise


_UNTOUCHED = "the previous content of the path is untouched"


@contextlib.contextmanager
def write_errors(path: str) -> Generator[None]:
    """Raise the errors of the operating system within a context as those of a write that left the target unchanged."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("write", path, error, _UNTOUCHED) from error


def write_at(fd: int, data: memoryview, offset: int, path: str) -> None:
    """Write contiguous bytes at an offset of an open file; `path` names it in errors.

    Raises:
        FileError: the operating system reports an error.
    """
    with write_errors(path):
        while len(data):
            count = os.pwrite(fd, data[:MAX_CALL], offset)
            data, offset = data[count:], offset + count


def flush_file(fd: int, path: str) -> None:
    """Wait until the bytes of an open file are on the disk; `path` names it in errors. Raises `FileError`."""
    with write_errors(path):
        flush_fd(fd)
        # Some file systems (FUSE, NFS) report a failed write only on close. Close a duplicate, since the lock must
        # last until the file is renamed.
        os.close(os.dup(fd))


def flush_fd(fd: int) -> None:
    """Wait until the bytes of a file are on the disk. Raises `OSError`."""
    if sys.platform == "darwin":
        # On macOS, fsync() only reaches the drive's own cache.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], flags: int) -> Generator[int]:
    """Open a file or folder within a context, to which nothing is written after its last flush. Raises `OSError`."""
    # Mode 0666: the kernel applies the umask, which Python can only read by changing it for all threads.
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # the data is safe
            os.close(fd)


# ---------------------------------------------------------------- leftovers


def lock(fd: int, *, wait: bool) -> bool:
    """Lock an open file or folder; return False if another process holds the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by its writer; or a file system without locks, where leftovers are never removed
        return False
    return True


def remove_leftovers(directory: str | os.PathLike[str], names: str, *, folders: bool = False) -> bool:
    """Remove the leftovers of killed writers, as far as possible; return True if any were removed.

    Args:
        directory: the directory of the targets.
        names: a regular expression that the targets' names match.
        folders: also remove leftover folders of `atomic.staging_folder`.
    """
    pattern = re.compile(rf"\.(?:{names})\.\d+\.[0-9a-f]{{16}}\.(?:tmp|old)", re.DOTALL)
    removed = False
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
        for stale in Path(directory).iterdir():
            if not pattern.fullmatch(stale.name):
                continue
            with contextlib.suppress(OSError):
                folder = stat.S_ISDIR(stale.lstat().st_mode)
                if folder and not folders:
                    continue
                # A folder opens only for reading, which is enough to lock it.
                flags = (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK
                with opened(stale, flags) as fd:
                    if (folder or stat.S_ISREG(os.fstat(fd).st_mode)) and lock(fd, wait=False):
                        shutil.rmtree(stale) if folder else stale.unlink()
                        removed = True
    return removed


@contextlib.contextmanager
def clean_target(path: str | os.PathLike[str]) -> Generator[None]:
    """Remove the leftovers of killed writers of a file or folder, and its empty folders if the block fails.

    If the block raises an exception, an empty folder at the path is removed, and so are empty parents that the block
    made or that contained leftovers.
    """
    target = location.to_location(path)
    empty: list[Path] = []
    if isinstance(target, Path):
        empty += [target, *(parent for parent in target.parents if not os.path.lexists(parent))]
        remove_leftovers(target, ".+", folders=True)
        if remove_leftovers(target.parent, re.escape(target.name), folders=True):
            empty.append(target.parent)
    with _removed_if_failed(empty):
        yield


# ---------------------------------------------------------------- atomic


# New bytes after which Linux starts to write them to the disk, which would otherwise wait for the fsync, and written
# bytes that stay in the page cache; older pages are dropped. Without both a save of 1.5 GB takes 1.6 to 2.4 times as
# long, and one of 50 or 500 MB as long as with them (benchmarks/README.md).
_WRITEBACK_BYTES = 4 << 20
_CACHED_BYTES = 64 << 20


class Writer:
    """The open temporary file of a replacement."""

    def __init__(self, fd: int, path: str, temporary: Path) -> None:
        """Wrap an open file.

        Args:
            fd: the descriptor of the temporary file.
            path: the target, for messages.
            temporary: the path of the temporary file.
        """
        self.fd = fd
        self.path = path
        self.temporary = temporary
        self.size: int = 0  # the bytes that were written
        self._started = 0
        self._kept = 0  # bytes of the header, which are overwritten later: to start writing them would delay that

    @property
    def backup(self) -> Path:
        """The second name of the target's old file while the new one replaces it."""
        return self.temporary.with_suffix(".old")

    def write(self, data: bytes | memoryview) -> int:
        """Append contiguous bytes, and return their number. Raises `FileError` for an `OSError`."""
        data = memoryview(data)
        if not self.size:
            self._started = self._kept = min(-(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE, _WRITEBACK_BYTES)
        for begin in range(0, len(data), _WRITEBACK_BYTES):
            lot = data[begin : begin + _WRITEBACK_BYTES]
            write_at(self.fd, lot, self.size, self.path)
            self.size += len(lot)
            if self.size - self._started >= _WRITEBACK_BYTES:
                self._start_writeback(self._started, self.size)
                self._start_writeback(self._kept, self.size - _CACHED_BYTES)
                self._started = self.size
        return len(data)

    def flush(self) -> None:
        """Do nothing, as `zipfile` expects it: the replacement flushes the file."""

    def _start_writeback(self, start: int, end: int) -> None:
        """Start to write a range of the file to the disk, and drop those of its pages that are there already."""
        if sys.platform == "linux" and start < end:
            with contextlib.suppress(OSError):  # only advice; the flush reports errors
                os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def lock_directory(directory: str | os.PathLike[str]) -> Generator[None]:
    """Hold an exclusive lock on a directory, for writers that replace several files that belong together.

    Does nothing where directories cannot be locked (object stores, some network file systems).
    """
    with contextlib.ExitStack() as stack:
        if not isinstance(directory, location.Address):
            with contextlib.suppress(OSError, ValueError):  # the write itself reports the error
                fd = stack.enter_context(opened(directory, _FOLDER))
                stack.callback(_unlock, fd)
                lock(fd, wait=True)
        yield


@contextlib.contextmanager
def open_folder(folder: location.Location) -> Generator[None]:
    """Create a folder durably and hold its lock; if the block fails, remove the new folders that are empty."""
    with _removed_if_failed(make_folder(folder)), lock_directory(folder):
        yield


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile shares the descriptor


def _remove(path: Path, folder: bool) -> None:
    """Remove a temporary file or folder, as far as possible."""
    with contextlib.suppress(OSError):  # it was renamed
        shutil.rmtree(path, ignore_errors=True) if folder else path.unlink()


@contextlib.contextmanager
def _temporary(target: str, *, folder: bool = False) -> Generator[Writer]:
    """Create a temporary file or folder beside a target, and lock it; remove it at the end, unless it was renamed."""
    directory, name = os.path.split(target)
    # Those of any folder, since a process killed between renaming and cleaning up has no next writer of the same path.
    remove_leftovers(directory, ".+" if folder else re.escape(name), folders=folder)
    is_there = False
    while not is_there:
        temporary = Path(directory, f".{name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
        with contextlib.ExitStack() as stack:
            with write_errors(target):
                if folder:
                    temporary.mkdir()
                flags = _FOLDER if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
                try:
                    fd = stack.enter_context(opened(temporary, flags))
                except FileNotFoundError:
                    if not folder:
                        raise
                    continue  # another writer removed the new folder as a leftover, before we could lock it
                stack.callback(_remove, temporary, folder)
                lock(fd, wait=True)
                # Before we locked it, another writer may have locked it and removed it as a leftover.
                is_there = os.path.lexists(temporary) if folder else os.fstat(fd).st_nlink > 0
            if is_there:
                yield Writer(fd, target, temporary)


def _rename_all(writers: Sequence[Writer]) -> None:
    """Rename all temporary files to their targets, or none."""
    existed = [os.path.lexists(writer.path) for writer in writers]
    for writer in writers[:-1]:  # the last target needs no backup: once it is renamed, all are
        with contextlib.suppress(OSError):  # no such file, or a file system without hard links
            os.link(writer.path, writer.backup, follow_symlinks=False)
    writer = writers[0]
    try:
        for writer in writers:
            writer.temporary.replace(writer.path)
    except BaseException as error:
        new = _restore(writers, existed)
        if not isinstance(error, OSError):
            raise
        state = _UNTOUCHED
        if new:
            old = ", ".join(one.path for one in writers if one.path not in new)
            state = f"the new content is already in {', '.join(new)}, and not in {old}; write all of them again"
        raise file_error("write", writer.path, error, state) from error
    finally:
        for each in writers:
            with contextlib.suppress(OSError):  # there was none, or it was put back
                each.backup.unlink()


def _restore(writers: Sequence[Writer], existed: Sequence[bool]) -> list[str]:
    """Restore the files that were already renamed, unless all of them were.

    Return the paths that could not be restored.
    """
    renamed = [not os.path.lexists(writer.temporary) for writer in writers]
    if all(renamed):
        return []
    new: list[str] = []
    for writer, done, was_present in zip(writers, renamed, existed, strict=True):
        if not done:
            continue
        try:
            if os.path.lexists(writer.backup):
                writer.backup.replace(writer.path)
            elif was_present:  # the file system has no hard links
                new.append(writer.path)
            else:
                Path(writer.path).unlink()
        except OSError:
            new.append(writer.path)
    return new


@contextlib.contextmanager
def open_replacement(path: str | os.PathLike[str]) -> Generator[Writer]:
    """Open a `Writer` whose content replaces `path` when the block ends without an exception.

    After an exception the temporary file is removed and `path` is unchanged.

    Raises:
        FileError: no space, no permission, the path is a directory, or its parent is missing.
    """
    with replacing_all([path]) as (writer,):
        yield writer


@contextlib.contextmanager
def replacing_all(paths: Sequence[str | os.PathLike[str]]) -> Generator[list[Writer]]:
    """Open a `Writer` for each of several files of one folder that belong together; see `open_replacement`.

    At the end of the block all files are flushed, then renamed in the order given, then the folder is flushed. If a
    rename fails, the files renamed before it are restored. Where they cannot be restored (in an object store, for
    example), the error says so.
    """
    addresses = [place for path in paths if isinstance(place := location.to_location(path), location.Address)]
    if addresses:
        with _upload_all(addresses) as writers:
            yield writers
        return
    targets = [_check_target(path) for path in paths]
    directory = os.path.split(targets[0])[0] or "."
    with contextlib.ExitStack() as stack:
        with write_errors(targets[0]):
            try:
                stack.enter_context(opened(directory, _FOLDER))
            except FileNotFoundError as error:
                raise FileError(
                    f"{targets[0]}: cannot write: the directory {directory} does not exist; create it first"
                ) from error
        writers = [stack.enter_context(_temporary(target)) for target in targets]
        yield writers
        for writer in writers:
            flush_file(writer.fd, writer.path)
        _rename_all(writers)
        with file_errors(
            "flush its directory", targets[0], f"the new {'file is' if len(targets) == 1 else 'files are'} in place"
        ):
            flush_directory(Path(directory))


def _check_target(path: str | os.PathLike[str]) -> str:
    """Return the target as text. Raises `FileError` if it is a directory."""
    target = os.fspath(path)  # a Path would lose the slash at its end
    if "://" in target:
        target = str(location.to_location(path))
    if os.path.split(target)[1] in ("", ".", "..") or os.path.isdir(target):  # noqa: PTH112 (no error)
        raise FileError(f"{target}: cannot write: expected the path of a file, found a directory; add a file name")
    return target


@contextlib.contextmanager
def _upload_all(addresses: Sequence[location.Address]) -> Generator[list[Writer]]:
    """Open a `Writer` for each address. At the end of the block, upload the files one after the other."""
    import tempfile

    folder = tempfile.gettempdir()
    writers: list[Writer] = []
    with contextlib.ExitStack() as stack:
        for place in addresses:
            shown = f"{place} (through {folder})"
            with write_errors(shown):
                # It has no name in any folder, so a killed process leaves no file.
                file = tempfile.TemporaryFile(prefix="jaxadapt-")  # noqa: SIM115 (closed with the stack)
            stack.callback(close, file)
            writers.append(Writer(file.fileno(), shown, Path(folder, "jaxadapt")))
        yield writers
        for number, (place, writer) in enumerate(zip(addresses, writers, strict=True)):
            try:
                os.lseek(writer.fd, 0, os.SEEK_SET)  # opening the path below may share this offset
                place.put(f"/dev/fd/{writer.fd}")
            except FileError as error:
                if not number:
                    raise
                new, old = (", ".join(map(str, part)) for part in (addresses[:number], addresses[number:]))
                raise FileError(
                    f"{error}; the new content is already in {new}, and not in {old}; write all of them again"
                ) from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the content of `path` with `data`, durably and atomically.

    Raises:
        FileError: see `open_replacement`.
    """
    with open_replacement(path) as writer:
        writer.write(data)


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def staging_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Return a path, in a private temporary folder, at which another library can create the future `path`.

    The caller renames the result to `path`. At the end of the block the directory of `path` is flushed and the
    temporary folder is removed. The next writer in the same directory removes leftovers of a killed process.

    Raises:
        FileError: no permission, or the parent is missing.
    """
    target = Path(path)
    with _temporary(str(target), folder=True) as holder:
        yield holder.temporary / target.name
        with file_errors("flush its directory", target, "the new folder is in place"):
            flush_directory(target.parent)
