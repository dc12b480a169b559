"""Adapters on an NNX or Linen model: select the parameters, attach, extract, inject and remove adapters.

`select` returns what a configuration would adapt in a model, as a value, before anything is attached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import Adapter, is_array, not_an_adapter
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.core.paths import bullets
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.registry import get_method
from jaxadapt.models import planning
from jaxadapt.models.carriers import DEFAULT, base_params, carrier, lora_carrier
from jaxadapt.models.linen import wrapper

# ---------------------------------------------------------------- attachment


def adapt(
    model: Any,
    config: Config,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    rngs: Any = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    deterministic: bool | None = None,
) -> Any:
    """Attach a new adapter to a model, which does not change its output.

    NNX: changes the model in place and returns it; the new parameters are `AdapterParam`s. Linen: returns a wrapper
    with the module's `init` and `apply`, and the adapter's parameters in a collection "lora" (or "ia3") beside
    "params".

    Args:
        name: the adapter's name. A second `adapt` under another name adds an adapter and activates it.
        keymap: the model's family ("llama"), a `KeyMap`, or None to recognise the family.
        rngs: NNX: `nnx.Rngs` for the initial values and dropout. On a model of shapes (`nnx.eval_shape`) the adapter
            has shapes without `rngs`, and values with it. Dropout starts in training mode, as in new Flax layers,
            even if the model is in `eval()` mode. (Linen: pass keys to `init`, and `rngs={"dropout": key}` to each
            `apply` in training.)
        dtype: the dtype of the adapter's parameters; float32 by default, whatever the dtype of the base. "base" gives
            each parameter the dtype of the weight it adapts, as PEFT's `autocast_adapter_dtype=False` does.
        stack_axes: NNX: the axes on which scanned layers are stacked, if the shapes do not show them.
        example: NNX: the inputs of one call, used to trace the axis roles of custom layers' weights.
        deterministic: Linen: True turns the adapters' dropout off. None: it is on in calls whose `rngs` have a stream
            "dropout", with one warning if no call has it. False: it is on, and a call without the stream is an error.
            Switch it with `model.clone(deterministic=True)`, for example for evaluation. The module's own
            `deterministic` argument is independent; `apply` passes it on. (NNX: `model.train()`, `model.eval()`.)

    Raises `TargetError` if `target_modules` selects no adaptable weight, `ConfigError` for a field that is not
    supported here, `AttachError` for a layer that cannot carry the adapter.

    >>> from flax import nnx as fnnx
    >>> import jaxadapt
    >>> class Net(fnnx.Module):
    ...     def __init__(self, rngs):
    ...         self.q_proj = fnnx.Linear(4, 6, rngs=rngs)
    >>> net = adapt(Net(fnnx.Rngs(0)), jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), rngs=fnnx.Rngs(1))
    >>> net.q_proj.lora["default"]["kernel"]["lora_A"].shape
    (2, 4)
    """
    get_method(config)
    options = {"rngs": rngs, "stack_axes": stack_axes, "example": example, "deterministic": deterministic}
    return carrier(model).adapt(config, name, keymap, dtype, options)


def init(
    model: Any,
    config: Config,
    *,
    key: Any = None,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
) -> Adapter:
    """Return a new adapter for a tree of base parameters, with the tensors that `adapt` would attach.

    Args:
        model: nested mappings of arrays or `ShapeDtypeStruct`s (Linen's `variables["params"]`), or an NNX model. If
            the weights are in Linen's boxes (`nn.Partitioned`, …), so are the adapter's tensors, as in `adapt`.
        key: a JAX random key; None returns an abstract adapter, specs only.
        keymap: the family's name, a `KeyMap`, or None to recognise the family. Without a keymap, 2-D kernels are
            (in, out), and a target with more axes is an error.
        dtype: as in `adapt`.

    Raises the errors of `adapt`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    >>> {path: x.shape for path, x in adapter.flat().items()}
    {'q.kernel.lora_A': (2, 4), 'q.kernel.lora_B': (6, 2)}
    """
    get_method(config)
    if key is not None and not is_array(key):
        raise AttachError(f"key: expected a JAX random key such as jax.random.key(0), found {type(key).__name__}")
    base = base_params(model)
    recipe, sites = planning.plan_adapter(base, config, keymap)
    values = initial_values.init_values(recipe.config, sites, key, dtype, key is None, base.leaves, base.shardings)
    return wrapper.box_like_base(Adapter(recipe.config, paths.unflatten(values), recipe.keymap), base.held)


# ---------------------------------------------------------------- extract and inject


def extract(
    model: Any,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
) -> Adapter:
    """Return the adapter called `name` of a model, state or variables.

    Args:
        model: an NNX model or `nnx.State`, Linen variables (or their adapter collection), an `Adapter`, or any pytree
            with the LoRA leaves of another library, which are recognised by their paths. A `LoraTree` wraps a tree
            that does not store its configuration or its alpha.
        keymap: needed only if the tree has lost it; for another library's tree the default is the family recognised
            from its base weights.

    Raises `AttachError` if the tree has no adapter of that name, or its configuration is lost and not passed.
    Raises `KeyMapError` listing the leaves of another library that have no exact equivalent.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> variables = {"params": base, **adapter.collection}
    >>> extract(variables).config.r
    2
    """
    return lora_carrier(model).extract(name, keymap)


def inject(model: Any, adapter: Adapter, *, name: str = DEFAULT) -> Any:
    """Write an adapter's values into the attached adapter of that name.

    NNX models are changed in place. Any other tree is copied, and keeps its `jax.tree.structure`: the same boxes,
    recipe and mapping types. In a tree with another library's LoRA leaves the values go into those leaves; a `LoraTree`
    wraps a tree that does not store its alpha.

    Raises `AttachError` if the shapes or the configurations differ.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> ones = jax.tree.map(jax.numpy.ones_like, adapter)
    >>> variables = inject({"params": base, **adapter.collection}, ones)
    >>> variables["lora"]["default"]["q"]["kernel"]["lora_B"].sum()
    Array(12., dtype=float32)
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise not_an_adapter(adapter)
    kept = {p: x for p, x in adapter.flat().items() if isinstance(x, jax.Array) and not isinstance(x, Tracer)}
    gone = [path for path, leaf in kept.items() if leaf.is_deleted()]
    # Otherwise the model's next call would fail without naming them.
    raise_listed(
        AttachError,
        "cannot inject the adapter: these arrays were donated to a jitted function and are deleted. Keep a copy,"
        " jax.tree.map(jnp.copy, adapter):",
        gone,
    )
    return lora_carrier(model, takes=()).inject(adapter, name)


def delete(model: Any, *, name: str) -> Any:
    """Remove one adapter. NNX in place; Linen: return a wrapper without it, or variables without its parameters.

    Raises `AttachError` if no adapter is called `name`.

    >>> import flax.linen, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"])
    >>> module = jaxadapt.adapt(flax.linen.Sequential([flax.linen.Dense(2)]), config, name="a")
    >>> delete(jaxadapt.adapt(module, config, name="b"), name="a").active
    ('b',)
    """
    return carrier(model).delete(name)


def detach(model: Any) -> Any:
    """Remove all adapters and return the base model.

    NNX: in place, with the graphdef and the arrays it had before. Linen: the module inside the wrapper, or the
    variables without the adapters' collections. Raises `AttachError` for any other object.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> sorted(detach({"params": base, **adapter.collection}))
    ['params']
    """
    return carrier(model).detach()


# ---------------------------------------------------------------- target selection


@dataclasses.dataclass(frozen=True)
class Target:
    """One base leaf that a configuration selects.

    Attributes:
        leaf: the path of the base weight in the model.
        shape: its shape, stacked layers included.
        modules: the PyTorch modules (or parameters) in the leaf that are adapted.
        tensors: {name: shape} of the tensors that the method keeps for the leaf.

    >>> Target("q_proj.kernel", (4, 6), ("q_proj",), {"lora_A": (2, 4), "lora_B": (6, 2)}).parameters
    20
    """

    leaf: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """The number of parameters in the tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def __str__(self) -> str:
        tensors = ", ".join(f"{name} {shape}" for name, shape in self.tensors.items())
        first, more = self.modules[0], len(self.modules) - 1
        return f"{first}{f' and {more} more' if more else ''}: {self.leaf} {self.shape}; {tensors}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The weights of a model that a configuration selects; `str(selection)` lists them.

    Attributes:
        config: the configuration as it would be attached: "all-linear" and null targets resolved.
        keymap: the keymap that names the weights.
        targets: one value a base leaf, in the model's order.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> select(base, jaxadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).leaves
    ('q_proj.kernel',)
    """

    config: Config
    keymap: KeyMap
    targets: tuple[Target, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the selected base weights."""
        return tuple(target.leaf for target in self.targets)

    @property
    def modules(self) -> tuple[str, ...]:
        """The PyTorch modules (or parameters) that are adapted."""
        return tuple(module for target in self.targets for module in target.modules)

    @property
    def parameters(self) -> int:
        """The number of parameters that the adapter would have."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        head = f"{self.config.peft_type} on {len(self.modules)} modules in {len(self.targets)} weights, "
        head += f"{self.parameters:,} parameters (keymap {self.keymap.name!r})"
        return head + ":\n" + bullets([str(target) for target in self.targets], 40)


def select(
    model: Any,
    config: Config,
    *,
    keymap: KeyMap | str | None = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Selection:
    """Return what a configuration would adapt in a model, without attaching anything.

    Args:
        model: an NNX model, Linen variables or base parameters, or the shapes of any of them.
        config: for example a `LoraConfig`.
        keymap, stack_axes, example: as in `jaxadapt.adapt`.

    Raises `TargetError` if the configuration selects nothing adaptable, and `ConfigError`, `KeyMapError` or
    `AttachError` for what `jaxadapt.adapt` would refuse.

    >>> import jax, jaxadapt
    >>> base = {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> found = select(base, jaxadapt.LoraConfig(r=2, target_modules="all-linear"))
    >>> found.modules, found.parameters
    (('q_proj',), 20)
    >>> print(found)
    LORA on 1 modules in 1 weights, 20 parameters (keymap 'generic'):
      q_proj: q_proj.kernel (4, 6); lora_A (2, 4), lora_B (6, 2)
    """
    get_method(config)
    base = carrier(model).base()
    recipe, sites = planning.plan_adapter(base, config, keymap, stack_axes, example)
    shapes = base.shapes
    return Selection(
        recipe.config,
        recipe.keymap,
        tuple(Target(site.leaf, shapes[site.leaf], site.modules, site.shapes) for site in sites),
    )
