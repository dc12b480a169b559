"""Errors of the packages of object stores, as this library's own errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator, Sequence

from jaxadapt.core.errors import FileError

__all__ = ["store_error", "translate_errors"]


@contextlib.contextmanager
def translate_errors(text: str, action: str) -> Generator[None]:
    """Turn errors of a store's package into `FileError`; a missing object remains a `FileNotFoundError`."""
    try:
        yield
    except (FileError, NotADirectoryError):
        raise
    except FileNotFoundError as error:
        why = "the bucket does not exist" if "bucket does not exist" in str(error) else "no such file or folder"
        raise FileNotFoundError(errno.ENOENT, why) from error
    except Exception as error:  # each store's package raises errors of its own classes
        raise store_error(text, action, error) from error


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


def store_error(text: str, action: str, error: Exception) -> FileError:
    """Return the `FileError` for an error of a store's package: the reason, and advice where the cause is known."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code = getattr(error, "code", None)  # an attribute of gcsfs' HttpError
    if code in (401, 403, "401", "403") or str(error).startswith("Forbidden"):
        names.add("PermissionError")
    text_of_error = " ".join(str(error).split())[:300]
    cause = f"{type(error).__name__}: {text_of_error}" if text_of_error else type(error).__name__
    for known, why, way in _REASONS:
        if names & known:
            return FileError(f"{text}: cannot {action}: {why} ({cause}); {way}")
    return FileError(f"{text}: cannot {action}: {cause}")
