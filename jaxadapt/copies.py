"""Which leaves an adapter holds a full copy of: the modules trained in full, and trained biases.

PEFT's rules, on PyTorch names. Nothing here looks at a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxadapt import generic, plan, targets
from jaxadapt.configs import Config
from jaxadapt.errors import ConfigError
from jaxadapt.keymap import KeyMap, Site
from jaxadapt.methods.copied import Copied

Shape = tuple[int, ...]
Index = tuple[int, ...]

COPY = "copy"
"""The name of such a tensor in an adapter."""


def asked(config: Config) -> bool:
    """Whether the configuration asks for any copies at all."""
    return bool(config.get("modules_to_save")) or config.get("bias", "none") != "none"


def wanted(config: Config, module: str, parameter: str, adapted: Collection[str]) -> Copied | None:
    """How one parameter is copied, None if it is not; `adapted` are the modules with an adapter of their own.

    PEFT wraps an adapted module, so the name of its bias has "base_layer" in it.
    """
    if targets.is_saved(config, module):
        return Copied("modules_to_save")
    mode = config.get("bias", "none")
    if parameter != "bias" or mode == "none":
        return None
    wrapped = module in adapted
    return Copied("bias", wrapped) if wrapped or mode == "all" else None


def of_site(config: Config, site: Site, sizes: Mapping[str, int], adapted: Collection[str]) -> dict[Index, Copied]:
    """The copied entries of one leaf, by index over its stacked axes and fused axis."""
    found = {
        index: copied
        for index, (module, parameter) in site.parameters(sizes).items()
        if (copied := wanted(config, module, parameter, adapted)) is not None
    }
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"leaf {site.leaf!r} holds several parameters in one array, which modules_to_save and bias treat"
            " differently; use an unrolled model, or treat them alike"
        )
    return found


def site_of(keymap: KeyMap, leaf: str, shape: Shape) -> Site:
    """The leaf's site, by its table or else under its JAX path; a copy needs no roles."""
    site = keymap.site(leaf)
    fits = site is not None and len(site.weight.left) == len(shape)
    return site if site is not None and fits else Site(leaf, generic.as_it_is(leaf, shape))


def select(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Collection[str]
) -> list[tuple[Site, dict[str, int], dict[Index, Copied]]]:
    """`(site, sizes, copied entries)` of every leaf that is copied, in the order of `shapes`."""
    if not asked(config):
        return []
    out: list[tuple[Site, dict[str, int], dict[Index, Copied]]] = []
    for leaf, shape in shapes.items():
        site = site_of(keymap, leaf, shape)
        sizes = plan.sizes_of(site, shape)
        if found := of_site(config, site, sizes, adapted):
            out.append((site, sizes, found))
    return out
