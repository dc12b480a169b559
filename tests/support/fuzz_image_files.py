"""Random image adapters: damaged, mixed and strange keys, shapes and alphas, read and written back.

    python -m tests.support.fuzz_image_files 1000000 [SEED]

A file is refused by an `AdapterError`, taken for no image adapter, or read; what is read is written back with the
same keys and the same bytes (alphas as the same number).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxadapt import AdapterError
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.persistence.formats import image_files

Arrays = dict[str, np.ndarray[Any, Any]]
NAMES = (
    "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_input_blocks_4_1_proj_in", "lora_te1_text_projection",
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_double_blocks_0_x", "lora_unet_", "lycoris_x",
    "lora_te9_x", "lora_transformer_x", "unet.conv_in", "transformer.x.0", "text_encoder.a", "unet", "",
    "unet.mid_block.attn1.processor", "text_encoder.self_attn", "lora_unet_lora_A", "unet.alpha.lora_A",
)  # fmt: skip
ENDS = (
    "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "lora_mid.weight", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
    "lokr_t2", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora.down.weight", "lora.up.weight",
    "to_q_lora.down.weight", "to_out_lora.up.weight", "lora_linear_layer.up.weight", "diff", "weight", "bias", "",
)  # fmt: skip
GROUPS = (ENDS[:3], ENDS[:4], ENDS[5:9], ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"), ENDS[17:19], ENDS[20:22])
LETTERS = "abl_.0129:é\n"


def draw(rng: random.Random) -> Arrays:
    """Return a random file: whole groups of tensors, of which some are then damaged."""
    keys: list[str] = []
    kohya = [rng.random() < 0.6] * 3 if rng.random() < 0.9 else [True, False, True]
    for is_kohya in kohya[: rng.randint(1, 3)]:
        name = rng.choice(NAMES[:9] if is_kohya else NAMES[9:])
        group = (
            rng.choice(GROUPS[:4] if is_kohya else GROUPS[4:])
            if rng.random() < 0.8
            else rng.sample(ENDS, rng.randint(1, 4))
        )
        keys += [f"{name}.{end}" for end in group]
    if rng.random() < 0.4:
        keys.pop(rng.randrange(len(keys)))
    if keys and rng.random() < 0.3:
        i = rng.randrange(len(keys))
        text = list(keys[i])
        text[rng.randrange(len(text) or 1) : rng.randrange(len(text) + 1)] = rng.choices(LETTERS, k=rng.randint(0, 3))
        keys[i] = "".join(text)
    out, r = Arrays(), rng.randint(1, 3)
    sizes = (0, 1, 2, 3, 4, 6)
    for key in keys:
        shape: tuple[int, ...] = (r, 4) if "down" in key or "_A" in key else (6, r)
        shape = () if key.endswith("alpha") else (6, 1) if key.endswith("dora_scale") else shape
        if rng.random() < 0.25:
            shape = tuple(rng.choices(sizes, k=rng.randint(0, 4)))
        values = {"float32": (0.5, 1, 3, np.nan, np.inf, 1e30), "float16": (0.5, 1, 3, np.nan, np.inf)}
        dtype = rng.choice(list(values))
        out[key] = np.full(shape, rng.choice(values[dtype]), dtype)
    return out


def check(arrays: Arrays) -> str:
    """Read a file and write it back; return what became of it."""
    layout = image_files.find_layout(arrays)
    if layout is None:
        return "no image adapter"
    try:
        read = image_files.read_tensors(as_source(arrays), layout, {}, Path("a file"))
        file, _ = image_files.file_tensors(read.tensors, read.names.style, read.names)
    except AdapterError:
        return "refused"
    extra = {key for key in file if key not in arrays}
    assert set(file) - extra == arrays.keys(), (arrays.keys(), list(file))
    assert all(key.endswith(".alpha") for key in extra), extra  # of a module that has none: its rank
    for key, value in arrays.items():
        again = np.asarray(file[key])
        if read.names.alphas and key in read.names.alphas.values():
            lokr = read.names.method == "LOKR"  # two full matrices are not scaled
            assert lokr or float(again) == float(value.reshape(())), key
        else:
            assert (again.dtype, again.shape) == (value.dtype, value.shape), key
            assert again.tobytes() == value.tobytes(), key
    return read.names.method


def main(count: int, seed: int = 0) -> dict[str, int]:
    """Check `count` random files; return how many became what."""
    rng, found = random.Random(seed), dict[str, int]()
    for _ in range(count):
        arrays = draw(rng)
        try:
            outcome = check(arrays)
        except Exception as error:
            raise AssertionError({key: (x.dtype.name, x.shape) for key, x in arrays.items()}) from error
        found[outcome] = found.get(outcome, 0) + 1
    return found


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
