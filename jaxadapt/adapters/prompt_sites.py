"""The site of a prompt method, whose tensors belong to the whole adapter, and the form of its tensors in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxadapt import methods
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter
from jaxadapt.adapters.sites import Site, bind_shared
from jaxadapt.methods.prompt import PromptMethod


def plan_sites(config: Any, *, stored: bool) -> tuple[Site, ...]:
    """Return the site of a prompt method's tensors, in the form of a new adapter or in the stored form.

    Raises `ConfigError` if the configuration lacks a size.
    """
    method = methods.get_method(config)
    assert isinstance(method, PromptMethod)
    return (bind_shared(method, method.shapes(config, stored=stored)),)


def as_stored(adapter: Adapter) -> Adapter:
    """Return an adapter with the tensors that its file holds: for a prompt method those that its encoder computes."""
    method = methods.get_method(adapter.config)
    if not isinstance(method, PromptMethod):
        return adapter
    params = {**adapter.params, SHARED_NODE: method.store(adapter.config, adapter.shared)}
    return dataclasses.replace(adapter, params=params)
