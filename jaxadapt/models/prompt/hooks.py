"""Two methods by which a model tells how virtual tokens enter it, where jaxadapt cannot do it by itself."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

Array = Any


@runtime_checkable
class TakesEmbeddings(Protocol):
    """A model with a call of its own for virtual tokens that are embeddings (prompt tuning, p-tuning, …).

    An adapted NNX model or Linen module that has this method is called by it. The method is responsible for positions,
    masks and whatever else counts tokens; it may call `self(…)`, which is then the plain model.

    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __call__(self, tokens): ...
    ...     def call_with_embeddings(self, virtual, tokens): ...
    >>> isinstance(Net(), TakesEmbeddings)
    True
    """

    def call_with_embeddings(self, virtual: Array, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's call with these arguments returns with virtual tokens before the others.

        Args:
            virtual: their embeddings, (n, width), or (batch, n, width) if the rows have different ones.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
        """
        ...


@runtime_checkable
class TakesKeys(Protocol):
    """A model with a call of its own for virtual tokens that are keys and values (prefix tuning, cartridges).

    An adapted NNX model or Linen module that has this method is called by it, for example to put them into a cache. The
    method is responsible for positions and masks; it may call `self(…)`, which is then the plain model.

    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __call__(self, tokens, cache=None): ...
    ...     def call_with_keys(self, keys, values, tokens): ...
    >>> isinstance(Net(), TakesKeys)
    True
    """

    def call_with_keys(self, keys: Array, values: Array, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's call with these arguments returns with keys and values before those of the tokens.

        Args:
            keys: for every attention layer, (layers, n, heads · size). They are used as they are: where the model
                rotates its keys, these are rotated already.
            values: as the keys.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
        """
        ...
