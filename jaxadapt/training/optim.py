"""Training helpers on optax: what each adapter parameter is, and optimisers that treat A, B and the rest apart.

    tx = jaxadapt.optim.lora_plus(model, optax.adamw, 1e-4, ratio=16)
    optimizer = nnx.Optimizer(model, tx, wrt=jaxadapt.AdapterParam)      # Linen: tx.init(lora), tx.update(grads, …)

Every function takes the tree that is trained: an NNX model (or its state), or the collection `{"lora": …}`. Roles come
from the adapter's own method and configuration there, never from guessing at names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadapt import methods
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.merging import factors as products
from jaxadapt.models import attachment
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach as nnx

__all__ = ["decay_mask", "kasa_loss", "lora_fa", "lora_plus", "roles", "scale_by_rank"]

Array = Any
Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    """One trained array: of which adapter, at which site, which of its tensors."""

    adapter: str
    config: Config
    site: bind.Site
    tensor: str
    ndim: int  # stacked layers not counted

    @property
    def role(self) -> str:
        if self.site.method.copies:
            return "bias" if self.site.leaf.rpartition(".")[2] == "bias" else "copy"
        return self.site.method.role(self.site.hparams, self.tensor)

    @property
    def decays(self) -> bool:
        return self.role in ("A", "B", "embedding") or (self.role == "copy" and self.ndim > 1)


def _leaves(tree: Any) -> Any:
    """The tree with a `_Leaf` in the place of each array (or variable, or box)."""
    if isinstance(tree, nnx.nnx.Module):
        tree = nnx.nnx.state(tree, nnx.AdapterParam)
    if isinstance(tree, nnx.nnx.State):
        return _of_state(tree)
    if isinstance(tree, Adapter):
        return dataclasses.replace(tree, params=paths.unflatten(_named(tree, "default")))
    if isinstance(tree, Mapping) and "params" not in tree:
        found = _of_collections(tree)
        if any(isinstance(x, _Leaf) for x in jax.tree.leaves(found)):
            return found
    raise AttachError(
        "expected the tree that is trained, an adapted NNX model or the adapters' collections (without 'params'), found"
        f" {type(tree).__name__}"
    )


def _of_state(state: Any) -> Any:
    held = nnx.adapter_variables(state)
    if not held:
        raise AttachError("this model carries no adapter to train")
    made: dict[int, _Leaf] = {}
    for name, by_path in held.items():
        known = _named(nnx.extract(state, name), name)
        made |= {id(var): known[path] for path, var in by_path.items()}
    flat = nnx.nnx.to_flat_state(state)
    others = [f"{paths.join(*map(str, path))}: {type(var).__name__}" for path, var in flat if id(var) not in made]
    if others:
        raise AttachError(
            "of a state, what is trained alone: nnx.state(model, jaxadapt.AdapterParam); this one also holds\n"
            + paths.bullets(others)
        )
    return jax.tree.map(lambda var: made[id(var)], state, is_leaf=lambda x: isinstance(x, nnx.nnx.Variable))


def _of_collections(tree: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and CONFIG_NODE in value:
            adapter = collections.read_collection(value, name)
            out[name] = {**paths.unflatten(_named(adapter, name)), CONFIG_NODE: value[CONFIG_NODE]}
        else:
            out[name] = _of_collections(value) if isinstance(value, Mapping) else value
    return out


def _named(adapter: Adapter, name: str) -> dict[str, _Leaf]:
    """`{path: what it is}` of one adapter's parameters."""
    plain = dataclasses.replace(adapter, params=collections.unbox_tree(adapter.params))
    return {
        paths.join(b.leaf, tensor): _Leaf(name, adapter.config, b, tensor, len(shape) - len(b.match.stack))
        for b in bind.sites_of(plain)
        for tensor, shape in b.shapes.items()
    }


def _map(f: Callable[[_Leaf], Any], tree: Any) -> Any:
    return jax.tree.map(f, _leaves(tree), is_leaf=lambda x: isinstance(x, _Leaf))


# ---------------------------------------------------------------- labels


def roles(tree: Any) -> Any:
    """What each parameter is, as a tree of labels for `optax.multi_transform`.

    "A" and "B" are LoRA's matrices, "embedding" those of an adapted embedding, "bias" a trained bias, "vector" IA3's
    and DoRA's vectors (and KaSA's), "copy" a weight trained in full, "frozen" MiCA's B, "other" the rest.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> roles(adapter.collection)["lora"]["default"]["q"]
    {'kernel': {'lora_A': 'A', 'lora_B': 'B'}}
    """
    return _map(lambda leaf: leaf.role, tree)


def decay_mask(tree: Any) -> Any:
    """Where weight decay belongs, for `optax.adamw(…, mask=…)`: on matrices.

    Not on biases and norms, whose scale means something, nor on IA3's and DoRA's vectors, which begin at one (or at a
    weight's length) and would be pulled to zero.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> tx = optax.adamw(1e-3, mask=decay_mask(adapter.collection))
    """
    return _map(lambda leaf: leaf.decays, tree)


# ---------------------------------------------------------------- a penalty


def kasa_loss(tree: Any, name: str = attachment.DEFAULT) -> Array:
    """The penalties of KaSA (arXiv:2412.06071, equations 9 to 11), to be added to the loss: a scalar in float32.

    β·Σd² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), summed over the modules, with `kasa_config`'s beta and gamma; PEFT's
    `LoraModel._get_kasa_loss`. Raises `ConfigError` for an adapter without `kasa_config`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jnp.eye(6)}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"], kasa_config={"beta": 0.0, "gamma": 0.5})
    >>> adapter = jaxadapt.initializers.start(config, base, key=jax.random.key(0)).adapter
    >>> round(float(kasa_loss(jax.tree.map(jnp.zeros_like, adapter))), 3)  # half of √2 + √2
    1.414
    """
    adapter = attachment.extract(tree, name)
    how = adapter.config.get("kasa_config")
    if how is None:
        raise ConfigError(f"the adapter {name!r} has no kasa_config, and so no such penalty")
    plain = dataclasses.replace(adapter, params=collections.unbox_tree(adapter.params))
    total: Any = jnp.zeros((), jnp.float32)
    for bound in bind.sites_of(plain):
        if bound.method.copies:
            continue
        held = {t: methods.at_least_float32(x) for t, x in plain.sites[bound.leaf].items()}
        pair = [(t, e) for t, e in zip(bound.tensors, bound.entries, strict=True) if t.name in ("lora_A", "lora_B")]
        tensors, entries = zip(*pair, strict=True)
        a, b = products.site_matrices(dataclasses.replace(bound, tensors=tensors, entries=entries), held)
        eye = jnp.eye(a.shape[1])[None]
        with jax.default_matmul_precision("highest"):
            grams = jnp.swapaxes(b, 1, 2) @ b, a @ jnp.swapaxes(a, 1, 2)
        apart = sum(jnp.sum(jnp.linalg.norm(gram - eye, axis=(1, 2))) for gram in grams)
        total += how.get("beta", 1e-4) * jnp.sum(held["lora_diag"] ** 2) + how.get("gamma", 1e-3) * apart
    return total


# ---------------------------------------------------------------- optimisers


def lora_plus(
    tree: Any,
    make: Make,
    learning_rate: Any,
    ratio: float,
    *,
    weight_decay: float = 0.0,
    embedding_learning_rate: Any = 1e-6,
) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns `ratio` times as fast as A.

    Args:
        tree: what is trained.
        make: `optax.adamw`, or any function called as `make(learning_rate, weight_decay=…)`.
        learning_rate: of A, and of copies of weights; a number or a schedule.
        ratio: of B's (and of biases' and vectors') learning rate to it; the paper's advice is 16 and more.
        weight_decay: where `decay_mask` has it.
        embedding_learning_rate: of adapted embeddings.

    The groups are those of PEFT's `create_loraplus_optimizer`, save that DoRA's magnitudes are not decayed.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> tx = lora_plus(adapter.collection, optax.adamw, 1e-4, ratio=16)
    >>> state = tx.init(adapter.collection)
    """
    if ratio <= 0:
        raise ConfigError(f"ratio: expected a positive number, found {ratio!r}")
    group = {"A": "A", "copy": "A", "other": "A", "embedding": "embedding", "frozen": "frozen"}
    labels = _map(lambda leaf: group.get(leaf.role, "B") + ("" if leaf.decays else " plain"), tree)
    rates = {"A": learning_rate, "embedding": embedding_learning_rate, "B": _times(learning_rate, ratio)}
    each: dict[Any, optax.GradientTransformation] = {
        name: make(rate, weight_decay=weight_decay) for name, rate in rates.items()
    }
    each |= {f"{name} plain": make(rate, weight_decay=0.0) for name, rate in rates.items()}
    each["frozen plain"] = optax.set_to_zero()
    return optax.multi_transform(each, labels)


def _times(rate: Any, ratio: float) -> Any:
    schedule: Any = rate
    return (lambda step: schedule(step) * ratio) if callable(rate) else rate * ratio  # pyright: ignore[reportUnknownLambdaType]


def scale_by_rank(tree: Any, reference: int = 8) -> optax.GradientTransformation:
    """Each site's updates times √(r / reference): put it last in `optax.chain`.

    With the scale α/r, and an optimiser of fixed step size such as Adam, the higher a site's rank, the less its weight
    moves; rsLoRA's α/√r (Kalajdzievski 2023, arXiv:2312.03732) does away with that. These learning rates make the same
    first step as α'/√r with α' = α/√reference, in a file that readers without rsLoRA understand. Sites that have
    rsLoRA already, and parameters that are no LoRA matrices, keep their rate.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> tx = optax.chain(optax.adam(1e-3), scale_by_rank(adapter.collection))
    >>> state = tx.init(adapter.collection)
    """

    if reference <= 0:
        raise ConfigError(f"reference: expected a positive rank, found {reference!r}")

    def factor(leaf: _Leaf) -> float:
        own = {name: size for t in leaf.site.tensors for name, size in t.own}
        if leaf.role not in ("A", "B", "embedding") or "r" not in own or leaf.config.get("use_rslora"):
            return 1.0
        return math.sqrt(own["r"] / reference)

    factors = _map(factor, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda f, x: jax.tree.map(lambda x: (x * f).astype(x.dtype), x), factors, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lora_fa(tree: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it is, and B's gradient is corrected for it.

    `inner` (`optax.adamw(1e-3)`, say) sees g·(A·Aᵀ)⁻¹/s² in the place of B's gradient g, and no A at all: it keeps no
    state for it. As PEFT's `create_lorafa_optimizer`, with each site's own scale, and in float32 (PEFT's goes through
    bfloat16). Other parameters are `inner`'s as they are.

    Raises `ConfigError` for LoRA on embeddings and convolutions, for DoRA and KaSA, and for MiCA, which freezes B.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> tx = lora_fa(adapter.collection, optax.adamw(1e-3))
    >>> state = tx.init(adapter.collection)
    """
    leaves = _leaves(tree)
    flat, structure = jax.tree.flatten(leaves, is_leaf=lambda x: isinstance(x, _Leaf))
    where: dict[tuple[str, str], dict[str, int]] = {}
    for i, leaf in enumerate(flat):
        where.setdefault((leaf.adapter, leaf.site.leaf), {})[leaf.tensor] = i
    sites = {key: at for key, at in where.items() if {flat[i].role for i in at.values()} & {"A", "B", "embedding"}}
    odd = [f"{name}: {leaf} {sorted(at)}" for (name, leaf), at in sites.items() if set(at) != {"lora_A", "lora_B"}]
    odd += [f"{leaf.adapter}: {leaf.site.leaf}: its B is frozen" for leaf in flat if leaf.role == "frozen"]
    odd = odd or [
        f"{name}: {leaf}" for (name, leaf), at in sites.items() if not products.has_one_pair(flat[at["lora_A"]].site)
    ]
    if odd:
        raise ConfigError("LoRA-FA is for plain pairs of matrices, which these are not:\n" + paths.bullets(odd))

    def corrected(updates: Any, params: Any) -> Any:
        grads = structure.flatten_up_to(updates)
        values = structure.flatten_up_to(params)
        for at in sites.values():
            a, b = at["lora_A"], at["lora_B"]
            bound = flat[a].site
            (a_value,), (grad,) = jax.tree.leaves(values[a]), jax.tree.leaves(grads[b])
            grads[b] = jax.tree.unflatten(jax.tree.structure(grads[b]), [_corrected(bound, a_value, grad)])
        return structure.unflatten(grads)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ConfigError("LoRA-FA needs the parameters: tx.update(grads, state, params)")
        return apart.update(corrected(updates, params), state, params)

    frozen = jax.tree.map(
        lambda leaf: "A" if leaf.role == "A" else "rest", leaves, is_leaf=lambda x: isinstance(x, _Leaf)
    )
    apart = optax.multi_transform({"A": optax.set_to_zero(), "rest": inner}, frozen)
    return optax.GradientTransformation(apart.init, update)


def _corrected(bound: bind.Site, a: Array, grad: Array) -> Array:
    """B's gradient times (A·Aᵀ)⁻¹/s², module by module, in float32."""
    with jax.default_matmul_precision("highest"):
        tensors = {"lora_A": methods.at_least_float32(a), "lora_B": methods.at_least_float32(grad)}
        a_rows, rows = products.site_matrices(bound, tensors, scaled=False)
        gram = a_rows @ jnp.swapaxes(a_rows, 1, 2) + 1e-8 * jnp.eye(a_rows.shape[1])[None]
        new = rows @ jnp.linalg.pinv(gram) / products.scale(bound) ** 2
        _, leaves = products.matrices_to_leaves(bound, a_rows, new, scaled=False)
    return leaves[paths.join(bound.leaf, "lora_B")].astype(grad.dtype)
