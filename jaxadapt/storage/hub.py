"""The Hugging Face Hub: the only door to `huggingface_hub`, and to any network.

    hf://org/name@revision/sub/folder ──pull──► a folder of the local cache
    files ──upload──► one commit

Only an adapter's own files are fetched, all of one commit. Cache, resuming, offline work (`HF_HUB_OFFLINE`), the token
(`HF_TOKEN`, or the one `hf auth login` stored) and the address (`HF_ENDPOINT`) are the client's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxadapt.core.errors import FileError
from jaxadapt.core.progress import LOGGER, Progress, Report, is_watched, no_report, reporter
from jaxadapt.storage import hub_answers, hub_progress
from jaxadapt.storage import local_files as local
from jaxadapt.storage.hub_address import SCHEME, Address, is_address, may_name, parse
from jaxadapt.storage.hub_errors import Token, hub_api, translate_errors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""As readers look for them: the second only where the first is not there."""
CARD = "README.md"
_MOST: Mapping[str, int] = dict.fromkeys((CONFIG, CARD), local.MAX_TEXT)


# ---------------------------------------------------------------- from the Hub


def pull(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Path:
    """Fetch an adapter from the Hub, and nothing else of its repository.

    Args:
        repo: "org/name", or in full "hf://org/name@revision/subfolder".
        revision: a branch, a tag or a commit; "main" by default.
        subfolder: where several adapters share a repository.
        token: for private and gated repositories; by default `HF_TOKEN` or the stored one.
        cache_dir: the Hub's own cache by default.
        progress: None, True (bars on a terminal or in a notebook) or a function of (name of the file, bytes done,
            bytes in all).

    Returns the folder in the cache, which `load`, `read` and PEFT take; all its files are of one commit. What is in the
    cache is not fetched again, a download that breaks off goes on where it stopped (the client tries a few times;
    after that the next call begins that file anew), and without a network (or with `HF_HUB_OFFLINE=1`) the cache alone
    serves. Copy the folder before you change it.

    Raises `FileError`: no such repository, revision or adapter, no permission, a broken connection, a full disk.

        folder = jaxadapt.pull("org/name@v1/fr")
    """
    with reporter(progress) as report:
        return _pull(parse(repo, revision, subfolder), (CARD,), token, cache_dir, report)


def fetch_folder(address: str, name: str | None = None, report: Report = no_report) -> Path:
    """What `load`, `read` and `inspect` do with an address: the configuration and the weights, in the cache.

    `name` is a subfolder that is taken instead, if it holds an adapter.
    """
    place = parse(address)
    if name is not None and _holds(below := place._replace(subfolder=place.file(name))):
        place = below
    return _pull(place, (), None, None, report)


def _holds(place: Address) -> bool:
    """Whether there is an adapter. Without a network only what the cache knows counts, either way."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache  # pyright: ignore[reportPrivateUsage]
    from huggingface_hub.errors import LocalEntryNotFoundError

    with translate_errors(place, None):
        try:
            _file(place, CONFIG, None, None, no_report)
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(place.repo, place.file(CONFIG), revision=place.revision) is _CACHED_NO_EXIST:
                return False
            raise
        except _absent():
            return False
    return True


def fetch_config(address: str) -> Path:
    """The configuration of an adapter alone, in the cache."""
    place = parse(address)
    with translate_errors(place, None), _listed(place, None):
        return _file(place, CONFIG, None, None, no_report)


def _pull(
    place: Address,
    more: Sequence[str],
    token: Token,
    cache_dir: str | os.PathLike[str] | None,
    report: Report,
) -> Path:
    with translate_errors(place, token), _listed(place, token):
        config = _file(place, CONFIG, token, cache_dir, report)
        # Pinned to the commit the first file came from: two files of two commits are no adapter.
        here = place._replace(revision=hub_answers.cached_commit(config, place.file(CONFIG)))
        _weights(here, token, cache_dir, report)
        for name in more:
            with contextlib.suppress(*_absent()):
                _file(here, name, token, cache_dir, report)
    LOGGER.info("%s: in the cache as %s", place, config.parent)
    return config.parent


def _weights(here: Address, token: Token, cache_dir: Any, report: Report) -> None:
    first: Exception | None = None
    for name in WEIGHTS:
        try:
            _file(here, name, token, cache_dir, report)
            return
        except _absent() as error:
            first = first or error
    assert first is not None
    raise first


def _file(place: Address, name: str, token: Token, cache_dir: Any, report: Report) -> Path:
    """A file in the cache. The client asks the server once more, after its answer was checked."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file = place.file(name)
    held = try_to_load_from_cache(place.repo, file, cache_dir=cache_dir, revision=place.revision)
    if isinstance(held, str):
        at = hub_answers.cached_commit(held, file)
        if at == place.revision or at == hub_answers.fetch_commit(place, name, token, _MOST.get(name)):
            return hub_answers.check_in_cache(held, place, name, cache_dir)
    else:
        hub_answers.fetch_commit(place, name, token, _MOST.get(name))
    found = hf_hub_download(
        place.repo,
        file,
        revision=place.revision,
        token=token,
        cache_dir=cache_dir,
        library_name="jaxadapt",
        tqdm_class=hub_progress.progress_bar_class(name, report),
    )
    return hub_answers.check_in_cache(found, place, name, cache_dir)


def _missing() -> type[Exception]:
    from huggingface_hub.errors import EntryNotFoundError

    return EntryNotFoundError


def _absent() -> tuple[type[Exception], ...]:
    """A file that need not be there is not: mirrors (olah) say so by denying the repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return _missing(), RepositoryNotFoundError


@contextlib.contextmanager
def _listed(place: Address, token: Token) -> Generator[None]:
    """Where a repository lacks the adapter, say which adapters it holds."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except _missing() as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        held = ""
        with contextlib.suppress(Exception):  # it only helps the message
            # (The client's list of files follows a `Link` to any server, and sends the token there.)
            info = hub_api(token).model_info(place.repo, revision=place.revision)
            names = [file.rfilename for file in info.siblings or ()]
            folders = sorted(n.removesuffix(CONFIG).strip("/") or "its root" for n in names if n.endswith(CONFIG))
            held = f"; found adapters in: {', '.join(folders[:8])}" if folders else f"; found {', '.join(names[:8])}"
        raise FileError(
            f"{place}: no adapter there: expected {place.file(CONFIG)} and {place.file(WEIGHTS[0])}{held}"
        ) from error


# ---------------------------------------------------------------- to the Hub


class Commit(NamedTuple):
    """What an upload made: the commit's id, its page, and the pull request's reference if it is one."""

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
    """Put files into an adapter's folder in one commit; the repository, and a branch that is missing, are made.

    `stale` are names that must not stay in the folder: deleted in the same commit, if they are there. `progress` True
    shows the client's own bars; a function is told of ("upload", bytes sent, bytes in all).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub_api(token)
    total = sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
    report = no_report if progress is None or isinstance(progress, bool) else progress
    report("upload", 0, total)
    with translate_errors(place, token, "push to"), hub_progress.client_bars(progress is True and is_watched()):
        # A pull request to somebody else's repository: it is there, and we may not create it.
        if not (create_pr and api.repo_exists(place.repo)):
            api.create_repo(place.repo, private=private, exist_ok=True)
            if private and not api.repo_info(place.repo).private:
                raise FileError(
                    f"{place}: private=True, but the repository is there and public; make it private on its settings"
                    " page, or choose another name"
                )
        branch = place.revision
        if branch is not None and not branch.startswith("refs/") and not create_pr:
            api.create_branch(place.repo, branch=branch, exist_ok=True)
        if tag is not None and tag in (ref.name for ref in api.list_repo_refs(place.repo).tags):
            raise FileError(f"{place}: there is a tag {tag!r} already; choose another name, or delete it on the Hub")
        old = [name for name in stale if api.file_exists(place.repo, place.file(name), revision=branch)]
        addition = CommitOperationAdd if report is no_report else hub_progress.counted_operation(report, total)
        operations: list[Any] = [
            addition(place.file(n), f if isinstance(f, bytes) else str(f)) for n, f in files.items()
        ]
        operations += [CommitOperationDelete(place.file(name)) for name in old]
        made = api.create_commit(place.repo, operations, commit_message=message, revision=branch, create_pr=create_pr)
        if tag is not None:
            api.create_tag(place.repo, tag=tag, revision=made.oid)
    report("upload", total, total)
    LOGGER.info("%s: %d files, %d bytes, commit %s", place, len(files), total, made.oid)
    return Commit(made.oid, made.pr_url or made.commit_url, made.pr_revision)


def fetch_text(place: Address, name: str, token: Token = None) -> str | None:
    """A text file of an adapter as it is on the Hub now; None if it, its repository or its branch is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    absent = (_missing(), RepositoryNotFoundError, RevisionNotFoundError)
    with translate_errors(place, token, "push to"):
        try:
            return _file(place, name, token, None, no_report).read_bytes().decode("utf-8", "replace")
        except absent as error:
            from huggingface_hub.errors import LocalEntryNotFoundError

            if isinstance(error, LocalEntryNotFoundError):
                raise  # no connection: it may well be there
            return None


__all__ = [
    "CARD",
    "CONFIG",
    "SCHEME",
    "WEIGHTS",
    "Address",
    "Commit",
    "Token",
    "fetch_config",
    "fetch_folder",
    "fetch_text",
    "is_address",
    "may_name",
    "parse",
    "pull",
    "upload",
]  # fmt: skip
