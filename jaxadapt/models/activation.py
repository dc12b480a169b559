"""Which adapters of a model are active: `activate` and `disable`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

from jaxadapt.core.errors import AttachError
from jaxadapt.models.attachment import require_nnx
from jaxadapt.models.linen import wrapper
from jaxadapt.models.nnx import attach


def activate(model: Any, *names: Any) -> Any:
    """Activate these adapters, and deactivate all others; NNX in place, Linen returns a new wrapper.

    Args:
        names: names, or one list of names. The updates of several adapters add up; without a name, only the base is
            left.

    Raises `AttachError` for a name that the model does not have.

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
    names = tuple(dict.fromkeys(names))
    if isinstance(model, wrapper.Adapted):
        present = dict(model.adapters)
        unknown = [n for n in names if n not in present]
        if unknown:
            raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {list(present)}")
        return dataclasses.replace(model, active=tuple(names))
    require_nnx(model)
    attach.activate(model, names)
    return model


@contextlib.contextmanager
def disable(model: Any) -> Generator[Any]:
    """Deactivate all adapters within a context: `with disable(model) as base: base(x)`.

    NNX: changes the model and restores it at the end, also after an error. Linen: the context's value is the wrapper
    without an active adapter. Raises `AttachError` for any other object.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> with disable(module) as base:
    ...     base.active
    ()
    """
    if isinstance(model, wrapper.Adapted):
        yield dataclasses.replace(model, active=())
        return
    require_nnx(model)
    walked = attach.walked(model)
    before = attach.active_names(walked)
    attach.activate(walked, ())
    try:
        yield model
    finally:
        walked = attach.walked(model)  # the context may have changed it, and deleted some
        present = attach.adapter_names(walked)
        attach.activate(walked, [name for name in before if name in present])
