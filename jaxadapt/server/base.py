"""The base model of a server: the demo's SmolLM2, or a folder with a Llama of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxadapt.core.errors import AdapterError, FileError, FormatError
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig, Tensor
from jaxadapt.demo.llama_nnx import to_nnx
from jaxadapt.demo.smollm2 import MODEL_NAME, SmolLM2, require
from jaxadapt.server.text import INCOMPLETE
from jaxadapt.storage import hf_model

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
    weights: Mapping[str, Tensor]
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
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def spell(self, token: int) -> tuple[str, bool]:
        """Return the text of one token, also of a special one, and True.

        A token whose bytes are no whole text has the name that the vocabulary gives it, and False.
        """
        text = self.decode([token], special=True)
        name: str | None = self.tokenizer.id_to_token(token)
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
    ids: list[int] = encoded.ids
    return ids


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
    try:
        tokenizer = require("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    except FileError:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        raise FormatError(f"{folder / 'tokenizer.json'}: expected a tokenizer; {error}") from error
    tokenizer.no_truncation()  # files keep these settings of a training
    tokenizer.no_padding()
    ends = fields.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in ends):
        raise FormatError(f"{path}: eos_token_id: expected a token id or a list of them, found {ends}")
    stop = {*ends, tokenizer.token_to_id(END)} - {None}
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


def _as_text(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer, for which special tokens are text."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy
