"""An adapter in the model's layout, and the recipe that gives its parameters meaning.

`Adapter` holds parameters in the model's layout. `PeftTensors` holds the same content under PEFT's names and in
PyTorch's layout. Only a plan converts one into the other.
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

from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FileError
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap, from_data, to_data

CONFIG_NODE = "~config"
"""The key of the node without leaves that carries a `Recipe` inside a Linen collection."""

SHARED_NODE = "~shared"
"""The key of the node with the tensors that belong to the whole adapter and not to one site."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The configuration and the keymap of an adapter: what gives its parameters their meaning.

    A pytree node without leaves: it survives jit, grad, optax, freeze and `flatten_dict` inside a tree. Equal recipes
    compute the same function and save the same `origin`. Other bookkeeping fields (`inference_mode`, …) take no part in
    the comparison, since jit would retrace for them. The hash is computed once, since jit asks for it leaf by leaf.

    `sites` is the number of adapted leaves, so that a part of an adapter is not taken for all of it; 0 if unknown.
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
        """The origin that a saved file records: task type, base model, revision.

        jit returns the recipe of the first adapter it saw among equal ones. Two recipes that would be saved differently
        must therefore not be equal, although they compute the same function.
        """
        return tuple(self.config.get(name) for name in ("task_type", "base_model_name_or_path", "revision"))

    def check_complete(self, count: int, name: str) -> None:
        """Raise `AttachError` if `count` is not the number of leaves that the adapter has."""
        if self.sites and count != self.sites:
            raise AttachError(
                f"this tree holds {count} of the {self.sites} adapted leaves of the adapter {name!r}: saving or merging"
                " it would lose the others. Pass the full model, or all its variables"
            )

    def to_text(self) -> str:
        """Return the recipe as JSON text, for serialisers that keep strings (flax's msgpack)."""
        return json.dumps({"config": self.config.to_dict(), "keymap": to_data(self.keymap), "sites": self.sites})

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Parse the text that `to_text` returns; raise `AttachError` for any other text."""
        try:
            data = json.loads(text)
            config = Config.from_dict(data["config"], "the serialized state")
            return cls(config, from_data(data["keymap"]), int(data["sites"]))
        except (ValueError, KeyError, TypeError) as error:
            raise AttachError(f"cannot read the serialized adapter configuration: {error}") from error


def not_an_adapter(found: Any) -> AttachError:
    """Return the error for an argument that should be an `Adapter`."""
    return AttachError(
        f"expected an Adapter, found {type(found).__name__}. jaxadapt.from_peft(tensors, model) makes an Adapter of"
        " PeftTensors, and the model comes first, as in inject(model, adapter) and merge(model, adapter)"
    )


def collection_name(config: Config) -> str:
    """Return the name of a method's Linen collection and NNX attribute: "lora", "ia3", …"""
    return config.peft_type.lower()


def integers_name(collection: str) -> str:
    """Return the name of the Linen collection with the integer tensors of a collection's adapters.

    `jax.grad` refuses integers, so they are not among the parameters that it differentiates.

    >>> integers_name("shira")
    'shira_integers'
    """
    return f"{collection}_integers"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Adapter:
    """One method's trained parameters in the model's layout, with the recipe that gives them meaning.

    A frozen pytree: its leaves are the parameters; the configuration and the keymap are static.

    Args:
        config: the configuration, with PEFT's field names.
        params: nested dicts with the paths of the base model, where each adapted leaf is replaced by its tensors
            (`{"q_proj": {"kernel": {"lora_A": (r, in), "lora_B": (out, r)}}}`). If the Linen base has boxes
            (`nn.Partitioned`), each tensor is boxed as well; `flat` and `sites` return the arrays inside.
        keymap: the keymap that gives these leaves their PyTorch names.

    Tensors of the whole adapter, such as VeRA's projections, are under the key "~shared"; `shared` returns them.

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
        # jit deduplicates equal static data, so it may return an equal configuration instead of this one.
        return Recipe(self.config, self.keymap)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Recipe]:
        """Flatten the adapter for JAX."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), self._static

    @classmethod
    def tree_unflatten(cls, recipe: Recipe, children: tuple[Any]) -> Adapter:
        """Rebuild the adapter that `tree_flatten_with_keys` flattened."""
        return cls(recipe.config, children[0], recipe.keymap)

    @property
    def recipe(self) -> Recipe:
        """The recipe of this adapter, with the number of its leaves."""
        leaves = {path.rpartition(".")[0] for path in self.flat()} - {SHARED_NODE}
        return Recipe(self.config, self.keymap, len(leaves))

    @property
    def collection(self) -> dict[str, dict[str, Any]]:
        """The Linen collection of this adapter under the name "default"; `named` takes another name."""
        return self.named("default")

    def named(self, name: str) -> dict[str, dict[str, Any]]:
        """Return `{"lora": {name: {..., "~config": recipe}}}`, to merge into Linen variables.

        Integer tensors, such as SHiRA's indices, have a collection of their own, `{"shira_integers": {name: ...}}`.
        """
        collection = collection_name(self.config)
        leaves = paths.flatten(self.params)
        integers = {path: x for path, x in leaves.items() if np.issubdtype(_unbox(x).dtype, np.integer)}
        if not integers:
            return {collection: {name: {**self.params, CONFIG_NODE: self.recipe}}}
        floats = paths.unflatten({path: x for path, x in leaves.items() if path not in integers})
        return {
            collection: {name: {**floats, CONFIG_NODE: self.recipe}},
            integers_name(collection): {name: paths.unflatten(integers)},
        }

    def flat(self) -> dict[str, Any]:
        """Return `{"model.layers.0.q_proj.kernel.lora_A": array}`."""
        return {
            path: leaf if isinstance(leaf, _ARRAYS) else _unbox(leaf)
            for path, leaf in paths.flatten(self.params).items()
        }

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """`{base leaf: {tensor: array}}`, without the shared tensors."""
        return {leaf: tensors for leaf, tensors in self._tensors.items() if leaf != SHARED_NODE}

    @property
    def shared(self) -> dict[str, Any]:
        """`{tensor: array}` of the tensors that belong to the whole adapter."""
        return {name: _unbox(leaf) for name, leaf in self.params.get(SHARED_NODE, {}).items()}

    @property
    def _tensors(self) -> dict[str, dict[str, Any]]:
        sites: dict[str, dict[str, Any]] = {}
        for path, leaf in self.flat().items():
            if not is_array(leaf):
                raise AttachError(
                    f"{path!r}: expected an array, found {type(leaf).__name__}; an adapter holds arrays only"
                )
            base, _, tensor = path.rpartition(".")
            sites.setdefault(base, {})[tensor] = leaf
        return sites

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """`{base leaf: {tensor: shape}}`; the shared tensors have the leaf "~shared"."""
        return {leaf: {name: tuple(x.shape) for name, x in tensors.items()} for leaf, tensors in self._tensors.items()}


def _unbox(leaf: Any) -> Any:
    """Return the array in a box, which JAX sees as a node with one leaf; return any other value unchanged."""
    arrays = [leaf] if is_array(leaf) else jax.tree.leaves(leaf)
    return arrays[0] if len(arrays) == 1 else leaf


@contextlib.contextmanager
def name_donated_arrays(arrays: Mapping[str, Any]) -> Generator[None]:
    """Raise `AttachError` that names the arrays donated while the block read them, where JAX raises for one."""
    try:
        yield
    except (RuntimeError, FileError) as error:  # JAX raises a plain RuntimeError here, and Orbax wraps it
        deleted = [path for path, leaf in arrays.items() if isinstance(leaf, jax.Array) and leaf.is_deleted()]
        if not deleted or not isinstance(error.__cause__ if isinstance(error, FileError) else error, RuntimeError):
            raise
        raise AttachError(
            "these arrays were donated to a jitted function, and so deleted, while they were being saved. Save before"
            " the step that donates them, or save a copy (jax.tree.map(jnp.copy, adapter)):\n" + paths.bullets(deleted)
        ) from error


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def is_array(leaf: Any) -> bool:
    """Return True for an array (JAX, numpy, a tracer) or an abstract `ShapeDtypeStruct`."""
    return isinstance(leaf, _ARRAYS)
