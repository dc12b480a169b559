"""Many adapters of one base as arrays with an axis of slots."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxadapt import methods
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.arrays import quantized
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging.rank_reduction import plain_config
from jaxadapt.methods import Implementation
from jaxadapt.models import planning
from jaxadapt.models.carriers import carrier
from jaxadapt.models.row_sites import Rows
from jaxadapt.serving import refusals, selection
from jaxadapt.serving.layout import (
    Layout,
    Place,
    Tensors,
    becomes_lora,
    blank,
    fit_adapter,
    make_place,
    read_slot,
)
from jaxadapt.serving.refusals import Refusal
from jaxadapt.serving.shared import Shared, compare_shared, draw_shared, shared_of
from jaxadapt.storage.strided import float_dtype


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """Many adapters of one base: a pytree of arrays whose structure and shapes never change.

    Slot 0 is the bare base. Ranks and targets that an adapter lacks are zeros (ones for factors), so one compiled
    program serves every mixture.

    Attributes:
        arrays: `{tensor: array}` of each place, with the axis of slots after those of stacked layers:
            (layers..., slots, …).
        layout: the places and the number of slots.
        shared: `{tensor: array}` of the tensors that all adapters of a method have in common, such as VeRA's
            projections, without an axis of slots. `put` neither changes nor donates them.
    """

    arrays: Sequence[Mapping[str, Any]]
    layout: Layout
    shared: Sequence[Mapping[str, Any]] = ()

    def tree_flatten(self) -> tuple[tuple[Any, Any], Layout]:
        """Flatten the bank for JAX."""
        return (tuple(self.arrays), tuple(self.shared)), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: tuple[Any, Any]) -> Bank:
        """Rebuild the bank that `tree_flatten` flattened."""
        return cls(children[0], layout, children[1])

    @property
    def slots(self) -> int:
        """The number of slots, with slot 0."""
        return self.layout.slots

    @property
    def nbytes(self) -> int:
        """The bytes of all slots, and of the tensors that they share."""
        return self.layout.slot_bytes * self.slots + sum(x.nbytes for x in jax.tree.leaves(self.shared))

    def select(self, ids: Any, *, weights: Any = None, implementation: Implementation | None = None) -> Rows:
        """Return the adapters of a batch's rows, for `route`. Do it once, when the batch changes.

        Args:
            ids: the slot of each row, integers (rows); of each token, (rows, time), for rows that hold several
                sequences; or of each of a row's adapters, (rows, adapters), with `weights`. A row or token whose id is
                not a slot gets NaN in every adapted layer.
            weights: numbers (rows, adapters): the change of a row is the sum of its adapters' changes with these
                weights. Slot 0 changes nothing.
            implementation: "gather" (the default for rows) copies the rows' adapters now, so decode steps only multiply
                with them. "layer" copies them in each layer, where all rows' adapters at once do not fit in memory.
                "mask" (the default for tokens) computes all slots for each token and masks the others: for few slots.
                "sorted", or a function of `jax.lax.ragged_dot`'s signature, multiplies segments of tokens that are
                sorted by slot; it needs low-rank pairs, and a platform with a grouped product. All but "gather" use the
                bank's own arrays, so call the model before the next `put`.

        Raises `AttachError` for ids of another shape or type, and for an implementation that the methods of the bank,
        or the platform, do not have.

        >>> import jaxadapt
        >>> base = {"q": {"kernel": jnp.ones((4, 6))}}
        >>> bank = jaxadapt.serving.create(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=3)
        >>> bank.select([1, 1, 0, 2]).arrays[0]["lora_A"].shape
        (4, 2, 4)
        >>> bank.select([[1, 2], [0, 1]], weights=[[0.5, 0.5], [1, 2]]).arrays[0]["lora_A"].shape
        (2, 2, 2, 4)
        """
        return selection.select(self, ids, weights, implementation)


def create(
    base: Any,
    configs: Config | Adapter | Sequence[Config | Adapter],
    *,
    slots: int,
    keymap: KeyMap | str | None = None,
    dtype: Any = jnp.float32,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Bank:
    """Create an empty bank for a base: every slot is the bare base.

    Args:
        base: an NNX model, Linen variables or base parameters, or the shapes of any of them. The bank's arrays are
            sharded as its weights ask.
        configs: what the bank has room for: for each kind of adapter (LoRA, DoRA, IA3) a configuration with the largest
            rank and all targets. Alphas and dropout have no effect. A configuration whose method computes the factors
            of its change (`merging.to_lora`), but has no form for rows, makes room for a LoRA of that rank. An adapter
            in place of a configuration also gives its tensors that belong to no module, such as VeRA's projections;
            those of a configuration are those of a new adapter.
        slots: the number of slots, with slot 0.
        keymap, stack_axes, example: as in `jaxadapt.adapt`.
        dtype: the dtype of the tensors; scales are float32.

    Raises `AttachError` for a configuration whose adapters the rows of a batch cannot each choose, and `MismatchError`
    for an adapter whose shared tensors are too small for a module.

    >>> import jaxadapt
    >>> base = {"q": {"kernel": jnp.ones((4, 6))}}
    >>> bank = create(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=3)
    >>> {name: x.shape for name, x in bank.arrays[0].items()}
    {'lora_A': (3, 2, 4), 'lora_B': (3, 6, 2), 'scale': (3,)}
    """
    if operator.index(slots) < 2:
        raise AttachError(f"slots: expected at least 2, one for the base and one for an adapter, found {slots}")
    held, dtype = carrier(base).base(), float_dtype(dtype)
    places: list[Place] = []
    problems: list[Refusal] = []
    shared: list[tuple[str, Shared]] = []
    for given in [configs] if isinstance(configs, Config | Adapter) else configs:
        config = given.config if isinstance(given, Adapter) else given
        if becomes_lora(config):
            given = config = plain_config(config, methods.get_method(config).plain_rank(config) or 1)
        _, sites = planning.plan_adapter(held, config, keymap, stack_axes, example)
        refused = refusals.find_refusals(sites)
        problems += refused
        if not refused:
            own = shared_of(given, sites) if isinstance(given, Adapter) else draw_shared(config, sites)
            number = _number_shared(shared, config.peft_type, own) if own else None
            shardings, leaves = held.shardings, held.leaves
            places += [make_place(s, leaves[s.leaf], shardings.get(s.leaf), dtype, number) for s in sites]
    kinds = [(place.row.leaf, place.row.method.peft_type, place.row.hparams, place.row.shared) for place in places]
    twice = [kind for number, kind in enumerate(kinds) if kind in kinds[:number]]
    problems += [
        Refusal(f"{leaf}: two of the configurations have the same kind of {method}", "Leave the smaller one out")
        for leaf, method, *_ in twice
    ]
    refusals.raise_listed(problems, "cannot create the bank")
    layout = Layout(tuple(places), slots, tuple(shared))
    meshes = [x.mesh for x in held.shardings.values() if isinstance(x, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    on_devices = [
        {name: jax.device_put(jnp.asarray(x, dtype), everywhere) for name, x in of.items()} for _, of in shared
    ]
    return Bank(tuple(_empty(place, slots) for place in places), layout, tuple(on_devices))


def _number_shared(shared: list[tuple[str, Shared]], peft_type: str, own: Shared) -> int:
    """Return the number of these shared tensors in a list, to which new ones are added."""
    for number, (known, tensors) in enumerate(shared):
        if known == peft_type and not compare_shared(tensors, own):
            return number
    shared.append((peft_type, own))
    return len(shared) - 1


def _empty(place: Place, slots: int) -> Tensors:
    at = place.layers
    return {
        name: jnp.full((*shape[:at], slots, *shape[at:]), place.neutral(name), dtype, device=place.shardings.get(name))
        for name, (shape, dtype) in place.kept.items()
    }


def put(bank: Bank, slot: int, adapter: Adapter | Sequence[Tensors] | None, base: Any = None) -> Bank:
    """Return the bank with an adapter in one slot. The given bank's arrays are donated: do not use it again.

    It is one compiled call, the same for every slot and adapter.

    Args:
        bank: the bank.
        slot: 1 to `bank.slots - 1`.
        adapter: an `Adapter`, the result of `prepare`, or None for the bare base.
        base: the model or parameters of the base. Only DoRA needs it, whose norm is computed here.

    Raises `AttachError` if the adapter does not fit: a larger rank, other targets, or a method whose adapters rows
    cannot choose.

    >>> import jax, jaxadapt
    >>> base, config = {"q": {"kernel": jnp.ones((4, 6))}}, jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> bank = create(base, config, slots=3)
    >>> bank = put(bank, 1, jaxadapt.init(config.replace(r=1), base, key=jax.random.key(0)))
    >>> jnp.abs(bank.arrays[0]["lora_A"]).sum((1, 2)) > 0
    Array([False,  True, False], dtype=bool)
    """
    _check_slot(bank, slot)
    rows = prepare(bank, adapter) if adapter is None or isinstance(adapter, Adapter) else tuple(adapter)
    return write_slot(bank, rows, slot, weights_read(bank, base))


def get(bank: Bank, slot: int, like: Adapter) -> Adapter:
    """Return the adapter in a slot, such as one that was trained there.

    Args:
        bank: the bank.
        slot: 1 to `bank.slots - 1`.
        like: the adapter that was put there, for its configuration, its targets and its ranks.

    Raises `AttachError` if the slot does not hold all of its tensors (a DoRA's magnitude).

    >>> import jax, jaxadapt
    >>> base, config = {"q": {"kernel": jnp.ones((4, 6))}}, jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config.replace(r=1), base, key=jax.random.key(0))
    >>> found = get(put(create(base, config, slots=3), 1, adapter), 1, adapter)
    >>> {path: bool((x == adapter.flat()[path]).all()) for path, x in found.flat().items()}
    {'q.kernel.lora_A': True, 'q.kernel.lora_B': True}
    """
    _check_slot(bank, slot)
    values = read_slot(bank.layout, bank.arrays, slot, like)
    return Adapter(like.config, paths.unflatten(values), like.keymap)


def _check_slot(bank: Bank, slot: int) -> None:
    if not 0 < operator.index(slot) < bank.slots:
        raise AttachError(f"slot: expected 1 to {bank.slots - 1}, found {slot}; slot 0 is the base")


def weights_read(bank: Bank, base: Any) -> dict[str, Any]:
    """Return `{leaf: array}` of the base weights that `put` computes with; raise `AttachError` if they are missing."""
    read = [place.row.leaf for place in bank.layout.places if place.reads]
    if read and base is None:
        raise AttachError("base: expected the base's model or parameters, because the norm of a DoRA needs them")
    leaves = carrier(base).base().leaves if read else {}
    return {leaf: leaves[leaf] for leaf in read}


def prepare(bank: Bank, adapter: Adapter | None) -> tuple[Tensors, ...]:
    """Return an adapter's tensors as arrays of numpy with the bank's shapes, for `put`; raise its errors.

    >>> import jaxadapt
    >>> base = {"q": {"kernel": jnp.ones((4, 6))}}
    >>> bank = create(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=3)
    >>> prepare(bank, None)[0]["scale"]
    array(0., dtype=float32)
    """
    if adapter is None:
        return tuple(blank(place) for place in bank.layout.places)
    return fit_adapter(bank.layout, adapter)


def write_slot(bank: Bank, rows: Sequence[Tensors], slot: int, weights: Mapping[str, Any]) -> Bank:
    """Return the bank with prepared tensors in one slot. The arrays with slots are donated, the shared ones are not."""
    written = write(dataclasses.replace(bank, shared=()), rows, np.int32(slot), weights)
    return dataclasses.replace(written, shared=bank.shared)


@functools.partial(jax.jit, donate_argnums=0)
def write(bank: Bank, rows: Sequence[Tensors], slot: Any, weights: Mapping[str, Any]) -> Bank:
    """Write one adapter into a slot of every array."""
    written: list[Tensors] = []
    for place, arrays, new in zip(bank.layout.places, bank.arrays, rows, strict=True):
        new = place.prepare(new, quantized.to_dense(weights[place.row.leaf])) if place.reads else new
        changed: Tensors = {}
        for name, array in arrays.items():
            value = jax.lax.dynamic_update_index_in_dim(array, new[name].astype(array.dtype), slot, place.layers)
            target = place.shardings.get(name)
            changed[name] = value if target is None else jax.lax.with_sharding_constraint(value, target)
        written.append(changed)
    return Bank(tuple(written), bank.layout)
