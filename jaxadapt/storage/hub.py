"""Download and upload of adapters on the Hugging Face Hub, through `huggingface_hub`.

    hf://org/name@revision/sub/folder ──pull──► a folder of the local cache
    files ──upload──► one commit

Only an adapter's own files are fetched, all from one commit. The client handles the cache, resumed downloads, offline
work (`HF_HUB_OFFLINE`), the token (`HF_TOKEN`, or the one that `hf auth login` stored) and the server (`HF_ENDPOINT`).

The client builds cache paths from the headers `ETag` and `X-Repo-Commit`, and sends the token to any address that the
server names for Xet. So a server's answer is checked before the client uses it: a mirror is trusted no more than a file
is. The client's errors become this library's errors, with the repository, the reason and the remedy. Its progress bars
are shown, hidden, or turned into calls of a `Report`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import (
    _CACHED_NO_EXIST,  # pyright: ignore[reportPrivateUsage]
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm

from jaxadapt.core.errors import LOGGER, FileError, Progress, Report, is_watched, met, no_report, reporter
from jaxadapt.storage.local_files import MAX_TEXT, file_error
from jaxadapt.storage.location import (
    CARD,
    CONFIG,
    FOLDER_WEIGHTS,
    HUB_EXAMPLE,
    WEIGHTS,
    HubAddress,
    Pushed,
    Token,
    parse_hub_address,
)

# ---------------------------------------------------------------- hub answers


_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HUB = "https://huggingface.co"
_HTTP_ERROR: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (from httpx or httpx2, whichever the client uses)
# The errors that mean a missing file. Mirrors (olah) report one as a missing repository.
_ABSENT = errors.EntryNotFoundError, errors.RepositoryNotFoundError


def fetch_commit(place: HubAddress, name: str, token: Any, max_bytes: int | None) -> str | None:
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
    url = hf_hub_url(place.repo, place.file(name), revision=place.revision)
    try:
        metadata = get_hf_file_metadata(url, token=token, library_name="jaxadapt")
    except errors.HfHubHTTPError as error:
        response: Any = error.response
        if response is not None:  # for a missing file, the client creates a folder named after the commit
            _raise_problems(place, name, _header_problems(response.headers.get("X-Repo-Commit"), None))
        return None
    except (_HTTP_ERROR, errors.OfflineModeIsEnabled):
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
    wrong_commit = commit is not None and not _COMMIT.fullmatch(commit)
    wrong_etag = etag is not None and not _ETAG.fullmatch(etag)
    return met(
        {
            f"a commit (40 hexadecimal digits) as X-Repo-Commit, found {_abbreviate(commit or '')}": wrong_commit,
            f"a hash as ETag, found {_abbreviate(etag or '')}": wrong_etag,
        }
    )


def _abbreviate(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}…")


def _raise_problems(place: HubAddress, name: str, problems: list[str]) -> None:
    if problems:
        raise FileError(
            f"{place}: {place.file(name)}: the server's answer cannot be trusted: expected {'; '.join(problems)};"
            " nothing was fetched; check HF_ENDPOINT and the network"
        )


def cached_commit(path: str | os.PathLike[str], file: str) -> str:
    """Return the commit of a file of the cache, from its path <repository>/snapshots/<commit>/<file>."""
    return Path(path).parents[len(file.split("/")) - 1].name


def check_in_cache(path: str, place: HubAddress, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the path of a cached file. Raises `FileError` if it is outside the cache, for example through a link."""
    file = Path(path)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    repository = cache / f"models--{place.repo.replace('/', '--')}"  # may be a link that a user set up
    target = file.resolve()
    if not any(target.is_relative_to(folder.resolve()) for folder in (cache, repository)):
        raise FileError(f"{place}: {file}: expected a file of the cache {cache}, found {target}; remove it")
    return file


# ---------------------------------------------------------------- hub errors


def hub_api(token: Token) -> Any:
    """Return the Hub's client."""
    return HfApi(token=token, library_name="jaxadapt")


@contextlib.contextmanager
def translate_errors(place: HubAddress, token: Token, action: str = "read") -> Generator[None]:
    """Turn any error of the client into a `FileError` that names the repository, the reason and the remedy."""
    known = _HTTP_ERROR, errors.EntryNotFoundError, OSError, RuntimeError, ValueError  # the last two also of hf_xet
    try:
        yield
    except known as error:
        cause = _root_cause(error)
        if not isinstance(cause, known):  # such as an error of `progress`
            raise cause  # noqa: B904 (it is the cause)
        raise _file_error(cause, place, token, action) from cause


def _root_cause(error: Any) -> Any:
    """Return the error that has the reason: the client raises others in its place, as "Error while uploading …"."""
    cause: Any = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError):  # also if the server was reached and answered
        return cause if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500 else error
    final = isinstance(error, OSError | errors.HFValidationError) or not isinstance(error, RuntimeError | ValueError)
    return error if final or cause is None else _root_cause(cause)


def _file_error(error: Any, place: HubAddress, token: Token, action: str) -> FileError:
    """Return the `FileError` for an error of the client."""

    def fail(why: str, remedy: str) -> FileError:
        message = str(getattr(error, "server_message", None) or "").strip()  # only an answer of a server has one
        detail = f" ({message.splitlines()[0]})" if message and message not in why else ""
        return FileError(f"{place}: cannot {action} it: {why}{detail}; {remedy}")

    match error:
        case errors.GatedRepoError():
            return fail("the repository is gated", "accept its conditions on its page")
        case errors.RepositoryNotFoundError():
            remedy = "check the name" + ("" if isinstance(token, str) else ", or log in") + _login_hint(token)
            return fail("there is no such repository, or it is private and the token gives no access to it", remedy)
        case errors.RevisionNotFoundError():
            listed = _list_revisions(place, token)
            return fail(f"there is no revision {place.revision!r}{listed}", "pass a branch, a tag or a commit")
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return fail(*_explain_offline(error, action))
        case errors.EntryNotFoundError():
            return fail(f"{_requested_file(error, place)} is not there", "check the address")
        case errors.LocalTokenNotFoundError():
            return fail("token=True, but no token is stored", "log in: `hf auth login`")
        case errors.HFValidationError():
            return fail(str(error), HUB_EXAMPLE)
        case errors.HfHubHTTPError():
            return fail(*_explain_status(error, place, token, action))
        case OSError(errno=None):
            return fail(str(error).split("\n")[0], "try again")
        case OSError():
            return file_error(f"{action} {place}", error.filename or "the cache", error, "the cache is intact")
        case RuntimeError() | ValueError():
            return fail(f"{type(error).__name__}: {error}", "try again")
        case _:
            return fail(f"the connection failed ({type(error).__name__})", "try again")


def _explain_offline(error: Any, action: str) -> tuple[str, str]:
    """Return why the Hub was not reached, and the remedy."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the client follows transformers' variable too
    chosen = (name for name in names if os.environ.get(name, "0").upper() not in ("", "0", "NO", "OFF"))
    variable = next(chosen, names[0]) if constants.HF_HUB_OFFLINE else None
    if isinstance(error, errors.OfflineModeIsEnabled) or (variable and action == "push to"):
        return f"{variable}=1 forbids access to the Hub", "unset it"
    if variable is not None:
        return (
            f"it is not in the cache, and {variable}=1 forbids fetching it",
            "unset it, or pull the adapter while online",
        )
    missing = "" if action == "push to" else ", and it is not in the cache"
    return f"the Hub cannot be reached{missing}", "check the network and try again"


def _explain_status(error: Any, place: HubAddress, token: Token, action: str) -> tuple[str, str]:
    """Return the reason of an answer that is an error, and the remedy."""
    status, url = getattr(error.response, "status_code", 0), str(getattr(error.response, "url", ""))
    if status == 401:
        why = "the Hub requires a login" if action == "push to" else "the Hub does not accept the token"
        return why, "log in" + _login_hint(token)
    if status == 403:
        return "the token lacks the permission", "use a token with this permission" + _login_hint(token)
    if status == 404:
        revision = f", no revision {place.revision!r} of it" if place.revision else ""
        missing = f"there is no repository {place.repo!r}{revision}, or no {_requested_file(error, place)} in it"
        remedy = "check the name, and HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "check the name"
        return f"{missing}: {urlsplit(url).netloc} answered 404", remedy
    why = f"the Hub answered {status}" if status else "the Hub cannot be reached"
    return why, "try again" if status >= 500 or not status else "follow its message"


def _requested_file(error: Any, place: HubAddress) -> str:
    """Return the file that a failed request asked for, from its URL."""
    match = re.search(r"/resolve/[^/]+/([^?#]+)", "" if error.response is None else str(error.response.url))
    if match:
        return f"file {unquote(match[1])!r}"
    return f"folder {place.subfolder!r}" if place.subfolder else "such page"


def _login_hint(token: Token) -> str:
    return ", or give another token" if isinstance(token, str) else ": `hf auth login`, HF_TOKEN or token="


def _list_revisions(place: HubAddress, token: Token) -> str:
    with contextlib.suppress(Exception):  # it only helps the message
        refs = hub_api(token).list_repo_refs(place.repo)
        return f"; found {', '.join([ref.name for ref in [*refs.branches, *refs.tags]][:8])}"
    return ""


# ---------------------------------------------------------------- hub progress


def progress_bar_class(name: str, report: Report) -> Any:
    """Return a class of progress bars for the client that draw nothing and call `report`."""

    class Meter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.bytes_done = int(options.get("initial") or 0)
            self.bytes_total = int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.bytes_done += int(n or 0)
            report(name, self.bytes_done, max(self.bytes_total, self.bytes_done))

    return Meter


def counted_operation(report: Report, total: int) -> type[Any]:
    """Return a class of the client's add operations that reports the bytes sent.

    Uploads through hf_xet are not reported, since hf_xet reads the file itself.
    """
    lock = threading.Lock()  # several threads send files
    sent: dict[str, int] = {}

    class Counted(CommitOperationAdd):
        @contextlib.contextmanager
        def as_file(self, with_tqdm: bool = False) -> Generator[Any]:
            with super().as_file() as file:
                if not with_tqdm:  # the file is read for its digest, not sent
                    yield file
                    return

                def report_position(position: int) -> None:
                    with lock:
                        sent[self.path_in_repo] = max(position, sent.get(self.path_in_repo, 0))
                        report("upload", sum(sent.values()), total)

                yield _CountedFile(file, report_position)

    return Counted


class _CountedFile(io.BufferedReader):
    """A file that reports how far it was read. A part that is sent again counts once."""

    def __init__(self, file: Any, report_position: Callable[[int], None]) -> None:
        super().__init__(file)
        self._report_position = report_position

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._report_position(self.tell())
        return data


@contextlib.contextmanager
def client_bars(show: bool) -> Generator[None]:
    """Show or hide the client's own bars while it uploads (it has no callback for uploads)."""
    with contextlib.ExitStack() as stack:
        if not show and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        yield


_MAX_BYTES: Mapping[str, int] = dict.fromkeys((CONFIG, CARD), MAX_TEXT)


# ---------------------------------------------------------------- download


def pull(
    repo: str,
    *,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Path:
    """Fetch an adapter, and no other files of its repository, from the Hub.

    Args:
        repo: "org/name", or the full address "hf://org/name@revision/subfolder". The revision is a branch, a tag or a
            commit, "main" by default; a slash in it is written "%2F". The subfolder is the adapter's, if several
            adapters share a repository.
        token: for private and gated repositories; by default `HF_TOKEN` or the stored one.
        cache_dir: the Hub's own cache by default.
        progress: None, True (bars on a terminal or in a notebook) or a function of (name of the file, bytes done,
            bytes in all).

    Cached files are not fetched again. The client resumes an interrupted download for a few attempts; after that, the
    next call fetches the file anew. Without a network, or with `HF_HUB_OFFLINE=1`, only the cache is used. Copy the
    folder before you change it. For example::

        folder = jaxadapt.pull("org/name@v1/fr")

    Returns:
        The folder in the cache, which `load`, `read` and PEFT accept. All its files are from one commit.

    Raises:
        FileError: no such repository, revision or adapter, no permission, a broken connection, or a full disk.
    """
    with reporter(progress) as report:
        return _pull(parse_hub_address(repo), (CARD,), token, cache_dir, report)


def fetch_folder(address: str, name: str | None = None, report: Report = no_report) -> Path:
    """Fetch an adapter's configuration and weights, for `load`, `read` and `inspect`. Return the folder in the cache.

    Args:
        address: the adapter's address.
        name: a subfolder to use instead, if it holds an adapter.
        report: called with the progress.
    """
    place = parse_hub_address(address)
    if name is not None and _has_adapter(subfolder := place._replace(subfolder=place.file(name))):
        place = subfolder
    return _pull(place, (), None, None, report)


def _has_adapter(place: HubAddress) -> bool:
    """Return True if an address holds an adapter. Without a network the cache decides, if it knows."""
    with translate_errors(place, None):
        try:
            _fetch_file(place, CONFIG, None, None, no_report)
        except errors.LocalEntryNotFoundError:
            if try_to_load_from_cache(place.repo, place.file(CONFIG), revision=place.revision) is _CACHED_NO_EXIST:
                return False
            raise
        except _ABSENT:
            return False
    return True


def fetch_config(address: str) -> Path:
    """Fetch only the configuration of an adapter. Return its path in the cache."""
    place = parse_hub_address(address)
    with translate_errors(place, None), _explain_missing_adapter(place, None):
        return _fetch_file(place, CONFIG, None, None, no_report)


def _pull(
    place: HubAddress,
    optional_files: Sequence[str],
    token: Token,
    cache_dir: str | os.PathLike[str] | None,
    report: Report,
) -> Path:
    with translate_errors(place, token), _explain_missing_adapter(place, token):
        config = _fetch_file(place, CONFIG, token, cache_dir, report)
        # All other files must come from the same commit as the first.
        pinned = place._replace(revision=cached_commit(config, place.file(CONFIG)))
        _fetch_weights(pinned, token, cache_dir, report)
        for name in optional_files:
            with contextlib.suppress(*_ABSENT):
                _fetch_file(pinned, name, token, cache_dir, report)
    LOGGER.info("%s: in the cache as %s", place, config.parent)
    return config.parent


def _fetch_weights(pinned: HubAddress, token: Token, cache_dir: Any, report: Report) -> Path:
    missing: list[Exception] = []
    for name in FOLDER_WEIGHTS:
        try:
            return _fetch_file(pinned, name, token, cache_dir, report)
        except _ABSENT as error:
            missing.append(error)
    raise missing[0]


def _fetch_file(place: HubAddress, name: str, token: Token, cache_dir: Any, report: Report) -> Path:
    """Fetch a file into the cache. The server's answer is checked before the client repeats the request."""
    file = place.file(name)
    cached = try_to_load_from_cache(place.repo, file, cache_dir=cache_dir, revision=place.revision)
    if isinstance(cached, str):
        commit = cached_commit(cached, file)
        if commit == place.revision or commit == fetch_commit(place, name, token, _MAX_BYTES.get(name)):
            return check_in_cache(cached, place, cache_dir)
    else:
        fetch_commit(place, name, token, _MAX_BYTES.get(name))
    downloaded = hf_hub_download(
        place.repo,
        file,
        revision=place.revision,
        token=token,
        cache_dir=cache_dir,
        library_name="jaxadapt",
        tqdm_class=progress_bar_class(name, report),
    )
    return check_in_cache(downloaded, place, cache_dir)


@contextlib.contextmanager
def _explain_missing_adapter(place: HubAddress, token: Token) -> Generator[None]:
    """Turn a missing adapter into a `FileError` that lists the adapters of the repository."""
    try:
        yield
    except errors.LocalEntryNotFoundError:  # without a connection, the file may exist
        raise
    except errors.EntryNotFoundError as error:
        content = ""
        with contextlib.suppress(Exception):  # a failure here must not hide the error itself
            # Not the client's file listing: it follows a `Link` header to any server and sends the token there.
            info = hub_api(token).model_info(place.repo, revision=place.revision)
            names = [file.rfilename for file in info.siblings or ()]
            folders = sorted(n.removesuffix(CONFIG).strip("/") or "its root" for n in names if n.endswith(CONFIG))
            content = f"; found adapters in: {', '.join(folders[:8])}" if folders else f"; found {', '.join(names[:8])}"
        raise FileError(
            f"{place}: no adapter there: expected {place.file(CONFIG)} and {place.file(WEIGHTS[0])}{content}"
        ) from error


# ---------------------------------------------------------------- upload


def upload(
    place: HubAddress,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: Token = None,
    stale: Sequence[str] = (),
    progress: Progress = None,
) -> Pushed:
    """Upload files into an adapter's folder in one commit. A missing repository or branch is created.

    Args:
        place: the adapter's address.
        files: the paths or contents, by name.
        message: the commit message.
        private: the visibility of a new repository.
        create_pr: open a pull request instead of writing to the branch.
        tag: a tag for the commit.
        token: see `pull`.
        stale: names to delete in the same commit, if they exist.
        progress: True shows the client's own bars; a function gets ("upload", bytes sent, total bytes).

    Raises:
        FileError: no permission, a public repository with `private=True`, an existing tag, or a failed connection.
    """
    api = hub_api(token)
    total = sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
    report = no_report if progress is None or isinstance(progress, bool) else progress
    report("upload", 0, total)
    with translate_errors(place, token, "push to"), client_bars(progress is True and is_watched()):
        _prepare_repository(api, place, private, create_pr, tag)
        branch = place.revision
        deleted = [name for name in stale if api.file_exists(place.repo, place.file(name), revision=branch)]
        addition = CommitOperationAdd if report is no_report else counted_operation(report, total)
        operations: list[Any] = [
            addition(place.file(n), f if isinstance(f, bytes) else str(f)) for n, f in files.items()
        ] + [CommitOperationDelete(place.file(name)) for name in deleted]
        commit = api.create_commit(place.repo, operations, commit_message=message, revision=branch, create_pr=create_pr)
        if tag is not None:
            api.create_tag(place.repo, tag=tag, revision=commit.oid)
    report("upload", total, total)
    LOGGER.info("%s: %d files, %d bytes, commit %s", place, len(files), total, commit.oid)
    return Pushed(str(place._replace(revision=commit.pr_revision or commit.oid)), commit.pr_url or commit.commit_url)


def _prepare_repository(api: Any, place: HubAddress, private: bool | None, create_pr: bool, tag: str | None) -> None:
    """Create a missing repository or branch. Raises `FileError` if the commit would be public, or its tag exists."""
    # For a pull request to an existing repository, the token may lack the right to create one.
    if not (create_pr and api.repo_exists(place.repo)):
        api.create_repo(place.repo, private=private, exist_ok=True)
        if private and not api.repo_info(place.repo).private:
            raise FileError(
                f"{place}: private=True, but the repository exists and is public; make it private on its settings"
                " page, or choose another name"
            )
    if place.revision is not None and not place.revision.startswith("refs/") and not create_pr:
        api.create_branch(place.repo, branch=place.revision, exist_ok=True)
    if tag is not None and tag in (ref.name for ref in api.list_repo_refs(place.repo).tags):
        raise FileError(f"{place}: the tag {tag!r} exists already; choose another name, or delete it on the Hub")


def fetch_text(place: HubAddress, name: str, token: Token = None) -> str | None:
    """Fetch the current content of a text file, or None if the file, its repository or its branch does not exist."""
    with translate_errors(place, token, "push to"):
        try:
            return _fetch_file(place, name, token, None, no_report).read_bytes().decode("utf-8", "replace")
        except errors.LocalEntryNotFoundError:  # without a connection, the file may exist
            raise
        except (*_ABSENT, errors.RevisionNotFoundError):
            return None
