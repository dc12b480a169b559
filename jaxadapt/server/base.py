"""The base model of a server and its adapters: the demo's SmolLM2, or a folder with a Llama of Hugging Face.

The names and paths of adapters come from clients: each is a folder inside one root, and nothing else. The server's bank
has room for the configurations that `make_room` finds in the folder of adapters.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jaxadapt
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core.errors import AdapterError, FileError, FormatError, warn
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig, to_nnx
from jaxadapt.demo.smollm2 import MODEL_NAME, SmolLM2, require
from jaxadapt.merging.factors import plain_config
from jaxadapt.methods.registry import get_method
from jaxadapt.server.protocol import INCOMPLETE
from jaxadapt.serving.layout import becomes_lora, compare_shared
from jaxadapt.serving.pool import BASE, find_folders, is_adapter
from jaxadapt.storage import hf_model, location

# ---------------------------------------------------------------- base


SMOLLM2 = "smollm2"
START, END = "<|im_start|>", "<|im_end|>"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model with its tokenizer.

    Attributes:
        name: the model's name for clients.
        config: its hyperparameters.
        weights: its checkpoint.
        tokenizer: a tokenizer of the package tokenizers.
        text_tokenizer: the same one, for which special tokens are text. It is an object of its own, because a setting
            that one thread changes would count for all.
        stop: tokens that end an answer.
        system: the system message of a chat that has none.
    """

    name: str
    config: LlamaConfig
    weights: Mapping[str, Any]
    tokenizer: Any
    text_tokenizer: Any
    stop: tuple[int, ...]
    system: str = ""
    targets: ClassVar[tuple[str, ...]] = PROJECTIONS  # the modules that adapters may change

    def build(self) -> tuple[LlamaConfig, Any]:
        """Build the model in NNX; return its hyperparameters and the model."""
        # Stacked layers: a program compiles in a third of the time, and a step takes a fifth longer.
        config = dataclasses.replace(self.config, scan=True)
        return config, to_nnx(config, self.weights)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, to which nothing is added."""
        return _encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of token ids, without special tokens, or with them."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def spell(self, token: int) -> tuple[str, bool]:
        """Return the text of one token, also of a special one, and True.

        A token whose bytes are no whole text has the name that the vocabulary gives it, and False.
        """
        text, name = self.decode([token], special=True), self.tokenizer.id_to_token(token)
        return (text, True) if name is None or INCOMPLETE not in text else (name, False)

    @property
    def chats(self) -> bool:
        """True if the tokenizer has the two special tokens of ChatML. (Templates in files are never executed.)"""
        return all(self.tokenizer.token_to_id(token) is not None for token in (START, END))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of (role, text) messages in ChatML, up to the start of the answer.

        A message cannot contain the special tokens: in it they are text.
        """
        start, end = (self.tokenizer.token_to_id(token) for token in (START, END))
        if self.system and (not messages or messages[0][0] != "system"):
            messages = [("system", self.system), *messages]
        ids: list[int] = []
        for role, text in messages:
            ids += [start, *_encode(self.text_tokenizer, f"{role}\n{text}"), end]
            ids += _encode(self.text_tokenizer, "\n")
        return [*ids, start, *_encode(self.text_tokenizer, "assistant\n")]


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Other threads run meanwhile; while `encode` runs, they do not.
    (encoded,) = tokenizer.encode_batch([text], add_special_tokens=False)
    return encoded.ids


def open_base(base: str | os.PathLike[str]) -> Base:
    """Open a base model.

    Args:
        base: "smollm2", or a folder with config.json, model.safetensors (or its index and shards) and tokenizer.json.

    Raises:
        FileError: files or packages are missing.
        FormatError: a file does not hold a Llama.
    """
    if base == SMOLLM2:
        model = SmolLM2.open()
        tokenizer = model.tokenizer()
        stop = tuple(tokenizer.token_to_id(token) for token in (END, "<|endoftext|>"))
        return Base(MODEL_NAME, model.config, model.weights(), tokenizer, _as_text(tokenizer), stop, SMOLLM2_SYSTEM)
    folder = Path(base)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise FileError(
            f"{folder}: expected {SMOLLM2!r}, or a folder with a Llama; the folder lacks {' and '.join(missing)}"
        )
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_bytes())
        config = LlamaConfig.from_hf(fields)
    except (ValueError, TypeError, KeyError, AttributeError, AdapterError) as error:
        raise FormatError(f"{path}: expected the configuration of a Llama; {type(error).__name__}: {error}") from error
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    stop = {*_end_tokens(path, fields.get("eos_token_id")), tokenizer.token_to_id(END)} - {None}
    with hf_model.open_model(folder) as tensors:
        hf_model.refuse_packed(tensors)
        codes = sorted({str(spec.dtype) for spec in tensors.specs.values() if spec.dtype.kind in "iub"})
        if codes or fields.get("quantization_config"):
            raise FormatError(
                f"{folder}: expected floating-point weights, found {', '.join(codes) or 'quantization_config'};"
                " dequantize the model first (transformers: model.dequantize(), save_pretrained)"
            )
        name, weights = folder.resolve().name, dict(tensors)
    return Base(name, config, weights, tokenizer, _as_text(tokenizer), tuple(sorted(stop)))


def _end_tokens(path: Path, ends: Any) -> list[int]:
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in ends):
        raise FormatError(f"{path}: eos_token_id: expected a token id or a list of them, found {ends}")
    return ends


def _read_tokenizer(path: Path) -> Any:
    tokenizers = require("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise FormatError(f"{path}: expected a tokenizer; {error}") from error
    tokenizer.no_truncation()  # files keep these settings of a training
    tokenizer.no_padding()
    return tokenizer


def _as_text(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer, for which special tokens are text."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


# ---------------------------------------------------------------- names


MAX_BYTES = 255
FILES = (location.CONFIG, *location.WEIGHTS, location.MLX_WEIGHTS)


def find(root: Path, name: str, given: str | None = None) -> Path:
    """Return the adapter folder of a name, or the one at a path that a client gave.

    Args:
        root: the folder of the adapters.
        name: the name of the adapter.
        given: a path inside the root, absolute, or from the root or the working folder. None for the folder directly in
            the root that has the name.

    Raises:
        FileError: the name is no plain folder name, there is no adapter at the path, or the path, the folder or a file
            in it is a link that leaves the root.

    >>> find(Path("/adapters"), "../etc")
    Traceback (most recent call last):
        ...
    jaxadapt.core.errors.FileError: '../etc' is not the name of an adapter: expected a folder's name without separators,
    control characters or a dot at the start
    """
    if not is_plain(name):
        raise FileError(
            f"{name[:80]!r} is not the name of an adapter: expected a folder's name without separators, control"
            " characters or a dot at the start"
        )
    places = (root / name,) if given is None else (root / given, Path(given)) if given.isprintable() else ()
    inside = [path for path in places if given is None or _is_inside(root, path)]
    path = next(filter(is_adapter, inside), None)
    if path is None:
        raise FileError(
            f"there is no adapter {(given or name)[:80]!r}: expected a folder in the adapters' folder, with"
            f" {location.CONFIG}"
        )
    if not all(_is_inside(root, each) for each in (path, *path.rglob("*"))):
        raise FileError(
            f"the adapter {name!r} contains links to files outside the adapters' folder; copy the files into it"
        )
    return path


def is_plain(name: str) -> bool:
    """Return True for a name that an adapter may have."""
    return (
        name not in ("", BASE)
        and name.isprintable()
        and not {"/", "\\", os.sep} & {*name}
        and not name.startswith(".")
        and len(os.fsencode(name)) <= MAX_BYTES
    )


def is_there(root: Path, path: Path) -> bool:
    """Return True if a folder that `find` returned is still there, and its adapter's files inside the root.

    It looks at these files only: it is called at each request.
    """
    return is_adapter(path) and all(_is_inside(root, path / name) for name in FILES)


def _is_inside(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents


def scan(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return `{name: folder}` of the adapters in a folder, sorted, and the reasons for which others are left out.

    A folder with the name of the base is left out with a warning.

    Raises:
        FileError: the folder cannot be listed.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    for name in find_folders(root):
        try:
            found[name] = find(root, name)
        except FileError as error:
            problems.append(str(error))
    return found, problems


# ---------------------------------------------------------------- room


Room = jaxadapt.Config | jaxadapt.Adapter


def make_room(model: Any, folders: Iterable[Path], rank: int, targets: Sequence[str]) -> list[Room]:
    """Return what to give `serving.create`: room for plain LoRAs, and for each other kind of adapter in the folders.

    Args:
        model: the base.
        folders: the adapters that are there at the start. One that cannot be read counts for nothing; a request for it
            gets the error.
        rank: the least rank to have room for.
        targets: the modules that adapters may change.
    """
    plain = jaxadapt.LoraConfig(r=rank, target_modules=list(targets))
    kinds: dict[tuple[str, bool, bool], list[Any]] = {("LORA", False, False): [plain]}
    whole: dict[str, list[jaxadapt.Adapter]] = {}
    for path in folders:
        try:
            found = _read_room(model, path, rank)
        except AdapterError:
            continue
        if isinstance(found, jaxadapt.Adapter):
            whole.setdefault(found.config.peft_type, []).append(found)
        elif found is not None:
            kind = (found.peft_type, bool(found.get("use_dora")), bool(found.get("lora_bias")))
            kinds.setdefault(kind, []).append(found)
    wanted: list[Room] = [_cover(kind, configs, plain) for kind, configs in kinds.items()]
    wanted += [each for adapters in whole.values() for each in _different(adapters)]
    room: list[Room] = []
    for made in wanted:
        try:
            jaxadapt.serving.create(model, made, slots=2)
            room.append(made)
        except AdapterError as error:
            peft_type = (made.config if isinstance(made, jaxadapt.Adapter) else made).peft_type
            warn(f"requests for adapters of the kind {peft_type} will fail: {error}")
    return room


def _read_room(model: Any, path: Path, rank: int) -> Any:
    """Return the configuration of an adapter's kind, or the adapter, if it has tensors of its own for all modules.

    None if no bank has room for it.
    """
    info = jaxadapt.inspect(path)
    config: Any = info.config
    largest = max((size for _, shape in info.tensors.values() for size in shape), default=0)
    # A number in a JSON file must not take all memory.
    if FACTS[config.peft_type].rows == "no" or max(_ranks(config), default=0) > largest:
        return None
    if becomes_lora(config):
        config = plain_config(config, get_method(config).plain_rank(config) or rank)
    return jaxadapt.from_peft(jaxadapt.read(path), model) if get_method(config).has_shared else config


def _cover(kind: tuple[str, bool, bool], configs: Sequence[Any], plain: jaxadapt.LoraConfig) -> jaxadapt.Config:
    """Return a configuration with room for all adapters of one kind."""
    peft_type, dora, bias = kind
    ranks = [r for config in configs for r in _ranks(config)]
    if peft_type == "LORA":
        return plain.replace(r=max([plain.r, *ranks]), use_dora=dora, lora_bias=bias)
    if peft_type == "IA3":
        return jaxadapt.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return configs[0].replace(target_modules=plain.target_modules, **({"r": max(ranks)} if ranks else {}))


def _ranks(config: jaxadapt.Config) -> list[int]:
    """Return the ranks that a configuration states, as far as it states them by `r` and `rank_pattern`."""
    return [r for r in (config.get("r"), *(config.get("rank_pattern") or {}).values()) if isinstance(r, int)]


def _different(adapters: Sequence[jaxadapt.Adapter]) -> list[jaxadapt.Adapter]:
    """Return one adapter for all those with the same shared tensors: the largest, with the targets of all."""
    groups: list[list[jaxadapt.Adapter]] = []
    for adapter in sorted(adapters, key=lambda adapter: -sum(x.size for x in adapter.shared.values())):
        group = next((each for each in groups if not compare_shared(each[0].shared, adapter.shared)), None)
        if group is None:
            groups.append([adapter])
        else:
            group.append(adapter)
    made: list[jaxadapt.Adapter] = []
    for first, *others in groups:
        modules = {module for adapter in (first, *others) for site in sites_of(adapter) for module in site.modules}
        made.append(dataclasses.replace(first, config=first.config.with_targets(sorted(modules))))
    return made
