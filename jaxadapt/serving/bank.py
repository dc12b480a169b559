"""Many adapters of one base as arrays with an axis of slots, the rows of a batch that choose among the slots, and a
model that takes them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.arrays import quantized, tensor_source
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import require_original_base
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging.factors import plain_config
from jaxadapt.methods.applied import IDS, WEIGHTS, Implementation, sort_ids, take_slots
from jaxadapt.methods.base import get_method
from jaxadapt.models import nnx_adapters, planning
from jaxadapt.models.call import Rows
from jaxadapt.models.carriers import Model, Module, Wrapper, carrier
from jaxadapt.models.linen_wrapper import Adapted
from jaxadapt.serving.layout import (
    CANNOT_PUT,
    Layout,
    Place,
    Refusal,
    Shared,
    Tensors,
    becomes_lora,
    blank,
    find_refusals,
    find_shared,
    fit_adapter,
    make_place,
    raise_refused,
    read_slot,
    shared_of,
)

# ---------------------------------------------------------------- selection


_NAMES = ("gather", "layer", "mask", "sorted")


def _as_int32(ids: Any, slots: int) -> Any:
    """Return ids as an array of JAX, which would cut the upper bits of an integer of 64 bits: those are no slot."""
    on_device = any(isinstance(each, jax.Array) for each in jax.tree.leaves(ids))
    found = jnp.asarray(ids) if on_device else np.asarray(ids)
    if found.ndim not in (1, 2) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise AttachError(
            "ids: expected integers of shape (rows) or (rows, time), or (rows, adapters) with weights, found"
            f" {found.dtype} of shape {list(found.shape)}"
        )
    if on_device:
        return found
    return jnp.asarray(np.where((found < 0) | (found >= slots), slots, found.astype(np.int64)).astype(np.int32))


def _require_grouped(bank: Bank, implementation: Implementation) -> Implementation:
    """Return the grouped product; raise `AttachError` if the bank or the platform does not have one."""
    if others := sorted(
        {
            place.row.method.peft_type
            for place in bank.layout.places
            if place.row.method.row_pair(place.row.hparams, place.kept) is None
        }
    ):
        raise AttachError(
            f"sorted segments need low-rank pairs; the bank has room for other forms of {', '.join(others)} (a DoRA, a"
            " bias, a vector). Use implementation='gather' or 'mask'"
        )
    if callable(implementation):
        return implementation
    if jax.default_backend() == "cpu":
        raise AttachError(
            "implementation='sorted': jax.lax.ragged_dot multiplies every token by all slots on CPU. Use 'gather', or"
            " pass a grouped product of your own"
        )
    return jax.lax.ragged_dot


def _check_mixture(bank: Bank, ids: Any, weights: Any, implementation: Implementation | None) -> Any:
    weights = jnp.asarray(weights, jnp.float32)
    if ids.ndim != 2 or weights.shape != ids.shape:
        raise AttachError(
            f"weights: expected the shape of ids, (rows, adapters), found {list(weights.shape)} for ids of shape"
            f" {list(ids.shape)}"
        )
    if implementation not in (None, "gather"):
        raise AttachError(f"implementation={implementation!r} takes no weights; leave the implementation out")
    raise_listed(
        AttachError,
        "a row can mix only adapters whose changes add up; the bank has room for others:",
        [
            f"{row.leaf}: {row.method.peft_type}"
            for row in bank.layout.rows.sites
            if row.method.effects(row.hparams).weight != "adds"
        ],
        "\nName one adapter for each row (jaxadapt.combine makes one of several LoRAs), or create a bank without these",
    )
    return weights


def _to_leaf(place: Place, x: Any) -> Any:
    """Return the stacked axes, which come first, to their places in the base leaf."""
    first = tuple(range(place.layers))
    return x if place.row.stack == first else jnp.moveaxis(x, first, place.row.stack)


def _repeat(place: Place, x: Any) -> Any:
    """Repeat an array for each of the stacked layers."""
    return _to_leaf(place, jnp.broadcast_to(x, (*(place.weight.shape[axis] for axis in place.row.stack), *x.shape)))


@jax.jit
def _gather_rows(bank: Bank, ids: Any, weights: Any = None) -> Sequence[Tensors]:
    """Gather the slot of each row, with the axes of the tensors in the order that products need.

    With the weights of several adapters in each row, gather their slots as they are, and repeat the weights for all
    layers.
    """

    def gather(place: Place, name: str, x: Any) -> Any:
        taken = take_slots(x, ids, place.layers)
        turned = weights is None and name in place.row.method.row_turned
        return _to_leaf(place, jnp.moveaxis(taken, -1, place.layers + 1) if turned else taken)

    return tuple(
        {name: gather(place, name, x) for name, x in arrays.items()}
        | ({} if weights is None else {WEIGHTS: _repeat(place, weights)})
        for place, arrays in zip(bank.layout.places, bank.arrays, strict=True)
    )


_sort = jax.jit(sort_ids, static_argnums=1)


# ---------------------------------------------------------------- bank


@jax.tree_util.register_dataclass
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
    layout: Layout = dataclasses.field(metadata={"static": True})
    shared: Sequence[Mapping[str, Any]] = ()

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
        ids = _as_int32(ids, self.slots)
        if implementation is not None and implementation not in _NAMES and not callable(implementation):
            raise AttachError(
                f"implementation: expected one of {', '.join(_NAMES)} or a function, found {implementation!r}"
            )
        rows = self.layout.rows
        if weights is not None:
            weights = _check_mixture(self, ids, weights, implementation)
            return Rows(_gather_rows(self, ids, weights), rows, "mixture", self.shared)
        if implementation is None:
            implementation = "gather" if ids.ndim == 1 else "mask"
        if implementation == "gather" and ids.ndim == 1:
            return Rows(_gather_rows(self, ids), rows, shared=self.shared)
        if implementation in ("gather", "layer") and ids.ndim == 2:
            raise AttachError(
                f"implementation={implementation!r} takes one adapter for each row, but the ids have the shape"
                f" {list(ids.shape)}. Use 'mask' for ids of tokens, or pass weights for several adapters in each row"
            )
        data: Tensors = {IDS: ids}
        if implementation not in ("layer", "mask"):
            data |= _sort(ids, self.slots)
            implementation = _require_grouped(self, implementation)
        arrays = [
            {name: _to_leaf(place, x) for name, x in tensors.items()}
            | {name: _repeat(place, x) for name, x in data.items()}
            for place, tensors in zip(self.layout.places, self.arrays, strict=True)
        ]
        return Rows(tuple(arrays), rows, implementation, self.shared)


def create(
    model: Any,
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
        model: an NNX model, Linen variables or base parameters, or the shapes of any of them. The bank's arrays are
            sharded as its weights ask.
        configs: what the bank has room for: for each kind of adapter (LoRA, DoRA, IA3) a configuration with the largest
            rank and all targets. Alphas and dropout have no effect. A configuration whose method computes the factors
            of its change (`merging.to_lora`), but has no form for rows, makes room for a LoRA of that rank. An adapter
            in place of a configuration also gives its tensors that belong to no module, such as VeRA's projections;
            those of a configuration are those of a new adapter.
        slots: the number of slots, with slot 0.
        keymap: as in `jaxadapt.adapt`.
        dtype: the dtype of the tensors; scales are float32.
        stack_axes, example: as in `jaxadapt.adapt`.

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
    held, dtype = carrier(model).base(), tensor_source.float_dtype(dtype)
    places: list[Place] = []
    problems: list[Refusal] = []
    shared: list[tuple[str, Shared]] = []
    for given in [configs] if isinstance(configs, Config | Adapter) else configs:
        config = given.config if isinstance(given, Adapter) else given
        if becomes_lora(config):
            given = config = plain_config(config, get_method(config).plain_rank(config) or 1)
        _, sites = planning.plan_adapter(held, config, keymap, stack_axes, example)
        refused = find_refusals(sites)
        problems += refused
        if not refused:
            own = shared_of(given, sites)
            number = find_shared(shared, config.peft_type, own)
            if own and number is None:
                number = len(shared)
                shared.append((config.peft_type, own))
            places += [make_place(s, held.leaves[s.leaf], held.shardings.get(s.leaf), dtype, number) for s in sites]
    raise_refused([*problems, *_find_twice(places)], "cannot create the bank")
    everywhere = next(
        (
            jax.sharding.NamedSharding(x.mesh, jax.sharding.PartitionSpec())
            for x in held.shardings.values()
            if isinstance(x, jax.sharding.NamedSharding)
        ),
        None,
    )
    return Bank(
        arrays=tuple(_empty(place, slots) for place in places),
        layout=Layout(tuple(places), slots, tuple(shared)),
        shared=jax.tree.map(
            lambda x: jax.device_put(jnp.asarray(x, dtype), everywhere), tuple(dict(tensors) for _, tensors in shared)
        ),
    )


def _find_twice(places: Sequence[Place]) -> list[Refusal]:
    kinds = [(place.row.leaf, place.row.method.peft_type, place.row.hparams, place.row.shared) for place in places]
    return [
        Refusal(f"{leaf}: two of the configurations have the same kind of {method}", "Leave the smaller one out")
        for number, (leaf, method, *rest) in enumerate(kinds)
        if (leaf, method, *rest) in kinds[:number]
    ]


def _empty(place: Place, slots: int) -> Tensors:
    at = place.layers
    return {
        name: jnp.full(
            (*x.shape[:at], slots, *x.shape[at:]), place.neutral(name), x.dtype, device=place.shardings.get(name)
        )
        for name, x in place.kept.items()
    }


def put(
    bank: Bank,
    slot: int,
    adapter: Adapter | Sequence[Tensors] | None,
    base: Any = None,
    *,
    base_is_changed: bool = False,
) -> Bank:
    """Return the bank with an adapter in one slot. The given bank's arrays are donated: do not use it again.

    It is one compiled call, the same for every slot and adapter.

    Args:
        bank: the bank.
        slot: 1 to `bank.slots - 1`.
        adapter: an `Adapter`, the result of `prepare`, or None for the bare base.
        base: the model or parameters of the base. Only DoRA needs it, whose norm is computed here.
        base_is_changed: True for an adapter whose start took a part out of the base weights (PiSSA, OLoRA, …), if the
            bank's base has the weights without it.

    Raises `ConfigError` for such an adapter without `base_is_changed`. Raises `AttachError` if the adapter does not
    fit: a larger rank, other targets, or a method whose adapters rows cannot choose.

    >>> import jax, jaxadapt
    >>> base, config = {"q": {"kernel": jnp.ones((4, 6))}}, jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> bank = create(base, config, slots=3)
    >>> bank = put(bank, 1, jaxadapt.init(base, config.replace(r=1), key=jax.random.key(0)))
    >>> jnp.abs(bank.arrays[0]["lora_A"]).sum((1, 2)) > 0
    Array([False,  True, False], dtype=bool)
    """
    _check_slot(bank, slot)
    rows = (
        prepare(bank, adapter, base_is_changed=base_is_changed)
        if adapter is None or isinstance(adapter, Adapter)
        else tuple(adapter)
    )
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
    >>> adapter = jaxadapt.init(base, config.replace(r=1), key=jax.random.key(0))
    >>> found = get(put(create(base, config, slots=3), 1, adapter), 1, adapter)
    >>> {path: bool((x == adapter.flat()[path]).all()) for path, x in found.flat().items()}
    {'q.kernel.lora_A': True, 'q.kernel.lora_B': True}
    """
    _check_slot(bank, slot)
    return Adapter(like.config, paths.unflatten(read_slot(bank.layout, bank.arrays, slot, like)), like.keymap)


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


def prepare(bank: Bank, adapter: Adapter | None, *, base_is_changed: bool = False) -> tuple[Tensors, ...]:
    """Return an adapter's tensors as NumPy arrays with the bank's shapes, for `put`.

    The arguments are those of `put`. Raises its errors.

    >>> import jaxadapt
    >>> base = {"q": {"kernel": jnp.ones((4, 6))}}
    >>> bank = create(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=3)
    >>> prepare(bank, None)[0]["scale"]
    array(0., dtype=float32)
    """
    if adapter is not None and not base_is_changed:
        require_original_base(
            adapter.config, CANNOT_PUT, "Pass base_is_changed=True if the base of the bank has the changed weights"
        )
    return tuple(map(blank, bank.layout.places)) if adapter is None else fit_adapter(bank.layout, adapter)


def write_slot(bank: Bank, rows: Sequence[Tensors], slot: int, weights: Mapping[str, Any]) -> Bank:
    """Return the bank with prepared tensors in one slot. The arrays with slots are donated, the shared ones are not."""
    return dataclasses.replace(bank, arrays=write(bank.arrays, bank.layout, rows, np.int32(slot), weights))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def write(
    slots: Sequence[Mapping[str, Any]], layout: Layout, rows: Sequence[Tensors], slot: Any, weights: Mapping[str, Any]
) -> tuple[Tensors, ...]:
    """Write one adapter into a slot of every array."""
    written: list[Tensors] = []
    for place, arrays, new in zip(layout.places, slots, rows, strict=True):
        new = place.prepare(new, quantized.to_dense(weights[place.row.leaf])) if place.reads else new
        changed: Tensors = {}
        for name, array in arrays.items():
            target = place.shardings.get(name)
            # On a mesh with Explicit axes, the update must have the sharding of the array.
            update = jax.device_put(jnp.expand_dims(new[name].astype(array.dtype), place.layers), target)
            value = jax.lax.dynamic_update_slice_in_dim(array, update, slot, place.layers)
            changed[name] = value if target is None else jax.lax.with_sharding_constraint(value, target)
        written.append(changed)
    return tuple(written)


# ---------------------------------------------------------------- routing


_EXPECTED = "an NNX model or a Linen module"


class RowsByName(abc.ABC):
    """Adapters by name, such as an `AdapterPool`."""

    @abc.abstractmethod
    def rows(
        self, adapter_names: Sequence[str | Mapping[str, float] | None], *, wait: float = 0.0
    ) -> contextlib.AbstractContextManager[Rows]:
        """Return a context with the tensors of the adapters of a batch's rows; see `AdapterPool.rows`."""


def attach(model: Any, bank: Bank) -> Any:
    """Let a model take its adapters from a bank, row by row.

    NNX: changes the model in place and returns it. Linen: returns a wrapper with the module's `init` and `apply`. Until
    `route` gives it rows, a call raises `AttachError`. Adapters that are attached otherwise act in every row.

    Raises `AttachError` if the model lacks a weight of the bank, or has a bank already.

    >>> from flax import nnx as fnnx
    >>> import jaxadapt
    >>> net = fnnx.Dict(q_proj=fnnx.Linear(4, 6, rngs=fnnx.Rngs(0)))
    >>> bank = jaxadapt.serving.create(net, jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), slots=2)
    >>> type(attach(net, bank).q_proj).__name__
    'AdaptedLinear'
    """
    held = carrier(model)
    if isinstance(held, Model):
        nnx_adapters.attach_rows(model, bank.layout.rows)
        return model
    if not isinstance(held, Module):
        raise held.unsupported(_EXPECTED)
    wrapper = model if isinstance(held, Wrapper) else Adapted(model, (), ())
    if wrapper.layout is not None:
        raise AttachError("these layers cannot take a bank: the module has a bank already; call detach first")
    return dataclasses.replace(wrapper, layout=bank.layout.rows)


def detach(model: Any) -> Any:
    """Remove the bank of a model, and return the model: NNX in place, Linen the module or wrapper before `attach`.

    A model without a bank raises no error and is returned unchanged.

    >>> import flax.linen, jaxadapt, numpy
    >>> base = {"kernel": numpy.zeros((4, 6))}
    >>> bank = jaxadapt.serving.create({"q": base}, jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=2)
    >>> detach(attach(flax.linen.Dense(6), bank)).features
    6
    """
    held = carrier(model)
    if isinstance(held, Model):
        nnx_adapters.detach_rows(model)
        return model
    if not isinstance(held, Wrapper):
        raise held.unsupported(_EXPECTED + " with a bank")
    return dataclasses.replace(model, layout=None, rows=None) if model.adapters else model.module


@contextlib.contextmanager
def route(
    model: Any, rows: Rows | RowsByName, *, adapter_names: Sequence[str | Mapping[str, float] | None] | None = None
) -> Generator[Any]:
    """Give each row of a batch its adapter within a context. The context's value is the model to call.

    NNX: stores the rows beside the weights, and removes them at the end, also after an error. Linen: returns a wrapper
    with the rows. Under `jax.jit`, make `rows` an argument and enter the context inside the function; other rows of as
    many adapters then do not compile it again. The rows are the first axis of the model's inputs.

    Args:
        model: a model that `attach` prepared.
        rows: the result of `Bank.select`, or an `AdapterPool` with `adapter_names`.
        adapter_names: the adapters of the rows, as in PEFT's `forward(adapter_names=…)` and `AdapterPool.rows`. They
            are leased for the time of the context, which must be outside `jax.jit`.

    Raises `AttachError` if the model has no bank, or another one.

    >>> import jax.numpy as jnp, jaxadapt
    >>> from flax import nnx as fnnx
    >>> net, x = fnnx.Dict(q_proj=fnnx.Linear(4, 6, rngs=fnnx.Rngs(0))), jnp.ones((2, 4))
    >>> y = net.q_proj(x)
    >>> bank = jaxadapt.serving.create(net, jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), slots=2)
    >>> with route(attach(net, bank), bank.select([0, 0])):
    ...     bool((net.q_proj(x) == y).all())
    True
    """
    if isinstance(rows, RowsByName):
        if adapter_names is None:
            raise AttachError("adapter_names: expected the name of each row's adapter, found None; pass it with a pool")
        with rows.rows(adapter_names) as leased, route(model, leased) as routed:
            yield routed
        return
    if not isinstance(rows, Rows) or adapter_names is not None:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            "rows: expected the result of Bank.select, or a pool with adapter_names, found"
            f" {type(rows).__name__}{'' if adapter_names is None else ' with adapter_names'}"
        )
    held = carrier(model)
    if isinstance(held, Wrapper):
        if model.layout is None:
            raise AttachError("the module has no bank; call attach(module, bank) first")
        rows.check_layout(model.layout)
        yield dataclasses.replace(model, rows=rows)
        return
    if not isinstance(held, Model):
        raise held.unsupported(_EXPECTED + " with a bank")
    nnx_adapters.set_rows(model, rows)
    try:
        yield model
    finally:
        nnx_adapters.set_rows(model, None)
