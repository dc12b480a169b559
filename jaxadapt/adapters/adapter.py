"""The two values everything else moves between, and what travels with them.

`Adapter` holds parameters in the model's layout, `PeftTensors` the same content under PEFT's names and
in PyTorch's layout. They never pass for each other: only a plan turns one into the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors as PeftTensors  # apart, since it needs no JAX
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FileError
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap, from_data, to_data

CONFIG_NODE = "~config"
"""The key of the zero-leaf node that carries a `Recipe` inside a Linen collection."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What gives adapter parameters their meaning: the configuration, and the table of names.

    A pytree node without leaves: it survives jit, grad, optax, freeze and `flatten_dict` inside a tree.
    Equal recipes compute the same function, and a saved file says the same of where they come from; other
    bookkeeping (`inference_mode`, …) takes no part, else jit would retrace. The hash is computed once, since
    jit asks leaf by leaf.

    `sites` counts the adapted leaves, so that a part of an adapter is not taken for the whole; 0: not known.
    """

    config: Config
    keymap: KeyMap = GENERIC
    sites: int = 0

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.config, self.keymap))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Recipe)
            and self.config == other.config
            and self.keymap == other.keymap
            and self.sites == other.sites
            and self.origin == other.origin
        )

    @functools.cached_property
    def origin(self) -> tuple[Any, ...]:
        """What a saved file says of where the adapter comes from: task type, base model, revision.

        jit hands back the recipe of whichever adapter it saw first, so two that would be saved differently
        must not be equal, though they compute the same.
        """
        return tuple(self.config.get(name) for name in ("task_type", "base_model_name_or_path", "revision"))

    def check_complete(self, found: int, name: str) -> None:
        """Raise `AttachError` if `found` leaves are not all the adapter has."""
        if self.sites and found != self.sites:
            raise AttachError(
                f"this tree holds {found} of the {self.sites} adapted leaves of the adapter {name!r}; saved or merged,"
                " the rest would be missing. Take it from the whole model or all its variables"
            )

    def to_text(self) -> str:
        """The recipe as JSON text, for serialisers that keep strings (flax's msgpack)."""
        data = {"config": self.config.to_dict(), "keymap": to_data(self.keymap), "sites": self.sites}
        return json.dumps(data)

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """The inverse of `to_text`; `AdapterError` if the text is not one."""
        try:
            data = json.loads(text)
            keymap = from_data(data["keymap"])
            config = Config.from_dict(data["config"], "the serialised state")
            sites = int(data["sites"])
        except (ValueError, KeyError, TypeError) as error:
            raise AttachError(f"this is no serialised adapter configuration: {error}") from error
        return cls(config, keymap, sites)


def collection_name(config: Config) -> str:
    """The Linen collection (and NNX attribute) of a method: "lora", "ia3", …"""
    return config.peft_type.lower()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Adapter:
    """One method's trained parameters in the model's layout, with what gives them meaning.

    A frozen pytree: its leaves are the parameters, the configuration and the table are static.

    Args:
        config: the configuration, with PEFT's field names.
        params: nested dicts; the base model's paths, with each adapted leaf replaced by its tensors
            (`{"q_proj": {"kernel": {"lora_A": (r, in), "lora_B": (out, r)}}}`). Beside a Linen base in boxes
            (`nn.Partitioned`), each tensor is in a box as well; `flat` and `sites` give the arrays inside.
        keymap: the table that names these leaves for PyTorch.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> params = {"q": {"kernel": {"lora_A": np.zeros((2, 3)), "lora_B": np.zeros((4, 2))}}}
    >>> sorted(Adapter(config, params).collection["lora"]["default"])
    ['q', '~config']
    """

    config: Config
    params: Mapping[str, Any]
    keymap: KeyMap = GENERIC

    @functools.cached_property
    def _static(self) -> Recipe:
        # (Jit would take an equal configuration for this one, and give back the first that it saw.)
        return Recipe(self.config, self.keymap)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Recipe]:
        """For JAX, as is `tree_unflatten`."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), self._static

    @classmethod
    def tree_unflatten(cls, recipe: Recipe, children: tuple[Any]) -> Adapter:
        """The inverse of `tree_flatten_with_keys`."""
        return cls(recipe.config, children[0], recipe.keymap)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.config, self.keymap, len({path.rpartition(".")[0] for path in self.flat()}))

    @property
    def collection(self) -> dict[str, dict[str, Any]]:
        """The Linen collection of this adapter under the name "default"; `named` takes another name."""
        return self.named("default")

    def named(self, name: str) -> dict[str, dict[str, Any]]:
        """`{"lora": {name: {..., "~config": recipe}}}`, to be merged into Linen variables."""
        return {collection_name(self.config): {name: {**self.params, CONFIG_NODE: self.recipe}}}

    def flat(self) -> dict[str, Any]:
        """`{"model.layers.0.q_proj.kernel.lora_A": array}`."""
        return {path: _array_in(leaf) for path, leaf in paths.flatten(self.params).items()}

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """`{base leaf: {tensor: array}}`."""
        out: dict[str, dict[str, Any]] = {}
        for path, leaf in self.flat().items():
            if not is_array(leaf):
                raise AttachError(f"{path!r} is no array but {type(leaf).__name__}; an adapter holds arrays only")
            base, _, tensor = path.rpartition(".")
            out.setdefault(base, {})[tensor] = leaf
        return out

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """`{base leaf: {tensor: shape}}`."""
        return {leaf: {name: tuple(x.shape) for name, x in held.items()} for leaf, held in self.sites.items()}


def _array_in(leaf: Any) -> Any:
    """The array in a box, which JAX sees as a node with one leaf; anything else unchanged."""
    held = [leaf] if is_array(leaf) else jax.tree.leaves(leaf)
    return held[0] if len(held) == 1 else leaf


@contextlib.contextmanager
def name_donated_arrays(arrays: Mapping[str, Any]) -> Generator[None]:
    """Raise `AttachError` naming the arrays that were donated while the block read them, where JAX raises for one."""
    try:
        yield
    except (RuntimeError, FileError) as error:  # JAX has no class of its own for it, and Orbax passes it on
        gone = [path for path, leaf in arrays.items() if isinstance(leaf, jax.Array) and leaf.is_deleted()]
        if not gone or not isinstance(error.__cause__ if isinstance(error, FileError) else error, RuntimeError):
            raise
        raise AttachError(
            "these arrays were deleted while they were saved: they were donated to a jitted function; save before the"
            " step that donates them, or save a copy (jax.tree.map(jnp.copy, adapter)):\n" + paths.bullets(gone)
        ) from error


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array (JAX, numpy, a tracer) or an abstract `ShapeDtypeStruct`."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
