"""Where files lie: a path of this machine, or an address, s3://bucket/folder. The only door to fsspec.

An `Address` is to fsspec what a `Path` is to the disk, as far as this library needs one. Errors are `FileError`s that
name the address, save `FileNotFoundError`, which says of a path too that nothing is there. Credentials and endpoints
are the store's own (environment variables, their files, fsspec's configuration). No listing is kept: each is asked for.

What is written goes to a temporary file of this machine first, and from there in one PUT (large files in parts, which
the store puts together at the end): a reader finds the old object or the new one, whatever is killed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxadapt.core.errors import FileError
from jaxadapt.storage import local_files
from jaxadapt.storage.local_files import close_after, file_error

__all__ = [
    "Address",
    "Place",
    "absolute",
    "content_version",
    "exists",
    "is_address",
    "is_dir",
    "is_file",
    "object_stamp",
    "put",
    "read_text_bytes",
    "staged_upload",
    "to_location",
    "total_size",
    "translate_errors",
]  # fmt: skip

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Stores that show an object when all of it has arrived. Elsewhere a name beside it is written, and renamed.
_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"}


def is_address(path: object) -> bool:
    """Whether a path is an address of some other place than this machine's file systems.

    >>> is_address("s3://bucket/run"), is_address("run/"), is_address("file:///tmp/run")
    (True, False, False)
    """
    if isinstance(path, Address):
        return True
    found = _ADDRESS.match(path) if isinstance(path, str) else None
    return found is not None and found["scheme"].lower() not in ("file", "local")


def to_location(path: str | os.PathLike[str]) -> Place:
    """A `Path`, or the `Address` that a text is.

    >>> to_location("s3://bucket/run") / "step", to_location("run") / "step", to_location("file:///tmp/run")
    (Address('s3://bucket/run/step'), PosixPath('run/step'), PosixPath('/tmp/run'))
    """
    if isinstance(path, Address):
        return path
    if is_address(path):
        return Address(str(path))
    text = os.fspath(path)
    found = _ADDRESS.match(text) if isinstance(path, str) else None
    return Path(path) if found is None else Path(text[found.end() :])


class Address(os.PathLike[str]):
    """A file or folder of another place; what is asked of it is as of a `Path`."""

    def __init__(self, text: str) -> None:
        scheme, _, rest = text.partition("://")
        self._text = f"{scheme.lower()}://{rest.rstrip('/')}"
        self._opened: tuple[Any, str] | None = None

    def __fspath__(self) -> str:
        return self._text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: str) -> Address:
        below = Address(f"{self._text}/{name}")
        if self._opened is not None:
            below._opened = self._opened[0], f"{self._opened[1]}/{name}"
        return below

    @property
    def scheme(self) -> str:
        return self._text.partition("://")[0]

    @property
    def name(self) -> str:
        return self._text.partition("://")[2].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> Address:
        return Address(self._text.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> Address:
        return self.parent / Path(self.name).with_suffix(suffix).name

    def absolute(self) -> Address:
        return self

    # ------------------------------------------------------------ asking

    def store(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it. Raises `FileError`: no such scheme, a package is missing."""
        if self._opened is None:
            self._opened = _store(self._text)
        return self._opened

    def info(self) -> dict[str, Any]:
        """What the store says of it. Raises `FileNotFoundError`, `FileError`."""
        fs, inner = self.store()
        with translate_errors(self._text, "read"):
            return dict(fs.info(inner))

    def exists(self) -> bool:
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return self._is("directory")

    def is_file(self) -> bool:
        return self._is("file")

    def is_symlink(self) -> bool:
        return False

    def _is(self, kind: str) -> bool:
        try:
            return self.info()["type"] == kind
        except FileNotFoundError:
            return False

    def size(self) -> int:
        """In bytes, of a file or of all files in a folder. Raises `FileNotFoundError`, `FileError`."""
        fs, inner = self.store()
        with translate_errors(self._text, "read"):
            return int(fs.du(inner))

    def iterdir(self) -> Iterator[Address]:
        """What lies in a folder. Raises `FileNotFoundError`, `NotADirectoryError`, `FileError`."""
        fs, inner = self.store()
        with translate_errors(self._text, "read"):
            found = fs.ls(inner, detail=True)
        own = inner.strip("/")
        if [(entry["name"].strip("/"), entry["type"]) for entry in found] == [(own, "file")]:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        names = {entry["name"].strip("/") for entry in found} - {own}  # a folder may hold a marker of itself
        return iter([self / name.rpartition("/")[2] for name in sorted(names)])

    def read_bytes(self) -> bytes:
        """Raises `FileNotFoundError`, `FileError`."""
        fs, inner = self.store()
        with translate_errors(self._text, "read"):
            return fs.cat_file(inner)

    def unlink(self, missing_ok: bool = False) -> None:
        """Raises `FileNotFoundError`, `FileError`."""
        fs, inner = self.store()
        try:
            with translate_errors(self._text, "delete"):
                fs.rm_file(inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def put(self, local: str) -> None:
        """Puts a file of this machine here, as a whole. Raises `FileError`."""
        fs, inner = self.store()
        try:
            with translate_errors(self._text, "write"):
                if self.scheme in _WHOLE:
                    fs.put_file(local, inner)
                    return
                beside = f"{inner}.{os.getpid()}.{threading.get_ident()}.tmp"
                try:
                    fs.put_file(local, beside)
                    fs.mv(beside, inner)
                except BaseException:
                    with contextlib.suppress(Exception):  # the error itself is raised
                        fs.rm_file(beside)
                    raise
        except FileNotFoundError as error:
            raise FileError(f"{self._text}: cannot write: there is no such bucket or folder; make it first") from error


Place = Path | Address


def _store(text: str) -> tuple[Any, str]:
    scheme = text.partition("://")[0]
    if scheme == "hf":
        raise FileError(
            f"{text}: adapters come from the Hub with load, read and pull, and go there with push;"
            " a base model comes with `hf download ORG/NAME --local-dir FOLDER`"
        )
    try:
        import fsspec

        return fsspec.core.url_to_fs(text, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        way = f"pip install 'jaxadapt[{extra}]'" if extra else "install it"
        raise FileError(f"{text}: {scheme}:// needs a package that is not installed ({error}); {way}") from error
    except ValueError as error:
        raise FileError(f"{text}: {error}; expected a path, or an address that fsspec knows, as s3://") from error
    except Exception as error:
        raise _failure(text, "open", error) from error


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def translate_errors(text: str, action: str) -> Generator[None]:
    """Whatever a store's package raises, as a `FileError`; what is not there as a `FileNotFoundError`."""
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError as error:
        why = "the bucket does not exist" if "bucket does not exist" in str(error) else "nothing is there"
        raise FileNotFoundError(errno.ENOENT, why) from error
    except NotADirectoryError:
        raise
    except Exception as error:
        raise _failure(text, action, error) from error


# Names, since the packages they come from are not to be imported: of the error's class or one above it.
_REASONS: Sequence[tuple[frozenset[str], str, str]] = (
    (
        frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
                   "TokenRetrievalError", "DefaultCredentialsError"}),
        "there are no credentials for it",
        "give them as the store's own tools take them (AWS_ACCESS_KEY_ID …, ~/.aws; GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        frozenset({"PermissionError", "RefreshError"}),
        "the store does not allow it",
        "check the credentials, and what they may do there",
    ),
    (
        frozenset({"HTTPClientError", "ClientError", "ConnectionError", "RequestException", "TimeoutError"}),
        "the connection failed",
        "check the network and the endpoint, and try again",
    ),
)  # fmt: skip


def _failure(text: str, action: str, error: Exception) -> FileError:
    names = {kind.__name__ for kind in type(error).__mro__}
    code = getattr(error, "code", None)  # of gcsfs' HttpError
    if code in (401, 403, "401", "403") or str(error).startswith("Forbidden"):
        names.add("PermissionError")
    said = " ".join(str(error).split())[:300]
    told = f"{type(error).__name__}: {said}" if said else type(error).__name__
    for known, why, way in _REASONS:
        if names & known:
            return FileError(f"{text}: cannot {action}: {why} ({told}); {way}")
    return FileError(f"{text}: cannot {action}: {told}")


# ---------------------------------------------------------------- what a file is


def object_stamp(info: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one content of an object from another."""
    return tuple(info.get(name) for name in ("size", "ETag", "etag", "generation", "created", "mtime", "LastModified"))


def content_version(place: Place) -> object:
    """What is equal only while a file is the same. Raises `FileError`."""
    try:
        if isinstance(place, Address):
            return object_stamp(place.info())
        status = place.stat()
    except (OSError, ValueError) as error:
        raise file_error("read", str(place), error) from error
    return status.st_mtime_ns, status.st_ino


def total_size(place: Place) -> int:
    """In bytes, of a file or of all files in a folder. Raises `FileError`."""
    try:
        if isinstance(place, Address):
            return place.size()
        return sum(p.stat().st_size for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file())
    except (OSError, ValueError) as error:
        raise file_error("read", str(place), error) from error


# ---------------------------------------------------------------- what lies there


def absolute(place: Place) -> Place:
    """As `Path.absolute`. Raises `FileError` where the working directory was deleted."""
    try:
        return place.absolute()
    except OSError as error:
        raise file_error("find", str(place), error, "the working directory is gone: give an absolute path") from error


def exists(place: Place, shown: Place | None = None) -> bool:
    """Whether something is there, links followed. Raises `FileError` where the system does not say, of `shown`."""
    return place.exists() if isinstance(place, Address) else _mode(place, shown) is not None


def is_dir(place: Place) -> bool:
    """Whether a folder is there. Raises `FileError` where the system does not say."""
    return place.is_dir() if isinstance(place, Address) else stat.S_ISDIR(_mode(place) or 0)


def is_file(place: Place) -> bool:
    """Whether a regular file is there. Raises `FileError` where the system does not say."""
    return place.is_file() if isinstance(place, Address) else stat.S_ISREG(_mode(place) or 0)


def _mode(place: Path, shown: Place | None = None) -> int | None:
    """What `stat` says; None where nothing is. (`Path.exists` raises, or says no, as the version of Python has it.)"""
    try:
        return place.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise file_error("read", str(place if shown is None else shown), error) from error


def read_text_bytes(place: Place, most: int = local_files.MAX_TEXT) -> bytes:
    """A file of text that is read whole: a regular one (a pipe or a device may never end), of so many bytes at most.

    Raises:
        FileError: missing, not permitted, of another kind, too large.
    """
    if isinstance(place, Address):
        try:
            size = int(place.info().get("size") or 0)
            data = place.read_bytes() if size <= most else b""
        except FileNotFoundError as error:
            raise file_error("read", str(place), error) from error
    else:
        file, size = local_files.open_binary(os.fspath(place))
        with close_after(file):
            reader = io.BufferedReader(file)
            try:
                data = reader.read(most + 1) if size <= most else b""
            except OSError as error:
                raise file_error("read", str(place), error) from error
            finally:
                reader.detach()
    if max(size, len(data)) > most:
        found = size if size > most else "more"
        raise FileError(f"{place}: cannot read: expected text of at most {most} bytes, found {found}")
    return data


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def staged_upload(address: Address) -> Generator[tuple[int, Path]]:
    """A temporary file's descriptor and path, for what `put` is to put to the address."""
    import tempfile

    try:
        file = tempfile.TemporaryFile(prefix="jaxadapt-")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise file_error("write", f"{address}, by way of {tempfile.gettempdir()}", error) from error
    # It has no name in any folder, so that nothing stays there if this process is killed.
    with close_after(file):
        yield file.fileno(), Path(tempfile.gettempdir(), "jaxadapt")


def put(address: Address, fd: int) -> None:
    """Puts an open file of this machine to the address, as a whole. Raises `FileError`."""
    os.lseek(fd, 0, os.SEEK_SET)  # which opening this path may share with the descriptor
    address.put(f"/dev/fd/{fd}")
