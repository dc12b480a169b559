"""Errors of the Hub's client, as this library's own errors: the repository, the reason and the remedy."""

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
"""A token. None: the stored one, if any. True: the stored one, which must exist. False: no token."""


def hub_api(token: Token) -> Any:
    """Return the Hub's client."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="jaxadapt")


@contextlib.contextmanager
def translate_errors(place: Address, token: Token, action: str = "read") -> Generator[None]:
    """Turn any error of the client into a `FileError` that names the repository, the reason and the remedy."""
    from huggingface_hub import errors

    http: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (from httpx or httpx2, whichever the client uses)
    try:
        yield
    except FileError:
        raise
    except errors.GatedRepoError as error:
        raise _failure(place, action, "the repository is gated", "accept its conditions on its page", error) from error
    except errors.RepositoryNotFoundError as error:
        why = "there is no such repository, or it is private and the token gives no access to it"
        remedy = "check the name" + ("" if isinstance(token, str) else ", or log in") + _login_hint(token)
        raise _failure(place, action, why, remedy, error) from error
    except errors.RevisionNotFoundError as error:
        why = f"there is no revision {place.revision!r}{_list_revisions(place, token)}"
        raise _failure(place, action, why, "pass a branch, a tag or a commit", error) from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500:
            raise _http_failure(place, action, cause, token) from error  # the server was reached and answered
        if action == "push to":
            offline = _offline_variable()
            why = "the Hub cannot be reached" if offline is None else f"{offline}=1 forbids access to the Hub"
            remedy = "check the network and try again" if offline is None else "unset it"
        elif (offline := _offline_variable()) is not None:
            why, remedy = (
                f"it is not in the cache, and {offline}=1 forbids fetching it",
                "unset it, or pull the adapter while online",
            )
        else:
            why, remedy = "the Hub cannot be reached, and it is not in the cache", "check the network and try again"
        raise _failure(place, action, why, remedy, error) from error
    except errors.EntryNotFoundError as error:
        raise _failure(
            place, action, f"{_requested_file(error, place)} is not there", "check the address", error
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise _failure(place, action, "token=True, but no token is stored", "log in: `hf auth login`", error) from error
    except errors.HFValidationError as error:
        raise _failure(place, action, str(error), EXAMPLE, None) from error
    except errors.OfflineModeIsEnabled as error:
        raise _failure(
            place, action, f"{_offline_variable()}=1 forbids access to the Hub", "unset it", error
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_failure(place, action, error, token) from error
    except http as error:
        why = f"the connection failed ({type(error).__name__})"
        raise _failure(place, action, why, "try again", error) from error
    except OSError as error:
        if error.errno is not None:
            raise file_error(
                f"{action} {place}", error.filename or "the cache", error, "the cache is intact"
            ) from error
        raise _failure(place, action, str(error).split("\n")[0], "try again", None) from error
    except (RuntimeError, ValueError) as error:  # errors of hf_xet, and of the client for odd answers
        if error.__cause__ is not None:  # such as "Error while uploading …", whose cause has the reason
            with translate_errors(place, token, action):
                raise error.__cause__  # noqa: B904 (the cause is translated instead)
        raise _failure(place, action, f"{type(error).__name__}: {error}", "try again", None) from error


def _http_failure(place: Address, action: str, error: Any, token: Token) -> FileError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        why = "the Hub requires a login" if action == "push to" else "the Hub does not accept the token"
        return _failure(place, action, why, "log in" + _login_hint(token), error)
    if status == 403:
        why = "the token lacks the permission"
        return _failure(place, action, why, "use a token with this permission" + _login_hint(token), error)
    if status == 404:
        revision = f", no revision {place.revision!r} of it" if place.revision else ""
        missing = f"there is no repository {place.repo!r}{revision}, or no {_requested_file(error, place)} in it"
        why = f"{missing}: {_host(error)} answered 404"
        remedy = "check the name, and HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "check the name"
        return _failure(place, action, why, remedy, error)
    why = f"the Hub answered {status}" if status else "the Hub cannot be reached"
    return _failure(place, action, why, "try again" if status >= 500 or not status else "follow its message", error)


def _requested_file(error: Any, place: Address) -> str:
    """Return the file that a failed request asked for, from its URL."""
    url = "" if error.response is None else str(error.response.url)
    match = re.search(r"/resolve/[^/]+/([^?#]+)", url)
    if match:
        return f"file {unquote(match[1])!r}"
    return f"folder {place.subfolder!r}" if place.subfolder else "such page"


def _host(error: Any) -> str:
    return urlsplit(str(error.response.url)).netloc


def _failure(place: Address, action: str, why: str, remedy: str, error: BaseException | None) -> FileError:
    message = "" if error is None else str(getattr(error, "server_message", None) or "").strip()
    detail = f" ({message.splitlines()[0]})" if message and message not in why else ""
    return FileError(f"{place}: cannot {action} it: {why}{detail}; {remedy}")


def _login_hint(token: Token) -> str:
    if isinstance(token, str):
        return ", or give another token"
    return ": `hf auth login`, HF_TOKEN or token="


def _offline_variable() -> str | None:
    """Return the environment variable that keeps the client offline, or None. The client follows transformers' too."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "0").upper() not in ("", "0", "NO", "OFF")), names[0])


def _list_revisions(place: Address, token: Token) -> str:
    with contextlib.suppress(Exception):  # it only helps the message
        refs = hub_api(token).list_repo_refs(place.repo)
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return f"; found {', '.join(names[:8])}"
    return ""
