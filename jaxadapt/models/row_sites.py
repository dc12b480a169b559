"""The sites of a model at which each row of a batch may have its own adapter, and the tensors of one batch's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.base import Method
from jaxadapt.methods.rows import AppliedRows, Implementation, apply_rows


@dataclasses.dataclass(frozen=True)
class RowSite:
    """One method on one base leaf, for rows.

    Attributes:
        leaf: the path of the base leaf.
        stack: the axes of the leaf that stack layers.
        method: the method.
        hparams: the hyperparameters that all rows share.
        axes: the roles of the weight's axes.
        how: how the rows take their adapters; see `methods.apply_rows`.
        shared: the number of the tensors in `Rows.shared` that the method uses beside those of the rows; None if it
            uses none.
    """

    leaf: str
    stack: tuple[int, ...]
    method: Method
    hparams: Any
    axes: Axes
    how: Implementation = "gather"
    shared: int | None = None

    def apply(self, params: Mapping[str, Any], shared: Mapping[str, Any]) -> AppliedRows:
        """Return the method with the tensors of one layer's rows, and those that all rows share."""
        return apply_rows(self, self.how, params, shared)


@dataclasses.dataclass(frozen=True, eq=False)
class RowLayout:
    """The sites of one bank. It is compared by identity, so a compiled program recognizes it without a comparison."""

    sites: tuple[RowSite, ...]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The adapters of the rows of one batch: a pytree of arrays.

    Attributes:
        arrays: `{tensor: array}` of each site. A layer's slice of an array has the rows first, or the slots where the
            layers choose among them; stacked axes have their places in the base leaf.
        layout: the sites.
        how: how the rows take their adapters; see `methods.apply_rows`.
        shared: `{tensor: array}` of the tensors that all rows and all layers have in common; see `RowSite.shared`.
    """

    arrays: Sequence[Mapping[str, Any]]
    layout: RowLayout
    how: Implementation = "gather"
    shared: Sequence[Mapping[str, Any]] = ()

    @property
    def sites(self) -> list[RowSite]:
        """The sites, with the way in which the rows take their adapters."""
        return [dataclasses.replace(site, how=self.how) for site in self.layout.sites]

    def shared_of(self, site: RowSite) -> Mapping[str, Any]:
        """Return the shared tensors that a site uses."""
        return {} if site.shared is None else self.shared[site.shared]

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[RowLayout, Implementation]]:
        """Flatten the rows for JAX."""
        return (tuple(self.arrays), tuple(self.shared)), (self.layout, self.how)

    @classmethod
    def tree_unflatten(cls, static: tuple[RowLayout, Implementation], children: tuple[Any, Any]) -> Rows:
        """Rebuild the rows that `tree_flatten` flattened."""
        return cls(children[0], *static, children[1])

    def check_layout(self, layout: RowLayout) -> None:
        """Raise `AttachError` if these rows are of another bank than the attached one."""
        if self.layout is not layout:
            raise AttachError("the route has rows of another bank than the one that the model was banked with")


NO_ROUTE = (
    "the model has a bank of adapters, and this call has no route to choose an adapter for each row. Call it within"
    " jaxadapt.serving.route(model, bank.select(ids)); slot 0 is the base"
)
