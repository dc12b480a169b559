"""Save and load: the whole path on one page.

    model / variables ──extract──► Adapter ──plan.encode──► PeftTensors ──folder.write──► files
                      ◄──attach──          ◄─plan.decode──              ◄──folder.read───
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxadapt import attach, bind, families, folder, linen, methods, nnx, paths
from jaxadapt.adapter import Adapter, PeftTensors, Recipe
from jaxadapt.configs import Config
from jaxadapt.errors import AttachError, ConfigError
from jaxadapt.keymap import KeyMap


@dataclasses.dataclass(frozen=True, eq=False)
class _Host(Mapping[str, Any]):
    """Leaves brought to the host when they are asked for; dtypes without bringing them."""

    leaves: Mapping[str, Any]
    dtype: Any = None

    def __getitem__(self, path: str) -> Any:
        leaf = np.asarray(self.leaves[path])
        return leaf if self.dtype is None else leaf.astype(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def to_peft(
    tree: Any, name: str = attach.DEFAULT, *, config: Config | None = None, keymap: KeyMap | str | None = None
) -> PeftTensors:
    """An adapter under PEFT's names and in PyTorch's layout, in memory.

    Args:
        tree: what `extract` takes: an `Adapter`, an NNX model or state, Linen variables.
        config, keymap: only where the tree lost them, or to rename by another table.

    The tensors are made when they are asked for, as views where the layouts allow. Raises `AttachError`
    or `KeyMapError`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {key: x.shape for key, x in to_peft(adapter).tensors.items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    adapter = attach.extract(tree, name, config=config, keymap=keymap)
    leaves = adapter.flat()
    return PeftTensors(adapter.config, _plan_of(adapter, keymap).encode(leaves))


def _plan_of(adapter: Adapter, keymap: KeyMap | str | None) -> Any:
    table = adapter.keymap if keymap in (None, "auto") else families.resolve(keymap, {})
    shapes = {leaf: {t: tuple(a.shape) for t, a in ts.items()} for leaf, ts in adapter.sites.items()}
    return bind.file_plan(bind.recover(adapter.config, table, shapes))


def save(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    name: str = attach.DEFAULT,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    base_model: str | None = None,
    dtype: Any = None,
) -> None:
    """Write an adapter, and nothing but the adapter, as a folder that PEFT reads.

    Two arguments do for whatever this library made: NNX models and states, Linen variables, `Adapter`s,
    after any number of jitted updates. An adapter not called "default" goes to the subfolder of its name,
    as PEFT puts it.

    Args:
        config: where the tree has lost its configuration (the error says so).
        keymap: to name the tensors by another table than the one the model was adapted with.
        base_model: what `base_model_name_or_path` shall say; never looked up anywhere.
        dtype: of the tensors in the file; as in memory by default.

    Durable and atomic; raises `AdapterError` (what is wrong, and the way out), and then the old adapter is
    still there, whole.
    """
    adapter = attach.extract(tree, name, config=config, keymap=keymap)
    leaves = adapter.flat()
    abstract = [p for p, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)]
    if abstract:
        raise AttachError("these parameters have no values to save (abstract, or inside jit):\n" + paths.listing(abstract))
    changes: dict[str, Any] = {"inference_mode": True}
    if base_model is not None:
        changes["base_model_name_or_path"] = base_model
    plan = _plan_of(adapter, keymap)
    host = _Host(leaves if dtype is None else {p: leaf.astype(dtype) for p, leaf in leaves.items()})
    encoded = plan.encode(host)
    where = Path(path) if name == attach.DEFAULT else Path(path) / name
    folder.write(PeftTensors(adapter.config.replace(**changes), encoded, str(path)), where)


def from_peft(
    tensors: PeftTensors,
    target: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Adapter:
    """PEFT's tensors as an adapter in the layout of `target`: a model, variables, parameters, or their shapes.

    Raises `MismatchError` listing every missing, unexpected and wrongly shaped tensor.
    """
    recipe, bounds = _plan_for(target, tensors.config, keymap, stack_axes, example)
    plan = bind.file_plan(bounds)
    plan.check({k: tuple(v.shape) for k, v in tensors.tensors.items()}, tensors.source)
    values = jax.device_put(plan.decode(tensors.tensors))
    if dtype is not None:
        values = {p: v.astype(dtype) for p, v in values.items()}
    return Adapter(recipe.config, paths.unflatten(values), recipe.keymap)


def _plan_for(
    target: Any, config: Config, keymap: KeyMap | str | None, stack_axes: Any = None, example: Any = None
) -> tuple[Recipe, tuple[bind.Bound, ...]]:
    methods.of(config)
    if isinstance(target, linen.Adapted | linen.nn.Module):
        raise AttachError("a Linen module holds no parameters; give the variables, {'params': …}, as the target")
    if isinstance(target, nnx.nnx.Module):
        known = [v for by_path in nnx.variables(target).values() for v in by_path.values()]
        table = known[0].get_metadata()["adapter"].recipe.keymap if known and keymap is None else keymap
        return attach.plan_nnx(target, config, table, stack_axes, example)
    if not isinstance(target, Mapping | nnx.nnx.State):
        raise AttachError(f"expected an NNX model or Linen variables as the target, found {type(target).__name__}")
    params = target["params"] if "params" in target else target
    if keymap is None:
        keymap = _attached_table(target)
    return attach.plan_tree(params, config, keymap)


def _attached_table(variables: Any) -> KeyMap | None:
    for method in methods.METHODS.values():
        for name, tree in dict(variables.get(method.peft_type.lower(), {})).items():
            return linen.read_collection(tree, name).keymap
    return None


def load(
    path: str | os.PathLike[str],
    target: Any,
    *,
    name: str = attach.DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    replace: bool = False,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> Any:
    """Read an adapter folder (ours or PEFT's) into a model.

    Args:
        target: an NNX model, plain or adapted, changed in place and returned; or Linen variables
            (`{"params": base}` is enough), returned with the collection added. Abstract ones work too.
        name: what the adapter is called on this model; it becomes the active one.
        keymap: the model's family, a `KeyMap`, or None to recognise it.
        dtype: of the parameters in memory; the file's by default.
        replace: an attached adapter of that name with another configuration gives way.
        rngs: NNX: for dropout in further training; without it dropout is off.
        stack_axes, example: as in `adapt`.

    The base is never touched, and nothing is attached unless everything fits. Raises `AdapterError`,
    `MismatchError` with all missing, unexpected and wrongly shaped tensors together.
    """
    where = Path(path) if name == attach.DEFAULT or (Path(path) / folder.CONFIG).exists() else Path(path) / name
    tensors = folder.read(where)
    adapter = from_peft(tensors, target, keymap=keymap, dtype=dtype, stack_axes=stack_axes, example=example)
    present = _attached_config(target, name)
    if present is not None and present != adapter.config and not replace:
        raise ConfigError(
            f"{path}: its configuration differs from that of the attached adapter {name!r} in {_differences(present, adapter.config)};"
            " load(…, replace=True) takes the file's, load(…, name=…) keeps both"
        )
    if isinstance(target, nnx.nnx.Module):
        if present is not None:
            attach.delete(target, name)
        bounds = _plan_for(target, adapter.config, adapter.keymap)[1]
        nnx.attach(target, adapter.recipe, bounds, name, adapter.flat(), rngs)
        return target
    return attach.with_adapter(target, adapter, name)


def _attached_config(target: Any, name: str) -> Config | None:
    if isinstance(target, nnx.nnx.Module):
        return nnx.extract(target, name).config if name in nnx.names(target) else None
    for method in methods.METHODS.values():
        held = target.get(method.peft_type.lower()) if isinstance(target, Mapping) else None
        if held is not None and name in held:
            return linen.read_collection(held[name], name).config
    return None


def _differences(a: Config, b: Config) -> str:
    x, y = a.to_dict(), b.to_dict()
    return ", ".join(f"{k} ({x.get(k)!r} attached, {y.get(k)!r} in the file)" for k in sorted(x | y) if x.get(k) != y.get(k))
