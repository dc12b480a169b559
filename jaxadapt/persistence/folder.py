"""An adapter's folder on disk, as PEFT lays it out: `PeftTensors` ↔ files. No model, no Flax.

    adapter_config.json          the configuration
    adapter_model.safetensors    the tensors; our own files repeat the configuration in the header, since two
                                 files cannot be replaced at one instant
    README.md                    the model card, written anew until a person edits it

A path may be an address: of an object store, `s3://bucket/folder` (see `codecs.places`), or of the Hub,
`hf://org/name@revision/subfolder`, whose files are then those in the cache.
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
from jaxadapt.adapters import state_dict_keys
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FileError, MismatchError, warn
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, no_report, reporter
from jaxadapt.persistence import card, reconcile, run_folder
from jaxadapt.storage import atomic, flush, hub, location, orbax, safetensors, torch_bin
from jaxadapt.storage.dtypes import dtype_name, numpy_dtype
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Place

CONFIG = hub.CONFIG
WEIGHTS, WEIGHTS_BIN = hub.WEIGHTS
CARD = hub.CARD
_NOTHING = "0" * 64  # the digest of no JSON: this save replaced none, or has finished


@dataclasses.dataclass(frozen=True)
class Info:
    """What an adapter folder holds, from its configuration and header alone.

    `tensors` is `{key: (dtype, shape)}`; `nbytes` the size of the tensors in bytes.
    """

    path: str
    config: Config
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = dataclasses.field(repr=False)
    nbytes: int
    file_bytes: int

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors, by safetensors' names."""
        return tuple(sorted({dtype for dtype, _ in self.tensors.values()}))

    @property
    def modules(self) -> tuple[str, ...]:
        """The last segments of the names of the adapted modules; none for methods that adapt no module."""
        found = {reconcile.tensor_module(self.config, key) for key in self.tensors}
        return tuple(sorted({name.rpartition(".")[2] for name in found if name is not None}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `jaxadapt inspect --json`."""
        return {
            "path": self.path,
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "file_bytes": self.file_bytes,
            "dtypes": list(self.dtypes),
            "modules": list(self.modules),
            "tensors": {k: {"dtype": d, "shape": list(s)} for k, (d, s) in self.tensors.items()},
        }


# ---------------------------------------------------------------- reading


def _files(path: str | os.PathLike[str], report: Report = no_report) -> tuple[Place, Place]:
    """The configuration and the weights of a folder; `FileError` says which is missing."""
    remote = isinstance(path, str) and hub.is_address(path)
    folder: Place = hub.fetch_folder(str(path), report=report) if remote else location.to_location(path)
    try:
        present = sorted(p.name for p in folder.iterdir())
    except FileNotFoundError as error:
        why = error.strerror if isinstance(folder, location.Address) else "no such folder"
        there = f"; one of the Hub is {hub.SCHEME}{path}" if hub.may_name(str(path)) else ""
        raise FileError(f"{folder}: {why}; expected a folder that holds {CONFIG} and {WEIGHTS}{there}") from None
    except NotADirectoryError:
        raise FileError(
            f"{folder}: expected a folder that holds {CONFIG} and {WEIGHTS}, found a file; give its folder"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("read", str(folder), error) from error
    weights = next((name for name in (WEIGHTS, WEIGHTS_BIN) if name in present), None)
    missing = [name for name, found in ((CONFIG, CONFIG in present), (WEIGHTS, weights)) if not found]
    if missing or weights is None:
        below: list[str] = []
        with contextlib.suppress(FileError):
            below = [name for name in present[:64] if location.exists(folder / name / CONFIG)]
        way = f"; these folders below hold adapters: {', '.join(below)}" if below else ""
        if any(map(run_folder.NAME.fullmatch, present)):
            way = f"; it holds checkpoints of a training: `jaxadapt checkpoints {folder}` lists and exports them{way}"
        held = ", ".join(present[:8]) + (", …" if len(present) > 8 else "")
        raise FileError(f"{folder}: no {' and no '.join(missing)}; found {held or 'an empty folder'}{way}")
    return folder / CONFIG, folder / weights


def read_config(path: str | os.PathLike[str]) -> Config:
    """The configuration of an adapter folder (or of an `adapter_config.json`), tensors untouched.

    Raises `FileError` if it cannot be read, `ConfigError` if it is not PEFT's.

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
        path = hub.fetch_config(path)
    if orbax.is_checkpoint(path):
        return _orbax_config(path)
    target = location.to_location(path)
    if location.is_file(target):
        return configs.loads(reconcile.read_text(target), str(target))
    if location.exists(target / CONFIG) and not any(location.exists(target / w) for w in (WEIGHTS, WEIGHTS_BIN)):
        return configs.loads(reconcile.read_text(target / CONFIG), str(target / CONFIG))
    config, weights = _files(path)
    header = safetensors.read_header(weights) if weights.name == WEIGHTS else None
    return reconcile.resolve_config(config, header, weights)


def inspect(path: str | os.PathLike[str], *, progress: Progress = None) -> Info:
    """Method, targets, sizes and base model of an adapter folder, from its header alone.

    Of an Orbax checkpoint too: its tensors under the names that PEFT's file would have. An adapter on the Hub is
    fetched, of which `progress` is told as in `pull`.
    Raises `FileError`, `FormatError` or `ConfigError`, naming the file.

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
    with reporter(progress) as report:
        config, weights = _files(path, report)
    if weights.name == WEIGHTS:
        header = safetensors.read_header(weights)
        tensors = {k: (t.dtype, t.shape) for k, t in header.tensors.items()}
        nbytes = sum(t.nbytes for t in header.tensors.values())
        size = header.size
    else:
        header = None
        tensors = torch_bin.keys_and_shapes(weights)
        nbytes = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in tensors.values())
        size = location.total_size(weights)
    new = state_dict_keys.keys_without_names(tensors, str(path))
    tensors = {name: tensors[key] for key, name in new.items() if name is not None} or tensors
    return Info(str(path), reconcile.resolve_config(config, header, weights), tensors, nbytes, size)


def read(path: str | os.PathLike[str], *, progress: Progress = None) -> PeftTensors:
    """An adapter folder as `PeftTensors`, no model needed: PEFT's names, PyTorch's layout, the file's dtypes.

    Args:
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("read", bytes done, bytes in all);
            of an address of the Hub also of what is fetched.

    Reads `.safetensors` first, else a PyTorch `.bin` (nothing in it is executed), or an Orbax checkpoint of ours.
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
    with reporter(progress) as report, open_adapter(path, report) as found:
        held = found.tensors
        if isinstance(held, safetensors.TensorFile):
            more = byte_counter(report, "read", sum(map(held.nbytes, held)))
            tensors = held.read_many(held, more)
        else:  # which is in memory by now
            tensors = dict(held)
            total = sum(x.nbytes for x in tensors.values())
            report("read", total, total)
        return dataclasses.replace(found, tensors=tensors)


@contextlib.contextmanager
def open_adapter(
    path: str | os.PathLike[str], report: Report = no_report, *, ahead: bool = False
) -> Generator[PeftTensors]:
    """As `read`, but the tensors of a `.safetensors` file are read when they are asked for, while it is open.

    With `ahead` reading a small one begins at once, in the background.
    """
    if orbax.is_checkpoint(path):
        from jaxadapt.persistence import orbax_folder

        yield orbax_folder.adapter_tensors(orbax_folder.read(path, orbax_folder.find_adapter(path)), path)
        return
    config, weights = _files(path, report)
    with contextlib.ExitStack() as stack:
        if weights.name == WEIGHTS:
            tensors: Mapping[str, Any] = stack.enter_context(safetensors.open_tensors(weights, ahead))
            settled = reconcile.resolve_config(config, tensors.header, weights)
        else:
            settled = reconcile.resolve_config(config, None, weights)
            tensors = torch_bin.read(weights)
        if not tensors:
            raise MismatchError(f"{weights}: expected an adapter's tensors, found a file without any")
        yield state_dict_keys.without_names(PeftTensors(settled, tensors, str(path)))


def _orbax_config(path: str | os.PathLike[str]) -> Config:
    from jaxadapt.persistence import orbax_folder

    recipe = orbax_folder.read_recipe(path)
    if recipe is None:
        raise FileError(f"{os.fspath(path)}: an Orbax checkpoint that says nothing of an adapter's configuration")
    return recipe.config


def _inspect_orbax(path: str | os.PathLike[str]) -> Info:
    from jaxadapt.persistence import orbax_folder

    config = _orbax_config(path)
    encoded = orbax_folder.adapter_tensors(orbax_folder.find_adapter(path).adapter, path).tensors
    tensors = {k: (dtype_name(t.dtype), tuple(t.shape)) for k, t in _specs(encoded).items()}
    nbytes = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in tensors.values())
    return Info(os.fspath(path), config, tensors, nbytes, location.total_size(location.to_location(path)))


# ---------------------------------------------------------------- writing


Put = Callable[[atomic.Writer, Mapping[str, Any], Mapping[str, str]], safetensors.Header]
"""`(writer, {key: (dtype, shape)}, metadata)`: another way to write the tensors' file."""


def write(tensors: PeftTensors, path: str | os.PathLike[str], *, progress: Progress = None) -> None:
    """Write an adapter folder, durably and atomically: a crash leaves the old adapter or the new one.

    Args:
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).

    The folder is made if it is missing; nothing else in it is touched, and a README.md that is there stays.
    The same content always gives the same bytes. Of two writers at once one waits for the other. Raises `FileError`
    naming the path; then the adapter that was there is still there, unless the error says that the new one is in place.
    A model card that cannot be written is a warning.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(jaxadapt.to_peft(adapter), folder)
    ...     jaxadapt.read(folder).config == config
    True
    """
    write_with(tensors, path, None, progress)


def write_with(tensors: PeftTensors, path: str | os.PathLike[str], put: Put | None, progress: Progress) -> None:
    """`write`, by another way to write the file of tensors, where one is given."""
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"write takes PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " models, variables and Adapters are for jaxadapt.save"
        )
    if hub.is_address(path):
        raise FileError(f"{path}: expected a folder; jaxadapt.push(tensors, 'org/name') sends them to the Hub")
    folder = location.to_location(path)
    if not tensors.tensors:
        raise MismatchError(f"{folder}: there is no tensor to write")
    made = make_folder(folder)
    try:
        with reporter(progress) as report, atomic.lock_directory(folder):
            _write(tensors, folder, put, report)
    except BaseException:
        for new in made:  # nothing half-done: an empty folder of ours goes again
            with contextlib.suppress(OSError):
                new.rmdir()
        raise


def make_folder(folder: Place) -> list[Path]:
    """Make a folder and its parents; those that are new, innermost first. Object stores have none to make."""
    if isinstance(folder, location.Address):
        return []
    return flush.make_folder(folder)


def _write(tensors: PeftTensors, folder: Place, put: Put | None, report: Report) -> None:
    import numpy as np

    config, weights = folder / CONFIG, folder / WEIGHTS
    if location.is_dir(config):
        raise FileError(f"{config}: expected a file, found a folder; choose another path")
    text = tensors.config.to_json()
    there = location.exists(config)
    before = reconcile.read_text(config) if there else text
    replaces = _NOTHING if before == text else reconcile.text_digest(before)
    own = {"config": tensors.config.to_dict(), "replaces": replaces, "schema": 1}
    specs = {k: (np.dtype(v.dtype), tuple(v.shape)) for k, v in _specs(tensors.tensors).items()}
    parts = [key for key in specs if key.endswith("]")]
    if parts:
        raise MismatchError(
            f"{folder}: these are parts of PyTorch's tensors, which only a model puts together: load the checkpoint"
            " into one, and save it from there:\n" + paths.bullets(parts)
        )
    metadata = {"format": "pt", reconcile.META: json.dumps(own)}
    # Both files are on the disk before the weights take their place, and the JSON right after them: a full disk shows
    # before anything has changed. A JSON that says the same already stays, as in all saves of a run but the first.
    paired = [weights] if there and before == text else [weights, config]
    with atomic.replacing_all(paired) as (writer, *others):
        for other in others:
            other.write(memoryview(text.encode()))
        if put is None:
            more = byte_counter(report, "save", sum(d.itemsize * math.prod(shape) for d, shape in specs.values()))
            get = functools.partial(_value, tensors.tensors)
            header = safetensors.write_to(writer, specs, get, metadata, progress=more)
        else:
            header = put(writer, specs, metadata)
    if replaces != _NOTHING:
        _forget(weights, replaces)
    stale = folder / WEIGHTS_BIN
    with contextlib.suppress(FileError):  # the adapter is in place, and readers do not come to this file
        if location.exists(stale):
            warn(f"{stale} is an older adapter beside the one just written; readers take {WEIGHTS}")
    dtypes = tuple(sorted({dtype_name(dtype) for dtype, _ in specs.values()}))
    shapes = {key: shape for key, (_, shape) in specs.items()}
    _write_card(folder / CARD, tensors.config, card.Facts(shapes, dtypes, header.size))
    LOGGER.info("%s: %d tensors written, %s", folder, len(specs), card.size_text(header.size))


def _write_card(path: Place, config: Config, facts: card.Facts) -> None:
    """The card, unless a person's is there; a warning if that fails, since the adapter is in place."""
    try:
        new = card.card_text(config, facts)
        if isinstance(path, Path) and path.is_symlink():
            return  # a person's
        old = reconcile.read_text(path) if location.exists(path) else None
        text = new if old is None else card.refresh_card(old, new)
        if text != old:
            atomic.write_bytes(path, text.encode())
    except Exception as error:  # whatever it is, nothing that was asked for is missing
        warn(f"the adapter in {path.parent} is saved, but not its model card: {str(error) or repr(error)}")


def _value(tensors: Mapping[str, Any], key: str) -> Any:
    """One tensor on the host. Raises `AttachError` where it has been donated since the save began."""
    import numpy as np

    try:
        return np.asarray(tensors[key])
    except RuntimeError as error:  # JAX has no class of its own for it
        if "deleted" not in str(error):
            raise
        raise AttachError(
            f"{key}: its array was deleted while it was saved: it was donated to a jitted function; save before the"
            " step that donates it, or save a copy (jax.tree.map(jnp.copy, adapter))"
        ) from error


def _forget(weights: Place, replaces: str) -> None:
    """Blank the digest of a JSON that is replaced by now, so that the same content is the same bytes.

    64 digits in place: the JSON equals the header's already, so whatever a crash leaves of them is harmless,
    and so is a failure. An object has no places in it to write to, and is put once more.
    """
    if isinstance(weights, location.Address):
        with contextlib.suppress(OSError, FileError):
            data = weights.read_bytes()
            at = data.find(replaces.encode(), 0, safetensors.read_header(weights).data_start)
            if at >= 0:
                atomic.write_bytes(weights, data[:at] + _NOTHING.encode() + data[at + len(replaces) :])
        return
    with contextlib.suppress(OSError, FileError), weights.open("r+b") as file:
        header = file.read(safetensors.read_header(weights).data_start)
        at = header.find(replaces.encode())
        if at >= 0:
            file.seek(at)
            file.write(_NOTHING.encode())


def _specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Shapes and dtypes by key, without making the tensors where they are made on demand."""
    from jaxadapt.adapters.adapter import is_array
    from jaxadapt.keymaps.plan import Encoded

    if isinstance(tensors, Encoded):
        return tensors.specs
    odd = [f"{k}: {type(v).__name__}" for k, v in tensors.items() if not is_array(v)]
    if odd:
        raise MismatchError("expected arrays as tensors, found:\n" + paths.bullets(odd))
    return tensors
