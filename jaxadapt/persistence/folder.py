"""Read, describe, write and upload adapter files in any format of `formats`: paths ↔ `PeftTensors`. Needs no Flax.

A path may be an address: of an object store, `s3://bucket/folder` (see `storage.location`), or of the Hub,
`hf://org/name@revision/subfolder`; its files are then read from the cache. `push` uploads an adapter and its model card
in one commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import (
    LOGGER,
    AdapterError,
    AttachError,
    FileError,
    FormatError,
    MismatchError,
    Progress,
    Report,
    byte_counter,
    no_report,
    reporter,
)
from jaxadapt.persistence import consumers, formats, reading
from jaxadapt.persistence.formats import Place, Wanted, peft_folder
from jaxadapt.storage import location

# ---------------------------------------------------------------- read and write


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read the configuration of an adapter folder (or of an `adapter_config.json`), without the tensors.

    Of an adapter on the Hub, only the configuration is fetched, unless it names no modules, as Tinker's and mlx-lm's.
    Raises `FileError` if it cannot be read, `ConfigError` if it is not a PEFT configuration.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     read_config(folder)
    LoraConfig(inference_mode=True, r=2, target_modules=['q'])
    """
    if location.is_hub_address(path):
        from jaxadapt.storage import hub  # imports the client of the Hub

        file = hub.fetch_config(str(path))
        values = peft_folder.parse_json(formats.read_text(file)) or {}
        # PEFT writes a type, and the names that "all-linear" and None stand for.
        is_peft = "peft_type" in values and values.get("target_modules", ()) not in (None, "all-linear")
        path = file if is_peft else hub.fetch_folder(str(path))
    place = formats.look(path)
    file_format = formats.find(place) or peft_folder.FORMAT
    if file_format.read_config is not None:
        return file_format.read_config(place)
    with file_format.open(place) as opened:
        return opened.tensors.config


def read(
    path: str | os.PathLike[str],
    *,
    repair: bool = False,
    change_base: bool | None = None,
    fit_vocabulary: bool = False,
    progress: Progress = None,
) -> peft_tensors.PeftTensors:
    """Read an adapter folder as `PeftTensors`, without a model: PEFT's names, PyTorch's layout, the file's dtypes.

    `load` and `from_peft` take the result, with what it says of its base and its vocabulary.

    Args:
        repair: True corrects names and settings that have only one meaning, as `jaxadapt.repair` does in files,
            and warns of each: keys with _orig_mod., module. or .default., or without PEFT's prefix, a lost
            adapter_config.json, … The files stay as they are.
        change_base: for an unconverted adapter whose initialization took a part out of the base weights (PiSSA, OLoRA,
            …). True: the model of `load` has the original weights, and `load` changes them as PEFT does. False: the
            model has the changed weights already. Without it, `load` and `from_peft` refuse such an adapter.
        fit_vocabulary: True if the tensors may be for another vocabulary than the model's: `load` and `from_peft` take
            the rows that the model has, with a warning; rows that the file lacks keep the base's values. By default
            such tensors are refused.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("read", bytes done, bytes in all);
            for an address of the Hub also of the files fetched.

    Reads `.safetensors` first, else a PyTorch `.bin` (nothing in it is executed), an Orbax checkpoint of jaxadapt,
    mlx-lm's folder (LoRA and DoRA) and Tinker's, under PEFT's names, or the one file of an image adapter (kohya-ss,
    LyCORIS, diffusers), whose modules are called unet.…, text_encoder.…
    Raises `FileError`, `FormatError` or `ConfigError`, naming the file.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     tensors = read(folder).tensors
    >>> {key: (x.dtype.name, x.shape) for key, x in tensors.items()}
    {'base_model.model.q.lora_A.weight': ('float32', (2, 4)), 'base_model.model.q.lora_B.weight': ('float32', (6, 2))}
    """
    with reporter(progress) as report:
        place = formats.look(path, report)
        with reading.open_repaired(place) if repair else open_adapter(place) as adapter:
            tensors = in_memory(adapter, report)
    return dataclasses.replace(tensors, change_base=change_base, fit_vocabulary=fit_vocabulary)


def in_memory(adapter: peft_tensors.PeftTensors, report: Report) -> peft_tensors.PeftTensors:
    """Return an open adapter with all its tensors in memory. Reports ("read", bytes done, bytes in all)."""
    source = as_source(adapter.tensors)
    count = byte_counter(report, "read", sum(map(source.nbytes, source)))
    return dataclasses.replace(adapter, tensors=source.read_many(source, count))


@contextlib.contextmanager
def open_adapter(
    path: str | os.PathLike[str] | Place, report: Report = no_report
) -> Generator[peft_tensors.PeftTensors]:
    """Open an adapter: like `read`, but read each tensor on demand while it is open."""
    with formats.open_place(formats.look(path, report)) as opened:
        yield opened.tensors


@dataclasses.dataclass(frozen=True)
class Info:
    """A summary of an adapter folder.

    Attributes:
        tensors: `{key: (dtype, shape)}`.
        nbytes: the size of the tensors in bytes.
        file_bytes: the size of their file in bytes.
        form: "PEFT", "mlx-lm's folder", "Tinker's folder" or "an image adapter's file". Of all but PEFT's, the
            configuration and the names are those after `jaxadapt convert`.
    """

    path: str
    config: Config
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = dataclasses.field(repr=False)
    nbytes: int
    file_bytes: int
    form: str = "PEFT"

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors, under safetensors' names."""
        return tuple(sorted({dtype for dtype, _ in self.tensors.values()}))

    @property
    def modules(self) -> tuple[str, ...]:
        """The last segments of the adapted modules' names; empty for methods that adapt no module."""
        modules = (peft_folder.tensor_module(self.config, key) for key in self.tensors)
        return tuple(sorted({name.rpartition(".")[2] for name in modules if name is not None}))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, for `jaxadapt inspect --json`."""
        return {
            "path": self.path,
            "form": self.form,
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "file_bytes": self.file_bytes,
            "dtypes": list(self.dtypes),
            "modules": list(self.modules),
            "tensors": {k: {"dtype": d, "shape": list(s)} for k, (d, s) in self.tensors.items()},
        }


def inspect(path: str | os.PathLike[str], *, progress: Progress = None) -> Info:
    """Return the method, targets, sizes and base model of an adapter folder; read no tensor.

    Accepts an Orbax checkpoint too, mlx-lm's and Tinker's folders, and the one file of an image adapter (kohya-ss,
    LyCORIS, diffusers), and lists their tensors under the names that PEFT's file would have.
    An adapter on the Hub is fetched, with `progress` as in `pull`.
    Raises `FileError`, `FormatError` or `ConfigError`, naming the file, and `MismatchError` if it holds no adapter.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder, base_model="org/name")
    ...     info = inspect(folder)
    >>> info.config.base_model_name_or_path, info.parameters, info.modules, info.dtypes
    ('org/name', 20, ('q',), ('F32',))
    """
    with reporter(progress) as report, formats.open_place(formats.look(path, report)) as opened:
        source = as_source(opened.tensors.tensors)
        info = Info(
            os.fspath(path),
            opened.tensors.config,
            source.kinds,
            sum(map(source.nbytes, source)),
            location.total_size(opened.weights),
            opened.form,
        )
    found = (
        formats.not_an_adapter(info.tensors, str(path)) if peft_tensors.is_known_method(info.config.peft_type) else None
    )
    if found is not None:
        raise MismatchError(f"{path}: {found.found}; {found.remedy}")
    return info


def write(
    tensors: peft_tensors.PeftTensors,
    path: str | os.PathLike[str],
    *,
    format: str = "safetensors",  # noqa: A002 (as in `save`)
    progress: Progress = None,
) -> None:
    """Write an adapter folder, durably and atomically: after a crash it contains the old adapter or the new one.

    Args:
        format: "bin" writes PyTorch's `adapter_model.bin`, for programs that read no safetensors. It has no copy of the
            configuration, so that a reader does not notice a save that was interrupted between the two files.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).

    Creates the folder if it is missing and leaves other files in it alone; an edited README.md is kept. The same
    content always gives the same bytes. Two concurrent writers take turns. Raises `FileError` naming the path; the old
    adapter then remains, unless the error says that the new one is in place. If the model card cannot be written, a
    warning says so.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(jaxadapt.to_peft(adapter), folder)
    ...     jaxadapt.read(folder).config == config
    True
    """
    formats.require_style(path, format, ("safetensors", "bin"))
    peft_folder.write_folder(tensors, path, Wanted(format), progress)


# ---------------------------------------------------------------- push


PICTURE = "adapter_norms.png"
_LONG = 24 * 3600.0  # seconds


def push(
    source: Any,
    repo: str,
    *,
    name: str = "default",
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: location.Token = None,
    card: consumers.Card | None = None,
    progress: Progress = None,
    **saving: Any,
) -> location.Pushed:
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
    page = card or consumers.Card()
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
        if isinstance(source, peft_tensors.PeftTensors):
            if saving:
                raise AttachError(f"{', '.join(saving)}: applies to models only; PeftTensors are uploaded unchanged")
            write(source, made, progress=progress)
            return _push(Path(made), place, page, commit, progress)
        # here, so that a folder uploads without JAX
        import jax

        from jaxadapt.models.carriers import carrier
        from jaxadapt.persistence import save_adapter

        own = save_adapter.MultihostFolder(made, shared=False)  # each process has its own folder
        save_adapter.save(source, own, name=name, progress=progress, **saving)
        below = Path(made) if name == "default" else Path(made) / name

        def send() -> location.Pushed:
            return _push(below, place, page, commit, progress)

        if not save_adapter.is_distributed(jax.tree.leaves(carrier(source).pytree())):
            return send()
        # All processes call this. A long timeout: if process 0 dies, the lost connection to it ends the others.
        return location.Pushed(*save_adapter.run_on_leader(f"push to {place}", send, _LONG))


def _push(
    source: location.Location,
    place: location.HubAddress,
    page: consumers.Card,
    commit: dict[str, Any],
    progress: Progress,
) -> location.Pushed:
    from jaxadapt.storage import hub  # imports the client of the Hub

    info = inspect(source)  # raises for unreadable files before anything is sent
    weights = next((name for name in location.WEIGHTS if location.exists(source / name)), None)
    if weights is None:
        raise FileError(
            f"{source}: cannot upload an Orbax checkpoint or mlx-lm's folder, which other readers of the Hub do not"
            " know. Convert it to PEFT's folder with jaxadapt.write(jaxadapt.read(source), folder)"
        )
    files: dict[str, Path | bytes] = {
        path.name: path if isinstance(path, Path) else path.read_bytes()
        for path in (source / location.CONFIG, source / weights)
    }
    image = _picture(source, info, page.picture)
    if image is not None:
        files[PICTURE] = image
    new = consumers.card_text(info.config, info.tensors, info.file_bytes, page, place, PICTURE if image else None)
    path = source / location.CARD
    # An unreadable one is an error: another would be uploaded instead.
    card = formats.read_text(path, FormatError) if location.exists(path) else None
    if card is None or not consumers.is_edited(card):
        card = hub.fetch_text(place, location.CARD, commit["token"])
        if card is not None and consumers.is_edited(card):
            LOGGER.info("%s: the card on the Hub was written by a person and is kept", place)
    files[location.CARD] = consumers.merge_card(card, new).encode()
    commit["message"] = commit["message"] or f"{info.config.peft_type} adapter, saved by jaxadapt"
    return hub.upload(place, files, **commit, stale=sorted({*location.WEIGHTS} - {weights}), progress=progress)


def _picture(source: location.Location, info: Info, wanted: bool | None) -> bytes | None:
    if wanted is False or (wanted is None and importlib.util.find_spec("matplotlib") is None):
        return None
    from jaxadapt.analysis import measure_norms, norms_png

    try:
        return norms_png(measure_norms(read(source)), info.config)
    except AdapterError:
        if wanted:
            raise
        return None  # this method's change depends on the base
