"""The programs for which adapters are exported, and what each of them reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxadapt.persistence import consumers

Style = Literal["safetensors", "gguf", "mlx"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that reads adapters.

    Attributes:
        name: its name on the command line.
        style: that of its files in `formats`: "safetensors" (PEFT's folder, with the adapter in its plain form), "gguf"
            or "mlx".
        reader: its name in `consumers`; "" for every reader of PEFT's folders.
        keeps: fields of the configuration that it reads although a plain LoRA has none.
    """

    name: str
    style: Style
    reader: str
    keeps: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version with which the form was measured, or in whose source it was read."""
        return VERSIONS.get(self.name) or consumers.version_of(self.reader)


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program("plain", "safetensors", ""),
        Program("transformers", "safetensors", "transformers load_adapter"),
        Program("vllm", "safetensors", "vLLM"),
        Program("gguf", "gguf", "llama.cpp"),
        Program("mlx", "mlx", "MLX", keeps=("use_dora",)),
        Program("sglang", "safetensors", "SGLang"),
        Program("tgi", "safetensors", "TGI and LoRAX"),
        Program("tensorrt-llm", "safetensors", "TensorRT-LLM"),
    )
}
"""{name: program}, in the order of the command's help."""

VERSIONS: Mapping[str, str] = {
    "plain": "every program that reads PEFT's LoRA",
    "gguf": "llama.cpp in llama-cpp-python 0.3.36, measured",
}
"""{name: version}, of the forms that are not those of `consumers`."""
