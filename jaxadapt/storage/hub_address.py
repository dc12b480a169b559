"""Addresses of adapters on the Hub: `hf://org/name@revision/sub/folder`. Pure text handling."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from jaxadapt.core.errors import FileError

SCHEME = "hf://"
EXAMPLE = "expected org/name, org/name@revision or org/name@revision/subfolder, with or without the prefix hf://"
_NAME = r"[A-Za-z0-9_.-]+"
_ADDRESS = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/pr/\d+|refs/convert/{_NAME}|[^/]+))?(?:/(?P<subfolder>.*))?"
)


class Address(NamedTuple):
    """The address of an adapter on the Hub.

    >>> parse("hf://org/name@v1/fr")
    Address(repo='org/name', revision='v1', subfolder='fr')
    >>> print(parse("org/name@feature%2Fx"), parse("org/name").revision)
    hf://org/name@feature%2Fx None
    """

    repo: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        version = f"@{revision}" if revision else ""
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"{SCHEME}{self.repo}{version}{folder}"

    def file(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def is_address(path: object) -> bool:
    """Return True if a path is an explicit Hub address: it begins with `hf://`."""
    return isinstance(path, str | os.PathLike) and str(path).startswith(SCHEME)


def could_be_repository(path: str) -> bool:
    """Return True if a missing path could be a Hub address in the form "org/name" of other libraries."""
    return _ADDRESS.fullmatch(path) is not None and not path.startswith(".")


def parse(text: str) -> Address:
    """Parse an address. Raises `FileError` if it is invalid.

    A slash in a revision is written `%2F`, except in `refs/pr/1` and the like.
    """
    match = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if match is None or match["repo"].split("/")[0] in ("datasets", "spaces", "buckets", "models"):
        raise FileError(f"{text!r} is not the address of a model repository on the Hub: {EXAMPLE}")
    folder = (match["subfolder"] or "").strip("/")
    if (any(part in ("", ".", "..") for part in folder.split("/")) and folder) or "\\" in folder or "\0" in folder:
        raise FileError(f"{text!r}: {folder!r} is not a valid subfolder of a repository; pass a plain relative path")
    return Address(match["repo"], (match["revision"] or "").replace("%2F", "/") or None, folder)
