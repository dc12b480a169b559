"""An adapter to the Hub, with its card: what is saved, and nothing else, in one commit."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.core.errors import AdapterError, AttachError, FileError, FormatError
from jaxadapt.core.progress import LOGGER, Progress
from jaxadapt.persistence import card, folder
from jaxadapt.storage import hub, location
from jaxadapt.storage.location import Place

PICTURE = "adapter_norms.png"
_LONG = 24 * 3600.0  # seconds


class Pushed(NamedTuple):
    """Where an adapter went.

    Attributes:
        address: what `load` takes, pinned to the commit.
        url: the page of the commit, or of the pull request.
    """

    address: str
    url: str


def push(
    source: Any,
    repo: str,
    *,
    name: str = "default",
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: hub.Token = None,
    license: str | None = None,  # noqa: A002 (what the front matter calls it)
    metrics: Mapping[str, Any] | None = None,
    picture: bool | None = None,
    progress: Progress = None,
    **saving: Any,
) -> Pushed:
    """Upload an adapter to the Hugging Face Hub in one commit: configuration, weights and model card.

    Args:
        source: the folder of an adapter; or what `save` takes (a model, variables, an `Adapter`) or `PeftTensors`,
            which is saved to a temporary folder first, with `saving`: the arguments of `save` (`base_model=`, …).
        repo: "org/name", or in full "hf://org/name@branch/subfolder"; made if it is not there.
        name: which adapter of a model; all but "default" go to the subfolder of their name, as PEFT puts them.
        revision: a branch, made if it is not there.
        subfolder: where several adapters share a repository.
        private: of a repository that is made. True for one that is there and public is an error.
        create_pr: open a pull request instead of committing to the branch.
        tag: a tag for the commit.
        token: by default `HF_TOKEN` or the stored one.
        license, metrics: for the card; metrics are `{name: value}`.
        picture: of how much each weight is changed, on the card; None: where matplotlib is installed.
        progress: None, True (the client's bars, on a terminal or in a notebook) or a function of ("upload", bytes sent,
            bytes in all); of a model also of "save". Where the client sends by hf_xet, which it does wherever that is
            installed and the Hub takes it, a function is told of the beginning and the end alone.

    Of arrays that several processes hold parts of, all of them call this, and process 0 pushes what it has gathered.

    A card on the Hub that a person wrote or edited stays, and only lacks filled in its front matter; one in the folder
    that a person wrote replaces it. Weights of the other format at the same place are deleted in the same commit.

    Raises `FileError` for what the Hub or the connection refuses, and, before anything is sent, for a card in the
    folder that cannot be read; and whatever `save` raises.

        jaxadapt.push(model, "org/name", base_model="org/base", metrics={"loss": 3.2}).url
    """
    place = hub.parse(repo, revision, subfolder)
    page = _Page(license, metrics or {}, picture)
    commit = {"message": commit_message, "private": private, "create_pr": create_pr, "tag": tag, "token": token}
    if isinstance(source, str | os.PathLike):
        if saving or name != "default":
            given = ", ".join([*saving, *(["name"] if name != "default" else [])])
            raise AttachError(f"{given}: for models; {os.fspath(source)} is a folder, which goes as it is")
        if hub.is_address(source):
            raise FileError(f"{source}: is on the Hub already; pull it, and push the folder")
        return _push(location.to_location(source), place, page, commit, progress)
    if name != "default" and not place.subfolder:
        place = place._replace(subfolder=name)
    with tempfile.TemporaryDirectory(prefix="jaxadapt-push-") as made:
        if isinstance(source, PeftTensors):
            if saving:
                raise AttachError(f"{', '.join(saving)}: for models; PeftTensors go as they are")
            folder.write(source, made, progress=progress)
        else:
            from jaxadapt.persistence import store  # a folder is pushed without JAX

            saving.setdefault("shared", False)  # each process has a folder of its own
            store.save(source, made, name=name, progress=progress, **saving)
        below = Path(made) if name == "default" or isinstance(source, PeftTensors) else Path(made) / name
        send = functools.partial(_push, below, place, page, commit, progress)
        return send() if isinstance(source, PeftTensors) else _from_one(source, f"push to {place}", send)


def _from_one(source: Any, what: str, send: Callable[[], Pushed]) -> Pushed:
    """Where several processes hold parts of it, all of them are here, and only process 0 has the files."""
    import jax

    from jaxadapt.models.nnx import attach
    from jaxadapt.persistence import multihost

    tree = attach.nnx.state(source) if isinstance(source, attach.nnx.Module) else source
    if not multihost.is_distributed(jax.tree.leaves(tree)):
        return send()
    # It may take its time: if it dies, the connection to it ends all the others.
    return Pushed(*multihost.run_on_leader(what, send, _LONG))


class _Page(NamedTuple):
    """What the card says that the adapter does not."""

    license: str | None
    metrics: Mapping[str, Any]
    picture: bool | None


def _push(source: Place, place: hub.Address, page: _Page, commit: dict[str, Any], progress: Progress) -> Pushed:
    info = folder.inspect(source)  # what cannot be read is not uploaded
    weights = next((name for name in hub.WEIGHTS if location.exists(source / name)), None)
    if weights is None:
        raise FileError(
            f"{source}: an Orbax checkpoint, which the Hub's readers do not know; a folder as PEFT reads it is made by"
            " jaxadapt.write(jaxadapt.read(checkpoint), folder)"
        )
    stale = [name for name in hub.WEIGHTS if name != weights]
    files: dict[str, Path | bytes] = {}
    for path in (source / hub.CONFIG, source / weights):
        files[path.name] = path if isinstance(path, Path) else path.read_bytes()
    drawn = _picture(source, info, page.picture)
    if drawn is not None:
        files[PICTURE] = drawn
    facts = card.Facts(
        {key: shape for key, (_, shape) in info.tensors.items()}, info.dtypes, info.file_bytes, place.repo,
        place.subfolder, page.license, page.metrics, PICTURE if drawn else None,
    )  # fmt: skip
    files[hub.CARD] = _card(source, card.card_text(info.config, facts), place, commit["token"]).encode()
    commit["message"] = commit["message"] or f"{info.config.peft_type} adapter, saved by jaxadapt"
    made = hub.upload(place, files, **commit, stale=stale, progress=progress)
    return Pushed(str(place._replace(revision=made.reference or made.oid)), made.url)


def _card(source: Place, new: str, place: hub.Address, token: hub.Token) -> str:
    """A person's card in the folder goes as it is; else the Hub's stays, if a person wrote it."""
    path = source / hub.CARD
    if location.exists(path):
        # An error here, and no warning as in `write`: nothing was sent yet, and another card would go in its place.
        mine = _text_of(path)
        if card.is_edited(mine):
            return card.merge_card(mine, new)
    theirs = hub.fetch_text(place, hub.CARD, token)
    if theirs is not None and card.is_edited(theirs):
        LOGGER.info("%s: the card on the Hub was written by a person and stays", place)
    return card.merge_card(theirs, new)


def _text_of(path: Place) -> str:
    try:
        return location.read_text_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: expected text in UTF-8, found byte 0x{error.object[error.start]:02x} at {error.start}; save it as"
            " UTF-8, or delete it for one that is made anew"
        ) from error
    except FileError as error:
        raise FileError(f"{error}; delete it for a card that is made anew") from error


def _picture(source: Place, info: folder.Info, wanted: bool | None) -> bytes | None:
    if wanted is False or (wanted is None and importlib.util.find_spec("matplotlib") is None):
        return None
    from jaxadapt.analysis import norms
    from jaxadapt.analysis import norms_plot as picture

    try:
        return picture.norms_png(norms.measure_norms(folder.read(source)), info.config)
    except AdapterError:
        if wanted:
            raise
        return None  # a method whose change is not known without the base
