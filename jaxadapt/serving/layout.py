"""The places of a bank: one method at one base leaf, with the shapes that every adapter is padded to.

Tensors that the adapters of a bank have in common, such as VeRA's random projections, have one copy for all slots. An
adapter that no place fits is refused with what can be done instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, Site, Sites
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.merging.factors import low_rank_form
from jaxadapt.methods.base import Start, get_method
from jaxadapt.models.call import RowLayout, RowSite

# ---------------------------------------------------------------- refusals


MERGE = "Merge the adapter into a base of its own (jaxadapt.merge)"
APPROXIMATE = (
    "Approximate the adapter by a plain LoRA (jaxadapt.merging.to_lora returns its errors), or merge it into a base of"
    " its own (jaxadapt.merge)"
)
LOAD = "Load the adapter into a model of its own (jaxadapt.load)"
FIT = (
    "Create the bank with configurations that cover the adapter, convert the adapter to a plain LoRA that fits"
    " (jaxadapt.merging.to_lora), or merge it into a base of its own (jaxadapt.merge)"
)


def add_kind(config: Config, slots: int) -> str:
    """Return the way out for an adapter of a kind that a bank of as many slots has no room for."""
    return (
        "Create the bank with room for this kind, too: pass its configuration beside the present ones"
        f" (jaxadapt.serving.create(base, [..., {config!r}], slots={slots})). Or merge the adapter into a base of its"
        " own (jaxadapt.merge)"
    )


class Refusal(NamedTuple):
    """A reason against an adapter, and the way out."""

    problem: str
    way_out: str


def find_refusals(sites: Iterable[Site]) -> list[Refusal]:
    """Return why the rows of a batch cannot each have their own adapter, for each site where they cannot."""
    return [found for site in sites if (found := _refuse(site)) is not None]


def _refuse(site: Site) -> Refusal | None:
    method = site.method
    if method.copies:
        return Refusal(
            f"{site.leaf}: a full or partial copy of the weight (modules_to_save, bias, trainable_token_indices)", MERGE
        )
    way_out = APPROXIMATE if site.effects.bias is None else MERGE
    form = "form with a separate adapter for each row"
    if method.rows == "no":
        return Refusal(f"{site.leaf}: {site.method.peft_type} has no {form}", way_out)
    if (kind := site.match.weight.kind) not in ("linear", "attention", "fused"):
        return Refusal(
            f"{site.leaf}: {site.method.peft_type} adapts a layer of kind {kind} here, not a matrix product", MERGE
        )
    try:
        effects = method.effects(method.row_hparams(site.hparams))
    except AttachError as error:
        return Refusal(f"{site.leaf}: {error}", LOAD)
    if effects.form == "weight" and method.rows == "call":
        return Refusal(f"{site.leaf}: this variant of {site.method.peft_type} has no {form}", way_out)
    return None


def raise_refused(refusals: Sequence[Refusal], what: str) -> None:
    """Raise `AttachError` with all refusals and their ways out, if there are any."""
    raise_listed(
        AttachError,
        f"{what}:",
        [each.problem for each in refusals],
        "\n" + ". ".join(dict.fromkeys(each.way_out for each in refusals)),
    )


# ---------------------------------------------------------------- shared


Shared = Mapping[str, np.ndarray]


def shared_of(given: Adapter | Config, sites: Sites) -> dict[str, np.ndarray]:
    """Return the tensors of a whole adapter, as arrays of numpy: its own, or those that follow from a configuration.

    Raises `AttachError` if training changes one, or if the configuration does not determine it, and `MismatchError` if
    one is too small for `sites`.
    """
    config = given.config if isinstance(given, Adapter) else given
    method = get_method(config)
    if trained := [each.tensor.name for each in sites.shared if each.tensor.trained]:
        raise AttachError(
            f"{config.peft_type} trains tensors of the whole adapter ({', '.join(trained)}), so the rows of a batch"
            " cannot each have their own"
        )
    if isinstance(given, Adapter):
        found = {name: np.asarray(x) for name, x in given.shared.items()}
        if found:
            method.shared(config, [site.target for site in sites], {name: x.shape for name, x in found.items()})
        return found
    drawn: dict[str, np.ndarray] = {}
    shapes = {each.tensor.name: each.entry.shape for each in sites.shared}
    for each in sites.shared:
        values = method.init(config, each.tensor, Start(each.entry.form.file_shape, shared=shapes))
        if isinstance(values, Draw):
            raise AttachError(
                f"cannot create the bank: {each.tensor.name} of {config.peft_type} does not follow from the"
                " configuration. Pass an adapter that has it in place of the configuration"
            )
        drawn[each.tensor.name] = np.asarray(values)
    return drawn


def find_shared(bank: Sequence[tuple[str, Shared]], peft_type: str, own: Shared) -> int | None:
    """Return the number of the bank's shared tensors that are those of an adapter; None if the bank has no such ones.

    Methods use the first rows and columns of a shared tensor, so of two sizes the common part must be equal.
    """
    return next(
        (n for n, (known, tensors) in enumerate(bank) if known == peft_type and not compare_shared(tensors, own)), None
    )


def _require_shared(bank: Sequence[tuple[str, Shared]], adapter: Adapter, sites: Sites) -> int | None:
    """Call `find_shared`, and raise `AttachError`, which says what differs, if the bank has no such tensors.

    Return None for an adapter without any.
    """
    config, own = adapter.config, shared_of(adapter, sites)
    number = find_shared(bank, config.peft_type, own)
    if number is not None or not own:
        return number
    differences = (compare_shared(tensors, own) for peft_type, tensors in bank if peft_type == config.peft_type)
    closest = min(differences, key=len, default=[f"the bank has no {name}" for name in own])
    rank = get_method(config).plain_rank(config)
    plain = (
        "" if rank is None else f", or convert the adapter to a plain LoRA of rank {rank}, which computes the same"
        " (jaxadapt.merging.to_lora(adapter, params=base)), for a bank of LoRAs"
    )  # fmt: skip
    raise AttachError(
        f"cannot put the adapter into the bank: all adapters of a {config.peft_type} bank use one copy of the tensors"
        f" that belong to no module, and this adapter has others:\n{paths.bullets(closest)}\nCreate the bank with this"
        f" adapter beside or in place of the configuration (jaxadapt.serving.create(base, [config, adapter]))"
        f"{plain}"
    )


def compare_shared(bank: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor in whose common part an adapter differs from a bank."""
    problems = [
        f"{name}: {'the bank' if name in adapter else 'the adapter'} lacks it"
        for name in sorted(bank.keys() ^ adapter.keys())
    ]
    for name in sorted(bank.keys() & adapter.keys()):
        ours, theirs = np.asarray(bank[name]), np.asarray(adapter[name])
        shapes = f"shape {list(theirs.shape)}, the bank's is {list(ours.shape)}"
        if ours.ndim != theirs.ndim:
            problems.append(f"{name}: {shapes}")
            continue
        common = tuple(slice(min(sizes)) for sizes in zip(ours.shape, theirs.shape, strict=True))
        if np.array_equal(ours[common], theirs[common]):
            continue
        distance = np.abs(ours[common].astype(np.float64) - theirs[common].astype(np.float64))
        count = int((distance != 0).sum())  # NaN differs from every value
        problems.append(
            f"{name}: {count} of {distance.size} values differ, by up to {float(distance.max()):.3g} ({shapes})"
        )
    return problems


# ---------------------------------------------------------------- layout


Shape = tuple[int, ...]
Tensors = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One method at one base leaf.

    Attributes:
        row: what the model's layers need to apply it.
        site: the site of the bank's configuration.
        weight: the shape and dtype of the base leaf.
        sharding: the sharding of the base leaf; None if it has none.
        stored: `{tensor: shape and dtype}` of one adapter as the host prepares it, stacked axes first.
    """

    row: RowSite
    site: Site
    weight: jax.ShapeDtypeStruct
    sharding: Any
    stored: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def layers(self) -> int:
        """The number of stacked axes, which is the position of the axis of slots."""
        return len(self.row.stack)

    @property
    def reads(self) -> bool:
        """True if `put` needs the base weight."""
        return self.row.method.rows == "put" and self.site.effects.reads

    def neutral(self, name: str) -> float:
        """Return the value of a tensor in an adapter that changes nothing."""
        return self.row.method.row_neutral.get(name, 0.0)

    def prepare(self, params: Tensors, w: Any) -> Tensors:
        """Return one slot's tensors on the devices, from those of `stored` and the base leaf."""

        def one_layer(params: Tensors, w: Any) -> Tensors:
            return self.row.method.prepare_rows(self.row.hparams, params, self.row.axes, w)

        mapped: Any = one_layer
        for position, axis in enumerate(self.row.stack):
            mapped = jax.vmap(mapped, in_axes=(position, axis), out_axes=position)
        return mapped(params, w)

    @functools.cached_property
    def kept(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """`{tensor: shape and dtype}` of one slot on the devices; not `stored` where `put` computes with the weight."""
        prepared = jax.eval_shape(self.prepare, self.stored, self.weight) if self.reads else self.stored
        return {name: jax.ShapeDtypeStruct(x.shape, self.stored[name].dtype) for name, x in prepared.items()}

    @functools.cached_property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """`{tensor: sharding}` of the arrays with all slots: those of a model's tensors, replicated over the slots.

        It is empty for a base without shardings.
        """
        base = self.sharding
        if not isinstance(base, jax.sharding.NamedSharding):
            return {}
        shardings = dict.fromkeys(self.kept, jax.sharding.NamedSharding(base.mesh, jax.sharding.PartitionSpec()))
        for name, form in _forms(self.site).items():
            if name in shardings:
                axes = initial_values.propagate_axes(self.site.match, form, tuple(base.spec))
                spec = [axes[axis] for axis in _stack_first_order(self.site, len(form.shape))]
                spec.insert(self.layers, None)
                shardings[name] = jax.sharding.NamedSharding(base.mesh, jax.sharding.PartitionSpec(*spec))
        return shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The places of a bank and its number of slots. It never changes, and is compared by identity.

    Attributes:
        places: the places.
        slots: the number of slots, with slot 0.
        shared: `(peft_type, {tensor: array})` of the tensors that all adapters of a method have in common, on the host.
            A place has the number of its own in `row.shared`.
    """

    places: tuple[Place, ...]
    slots: int
    shared: tuple[tuple[str, Shared], ...] = ()

    @functools.cached_property
    def rows(self) -> RowLayout:
        """The sites as the layers need them."""
        return RowLayout(tuple(place.row for place in self.places))

    @functools.cached_property
    def by_leaf(self) -> dict[str, list[Place]]:
        """`{base leaf: its places}`."""
        return paths.group((place.row.leaf, place) for place in self.places)

    @functools.cached_property
    def slot_bytes(self) -> int:
        """The bytes of one adapter on the devices."""
        return sum(x.size * x.dtype.itemsize for place in self.places for x in place.kept.values())


def make_place(site: Site, weight: Any, base_sharding: Any, dtype: Any, shared: int | None = None) -> Place:
    """Return the place of a site, for a base leaf with the shape and dtype of `weight`.

    `shared` is the number of its tensors in `Layout.shared`.
    """
    row = RowSite(
        site.leaf, tuple(site.match.stack), site.method, site.method.row_hparams(site.hparams), site.axes, shared=shared
    )
    spec = jax.ShapeDtypeStruct(tuple(weight.shape), weight.dtype)
    zeros = {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape in site.shapes.items()}
    params = site.method.row_params(site.hparams, _stack_first(site, zeros), _entries(site, spec.shape))
    stored = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    return Place(row, site, spec, base_sharding, stored)


def _forms(site: Site) -> dict[str, FileLayout]:
    """Return `{tensor: its layout in a file}` of a site."""
    return {tensor.name: entry.form for tensor, entry in zip(site.tensors, site.entries, strict=True)}


def _stack_first_order(site: Site, rank: int) -> list[int]:
    stack = list(site.match.stack)
    return stack + [axis for axis in range(rank) if axis not in stack]


def _stack_first(site: Site, params: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a site as arrays of numpy, with the stacked axes first."""
    return {name: np.transpose(np.asarray(x), _stack_first_order(site, np.ndim(x))) for name, x in params.items()}


def _entries(site: Site, shape: Shape) -> Shape:
    """Return the sizes of the stacked axes and of the batch axes of a site."""
    unstacked = tuple(size for axis, size in enumerate(shape) if axis not in site.match.stack)
    return tuple(shape[axis] for axis in site.match.stack) + site.axes.sizes("batch", unstacked)


# ---------------------------------------------------------------- one adapter

CANNOT_PUT = "cannot put the adapter into the bank"


def fit_adapter(layout: Layout, adapter: Adapter) -> tuple[Tensors, ...]:
    """Return an adapter's tensors on the host, padded to the bank's shapes, with neutral ones where it has none.

    Raises `AttachError`, listing all problems, if the adapter does not fit the bank.
    """
    adapter, sites, shared = _require_rows(layout, adapter)
    tensors = adapter.sites
    chosen: dict[Place, Tensors] = {}
    problems: list[Refusal] = []
    for site in sites:
        place = None
        try:
            place = _find_place(layout, site, shared)
            chosen[place] = _fit_site(place, site, tensors[site.leaf])
        except AttachError as error:
            other_kind = place is None and site.leaf in layout.by_leaf
            problems.append(Refusal(str(error), add_kind(adapter.config, layout.slots) if other_kind else FIT))
    raise_refused(problems, CANNOT_PUT)
    return tuple(chosen.get(place) or blank(place) for place in layout.places)


def _require_rows(layout: Layout, adapter: Adapter) -> tuple[Adapter, Sites, int | None]:
    """Return an adapter in the form in which rows have it, its sites, and the number of its shared tensors.

    Raises `AttachError` if rows cannot each have such an adapter.
    """
    sites = sites_of(adapter)
    if not sites:  # a prompt, whose tensors belong to no weight
        raise AttachError(
            f"{CANNOT_PUT}: {adapter.config.peft_type} changes no weight, and rows cannot each have one. {LOAD}"
        )
    raise_refused(find_refusals(sites), CANNOT_PUT)
    if not becomes_lora(adapter.config):
        return adapter, sites, _require_shared(layout.shared, adapter, sites)
    raise_refused([Refusal(_no_place(leaf), FIT) for leaf in adapter.sites if leaf not in layout.by_leaf], CANNOT_PUT)
    shapes = {place.row.leaf: tuple(place.weight.shape) for place in layout.places}
    if (plain := low_rank_form(adapter, shapes)) is None:
        raise AttachError(f"{CANNOT_PUT}:\n  it adapts experts that one array holds\n{MERGE}")
    return plain, sites_of(plain), None


def becomes_lora(config: Config) -> bool:
    """Return True if a bank holds an adapter of this configuration as a plain LoRA, which computes the same."""
    method = get_method(config)
    return method.rows == "put" and method.plain_rank(config) is not None


def _no_place(leaf: str) -> str:
    return f"{leaf}: the bank has no place at this weight"


def blank(place: Place) -> Tensors:
    """Return the tensors of an adapter that changes nothing, as `fit_adapter` returns them."""
    return {name: np.full(x.shape, place.neutral(name), x.dtype) for name, x in place.stored.items()}


def _find_place(layout: Layout, site: Site, shared: int | None) -> Place:
    """Return the place for a site of an adapter with these shared tensors."""
    if not (at_leaf := layout.by_leaf.get(site.leaf)):
        raise AttachError(_no_place(site.leaf))
    hparams = site.method.row_hparams(site.hparams)
    for place in at_leaf:
        if (place.row.method, place.row.hparams, place.row.shared) == (site.method, hparams, shared):
            return place
    own = _fields(hparams, shared)
    found: list[str] = []
    differ: dict[str, Any] = {}
    for row in (place.row for place in at_leaf):
        fields = _fields(row.hparams, row.shared).items() if row.method == site.method else ()
        others = {name: x for name, x in fields if x != own[name]}
        differ |= {name: own[name] for name in others}
        found.append(_kind(row.method.peft_type, others))
    raise AttachError(
        f"{site.leaf}: the adapter is {_kind(site.method.peft_type, differ)}; the bank has {', '.join(found)}"
    )


def _fields(hparams: Any, shared: int | None) -> dict[str, Any]:
    """Return by name what adapters of one method must have in common to use the same place."""
    fields = dataclasses.asdict(hparams) if dataclasses.is_dataclass(hparams) and not isinstance(hparams, type) else {}
    return {**(fields.pop("own", None) or {}), **fields, "shared": shared}


def _kind(peft_type: str, fields: Mapping[str, Any]) -> str:
    return peft_type + (f" ({', '.join(f'{name}={x}' for name, x in fields.items())})" if fields else "")


def _fit_site(place: Place, site: Site, params: Mapping[str, Any]) -> Tensors:
    padded = blank(place)
    for name, (x, index) in _locate(place, site, params).items():
        stored = padded[name]
        with np.errstate(over="ignore"):
            stored[index] = x
        fits = stored.dtype == x.dtype or regions.is_finite(stored)
        if not fits and (lost := regions.count_lost(np.asarray(x), stored[index])):
            raise AttachError(f"{site.leaf}: {lost} finite values of {name} overflow the bank's {stored.dtype}")
    return padded


_Located = dict[str, tuple[Any, tuple[Any, ...]]]
"""`{tensor: (array, the index of its values in the bank's padded array)}` of an adapter at one place."""


def _locate(place: Place, site: Site, params: Mapping[str, Any]) -> _Located:
    """Return the tensors of an adapter for rows, and where they are in the bank's.

    Raises `AttachError` for a tensor that the bank lacks, and for sizes that do not fit.
    """
    own, bank, forms = site.axes, place.row.axes, _forms(site)
    if dataclasses.replace(own, parts=None, torch=None) != dataclasses.replace(bank, parts=None, torch=None):
        raise AttachError(f"{site.leaf}: the adapter's axes {own} are not the bank's {bank}")
    rows = site.method.row_params(site.hparams, _stack_first(site, params), _entries(site, place.weight.shape))
    if unknown := rows.keys() - place.stored.keys():
        raise AttachError(f"{site.leaf}: the bank has no tensor {', '.join(sorted(unknown))}")
    found: _Located = {}
    for name, x in rows.items():
        order = _stack_first_order(site, x.ndim)
        letters = [forms[name].left[axis] for axis in order] if name in forms else ["entry"] * x.ndim
        index: list[Any] = [slice(size) for size in x.shape]
        if own.parts != bank.parts:
            axis = place.layers  # of the fused parts, the first batch axis
            in_leaf = _stack_first_order(site, len(place.weight.shape))[axis + own.batch_axes[0]]
            all_parts = list(range(place.weight.shape[in_leaf]) if bank.parts is None else bank.parts)
            if missing := sorted(set(own.parts or range(len(all_parts))) - set(all_parts)):
                raise AttachError(f"{site.leaf}: the bank lacks the fused parts {missing}")
            index[axis] = np.array([all_parts.index(part) for part in own.parts or range(x.shape[axis])])
        if misfits := [
            f"{letter.removeprefix('~')} is {size}, the bank has {room}"
            for letter, size, room, at in zip(letters, x.shape, place.stored[name].shape, index, strict=True)
            if isinstance(at, slice)
            and (size > room if letter.removeprefix("~") in site.method.row_padded else size != room)
        ]:
            raise AttachError(f"{site.leaf}.{name}: {'; '.join(misfits)}")
        found[name] = (x, tuple(index))
    return found


def read_slot(layout: Layout, arrays: Sequence[Mapping[str, Any]], slot: int, like: Adapter) -> dict[str, Any]:
    """Return `{path: array}` of the adapter in a slot, with the sites of `like`: the inverse of `fit_adapter`."""
    if becomes_lora(like.config):
        raise AttachError(
            f"cannot read a {like.config.peft_type} from the bank, which holds it as a plain LoRA. Pass"
            " like=jaxadapt.merging.to_lora(adapter, params=base).adapter"
        )
    like, sites, shared = _require_rows(layout, like)
    values: dict[str, Any] = {paths.join(SHARED_NODE, name): x for name, x in like.shared.items()}
    tensors, held = like.sites, dict(zip(layout.places, arrays, strict=True))
    problems: list[str] = []
    for site in sites:
        try:
            place = _find_place(layout, site, shared)
            rows = _locate(place, site, tensors[site.leaf])
            names = {tensor.name for tensor in site.tensors if tensor.in_file}
            if place.reads or names - rows.keys():
                lost = "the magnitude of a DoRA" if place.reads else ", ".join(sorted(names - rows.keys()))
                raise AttachError(f"{site.leaf}: a slot does not hold {lost}")
            for name in (tensor.name for tensor in site.tensors):
                if name in names:
                    x = jax.lax.index_in_dim(held[place][name], slot, place.layers, keepdims=False)[rows[name][1]]
                    x = jnp.moveaxis(x, range(place.layers), site.match.stack)
                else:  # it follows from the configuration
                    x = tensors[site.leaf][name]
                values[paths.join(site.leaf, name)] = x
        except AttachError as error:
            problems.append(str(error))
    raise_listed(AttachError, "cannot read the adapter from the bank:", problems)
    return values
