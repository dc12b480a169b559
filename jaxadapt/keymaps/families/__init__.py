"""The keymaps of model families, the parts that several of them share, and the lookup of `keymap=`.

A new family is a file and a row of `TABLE`. A family's file imports this module alone, and no other family's.

The entries here are of Flax's built-in layers (kernels, norms, embeddings), for keymaps whose paths are PyTorch's
names. The spellings are other prefixes of the same keys in PyTorch, for `KeyMap.spellings`. The orders are those of the
linear layers and embeddings in PyTorch's classes, for `KeyMap.order`.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.core import errors
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, coverage, max_coverage, misfits, wrong_counts
from jaxadapt.keymaps.weight import Weight

# ---------------------------------------------------------------- flax entries


FROM, INTO = "m o", "i m"
"""Axes of kernels that read the residual stream, and of kernels that write to it; `same=("m",)` distinguishes them."""


def dense(*modules: str, bias: bool = True, axes: str = "i o") -> tuple[Weight, ...]:
    """Return the entries of `nn.Dense` modules; with `bias`, the model may have biases or not."""
    inputs, out = axes.split()
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{axes} -> {out} {inputs}") for m in modules)
    return (*kernels, *biases(modules)) if bias else tuple(kernels)


def biases(modules: Iterable[str]) -> tuple[Weight, ...]:
    """Return the entries of the biases of these modules."""
    return tuple(Weight(f"{m}.bias", f"{m}.bias", "o -> o") for m in modules)


def norms(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.LayerNorm` modules."""
    return (*(Weight(f"{m}.scale", f"{m}.weight", "d -> d") for m in modules), *biases(modules))


def embeddings(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.Embed` modules."""
    return tuple(Weight(f"{m}.embedding", f"{m}.weight", "v d -> v d", kind="embedding") for m in modules)


def convs(*modules: str, window: str = "h w") -> tuple[Weight, ...]:
    """Return the entries of `nn.Conv` modules, whose window axes are first in Flax and last in PyTorch."""
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{window} i o -> o i {window}", kind="conv") for m in modules)
    return (*kernels, *biases(modules))


# ---------------------------------------------------------------- spellings


VISION_LANGUAGE = (
    ("vl", (("model.", "model.language_model."),)),  # since transformers 4.52, as in Gemma3ForConditionalGeneration
    ("vl4", (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))),  # before transformers 4.52
)
"""The spellings of the language model in a vision-language model."""


def bare(prefix: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return the spelling of a model without its head, for which transformers omits the prefix."""
    return (("bare", ((prefix, ""),)),)


# ---------------------------------------------------------------- module orders


DECODER_ORDER = (
    *("model", "lm_head", "embed_tokens", "layers", "linear_attn", "self_attn", "mlp"),
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("conv1d", "in_proj_qkvz", "in_proj_ba", "out_proj"),
    *("shared_expert", "shared_experts", "shared_expert_gate", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
"""Llama and the models after it."""

KEYS_FIRST_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
"""Attention layers that create the projection of the keys first."""


# ---------------------------------------------------------------- decoders


LAYER = "model.layers.{l}."
"""The prefix of a layer's names in PyTorch."""

Names = Iterable[tuple[str, str]]
"""Pairs of a module's name in JAX and in PyTorch."""


def layer_kernels(*modules: str) -> tuple[Weight, ...]:
    """Return the kernels of a decoder's layer, which read the residual stream or write to it."""
    axes = {"o_proj": INTO, "down_proj": INTO, "q_b_proj": "r o", "kv_b_proj": "r o"}
    pairs = ((f"{LAYER}{m}", axes.get(m.rpartition(".")[2], FROM)) for m in modules)
    return tuple(kernel for m, pattern in pairs for kernel in dense(m, bias=False, axes=pattern))


def layer_norms(layer: str, names: Names, axis: str = "d", leaf: str = "scale") -> tuple[Weight, ...]:
    """Return the entries of a layer's norms; `layer` is the prefix of its names in JAX."""
    return tuple(Weight(f"{layer}{a}.{leaf}", f"{LAYER}{b}.weight", f"{axis} -> {axis}") for a, b in names)


def with_options(entries: Iterable[Weight], **options: Any) -> tuple[Weight, ...]:
    """Return the entries with other options, such as `layers`; "#" in a leaf becomes `{place}`."""
    return tuple(Weight(w.leaf.replace("#", "{place}"), w.key, w.pattern, **{**w.options, **options}) for w in entries)


def router_kernel(module: str) -> Weight:
    """Return the entry of a layer's router, a parameter that is not of an `nn.Linear`."""
    return Weight(f"{LAYER}{module}.kernel", f"{LAYER}{module}.weight", "d e -> e d", kind="parameter")


def expert_arrays(block: str, torch: str, turned: bool = False) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts, in one array for gate and up; `torch` has PyTorch's axes of each."""
    module = f"{LAYER}{block}.experts."
    return tuple(
        Weight(
            f"{module}{p}",
            f"{module}{p}",
            f"e {i} {o} -> {torch.translate({ord('i'): i, ord('o'): o})}",
            kind="experts",
            fan_in_fan_out=turned,
        )
        for p, i, o in (("gate_up_proj", "m", "f"), ("down_proj", "f", "m"))
    )


def decoder_keymap(name: str, weights: Iterable[Weight], **fields: Any) -> KeyMap:
    """Return the keymap of a decoder that has Llama's modules in PyTorch; `fields` are further fields of `KeyMap`."""
    return KeyMap(
        name,
        tuple(weights),
        output="lm_head",
        order=DECODER_ORDER,
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        spellings=(*VISION_LANGUAGE, *bare("model.")),
        **fields,
    )


Modules = tuple[tuple[str, tuple[str, ...]], ...]
"""`KeyMap.expert_modules`: parameters of all experts, each with the names of its parts as modules of single experts."""


def single_expert_names(block: str, wide: tuple[str, str], down: str, router: str = "") -> Modules:
    """Return the names of single experts in transformers 4 (gate, up and down of `block`) and of the router."""
    expert = f"{LAYER}{block}.experts.{{e}}."
    names = (
        (f"{LAYER}mlp.experts.gate_up_proj", tuple(expert + name for name in wide)),
        (f"{LAYER}mlp.experts.down_proj", (expert + down,)),
    )
    return (*names, (f"{LAYER}mlp.gate.weight", (f"{LAYER}{router}",))) if router else names


EACH_MIXTRAL = single_expert_names("block_sparse_moe", ("w1", "w3"), "w2", "block_sparse_moe.gate")
EACH_QWEN3 = single_expert_names("mlp", ("gate_proj", "up_proj"), "down_proj", "mlp.gate")
EACH_DEEPSEEK = single_expert_names("mlp", ("gate_proj", "up_proj"), "down_proj")


# ---------------------------------------------------------------- table


TABLE = {
    "llama": "LLAMA",
    "gpt": "GPT2 GPT2_DENSE GPT_NEO GPTJ",
    "bert": "BERT ROBERTA",
    "t5": "T5",
    "vit": "VIT",
    "clip": "CLIP",
    "whisper": "WHISPER",
    "moe": "MIXTRAL QWEN3_MOE GPT_OSS LLAMA4 DEEPSEEK_V3",
    "sigmoid_moe": "GLM4_MOE MINIMAX_M2",
    "qwen3_next": "QWEN3_NEXT",
    "nemotron_h": "NEMOTRON_H",
    "gpt_neox": "GPT_NEOX",
    "falcon": "FALCON",
    "stablelm": "STABLELM",
    "tunix": "LLAMA3 QWEN2 QWEN3 QWEN3_MOE",
    "gemma": "TUNIX_GEMMA TUNIX_GEMMA2 TUNIX_GEMMA3 TUNIX_GEMMA4"
    " GEMMA GEMMA2_2B GEMMA2 GEMMA3 GEMMA3N GEMMA4 GEMMA4_MOE",
    "maxtext": "LLAMA31 LLAMA3 MISTRAL QWEN2 QWEN3 GEMMA2 GEMMA3 GEMMA3_4B GEMMA3_12B GEMMA3_27B"
    " MIXTRAL QWEN3_MOE GPT_OSS GPT_OSS_BLOCKS DEEPSEEK_V3 KIMI_K2",
    "maxtext_gemma4": "GEMMA4 GEMMA4_BLOCKS",
    "maxtext_qwen3_next": "QWEN3_NEXT QWEN3_NEXT_BLOCKS QWEN3_5 QWEN3_5_BLOCKS",
    "maxtext_llama4": "LLAMA4 LLAMA4_BLOCKS",
    "maxtext_deepseek2": "DEEPSEEK2",
    "maxtext_olmo3": "OLMO3 OLMO3_BLOCKS",
    "maxtext_gpt3": "GPT3",
    "keras": "LLAMA QWEN2 QWEN3 MIXTRAL QWEN_MOE QWEN3_MOE",
    "keras_gemma": "GEMMA GEMMA2 GEMMA3 GEMMA4",
    "keras_fused": "GPT2 PHI3",
    "keras_encoder": "BERT ROBERTA ELECTRA",
    "easydel": "LLAMA",
    "openpi": "PI0",
    "bonsai": "QWEN3 GEMMA3 VIT DINOV3 WHISPER UMT5",
}
"""`{file of this package: its keymaps}`, in the order in which families are tried."""


def load_families(table: Mapping[str, str]) -> dict[str, KeyMap]:
    """Return `{name: keymap}` of the rows of a table such as `TABLE`."""
    files = {file: vars(importlib.import_module(f"{__name__}.{file}")) for file in table}
    keymaps: list[KeyMap] = [files[file][name] for file, names in table.items() for name in names.split()]
    return {keymap.name: keymap for keymap in keymaps}


FAMILIES = load_families(TABLE)


def get_family(name: str, families: Mapping[str, KeyMap] = FAMILIES) -> KeyMap:
    """Return a keymap by name: "llama", "llama/scan1" for layers stacked on axis 1, "llama/vl" for another spelling.

    Raises `KeyMapError` for an unknown name.

    >>> get_family("llama/scan1").name
    'llama/scan1'
    """
    base, *changes = name.split("/")
    keymap = {**families, GENERIC.name: GENERIC}.get(base)
    if keymap is None:
        close = errors.close_matches((base,), tuple(families))
        raise errors.KeyMapError(
            f"there is no family {name!r}"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else ".")
            + f" `jaxadapt families` lists them (add /scan0, /scan1, … for layers stacked on that axis);"
            f" {GENERIC.name!r} has the model's own paths. Mistral, Qwen 2 and Qwen 3 with Hugging Face's names are"
            " 'llama'"
        )
    for change in changes:
        axis = change.removeprefix("scan")
        keymap = keymap.scanned(int(axis)) if change != axis and axis.isdecimal() else keymap.with_spelling(change)
    return keymap


def resolve_keymap(
    keymap: KeyMap | str | None,
    shapes: Mapping[str, tuple[int, ...]],
    families: Mapping[str, KeyMap] = FAMILIES,
    model: type = object,
) -> KeyMap:
    """Return the keymap for an argument `keymap=`; None and "auto" recognize it from the model's paths and shapes.

    "auto" selects the family that matches most leaves, and of several such families the one with the fewest unused
    entries. A head or a norm without an entry stays unmapped, which is an error only if it is targeted. If no family
    matches, it selects the generic keymap, except for a model of a library that has families: its paths may not be
    PyTorch's names.

    Args:
        keymap: a keymap, the name of a family, "auto" or None.
        shapes: the shapes of the model's weights by dotted path.
        families: the families to choose from, by name.
        model: the class of the model, if there is one.

    Raises `KeyMapError` naming the candidates if the best families disagree, or if the best one is not verified, or if
    none matches a model of a library that has families; and for a named family of another number of layers, where the
    numbers of later layers depend on it.
    """
    if isinstance(keymap, KeyMap):
        return keymap
    if not isinstance(keymap, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.KeyMapError(f"keymap: expected a KeyMap or the name of a family, found {type(keymap).__name__}")
    if keymap not in (None, "auto"):
        named = get_family(keymap, families)
        errors.raise_listed(
            errors.KeyMapError,
            f"the keymap {named.name!r} is for another number of these layers, and the numbers of later ones would be"
            " wrong. Name the family of your model's size, or pass a KeyMap with the numbers of its layers:",
            wrong_counts(named, shapes),
        )
        return named
    leaves = _one_of_each_kind(shapes)
    found = (
        _recognize_known(tuple(families), tuple(leaves.items()))
        if families is FAMILIES
        else _recognize(families.values(), leaves)
    )
    packages = tuple(name.partition(":")[0] + "." for name in families if ":" in name)
    if found is GENERIC and any(cls.__module__.startswith(packages) for cls in model.__mro__):
        raise errors.KeyMapError(
            f"no keymap has the names of {model.__module__}.{model.__qualname__} in PyTorch. Where these are not the"
            " model's own paths, PEFT would load the adapter without effect. Pass a KeyMap with an entry for each"
            f" weight, or keymap={GENERIC.name!r} if the paths are PyTorch's names or only JAX loads the adapter"
            f"{describe_nearest_family(shapes)}"
        )
    return found


def _one_of_each_kind(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the leaves of a model without those of further layers, which are alike."""
    # A number at the end is part of a weight's name (wi_0, wi_1). In a model whose blocks are several layers, at most
    # six, these layers differ.
    kinds = {
        (re.sub(r"\d+(?=\.)", lambda n: n[0] if n[0] in set("012345") else "6", path), shape): path
        for path, shape in shapes.items()
    }
    return {leaf: shape for (_, shape), leaf in kinds.items()}


def _bounded_forms(keymaps: Iterable[KeyMap], leaves: Mapping[str, tuple[int, ...]]) -> list[tuple[int, list[KeyMap]]]:
    """Return the unrolled and the stacked forms of keymaps, with upper bounds of `coverage`; the largest bound first.

    In most keymaps few entries match any of the leaves, so that the bound excludes them cheaply.
    """
    bounds = ((max_coverage(f, leaves, stacked), f, stacked) for f in keymaps for stacked in (False, True))
    return [
        # A family that is stacked itself has no further forms.
        (bound, [t for t in map(f.scanned, range(3)) if t.weights != f.weights] if stacked else [f])
        for bound, f, stacked in sorted(bounds, key=lambda each: -each[0])
        if bound
    ]


@functools.lru_cache(maxsize=128)  # the same model is recognized for each adapter
def _recognize_known(names: tuple[str, ...], leaves: tuple[tuple[str, tuple[int, ...]], ...]) -> KeyMap:
    """Return the keymap that `_recognize` chooses among these families; hashing their names takes less time."""
    return _recognize(map(FAMILIES.__getitem__, names), dict(leaves))


def _recognize(keymaps: Iterable[KeyMap], samples: Mapping[str, tuple[int, ...]]) -> KeyMap:
    counts, best = dict[KeyMap, int](), 1
    for bound, forms in _bounded_forms(keymaps, samples):
        if bound < best:
            break
        counts |= {t: coverage(t, samples) for t in forms}
        best = max([best, *counts.values()])
    fitting = [t for t, count in counts.items() if count == best]
    if not fitting:
        return GENERIC
    unused = {t: len(t.weights) - len(set(_matched_entries(t, samples))) for t in fitting}
    chosen = [t for t in fitting if unused[t] == min(unused.values())]
    rivals = [t for t in fitting if _matched_entries(t, samples) != _matched_entries(chosen[0], samples)]
    if rivals or len(chosen) > 1:
        raise errors.KeyMapError(
            "cannot recognize the model: its parameters fit several keymaps:"
            f" {', '.join(map(_format_name, dict.fromkeys((*chosen, *rivals))))}; select one with keymap="
        )
    if not chosen[0].proved:
        raise errors.KeyMapError(
            f"the model looks like {chosen[0].name!r}, but that keymap has not been verified against the real models;"
            f" pass keymap={chosen[0].name!r} to use it, or keymap={GENERIC.name!r} for the generic keymap"
        )
    return chosen[0]


def family_of_leaves(leaves: Iterable[str], families: Mapping[str, KeyMap] = FAMILIES) -> KeyMap:
    """Return the family that matches all of these leaves, by their names only, or the generic keymap if none does.

    Raises `KeyMapError` if several families match and disagree.
    """
    leaves = tuple(leaves)
    known = [t for t in families.values() if all(t.match(leaf) is not None for leaf in leaves)]
    if not known:
        return GENERIC
    if any(_matched_entries(t, leaves) != _matched_entries(known[0], leaves) for t in known):
        raise errors.KeyMapError(
            "cannot recognize the model: the adapted weights fit several keymaps:"
            f" {', '.join(map(_format_name, known))}; select one with keymap="
        )
    return min(known, key=lambda t: len(t.needs))  # they agree: the one with the fewest conditions


def describe_nearest_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a text for an error message: the family most similar to a model, and the leaves that do not fit it."""
    samples, counts = _one_of_each_kind(shapes), dict[KeyMap, int]()
    for bound, forms in _bounded_forms(FAMILIES.values(), samples):
        if bound < max(counts.values(), default=1):
            break
        entries = {t: [w for w in _matched_entries(t, samples) if w is not None] for t in forms}
        counts |= {t: len(matched) for t, matched in entries.items() if any(w.is_layer_matrix for w in matched)}
    similar = [t for t, count in counts.items() if count == max(counts.values())]
    if not similar:
        return "\nNo keymap of a known family is similar to this model"
    nearest = min(similar, key=lambda t: len([*misfits(t, samples)]))
    reasons = errors.bullets(misfits(nearest, shapes))
    return (
        f"\nThe most similar keymap is {nearest.name!r}, with entries for"
        f" {sum(nearest.match(leaf) is not None for leaf in shapes)} of {len(shapes)} weights. "
    ) + (f"It does not fit because of\n{reasons}" if reasons else f"It fits: pass keymap={nearest.name!r}")


def _matched_entries(keymap: KeyMap, leaves: Iterable[str]) -> list[Weight | None]:
    return [None if match is None else match.weight for match in map(keymap.match, leaves)]


def _format_name(keymap: KeyMap) -> str:
    return keymap.name if keymap.proved else f"{keymap.name} (not verified)"
