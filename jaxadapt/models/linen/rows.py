"""Adapters of the rows of a batch on a Linen model: leaves added to `params` beside the weights, for one call."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.models.linen.interceptor import SEP, Interceptor, LeafAdapter
from jaxadapt.models.linen.overlay import Keys, Overlay, key_paths
from jaxadapt.models.row_sites import NO_ROUTE, RowLayout, Rows


def add_rows(overlay: Overlay, layout: RowLayout, rows: Rows | None) -> Overlay:
    """Add a batch's rows to the overlay of a call; raise `AttachError` without them, or if they do not fit the base."""
    if rows is None:
        raise AttachError(NO_ROUTE)
    rows.check_layout(layout)
    keys_by_leaf = key_paths(overlay.base.get("params", {}))
    if missing := [site.leaf for site in layout.sites if site.leaf not in keys_by_leaf]:
        raise AttachError("the bank is for another base; the parameters lack these weights:\n" + paths.bullets(missing))
    leaves: dict[Keys, Any] = dict(overlay.leaves)
    sites = {path: {leaf: list(each) for leaf, each in of.items()} for path, of in overlay.interceptor.sites.items()}
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        *path, leaf = keys_by_leaf[site.leaf]
        text = repr((number, site.method.peft_type, site.hparams, site.axes, site.axes.torch))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        keys = {name: f"{leaf}{SEP}{name.removeprefix(SEP)}{SEP}rows{digest}" for name in arrays}
        leaves |= {(*path, keys[name]): x for name, x in arrays.items()}
        shared, names = rows.shared_of(site), dict[str, str]()
        if shared and not site.stack:  # the model's scan would slice it among the stacked parameters
            names = {name: f"{leaf}{SEP}{name}{SEP}rows{digest}" for name in shared}
            leaves |= {(*path, names[name]): x for name, x in shared.items()}
        whole = shared if site.stack else {}
        adapter = LeafAdapter(site.method, site.hparams, site.axes, keys, whole, site.how, names)
        sites.setdefault(tuple(path), {}).setdefault(leaf, []).append(adapter)
    interceptor = Interceptor(sites, overlay.interceptor.quantized_scopes, overlay.interceptor.dropout)
    return dataclasses.replace(overlay, leaves=leaves, interceptor=interceptor)
