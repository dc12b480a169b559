"""An adapter's address on the Hub: `hf://org/name@revision/sub/folder`. Text only."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxadapt.core.errors import FileError

SCHEME = "hf://"
EXAMPLE = "expected org/name, org/name@revision or org/name@revision/subfolder, with or without hf:// in front"
_NAME = r"[A-Za-z0-9_.-]+"
_ADDRESS = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/pr/\d+|refs/convert/{_NAME}|[^/]+))?(?:/(?P<subfolder>.*))?"
)


class Address(NamedTuple):
    """An adapter's place on the Hub.

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
        at = f"@{revision}" if revision else ""
        below = f"/{self.subfolder}" if self.subfolder else ""
        return f"{SCHEME}{self.repo}{at}{below}"

    def file(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def is_address(path: object) -> bool:
    """Whether a path is meant for the Hub: it begins with `hf://`."""
    return isinstance(path, str) and path.startswith(SCHEME)


def may_name(path: str) -> bool:
    """Whether a path that is not there may have been meant for the Hub: "org/name", as other libraries take it."""
    return _ADDRESS.fullmatch(path) is not None and not path.startswith(".")


def parse(text: str, revision: str | None = None, subfolder: str | None = None) -> Address:
    """An address in full, from text and what is said beside it. Raises `FileError` if it is none.

    A slash in a revision is written `%2F` (`refs/pr/1` may stand as it is).
    """
    found = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if found is None or found["repo"].split("/")[0] in ("datasets", "spaces", "buckets", "models"):
        raise FileError(f"{text!r} is no address of a model repository on the Hub: {EXAMPLE}")
    held = (found["revision"] or "").replace("%2F", "/") or None, (found["subfolder"] or "").strip("/") or None
    for name, mine, other in zip(("revision", "subfolder"), held, (revision, subfolder), strict=True):
        if mine and other and mine != other:
            raise FileError(f"{text!r} says {name} {mine!r}, and {name}={other!r} is given beside it; say one of them")
    below = (subfolder or held[1] or "").strip("/")
    if (any(part in ("", ".", "..") for part in below.split("/")) and below) or "\\" in below or "\0" in below:
        raise FileError(f"{text!r}: {below!r} is no subfolder of a repository")
    return Address(found["repo"], revision or held[0], below)
