"""Training helpers for optax: roles of adapter parameters, and optimizers that distinguish A, B and other parameters.

    tx = jaxadapt.optim.lora_plus(model, optax.adamw, 1e-4, ratio=16)
    optimizer = nnx.Optimizer(model, tx, wrt=jaxadapt.AdapterParam)      # Linen: tx.init(lora), tx.update(grads, …)

Every function takes the trained tree: an NNX model (or its state), or the collection `{"lora": …}`. Roles are derived
from the adapter's method and configuration in this tree, never guessed from names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadapt.adapters.adapter import Adapter, Site
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, raise_as, raise_listed
from jaxadapt.merging import factors
from jaxadapt.methods.base import at_least_float32, get_method
from jaxadapt.models.carriers import DEFAULT, carrier, lora_carrier
from jaxadapt.serving.bank import Bank

__all__ = ["decay_mask", "kasa_loss", "lora_fa", "lora_plus", "per_slot", "riemannian", "roles", "scale_by_rank"]

Array = Any
Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    """One trained array: its adapter, its site and its tensor."""

    adapter: str
    config: Config
    site: Site | None  # None for a shared tensor
    tensor: str
    ndim: int  # without axes of stacked layers

    @property
    def role(self) -> str:
        if self.site is None:
            return get_method(self.config).roles.get(self.tensor, "other")
        if self.site.method.copies:
            return "bias" if self.site.leaf.rpartition(".")[2] == "bias" else "copy"
        return self.site.method.role(self.site.hparams, self.tensor)

    @property
    def decays(self) -> bool:
        return self.role in ("A", "B", "embedding") or (self.role in ("copy", "other") and self.ndim > 1)


def _leaves(tree: Any) -> Any:
    """Replace each array (or variable, or box) of the tree by its `_Leaf`."""
    held = carrier(tree)
    if held.in_place or not held.has_base:
        described = held.map_adapters(_leaves_by_path)
        if any(isinstance(x, _Leaf) for x in jax.tree.leaves(described)):
            return described
    raise AttachError(
        "expected the trained tree, an adapted NNX model or the adapters' collections (without 'params'), found"
        f" {type(tree).__name__} without an adapter"
    )


def _leaves_by_path(name: str, adapter: Adapter) -> dict[str, _Leaf]:
    """Return `{path: leaf}` of one adapter's parameters."""
    sites = sites_of(adapter)
    return {
        paths.join(site.leaf, tensor): _Leaf(name, adapter.config, site, tensor, len(shape) - len(site.match.stack))
        for site in sites
        for tensor, shape in site.shapes.items()
    } | {
        each.entry.path: _Leaf(name, adapter.config, None, each.tensor.name, len(each.entry.shape))
        for each in sites.shared
    }


# ---------------------------------------------------------------- labels


def roles(tree: Any) -> Any:
    """Return the role of each parameter as a tree of labels, for `optax.multi_transform`.

    The labels are "A" and "B" for LoRA's matrices, "embedding" for the matrices of an adapted embedding, "bias" for a
    trained bias, "vector" for the vectors of IA3, DoRA and KaSA, "copy" for a fully trained weight, "frozen" for MiCA's
    B, and "other" for the tensors of methods without such roles.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    >>> roles(adapter.collection)["lora"]["default"]["q"]
    {'kernel': {'lora_A': 'A', 'lora_B': 'B'}}
    """
    return jax.tree.map(lambda leaf: leaf.role, _leaves(tree))


def decay_mask(tree: Any) -> Any:
    """Return a mask that applies weight decay to matrices only, for `optax.adamw(…, mask=…)`.

    Decay would change the scale of biases and norms. It would also pull the vectors of IA3 and DoRA to zero, although
    they start at one (or at a weight's norm).

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> tx = optax.adamw(1e-3, mask=decay_mask(adapter.collection))
    """
    return jax.tree.map(lambda leaf: leaf.decays, _leaves(tree))


# ---------------------------------------------------------------- a penalty


def kasa_loss(tree: Any, name: str = DEFAULT) -> Array:
    """Return the penalties of KaSA to add to the loss, a float32 scalar (arXiv:2412.06071, equations 9 to 11).

    The value is β·Σd² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), summed over the modules, with beta and gamma of `kasa_config`, as in
    PEFT's `LoraModel._get_kasa_loss`.

    Raises:
        ConfigError: the adapter has no `kasa_config`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jnp.eye(6)}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"], kasa_config={"beta": 0.0, "gamma": 0.5})
    >>> adapter = jaxadapt.initializers.start(base, config, key=jax.random.key(0)).adapter
    >>> round(float(kasa_loss(jax.tree.map(jnp.zeros_like, adapter))), 3)  # half of √2 + √2
    1.414
    """
    adapter = lora_carrier(tree).extract(name)
    if (kasa := adapter.config.get("kasa_config")) is None:
        raise ConfigError(f"kasa_loss needs an adapter with kasa_config; the adapter {name!r} has none")
    values = {path: at_least_float32(x) for path, x in adapter.flat().items()}
    squares = sum(jnp.sum(x**2) for path, x in values.items() if path.endswith(".lora_diag"))
    distance: Any = jnp.zeros((), jnp.float32)
    with jax.default_matmul_precision("highest"):
        for pair in factors.site_pairs(adapter.config, sites_of(adapter), values).values():
            eye = jnp.eye(pair.rank)
            distance += jnp.linalg.norm(pair.b.T @ pair.b - eye) + jnp.linalg.norm(pair.a @ pair.a.T - eye)
    return kasa.get("beta", 1e-4) * squares + kasa.get("gamma", 1e-3) * distance


# ---------------------------------------------------------------- optimizers


def lora_plus(
    tree: Any,
    make: Make,
    learning_rate: Any,
    ratio: float,
    *,
    weight_decay: float = 0.0,
    embedding_learning_rate: Any = 1e-6,
) -> optax.GradientTransformation:
    """Make a LoRA+ optimizer, in which B learns `ratio` times as fast as A (Hayou et al. 2024, arXiv:2402.12354).

    The groups are those of PEFT's `create_loraplus_optimizer`, except that DoRA's magnitudes have no weight decay.

    Args:
        tree: the trained tree.
        make: `optax.adamw`, or any function called as `make(learning_rate, weight_decay=…)`.
        learning_rate: the learning rate of A and of copied weights; a number or a schedule.
        ratio: the learning rate of B, biases and vectors, relative to `learning_rate`. The paper recommends 16 or more.
        weight_decay: the weight decay of the parameters that `decay_mask` selects.
        embedding_learning_rate: the learning rate of adapted embeddings.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> tx = lora_plus(adapter.collection, optax.adamw, 1e-4, ratio=16)
    >>> state = tx.init(adapter.collection)
    """
    if ratio <= 0:
        raise ConfigError(f"ratio: expected a positive number, found {ratio!r}")
    groups = {"A": "A", "copy": "A", "other": "A", "embedding": "embedding", "frozen": "frozen"}
    rates = {"A": learning_rate, "embedding": embedding_learning_rate, "B": _scale_rate(learning_rate, ratio)}
    with raise_as(ConfigError, "make: expected optax.adamw or a function that is called like it", TypeError):
        decayed = {name: make(rate, weight_decay=weight_decay) for name, rate in rates.items()}
        plain = {f"{name} plain": make(rate, weight_decay=0.0) for name, rate in rates.items()}
    labels = jax.tree.map(lambda leaf: groups.get(leaf.role, "B") + ("" if leaf.decays else " plain"), _leaves(tree))
    return optax.multi_transform({**decayed, **plain, "frozen plain": optax.set_to_zero()}, labels)


def _scale_rate(rate: Any, ratio: float) -> Any:
    return (lambda step: _scale_rate(rate(step), ratio)) if callable(rate) else rate * ratio


def scale_by_rank(tree: Any, reference: int = 8) -> optax.GradientTransformation:
    """Scale the updates of each site by √(r / reference). Put it last in `optax.chain`.

    With the scale α/r and an optimizer of fixed step size such as Adam, a site of higher rank changes its weight less.
    The scale α/√r of rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) corrects this. `scale_by_rank` has the same first
    step as α'/√r with α' = α/√reference, but the file needs no support for rsLoRA. Sites with rsLoRA, and parameters
    other than LoRA's matrices, are not scaled.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> tx = optax.chain(optax.adam(1e-3), scale_by_rank(adapter.collection))
    >>> state = tx.init(adapter.collection)
    """

    if reference <= 0:
        raise ConfigError(f"reference: expected a positive rank, found {reference!r}")

    def factor(leaf: _Leaf) -> float:
        sizes = {} if leaf.site is None else {name: size for t in leaf.site.tensors for name, size in t.own}
        if leaf.role not in ("A", "B", "embedding") or "r" not in sizes or leaf.config.get("use_rslora"):
            return 1.0
        return math.sqrt(sizes["r"] / reference)

    scales = jax.tree.map(factor, _leaves(tree))

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda f, x: jax.tree.map(lambda x: (x * f).astype(x.dtype), x), scales, updates)

    return optax.stateless(scale)


def lora_fa(tree: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make a LoRA-FA optimizer, which freezes A and corrects B's gradient (Zhang et al. 2023, arXiv:2308.03303).

    The gradient g of B is replaced by g·(A·Aᵀ)⁻¹/s², with the scale s of each site. This follows PEFT's
    `create_lorafa_optimizer`, but computes in float32 where PEFT rounds to bfloat16.

    Args:
        tree: the trained tree.
        inner: the optimizer of all other parameters and of the corrected B, such as `optax.adamw(1e-3)`. It has no
            state for A.

    Raises:
        ConfigError: the tree contains LoRA on embeddings or convolutions, DoRA, KaSA, or a method that freezes tensors,
            such as MiCA and VeRA.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> tx = lora_fa(adapter.collection, optax.adamw(1e-3))
    >>> state = tx.init(adapter.collection)
    """
    flat, structure = jax.tree.flatten(_leaves(tree))
    sites = {
        key: tensors
        for key, tensors in _tensors_by_site(flat).items()
        if {flat[i].role for i in tensors.values()} & {"A", "B", "embedding"}
    }
    raise_listed(
        ConfigError,
        "LoRA-FA supports only plain pairs of matrices, not:",
        [
            f"{name}: {leaf}" + (f" {sorted(tensors)}" if tensors.keys() != {"lora_A", "lora_B"} else "")
            for (name, leaf), tensors in sites.items()
            if tensors.keys() != {"lora_A", "lora_B"} or not factors.has_one_pair(flat[tensors["lora_A"]].site)
        ]
        + [
            f"{leaf.adapter}: "
            + (f"{leaf.tensor} is frozen" if leaf.site is None else f"{leaf.site.leaf}: its B is frozen")
            for leaf in flat
            if leaf.role == "frozen"
        ],
    )

    labels = structure.unflatten(["A" if leaf.role == "A" else "rest" for leaf in flat])
    split = optax.multi_transform({"A": optax.set_to_zero(), "rest": inner}, labels)

    def formula(a: Array, b: Array, grad_a: Array, grad_b: Array, scales: Array) -> tuple[Array, Array]:
        return grad_a, grad_b @ _damped_inverse(a @ a.mT, 1e-8) / scales**2

    pairs = [(tensors["lora_A"], tensors["lora_B"]) for tensors in sites.values()]
    return _correct_first("LoRA-FA", flat, structure, pairs, formula, split)


def riemannian(tree: Any, inner: optax.GradientTransformation, *, reg: float = 1e-2) -> optax.GradientTransformation:
    """Make a Riemannian-preconditioned optimizer (Zhang and Pilanci 2024, arXiv:2402.02347).

    The gradients of LoRA's matrices become (BᵀB + reg·I)⁻¹·g_A and g_B·(AAᵀ + reg·I)⁻¹, module by module, in float32 at
    least, before `inner` sees them. This follows PEFT's `create_riemannian_optimizer`: the pairs of embeddings,
    convolutions and MiCA, and all other parameters, keep their gradients.

    Args:
        tree: the trained tree.
        inner: the optimizer, such as `optax.adamw(1e-3)`.
        reg: the damping, added to the diagonal of the r × r matrices.

    Raises:
        ConfigError: the tree has no pair to precondition, or pairs of experts in one array, of
            modules of several leaves (`nn.MultiheadAttention`, joined projections) or of AdaLoRA.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> tx = riemannian(adapter.collection, optax.adamw(1e-3))
    >>> state = tx.init(adapter.collection)
    """
    if reg < 0:
        raise ConfigError(f"reg: expected a number of at least 0, found {reg!r}")
    flat, structure = jax.tree.flatten(_leaves(tree))
    pairs = [
        (tensors["lora_A"], tensors["lora_B"])
        for tensors in _tensors_by_site(flat).values()
        if tensors.keys() >= {"lora_A", "lora_B"} and flat[tensors["lora_B"]].role == "B"
    ]
    pairs = [(a, b) for a, b in pairs if flat[a].site.match.weight.kind != "conv"]
    raise_listed(
        ConfigError,
        "the Riemannian preconditioner is for LoRA with one pair of matrices a module, not for experts in one array,"
        " modules of several parameters (nn.MultiheadAttention, joined projections) or AdaLoRA:",
        [
            f"{leaf.adapter}: {leaf.site.leaf}"
            for leaf in (flat[a] for a, _ in pairs)
            if not isinstance(leaf.config, LoraConfig) or not factors.has_one_pair(factors.only_pair(leaf.site))
        ],
    )
    if not pairs:
        raise ConfigError("riemannian: expected LoRA's matrices lora_A and lora_B on linear layers, found none")

    def formula(a: Array, b: Array, grad_a: Array, grad_b: Array, scales: Array) -> tuple[Array, Array]:
        return _damped_inverse(b.mT @ b, reg) @ grad_a, grad_b @ _damped_inverse(a @ a.mT, reg)

    return _correct_first("riemannian", flat, structure, pairs, formula, inner)


def _tensors_by_site(flat: Sequence[_Leaf]) -> dict[tuple[str, str], dict[str, int]]:
    """Return `{(adapter, base leaf): {tensor: index}}`, without the tensors of a whole adapter."""
    return paths.nest(
        ((leaf.adapter, leaf.site.leaf), leaf.tensor, i) for i, leaf in enumerate(flat) if leaf.site is not None
    )


def _damped_inverse(matrices: Array, damping: float) -> Array:
    """Return the pseudoinverses of (modules, r, r) with `damping` added to their diagonals."""
    r = matrices.shape[1]
    rtol = float(r * jnp.finfo(matrices.dtype).eps)  # torch's
    return jnp.linalg.pinv(matrices + damping * jnp.eye(r, dtype=matrices.dtype)[None], rtol=rtol)


def _correct_first(
    name: str,
    flat: Sequence[_Leaf],
    structure: Any,
    pairs: Sequence[tuple[int, int]],
    formula: Callable[..., tuple[Array, Array]],
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Make an optimizer that corrects the gradients of A and B before `inner` sees them, in float32 at least.

    Args:
        name: the optimizer's name, for messages.
        flat, structure: the leaves of the trained tree.
        pairs: the indices of each A and its B.
        formula: returns the gradients from A (modules, r, in), B (modules, out, r), their gradients, and the scales
            (modules, 1, 1).
        inner: the optimizer.
    """

    def correct(leaf: _Leaf, values: Sequence[Array], grads: Sequence[Array]) -> Iterator[Array]:
        assert leaf.site is not None
        site = factors.only_pair(leaf.site)
        at = [paths.join(site.leaf, tensor) for tensor in ("lora_A", "lora_B")]
        pairs, grad_pairs = (
            factors.site_pairs(leaf.config, [site], dict(zip(at, map(at_least_float32, each), strict=True)))
            for each in (values, grads)
        )
        r = max(pair.rank for pair in pairs.values())
        sides = [[factors.pad_rank(x.a, x.b, r) for x in each.values()] for each in (pairs, grad_pairs)]
        stacked = [jnp.stack(side) for each in sides for side in zip(*each, strict=True)]
        scales = jnp.stack([jnp.asarray(pair.scale, jnp.float32) for pair in pairs.values()])[:, None, None]
        with jax.default_matmul_precision("highest"):
            new = zip(grad_pairs.items(), *formula(*stacked, scales), strict=True)
        found = {n: dataclasses.replace(pair, a=x[: pair.rank], b=y[:, : pair.rank]) for (n, pair), x, y in new}
        leaves = factors.pair_leaves([site], found)
        return (leaves[path].astype(grad.dtype) for path, grad in zip(at, grads, strict=True))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ConfigError(f"{name} needs the parameters: call tx.update(grads, state, params)")
        held = structure.flatten_up_to(updates)
        # An array may be in a variable or in a box.
        (values, grads) = ([jax.tree.leaves(x)[0] for x in each] for each in (structure.flatten_up_to(params), held))
        for a, b in pairs:
            grads[a], grads[b] = correct(flat[a], (values[a], values[b]), (grads[a], grads[b]))
        wrapped = [jax.tree.unflatten(jax.tree.structure(old), [x]) for old, x in zip(held, grads, strict=True)]
        return inner.update(structure.unflatten(wrapped), state, params)

    return optax.GradientTransformation(inner.init, update)


# ---------------------------------------------------------------- many adapters at once


def per_slot(tx: optax.GradientTransformation, bank: Bank) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer for a bank, with a state of its own for the adapter in each slot.

    `init(bank)` has a state for each slot. `update(grads, state, bank, active=…)` changes only the active slots, bool
    (slots): the others keep their parameters and state, also under weight decay. Slot 0 is never active. Scales are not
    trained. `serving.get` returns a trained adapter.

    Args:
        tx: the optimizer of one adapter, such as `optax.adamw(1e-3)`. Norms that it computes are of one adapter.
        bank: the bank.

    Raises `AttachError` if the bank has room for a DoRA, whose norm is a constant in a bank.

    >>> import jaxadapt
    >>> base, config = {"q": {"kernel": jnp.ones((4, 6))}}, jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> bank = jaxadapt.serving.create(base, config, slots=3)
    >>> tx = per_slot(optax.sgd(1.0), bank)
    >>> grads, active = jax.tree.map(jnp.ones_like, bank), jnp.array([False, True, False])
    >>> updates, state = tx.update(grads, tx.init(bank), bank, active=active)
    >>> optax.apply_updates(bank, updates).arrays[0]["lora_B"].sum((1, 2)).tolist()
    [0.0, -12.0, 0.0]
    """
    places = bank.layout.places
    raise_listed(
        AttachError,
        "cannot train a DoRA in a bank, where its norm is a constant:",
        [place.row.leaf for place in places if place.reads],
    )
    axes = [
        {t.name: p.layers for t in p.site.tensors if p.row.method.role(p.row.hparams, t.name) != "frozen"}
        for p in places
    ]

    def choose(bank: Any) -> list[dict[str, Array]]:
        return [{name: arrays[name] for name in of} for of, arrays in zip(axes, bank.arrays, strict=True)]

    def select(active: Array, new: Array, old: Array, axis: int) -> Array:
        return jnp.where(active.reshape([-1 if i == axis else 1 for i in range(new.ndim)]), new, old)

    def update(updates: Any, state: Any, params: Any = None, *, active: Array, **extra: Any) -> tuple[Any, Any]:
        active = jnp.asarray(active, bool) & (jnp.arange(bank.slots) > 0)
        given = None if params is None else choose(params)
        in_axes = (axes, 0, None if given is None else axes)
        step: Any = jax.vmap(lambda g, s, p: tx.update(g, s, p, **extra), in_axes=in_axes, out_axes=(axes, 0))
        new, changed = step(choose(updates), state, given)
        changed = jax.tree.map(lambda new, old: select(active, new, old, 0), changed, state)
        arrays: list[dict[str, Array]] = []
        for place, values, grads in zip(places, new, updates.arrays, strict=True):
            kept = {name: select(active, x, jnp.zeros_like(x), place.layers) for name, x in values.items()}
            arrays.append({name: kept[name] if name in kept else jnp.zeros_like(x) for name, x in grads.items()})
        return dataclasses.replace(
            updates, arrays=tuple(arrays), shared=jax.tree.map(jnp.zeros_like, tuple(updates.shared))
        ), changed

    init: Any = jax.vmap(tx.init, in_axes=(axes,))
    functions: Any = (lambda bank: init(choose(bank)), update)
    return optax.GradientTransformationExtraArgs(*functions)
