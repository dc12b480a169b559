"""Generation with a key/value cache: a batch of fixed size with changing rows.

Two functions are compiled: one reads the prompt of one row (once for each bucket of lengths), the other decodes a
token in every row. Rows, adapters and settings of sampling are arguments, so no request compiles anything again.
`Sampling` states how the next token of a row is chosen from its logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax, softmax

from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.models.attachment import invoke
from jaxadapt.models.carriers import Model
from jaxadapt.serving import bank

# ---------------------------------------------------------------- sampling


LARGEST = float(np.finfo(np.float32).max)
TOP = 20
"""The number of most probable tokens in `Scores`; OpenAI's interface allows as many."""
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that choose the next token of a row.

    Args:
        temperature: what the logits are divided by; 0 takes the token with the largest one.
        top_k: the number of tokens to choose from; 0 for all.
        top_p: choose from the fewest most probable tokens whose probabilities sum to at least this.
        seed: of the row's random numbers. A row's draws depend on its seed and its position only, so they do not depend
            on the batch.
        scores: True to compute the log-probabilities of the row's tokens, `Scores`; they change no choice.

    Raises:
        ConfigError: a value is out of its range.

    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    scores: bool = False

    def __post_init__(self) -> None:
        if problems := [
            f"{name} must be {expected}, found {getattr(self, name)}"
            for name, expected, right in (
                ("temperature", f"at least 0 and at most {LARGEST:.4g} (float32)", 0 <= self.temperature <= LARGEST),
                ("top_k", "at least 0 and below 2**31", 0 <= self.top_k < 2**31),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
                ("seed", "at least 0 and below 2**32", 0 <= self.seed < 2**32),
            )
            if not right
        ]:
            raise ConfigError("Sampling: " + "; ".join(problems))


GREEDY = Sampling()

DTYPES: dict[str, Any] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.uint32,
    "scores": np.bool_,
}
"""The dtype of each field in a batch."""


def restrict(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return logits (B, V) with -inf in place of the tokens that top_k and top_p (B) leave out, top_k first.

    The most probable token always stays, and so do tokens that are as probable as the last one that stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    ordered = jnp.where(jnp.arange(size)[None] < jnp.where(top_k > 0, top_k, size)[:, None], ordered, -jnp.inf)
    probabilities = softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    first = jnp.arange(size)[None] == 0  # also if top_p is 0 in float32
    kept = ((before < top_p[:, None]) | first) & (ordered > -jnp.inf)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def choose(logits: jax.Array, positions: jax.Array, settings: Mapping[str, jax.Array]) -> jax.Array:
    """Choose a token in each row.

    Args:
        logits: float32 (B, V).
        positions: int32 (B), the places of the new tokens, which make draws differ.
        settings: the fields of `Sampling`, each (B).

    Returns:
        int32 (B).
    """
    temperature, top_k, top_p = settings["temperature"], settings["top_k"], settings["top_p"]
    sampled = temperature >= jnp.finfo(jnp.float32).tiny  # devices may take a smaller number for 0
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        # The largest becomes 0, so that a tiny temperature leaves it finite and makes the others -inf.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(sampled, temperature, 1.0)[:, None]
        # Sorting a large vocabulary takes long, so rows that do not ask for it do not wait for it.
        limited = jnp.any(sampled & ((top_k > 0) | (top_p < 1)))
        scaled = jax.lax.cond(limited, lambda x: restrict(x, top_k, top_p), lambda x: x, scaled)
        keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))
        drawn = jax.vmap(jax.random.categorical)(keys(settings["seed"], positions), scaled)
        return jnp.where(sampled, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(sampled), draw, lambda _: greedy, logits)


class Scores(NamedTuple):
    """Log-probabilities at several places, of the model alone: temperature, top_k and top_p do not change them.

    Attributes:
        logprobs: float32 (N), of the token at each place.
        top: float32 (N, TOP), the largest ones, in descending order.
        ids: int32 (N, TOP), their tokens.
    """

    logprobs: jax.Array | np.ndarray
    top: jax.Array | np.ndarray
    ids: jax.Array | np.ndarray


def score(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Scores:
    """Return the scores of tokens (N) by their logits (N, V); zeros, which cost nothing, if `wanted` () is False."""

    def compute_one(given: tuple[jax.Array, jax.Array]) -> Scores:
        logs = log_softmax(given[0].astype(jnp.float32))
        top, ids = jax.lax.top_k(logs, min(TOP, logits.shape[1]))
        return Scores(logs[given[1]], top, ids.astype(jnp.int32))

    def compute(logits: jax.Array) -> Scores:  # in blocks: a program has the memory for it also if it is not wanted
        return jax.lax.map(compute_one, (logits, tokens), batch_size=_BLOCK)

    def skip(logits: jax.Array) -> Scores:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, logits))

    return jax.lax.cond(wanted, compute, skip, logits)


# ---------------------------------------------------------------- generation


SMALLEST_BUCKET = 16


class Sizes(Protocol):
    """The hyperparameters of a model that a cache and a batch need; a `LlamaConfig` of the demo has them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def param_dtype(self) -> jax.typing.DTypeLike: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of the tokens that each row of a batch has read, in arrays of fixed size.

    Attributes:
        keys: (layers, B, S, K, h), rotated.
        values: (layers, B, S, K, h).
        lengths: int32 (B), the tokens that each row holds. A call writes its tokens behind them. A caller may lower
            a length: later tokens are then not read.
        layer: int32, the layer that writes next.

    >>> from jaxadapt.demo.llama import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> KVCache.create(config, rows=3, length=8).keys.shape
    (2, 3, 8, 2, 4)
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    layer: jax.Array

    @classmethod
    def create(cls, config: Sizes, rows: int, length: int) -> KVCache:
        """Return an empty cache for `length` tokens a row."""
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        keys, values = (jnp.zeros(shape, config.param_dtype) for _ in range(2))
        return cls(keys, values, jnp.zeros((rows,), jnp.int32), jnp.zeros((), jnp.int32))

    def mask(self, count: int) -> jax.Array:
        """Return the mask (B, 1, T, S) of `count` new tokens: each sees its row's earlier tokens, and itself."""
        return jnp.arange(self.keys.shape[2])[None, None, None] <= self._new_places(count)[:, None, :, None]

    def append(self, keys: jax.Array, values: jax.Array) -> tuple[KVCache, jax.Array, jax.Array]:
        """Write one layer's new keys and values (B, T, K, h); return the cache and all of the layer's, (B, S, K, h).

        Tokens that the cache has no room for are not written.
        """
        at = (self.layer, jnp.arange(len(keys))[:, None], self._new_places(keys.shape[1]))
        keys, values = (
            old.at[at].set(new.astype(old.dtype), mode="drop")
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return KVCache(keys, values, self.lengths, self.layer + 1), keys[self.layer], values[self.layer]

    def advance(self, count: int) -> KVCache:
        """Return the cache after all layers wrote `count` tokens: they belong to it, and layer 0 is next."""
        return dataclasses.replace(self, lengths=self.lengths + count, layer=jnp.zeros((), jnp.int32))

    def _new_places(self, count: int) -> jax.Array:
        return self.lengths[:, None] + jnp.arange(count)[None]


Forward = Callable[..., tuple[jax.Array, KVCache]]
"""`forward(state, route, tokens, positions, cache, first)` -> (logits (B, T, V), cache)."""


def nnx_forward(model: Any, *, embedded_prompt: bool = False) -> tuple[Forward, Any]:
    """Return the forward function of an NNX model and its state.

    Args:
        model: an NNX model with the interface of the demo's Llama (see docs/server.md), also with adapters or a bank.
        embedded_prompt: True if the active adapter is a prompt of embeddings (PROMPT_TUNING, P_TUNING, …): its virtual
            tokens then stay in the cache after the first call.

    A call of the function raises the errors of `route` and of the model.

        forward, state = jaxadapt.serving.nnx_forward(model)
        decoder = jaxadapt.serving.Decoder(config, forward, state, rows=8, length=512)
    """
    rebuild, state = Model(model).split()
    return _make_forward(rebuild, lambda model, _: model, embedded_prompt), state


def linen_forward(module: Any, *, embedded_prompt: bool = False) -> Forward:
    """Return the forward function of a Linen module, whose state is the module's variables; see `nnx_forward`.

    A call of the function raises the errors of `route` and of the module.

        forward = jaxadapt.serving.linen_forward(module)
        decoder = jaxadapt.serving.Decoder(config, forward, variables, rows=8, length=512)
    """
    return _make_forward(
        lambda _: module, lambda module, variables: functools.partial(module.apply, variables), embedded_prompt
    )


def _make_forward(
    build: Callable[[Any], Any], bind: Callable[[Any, Any], Callable[..., Any]], embedded_prompt: bool
) -> Forward:
    """Return the forward function of the model that `build(state)` returns.

    `bind(model, state)` returns what takes the tokens, where `model` has the rows of the route.
    """

    def forward(state: Any, route: Any, tokens: Any, positions: Any, cache: KVCache, first: bool) -> Any:
        model = build(state)
        with (
            invoke(model, prefilled=True) if embedded_prompt and not first else contextlib.nullcontext(model) as ready,
            contextlib.nullcontext(ready) if route is None else bank.route(ready, route) as called,
        ):
            return bind(called, state)(tokens, positions=positions, cache=cache)

    return forward


class Decoder:
    """A batch of fixed size that decodes with a cache. Its rows are filled and freed one at a time.

    Args:
        config: the model's hyperparameters.
        forward: what `nnx_forward` or `linen_forward` returned.
        state: the model's arrays, which `forward` takes.
        rows: the rows of the batch.
        length: the tokens that a row can hold, prompt and answer.
        select: with a bank, the function that returns the route of slots, `Bank.select` or `AdapterPool.select`.
        virtual_tokens: with `embedded_prompt`, the number of the prompt's virtual tokens; the cache holds them too.

    Raises:
        ConfigError: the sizes are not positive, or `length` exceeds the model's positions.

    >>> from flax import nnx
    >>> from jaxadapt.demo.llama import Llama
    >>> from jaxadapt.demo.llama import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> decoder = Decoder(config, *nnx_forward(Llama(config, rngs=nnx.Rngs(0))), rows=2, length=32)
    >>> [len(tokens) for tokens in decoder.generate([[3, 1], [4, 1, 5], [9]], max_tokens=4)]
    [4, 4, 4]
    """

    def __init__(
        self,
        config: Sizes,
        forward: Forward,
        state: Any,
        *,
        rows: int,
        length: int,
        select: Callable[[np.ndarray], Any] | None = None,
        virtual_tokens: int = 0,
    ) -> None:
        if rows < 1 or not 1 < length <= config.max_position_embeddings:
            raise ConfigError(
                f"Decoder: expected at least one row, and a length of 2 to {config.max_position_embeddings} tokens (the"
                f" model's positions); found {rows} rows of {length}"
            )
        self.config: Sizes = config
        self.length: int = length
        self.rows: int = rows
        self.state: Any = state
        self.select: Callable[[np.ndarray], Any] | None = select
        self.cache: KVCache = KVCache.create(config, rows, virtual_tokens + length)
        self._forward = forward
        self._tokens = np.zeros(rows, np.int32)
        self._counts = np.zeros(rows, np.int32)
        self._slots = np.zeros(rows, np.int32)
        self._settings = {f.name: np.full(rows, f.default, DTYPES[f.name]) for f in dataclasses.fields(Sampling)}
        self._route: Any = None
        self._stale = True
        self._traced, forward = 0, functools.partial(self._count, forward)
        self._read = jax.jit(functools.partial(_read, forward, virtual_tokens), donate_argnums=1)
        self._step = jax.jit(functools.partial(_step, forward), donate_argnums=1)

    @property
    def buckets(self) -> list[int]:
        """The lengths to which prompts are padded: powers of 2, and `length`."""
        powers = (SMALLEST_BUCKET << n for n in range(int(self.length).bit_length()))
        return [*(size for size in powers if size < self.length), self.length]

    def start(
        self, row: int, prompt: Sequence[int], sampling: Sampling = GREEDY, slot: int = 0
    ) -> tuple[int, bool, Scores | None]:
        """Read a prompt into a row; return its first token, False if the logits were not finite, and scores.

        The scores are those of the prompt's tokens from the second on, and of the first new token; None without
        `sampling.scores`.

        Args:
            row: the row. What it held is forgotten.
            prompt: token ids, at least one and fewer than `length`.
            sampling: how its tokens are chosen.
            slot: the slot of its adapter, with a bank.

        Raises:
            MismatchError: the prompt is empty or too long, or has a token outside the vocabulary.
        """
        self.check(prompt)
        tokens = np.zeros((1, min(size for size in self.buckets if size >= len(prompt))), np.int32)
        tokens[0, : len(prompt)] = prompt
        for name, values in self._settings.items():
            values[row] = getattr(sampling, name)
        route = None if self.select is None else self.select(np.asarray([slot], np.int32))
        self.cache, token, finite, scores = self._read(
            self.state,
            self.cache,
            route,
            tokens,
            np.int32(len(prompt)),
            np.int32(row),
            {name: x[row : row + 1] for name, x in self._settings.items()},
        )
        self._tokens[row], self._counts[row] = int(token), len(prompt)
        self._stale |= self._slots[row] != slot
        self._slots[row] = slot
        found = Scores(*(np.asarray(x)[: len(prompt)] for x in scores)) if sampling.scores else None
        return int(token), bool(finite), found

    def check(self, prompt: Sequence[int]) -> None:
        """Raise `MismatchError` for a prompt that `start` would refuse."""
        if not 0 < len(prompt) < self.length:
            raise MismatchError(f"expected a prompt of 1 to {self.length - 1} tokens, found {len(prompt)}")
        if wrong := [token for token in prompt if not 0 <= token < self.config.vocab_size]:
            raise MismatchError(f"expected token ids below {self.config.vocab_size}, found {wrong[:5]}")

    def step(self) -> tuple[np.ndarray, np.ndarray, Scores | None]:
        """Decode one token in every row; return int32 (rows), where the logits were finite, bool (rows), and scores.

        The scores are None if no row asks for them. Rows that hold no request are computed too, and mean nothing.
        """
        if self._stale and self.select is not None:
            self._route = self.select(self._slots.copy())
        self._stale = False
        settings = {name: x.copy() for name, x in self._settings.items()}
        self.cache, tokens, finite, scores = self._step(
            self.state, self.cache, self._route, self._tokens.copy(), self._counts.copy(), settings
        )
        self._tokens = np.array(tokens)
        self._counts += 1
        found = Scores(*map(np.asarray, scores)) if settings["scores"].any() else None
        return self._tokens.copy(), np.asarray(finite), found

    @property
    def usable(self) -> bool:
        """False if a program failed after it took the cache's memory: then all rows are lost."""
        return not self.cache.keys.is_deleted()

    def free(self, row: int) -> None:
        """Make a row that ended the base's, so that its adapter's slot may be given away."""
        self._stale |= self._slots[row] != 0
        self._slots[row] = 0
        self._settings["temperature"][row] = self._settings["scores"][row] = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        slots: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Answer prompts, as many at once as there are rows; return the new tokens of each.

        Args:
            prompts: token ids.
            max_tokens: the most tokens to return for a prompt; fewer if a row is full.
            stop: tokens that end an answer. They are its last token.
            sampling: how tokens are chosen. Prompt i has the seed `sampling.seed + i`.
            slots: the slot of each prompt's adapter, with a bank.

        Raises:
            MismatchError: a prompt does not fit, or the logits of a prompt are not finite.
        """
        for prompt in prompts:
            self.check(prompt)
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))[::-1]
        held: dict[int, int] = {}

        def take(row: int, token: int, finite: bool, _: Scores | None = None) -> None:
            number = held[row]
            if not finite:
                raise MismatchError(f"prompt {number}: the logits are not finite; check the adapter's values")
            answers[number].append(token)
            if token in stop or len(answers[number]) >= min(max_tokens, self.length - len(prompts[number])):
                del held[row]
                self.free(row)

        while waiting or held:
            for row in (r for r in range(self.rows) if r not in held):
                if waiting:
                    held[row] = number = waiting.pop()
                    own = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)
                    take(row, *self.start(row, prompts[number], own, 0 if slots is None else slots[number]))
            if held:
                tokens, finite, _ = self.step()
                for row in list(held):
                    take(row, int(tokens[row]), bool(finite[row]))
        return answers

    def compiled(self) -> int:
        """Return the number of programs traced so far: one for each bucket used, and one for the step."""
        return self._traced

    def _count(self, forward: Forward, *args: Any) -> Any:
        self._traced += 1  # Python runs this only while JAX traces
        return forward(*args)


def _read(
    forward: Forward,
    virtual_tokens: int,
    state: Any,
    cache: KVCache,
    route: Any,
    tokens: Any,
    count: Any,
    row: Any,
    settings: Any,
) -> tuple[KVCache, jax.Array, jax.Array, Scores]:
    """Read a padded prompt (1, T) with `count` tokens into a row, and choose the first token."""

    time = tokens.shape[1]
    # An empty cache for one row: an earlier answer's NaN would pass through the mask.
    keys, values = (jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype) for x in (cache.keys, cache.values))
    alone = KVCache(keys, values, jnp.zeros((1,), jnp.int32), cache.layer)
    logits, alone = forward(state, route, tokens, jnp.arange(time, dtype=jnp.int32)[None], alone, True)
    # Virtual embeddings come first, in the logits as in the cache.
    if logits.shape[1] != virtual_tokens + time:
        raise MismatchError(
            f"expected {virtual_tokens} virtual tokens before the prompt's, found {logits.shape[1] - time}; set"
            " virtual_tokens= to the adapter's num_virtual_tokens if it is a prompt of embeddings, else to 0"
        )
    length = virtual_tokens + count
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, row, 1)
        for old, new in ((cache.keys, alone.keys), (cache.values, alone.values))
    )
    cache = KVCache(keys, values, cache.lengths.at[row].set(length), cache.layer)
    last = jax.lax.dynamic_slice_in_dim(logits, length - 1, 1, 1)[:, 0]
    token = choose(last, count[None], settings)[0]
    following = jnp.concatenate([tokens[0, 1:], tokens[0, :1]]).at[count - 1].set(token)
    scores = score(logits[0, virtual_tokens:], following, settings["scores"][0])
    return cache, token, jnp.isfinite(last).all(), scores


def _step(
    forward: Forward, state: Any, cache: KVCache, route: Any, tokens: Any, counts: Any, settings: Any
) -> tuple[KVCache, jax.Array, jax.Array, Scores]:
    """Read the last token of each row, and choose the next."""
    logits, cache = forward(state, route, tokens[:, None], counts[:, None], cache, False)
    last = logits[:, 0]
    chosen = choose(last, counts + 1, settings)
    return cache, chosen, jnp.isfinite(last).all(-1), score(last, chosen, jnp.any(settings["scores"]))
