"""Save an adapter as a folder.

model / variables ──extract──► Adapter ──encode──► PeftTensors ──folder.write──► files
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from jaxadapt.adapters.adapter import PeftTensors, name_donated_arrays
from jaxadapt.arrays import finite
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError, FileError
from jaxadapt.core.progress import LOGGER, Progress, reporter
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.merging.plain_form import plain_form
from jaxadapt.models.carriers import DEFAULT, lora_carrier
from jaxadapt.persistence import encode, folder, multihost, orbax_folder
from jaxadapt.storage.source import cast
from jaxadapt.storage.strided import float_dtype


def save(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    dtype: Any = None,
    save_embedding_layers: bool | str = "auto",
    format: str = "safetensors",  # noqa: A002 (the field's usual name)
    plain: bool = False,
    shared: bool | None = None,
    timeout: float = 300,
    on_shared: str | None = None,
    progress: Progress = None,
) -> None:
    """Write an adapter, without its base model, as a folder that PEFT reads.

    For anything created by jaxadapt, `save(tree, path)` is enough: NNX models and states, Linen variables and
    `Adapter`s, also after jitted updates. An adapter not called "default" goes to the subfolder of its name, as in
    PEFT.

    LoRA parameters of another library (Qwix, `nnx.LoRA`, gemma, …) are recognised by their paths; rank and
    `target_modules` follow from the tree.

    Args:
        config: the configuration, if the tree does not store one (the error says so).
        keymap: names the tensors by another keymap than the one the model was adapted with.
        lora_alpha: the alpha of another library's tree that stores none; instead of `config`.
        base_model: written as `base_model_name_or_path`; never looked up.
        dtype: the floating-point dtype of the tensors in the file, such as "bfloat16" or "bf16"; by default their dtype
            in memory. A dtype in which finite values become infinite or NaN is an error.
        save_embedding_layers: also write the base's token embedding and head, as PEFT does. "auto" writes them if they
            are adapted under the names "embed_tokens" or "lm_head" and the tree has their values; True always (for a
            resized vocabulary); False never.
        format: "bin" writes PyTorch's `adapter_model.bin`, for programs that read no safetensors; several processes
            cannot write it. "orbax" writes an Orbax checkpoint instead: the parameters in the model's layout and the
            configuration, in one commit, to a path that does not exist yet. With several processes all of them call
            `save`.
        plain: write a LoRA in its plain form, which every reader of PEFT's files understands: one rank, `lora_alpha`
            equal to it, the scales in B, no patterns and no rsLoRA. `load` reads it like any other; a training run
            that continues from it has another scale.
        shared, timeout: for arrays that are spread over several processes. All of them then call `save`, and each
            writes its own bytes to the one file. `shared=False`: the processes share no file system (None: detect it),
            and process 0 writes everything, one leaf at a time. If a process fails, dies or does not call, the save
            ends with an error in all of them, within twice `timeout` seconds.
        on_shared: "concat" concatenates different As along the rank where PyTorch has one A for several of our weights
            (queries, keys and values of an `nn.MultiheadAttention`). By default they are refused.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).
            With several processes each counts the bytes that it writes. An Orbax checkpoint is reported once, when it
            is written.

    The write is durable and atomic. Raises `AdapterError` with the problem and a remedy; the old adapter then remains
    complete, unless the error says that the new one is in place. If the model card cannot be written, a warning says
    so.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": base, **adapter.collection}, folder)
    ...     sorted(jaxadapt.inspect(folder).tensors)
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight']
    """
    if format not in ("safetensors", "bin", "orbax"):
        raise FileError(f"{path}: format {format!r}: expected 'safetensors', 'bin' or 'orbax'")
    if isinstance(tree, PeftTensors):
        raise AttachError(
            "save: expected an adapter in a model's layout, found PeftTensors; write them with"
            " jaxadapt.write(tensors, path)"
        )
    if plain and format == "orbax":
        raise FileError(f"{path}: plain=True: expected a PEFT folder; other programs read no Orbax checkpoint")
    dtype = None if dtype is None else float_dtype(dtype)
    changes: dict[str, Any] = {"inference_mode": True}
    if base_model is not None:
        changes["base_model_name_or_path"] = base_model
    target = folder.adapter_folder(path, name)
    if format == "orbax":
        if lora_alpha is not None:
            raise AttachError("lora_alpha: format='orbax' saves only adapters of jaxadapt, which store their own alpha")
        adapter = encode.take_adapter(lora_carrier(tree), name, config, keymap, in_memory=False).adapter
        adapter = dataclasses.replace(adapter, config=adapter.config.replace(**changes))
        if dtype is not None:
            with name_donated_arrays(adapter.flat()):
                adapter = finite.cast_tree(adapter, dtype, "this adapter")
        with reporter(progress) as report:
            orbax_folder.write(adapter, target, alone=jax.process_count() == 1)
            orbax_folder.report_total(report, "save", adapter)
        LOGGER.info("%s: an Orbax checkpoint of %d arrays written", target, len(adapter.flat()))
        return
    tensors = encode.encode_tree(
        tree, name, config, keymap, lora_alpha, on_shared, in_memory=False,
        save_embedding_layers=save_embedding_layers, timeout=timeout,
    )  # fmt: skip
    tensors = dataclasses.replace(tensors, config=tensors.config.replace(**changes))
    is_spread = isinstance(tensors.tensors, Encoded) and multihost.is_distributed(tensors.tensors.leaves.values())
    if is_spread and (plain or format == "bin"):
        option, command = ("plain=True", "export") if plain else ("format 'bin'", "convert")
        raise FileError(f"{path}: {option}: several processes cannot write it; {command} the folder afterwards")
    if plain:
        tensors = plain_form(tensors)
    if is_spread:
        with reporter(progress) as report:
            multihost.write_shared(tensors, target, dtype, shared, timeout, report)
    else:
        tensors = tensors if dtype is None else dataclasses.replace(tensors, tensors=cast(tensors.tensors, dtype))
        folder.write(tensors, target, format=format, progress=progress)
