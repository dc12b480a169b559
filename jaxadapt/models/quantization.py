"""A base in 4 or 8 bits under its adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType

from jaxadapt.arrays import placement, quantized
from jaxadapt.configs import LoraConfig
from jaxadapt.configs.matching import ALL_LINEAR
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import base_params, planning, trees
from jaxadapt.models.linen import wrapper
from jaxadapt.models.nnx import attach, survey


def quantize(
    base: Any,
    kind: str = "nf4",
    *,
    modules: Any = ALL_LINEAR,
    block: int | None = None,
    keymap: KeyMap | str | None = None,
) -> Any:
    """The base with the weights of its linear layers quantised; `adapt`, `init`, `load` and `save` go on as before.

    A layer's weight is made dense where the layer is called, forwards and again backwards, so that a training step
    never holds them all. Adapters stay in full precision, and what `save` writes opens in PEFT on the dense base.
    Where weights are sharded over devices, so are codes and scales, and an adapter is sharded as on the dense base.

    Args:
        base: nested mappings of base parameters (a new tree is returned; apply it through `adapt`'s wrapper), or an
            NNX model, changed in place and returned.
        kind: "nf4" (blocks of 64 numbers with a scale each, in bitsandbytes' order and of its levels) or "int8"
            (a scale for each output).
        modules: as `target_modules`; by default every linear layer but the output layer.
        block: another number of weights to a scale.
        keymap: as in `adapt`.

    Raises `AttachError` where a weight is quantised already, has only a shape or values that are not finite, or stacks
    its layers on another axis than the first.

    >>> import jax, numpy as np, jaxadapt
    >>> base = {"q": {"kernel": np.random.default_rng(0).standard_normal((64, 32)).astype("float32")}}
    >>> small = quantize(base, modules=["q"])
    >>> small["q"]["kernel"].shape, small["q"]["kernel"].nbytes
    ((64, 32), 1152)
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), small, key=jax.random.key(0))
    """
    config = LoraConfig(target_modules=modules)
    found = planning.BaseParams.from_tree(base)
    bounds = planning.plan_adapter(found, config, keymap)[1]
    weights, owners = found.leaves, found.held
    leaves = [b.leaf for b in bounds]
    problems = [] if found.walked is None else list(survey.obstacles(found.walked, leaves).values())
    for b in bounds:
        w, stack = weights[b.leaf], b.match.stack
        if b.match.weight.kind != "linear":
            problems.append(f"{b.leaf}: belongs to no linear layer")
        elif quantized.is_quantized(w):
            problems.append(f"{b.leaf}: is quantised already")
        elif isinstance(w, jax.ShapeDtypeStruct) or not jnp.issubdtype(w.dtype, jnp.floating):
            problems.append(f"{b.leaf}: expected floating-point values, found {type(w).__name__} of {w.dtype}")
        elif (place := placement.sharding_of(w)) is not None and AxisType.Explicit in place.mesh.axis_types:
            problems.append(f"{b.leaf}: lies on a mesh with explicit axes, where no blocks can be cut; use Auto ones")
        elif tuple(stack) != tuple(range(len(stack))):
            problems.append(f"{b.leaf}: stacks its layers on axis {stack}, and only the first axes can be sliced")
    if problems:
        raise AttachError("these weights cannot be quantised:\n" + paths.bullets(problems))
    new: dict[str, Any] = {}
    for b in bounds:
        order = (
            *b.axes.batch_axes,
            *b.axes.out_axes,
            *b.axes.in_axes,
        )  # PyTorch's: an output's inputs lie side by side
        size = b.fan_in if kind == "int8" and block is None else block
        new[b.leaf] = quantized.quantize_weight(weights[b.leaf], kind, order, len(b.match.stack), size)
    scales = {leaf: q.absmax for leaf, q in new.items()}
    odd = [leaf for leaf, x in scales.items() if not isinstance(x, Tracer) and not jnp.isfinite(x).all()]
    if odd:
        raise AttachError("these weights have values that are not finite:\n" + paths.bullets(odd))
    if found.walked is None:
        return _replaced(base, new)
    base_params.replace_leaves(base, new)
    for leaf in new:
        attach.install_adapters(owners[leaf][0])
    return base


def dequantize(base: Any) -> Any:
    """The base with every quantised weight dense, of what it has become: the inverse of `quantize` but for rounding.

    Takes an NNX model (changed in place) or nested mappings, with weights of `quantize` or with Qwix' QArrays. Where
    there are none it raises nothing, and changes nothing.

    >>> import numpy as np
    >>> base = {"q": {"kernel": np.eye(64, dtype="float32")}}
    >>> bool((dequantize(quantize(base, modules=["q"]))["q"]["kernel"] == base["q"]["kernel"]).all())
    True
    """
    if not isinstance(base, attach.nnx.Module):
        return jax.tree.map(quantized.to_dense, base, is_leaf=quantized.is_quantized)
    weights = planning.base_arrays(base)
    return base_params.replace_leaves(
        base, {p: quantized.to_dense(w) for p, w in weights.items() if quantized.is_quantized(w)}
    )


def from_qwix(model: Any) -> Any:
    """The model that `qwix.quantize_model` made (weights only), as one that adapters can be attached to.

    Qwix follows a model by exchanging functions of JAX while it runs, and would quantise an adapter's inputs as well;
    so its weights stay the QArrays they are, and are dequantised where each layer is called.

    Args:
        model: NNX: changed in place and returned. Linen: the module without Qwix is returned; the parameters of
            `qwix.quantize_params` go with it as they are.

    Raises `AttachError` where Qwix holds more than weights (static scales of activations).

        model = jaxadapt.models.from_qwix(qwix.quantize_model(model, qwix.PtqProvider(rules), x))
    """
    if isinstance(model, wrapper.nn.Module):
        plain: Any = model.copy()
        object.__setattr__(plain, "__class__", _without_qwix(type(model)))
        return plain
    if not isinstance(model, attach.nnx.Module):
        raise AttachError(f"expected an NNX or Linen module, found {type(model).__name__}")
    held = {
        (paths.join(*map(str, path)), attr): (node, value)
        for path, node in attach.nnx.iter_graph(model)
        if isinstance(node, attach.nnx.Module)
        for attr, value in vars(node).items()
        if quantized.is_qwix_parameter(value)
    }
    new = {at: jax.tree.map(_opened, value, is_leaf=_is_variable) for at, (_, value) in held.items()}
    odd = [paths.join(*at) for at, value in new.items() if not quantized.is_quantized(value.array)]
    if odd:
        raise AttachError("Qwix quantises activations here, too, with scales of its own:\n" + paths.bullets(odd))
    for at, (node, _) in held.items():
        delattr(node, at[1])
        setattr(node, at[1], attach.nnx.Param(new[at].array))
        attach.install_adapters(node)
    survey.swap(model, _without_qwix(type(model)))
    return model


def _without_qwix(cls: Any) -> Any:
    return vars(cls).get("_unquantized_type", cls)


def _is_variable(x: Any) -> bool:
    return isinstance(x, attach.nnx.Variable)


def _opened(x: Any) -> Any:
    return x.get_value() if isinstance(x, attach.nnx.Variable) else x


def _replaced(tree: Any, new: Mapping[str, Any]) -> Any:
    """As `merging.replaced`, without the boxes of these leaves: their axes are not those of codes and scales."""

    def put(keys: Any, leaf: Any) -> Any:
        return new.get(base_params.dotted_path(keys), leaf)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=trees.is_box)
