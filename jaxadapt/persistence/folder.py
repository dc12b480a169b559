"""Read, describe and write adapter files in any format of `formats`: paths ↔ `PeftTensors`. Needs no model and no Flax.

A path may be an address: of an object store, `s3://bucket/folder` (see `storage.location`), or of the Hub,
`hf://org/name@revision/subfolder`; its files are then read from the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Generator, Mapping
from typing import Any

from jaxadapt.adapters import peft_tensors
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.configs.base import Config, loads
from jaxadapt.core.errors import FileError, MismatchError
from jaxadapt.core.progress import Progress, Report, byte_counter, no_report, reporter
from jaxadapt.persistence import findings, formats, reading
from jaxadapt.persistence.formats import Place, peft_folder
from jaxadapt.storage import location


def adapter_folder(path: str | os.PathLike[str], name: str) -> location.Location:
    """Return the folder of the adapter called `name`: a subfolder for all but "default", as in PEFT."""
    if location.is_hub_address(path):
        raise FileError(f"{path}: expected a local folder; upload to the Hub with jaxadapt.push(model, 'org/name')")
    if name == "default":
        return location.to_location(path)
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(f"{path}: {name!r} cannot name a subfolder; choose a name without slashes")
    return location.to_location(path) / name


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read the configuration of an adapter folder (or of an `adapter_config.json`), without the tensors.

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
        path = hub.fetch_folder(str(path)) if peft_folder.is_mlx_config(formats.read_text(file)) else file
    place = formats.look(path)
    file_format = formats.find(place)
    if file_format is None:
        config = place.at if place.names is None else place.at / peft_folder.CONFIG
        if place.names is None or peft_folder.CONFIG in place.names:
            return loads(formats.read_text(config), str(config))
        findings.refuse(peft_folder.missing(place))
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
) -> PeftTensors:
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
    mlx-lm's folder (LoRA and DoRA, under PEFT's names), or the one file of an image adapter (kohya-ss, LyCORIS,
    diffusers), whose modules are called unet.…, text_encoder.…
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


def in_memory(adapter: PeftTensors, report: Report) -> PeftTensors:
    """Return an open adapter with all its tensors in memory. Reports ("read", bytes done, bytes in all)."""
    source = as_source(adapter.tensors)
    count = byte_counter(report, "read", sum(map(source.nbytes, source)))
    return dataclasses.replace(adapter, tensors=source.read_many(source, count))


@contextlib.contextmanager
def open_adapter(path: str | os.PathLike[str] | Place, report: Report = no_report) -> Generator[PeftTensors]:
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
        form: "PEFT", "mlx-lm's folder" or "an image adapter's file". Of the last two, the configuration and the names
            are those after `jaxadapt convert`.
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
        modules = {peft_folder.tensor_module(self.config, key) for key in self.tensors}
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

    Accepts an Orbax checkpoint too, mlx-lm's folder, and the one file of an image adapter (kohya-ss, LyCORIS,
    diffusers), and lists their tensors under the names that PEFT's file would have.
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
        config, source = opened.tensors.config, as_source(opened.tensors.tensors)
        tensors, nbytes = source.kinds, sum(map(source.nbytes, source))
    found = findings.not_an_adapter(tensors, str(path)) if peft_tensors.is_known_method(config.peft_type) else None
    if found is not None:
        raise MismatchError(f"{path}: {found.found}; {found.remedy}")
    return Info(os.fspath(path), config, tensors, nbytes, location.total_size(opened.weights), opened.form)


def write(
    tensors: PeftTensors,
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
    if format not in ("safetensors", "bin"):
        raise FileError(f"{os.fspath(path)}: format {format!r}: expected 'safetensors' or 'bin'")
    peft_folder.write_with(tensors, path, None, progress, as_bin=format == "bin")
