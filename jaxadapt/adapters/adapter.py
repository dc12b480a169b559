"""An adapter in the model's layout, the recipe that gives its parameters meaning, and its sites.

`Adapter` holds parameters in the model's layout. `PeftTensors` holds the same content under PEFT's names and in
PyTorch's layout. Only a plan converts one into the other. A `Site` is one adapted leaf under one configuration: its
tensors, its hyperparameters, and their place in the plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxadapt.arrays.layout import Axes, FileLayout, TorchLayout
from jaxadapt.arrays.products import LAYER, needs_layer_number
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FileError, raise_as
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import GENERIC, PEFT_PREFIX, KeyMap, Match, from_data, tied_heads, to_data
from jaxadapt.keymaps.weight import MethodTensor, Modules
from jaxadapt.methods.applied import AppliedMethod
from jaxadapt.methods.base import METHODS, Effects, Method, Target

# ---------------------------------------------------------------- adapter


CONFIG_NODE = "~config"
"""The key of the node without leaves that carries a `Recipe` inside a Linen collection."""

SHARED_NODE = "~shared"
"""The key of the node with the tensors that belong to the whole adapter and not to one site."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The configuration and the keymap of an adapter: what gives its parameters their meaning.

    A pytree node without leaves: it survives jit, grad, optax, freeze and `flatten_dict` inside a tree. Equal recipes
    compute the same function and save the same `origin`. Other bookkeeping fields (`inference_mode`, …) take no part in
    the comparison, since jit would retrace for them. The hash is computed once, since jit asks for it leaf by leaf.

    `sites` is the number of adapted leaves, so that a part of an adapter is not taken for all of it; 0 if unknown.
    """

    config: Config
    keymap: KeyMap = GENERIC
    sites: int = 0

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.config, self.keymap))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Recipe)
            and self.config == other.config
            and self.keymap == other.keymap
            and self.sites == other.sites
            and self.origin == other.origin
        )

    @functools.cached_property
    def origin(self) -> tuple[Any, ...]:
        """The origin that a saved file records: task type, base model, revision.

        jit returns the recipe of the first adapter it saw among equal ones. Two recipes that would be saved differently
        must therefore not be equal, although they compute the same function.
        """
        return tuple(self.config.get(name) for name in ("task_type", "base_model_name_or_path", "revision"))

    def check_complete(self, count: int, name: str) -> None:
        """Raise `AttachError` if `count` is not the number of leaves that the adapter has."""
        if self.sites and count != self.sites:
            raise AttachError(
                f"this tree holds {count} of the {self.sites} weights that the adapter {name!r} adapts: saving or"
                " merging it would lose the others. Pass the full model, or all its variables"
            )

    def to_text(self) -> str:
        """Return the recipe as JSON text, for serializers that keep strings (flax's msgpack)."""
        return json.dumps({"config": self.config.to_dict(), "keymap": to_data(self.keymap), "sites": self.sites})

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Parse the text that `to_text` returns; raise `AttachError` for any other text."""
        with raise_as(AttachError, "cannot read the serialized adapter configuration", ValueError, KeyError, TypeError):
            data = json.loads(text)
            return cls(
                Config.from_dict(data["config"], "the serialized state"), from_data(data["keymap"]), int(data["sites"])
            )


def not_an_adapter(found: Any) -> AttachError:
    """Return the error for an argument that should be an `Adapter`."""
    return AttachError(
        f"expected an Adapter, found {type(found).__name__}. jaxadapt.from_peft(tensors, model) makes an Adapter of"
        " PeftTensors, such as jaxadapt.read(folder), and jaxadapt.extract(model) takes it out of a model. The model"
        " comes first, as in inject(model, adapter) and merge(model, adapter)"
    )


def collection_name(config: Config) -> str:
    """Return the name of a method's Linen collection and NNX attribute: "lora", "ia3", …"""
    return config.peft_type.lower()


def integers_name(collection: str) -> str:
    """Return the name of the Linen collection with the integer tensors of a collection's adapters.

    `jax.grad` refuses integers, so they are not among the parameters that it differentiates.

    >>> integers_name("shira")
    'shira_integers'
    """
    return f"{collection}_integers"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Adapter:
    """One method's trained parameters in the model's layout, with the recipe that gives them meaning.

    A frozen pytree: its leaves are the parameters; the configuration and the keymap are static.

    Args:
        config: the configuration, with PEFT's field names.
        params: nested dicts with the paths of the base model, where each adapted leaf is replaced by its tensors
            (`{"q_proj": {"kernel": {"lora_A": (r, in), "lora_B": (out, r)}}}`). If the Linen base has boxes
            (`nn.Partitioned`), each tensor is boxed as well; `flat` and `sites` return the arrays inside.
        keymap: the keymap that gives these leaves their PyTorch names.

    Tensors of the whole adapter, such as VeRA's projections, are under the key "~shared"; `shared` returns them.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> params = {"q": {"kernel": {"lora_A": np.zeros((2, 3)), "lora_B": np.zeros((4, 2))}}}
    >>> sorted(Adapter(config, params).collection["lora"]["default"])
    ['q', '~config']
    """

    config: Config
    params: Mapping[str, Any]
    keymap: KeyMap = GENERIC

    @functools.cached_property
    def _static(self) -> Recipe:
        # jit deduplicates equal static data, so it may return an equal configuration instead of this one.
        return Recipe(self.config, self.keymap)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Recipe]:
        """Flatten the adapter for JAX."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), self._static

    @classmethod
    def tree_unflatten(cls, recipe: Recipe, children: tuple[Any]) -> Adapter:
        """Rebuild the adapter that `tree_flatten_with_keys` flattened."""
        return cls(recipe.config, children[0], recipe.keymap)

    @property
    def recipe(self) -> Recipe:
        """The recipe of this adapter, with the number of its leaves."""
        return Recipe(self.config, self.keymap, len({path.rpartition(".")[0] for path in self.flat()} - {SHARED_NODE}))

    @property
    def collection(self) -> dict[str, dict[str, Any]]:
        """The Linen collection of this adapter under the name "default"; `named` takes another name."""
        return self.named("default")

    def named(self, name: str) -> dict[str, dict[str, Any]]:
        """Return `{"lora": {name: {..., "~config": recipe}}}`, to merge into Linen variables.

        Integer tensors, such as SHiRA's indices, have a collection of their own, `{"shira_integers": {name: ...}}`.
        """
        collection = collection_name(self.config)
        leaves = paths.flatten(self.params)
        integers = {path: x for path, x in leaves.items() if np.issubdtype(_unbox(x).dtype, np.integer)}
        if not integers:
            return {collection: {name: {**self.params, CONFIG_NODE: self.recipe}}}
        floats = paths.unflatten({path: x for path, x in leaves.items() if path not in integers})
        return {
            collection: {name: {**floats, CONFIG_NODE: self.recipe}},
            integers_name(collection): {name: paths.unflatten(integers)},
        }

    @classmethod
    def of_leaves(cls, config: Config, leaves: Mapping[str, Any], keymap: KeyMap) -> Adapter:
        """Return the adapter with these arrays, `{path: array}`, which are nested when `params` is first read."""
        self = object.__new__(cls)
        vars(self).update(config=config, keymap=keymap, _leaves=leaves)
        return self

    if not TYPE_CHECKING:  # the type of `params` is that of the field

        def __getattr__(self, name: str) -> Any:
            leaves = vars(self).get("_leaves") if name == "params" else None
            if leaves is not None:  # set before the other is removed: another thread may read them now
                vars(self).setdefault(name, paths.unflatten(leaves))
                vars(self).pop("_leaves", None)  # else arrays that the caller replaces in `params` would stay in memory
            if name not in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return vars(self)[name]

    def flat(self) -> dict[str, Any]:
        """Return `{"model.layers.0.q_proj.kernel.lora_A": array}`."""
        leaves = vars(self).get("_leaves") or paths.flatten(self.params)
        return {path: leaf if _is_array_type(type(leaf)) else _unbox(leaf) for path, leaf in leaves.items()}

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """`{base leaf: {tensor: array}}`, without the shared tensors."""
        return {leaf: tensors for leaf, tensors in by_leaf(self._arrays()).items() if leaf != SHARED_NODE}

    @property
    def shared(self) -> dict[str, Any]:
        """`{tensor: array}` of the tensors that belong to the whole adapter."""
        return {path.rpartition(".")[2]: x for path, x in self.flat().items() if path.startswith(f"{SHARED_NODE}.")}

    def _arrays(self) -> dict[str, Any]:
        """Return `flat()`. Raises `AttachError` for a value that is no array."""
        leaves = self.flat()
        for path, leaf in leaves.items():
            if not _is_array_type(type(leaf)) and not is_array(leaf):
                raise AttachError(
                    f"{path!r}: expected an array, found {type(leaf).__name__}; an adapter holds arrays only"
                )
        return leaves

    @property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        return {path: tuple(x.shape) for path, x in self._arrays().items()}

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """`{base leaf: {tensor: shape}}`; the shared tensors have the leaf "~shared"."""
        return by_leaf(self.leaf_shapes)


def by_leaf(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{base leaf: {tensor: value}}` from `{path: value}`."""
    parts = ((path.rpartition("."), value) for path, value in values.items())
    return paths.nest([(leaf, tensor, value) for (leaf, _, tensor), value in parts])


def _unbox(leaf: Any) -> Any:
    """Return the array in a box, which JAX sees as a node with one leaf; return any other value unchanged."""
    arrays = [leaf] if is_array(leaf) else jax.tree.leaves(leaf)
    return arrays[0] if len(arrays) == 1 else leaf


@contextlib.contextmanager
def name_donated_arrays(arrays: Mapping[str, Any]) -> Generator[None]:
    """Raise `AttachError` that names the arrays donated while the block read them, where JAX raises for one."""
    try:
        yield
    except (RuntimeError, FileError) as error:  # JAX raises a plain RuntimeError here, and Orbax wraps it
        deleted = [path for path, leaf in arrays.items() if isinstance(leaf, jax.Array) and leaf.is_deleted()]
        if not deleted or not isinstance(error.__cause__ if isinstance(error, FileError) else error, RuntimeError):
            raise
        raise AttachError(
            "these arrays were donated to a jitted function, and so deleted, while they were being saved. Save before"
            " the step that donates them, or save a copy (jax.tree.map(jnp.copy, adapter)):\n" + paths.bullets(deleted)
        ) from error


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@functools.cache
def _is_array_type(cls: type) -> bool:
    """Return True if all values of a type are arrays; `isinstance` of a JAX array takes a microsecond."""
    return issubclass(cls, _ARRAYS)


def is_array(leaf: Any) -> bool:
    """Return True for an array (JAX, numpy, a tracer) or an abstract `ShapeDtypeStruct`."""
    return isinstance(leaf, _ARRAYS)


# ---------------------------------------------------------------- site


Shape = tuple[int, ...]
Index = tuple[int, ...]
Covered = tuple[Match, dict[str, int], dict[Index, str]]
"""A leaf that a keymap covers: its match, its sizes, and the names of its modules (or parameters) by index."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted leaf under one configuration: its tensors, and the hyperparameters of its arithmetic.

    `method` is the configuration's own, or `FullCopy` or `TrainableTokens` where the adapter holds a copy. `named` has
    the PyTorch modules of the leaf's entries, or its parameters if they are adapted by name. `hparams` are the method's
    own (a scale, a flag).
    """

    match: Match
    method: Method
    named: Modules
    tensors: tuple[MethodTensor, ...]
    hparams: Any
    entries: tuple[plan.PlanEntry, ...]
    fan_in: int
    target: Target = dataclasses.field(compare=False, repr=False)

    @functools.cached_property
    def leaf(self) -> str:
        return self.match.leaf

    @functools.cached_property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        axes = self.match.axes
        return dataclasses.replace(axes, torch=torch_layout(self)) if self.method.torch_layout else axes

    @functools.cached_property
    def effects(self) -> Effects:
        """The changes that the method makes here."""
        return self.method.effects(self.hparams)

    @functools.cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules (or parameters) that it adapts."""
        return tuple(self.named)

    @functools.cached_property
    def layers(self) -> dict[str, int]:
        """`{module: index of its layer among those that the leaf stacks}`."""
        per_layer = math.prod(self.named.sizes)
        return {name: i // per_layer for i, name in enumerate(self.named.names) if name is not None}

    @functools.cached_property
    def axis_sizes(self) -> dict[str, int]:
        """The sizes of the axes of its tensors, by name."""
        return {name: size for entry in self.entries for name, size in entry.form.axis_sizes.items()}

    @functools.cached_property
    def weight_shape(self) -> tuple[int | None, ...]:
        """The shape of the weight, as far as the tensors state it."""
        return tuple(map(self.axis_sizes.get, self.match.weight.left))

    @functools.cached_property
    def stack_sizes(self) -> tuple[int, ...]:
        """The number of layers on each stacked axis."""
        return tuple(self.axis_sizes[name] for name in self.match.roles["stack"])

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """`{name: array}` of the arithmetic's inputs besides the parameters: the layers' indices, if layers differ."""
        if not needs_layer_number(self.hparams):
            return {}
        return {LAYER: np.arange(math.prod(self.stack_sizes), dtype=np.int32).reshape(self.stack_sizes)}

    @functools.cached_property
    def bound(self) -> tuple[BoundTensor, ...]:
        """The tensors with their entries in the plan."""
        return tuple(map(BoundTensor, self.tensors, self.entries))

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """`{tensor name: shape in the model}`, stacked axes included."""
        return {tensor.name: entry.shape for tensor, entry in self.bound}


class BoundTensor(NamedTuple):
    """One tensor of a site, or of the whole adapter, and its entry in the plan."""

    tensor: MethodTensor
    entry: plan.PlanEntry


class Sites(tuple[Site, ...]):
    """The sites of one adapter, with its shared tensors."""

    shared: tuple[BoundTensor, ...]
    method: Method | None
    keymap: KeyMap | None
    untargeted: tuple[str, ...]

    def __new__(
        cls,
        sites: Iterable[Site],
        shared: Iterable[BoundTensor] = (),
        method: Method | None = None,
        keymap: KeyMap | None = None,
        untargeted: Iterable[str] = (),
    ) -> Sites:
        """Create the value.

        Args:
            method: the method of the shared tensors.
            keymap: the keymap of the sites.
            untargeted: the modules and parameters that have tensors and that the configuration does not name.
        """
        self = super().__new__(cls, tuple(sites))
        self.shared, self.method, self.keymap, self.untargeted = tuple(shared), method, keymap, tuple(untargeted)
        return self

    @functools.cached_property
    def file_plan(self) -> plan.Plan:
        """The plan of the file that holds the tensors."""
        return plan.make_plan([entry for _, entry in file_entries(self)])

    @functools.cached_property
    def all_in_file(self) -> bool:
        """True if a file holds all tensors."""
        return all(tensor.in_file for tensor, _ in tensor_entries(self))

    @functools.cached_property
    def integers(self) -> dict[str, np.dtype[Any]]:
        """The dtypes of the file's tensors of integers, by key."""
        return {key: np.dtype(t.dtype) for t, e in file_entries(self) if t.dtype for key in e.keys}

    @functools.cached_property
    def copied_keys(self) -> frozenset[str]:
        """The keys of full copies (`modules_to_save`), which keep the file's dtype."""
        return frozenset(key for site in self if site.method.copies for entry in site.entries for key in entry.keys)


def shared_tensors(sites: Sequence[Site]) -> tuple[BoundTensor, ...]:
    """Return the shared tensors of an adapter's sites; a part of them has none."""
    return sites.shared if isinstance(sites, Sites) else ()


def adapted_modules(sites: Iterable[Site]) -> list[str]:
    """Return the modules (or parameters) that sites adapt, without those that they copy."""
    return [module for site in sites if not site.method.copies for module in site.modules]


def tensor_entries(sites: Sequence[Site]) -> list[BoundTensor]:
    """Return the tensors of an adapter's sites and the shared ones, with their entries."""
    return [*(each for site in sites for each in site.bound), *shared_tensors(sites)]


def file_entries(sites: Sequence[Site]) -> list[BoundTensor]:
    """Return the tensors that a file holds, with their entries."""
    return [each for each in tensor_entries(sites) if each.tensor.in_file]


SHARED_PREFIX = "base_model"
"""The start of the key of a shared tensor."""


def bind_shared(
    config: Config, method: Method, sites: Sequence[Site], found: Mapping[str, Shape]
) -> tuple[BoundTensor, ...]:
    """Return the tensors of the whole adapter; `found` are the shapes of existing ones, by name."""
    targets = [site.target for site in sites if not site.method.copies]
    shared: list[BoundTensor] = []
    for tensor in method.shared(config, targets, found):
        if tensor.from_base:
            raise AttachError(
                f"{method.peft_type}: {tensor.name} is a tensor of the whole adapter and cannot be from_base, because"
                " it belongs to no one weight; return it from `tensors`, or draw it in `init` without start.w"
            )
        own = {f"~{name}": size for name, size in tensor.own}
        left = tuple(f"~{name}" for name in tensor.axes if name != "batch")
        right = tuple(tuple(f"~{name}" for name in group) for group in tensor.torch)
        split = (0,) * tensor.numbered
        form = FileLayout(tuple(map(own.__getitem__, left)), left, right[len(split) :], split)
        keys = (f"{SHARED_PREFIX}{tensor.suffix}" if tensor.suffix.startswith(".") else tensor.suffix,)
        if tensor.numbered:
            keys = tuple(f"{keys[0]}.{i}" for i in range(form.shape[0]))
        if tensor.repeated:
            keys += tuple(f"{PEFT_PREFIX}{module}{tensor.suffix}" for module in adapted_modules(sites))
        shared.append(BoundTensor(tensor, plan.PlanEntry(paths.join(SHARED_NODE, tensor.name), form, keys)))
    return tuple(shared)


def bind_site(
    config: Config,
    method: Method,
    keymap: KeyMap,
    covered: Covered,
    targeted: Collection[Index],
    *,
    found: FileShapes | None = None,
    shapes: Mapping[str, Shape] | None = None,
    has_bias: bool | None = None,
) -> Site:
    """Return the site of one leaf under a configuration.

    Args:
        covered: the leaf. Its sizes cover the braced axes at least.
        targeted: the indices of the adapted or copied entries; empty means all.
        found: the shapes of the tensors in an adapter's file.
        shapes: the shapes of the leaf's tensors, of an adapter without its model. They give the other sizes.
        has_bias: as in `Target`.
    """
    match, sizes, names = covered
    match, modules = _targeted_entries(match, sizes, names, set(targeted) or set(names))
    existing = {} if found is None else found.of(modules)
    if shapes is not None:
        existing = entry_shapes(match, shapes)
        sizes = sizes | plan.axis_sizes_from_tensors(
            match, method_tensors(config, method, Target(match, modules, {}, existing)), shapes
        )
    target = Target(match, modules, sizes, existing, has_bias)
    own = METHODS[config.peft_type].key_prefix
    prefix = keymap.prefix if own == PEFT_PREFIX else own
    tensors = method_tensors(config, method, target)
    entries = tuple(plan.plan_entry(keymap, match, tensor, sizes, prefix) for tensor in tensors)
    fan_in = math.prod(sizes.get(name, 1) for name in match.roles["in"])
    return Site(match, method, modules, tensors, method.hparams(config, target), entries, fan_in, target)


def _targeted_entries(
    match: Match, sizes: Mapping[str, int], names: Mapping[Index, str], targeted: Collection[Index]
) -> tuple[Match, Modules]:
    """Return a leaf's match with only the fused parts that are adapted in any layer, and the modules of its entries."""
    fused = match.roles["fused"]
    if fused:
        parts = tuple(sorted({index[-1] for index in targeted}))
        match = dataclasses.replace(
            match, parts=parts if len(parts) < math.prod(single_entry_sizes(match)[axis] for axis in fused) else None
        )
    kept = {index: name for index, name in names.items() if match.parts is None or index[-1] in match.parts}
    inner = match.braced[len(match.stack) :]
    adapted = {**sizes, **(dict.fromkeys(fused, len(match.parts)) if match.parts else {})}
    order = tuple(inner.index(axis) if axis in inner else -1 for axis in match.roles["batch"])
    counts = tuple(adapted[axis] for axis in inner)
    return match, Modules(tuple(name if index in targeted else None for index, name in kept.items()), counts, order)


def single_entry_sizes(match: Match) -> dict[str, int]:
    """Return sizes of the braced axes that cover every fused part, of the first layer only."""
    return {axis: len(match.weight.index_names(axis) or (axis,)) for axis in match.braced}


def entry_shapes(match: Match, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of one entry's tensors: without the stacked axes and the batch axes, which come first."""
    batch = len(match.roles["batch"])
    return {
        name: tuple(size for axis, size in enumerate(shape) if axis not in match.stack)[batch:]
        for name, shape in shapes.items()
    }


def repeats_heads(config: Config, keymap: KeyMap, leaves: Iterable[str] | None) -> bool:
    """Return True if PEFT's file has an embedding's tensors once more for the head tied to it.

    Args:
        leaves: the leaves of the base; None if they are not known, and then a method that does so by itself does not.
    """
    if config.get("ensure_weight_tying"):
        return True
    method = METHODS.get(config.peft_type)
    return method is not None and method.ties_heads and leaves is not None and bool(tied_heads(keymap, leaves))


def method_tensors(config: Config, method: Method, target: Target) -> tuple[MethodTensor, ...]:
    """Return the tensors of a target; an entry that is not adapted has none in the file."""
    tensors = method.tensors(config, target)
    if target.modules.all:
        return tensors
    used = {t: tuple(0 if name is None else dict(t.own).get("r", 1) for name in target.modules.names) for t in tensors}
    return tuple(t if t.used_sizes is not None else dataclasses.replace(t, used_sizes=used[t]) for t in tensors)


def torch_layout(site: Site) -> TorchLayout:
    """Return PyTorch's layout of one layer's weight and tensors."""
    weight = site.match.weight
    stacked = {weight.left[axis] for axis in site.match.stack}
    right = weight.right[::-1] if weight.fan_in_fan_out else weight.right
    tensors = tuple(
        (tensor.name, tuple(n for n in entry.form.left if n not in stacked), entry.form.right)
        for tensor, entry in site.bound
    )
    return TorchLayout(
        tuple(name for name in weight.left if name not in stacked),
        right,
        site.match.roles["batch"],
        weight.torch_roles["in"],
        weight.torch_roles["out"],
        weight.sizes,
        weight.scale,
        weight.shift,
        tensors,
    )


class FileShapes:
    """The shapes of a file's tensors, by module and by the tensor's name as in `Target.found`."""

    def __init__(self, shapes: Iterable[tuple[str, Shape]], prefix: str) -> None:
        """Read the shapes by key; `prefix` is that of the keymap."""
        self.shared: dict[str, Shape] = {}
        self._by_module: dict[str, dict[str, Shape]] = {}
        for key, shape in shapes:
            if not key.startswith(prefix):
                self.shared[_tensor_name(key.removeprefix(f"{SHARED_PREFIX}."))] = shape
                continue
            parts = key.removeprefix(prefix).split(".")
            for i in range(max(0, len(parts) - 4), len(parts)):
                self._by_module.setdefault(".".join(parts[:i]), {})[_tensor_name(".".join(parts[i:]))] = shape

    def of(self, modules: Modules) -> dict[str, Shape]:
        """Return the shapes of one entry's tensors, the largest where modules differ."""
        found: dict[str, Shape] = {}
        for module in modules:
            for name, shape in self._by_module.get(module, {}).items():
                known = found.setdefault(name, shape)
                found[name] = tuple(map(max, known, shape)) if len(known) == len(shape) else shape
        return found


def _tensor_name(suffix: str) -> str:
    return suffix.removesuffix(".weight").replace(".", "_")


def map_stack(site: Site, change: Any, params: Mapping[str, Any], w: Any) -> Any:
    """Return `change(AppliedMethod, w)`, computed layer by layer for the layers that the leaf stacks."""
    params = {**params, **site.data}  # and shared tensors, which all layers see whole
    shared = tuple(name for name in params if name not in site.shapes and name not in site.data)
    return map_layers(site.match.stack, site.method, site.hparams, site.axes, change, params, w, shared)


def map_layers(
    stack: Sequence[int],
    method: Method,
    hparams: Any,
    axes: Axes,
    change: Any,
    params: Mapping[str, Any],
    w: Any,
    shared: Sequence[str] = (),
) -> Any:
    """Compute `map_stack` from the fields of a site, without its leaf.

    `params` include `Site.data`, and those named in `shared` are not stacked.
    """

    def apply_change(params: Mapping[str, Any], w: Any) -> Any:
        return change(AppliedMethod(method, hparams, params, axes), w)

    mapped: Any = apply_change
    for position, axis in enumerate(stack):  # ascending: the outermost vmap takes the last axis and moves no other
        in_axes = {name: position if name == LAYER else axis for name in params} | dict.fromkeys(
            (name for name in shared if name in params), None
        )
        mapped = jax.vmap(mapped, in_axes=(in_axes, axis), out_axes=axis)
    return mapped(dict(params), w)


def make_file_plan(sites: Sequence[Site]) -> plan.Plan:
    """Return the plan of the file that holds these sites' tensors, and the shared ones."""
    return (sites if isinstance(sites, Sites) else Sites(sites)).file_plan
