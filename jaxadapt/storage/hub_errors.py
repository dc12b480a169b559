"""What the client raises, as the library's own errors: the repository, the reason and the way out."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator
from typing import Any
from urllib.parse import unquote, urlsplit

from jaxadapt.core.errors import FileError
from jaxadapt.storage.hub_address import EXAMPLE, Address
from jaxadapt.storage.local_files import file_error

Token = str | bool | None
"""A token; None: the stored one, if there is one; True: the stored one, which must be there; False: none."""


def hub_api(token: Token) -> Any:
    """The client's methods."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="jaxadapt")


@contextlib.contextmanager
def translate_errors(place: Address, token: Token, action: str = "read") -> Generator[None]:
    """Whatever the client raises, as a `FileError` that names the repository, the reason and the way out."""
    from huggingface_hub import errors

    http: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (httpx's or httpx2's, as the client has it)
    try:
        yield
    except FileError:
        raise
    except errors.GatedRepoError as error:
        raise _failure(place, action, "the repository is gated", "accept its conditions on its page", error) from error
    except errors.RepositoryNotFoundError as error:
        why = "there is no such repository, or it is private and the token does not open it"
        way = "check the name" + ("" if isinstance(token, str) else ", or log in") + _login(token)
        raise _failure(place, action, why, way, error) from error
    except errors.RevisionNotFoundError as error:
        why = f"there is no revision {place.revision!r}{_revisions(place, token)}"
        raise _failure(place, action, why, "say a branch, a tag or a commit", error) from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500:
            raise _refused(place, action, cause, token) from error  # it was reached, and said something
        if (offline := _offline()) is not None:
            why, way = f"it is not in the cache, and {offline}=1 forbids to fetch it", "unset it, or pull it before"
        else:
            why, way = "the Hub cannot be reached, and it is not in the cache", "check the network, and try again"
        raise _failure(place, action, why, way, error) from error
    except errors.EntryNotFoundError as error:
        raise _failure(place, action, f"{_asked(error, place)} is not there", "check the address", error) from error
    except errors.LocalTokenNotFoundError as error:
        raise _failure(place, action, "token=True, but no token is stored", "log in: `hf auth login`", error) from error
    except errors.HFValidationError as error:
        raise _failure(place, action, str(error), EXAMPLE, None) from error
    except errors.OfflineModeIsEnabled as error:
        raise _failure(place, action, f"{_offline()}=1 forbids to reach it", "unset it", error) from error
    except errors.HfHubHTTPError as error:
        raise _refused(place, action, error, token) from error
    except http as error:
        why = f"the connection failed ({type(error).__name__})"
        raise _failure(place, action, why, "try again", error) from error
    except OSError as error:
        if error.errno is not None:
            raise file_error(f"{action} {place}", error.filename or "the cache", error, "the cache is sound") from error
        raise _failure(place, action, str(error).split("\n")[0], "try again", None) from error
    except (RuntimeError, ValueError) as error:  # hf_xet's own, and what the client makes of odd answers
        if error.__cause__ is not None:  # "Error while uploading …": why, says its cause
            with translate_errors(place, token, action):
                raise error.__cause__  # noqa: B904 (it is the one that is told)
        raise _failure(place, action, f"{type(error).__name__}: {error}", "try again", None) from error


def _refused(place: Address, action: str, error: Any, token: Token) -> FileError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        why = "the Hub asks who you are" if action == "push to" else "the Hub does not accept the token"
        return _failure(place, action, why, "log in" + _login(token), error)
    if status == 403:
        why = "the token has no right to do this"
        return _failure(place, action, why, "use one with the right" + _login(token), error)
    if status == 404:
        of = f", no revision {place.revision!r} of it" if place.revision else ""
        why = f"there is no repository {place.repo!r}{of}, or no {_asked(error, place)} in it: {_host(error)} answered"
        why += " 404"
        return _failure(place, action, why, "check the name" + (", and HF_ENDPOINT" if _endpoint() else ""), error)
    why = f"the Hub answered {status}" if status else "the Hub cannot be reached"
    return _failure(place, action, why, "try again" if status >= 500 or not status else "see what it says", error)


def _asked(error: Any, place: Address) -> str:
    """The file that a refused request asked for, as far as its address tells."""
    url = "" if error.response is None else str(error.response.url)
    found = re.search(r"/resolve/[^/]+/([^?#]+)", url)
    return f"file {unquote(found[1])!r}" if found else f"folder {place.subfolder!r}" if place.subfolder else "such page"


def _host(error: Any) -> str:
    return urlsplit(str(error.response.url)).netloc


def _endpoint() -> bool:
    """Whether requests go to another place than the Hub's own."""
    return bool(os.environ.get("HF_ENDPOINT"))


def _failure(place: Address, action: str, why: str, way: str, error: BaseException | None) -> FileError:
    said = "" if error is None else str(getattr(error, "server_message", None) or "").strip()
    told = f" ({said.splitlines()[0]})" if said and said not in why else ""
    return FileError(f"{place}: cannot {action} it: {why}{told}; {way}")


def _login(token: Token) -> str:
    if isinstance(token, str):
        return ", or give another token"
    return ": `hf auth login`, HF_TOKEN or token="


def _offline() -> str | None:
    """The variable that keeps the client from the network, if one does: it heeds transformers' too."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "0").upper() not in ("", "0", "NO", "OFF")), names[0])


def _revisions(place: Address, token: Token) -> str:
    with contextlib.suppress(Exception):  # it only helps the message
        refs = hub_api(token).list_repo_refs(place.repo)
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return f"; found {', '.join(names[:8])}"
    return ""
