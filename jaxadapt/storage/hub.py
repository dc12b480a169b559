"""Download and upload of adapters on the Hugging Face Hub, through `huggingface_hub`.

    hf://org/name@revision/sub/folder ──pull──► a folder of the local cache
    files ──upload──► one commit

Only an adapter's own files are fetched, all from one commit. The client handles the cache, resumed downloads, offline
work (`HF_HUB_OFFLINE`), the token (`HF_TOKEN`, or the one that `hf auth login` stored) and the server (`HF_ENDPOINT`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxadapt.core.errors import FileError
from jaxadapt.core.progress import LOGGER, Progress, Report, is_watched, no_report, reporter
from jaxadapt.storage import hub_answers, hub_progress, local_files
from jaxadapt.storage.hub_address import SCHEME, Address, could_be_repository, is_address, parse
from jaxadapt.storage.hub_errors import Token, hub_api, translate_errors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which readers try them."""
MLX_WEIGHTS = "adapters.safetensors"
"""The weights of mlx-lm's adapter folder, whose configuration has the same name as PEFT's."""
CARD = "README.md"
_MAX_BYTES: Mapping[str, int] = dict.fromkeys((CONFIG, CARD), local_files.MAX_TEXT)


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
    folder before you change it.

    Returns:
        The folder in the cache, which `load`, `read` and PEFT accept. All its files are from one commit.

    Raises:
        FileError: no such repository, revision or adapter, no permission, a broken connection, or a full disk.

        folder = jaxadapt.pull("org/name@v1/fr")
    """
    with reporter(progress) as report:
        return _pull(parse(repo), (CARD,), token, cache_dir, report)


def fetch_folder(address: str, name: str | None = None, report: Report = no_report) -> Path:
    """Fetch an adapter's configuration and weights, for `load`, `read` and `inspect`. Return the folder in the cache.

    Args:
        address: the adapter's address.
        name: a subfolder to use instead, if it holds an adapter.
        report: called with the progress.
    """
    place = parse(address)
    if name is not None and _has_adapter(subfolder := place._replace(subfolder=place.file(name))):
        place = subfolder
    return _pull(place, (), None, None, report)


def _has_adapter(place: Address) -> bool:
    """Return True if an address holds an adapter. Without a network the cache decides, if it knows."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache  # pyright: ignore[reportPrivateUsage]
    from huggingface_hub.errors import LocalEntryNotFoundError

    with translate_errors(place, None):
        try:
            _fetch_file(place, CONFIG, None, None, no_report)
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(place.repo, place.file(CONFIG), revision=place.revision) is _CACHED_NO_EXIST:
                return False
            raise
        except _absence_errors():
            return False
    return True


def fetch_config(address: str) -> Path:
    """Fetch only the configuration of an adapter. Return its path in the cache."""
    place = parse(address)
    with translate_errors(place, None), _explain_missing_adapter(place, None):
        return _fetch_file(place, CONFIG, None, None, no_report)


def _pull(
    place: Address,
    optional_files: Sequence[str],
    token: Token,
    cache_dir: str | os.PathLike[str] | None,
    report: Report,
) -> Path:
    with translate_errors(place, token), _explain_missing_adapter(place, token):
        config = _fetch_file(place, CONFIG, token, cache_dir, report)
        # All other files must come from the same commit as the first.
        pinned = place._replace(revision=hub_answers.cached_commit(config, place.file(CONFIG)))
        _fetch_weights(pinned, token, cache_dir, report)
        for name in optional_files:
            with contextlib.suppress(*_absence_errors()):
                _fetch_file(pinned, name, token, cache_dir, report)
    LOGGER.info("%s: in the cache as %s", place, config.parent)
    return config.parent


def _fetch_weights(pinned: Address, token: Token, cache_dir: Any, report: Report) -> None:
    first: Exception | None = None
    for name in (*WEIGHTS, MLX_WEIGHTS):
        try:
            _fetch_file(pinned, name, token, cache_dir, report)
            return
        except _absence_errors() as error:
            first = first or error
    assert first is not None
    raise first


def _fetch_file(place: Address, name: str, token: Token, cache_dir: Any, report: Report) -> Path:
    """Fetch a file into the cache. The server's answer is checked before the client repeats the request."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file = place.file(name)
    cached = try_to_load_from_cache(place.repo, file, cache_dir=cache_dir, revision=place.revision)
    if isinstance(cached, str):
        commit = hub_answers.cached_commit(cached, file)
        if commit == place.revision or commit == hub_answers.fetch_commit(place, name, token, _MAX_BYTES.get(name)):
            return hub_answers.check_in_cache(cached, place, name, cache_dir)
    else:
        hub_answers.fetch_commit(place, name, token, _MAX_BYTES.get(name))
    downloaded = hf_hub_download(
        place.repo,
        file,
        revision=place.revision,
        token=token,
        cache_dir=cache_dir,
        library_name="jaxadapt",
        tqdm_class=hub_progress.progress_bar_class(name, report),
    )
    return hub_answers.check_in_cache(downloaded, place, name, cache_dir)


def _absence_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean a missing file. Mirrors (olah) report one as a missing repository."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    return EntryNotFoundError, RepositoryNotFoundError


@contextlib.contextmanager
def _explain_missing_adapter(place: Address, token: Token) -> Generator[None]:
    """Turn a missing adapter into a `FileError` that lists the adapters of the repository."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError:  # without a connection, the file may exist
        raise
    except EntryNotFoundError as error:
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


class Commit(NamedTuple):
    """The result of an upload: the commit's id, its page, and the reference of the pull request, if any."""

    oid: str
    url: str
    reference: str | None


def upload(
    place: Address,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: Token = None,
    stale: Sequence[str] = (),
    progress: Progress = None,
) -> Commit:
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
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub_api(token)
    total = sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
    report = no_report if progress is None or isinstance(progress, bool) else progress
    report("upload", 0, total)
    with translate_errors(place, token, "push to"), hub_progress.client_bars(progress is True and is_watched()):
        # For a pull request to an existing repository, the token may lack the right to create one.
        if not (create_pr and api.repo_exists(place.repo)):
            api.create_repo(place.repo, private=private, exist_ok=True)
            if private and not api.repo_info(place.repo).private:
                raise FileError(
                    f"{place}: private=True, but the repository exists and is public; make it private on its settings"
                    " page, or choose another name"
                )
        branch = place.revision
        if branch is not None and not branch.startswith("refs/") and not create_pr:
            api.create_branch(place.repo, branch=branch, exist_ok=True)
        if tag is not None and tag in (ref.name for ref in api.list_repo_refs(place.repo).tags):
            raise FileError(f"{place}: the tag {tag!r} exists already; choose another name, or delete it on the Hub")
        deleted = [name for name in stale if api.file_exists(place.repo, place.file(name), revision=branch)]
        addition = CommitOperationAdd if report is no_report else hub_progress.counted_operation(report, total)
        operations: list[Any] = [
            addition(place.file(n), f if isinstance(f, bytes) else str(f)) for n, f in files.items()
        ]
        operations += [CommitOperationDelete(place.file(name)) for name in deleted]
        commit = api.create_commit(place.repo, operations, commit_message=message, revision=branch, create_pr=create_pr)
        if tag is not None:
            api.create_tag(place.repo, tag=tag, revision=commit.oid)
    report("upload", total, total)
    LOGGER.info("%s: %d files, %d bytes, commit %s", place, len(files), total, commit.oid)
    return Commit(commit.oid, commit.pr_url or commit.commit_url, commit.pr_revision)


def fetch_text(place: Address, name: str, token: Token = None) -> str | None:
    """Fetch the current content of a text file, or None if the file, its repository or its branch does not exist."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    with translate_errors(place, token, "push to"):
        try:
            return _fetch_file(place, name, token, None, no_report).read_bytes().decode("utf-8", "replace")
        except LocalEntryNotFoundError:  # without a connection, the file may exist
            raise
        except (*_absence_errors(), RevisionNotFoundError):
            return None


__all__ = [
    "CARD",
    "CONFIG",
    "MLX_WEIGHTS",
    "SCHEME",
    "WEIGHTS",
    "Address",
    "Commit",
    "Token",
    "could_be_repository",
    "fetch_config",
    "fetch_folder",
    "fetch_text",
    "is_address",
    "parse",
    "pull",
    "upload",
]  # fmt: skip
