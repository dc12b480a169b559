"""The interface of the prompt methods, whose tensors belong to the whole adapter and adapt no weight."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.base import (
    Array,
    Draw,
    Effects,
    Examples,
    MethodTensor,
    Params,
    Shapes,
    Start,
    Strings,
    Target,
    Targets,
    own_tensor,
    tensor_roles,
)
from jaxadapt.methods.copies import WithoutArithmetic

# The file of a method imports these names from here, wherever they are defined.
__all__ = [
    "EMBEDDINGS", "PREFILLED", "TASKS", "Array", "BaseSizes", "Draw", "EmbeddingPrompt", "Examples", "MethodTensor",
    "Params", "PromptMethod", "Shapes", "StartData", "Strings", "Targets", "dense", "keys_and_values", "own_tensor",
    "tensor_roles",
]  # fmt: skip

# ---------------------------------------------------------------- names


EMBEDDINGS = "prompt_embeddings"
"""The name of the virtual tokens, in a trained adapter without an encoder and in every file."""

TASKS, PREFILLED = "task_ids", "prefilled"
"""The names of the data of one call: the task of each row, and a marker that a cache holds the virtual tokens."""


@dataclasses.dataclass(frozen=True)
class BaseSizes:
    """The sizes of a base model that a prompt method needs; None where a trace of the model does not show them.

    Attributes:
        token_dim: the width of the embeddings.
        num_layers: the number of attention layers.
        num_attention_heads: the number of heads of the queries.
        num_kv_heads: the number of heads of the keys and values.
        head_dim: the size of one head.
    """

    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None


Tokens = Sequence[int] | Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class StartData:
    """The data, beyond the configuration, from which a prompt computes its initial values.

    Attributes:
        key: a JAX random key.
        table: returns the embeddings of all tokens, (vocabulary, token_dim).
        tokens: the ids of a text's tokens, or a function from the text to them.
        source: the tensors of an adapter of other tasks, by the names in a file.
    """

    key: Array
    table: Callable[[], Array]
    tokens: Tokens | None = None
    source: Mapping[str, Array] | None = None

    def embed(self, name: str, ids: Array) -> Array:
        """Return the embeddings of token ids, float32.

        Raises `AttachError`, which names the ids `name`, if the base has no embeddings of some.
        """
        table = self.table()
        if isinstance(ids, np.ndarray) and (ids.min() < 0 or ids.max() >= table.shape[0]):
            raise AttachError(
                f"{name}: expected ids from 0 to {table.shape[0] - 1}, those of the base's embeddings, found"
                f" {ids.min()} to {ids.max()}"
            )
        return table[jnp.asarray(ids)].astype(jnp.float32)


class PromptMethod(WithoutArithmetic):
    """A method that adds virtual tokens to the input of a model. Stateless: every value it needs is an argument.

    Its parameters have one of two forms. The trained form is that of a new adapter; it may have an encoder, which
    computes the virtual tokens. The stored form is that of a file, and so of a loaded adapter: the virtual tokens
    themselves. The names of the tensors distinguish the forms.

    Attributes:
        adds: "embeddings" before those of the tokens, "keys" (with values) before those of every attention layer, or
            "attention" to tokens of its own in some layers.
        in_decoder: True if the decoder of an encoder-decoder gets embeddings of its own, besides the encoder.
    """

    scope: ClassVar[Literal["site", "model", "copies"]] = "model"
    key_prefix = "base_model."  # PEFT wraps no module of the base
    adds: ClassVar[str]
    in_decoder: ClassVar[bool] = False

    def complete(self, config: Any, sizes: BaseSizes) -> Config:
        """Return the configuration with the sizes of the base that are None filled in, as PEFT fills them in."""
        width, heads = sizes.token_dim, sizes.num_attention_heads
        if self.adds == "keys":
            heads = sizes.num_kv_heads
            width = None if heads is None or sizes.head_dim is None else heads * sizes.head_dim
        found = {
            "num_layers": sizes.num_layers,
            "token_dim": width,
            "num_attention_heads": heads,
            "num_transformer_submodules": config.submodules,
        }
        config = fill_in(config, found)
        return fill_in(config, {"encoder_hidden_size": config.token_dim})

    @abc.abstractmethod
    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        """Return `{tensor: shape}` of the trained form, or of the stored form."""

    @abc.abstractmethod
    def draw(self, config: Any, name: str) -> Draw:
        """Return the initial distribution of a tensor of the trained form, as in PEFT."""

    def start_setting(self, config: Any) -> tuple[str, tuple[str, ...]]:
        """Return the setting that decides where a prompt starts, for messages, and what `start` needs for it:

        "key", and as `data` "tokens" or "source".
        """
        return type(config).__name__, ("key",)

    def start_values(self, config: Any, shapes: Shapes, data: StartData) -> dict[str, Array]:
        """Return the tensors of the trained form that do not start as `draw` says, float32, for `initializers.start`.

        Args:
            config: the configuration, with all its sizes.
            shapes: the shapes of the adapter's tensors.
            data: what `start` was given; it has all that `start_setting` names.

        Raises `AttachError` for invalid token ids, `MismatchError` if the source has other shapes.
        """
        return {}

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        """Return the tensors of the stored form from those of either form."""
        return {EMBEDDINGS: shared[EMBEDDINGS] if EMBEDDINGS in shared else self.encode(config, shared)}

    def encode(self, config: Any, shared: Params) -> Array:
        """Return the virtual tokens from the tensors of a trained form that has others."""
        raise NotImplementedError  # only a method with such a form defines it

    def tokens(self, config: Any, params: Params, data: Params) -> Array:
        """Return the virtual tokens of a call, (n, width) or for each row of the batch (batch, n, width).

        `data` is what `call_data` returned for this call.
        """
        return self.stored(config, params)[EMBEDDINGS]

    def layers(self, config: Any, keymap: KeyMap, params: Params, base: Mapping[str, Array]) -> dict[str, Array]:
        """Return what `attend` gets of the attention layers, which the first axis of each array numbers.

        Args:
            config: the configuration.
            keymap: the keymap of the base.
            params: the adapter's tensors.
            base: `{leaf: array}` of the base parameters.

        Raises `AttachError` for a base whose attention cannot take the tokens.
        """
        raise NotImplementedError

    def attend(self, attention: Callable[..., Array], arrays: Mapping[str, Any], layer: Mapping[str, Array]) -> Array:
        """Return what replaces the result of an attention, if the method `adds` an "attention".

        Args:
            attention: `attention(arrays, is_causal=…)` computes it from its arrays.
            arrays: query (..., T, H, h), key (..., S, K, h), value (..., S, K, v) and others.
            layer: the arrays of one layer.
        """
        raise NotImplementedError

    def check_targets(self, config: Any, targets: Targets, found: Shapes) -> None:
        """Raise `TargetError` if the base's modules that `reads` selects do not suffice for a file's tensors."""

    def reads(self, config: Any, module: str) -> bool:
        """Return True for a module of the base whose sizes the adapter's shapes depend on."""
        return False

    def names_in_file(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the adapter's tensors by name, from those of a file by key."""
        return {key: shape for key, shape in shapes.items() if not key.startswith("base_model.")}

    def require_sizes(self, config: Any) -> None:
        """Raise `ConfigError` if the configuration lacks a size that the shapes of the tensors depend on."""
        if config.missing_sizes:
            traced = (
                "or pass example=[tokens], the inputs of one call, to adapt, which reads them from a trace of that call"
                if self.adds == "keys"
                else "and if several layers embed something, pass embeddings to the call in place of tokens"
            )
            raise ConfigError(
                f"{self.peft_type}: {', '.join(config.missing_sizes)} must be set, because the model's parameters do"
                f" not show them. Set them in the configuration; {traced}"
            )

    # ------------------------------------------------------------ the interface

    def shared(self, config: Any, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return tuple(
            own_tensor(name, shape, name, trained=self.roles.get(name) != "frozen")
            for name, shape in self.shapes(config, stored=EMBEDDINGS in found).items()
        )

    def init(self, config: Any, tensor: MethodTensor, start: Start) -> Draw | Array:
        return self.draw(config, tensor.name)

    def call_data(self, config: Any, given: Mapping[str, Array]) -> dict[str, Array]:
        return {name: given[name] for name in (PREFILLED,) if name in given and self.adds == "embeddings"}

    def starts_unchanged(self, config: Any) -> bool:
        return False

    def tensors(self, config: Any, target: Target) -> tuple[MethodTensor, ...]:
        return ()

    def hparams(self, config: Any, target: Target) -> None:
        return None

    def effects(self, hparams: Any) -> Effects:
        return Effects()


def keys_and_values(prompt: Array, layers: int, submodules: int = 1) -> Array:
    """Return the virtual tokens as (layers, 2, n, token_dim): for each layer the keys, then the values.

    With `submodules` 2 they are those of the decoder's layers, in PEFT's order.

    >>> keys_and_values(jnp.arange(12.0).reshape(1, 12), 3)[1].tolist()
    [[[4.0, 5.0]], [[6.0, 7.0]]]
    >>> keys_and_values(jnp.arange(12.0).reshape(1, 12), 3, 2)[1].tolist()
    [[[8.0, 9.0]], [[10.0, 11.0]]]
    """
    n, width = prompt.shape
    if width % (2 * layers):
        raise MismatchError(f"a prefix of width {width} cannot hold keys and values of {layers} layers")
    of_layers = prompt.reshape(n, layers, 2, -1).transpose(1, 2, 0, 3)
    return of_layers if submodules == 1 else of_layers[jnp.asarray([2 * i % layers for i in range(layers)])]


def dense(params: Params, i: int, x: Array) -> Array:
    """Return x · kernel_i + bias_i for x (n, in)."""
    return x @ params[f"kernel_{i}"] + params[f"bias_{i}"][None]


def fill_in(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a configuration with these values in the fields that it has and that are None."""
    known = {name: x for name, x in values.items() if x is not None and vars(config).get(name, x) is None}
    return config.replace(**known) if known else config


# ---------------------------------------------------------------- embeddings


class EmbeddingPrompt(PromptMethod):
    """A method whose virtual tokens are embeddings before those of the tokens.

    The tensor of the stored form is `prompt_embeddings` (n · submodules, token_dim).
    """

    adds = "embeddings"

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        return {EMBEDDINGS: (config.num_virtual_tokens * config.submodules, config.token_dim)}

    def draw(self, config: Any, name: str) -> Draw:
        kind = config.get("prompt_tuning_init", "RANDOM")
        if kind != "RANDOM":
            needed = {"SAMPLE_VOCAB": "", "TEXT": ", ids"}.get(kind, ", adapter")
            raise ConfigError(
                f'{self.peft_type}: prompt_tuning_init="{kind}" needs data beyond the configuration; create the adapter'
                f" with jaxadapt.initializers.start(base, config{needed})"
            )
        return Draw("normal", 1.0)  # torch's nn.Embedding

    def start_setting(self, config: Any) -> tuple[str, tuple[str, ...]]:
        kind = config.get("prompt_tuning_init")
        if kind is None:
            return super().start_setting(config)
        needs = {"RANDOM": ("key",), "SAMPLE_VOCAB": ("key",), "TEXT": ("tokens",)}.get(kind, ("source",))
        return f'prompt_tuning_init="{kind}"', needs

    def start_values(self, config: Any, shapes: Shapes, data: StartData) -> dict[str, Array]:
        kind = config.get("prompt_tuning_init")
        if kind not in ("SAMPLE_VOCAB", "TEXT"):
            return {}
        rows = shapes[EMBEDDINGS][0]
        if kind == "SAMPLE_VOCAB":
            return {EMBEDDINGS: data.embed("", jax.random.randint(data.key, (rows,), 0, data.table().shape[0]))}
        assert data.tokens is not None
        tokens = data.tokens
        ids = np.asarray(tokens(config.prompt_tuning_init_text or "") if callable(tokens) else tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise AttachError(f"tokens: expected a list of token ids, found {ids.dtype} of shape {list(ids.shape)}")
        return {EMBEDDINGS: data.embed("tokens", ids)[np.resize(np.arange(len(ids)), rows)]}  # as in PEFT
