"""What a server says of a file, checked before the client uses it.

The client makes paths of a server's words: the `ETag` names a file of the cache, and so does `X-Repo-Commit`. It sends
the token to whatever address the server names for Xet. A mirror is no more to be trusted than a file.
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


def fetch_commit(place: Address, name: str, token: Any, most: int | None) -> str | None:
    """The commit that a server would answer a file of; None where it has no answer, which the client then tells.

    Args:
        most: bytes that the file may have; None: any number.

    Raises:
        FileError: the answer would make the client write outside its cache or send the token elsewhere, or the file is
            too large.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    http: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (httpx's or httpx2's, as the client has it)
    url = hf_hub_url(place.repo, place.file(name), revision=place.revision)
    try:
        found = get_hf_file_metadata(url, token=token, library_name="jaxadapt")
    except errors.HfHubHTTPError as error:
        response: Any = error.response
        if response is not None:  # of a file that is missing the client notes the commit, in a folder called like it
            _raise_for(place, name, _problems(response.headers.get("X-Repo-Commit"), None))
        return None
    except (http, errors.OfflineModeIsEnabled):
        return None
    problems = _problems(found.commit_hash, found.etag)
    if found.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET:
        route = found.xet_file_data.refresh_route
        if urlsplit(route)[:2] not in (urlsplit(url)[:2], urlsplit(_HUB)[:2]):
            problems.append(
                f"a Xet address on the server that was asked, found {_short(route)}, to which the token would go"
                " (HF_HUB_DISABLE_XET=1 keeps the client from it)"
            )
    if most is not None and found.size is not None and found.size > most:
        problems.append(f"at most {most} bytes, found {found.size}")
    _raise_for(place, name, problems)
    return found.commit_hash


def _problems(commit: str | None, etag: str | None) -> list[str]:
    problems: list[str] = []
    if commit is not None and not _COMMIT.fullmatch(commit):
        problems.append(f"a commit (40 hexadecimal digits) as X-Repo-Commit, found {_short(commit)}")
    if etag is not None and not _ETAG.fullmatch(etag):
        problems.append(f"a hash as ETag, found {_short(etag)}")
    return problems


def _short(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}…")


def _raise_for(place: Address, name: str, problems: list[str]) -> None:
    if problems:
        raise FileError(
            f"{place}: {place.file(name)}: the server's answer is not to be trusted: expected {'; '.join(problems)};"
            " nothing was fetched: check HF_ENDPOINT and the network"
        )


def cached_commit(path: str | os.PathLike[str], file: str) -> str:
    """The commit that a file of the cache is of: it lies at <repository>/snapshots/<commit>/<file>."""
    return Path(path).parents[len(file.split("/")) - 1].name


def check_in_cache(path: str, place: Address, name: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file of the cache that the client gave. Raises `FileError` if it lies outside (by way of a link, say)."""
    from huggingface_hub import constants

    found = Path(path)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    own = cache / f"models--{place.repo.replace('/', '--')}"  # a person may have moved it, and left a link
    real = found.resolve()
    if not any(real.is_relative_to(folder.resolve()) for folder in (cache, own)):
        raise FileError(f"{place}: {found}: expected a file of the cache {cache}, found {real}; remove it")
    return found
