"""An adapter's folder on disk, as PEFT lays it out: `PeftTensors` ↔ files. No model, no Flax.

    adapter_config.json          the configuration
    adapter_model.safetensors    the tensors; our own files repeat the configuration in the header, since two
                                 files cannot be replaced at one instant
    README.md                    the model card, written once and then the user's
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxadapt import configs
from jaxadapt.codecs import atomic, safetensors, torch_bin
from jaxadapt.configs import Config
from jaxadapt.errors import ConfigError, FileError, FormatError, MismatchError

if TYPE_CHECKING:
    from jaxadapt.adapter import PeftTensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHTS_BIN = "adapter_model.bin"
CARD = "README.md"
_META = "jaxadapt"


@dataclasses.dataclass(frozen=True)
class Info:
    """What an adapter folder holds, from its configuration and header alone.

    `tensors` is `{key: (dtype, shape)}`; `nbytes` the size of the tensors in bytes.
    """

    path: str
    config: Config
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    nbytes: int
    file_bytes: int

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({dtype for dtype, _ in self.tensors.values()}))

    @property
    def modules(self) -> tuple[str, ...]:
        """The last segments of the module names that carry tensors."""
        prefix = "base_model.model."
        found: dict[str, None] = {}
        for key in self.tensors:
            stem = key.removeprefix(prefix)
            for mark in (".lora_", ".ia3_l", ".hada_", ".lokr_", ".oft_", ".boft_", ".vera_", ".weight", ".bias"):
                stem = stem.partition(mark)[0]
            found[stem.rpartition(".")[2]] = None
        return tuple(sorted(found))

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


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The configuration and the weights of a folder; `FileError` says which is missing."""
    folder = Path(path)
    if not folder.exists():
        raise FileError(f"{folder}: no such folder; expected one that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder that holds {CONFIG} and {WEIGHTS}, found a file; give its folder")
    config = folder / CONFIG
    weights = next((p for p in (folder / WEIGHTS, folder / WEIGHTS_BIN) if p.exists()), None)
    missing = [name for name, p in ((CONFIG, config if config.exists() else None), (WEIGHTS, weights)) if p is None]
    if missing:
        below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        way = f"; these folders below hold adapters: {', '.join(below)}" if below else ""
        raise FileError(f"{folder}: no {' and no '.join(missing)}; found {sorted(os.listdir(folder))[:8]}{way}")
    assert weights is not None
    return config, weights


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _settle(path: Path, text: str, metadata: Mapping[str, str], weights: Path) -> Config:
    """The configuration that belongs to the tensors, where the JSON and our header may differ.

    Equal: fine. The JSON is the one this save was replacing: the save was interrupted between its two
    files, and the header wins. Otherwise a person edited the JSON, and it wins; both say so.
    """
    raw = metadata.get(_META)
    if raw is None:
        return configs.loads(text, str(path))
    try:
        own = json.loads(raw)
        header = Config.from_dict(own["config"], f"the header of {weights}")
        replaces = own.get("replaces")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{weights}: its {_META!r} metadata is damaged: {error}") from error
    if replaces is not None and replaces == _digest(text):
        warnings.warn(
            f"{path}: a save was interrupted after the weights and before this file; using the configuration that the"
            f" weights carry. Save again, or write(read(…)), to mend it.",
            stacklevel=3,
        )
        return header
    config = configs.loads(text, str(path))
    if config.to_dict() != header.to_dict():
        changed = sorted(k for k in config.to_dict() | header.to_dict() if config.to_dict().get(k) != header.to_dict().get(k))
        warnings.warn(
            f"{path} was edited after the weights were written ({', '.join(changed)}); using it as it stands now",
            stacklevel=3,
        )
    return config


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_config(path: str | os.PathLike[str]) -> Config:
    """The configuration of an adapter folder (or of an `adapter_config.json`), tensors untouched.

    Raises `FileError` if it cannot be read, `ConfigError` if it is not PEFT's.
    """
    target = Path(path)
    if target.is_file():
        return configs.loads(_text(target), str(target))
    if target.is_dir() and (target / CONFIG).exists() and not any((target / w).exists() for w in (WEIGHTS, WEIGHTS_BIN)):
        return configs.loads(_text(target / CONFIG), str(target / CONFIG))
    config, weights = _files(path)
    metadata = safetensors.read_header(weights).metadata if weights.name == WEIGHTS else {}
    return _settle(config, _text(config), metadata, weights)


def inspect(path: str | os.PathLike[str]) -> Info:
    """Method, targets, sizes and base model of an adapter folder, from its header alone.

    Raises `FileError`, `FormatError` or `ConfigError`, naming the file.
    """
    config, weights = _files(path)
    if weights.name == WEIGHTS:
        header = safetensors.read_header(weights)
        tensors = {k: (t.dtype, t.shape) for k, t in header.tensors.items()}
        settled = _settle(config, _text(config), header.metadata, weights)
        nbytes = sum(t.nbytes for t in header.tensors.values())
    else:
        tensors = torch_bin.keys_and_shapes(weights)
        settled = configs.loads(_text(config), str(config))
        nbytes = sum(math.prod(s) * safetensors.numpy_dtype(d).itemsize for d, s in tensors.values())
    return Info(str(Path(path)), settled, tensors, nbytes, weights.stat().st_size)


def read(path: str | os.PathLike[str]) -> PeftTensors:
    """An adapter folder as `PeftTensors`, no model needed: PEFT's names, PyTorch's layout, the file's dtypes.

    Reads `.safetensors` first, else a PyTorch `.bin` (nothing in it is executed).
    Raises `FileError`, `FormatError` or `ConfigError`, naming the file.
    """
    from jaxadapt.adapter import PeftTensors

    config, weights = _files(path)
    if weights.name == WEIGHTS:
        with safetensors.open_tensors(weights) as file:
            tensors = file.read_many(list(file))
            metadata = file.header.metadata
    else:
        tensors, metadata = torch_bin.read(weights), {}
    settled = _settle(config, _text(config), metadata, weights)
    if not tensors:
        raise MismatchError(f"{weights}: the file holds no tensor")
    return PeftTensors(settled, dict(tensors), str(path))


def write(tensors: PeftTensors, path: str | os.PathLike[str]) -> None:
    """Write an adapter folder, durably and atomically: a crash leaves the old adapter or the new one.

    The folder is made if it is missing; nothing else in it is touched, and a README.md that is there stays.
    The same content always gives the same bytes. Raises `FileError` naming the path; then nothing changed.
    """
    import numpy as np

    folder = Path(path)
    if not tensors.tensors:
        raise MismatchError(f"{folder}: there is no tensor to write")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be made a folder: {error.strerror}") from error
    config = folder / CONFIG
    if config.is_dir():
        raise FileError(f"{config}: expected a file, found a folder; choose another path")
    text = tensors.config.to_json()
    own: dict[str, Any] = {"schema": 1, "config": tensors.config.to_dict()}
    if config.exists() and (before := _text(config)) != text:
        own["replaces"] = _digest(before)
    specs = {k: (np.dtype(v.dtype), tuple(v.shape)) for k, v in _specs(tensors.tensors).items()}
    metadata = {"format": "pt", _META: json.dumps(own, sort_keys=True)}
    safetensors.write(folder / WEIGHTS, specs, lambda key: np.asarray(tensors.tensors[key]), metadata)
    atomic.write_bytes(config, text.encode())
    stale = folder / WEIGHTS_BIN
    if stale.exists():
        warnings.warn(f"{stale} is an older adapter beside the one just written; readers take {WEIGHTS}", stacklevel=2)
    if not (folder / CARD).exists():
        atomic.write_bytes(folder / CARD, card(tensors.config).encode())


def _specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Shapes and dtypes by key, without making the tensors where they are made on demand."""
    from jaxadapt.plan import Encoded

    return tensors.specs if isinstance(tensors, Encoded) else tensors


def card(config: Config) -> str:
    """A model card with the front matter PEFT writes, and how to load the adapter."""
    base = config.base_model_name_or_path
    tags = [f"base_model:adapter:{base}"] if base else []
    tags += [config.peft_type.lower(), "jax"]
    front = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", *(f"- {t}" for t in tags)]
    return "\n".join([
        *front,
        "---",
        "",
        f"# {config.peft_type} adapter" + (f" for {base}" if base else ""),
        "",
        "Trained in JAX, saved by jaxadapt in PEFT's format.",
        "",
        "```python",
        "import jaxadapt",
        "",
        'model = jaxadapt.load("path/to/this/folder", model)  # a Flax NNX model, in place',
        "```",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
        "```",
        "",
    ])  # fmt: skip
