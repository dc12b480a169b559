"""A summary of an adapter folder, from its configuration and its header."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from jaxadapt.adapters import key_names
from jaxadapt.configs import Config
from jaxadapt.core.errors import MismatchError
from jaxadapt.core.progress import Progress, reporter
from jaxadapt.persistence import folder, reconcile, stored_adapter
from jaxadapt.persistence.formats import image_files, mlx_files
from jaxadapt.storage import location, orbax, safetensors, torch_bin
from jaxadapt.storage.source import as_source
from jaxadapt.storage.strided import dtype_name, numpy_dtype


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
        modules = {reconcile.tensor_module(self.config, key) for key in self.tensors}
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
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder, base_model="org/name")
    ...     info = inspect(folder)
    >>> info.config.base_model_name_or_path, info.parameters, info.modules, info.dtypes
    ('org/name', 20, ('q',), ('F32',))
    """
    if orbax.is_checkpoint(path):
        return _inspect_orbax(path)
    if image_files.is_image_file(path):
        return _inspect_opened(path, location.to_location(path), "an image adapter's file")
    with reporter(progress) as report:
        config, weights = folder.find_files(path, report)
    if mlx_files.is_weights(weights):
        return _inspect_opened(path, weights, "mlx-lm's folder")
    if weights.name == folder.WEIGHTS:
        header = safetensors.read_header(weights)
        tensors = {k: (t.dtype, t.shape) for k, t in header.tensors.items()}
        nbytes = sum(t.nbytes for t in header.tensors.values())
        size = header.size
    else:
        header = None
        tensors = torch_bin.keys_and_shapes(weights)
        nbytes = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in tensors.values())
        size = location.total_size(weights)
    new_keys = key_names.keys_without_names(tensors, str(path))
    tensors = {new: tensors[key] for key, new in new_keys.items() if new is not None} or tensors
    settings = reconcile.resolve_config(config, header, weights)
    found = stored_adapter.not_an_adapter(tensors, str(path)) if key_names.is_known_method(settings.peft_type) else None
    if found is not None:
        raise MismatchError(f"{path}: {found.found}; {found.remedy}")
    return Info(str(path), settings, tensors, nbytes, size)


def _inspect_opened(path: str | os.PathLike[str], weights: location.Location, form: str) -> Info:
    """Describe files of other programs by the content that `read` returns."""
    with folder.open_adapter(path) as adapter:
        specs = as_source(adapter.tensors).specs
        tensors = {key: (dtype_name(spec.dtype), tuple(spec.shape)) for key, spec in specs.items()}
        nbytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
        return Info(os.fspath(path), adapter.config, tensors, nbytes, location.total_size(weights), form)


def _inspect_orbax(path: str | os.PathLike[str]) -> Info:
    from jaxadapt.persistence.formats import orbax_folder

    config = orbax_folder.read_config(path)
    encoded = orbax_folder.adapter_tensors(orbax_folder.find_adapter(path).adapter, path).tensors
    tensors = {k: (dtype_name(t.dtype), tuple(t.shape)) for k, t in folder.array_specs(encoded).items()}
    nbytes = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in tensors.values())
    return Info(os.fspath(path), config, tensors, nbytes, location.total_size(location.to_location(path)))
