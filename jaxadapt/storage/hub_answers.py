"""Checks of a server's answer about a file, before the client uses it.

The client builds cache paths from the headers `ETag` and `X-Repo-Commit`, and sends the token to any address that the
server names for Xet. A mirror is therefore trusted no more than a file is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxadapt.core.errors import FileError
from jaxadapt.storage.hub_address import Address

_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HUB = "https://huggingface.co"


def fetch_commit(place: Address, name: str, token: Any, max_bytes: int | None) -> str | None:
    """Ask the server for a file's metadata, check the answer and return the commit.

    Return None if the server has no answer: the client then raises the error.

    Args:
        place: the adapter's address.
        name: the file's name in the adapter's folder.
        token: the token for the request.
        max_bytes: the largest size of the file; None for any.

    Raises:
        FileError: the answer would make the client write outside its cache or send the token to another server, or the
            file is too large.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    http: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (from httpx or httpx2, whichever the client uses)
    url = hf_hub_url(place.repo, place.file(name), revision=place.revision)
    try:
        metadata = get_hf_file_metadata(url, token=token, library_name="jaxadapt")
    except errors.HfHubHTTPError as error:
        response: Any = error.response
        if response is not None:  # for a missing file, the client creates a folder named after the commit
            _raise_problems(place, name, _header_problems(response.headers.get("X-Repo-Commit"), None))
        return None
    except (http, errors.OfflineModeIsEnabled):
        return None
    problems = _header_problems(metadata.commit_hash, metadata.etag)
    if metadata.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET:
        route = metadata.xet_file_data.refresh_route
        if urlsplit(route)[:2] not in (urlsplit(url)[:2], urlsplit(_HUB)[:2]):
            problems.append(
                f"a Xet address on the server that was asked, found {_abbreviate(route)}, to which the token would"
                " be sent (HF_HUB_DISABLE_XET=1 prevents that)"
            )
    if max_bytes is not None and metadata.size is not None and metadata.size > max_bytes:
        problems.append(f"at most {max_bytes} bytes, found {metadata.size}")
    _raise_problems(place, name, problems)
    return metadata.commit_hash


def _header_problems(commit: str | None, etag: str | None) -> list[str]:
    problems: list[str] = []
    if commit is not None and not _COMMIT.fullmatch(commit):
        problems.append(f"a commit (40 hexadecimal digits) as X-Repo-Commit, found {_abbreviate(commit)}")
    if etag is not None and not _ETAG.fullmatch(etag):
        problems.append(f"a hash as ETag, found {_abbreviate(etag)}")
    return problems


def _abbreviate(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}…")


def _raise_problems(place: Address, name: str, problems: list[str]) -> None:
    if problems:
        raise FileError(
            f"{place}: {place.file(name)}: the server's answer cannot be trusted: expected {'; '.join(problems)};"
            " nothing was fetched; check HF_ENDPOINT and the network"
        )


def cached_commit(path: str | os.PathLike[str], file: str) -> str:
    """Return the commit of a file of the cache, from its path <repository>/snapshots/<commit>/<file>."""
    return Path(path).parents[len(file.split("/")) - 1].name


def check_in_cache(path: str, place: Address, name: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the path of a cached file. Raises `FileError` if it is outside the cache, for example through a link."""
    from huggingface_hub import constants

    file = Path(path)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    repository = cache / f"models--{place.repo.replace('/', '--')}"  # may be a link that a user set up
    target = file.resolve()
    if not any(target.is_relative_to(folder.resolve()) for folder in (cache, repository)):
        raise FileError(f"{place}: {file}: expected a file of the cache {cache}, found {target}; remove it")
    return file
