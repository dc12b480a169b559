"""Adapters of the rows of a batch on an NNX model: variables beside the weights, which the model's scans slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.models.nnx import attach, graph, survey
from jaxadapt.models.nnx.layer import ROWS
from jaxadapt.models.nnx.params import RowParam
from jaxadapt.models.row_sites import RowLayout, Rows


def attach_rows(model: nnx.Module, layout: RowLayout) -> None:
    """Let the layers of these sites expect a route; raise `AttachError` for layers that cannot."""
    walk = graph.walk_model(model)
    leaves = [site.leaf for site in layout.sites]
    attach.require_current_trace(module for module, _ in walk.leaves.values())
    if missing := [leaf for leaf in dict.fromkeys(leaves) if leaf not in walk.leaves]:
        raise AttachError("the bank is for another base; the model lacks these weights:\n" + paths.bullets(missing))
    problems = list(survey.find_obstacles(walk, leaves).values())
    owners = [walk.leaves[leaf][0] for leaf in leaves]
    problems += [f"{p}: the model has a bank already" for p, m in walk.modules if ROWS in vars(m) and m in owners]
    raise_listed(AttachError, "these layers cannot take a bank:", problems)
    for leaf in leaves:
        module, attr = walk.leaves[leaf]
        if ROWS not in vars(module):
            setattr(module, ROWS, nnx.data({}))
        vars(module)[ROWS][attr] = {}
        attach.install_adapters(module)


def detach_rows(model: nnx.Module) -> None:
    """Restore the layers that `attach_rows` changed."""
    for _, module in graph.walk_model(model).modules:
        if ROWS in vars(module):
            delattr(module, ROWS)
            attach.uninstall_adapters(module)


def set_rows(model: nnx.Module, rows: Rows | None) -> None:
    """Store the tensors of a batch's rows beside the weights, or remove them."""
    leaves: Mapping[str, Any] = graph.walk_model(model).leaves
    banked = {leaf: vars(m)[ROWS][attr] for leaf, (m, attr) in leaves.items() if attr in vars(m).get(ROWS, {})}
    for sites in banked.values():
        sites.clear()
    if rows is None:
        return
    if missing := [site.leaf for site in rows.layout.sites if site.leaf not in banked]:
        raise AttachError("the model has no bank at these weights; call attach first:\n" + paths.bullets(missing))
    if more := banked.keys() - {site.leaf for site in rows.layout.sites}:
        raise AttachError("the route is of another bank, which lacks these weights:\n" + paths.bullets(sorted(more)))
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        banked[site.leaf][str(number)] = {name: RowParam(x, row_site=site) for name, x in arrays.items()}
