"""Locations of files: a path of this machine, or an address such as s3://bucket/folder. The only module with fsspec.

Also the addresses of the Hub, read as text, and the names of an adapter's files.

An `Address` is for fsspec what a `Path` is for the disk, reduced to the methods this library needs. Ranges of its
objects are read with the interface of `local_files`. Its errors, also those of the stores' own packages, are
`FileError`s that name the address, except for `FileNotFoundError`, which a `Path` raises too. Credentials and endpoints
come from the store's own configuration (environment variables, files, fsspec's configuration). Listings are not cached.

A write goes to a temporary file of this machine, and from there to the store in one PUT (a large file in parts, which
the store joins at the end). So a reader finds the old object or the new one, even if a process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from jaxadapt.core.errors import FileError, FormatError, raise_as
from jaxadapt.storage.local_files import MAX_TEXT, ByteSource, LocalFile, file_error, file_errors, read_errors

# ---------------------------------------------------------------- names of an adapter's files


CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which readers try them."""
MLX_WEIGHTS = "adapters.safetensors"
"""The weights of mlx-lm's adapter folder, whose configuration has the same name as PEFT's."""
FOLDER_WEIGHTS = (*WEIGHTS, MLX_WEIGHTS)
"""The weights in a folder with a `CONFIG`, in any format."""
ORBAX_MARKERS = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "_METADATA")
"""The files by which Orbax recognizes a checkpoint, in its v1 and v0 layouts."""
CARD = "README.md"


# ---------------------------------------------------------------- store errors


# By the names of an error's class and its bases, so that the stores' packages are not imported.
_REASONS: Sequence[tuple[frozenset[str], str, str]] = (
    (
        frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
                   "TokenRetrievalError", "DefaultCredentialsError"}),
        "there are no credentials for it",
        "provide them as for the store's own tools (AWS_ACCESS_KEY_ID …, ~/.aws; GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        frozenset({"PermissionError", "RefreshError"}),
        "the store does not allow it",
        "check the credentials and their permissions",
    ),
    (
        frozenset({"HTTPClientError", "ClientError", "ConnectionError", "RequestException", "TimeoutError"}),
        "the connection failed",
        "check the network and the endpoint, and try again",
    ),
)  # fmt: skip


def _store_error(text: str, action: str, error: Exception) -> FileError:
    """Return the `FileError` for an error of a store's package: the reason, and advice where the cause is known."""
    names = {kind.__name__ for kind in type(error).__mro__}
    # gcsfs' HttpError has a code.
    if getattr(error, "code", None) in (401, 403, "401", "403") or str(error).startswith("Forbidden"):
        names.add("PermissionError")
    text_of_error = " ".join(str(error).split())[:300]
    cause = f"{type(error).__name__}: {text_of_error}" if text_of_error else type(error).__name__
    for known, why, way in _REASONS:
        if names & known:
            return FileError(f"{text}: cannot {action}: {why} ({cause}); {way}")
    return FileError(f"{text}: cannot {action}: {cause}")


# ---------------------------------------------------------------- location


_T = TypeVar("_T")
HUB = "hf://"
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Stores that show an object only when all of it has arrived. Elsewhere a temporary name is written and renamed.
_ATOMIC_SCHEMES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"}


def is_address(path: object) -> bool:
    """Return True if a path is an address outside this machine's file systems.

    >>> is_address("s3://bucket/run"), is_address("run/"), is_address("file:///tmp/run")
    (True, False, False)
    """
    if isinstance(path, Address):
        return True
    match = _ADDRESS.match(path) if isinstance(path, str) else None
    return match is not None and match["scheme"].lower() not in ("file", "local")


def is_hub_address(path: object) -> bool:
    """Return True if a path is an address of the Hub: it begins with `hf://`."""
    return isinstance(path, str | os.PathLike) and str(path).startswith(HUB)


def to_location(path: str | os.PathLike[str]) -> Location:
    """Return the `Path` or the `Address` that a path or a text names. Raises `FileError` for no path or no text.

    >>> to_location("s3://bucket/run") / "step", to_location("run") / "step", to_location("file:///tmp/run")
    (Address('s3://bucket/run/step'), PosixPath('run/step'), PosixPath('/tmp/run'))
    """
    if isinstance(path, Address):
        return path
    if is_address(path):
        return Address(str(path))
    if not isinstance(path, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(
            f"expected a path, found {type(path).__name__}; the order is save(model, path) and load(path, model)"
        )
    text = os.fspath(path)
    if not text:  # often a variable of a shell that is not set
        raise FileError('expected a path, found an empty string; for the working directory write "."')
    match = _ADDRESS.match(text) if isinstance(path, str) else None
    return Path(path) if match is None else Path(text[match.end() :])


class Address(os.PathLike[str]):
    """A file or folder in a store, with a part of the methods of a `Path`."""

    def __init__(self, text: str) -> None:
        scheme, _, rest = text.partition("://")
        self._text = f"{scheme.lower()}://{rest.rstrip('/')}"
        self._opened: tuple[Any, str] | None = None

    def __fspath__(self) -> str:
        return self._text

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: str) -> Address:
        child = Address(f"{self._text}/{name}")
        if self._opened is not None:
            child._opened = self._opened[0], f"{self._opened[1]}/{name}"
        return child

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

    def absolute(self) -> Address:
        return self

    # ------------------------------------------------------------ queries

    def store(self) -> tuple[Any, str]:
        """Return fsspec's file system and the path in it. Raises `FileError`: unknown scheme, or a missing package."""
        if self._opened is None:
            self._opened = _open_store(self._text)
        return self._opened

    def run(self, action: str, call: Callable[[Any, str], _T]) -> _T:
        """Return `call(file system, path)`; `action` names it in errors. Raises `FileNotFoundError`, `FileError`."""
        fs, inner = self.store()
        try:
            return call(fs, inner)
        except (FileError, NotADirectoryError):
            raise
        except FileNotFoundError as error:
            why = "the bucket does not exist" if "bucket does not exist" in str(error) else "no such file or folder"
            raise FileNotFoundError(errno.ENOENT, why) from error
        except Exception as error:  # each store's package raises errors of its own classes
            raise _store_error(self._text, action, error) from error

    def info(self) -> dict[str, Any]:
        """Return the store's metadata. Raises `FileNotFoundError`, `FileError`."""
        return self.run("read", lambda fs, inner: dict(fs.info(inner)))

    def kind(self) -> str | None:
        """Return "file" or "directory"; None if there is none. Raises `FileError`."""
        try:
            return self.info()["type"]
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator[Address]:
        """Return the entries of a folder. Raises `FileNotFoundError`, `NotADirectoryError`, `FileError`."""
        entries = self.run("read", lambda fs, inner: fs.ls(inner, detail=True))
        path = self.store()[1].strip("/")
        if [(entry["name"].strip("/"), entry["type"]) for entry in entries] == [(path, "file")]:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        names = {entry["name"].strip("/") for entry in entries} - {path}  # some stores list a marker of the folder
        return iter([self / name.rpartition("/")[2] for name in sorted(names)])

    def read_bytes(self) -> bytes:
        """Return the content. Raises `FileNotFoundError`, `FileError`."""
        return self.run("read", lambda fs, inner: fs.cat_file(inner))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file. Raises `FileNotFoundError`, `FileError`."""
        try:
            self.run("delete", lambda fs, inner: fs.rm_file(inner))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def put(self, local: str) -> None:
        """Upload a file of this machine to this address, whole. Raises `FileError`."""

        def upload(fs: Any, inner: str) -> None:
            if self.scheme in _ATOMIC_SCHEMES:
                fs.put_file(local, inner)
                return
            temporary = f"{inner}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                fs.put_file(local, temporary)
                fs.mv(temporary, inner)
            except BaseException:
                with contextlib.suppress(Exception):  # the error itself is raised
                    fs.rm_file(temporary)
                raise

        with raise_as(
            FileError, f"{self._text}: cannot write: there is no such bucket or folder", FileNotFoundError,
            advice="; create it first",
        ):  # fmt: skip
            self.run("write", upload)


Location = Path | Address


def _open_store(text: str) -> tuple[Any, str]:
    scheme = text.partition("://")[0]
    if is_hub_address(text):
        raise FileError(
            f"{text}: expected a local folder; upload to the Hub with jaxadapt.push, read adapters with load, read or"
            " pull, and download a base model with `hf download ORG/NAME --local-dir FOLDER`"
        )
    try:
        import fsspec

        return fsspec.core.url_to_fs(text, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        way = f"pip install 'jaxadapt[{extra}]'" if extra else "install it"
        raise FileError(f"{text}: {scheme}:// needs a package that is not installed ({error}); {way}") from error
    except ValueError as error:
        raise FileError(
            f"{text}: {error}; expected a path, or an address that fsspec supports, such as s3://"
        ) from error
    except Exception as error:  # a store's package raises errors of its own classes
        raise _store_error(text, "open", error) from error


# ---------------------------------------------------------------- addresses of the Hub


Token = str | bool | None
"""A token of the Hub. None: the stored one, if any. True: the stored one, which must exist. False: no token."""
HUB_EXAMPLE = "expected org/name, org/name@revision or org/name@revision/subfolder, with or without the prefix hf://"
_NAME = r"[A-Za-z0-9_.-]+"
_HUB_ADDRESS = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/pr/\d+|refs/convert/{_NAME}|[^/]+))?(?:/(?P<subfolder>.*))?"
)


class HubAddress(NamedTuple):
    """The address of an adapter on the Hub.

    >>> parse_hub_address("hf://org/name@v1/fr")
    HubAddress(repo='org/name', revision='v1', subfolder='fr')
    >>> print(parse_hub_address("org/name@feature%2Fx"), parse_hub_address("org/name").revision)
    hf://org/name@feature%2Fx None
    """

    repo: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        version, folder = f"@{revision}" if revision else "", f"/{self.subfolder}" if self.subfolder else ""
        return f"{HUB}{self.repo}{version}{folder}"

    def file(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


class Pushed(NamedTuple):
    """The place of an uploaded adapter.

    Attributes:
        address: the address for `load`, pinned to the commit.
        url: the page of the commit, or of the pull request.
    """

    address: str
    url: str


def could_be_repository(path: str) -> bool:
    """Return True if a missing path could be a Hub address in the form "org/name" of other libraries."""
    return _HUB_ADDRESS.fullmatch(path) is not None and not path.startswith(".")


def parse_hub_address(text: str) -> HubAddress:
    """Parse an address. Raises `FileError` if it is invalid.

    A slash in a revision is written `%2F`, except in `refs/pr/1` and the like.
    """
    match = _HUB_ADDRESS.fullmatch(text.removeprefix(HUB))
    if match is None or match["repo"].split("/")[0] in ("datasets", "spaces", "buckets", "models"):
        raise FileError(f"{text!r} is not the address of a model repository on the Hub: {HUB_EXAMPLE}")
    folder = (match["subfolder"] or "").strip("/")
    if (any(part in ("", ".", "..") for part in folder.split("/")) and folder) or "\\" in folder or "\0" in folder:
        raise FileError(f"{text!r}: {folder!r} is not a valid subfolder of a repository; pass a plain relative path")
    return HubAddress(match["repo"], (match["revision"] or "").replace("%2F", "/") or None, folder)


# ---------------------------------------------------------------- versions and sizes


def object_stamp(info: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the metadata that changes with the content of an object."""
    return tuple(info.get(name) for name in ("size", "ETag", "etag", "generation", "created", "mtime", "LastModified"))


def content_version(place: Location) -> object:
    """Return a value that changes when a file is replaced or modified. Raises `FileError`."""
    with read_errors(place):
        if isinstance(place, Address):
            return object_stamp(place.info())
        status = place.stat()
        return status.st_mtime_ns, status.st_ino


def total_size(place: Location) -> int:
    """Return the bytes of a file, or of all files in a folder. Raises `FileError`."""
    with read_errors(place):
        if isinstance(place, Address):
            return place.run("read", lambda fs, inner: int(fs.du(inner)))
        return sum(p.stat().st_size for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file())


# ---------------------------------------------------------------- queries of any location


def absolute(place: Location) -> Location:
    """Return the absolute location. Raises `FileError` if the working directory was deleted."""
    with file_errors("find", place, "the working directory was deleted; pass an absolute path"):
        return place.absolute()


def is_same(one: Location, other: Location) -> bool:
    """Return True for two names of one place, also through links. Raises `FileError` if that is unknown.

    >>> is_same(to_location("a"), to_location("./a")), is_same(to_location("a"), to_location("b"))
    (True, False)
    """
    if absolute(one) == absolute(other):
        return True
    if isinstance(one, Address) or isinstance(other, Address) or not (exists(one) and exists(other)):
        return False
    with read_errors(one):
        return one.samefile(other)


def exists(place: Location) -> bool:
    """Return True if a location exists, following links. Raises `FileError` if that is unknown."""
    return _kind(place) is not None


def is_dir(place: Location) -> bool:
    """Return True if a location is a folder. Raises `FileError` if that is unknown."""
    return _kind(place) == "directory"


def is_file(place: Location) -> bool:
    """Return True if a location is a regular file. Raises `FileError` if that is unknown."""
    return _kind(place) == "file"


def _kind(place: Location) -> str | None:
    """Return "file", "directory" or "other"; None if there is none. (`Path.exists` differs by version.)"""
    if isinstance(place, Address):
        return place.kind()
    try:
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise file_error("read", str(place), error) from error
    return {stat.S_IFDIR: "directory", stat.S_IFREG: "file"}.get(stat.S_IFMT(mode), "other")


def read_text_bytes(place: Location, max_bytes: int = MAX_TEXT) -> bytes:
    """Read a whole text file. It must be a regular file (a pipe or a device may never end).

    Args:
        place: the file.
        max_bytes: the largest size that is accepted.

    Raises:
        FileError: missing, not permitted, not a regular file, or too large.
    """
    with read_errors(place), contextlib.ExitStack() as stack:
        if isinstance(place, Address):
            info = place.info()
            size = info.get("size") or 0
            if size or info["type"] != "file":
                data = place.read_bytes() if size <= max_bytes else b""
            else:  # a server may not state the size
                data = place.run(
                    "read", lambda fs, inner: _read_to_end(stack.enter_context(fs.open(inner, "rb")), max_bytes)
                )
        else:
            local = stack.enter_context(contextlib.closing(LocalFile(os.fspath(place))))
            size = local.size
            data = _read_to_end(local.file, max_bytes) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        actual = size if size > max_bytes else "more"
        raise FileError(
            f"{place}: cannot read: expected text of at most {max_bytes} bytes, found {actual};"
            " check that it is the right file"
        )
    return data


def _read_to_end(file: IO[bytes], max_bytes: int) -> bytes:
    """Read a file to its end, whatever its size is said to be (0 in /proc); stop beyond `max_bytes`."""
    data = bytearray()
    while len(data) <= max_bytes and (part := file.read(1 << 20)):
        data += part
    return bytes(data)


def read_json(place: Location, max_bytes: int = MAX_TEXT) -> Any:
    """Read the JSON value of a text file. Raises the errors of `read_text_bytes`, and `FormatError` for other text."""
    with raise_as(FormatError, f"{place}: expected JSON, found", ValueError, RecursionError):
        return json.loads(read_text_bytes(place, max_bytes))


# ---------------------------------------------------------------- ranged reads


_HEAD = 512 << 10  # bytes read when an object is opened: most headers, and all of a small adapter
_BLOCK = 4 << 20  # bytes; fetching them takes about as long as a store's latency
_MAX_BLOCKS = 16  # blocks; tensors are read in the order of the file


class RemoteObject(ByteSource):
    """An object of a store, open for reading in ranges. Several threads may read at once.

    Small reads share blocks, and each block is fetched once. A large read is one request.
    """

    def __init__(self, address: Address) -> None:
        """Query the object and read its head. Raises `FileError`."""
        self.path: str = str(address)
        self._address = address
        with read_errors(address):
            info = address.info()
        if info["type"] != "file" or info.get("size") is None:
            raise FileError(f"{self.path}: cannot read: expected a file of known size, found a folder or a stream")
        self.size: int = int(info["size"])
        self._stamp = object_stamp(info)
        self._fetched = False
        self._blocks: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._head = self._fetch(0, min(self.size, _HEAD)) if self.size else b""

    def read_into(self, label: str, view: memoryview, offset: int) -> None:
        stop = offset + len(view)
        if stop > self.size:
            raise FormatError(f"{self.path}: {label}: expected {stop} bytes, found {self.size}")
        if len(view) >= _BLOCK or stop <= len(self._head):
            view[:] = self._head[offset:stop] if stop <= len(self._head) else self._fetch(offset, stop)
            return
        while len(view):
            number, within = divmod(offset, _BLOCK)
            piece = self._block(number)[within : within + len(view)]
            view[: len(piece)] = piece
            view, offset = view[len(piece) :], offset + len(piece)

    def _block(self, number: int) -> bytes:
        """Return a block, fetched by the first thread that asks: no thread can be started while a program ends."""
        with self._lock:
            is_new = number not in self._blocks
            block = self._blocks.setdefault(number, Future())
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
        if is_new:
            try:
                block.set_result(self._fetch(number * _BLOCK, min((number + 1) * _BLOCK, self.size)))
            except BaseException as error:
                block.set_exception(error)
                with self._lock:  # the next read tries again
                    self._blocks.pop(number, None)
        return block.result()

    def _fetch(self, start: int, stop: int) -> bytes:
        self._fetched = self._fetched or start > 0 or stop < self.size
        with raise_as(FileError, f"{self.path}: the object was deleted while it was read", FileNotFoundError):
            data = self._address.run("read", lambda fs, inner: fs.cat_file(inner, start=start, end=stop))
        if len(data) != stop - start:
            raise FormatError(f"{self.path}: expected {stop - start} bytes at offset {start}, found {len(data)}")
        return data

    def check(self) -> None:
        if self._fetched and object_stamp(self._address.info()) != self._stamp:
            raise FormatError(f"{self.path}: the object was replaced while it was read; read it again")

    def close(self) -> None:
        self.closed = True
        self._blocks.clear()


def open_source(place: Location) -> ByteSource:
    """Open a file or an object for reading. Raises `FileError`."""
    return RemoteObject(place) if isinstance(place, Address) else LocalFile(os.fspath(place))


def fetch_object(address: Address) -> LocalFile:
    """Download an object into a temporary file, and open that. Raises `FileError`."""
    import tempfile

    RemoteObject(address).close()  # raises if it is no file
    shown = f"{address} (through {tempfile.gettempdir()})"
    with read_errors(shown), tempfile.NamedTemporaryFile(prefix="jaxadapt-") as copy:
        address.run("read", lambda fs, inner: fs.get_file(inner, copy.name))
        return LocalFile(copy.name, str(address))
