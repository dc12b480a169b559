"""The file formats of adapters: one file each, and one row of `FORMATS`.

A format recognises the content of a path, opens it as `PeftTensors`, and writes `PeftTensors`. `look` turns a path into
a `Place` once; the formats decide by the names in it. No other file asks what a path holds.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AdapterError, ConfigError, FileError
from jaxadapt.core.progress import Report, no_report
from jaxadapt.storage import location, orbax
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Location

if TYPE_CHECKING:
    from jaxadapt.adapters.adapter import Adapter, Site
    from jaxadapt.models.planning import BaseParams
    from jaxadapt.persistence.findings import Finding
    from jaxadapt.persistence.rules import Options


class Row(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
        ends: ends of file names. The module is imported when the path, or a name in its folder, has one of them, or
            when the format is to be written.
        folders: the styles of a folder that a user chooses in a conversion.
        files: those of a single file, whose name ends in .safetensors.
        exports: the styles that only an export for a program writes.
    """

    ends: tuple[str, ...]
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()


FORMATS: dict[str, Row] = {
    "peft_folder": Row(location.WEIGHTS, folders=("safetensors", "bin")),
    "mlx_files": Row((location.MLX_WEIGHTS,), exports=("mlx",)),
    "image_files": Row((".safetensors",), files=("kohya-ss", "diffusers")),
    "orbax_folder": Row(orbax.MARKERS, folders=("orbax",)),
}
"""{module of a format: its row}, in the order in which they are asked what a path holds."""

OPAQUE = "LYCORIS"
"""The type of tensors that PEFT has no method for: they pass through under the names of their own program."""


class Place(NamedTuple):
    """A path and its content.

    Attributes:
        path: the path as given, for messages.
        at: its location; for an address of the Hub, the folder in the cache.
        names: the names in the folder; None for a file.
    """

    path: str | os.PathLike[str]
    at: Location
    names: frozenset[str] | None


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open adapter.

    Attributes:
        tensors: its content under PEFT's names, read on demand.
        weights: the file of its tensors, or the folder of them.
        form: the words for its format.
        style: the style of a single file, which a new file keeps; "" for a folder.
        names: the names in a single file, which a new file of this style keeps.
        metadata: the strings in the header of a single file.
        split: returns one adapter for each model, if a file may change several.
    """

    tensors: PeftTensors
    weights: Location
    form: str = "PEFT"
    style: str = ""
    names: Any = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    split: Callable[[PeftTensors], dict[str, PeftTensors]] | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The choices for a file to write.

    Attributes:
        style: one of the styles in the format's row.
        origin: the open adapter from which the tensors come, whose names may be kept.
        tied: True if the base ties its head to the token embedding; None if that is unknown.
        ahead: True for tensors that a thread may read and compute while others are written.
    """

    style: str
    origin: Opened | None = None
    tied: bool | None = None
    ahead: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        recognises: tells if a place holds this format, by its names or by a header.
        open: opens a place.
        write: writes tensors to a location and returns their number.
        read_config: reads only the configuration; None to open the place for it.
        join: makes one adapter of one for each model, for a file that may change several.
        write_adapter: writes an adapter in its model's layout, for a format that keeps it; every process calls it.
        read_adapter: reads an adapter into the layout of a base, for a format that keeps a model's layout.
        describe: returns the finding of `verify` about an open file, or about one that `open` refused.
    """

    recognises: Callable[[Place], bool]
    open: Callable[[Place], AbstractContextManager[Opened]]
    write: Callable[[PeftTensors, Location, Wanted, Report], int]
    read_config: Callable[[Place], Config] | None = None
    write_adapter: Callable[[Adapter, Location, Report], None] | None = None
    read_adapter: (
        Callable[[Place, BaseParams, Adapter | None, str, Options, Report], tuple[Adapter, Sequence[Site], bool | None]]
        | None
    ) = None
    describe: Callable[[str, Opened | AdapterError], Finding] | None = None
    join: Callable[[Mapping[str, PeftTensors], str], PeftTensors] | None = None


def look(path: str | os.PathLike[str] | Place, report: Report = no_report) -> Place:
    """Return the content of a path; fetch an adapter on the Hub first. Raises `FileError` if nothing can be read."""
    if isinstance(path, Place):
        return path
    if location.is_hub_address(path):
        from jaxadapt.storage import hub  # imports the client of the Hub

        at: Location = hub.fetch_folder(str(path), report=report)
    else:
        at = location.to_location(path)
    try:
        return Place(path, at, frozenset(entry.name for entry in at.iterdir()))
    except NotADirectoryError:
        return Place(path, at, None)
    except FileNotFoundError as error:
        why = error.strerror if isinstance(at, location.Address) else "no such folder"
        is_repository = location.could_be_repository(str(path))
        on_hub = f"; for the Hub's repository give {location.HUB}{path}" if is_repository else ""
        raise FileError(
            f"{at}: {why}; expected a folder that contains {location.CONFIG} and {location.WEIGHTS[0]}{on_hub}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("read", str(at), error) from error


def read_text(path: Location) -> str:
    """Read a UTF-8 file. Raises `ConfigError` if it is not UTF-8."""
    try:
        return location.read_text_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def load_format(name: str) -> Format:
    """Import the format of one row of `FORMATS`."""
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def find(place: Place) -> Format | None:
    """Return the format of a place; None if no format recognises it."""
    names = place.names if place.names is not None else [place.at.name]
    known = (module for module, row in FORMATS.items() if any(name.endswith(row.ends) for name in names))
    return next((found for found in map(load_format, known) if found.recognises(place)), None)


def open_place(place: Place) -> AbstractContextManager[Opened]:
    """Open an adapter. Raises `FileError` if no format recognises the place, and what its format raises."""
    return (find(place) or load_format("peft_folder")).open(place)  # its error names the missing files


def writer(style: str) -> Format:
    """Return the format that writes a style, one of those in the rows."""
    return load_format(next(m for m, row in FORMATS.items() if style in (*row.folders, *row.files, *row.exports)))


def read_adapter(
    place: Place, base: BaseParams, attached: Adapter | None, name: str, options: Options, report: Report
) -> tuple[Adapter, Sequence[Site], bool | None]:
    """Read an adapter into the layout of a base; return it, its sites and its `change_base`, as in `PeftTensors`.

    Args:
        place: of a format that keeps a model's layout.
        attached: the adapter on the target called `name`, if there is one; it may identify the leaves to read.
    """
    file_format = find(place)
    assert file_format is not None
    assert file_format.read_adapter is not None
    return file_format.read_adapter(place, base, attached, name, options, report)
