"""Upload an adapter and its model card to the Hub, in one commit."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.core.errors import AdapterError, AttachError, FileError, FormatError
from jaxadapt.core.progress import LOGGER, Progress
from jaxadapt.persistence import card as cards
from jaxadapt.persistence import folder
from jaxadapt.storage import hub, location

PICTURE = "adapter_norms.png"
_LONG = 24 * 3600.0  # seconds


class Pushed(NamedTuple):
    """The place of an uploaded adapter.

    Attributes:
        address: the address for `load`, pinned to the commit.
        url: the page of the commit, or of the pull request.
    """

    address: str
    url: str


@dataclasses.dataclass(frozen=True)
class Card:
    """Texts and results for a model card, which states the facts of the adapter's files by itself.

    Args:
        license: the license, such as "apache-2.0".
        metrics: `{name: value}` of results.
        picture: True for a picture of how much each weight is changed; None: if matplotlib is installed.

    >>> Card(metrics={"loss": 3.2})
    Card(license=None, metrics={'loss': 3.2}, picture=None)
    """

    license: str | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    picture: bool | None = None


def push(
    source: Any,
    repo: str,
    *,
    name: str = "default",
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: hub.Token = None,
    card: Card | None = None,
    progress: Progress = None,
    **saving: Any,
) -> Pushed:
    """Upload an adapter to the Hugging Face Hub in one commit: configuration, weights and model card.

    Args:
        source: an adapter's folder; or a model, variables, an `Adapter` or `PeftTensors`, which are first saved to a
            temporary folder. `saving` are then the arguments of `save` (`base_model=`, …).
        repo: "org/name", or in full "hf://org/name@branch/subfolder". Repository and branch are created if they do not
            exist; a slash in the branch is written "%2F". The subfolder is for several adapters in one repository.
        name: the adapter's name in the model; all but "default" go to the subfolder of their name, as in PEFT.
        private: makes a new repository private. True is an error for an existing public one.
        create_pr: open a pull request instead of committing to the branch.
        tag: a tag for the commit.
        token: by default `HF_TOKEN` or the stored one.
        card: what the model card says beside the facts of the files.
        progress: None, True (the client's bars, on a terminal or in a notebook) or a function of ("upload", bytes sent,
            bytes in all); for a model also of "save". With hf_xet, which the client uses where it is installed and the
            Hub supports it, the function is called only at the beginning and the end.

    For arrays spread over several processes, all of them call this, and process 0 uploads the gathered adapter.

    A card on the Hub that a person wrote or edited is kept, and only missing front matter is added. A card in the
    folder that a person wrote replaces it. The same commit deletes weights of the other format at the same place.

    Raises `FileError` for errors of the Hub or the connection and, before anything is sent, for an unreadable card in
    the folder; and every error of `save`.

        jaxadapt.push(model, "org/name", base_model="org/base", card=jaxadapt.Card(metrics={"loss": 3.2})).url
    """
    place = location.parse_hub_address(repo)
    page = card or Card()
    commit = {"message": commit_message, "private": private, "create_pr": create_pr, "tag": tag, "token": token}
    if isinstance(source, str | os.PathLike):
        if saving or name != "default":
            given = ", ".join([*saving, *(["name"] if name != "default" else [])])
            raise AttachError(f"{given}: applies to models only; the folder {os.fspath(source)} is uploaded unchanged")
        if location.is_hub_address(source):
            raise FileError(f"{source}: already on the Hub; pull it and push the folder")
        return _push(location.to_location(source), place, page, commit, progress)
    if name != "default" and not place.subfolder:
        place = place._replace(subfolder=name)
    with tempfile.TemporaryDirectory(prefix="jaxadapt-push-") as made:
        if isinstance(source, PeftTensors):
            if saving:
                raise AttachError(f"{', '.join(saving)}: applies to models only; PeftTensors are uploaded unchanged")
            folder.write(source, made, progress=progress)
            return _push(Path(made), place, page, commit, progress)
        # here, so that a folder uploads without JAX
        import jax

        from jaxadapt.models.carriers import carrier
        from jaxadapt.persistence import save_adapter

        own = save_adapter.MultihostFolder(made, shared=False)  # each process has its own folder
        save_adapter.save(source, own, name=name, progress=progress, **saving)
        below = Path(made) if name == "default" else Path(made) / name
        send = functools.partial(_push, below, place, page, commit, progress)
        if not save_adapter.is_distributed(jax.tree.leaves(carrier(source).pytree())):
            return send()
        # All processes call this. A long timeout: if process 0 dies, the lost connection to it ends the others.
        return Pushed(*save_adapter.run_on_leader(f"push to {place}", send, _LONG))


def _push(
    source: location.Location, place: location.HubAddress, page: Card, commit: dict[str, Any], progress: Progress
) -> Pushed:
    info = folder.inspect(source)  # raises for unreadable files before anything is sent
    weights = next((name for name in location.WEIGHTS if location.exists(source / name)), None)
    if weights is None:
        raise FileError(
            f"{source}: cannot upload an Orbax checkpoint or mlx-lm's folder, which other readers of the Hub do not"
            " know. Convert it to PEFT's folder with jaxadapt.write(jaxadapt.read(source), folder)"
        )
    stale = [name for name in location.WEIGHTS if name != weights]
    files: dict[str, Path | bytes] = {}
    for path in (source / location.CONFIG, source / weights):
        files[path.name] = path if isinstance(path, Path) else path.read_bytes()
    image = _picture(source, info, page.picture)
    if image is not None:
        files[PICTURE] = image
    facts = cards.Facts(
        {key: shape for key, (_, shape) in info.tensors.items()}, info.dtypes, info.file_bytes, place.repo,
        place.subfolder, page.license, page.metrics, PICTURE if image else None,
    )  # fmt: skip
    files[location.CARD] = _card(source, cards.card_text(info.config, facts), place, commit["token"]).encode()
    commit["message"] = commit["message"] or f"{info.config.peft_type} adapter, saved by jaxadapt"
    uploaded = hub.upload(place, files, **commit, stale=stale, progress=progress)
    return Pushed(str(place._replace(revision=uploaded.reference or uploaded.oid)), uploaded.url)


def _card(source: location.Location, new: str, place: location.HubAddress, token: hub.Token) -> str:
    """Return the card to upload: an edited one of the folder, else an edited one of the Hub, else `new`."""
    path = source / location.CARD
    if location.exists(path):
        # `write` only warns; here an unreadable card is an error, because another card would be uploaded in its place.
        in_folder = _read_card(path)
        if cards.is_edited(in_folder):
            return cards.merge_card(in_folder, new)
    on_hub = hub.fetch_text(place, location.CARD, token)
    if on_hub is not None and cards.is_edited(on_hub):
        LOGGER.info("%s: the card on the Hub was written by a person and is kept", place)
    return cards.merge_card(on_hub, new)


def _read_card(path: location.Location) -> str:
    try:
        return location.read_text_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: expected text in UTF-8, found byte 0x{error.object[error.start]:02x} at {error.start}; save it as"
            " UTF-8, or delete it to have a new one written"
        ) from error
    except FileError as error:
        raise FileError(f"{error}; delete it to have a new card written") from error


def _picture(source: location.Location, info: folder.Info, wanted: bool | None) -> bytes | None:
    if wanted is False or (wanted is None and importlib.util.find_spec("matplotlib") is None):
        return None
    from jaxadapt.analysis import norms

    try:
        return norms.norms_png(norms.measure_norms(folder.read(source)), info.config)
    except AdapterError:
        if wanted:
            raise
        return None  # this method's change depends on the base
