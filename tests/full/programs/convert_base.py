"""Convert a tiny model of transformers to GGUF with llama.cpp's own converter, without a tokenizer.

python convert_base.py SOURCES FOLDER OUT.gguf    # SOURCES: llama.cpp's sources, with conversion/ and gguf-py/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    sources, folder, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    config = json.loads((folder / "config.json").read_text())
    if "n_positions" in config:  # GPT-2; transformers 5 no longer writes the other name
        (folder / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
    size = config["vocab_size"]
    vocabulary = {f"t{i}": i for i in range(size)}  # Gemma 3's converter counts the tokens
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    hparams = ModelBase.load_hparams(folder, False)
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class WithoutTokenizer(kind):
        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        WithoutTokenizer(folder, gguf.LlamaFileType.ALL_F32, out).write()


main()
