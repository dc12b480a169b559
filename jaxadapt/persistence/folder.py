"""An adapter's folder on disk, in PEFT's layout: `PeftTensors` ↔ files. Needs no model and no Flax.

    adapter_config.json          the configuration
    adapter_model.safetensors    the tensors; jaxadapt repeats the configuration in the header, because two files
                                 cannot be replaced at the same instant
    README.md                    the model card, rewritten at each save until a person edits it

A path may be an address: of an object store, `s3://bucket/folder` (see `storage.location`), or of the Hub,
`hf://org/name@revision/subfolder`; its files are then read from the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from jaxadapt import configs
from jaxadapt.adapters import key_names
from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError, FileError, MismatchError, raise_listed, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, no_report, reporter
from jaxadapt.persistence import card, fingerprint, reconcile, run_folder
from jaxadapt.persistence.formats import image_files, mlx_files
from jaxadapt.storage import atomic, hub, location, orbax, safetensors, torch_bin, torch_bin_write
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Location
from jaxadapt.storage.source import TensorSource, as_source
from jaxadapt.storage.strided import dtype_name

CONFIG = hub.CONFIG
WEIGHTS, WEIGHTS_BIN = hub.WEIGHTS
CARD = hub.CARD
_NOTHING = "0" * 64  # digest of no JSON: the save replaced none, or is complete


# ---------------------------------------------------------------- reading


def adapter_folder(path: str | os.PathLike[str], name: str) -> Location:
    """Return the folder of the adapter called `name`: a subfolder for all but "default", as in PEFT."""
    if hub.is_address(path):
        raise FileError(f"{path}: expected a local folder; upload to the Hub with jaxadapt.push(model, 'org/name')")
    if name == "default":
        return location.to_location(path)
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(f"{path}: {name!r} cannot name a subfolder; choose a name without slashes")
    return location.to_location(path) / name


def find_files(path: str | os.PathLike[str], report: Report = no_report) -> tuple[Location, Location]:
    """Return the paths of a folder's configuration and weights, which may be mlx-lm's (`mlx_files`).

    Raises `FileError` naming those that are missing.
    """
    if mlx_files.is_file(path):
        place = location.to_location(path)
        return place.parent / CONFIG, place
    remote = isinstance(path, str) and hub.is_address(path)
    folder: Location = hub.fetch_folder(str(path), report=report) if remote else location.to_location(path)
    try:
        present = sorted(p.name for p in folder.iterdir())
    except FileNotFoundError as error:
        why = error.strerror if isinstance(folder, location.Address) else "no such folder"
        on_hub = f"; for the Hub's repository give {hub.SCHEME}{path}" if hub.could_be_repository(str(path)) else ""
        raise FileError(f"{folder}: {why}; expected a folder that contains {CONFIG} and {WEIGHTS}{on_hub}") from None
    except NotADirectoryError:
        raise FileError(
            f"{folder}: expected a folder that contains {CONFIG} and {WEIGHTS}, found a file; pass its folder"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("read", str(folder), error) from error
    weights = next((name for name in (WEIGHTS, WEIGHTS_BIN, mlx_files.WEIGHTS) if name in present), None)
    if (
        CONFIG not in present
        and weights == WEIGHTS
        and reconcile.META in safetensors.read_header(folder / weights).metadata
    ):
        return folder / CONFIG, folder / weights  # `resolve_config` takes the copy in the header
    missing = [name for name, found in ((CONFIG, CONFIG in present), (WEIGHTS, weights)) if not found]
    if missing or weights is None:
        adapters: list[str] = []
        with contextlib.suppress(FileError):
            adapters = [name for name in present[:64] if location.exists(folder / name / CONFIG)]
        hint = f"; these subfolders contain adapters: {', '.join(adapters)}" if adapters else ""
        if any(map(run_folder.NAME.fullmatch, present)):
            hint = f"; it contains training checkpoints: `jaxadapt checkpoints {folder}` lists and exports them{hint}"
        files = ", ".join(present[:8]) + (", …" if len(present) > 8 else "")
        raise FileError(f"{folder}: no {' and no '.join(missing)}; found {files or 'an empty folder'}{hint}")
    return folder / CONFIG, folder / weights


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read the configuration of an adapter folder (or of an `adapter_config.json`), without the tensors.

    Raises `FileError` if it cannot be read, `ConfigError` if it is not a PEFT configuration.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     read_config(folder)
    LoraConfig(inference_mode=True, r=2, target_modules=['q'])
    """
    if isinstance(path, str) and hub.is_address(path):
        path = mlx_files.fetch_config(path)
    if orbax.is_checkpoint(path):
        from jaxadapt.persistence.formats import orbax_folder

        return orbax_folder.read_config(path)
    if image_files.is_image_file(path):
        with image_files.open_file(path) as file:
            return file.tensors.config
    target = location.to_location(path)
    if location.is_file(target) and not mlx_files.is_file(target):
        return configs.loads(reconcile.read_text(target), str(target))
    if location.exists(target / CONFIG) and not any(
        location.exists(target / name) for name in (WEIGHTS, WEIGHTS_BIN, mlx_files.WEIGHTS)
    ):
        return configs.loads(reconcile.read_text(target / CONFIG), str(target / CONFIG))
    config, weights = find_files(path)
    if mlx_files.is_weights(weights):
        with mlx_files.open_files(config, weights, os.fspath(path)) as tensors:
            return tensors.config
    header = safetensors.read_header(weights) if weights.name == WEIGHTS else None
    return reconcile.resolve_config(config, header, weights)


def read(path: str | os.PathLike[str], *, progress: Progress = None) -> PeftTensors:
    """Read an adapter folder as `PeftTensors`, without a model: PEFT's names, PyTorch's layout, the file's dtypes.

    Args:
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("read", bytes done, bytes in all);
            for an address of the Hub also of the files fetched.

    Reads `.safetensors` first, else a PyTorch `.bin` (nothing in it is executed), an Orbax checkpoint of jaxadapt,
    mlx-lm's folder (LoRA and DoRA, under PEFT's names), or the one file of an image adapter (kohya-ss, LyCORIS,
    diffusers), whose modules are called unet.…, text_encoder.…
    Raises `FileError`, `FormatError` or `ConfigError`, naming the file.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     tensors = read(folder).tensors
    >>> {key: (x.dtype.name, x.shape) for key, x in tensors.items()}
    {'base_model.model.q.lora_A.weight': ('float32', (2, 4)), 'base_model.model.q.lora_B.weight': ('float32', (6, 2))}
    """
    with reporter(progress) as report, open_adapter(path, report) as adapter:
        source = as_source(adapter.tensors)
        count = byte_counter(report, "read", sum(map(source.nbytes, source)))
        return dataclasses.replace(adapter, tensors=source.read_many(source, count))


@contextlib.contextmanager
def open_adapter(path: str | os.PathLike[str], report: Report = no_report) -> Generator[PeftTensors]:
    """Open an adapter folder: like `read`, but read each tensor of a `.safetensors` file on demand while it is open."""
    if orbax.is_checkpoint(path):
        from jaxadapt.persistence.formats import orbax_folder

        yield orbax_folder.adapter_tensors(orbax_folder.read(path, orbax_folder.find_adapter(path)), path)
        return
    if image_files.is_image_file(path):
        with image_files.open_file(path) as file:
            yield file.tensors
        return
    config, weights = find_files(path, report)
    if mlx_files.is_weights(weights):
        with mlx_files.open_files(config, weights, os.fspath(path)) as adapter:
            yield adapter
        return
    with contextlib.ExitStack() as stack:
        if weights.name == WEIGHTS:
            tensors: Mapping[str, Any] = stack.enter_context(safetensors.open_tensors(weights))
            resolved = reconcile.resolve_config(config, tensors.header, weights)
            base = reconcile.stored_fingerprint(tensors.header)
        else:
            resolved, base = reconcile.resolve_config(config, None, weights), None
            tensors = torch_bin.read(weights)
        if not tensors:
            raise MismatchError(f"{weights}: no tensors in the file; expected those of an adapter")
        yield key_names.without_names(PeftTensors(resolved, tensors, str(path), base))


# ---------------------------------------------------------------- writing


Put = Callable[[atomic.Writer, Mapping[str, Any], Mapping[str, str]], safetensors.Header]
"""Writes the file of tensors, from `(writer, {key: (dtype, shape)}, metadata)`."""


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
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(jaxadapt.to_peft(adapter), folder)
    ...     jaxadapt.read(folder).config == config
    True
    """
    if format not in ("safetensors", "bin"):
        raise FileError(f"{os.fspath(path)}: format {format!r}: expected 'safetensors' or 'bin'")
    write_with(tensors, path, None, progress, as_bin=format == "bin")


def write_with(
    tensors: PeftTensors,
    path: str | os.PathLike[str],
    put: Put | None,
    progress: Progress,
    *,
    as_bin: bool = False,
    ahead: bool = False,
) -> None:
    """Write an adapter folder as `write` does.

    Args:
        put: writes the file of tensors, if given.
        ahead: True for tensors that a thread may read and compute while others are written.
    """
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"write: expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " write models, variables and Adapters with jaxadapt.save"
        )
    if hub.is_address(path):
        raise FileError(f"{path}: expected a local folder; upload to the Hub with jaxadapt.push(tensors, 'org/name')")
    folder = location.to_location(path)
    if not tensors.tensors:
        raise MismatchError(f"{folder}: cannot write an adapter without tensors")
    made = atomic.make_folder(folder)
    try:
        with reporter(progress) as report, atomic.lock_directory(folder):
            _write(tensors, folder, put, report, as_bin, ahead)
    except BaseException:
        for new in made:  # remove the empty folders that this call created
            with contextlib.suppress(OSError):
                new.rmdir()
        raise


def _write(tensors: PeftTensors, folder: Location, put: Put | None, report: Report, as_bin: bool, ahead: bool) -> None:
    import numpy as np

    config, weights = folder / CONFIG, folder / (WEIGHTS_BIN if as_bin else WEIGHTS)
    if as_bin and location.exists(folder / WEIGHTS):
        raise FileError(
            f"{folder}: cannot write {WEIGHTS_BIN} beside {WEIGHTS}, which readers would take instead; choose another"
            " folder, or delete that file"
        )
    adapter_config = with_integral_alpha(tensors.config)
    if location.is_dir(config):
        raise FileError(f"{config}: expected a file, found a folder; save to another path")
    text = adapter_config.to_json()
    exists = location.exists(config)
    old_text = reconcile.read_text(config) if exists else text
    if mlx_files.is_config(old_text):
        raise FileError(f"{config}: cannot replace mlx-lm's file of this name; choose another folder")
    replaces = _NOTHING if old_text == text else reconcile.text_digest(old_text)
    document = {"config": adapter_config.to_dict(), "replaces": replaces, "schema": 1}
    if tensors.base is not None:
        document[fingerprint.FIELD] = dict(tensors.base)
    specs = {k: (np.dtype(v.dtype), tuple(v.shape)) for k, v in array_specs(tensors.tensors).items()}
    parts = [key for key in specs if key.endswith("]")]
    raise_listed(
        MismatchError,
        f"{folder}: cannot write parts of PyTorch's tensors, which only a model can join. Load the checkpoint into"
        " a model and save that:",
        parts,
    )
    require_floats(tensors.config, array_specs(tensors.tensors), folder)
    metadata = {"format": "pt", reconcile.META: json.dumps(document)}
    # Both files are on the disk before the weights are renamed into place, and the JSON right after them: a full disk
    # shows before anything changes. An equal JSON stays, as in all saves of a run but the first.
    replaced = [weights] if exists and old_text == text else [weights, config]
    with atomic.replacing_all(replaced) as (writer, *others):
        for other in others:
            other.write(memoryview(text.encode()))
        if put is None:
            count = byte_counter(report, "save", sum(d.itemsize * math.prod(shape) for d, shape in specs.values()))
            get = functools.partial(_value, tensors.tensors)
            if as_bin:
                size = torch_bin_write.write_to(writer, specs, get, count)
            else:
                size = safetensors.write_to(writer, specs, get, metadata, progress=count, ahead=ahead).size
        else:
            size = put(writer, specs, metadata).size
    if replaces != _NOTHING and not as_bin:
        _blank_digest(weights, replaces)
    stale = folder / WEIGHTS_BIN
    with contextlib.suppress(FileError):  # the adapter is in place, and readers prefer it to this file
        if not as_bin and location.exists(stale):
            warn(f"{stale} is an older adapter beside the one just written; readers use {WEIGHTS}. Delete it")
    dtypes = tuple(sorted({dtype_name(dtype) for dtype, _ in specs.values()}))
    shapes = {key: shape for key, (_, shape) in specs.items()}
    _write_card(folder / CARD, adapter_config, card.Facts(shapes, dtypes, size))
    LOGGER.info("%s: %d tensors written, %s", folder, len(specs), card.size_text(size))


def with_integral_alpha(config: Config) -> Config:
    """Write an integral `lora_alpha` as an integer: readers such as Ollama's expect one. The value is the same.

    >>> with_integral_alpha(configs.LoraConfig(lora_alpha=16.0)).lora_alpha
    16
    """
    alpha = config.get("lora_alpha")
    if isinstance(config, configs.LoraConfig) and isinstance(alpha, float) and alpha.is_integer():
        return config.replace(lora_alpha=int(alpha))
    return config


def _write_card(path: Location, config: Config, facts: card.Facts) -> None:
    """Write the model card unless a person edited it. Warn if that fails, since the adapter is in place."""
    try:
        new = card.card_text(config, facts)
        if isinstance(path, Path) and path.is_symlink():
            return  # a person made it
        old = reconcile.read_text(path) if location.exists(path) else None
        text = new if old is None else card.refresh_card(old, new)
        if text != old:
            atomic.write_bytes(path, text.encode())
    except Exception as error:  # any error: the adapter itself is complete
        warn(f"the adapter in {path.parent} is saved, but not its model card: {str(error) or repr(error)}")


def _value(tensors: Mapping[str, Any], key: str) -> Any:
    """Return one tensor on the host. Raises `AttachError` if it was donated since the save began."""
    import numpy as np

    try:
        return np.asarray(tensors[key])
    except RuntimeError as error:  # JAX has no class for this error
        if "deleted" not in str(error):
            raise
        raise AttachError(
            f"{key}: the array was donated to a jitted function, and so deleted, during the save. Save before the step"
            " that donates it, or save a copy (jax.tree.map(jnp.copy, adapter))"
        ) from error


def _blank_digest(weights: Location, replaces: str) -> None:
    """Overwrite the digest of the replaced JSON with zeros, so that equal content gives equal bytes.

    Overwrites 64 digits in place. The JSON equals the header's by then, so a crash or a failure here is harmless. An
    object of a store cannot be changed in place and is written again.
    """
    if isinstance(weights, location.Address):
        with contextlib.suppress(OSError, FileError):
            data = weights.read_bytes()
            start = data.find(replaces.encode(), 0, safetensors.read_header(weights).data_start)
            if start >= 0:
                atomic.write_bytes(weights, data[:start] + _NOTHING.encode() + data[start + len(replaces) :])
        return
    with contextlib.suppress(OSError, FileError), weights.open("r+b") as file:
        header = file.read(safetensors.read_header(weights).data_start)
        start = header.find(replaces.encode())
        if start >= 0:
            file.seek(start)
            file.write(_NOTHING.encode())


def array_specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return values with `shape` and `dtype` by key, without encoding tensors that are encoded on demand."""
    from jaxadapt.adapters.adapter import is_array

    if isinstance(tensors, TensorSource):
        return tensors.specs
    others = [f"{k}: {type(v).__name__}" for k, v in tensors.items() if not is_array(v)]
    raise_listed(MismatchError, "cannot write these tensors: expected arrays, found:", others)
    return tensors
