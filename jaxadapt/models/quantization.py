"""Quantisation of a base to 4 or 8 bits for QLoRA (Dettmers et al. 2023, arXiv:2305.14314), and dequantisation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType

from jaxadapt.adapters.adapter import Site
from jaxadapt.arrays import quantized, regions
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.matching import ALL_LINEAR
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import graph, nnx_adapters, planning
from jaxadapt.models.carriers import base_params, carrier


def quantize(
    model: Any,
    kind: str = "nf4",
    *,
    modules: Any = ALL_LINEAR,
    block: int | None = None,
    keymap: KeyMap | str | None = None,
) -> Any:
    """Quantise the weights of a base's linear layers; `adapt`, `init`, `load` and `save` work as on the dense base.

    Each call of a layer dequantises its weight, in the forward and again in the backward pass, so a training step never
    holds all dense weights. Adapters stay in full precision, and PEFT loads a saved adapter on the dense base. The
    codes and scales of a sharded weight are sharded too, and adapters are sharded as on the dense base.

    Args:
        model: nested mappings of base parameters (returns a new tree; apply it through `adapt`'s wrapper), or an NNX
            model, which is changed in place and returned.
        kind: "nf4" (blocks of 64 numbers with one scale each, in the order and with the levels of bitsandbytes) or
            "int8" (one scale for each output).
        modules: as `target_modules`; by default every linear layer except the output layer.
        block: the number of weights per scale, instead of the default.
        keymap: as in `adapt`.

    Raises `AttachError` for a weight that is already quantised, is a spec without values, has values that are not
    finite, or stacks its layers on any axes but the first.

    >>> import jax, numpy as np, jaxadapt
    >>> base = {"q": {"kernel": np.random.default_rng(0).standard_normal((64, 32)).astype("float32")}}
    >>> small = quantize(base, modules=["q"])
    >>> small["q"]["kernel"].shape, small["q"]["kernel"].nbytes
    ((64, 32), 1152)
    >>> adapter = jaxadapt.init(small, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    """
    params = base_params(model)
    sites = planning.plan_adapter(params, LoraConfig(target_modules=modules), keymap)[1]
    weights, owners = params.leaves, params.held
    leaves = [site.leaf for site in sites]
    problems = [] if params.walked is None else list(planning.find_obstacles(params.walked, leaves).values())
    problems += [f"{site.leaf}: {why}" for site in sites if (why := _obstacle(site, weights[site.leaf]))]
    raise_listed(AttachError, "cannot quantize these weights:", problems)
    new: dict[str, Any] = {}
    for site in sites:
        order = (
            *site.axes.batch_axes,
            *site.axes.out_axes,
            *site.axes.in_axes,
        )  # PyTorch's order: the inputs of one output are contiguous
        size = site.fan_in if kind == "int8" and block is None else block
        new[site.leaf] = quantized.quantize_weight(weights[site.leaf], kind, order, len(site.match.stack), size)
    raise_listed(
        AttachError,
        "cannot quantize these weights, whose values are not all finite:",
        (x for x, q in new.items() if not isinstance(q.absmax, Tracer) and not jnp.isfinite(q.absmax).all()),
    )
    model = carrier(model).replace(new, boxes=False)  # the axes of a box do not match those of codes and scales
    for leaf in new if params.walked is not None else ():
        nnx_adapters.install_adapters(owners[leaf][0])
    return model


def _obstacle(site: Site, w: Any) -> str:
    """Return the reason why a weight cannot be quantised; an empty text if it can."""
    stack = site.match.stack
    if site.match.weight.kind != "linear":
        return "expected the weight of a linear layer"
    if quantized.is_quantized(w):
        return "already quantized"
    if isinstance(w, jax.ShapeDtypeStruct) or not jnp.issubdtype(w.dtype, jnp.floating):
        return f"expected floating-point values, found {type(w).__name__} of {w.dtype}"
    sharding = regions.sharding_of(w)
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        return "sharded on a mesh with explicit axes, which does not allow slicing into blocks; use Auto axes"
    if tuple(stack) != tuple(range(len(stack))):
        return f"its layers are stacked on axis {stack}; expected the first axes"
    return ""


def dequantize(model: Any) -> Any:
    """Dequantise every quantised weight of a base: the inverse of `quantize` except for rounding.

    Takes an NNX model (changed in place) or nested mappings, with weights of `quantize` or QArrays of Qwix. A base
    without quantised weights is returned unchanged. It raises nothing of its own.

    >>> import numpy as np
    >>> base = {"q": {"kernel": np.eye(64, dtype="float32")}}
    >>> bool((dequantize(quantize(base, modules=["q"]))["q"]["kernel"] == base["q"]["kernel"]).all())
    True
    """
    held = carrier(model)
    if not held.in_place:
        return jax.tree.map(quantized.to_dense, model, is_leaf=quantized.is_quantized)
    return held.replace({p: quantized.to_dense(w) for p, w in held.leaves().items() if quantized.is_quantized(w)})


def from_qwix(model: Any) -> Any:
    """Convert a model of `qwix.quantize_model` (weights only) to one that adapters can be attached to.

    Qwix replaces functions of JAX while the model runs, and would quantise an adapter's inputs too. After the
    conversion the weights are still QArrays, and each call of a layer dequantises its weight.

    Args:
        model: NNX: changed in place and returned. Linen: returns the module without Qwix; use it with the parameters
            of `qwix.quantize_params` unchanged.

    Raises `AttachError` if Qwix also quantises activations (static scales).

        model = jaxadapt.models.from_qwix(qwix.quantize_model(model, qwix.PtqProvider(rules), x))
    """
    if isinstance(model, nn.Module):
        plain: Any = model.copy()
        object.__setattr__(plain, "__class__", _without_qwix(type(model)))
        return plain
    if not isinstance(model, nnx.Module):
        raise AttachError(f"expected an NNX or Linen module, found {type(model).__name__}")
    qwix_params = {
        (path, attr): (node, value)
        for path, node in graph.walk_model(model).modules
        for attr, value in vars(node).items()
        if quantized.is_qwix_parameter(value)
    }
    is_variable = graph.instance_test(nnx.Variable)
    new = {
        at: jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, value, is_leaf=is_variable)
        for at, (_, value) in qwix_params.items()
    }
    raise_listed(
        AttachError,
        "cannot convert this model: Qwix also quantizes activations, with static scales, at:",
        (paths.join(*at) for at, value in new.items() if not quantized.is_quantized(value.array)),
    )
    for at, (node, _) in qwix_params.items():
        delattr(node, at[1])
        setattr(node, at[1], nnx.Param(new[at].array))
        nnx_adapters.install_adapters(node)
    graph.set_class(model, _without_qwix(type(model)))
    return model


def _without_qwix(cls: Any) -> Any:
    return vars(cls).get("_unquantized_type", cls)
