"""A public Equinox model of proteins beside PEFT on the transformers model with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt

esm2quinox: Any = pytest.importorskip("esm2quinox")  # the extra `test`
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.peft

LAYER = {
    "attn.query_proj": "attention.self.query", "attn.key_proj": "attention.self.key",
    "attn.value_proj": "attention.self.value", "attn.output_proj": "attention.output.dense",
    "layer_norm1": "attention.LayerNorm", "layer_norm2": "LayerNorm",
    "linear1": "intermediate.dense", "linear2": "output.dense",
}  # fmt: skip
HEAD = {
    "layer_norm": "esm.encoder.emb_layer_norm_after", "logit_head.layer_norm": "lm_head.layer_norm",
    "logit_head.linear1": "lm_head.dense", "logit_head.linear2": "lm_head.decoder",
}  # fmt: skip
KEYMAP = jaxadapt.KeyMap(
    "esm",
    tuple(
        jaxadapt.Weight(f"layers.{ours}.weight", f"esm.encoder.layer.{{l}}.{theirs}.weight", "{l} o i -> o i")
        for ours, theirs in LAYER.items()
        if "norm" not in ours
    ),
)


def twin(base: Any) -> Any:
    """The model of transformers with the weights of an Equinox one."""
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        position_embedding_type="rotary", token_dropout=False, mask_token_id=32, pad_token_id=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5,
    )  # fmt: skip
    pairs = jax.tree_util.tree_leaves_with_path(base)
    leaves = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in pairs}
    state: dict[str, Any] = {}
    for kind in ("weight", "bias"):
        state |= {f"{theirs}.{kind}": leaves[f"{ours}.{kind}"] for ours, theirs in HEAD.items()}
        for ours, theirs in LAYER.items():
            for i, layer in enumerate(leaves[f"layers.{ours}.{kind}"]):
                state[f"esm.encoder.layer.{i}.{theirs}.{kind}"] = layer
    state["lm_head.bias"] = state.pop("lm_head.decoder.bias")
    state["esm.embeddings.word_embeddings.weight"] = state["lm_head.decoder.weight"]
    model = transformers.EsmForMaskedLM(config)
    left = model.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()}, strict=False)
    assert left.unexpected_keys == []
    return model.eval()


def test_esm2(tmp_path: Path, foreign_model: None):
    base = esm2quinox.ESM2(num_layers=2, embed_size=16, num_heads=2, token_dropout=False, key=jax.random.key(0))
    theirs, ids = twin(base), jnp.array([0, 5, 6, 7, 2])
    config = jaxadapt.LoraConfig(
        r=2, target_modules=["query", "value", "layer.1.output.dense"], init_lora_weights=False
    )
    model = jaxadapt.adapt(base, config, key=jax.random.key(1), keymap=KEYMAP, example=[ids])
    jaxadapt.save(model, tmp_path)

    def logits(model: Any) -> np.ndarray:
        return model(torch.tensor(np.asarray(ids))[None]).logits[0].detach().numpy()

    np.testing.assert_allclose(base(ids).logits, logits(theirs), atol=1e-4)
    got = model(ids).logits
    assert float(jnp.abs(got - base(ids).logits).max()) > 0.01
    np.testing.assert_allclose(got, logits(peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()), atol=1e-4)
