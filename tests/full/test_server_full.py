"""The server with more kinds of adapters, and with SmolLM2 and its tokenizer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.demo import llama
from jaxadapt.server import app
from jaxadapt.server.engine import SMOLLM2, open_base
from tests.server.conftest import LENGTH, alone, base, write_adapter
from tests.server.test_app import client_of
from tests.server.test_parts import submit

__all__ = ["base"]


def test_the_bank_has_room_for_every_kind_in_the_folder(base, tmp_path):
    """LoRAs of ranks 2 and 5, DoRA, IA3 and RoAd, each answered as alone; prefixes have no form for rows."""
    write_adapter(tmp_path / "lora", 1, base)
    write_adapter(tmp_path / "dora", 2, base, use_dora=True)
    model = llama.to_nnx(base.config, base.weights)
    rng = np.random.default_rng(0)
    targets = ["q_proj", "down_proj"]
    for name, config in {
        "five": jaxadapt.LoraConfig(r=5, lora_alpha=20, target_modules=targets),
        "ia3": jaxadapt.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "road": jaxadapt.RoadConfig(target_modules=targets, group_size=2),
    }.items():
        adapter = jaxadapt.init(model, config, key=jax.random.key(0))
        values = jax.tree.map(lambda x: np.asarray(x) + rng.standard_normal(x.shape).astype("f4"), adapter)
        jaxadapt.save(values, tmp_path / name)
    prefix = jaxadapt.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    jaxadapt.save(jaxadapt.adapt(model, prefix, rngs=nnx.Rngs(0), example=[np.zeros((1, 3), int)]), tmp_path / "prefix")
    server = app.make_server(base, tmp_path, rows=2, length=LENGTH, rank=1)
    try:
        names = ["lora", "dora", "five", "ia3", "road", "prefix"]
        made = submit(server.engine, names=names, prompt=base.encode("Hello"), count=6, decode=base.decode)
        for name, (pieces, ended) in zip(names, made, strict=True):
            assert ended.wait(120)
            if name == "prefix":
                assert "PREFIX_TUNING changes no weight" in str(pieces[-1].error)
            else:
                text = base.decode(alone(base, tmp_path / name, "Hello", 6))
                assert "".join(piece.text for piece in pieces) == text, name
    finally:
        server.engine.close()
        server.pool.close()


@pytest.mark.peft
def test_smollm2_answers_as_transformers(tmp_path):
    """Greedy answers of the base and of an adapter through HTTP, and a chat, whose template is the model's own."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    smol = open_base(SMOLLM2)
    adapter = write_adapter(tmp_path / "fr", 1, smol)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**smol.config.to_hf())).eval()
    state = {name: torch.from_numpy(np.array(weight)) for name, weight in smol.weights.items()}
    model.load_state_dict(state, strict=False)
    prompt = smol.encode("The capital of France is")

    def want(model: Any, ids: list[int]) -> str:
        mask = torch.ones(1, len(ids))
        answer = model.generate(
            inputs=torch.tensor([ids]), attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=2,
            eos_token_id=list(smol.stop),
        )  # fmt: skip
        return smol.decode(answer[0, len(ids) :].tolist())

    user = "Who are you?"
    chat = smol.encode(
        f"<|im_start|>system\n{smol.system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat == smol.encode_chat([("user", user)])
    texts = [want(model, prompt), want(model, chat), want(peft.PeftModel.from_pretrained(model, adapter), prompt)]
    server = app.make_server(smol, tmp_path, rows=2, length=64, rank=2)
    options = {"max_tokens": 16, "temperature": 0}

    async def ask() -> list[str]:
        async with client_of(server) as client:
            plain = {"prompt": "The capital of France is", **options}
            messages = [{"role": "user", "content": user}]
            paths = ["/v1/completions", "/v1/chat/completions", "/v1/completions"]
            bodies = [{"model": smol.name, **plain}, {"model": smol.name, "messages": messages, **options}]
            bodies.append({"model": "fr", **plain})
            client.timeout = None
            replies = await asyncio.gather(*(client.post(p, json=b) for p, b in zip(paths, bodies, strict=True)))
            choices = [json.loads(reply.text)["choices"][0] for reply in replies]
            return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]

    try:
        assert asyncio.run(ask()) == texts
        assert "Paris" in texts[0]
    finally:
        server.engine.close()
        server.pool.close()
