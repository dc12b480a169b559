"""`jaxadapt merge`."""

from __future__ import annotations

import contextlib

import click

from jaxadapt.cli import output


def _on_device(text: str | None) -> contextlib.AbstractContextManager[object]:
    """Return a context in which JAX computes on the device "gpu" or "gpu:1"."""
    if text is None:
        return contextlib.nullcontext()
    import jax

    kind, _, number = text.partition(":")
    try:
        return jax.default_device(jax.devices(kind)[int(number or 0)])
    except (RuntimeError, ValueError, IndexError) as error:
        have = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise click.BadParameter(f"no device {text!r} ({error}); JAX has {have}", param_hint="--device") from error


@click.command("merge", short_help="Merge an adapter into its base model.")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to write the merged model into, or FILE.gguf.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "q8_0"]),
    help="Dtype of the result (q8_0: only of a .gguf file). Default: the base model's.",
)
@click.option(
    "--device", metavar="KIND[:N]", help="Device to compute on: cpu, gpu or tpu, and its number. Default: JAX's."
)
@click.option("--allow-nan", is_flag=True, help="Accept tensors with a NaN or an infinity.")
@output.as_json
def command(
    base: str, adapter: str, out: str, dtype: str | None, device: str | None, allow_nan: bool, as_json: bool
) -> None:
    """Merge ADAPTER into the weights of the model BASE and write the result.

    BASE is the folder of a Hugging Face model (config.json, model.safetensors, …). ADAPTER is the folder or address of
    an adapter for it. The result is a folder like BASE, tokenizer included, for programs that do not read adapters.
    One tensor is in memory at a time. If the output head and the token embedding share one tensor and ADAPTER changes
    only one of them, each gets its own tensor.

    BASE may also be the .gguf file of a model. The result is then a .gguf file, for llama.cpp and Ollama. Any method
    that can be merged is allowed.

    \b
    Example:
      jaxadapt merge SmolLM2-135M/ out/ --out merged/
      jaxadapt merge SmolLM2-135M/ hf://org/name --out merged/ --dtype bfloat16 --device gpu:1
      jaxadapt merge SmolLM2-135M.gguf out/ --out merged.gguf --dtype q8_0
    """
    from jaxadapt.export import gguf_model, merge_files

    if base.endswith(".gguf"):
        with _on_device(device):
            count = gguf_model.merge_gguf(base, adapter, out, dtype=dtype, allow_nan=allow_nan, progress=True)
    elif dtype == "q8_0":
        raise click.BadParameter("q8_0 is a type of GGUF files: expected a BASE ending in .gguf", param_hint="--dtype")
    else:
        with _on_device(device):
            count = merge_files.merge_folder(base, adapter, out, dtype=dtype, allow_nan=allow_nan, progress=True)
    output.print_result(as_json, {"folder": out, "changed": count}, [("folder", out), ("changed", f"{count} weights")])
