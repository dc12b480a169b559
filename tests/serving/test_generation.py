"""Generation with a cache: as the uncached model, as transformers' generate; with banks, prompts and sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, MismatchError, serving
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.serving import Decoder, KVCache, Sampling, linen_forward, nnx_forward
from jaxadapt.serving.generation import choose, restrict, score

TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=64,
)  # fmt: skip
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: (1 + 0 * RNG.random(shape, "f4")) if len(shape) == 1 else RNG.standard_normal(shape, "f4") * shape[-1] ** -0.5
    for name, shape in llama.hf_shapes(TINY).items()
}
PROMPTS = [RNG.integers(0, 96, size).tolist() for size in (3, 17, 9, 1, 5)]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make(api: str, scan: bool = False, **options: Any) -> Decoder:
    config = dataclasses.replace(TINY, scan=scan)
    if api == "nnx":
        return Decoder(config, *nnx_forward(llama.to_nnx(config, WEIGHTS)), **options)
    return Decoder(config, linen_forward(llama.LinenLlama(config)), llama.to_linen(config, WEIGHTS), **options)


call = nnx.jit(lambda model, tokens: model(tokens))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The answer without a cache: one call of the whole model for each token, always of the same length."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(call(model, jnp.asarray(padded)))[0]
        tokens.append(int(logits[logits.shape[0] - 32 + len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


# The other two layouts answer as transformers, below.
@pytest.mark.parametrize(("api", "scan"), [("nnx", False), ("linen", True)])
def test_logits_with_a_cache_are_those_without(api: str, scan: bool) -> None:
    """Two rows of different lengths, read in one call and then token by token."""
    decoder, config = make(api, scan, rows=2, length=32), dataclasses.replace(TINY, scan=scan)
    tokens = RNG.integers(0, 96, (2, 12)).astype(np.int32)
    if api == "nnx":
        want = nnx.jit(lambda model, tokens: model(tokens))(llama.to_nnx(config, WEIGHTS), tokens)
    else:
        want = jax.jit(llama.LinenLlama(config).apply)(decoder.state, tokens)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))

    @jax.jit
    def forward(state: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        return decoder._forward(state, None, tokens, positions, cache, True)

    found, cache = forward(decoder.state, tokens[:, :8], positions[:, :8], KVCache.create(config, 2, 16))
    np.testing.assert_allclose(found, want[:, :8], atol=1e-5, rtol=0)  # float32, sums in another order
    cache = dataclasses.replace(cache, lengths=jnp.array([8, 5]))  # the second row's last three do not count
    for step in range(4):
        at = np.array([[8 + step], [5 + step]])
        found, cache = forward(decoder.state, np.take_along_axis(tokens, at, 1), at.astype(np.int32), cache)
        np.testing.assert_allclose(found, np.take_along_axis(np.asarray(want), at[:, :, None], 1), atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == [12, 9]


@pytest.mark.peft
@pytest.mark.parametrize(("api", "scan"), [("nnx", True), ("linen", False)])
def test_answers_are_those_of_transformers(api: str, scan: bool) -> None:
    """Five prompts in two rows: some wait, and a row's earlier tokens do not remain."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY.to_hf())).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in WEIGHTS.items()}, strict=False)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = []
    for prompt in PROMPTS:
        answer = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8, **options
        )
        want.append(answer[0, len(prompt) :].tolist())
    stop = want[0][3]
    stopped = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in want]
    decoder = make(api, scan, rows=2, length=32)
    assert decoder.generate(PROMPTS, max_tokens=8) == want
    assert decoder.generate(PROMPTS, max_tokens=8, stop=[stop]) == stopped
    assert decoder.buckets == [16, 32]
    assert decoder.compiled() == 3  # two buckets and the step, for ten requests


@pytest.mark.parametrize(("length", "buckets"), [(8, [8]), (16, [16]), (np.int64(33), [16, 32, 33])])
def test_prompts_are_padded_to_powers_of_two(length: int, buckets: list[int]) -> None:
    """A length that numpy computed is one, too."""
    assert make("nnx", True, rows=1, length=length).buckets == buckets


@pytest.mark.peft
def test_top_k_and_top_p_leave_the_tokens_that_transformers_leaves() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = RNG.standard_normal((6, 50)).astype("f4")
    ks, ps = [0, 5, 1, 70, 8, 0], [0.7, 1.0, 0.9, 0.3, 0.6, 1.0]
    found = np.asarray(restrict(jnp.asarray(logits), jnp.asarray(ks), jnp.asarray(ps, jnp.float32)))
    for row, (k, p) in enumerate(zip(ks, ps, strict=True)):
        left = torch.from_numpy(logits[row : row + 1])
        for warper in [
            *([transformers.TopKLogitsWarper(k)] if k else []),
            *([transformers.TopPLogitsWarper(p)] if p < 1 else []),
        ]:
            left = warper(None, left)
        np.testing.assert_array_equal(found[row], left.numpy()[0])


def test_tokens_are_drawn_with_their_probabilities() -> None:
    count = 4000
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], "f4"))
    settings = {
        "temperature": np.full(count, 0.5, "f4"), "top_k": np.zeros(count, "i4"), "top_p": np.full(count, 1.0, "f4"),
        "seed": np.arange(count, dtype="u4"),
    }  # fmt: skip
    drawn = choose(jnp.tile(logits[None], (count, 1)), jnp.zeros(count, jnp.int32), settings)
    want = np.exp(2 * logits) / np.exp(2 * logits).sum()
    # Four standard deviations of a share of 4,000 draws are at most 0.032.
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / count, want, atol=0.032)


@pytest.mark.parametrize("tiny", [{"temperature": 1e-38}, {"temperature": 1e-45}, {"top_p": 1e-60}])
def test_settings_near_zero_take_the_most_probable_token(tiny: dict[str, float]) -> None:
    """In float32 they are 0, or what is divided by them is infinite."""
    logits = jnp.asarray(np.tile(5 * RNG.standard_normal((1, 96)), (4, 1)), jnp.float32) + 3
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **tiny}
    dtypes = {"top_k": jnp.int32, "seed": jnp.uint32}
    settings = {name: jnp.full(4, value, dtypes.get(name, jnp.float32)) for name, value in values.items()}
    assert set(choose(logits, jnp.arange(4), settings).tolist()) == {int(logits[0].argmax())}


def test_scores_are_those_of_the_logits_and_change_no_token() -> None:
    decoder = make("nnx", rows=2, length=32)
    settings = Sampling(temperature=0.9, seed=3)
    token, _, nothing = decoder.start(0, PROMPTS[1], settings)
    assert nothing is None
    assert decoder.step()[2] is None
    same, _, scores = decoder.start(0, PROMPTS[1], dataclasses.replace(settings, scores=True))
    _, _, next_scores = decoder.step()
    assert same == token
    assert scores is not None
    assert next_scores is not None
    logits = np.asarray(call(llama.to_nnx(TINY, WEIGHTS), jnp.asarray([PROMPTS[1]])))[0].astype("f8")
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    following = [*PROMPTS[1][1:], token]
    np.testing.assert_allclose(scores.logprobs, want[np.arange(17), following], atol=1e-5, rtol=0)  # float32
    np.testing.assert_allclose(scores.top, -np.sort(-want)[:, :20], atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.take_along_axis(want, np.asarray(scores.ids), 1), scores.top, atol=1e-5, rtol=0)
    assert scores.logprobs.shape == (17,)
    assert next_scores.top.shape == (2, 20)


def test_scores_of_many_places_take_little_memory() -> None:
    """The program of a long prompt has room for them also if no row asks for them."""
    rng = np.random.default_rng(0)
    logits, tokens = rng.standard_normal((133, 4096), np.float32), rng.integers(0, 4096, 133, np.int32)
    program = jax.jit(score).lower(logits, tokens, True).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * logits.nbytes
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = program(logits, tokens, True)
    np.testing.assert_allclose(found.logprobs, want[np.arange(133), tokens], rtol=1e-5)
    np.testing.assert_allclose(found.top, -np.sort(-want)[:, :20], rtol=1e-5)
    np.testing.assert_array_equal(found.ids, np.argsort(-want)[:, :20])


@pytest.mark.parametrize("temperature", [1e39, 4e38])
def test_a_temperature_beyond_float32_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"at most 3\.403e\+38 \(float32\)"):
        Sampling(temperature=temperature)
    assert Sampling(temperature=3.4e38).temperature == 3.4e38


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    decoder = make("nnx", rows=3, length=32)
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
    together = decoder.generate(PROMPTS[:3], max_tokens=8, sampling=sampling)
    assert decoder.generate(PROMPTS[:1], max_tokens=8, sampling=sampling) == together[:1]
    other = dataclasses.replace(sampling, seed=8)
    assert decoder.generate(PROMPTS[1:2], max_tokens=8, sampling=other) == together[1:2]  # seed + the prompt's number
    assert decoder.generate(PROMPTS[:1], max_tokens=8, sampling=other) != together[:1]


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_each_row_has_its_own_adapter(api: str) -> None:
    room = jaxadapt.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    config = dataclasses.replace(TINY, scan=api == "linen")
    model = llama.to_nnx(TINY, WEIGHTS)
    adapters = [jaxadapt.init(model, room.replace(r=r, lora_alpha=16 * r), key=jax.random.key(r)) for r in (2, 4)]
    want = [greedy(model, PROMPTS[0], 6)]
    for adapter in adapters:
        alone = llama.to_nnx(TINY, WEIGHTS)
        jaxadapt.adapt(alone, adapter.config, rngs=nnx.Rngs(0))
        jaxadapt.inject(alone, adapter)
        want.append(greedy(alone, PROMPTS[0], 6))
    assert len({tuple(answer) for answer in want}) == 3
    base: Any = model if api == "nnx" else llama.to_linen(config, WEIGHTS)
    bank = serving.create(base, room, slots=4)
    for slot, adapter in enumerate(adapters, 1):
        bank = serving.put(bank, slot, jaxadapt.from_peft(jaxadapt.to_peft(adapter), base))
    if api == "nnx":
        made = nnx_forward(serving.attach(model, bank))
    else:
        made = linen_forward(serving.attach(llama.LinenLlama(config), bank)), base
    decoder = Decoder(config, *made, rows=2, length=32, select=bank.select)
    slots = [2, 0, 1, 1, 2]
    assert decoder.generate([PROMPTS[0]] * 5, max_tokens=6, slots=slots) == [want[slot] for slot in slots]
    assert decoder.compiled() == 2
    with pytest.raises(MismatchError, match="prompt 1: the logits are not finite"):
        decoder.generate(PROMPTS[:2], max_tokens=2, slots=[1, 9])


PREFIX = jaxadapt.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
EMBEDDED = jaxadapt.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


@pytest.mark.parametrize("config", [PREFIX, EMBEDDED], ids=lambda config: config.peft_type)
def test_prompts_of_virtual_tokens(config: Any) -> None:
    model = llama.to_nnx(dataclasses.replace(TINY, scan=True), WEIGHTS)
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), example=[jnp.zeros((1, 3), jnp.int32)])
    adapter = jaxadapt.extract(model)
    jaxadapt.inject(model, jax.tree.map(lambda x: 3 * RNG.standard_normal(x.shape).astype(x.dtype), adapter))
    want = [greedy(model, prompt, 5) for prompt in PROMPTS[:2]]
    embedded = config is EMBEDDED
    forward = nnx_forward(model, embedded_prompt=embedded)
    sizes = {"rows": 2, "length": 22}
    decoder = Decoder(TINY, *forward, **sizes, virtual_tokens=3 if embedded else 0)
    assert decoder.generate(PROMPTS[:2], max_tokens=5) == want
    if embedded:
        with pytest.raises(MismatchError, match="expected 0 virtual tokens before the prompt's, found 3"):
            Decoder(TINY, *forward, **sizes).start(0, [1])


def test_what_is_refused() -> None:
    decoder = make("nnx", rows=1, length=8)
    for prompt, message in (([], "1 to 7 tokens, found 0"), ([1] * 8, "found 8"), ([1, 96], r"below 96, found \[96\]")):
        with pytest.raises(MismatchError, match=message):
            decoder.generate([prompt], max_tokens=1)
    with pytest.raises(ConfigError, match="a length of 2 to 64 tokens"):
        make("nnx", rows=1, length=65)
    with pytest.raises(ConfigError, match="temperature must be at least 0.*found nan; top_p must be above 0"):
        Sampling(temperature=float("nan"), top_p=0)
    with pytest.raises(MismatchError, match="takes no mask"):
        llama.to_nnx(TINY, WEIGHTS)(jnp.ones((1, 1), int), mask=jnp.ones((1, 1)), cache=decoder.cache)
