"""A carrier: one tree, of a kind that is recognised once, with the operations that this kind has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.site import Site
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.compare import compare, shapes_of
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models.foreign.tree import ForeignTree
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import graph
from jaxadapt.models.planning import BaseParams
from jaxadapt.models.trees import is_box, rebox, unbox

DEFAULT = "default"
Describe = Callable[[str, Adapter], Mapping[str, Any]]
"""A function from the name and the value of an adapter to `{path: new value}`."""


class Carrier:
    """A tree of base parameters, adapters or both. This class holds any pytree, without adapters.

    Operations of NNX objects change them in place and return them; those of other trees return new trees. An operation
    that the kind lacks raises `AttachError`.
    """

    remedy = ""
    """The end of the errors for this kind: another value to pass."""
    foreign: ForeignTree | None = None
    """The LoRA leaves of another library, if the tree has them."""
    on_shared: str | None = None
    """`on_shared` of the `LoraTree` that wraps the tree."""
    has_base = False
    """True if the tree may hold base parameters beside adapters: a model, or variables."""
    in_place = False
    """True for NNX models, which operations change."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def unsupported(self, expected: str) -> AttachError:
        """Return the error for an operation that this kind lacks."""
        return AttachError(f"expected {expected}, found {type(self.tree).__name__}{self.remedy}")

    # ------------------------------------------------------------ base parameters

    def base(self) -> BaseParams:
        """Return the base parameters, to plan an adapter for."""
        raise self.unsupported("base parameters as nested mappings, Linen variables or an NNX model")

    @property
    def params(self) -> Any:
        """The base parameters in the tree."""
        return self.tree

    def to_change(self, in_place: bool, donate: bool) -> Any:
        """Return the tree whose base an operation may change: of an NNX model a copy, unless its memory is given up."""
        if in_place:
            raise AttachError(
                f"in_place=True: expected an NNX model, found {type(self.tree).__name__}, for which a new tree is"
                " returned. donate=True reuses the memory of its weights"
            )
        return self.tree

    def walk(self) -> graph.ModelWalk | None:
        """Return the modules and parameters of an NNX model, from one traversal; None for trees without modules."""
        return None

    def leaves(self) -> dict[str, Any]:
        """Return `{path: array}` of the base parameters, without boxes."""
        flat = jax.tree_util.tree_leaves_with_path(self.params, is_leaf=is_box)
        return {_dotted_path(keys): unbox(leaf) for keys, leaf in flat}

    def some_leaves(self, wanted: Collection[str]) -> dict[str, Any]:
        """Return `{path: array}` of some base parameters."""
        found = {path: _descend(self.params, path) for path in wanted}
        if all(leaf is not None for leaf in found.values()):
            return {path: unbox(leaf) for path, leaf in found.items()}
        leaves = self.leaves()  # names with dots, or nodes that are no mappings
        return {path: leaves[path] for path in wanted}

    def replace(self, new: Mapping[str, Any], *, boxes: bool = True) -> Any:
        """Replace the base parameters at some paths, in their boxes or with them."""

        def put(keys: Any, leaf: Any) -> Any:
            path = _dotted_path(keys)
            return leaf if path not in new else rebox(leaf, new[path]) if boxes else new[path]

        params = self.params
        filled = jax.tree_util.tree_map_with_path(put, params, is_leaf=is_box)
        return filled if params is self.tree else collections.with_entry(self.tree, "params", filled)

    def abstract(self) -> Any:
        """Return a copy of the tree with shapes instead of arrays."""
        return jax.eval_shape(lambda: self.tree)

    def statistics(self) -> list[str]:
        """Return the paths of statistics of batch normalization."""
        return []

    # ------------------------------------------------------------ adapters

    def names(self) -> list[str]:
        """Return the names of the adapters."""
        return []

    def has_adapters(self) -> bool:
        """True if the tree has an adapter of jaxadapt."""
        return bool(self.names())

    def active(self) -> list[str]:
        """Return the names of the adapters that a call applies."""
        return self.names()

    def attached(self, name: str) -> Adapter | None:
        """Return the adapter called `name` with its configuration; None if there is none."""
        return self.extract(name) if name in self.names() else None

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        """Attach a new adapter; `options` are the arguments of `jaxadapt.adapt` that only some kinds have."""
        raise self.unsupported("an NNX model, a Linen module or an adapted Linen module")

    def extract(self, name: str, config: Config | None = None, keymap: Any = None) -> Adapter:
        """Return the adapter called `name`, as `jaxadapt.extract` does."""
        raise self.unsupported("an NNX model or state, Linen variables or an Adapter")

    def inject(self, adapter: Adapter, name: str) -> Any:
        """Write an adapter's values into the attached adapter of that name."""
        raise self.unsupported("an NNX model or state, Linen variables or an Adapter")

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        """Change the base at `new`, `{path: array}`, and attach an adapter instead of the `present` one."""
        raise self.unsupported("an NNX model or Linen variables")

    def delete(self, name: str) -> Any:
        """Remove one adapter."""
        raise self.unsupported("an adapted NNX model, an adapted Linen module or Linen variables")

    def detach(self) -> Any:
        """Remove all adapters."""
        raise self.unsupported("an adapted NNX model, an adapted Linen module or Linen variables")

    def activate(self, names: Sequence[str]) -> Any:
        """Activate these adapters only."""
        raise self.unsupported("an adapted NNX model or an adapted Linen module")

    def adapters(self) -> list[tuple[str, Adapter]]:
        """Return `(name, adapter)` of all adapters with their configurations."""
        return [(name, self.extract(name)) for name in self.names()]

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Return the tree with the values that `f` returns in place of its adapters' leaves."""
        raise self.unsupported("an NNX model or state, Linen variables or an Adapter")

    # ------------------------------------------------------------ training state

    def pytree(self) -> Any:
        """Return the tree as a pytree: the state of an NNX object."""
        return self.tree

    def fill(self, new: Any) -> Any:
        """Return the tree with the leaves of `new`, a pytree like `pytree()`."""
        return new

    def rest(self) -> Any:
        """Return the state that training changes besides adapters, such as random streams and batch statistics."""
        return {}

    def with_rest(self, rest: Any) -> Any:
        """Return the tree with another `rest`."""
        return self.tree


def _descend(tree: Any, path: str) -> Any:
    """Return the leaf at a dotted path of nested mappings; None if the path does not lead to one."""
    for name in path.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return None if isinstance(tree, Mapping) else tree


def _dotted_path(keys: Sequence[Any]) -> str:
    return paths.join(*(jax.tree_util.keystr((key,), simple=True) for key in keys))


def check_fit(adapter: Adapter, config: Config, present: Mapping[str, Any], name: str) -> None:
    """Raise `AttachError`, listing all problems, unless an adapter fits the one to replace: its `{path: array}`."""
    problems = list(map(str, compare(shapes_of(present), shapes_of(adapter.flat()))))
    if config != adapter.config:
        problems.append(f"another configuration: {config.differences(adapter.config, 'given')}")
    raise_listed(AttachError, f"cannot inject: the adapter does not fit {name!r}:", problems)


def check_name(name: str, present: Sequence[str]) -> None:
    """Raise `AttachError` unless an adapter is called `name`."""
    if name not in present:
        raise AttachError(f"no adapter is called {name!r}; this model has {list(present)}")


def check_free(name: str, present: Sequence[str]) -> None:
    """Raise `AttachError` if an adapter is called `name` already."""
    if name in present:
        raise AttachError(
            f"cannot attach the adapter {name!r}: the name is taken; pass another name=, or delete that adapter first"
        )


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raise `AttachError` for options that were given and do not apply."""
    if given := [option for option, value in options.items() if value is not None]:
        raise AttachError(f"{', '.join(given)}: {why}")
