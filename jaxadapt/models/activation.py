"""Which adapters of a model are active: `activate` and `disable`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from jaxadapt.core.errors import AttachError
from jaxadapt.models.carriers import carrier


def activate(model: Any, *names: Any) -> Any:
    """Activate these adapters, and deactivate all others; NNX in place, Linen returns a new wrapper.

    Args:
        names: names, or one list of names. The updates of several adapters add up; without a name, only the base is
            left.

    Raises `AttachError` for a name that the model does not have, and for a model without adapters.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> activate(jaxadapt.adapt(module, config, name="b"), "a").active
    ('a',)
    """
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if any(not isinstance(n, str) for n in names):
        raise AttachError(
            f"expected names, as in activate(model, 'a', 'b') or activate(model, ['a', 'b']); found {names!r}"
        )
    held = carrier(model)
    if names and not held.has_adapters():
        raise AttachError(
            f"cannot activate {', '.join(map(repr, names))}: the model has no adapter; attach one with"
            " jaxadapt.adapt(model, config) or jaxadapt.load(path, model)"
        )
    return held.activate(tuple(dict.fromkeys(names)))


@contextlib.contextmanager
def disable(model: Any) -> Generator[Any]:
    """Deactivate all adapters within a context: `with disable(model) as base: base(x)`.

    The model then computes what the base does, also without the biases that the adapter trained (`bias="all"`,
    "lora_only"). PEFT's `disable_adapter` keeps these biases, with a warning.

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the wrapper
    without an active adapter. Raises `AttachError` for any other object.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> with disable(module) as base:
    ...     base.active
    ()
    """
    held = carrier(model)
    before = held.active()
    base = held.activate(())
    try:
        yield base
    finally:
        held = carrier(model)
        present = held.names()  # the context may have deleted some
        held.activate([name for name in before if name in present])
