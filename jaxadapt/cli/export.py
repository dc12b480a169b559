"""`jaxadapt export`."""

from __future__ import annotations

import click

from jaxadapt.cli import output
from jaxadapt.export.adapter_export import PROGRAMS


@click.command("export", short_help="Write an adapter for vLLM, llama.cpp, MLX and others.")
@click.argument("source", type=click.Path())
@click.option("--for", "program", type=click.Choice(list(PROGRAMS)), default="plain", show_default=True,
              help="The program that reads the result.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(), help="Folder to write, or FILE.gguf for gguf.")
@click.option("--base", type=click.Path(), help="Base model: its folder, config.json or (for gguf) its .gguf file.")
@click.option("--first", type=click.Path(), help="The initial adapter of PiSSA, OLoRA, CorDA or LoRA-GA.")
@click.option("--rank", type=click.IntRange(1), help="Approximate the adapter by the nearest LoRA of this rank.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Dtype of the result. Default: the adapter's; float32 for gguf.")  # fmt: skip
@output.as_json
def command(
    source: str, program: str, out: str, base: str | None, first: str | None, rank: int | None, dtype: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the adapter SOURCE to a file with which another program computes the same as PEFT.

    plain (also vllm, sglang, tgi, tensorrt-llm, transformers): PEFT's folder with one rank, alpha equal to it, the
    scales in B, and no patterns, rsLoRA or variants. gguf: an adapter file for llama.cpp and Ollama; it needs --base.
    mlx: mlx-lm's folder, for LoRA and DoRA.

    An adapter that the program has no form for is refused. `jaxadapt merge` writes the merged model instead; --rank
    writes the nearest LoRA and prints what it loses.

    \b
    Example:
      jaxadapt export out/ --for vllm --out out-vllm/
      jaxadapt export out/ --for gguf --base SmolLM2-135M/ --out out.gguf
      jaxadapt export hf://org/name --for mlx --out out-mlx/
      jaxadapt export dora/ --rank 32 --base SmolLM2-135M/ --out lora/
    """
    from jaxadapt.export import export_adapter

    result = export_adapter(
        source, out, program, base=base, first=first, rank=rank, dtype=dtype, progress=True
    )  # fmt: skip
    if as_json:
        output.print_json(result.to_dict())
        return
    rows = [("for", f"{result.program} ({result.version})"), ("written", result.path)]
    rows.append(("size", f"rank {result.rank}, {result.tensors} tensors"))
    if result.error:
        module, worst = max(result.error.items(), key=lambda item: item[1])
        rows.append(("lost", f"at most {worst:.1%} of a change, at {module}"))
    output.print_pairs(rows)
