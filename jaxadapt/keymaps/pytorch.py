"""Keymaps for PyTorch state dicts, whose leaves are PyTorch's parameters in PyTorch's layout.

With such a keymap, files of adapters are merged and combined by the same arithmetic as in a model, without a model.

    {"…experts.3.w1.weight": (f, d), …} ──expert_rows──► {"…experts.gate_up_proj": names by expert and part}

transformers 5 joins the tensors of a folder's experts when it loads them, to (e, 2f, d), and splits them when it saves
(its `conversion_mapping.py`). `KeyMap.expert_modules` has their names.

Files of image adapters flatten the names of Stable Diffusion 1, 2 and XL and of CLIP: kohya-ss replaces the dots of a
module's name by underscores ("down_blocks_0_…_to_q"). Only a list of diffusers' modules can undo that. For SDXL it also
uses the names of Stability AI's own UNet ("input_blocks.4.1.…"). Pure: names and shapes.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight, name_regex

# ---------------------------------------------------------------- pytorch


_ROWS = ".trainable_tokens_delta"
Shapes = Mapping[str, tuple[int, ...]]
Sizes = Callable[[str, Shapes, tuple[int, ...]], tuple[int | None, int | None]]
"""(module, its file tensors, the shape of a convolution's weight) -> its outputs and its inputs, if they are known."""

SHARED_MODULE = "base_model"  # the part of a key before the tensors of the whole adapter

KEYMAP_NAME = "pytorch"
"""The name of such a keymap."""


def adapted_shapes(tensors: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return `{module: {tensor: shape}}` of an adapter file, without copies of parameters and shared tensors.

    >>> adapted_shapes({"base_model.model.q.lora_A.weight": (2, 4), "base_model.model.q.lora_B.weight": (6, 2)})
    {'q': {'lora_A': (2, 4), 'lora_B': (6, 2)}}
    """
    return {
        module: {name: tensors[key] for name, key in keys.items()} for module, keys in adapted_keys(tensors).items()
    }


def adapted_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return `{module: {tensor: key}}` of an adapter file, without copies of parameters and shared tensors.

    >>> adapted_keys(["base_model.model.q.lora_A.weight"])
    {'q': {'lora_A': 'base_model.model.q.lora_A.weight'}}
    """
    names = matching.tensor_names(tuple(FACTS))
    tensor = _tensor_pattern(names.with_parts, names.prefixes)
    matches = [(key, tensor.fullmatch(key.removeprefix(PEFT_PREFIX))) for key in keys]
    return paths.nest(
        (match["module"], match["name"].replace(".", "_"), key)
        for key, match in matches
        if match is not None and match["module"] != SHARED_MODULE and not key.endswith(_ROWS)
    )


def named_parameter(config: Config, module: str) -> str:
    """Return the parameter that a module path of a file stands for, or the module path if it has no such parameter.

    PEFT wraps a module once per parameter in `target_parameters`. The module's first parameter is innermost, so with
    gate_up_proj and down_proj, "experts.base_layer" stands for gate_up_proj.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    >>> named_parameter(config, "0.experts.base_layer")
    '0.experts.gate_up_proj'
    """
    depth = len(module.split(".base_layer")) - 1
    owner = module.removesuffix(".base_layer" * depth)
    ends = dict.fromkeys(entry.rpartition(".")[2] for entry in config.get("target_parameters") or ())
    adapted = sorted((end for end in ends if matching.is_parameter(config, f"{owner}.{end}")), key=flow_position)
    position = len(adapted) - 1 - depth
    return f"{owner}.{adapted[position]}" if 0 <= position < len(adapted) else module


# The order of data flow through a layer. Other names come after these, in the file's order.
_FLOW = (
    "qkv_proj", "c_attn", "query_key_value", "q_proj", "query", "to_q", "q", "k_proj", "key", "to_k", "k", "v_proj",
    "value", "to_v", "v", "o_proj", "out_proj", "to_out", "o", "dense", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
    "fc1", "wi_0", "wi_1", "wi", "down_proj", "fc2", "wo",
)  # fmt: skip


def no_place_for(source: str, config: Config, keys: Iterable[str]) -> str:
    """Return the line that tells which modules of a file a model has no place for; "" if there are none.

    Args:
        source: the file.
        config: the configuration, which names the parameters that the keys stand for.
        keys: the keys of the tensors without a place.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> no_place_for("out/", LoraConfig(), [f"base_model.model.h.{l}.q.lora_A.weight" for l in range(3)])
    'out/: the model has no place for h.0-2.q (3)\\n'
    """
    modules = dict.fromkeys(named_parameter(config, module) for module in adapted_keys(keys))
    return f"{source}: the model has no place for {paths.group_names(modules)}\n" if modules else ""


def flow_position(label: str) -> int:
    """Return the position of a module in the data flow through a layer."""
    last = label.removesuffix(".*").rpartition(".")[2]
    return _FLOW.index(last) if last in _FLOW else len(_FLOW)


@functools.cache
def _tensor_pattern(with_parts: frozenset[str], prefixes: tuple[str, ...]) -> re.Pattern[str]:
    """Return the expression for the keys of all methods' tensors."""
    parts, names = ("|".join(map(re.escape, each)) for each in (sorted(with_parts), prefixes))
    return re.compile(rf"(?P<module>.+)\.(?P<name>(?:{parts})\.\w+|(?:{names})\w+)(?:\.weight)?")


def weight_shapes(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights (linear, embedding, convolution) that a LoRA file adapts.

    A weight whose tensors do not determine its shape is left out.
    """
    weights: dict[str, tuple[int, ...]] = {}
    names = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
    for (module, shapes), (a, b) in itertools.product(adapted_shapes(tensors).items(), names):
        if a in shapes and b in shapes and len(shapes[a]) == len(shapes[b]):
            shape = (shapes[b][0], *shapes[a][1:])  # (out, in, window…), or (dim, vocabulary) for an embedding
            weights[f"{module}.weight"] = shape if a == "lora_A" else shape[::-1]
    return weights


def token_row_modules(tensors: Shapes) -> set[str]:
    """Return the modules whose single rows an adapter file has."""
    rows = {key.removeprefix(PEFT_PREFIX).removesuffix(_ROWS) for key in tensors if key.endswith(_ROWS)}
    return {module.removesuffix(".token_adapter") for module in rows}


def state_dict_keymap(
    shapes: Shapes,
    tensors: Shapes,
    source: str,
    sizes: Sizes,
    fan_in_fan_out: bool = False,
    tied: tuple[tuple[str, str], ...] = (),
) -> KeyMap:
    """Return the keymap of a PyTorch model, with one entry for each parameter, under the adapter's names.

    Args:
        shapes: the shapes of the model's parameters, by their keys in its files.
        tensors: the shapes of the adapter's tensors. Their names may lack the first part of the model's ("model."), or
            have an additional one, as GPT-2's do.
        source: the adapter, for the message.
        sizes: the outputs and inputs of a module by its method, `methods.base.file_sizes` of a configuration.
        fan_in_fan_out: the adapter's setting, for weights whose sizes do not determine the orientation.
        tied: `(head, embedding)` of weights that are one weight in this model, which has no parameter for the head.

    Raises `MismatchError` listing the adapted modules that the model lacks.
    """
    adapted = adapted_shapes(tensors)
    heads = {head for head, _ in tied}
    keys = match_model_keys(shapes, [module for module in adapted if f"{module}.weight" not in heads])
    if missing := [m for m in adapted if f"{m}.weight" not in {*keys.values(), *heads}]:
        raise MismatchError(f"{source}: the model has no place for {paths.group_names(missing)}")
    row_modules = token_row_modules(tensors)
    lookups = {module for module, own in adapted.items() if any("_embedding_" in name for name in own)}
    linear = {key.removesuffix(".weight"): shapes[leaf] for leaf, key in keys.items() if len(shapes[leaf]) == 2}
    turned = _find_turned(
        {m: _is_turned(linear[m], sizes(m, adapted[m], ())) for m in adapted if m in linear and m not in lookups},
        fan_in_fan_out,
        source,
    )
    entries: list[Weight] = []
    for leaf, key in keys.items():
        module, shape = key.removesuffix(".weight"), shapes[leaf]
        own, axes = adapted.get(module, {}), " ".join(f"a{i}" for i in range(len(shape)))
        kind, groups = None, 1
        if module in lookups or (module in row_modules and not own):
            kind = "embedding"
        elif len(shape) > 2:
            kind = "conv" if own else "other"
            channels = sizes(module, own, shape)[1] if own else None
            groups = channels // shape[1] if channels and channels % shape[1] == 0 else 1
        entries.append(
            Weight(leaf, key, f"{axes} -> {axes}", kind=kind, fan_in_fan_out=turned.get(module, False), groups=groups)
        )
    return KeyMap(KEYMAP_NAME, tuple(entries), tied=tied)


def match_model_keys(shapes: Shapes, modules: Iterable[str]) -> dict[str, str]:
    """Return `{key in the model's files: key in the adapter's naming}`, with a prefix added or removed if necessary."""
    adapted = [f"{module}.weight" for module in modules]
    prefixes = {key.split(".")[0] + "." for key in (*adapted, *shapes)}
    same = {key: key for key in shapes}
    candidates = [
        same,
        *({key: prefix + key for key in shapes} for prefix in sorted(prefixes)),
        *({key: key.removeprefix(prefix) for key in shapes} for prefix in sorted(prefixes)),
    ]
    fitting = (
        names for names in candidates if len({*adapted, *names.values()}) == len(set(names.values())) == len(names)
    )
    return next(fitting, same)


def _find_turned(by_size: Mapping[str, bool | None], fan_in_fan_out: bool, source: str) -> dict[str, bool]:
    """Return `{module: True if its weight is stored (in, out)}`, as GPT-2's Conv1D stores it.

    The sizes of the tensors determine it. For a square weight, modules of the same name determine it, or the setting
    `fan_in_fan_out`. PEFT sets that by the last module it adapts, so it counts only if all other modules agree with it.

    Raises `MismatchError` listing the modules whose orientation is unknown.
    """
    known = {module: turned for module, turned in by_size.items() if turned is not None}
    orientations, unknown = dict(known), list[str]()
    for module in by_size.keys() - known.keys():
        last = module.rpartition(".")[2]
        namesakes = {turned for other, turned in known.items() if other.rpartition(".")[2] == last}
        if len(namesakes) == 1:
            orientations[module] = namesakes.pop()
        elif set(known.values()) <= {fan_in_fan_out}:
            orientations[module] = fan_in_fan_out
        else:
            unknown.append(module)
    raise_listed(
        MismatchError,
        f"{source}: cannot determine the orientation of these square modules, (out, in) as in nn.Linear or (in,"
        f" out) as in Conv1D: fan_in_fan_out is {fan_in_fan_out}, but the sizes of other modules contradict it. Use"
        " jaxadapt.export.export_base(model, folder, adapter) to write a model with the adapter merged:",
        sorted(unknown),
    )
    return orientations


def _is_turned(shape: tuple[int, ...], sizes: tuple[int | None, int | None]) -> bool | None:
    """Return True if its outputs and inputs show that a weight is stored (in, out); None if both layouts fit."""
    straight = all(size in (None, have) for size, have in zip(sizes, shape, strict=True))
    crossed = all(size in (None, have) for size, have in zip(sizes[::-1], shape, strict=True))
    return None if straight and crossed else crossed


# ---------------------------------------------------------------- expert names


Rows = tuple[tuple[str, ...], ...]
"""The tensors of single experts by expert and part (gate, up)."""

_WEIGHT = ".weight"
_TENSOR_ENDS = (_WEIGHT, "_bias")  # a router's correction bias is a tensor without a module of its own


def expert_rows(keymap: KeyMap, keys: Iterable[str], source: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return the tensors of single experts to join, `{tensor: rows}`, and the tensors to rename, `{name: key}`.

    Both are empty if the folder already has the tensors of all experts.

    Args:
        keymap: the keymap, whose `expert_modules` has the names.
        keys: the keys of the folder.
        source: the folder, for the message.

    Raises `MismatchError` listing every missing part.
    """
    available = dict.fromkeys(keys)
    parts_of: dict[str, dict[tuple[int, int], str]] = {}
    renamed: dict[str, str] = {}
    width: dict[str, int] = {}
    for (parameter, modules), key in itertools.product(keymap.expert_modules, available):
        found = find_expert(parameter, modules, key.removesuffix(_WEIGHT)) if key.endswith(_TENSOR_ENDS) else None
        if found is None or found[0] in available:
            continue
        name, part, expert = found
        if expert is None:
            renamed[name] = key
        else:
            parts_of.setdefault(name, {})[expert, part] = key
            width[name] = len(modules)
    joined: dict[str, Rows] = {}
    missing: list[str] = []
    for name, parts in parts_of.items():
        experts = expert_numbers([e for e, _ in parts])
        missing += [
            f"{name}: part {p} of expert {e}"
            for e, p in itertools.product(experts, range(width[name]))
            if (e, p) not in parts
        ]
        joined[name] = tuple(tuple(parts.get((e, p), "") for p in range(width[name])) for e in experts)
    raise_listed(MismatchError, f"{source}: tensors of these experts are missing:", missing)
    return joined, renamed


def find_expert(parameter: str, modules: Sequence[str], module: str) -> tuple[str, int, int | None] | None:
    """Return the parameter's full name, the part and the expert's number for a single expert's module.

    Args:
        parameter: the name of a parameter of all experts, with holes.
        modules: the names of its parts as modules of single experts; without `{e}`, a module has no number.

    >>> find_expert("h.{l}.gate_up", ("h.{l}.{e}.gate", "h.{l}.{e}.up"), "h.3.7.up")
    ('h.3.gate_up', 1, 7)
    """
    matches = (name_regex(template).fullmatch(module) for template in modules)
    found = next(((part, match.groupdict()) for part, match in enumerate(matches) if match is not None), None)
    if found is None:
        return None
    part, texts = found
    return parameter.format(**texts), part, int(texts["e"]) if "e" in texts else None


def expert_numbers(experts: Collection[int]) -> list[int]:
    """Return the numbers from 0 to the largest expert, with at most 16 of the missing ones.

    The limit is for invalid files, which may have any number.

    >>> expert_numbers([1, 0, 3]), len(expert_numbers([10**12]))
    ([0, 1, 2, 3], 17)
    """
    present = set(experts)
    missing = itertools.islice((e for e in range(max(present)) if e not in present), 16)
    return sorted(present.union(missing))


def folder_names(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return the names of a model's tensors in a folder, `{tensor: rows}` and `{tensor: name}`.

    This is the inverse of `expert_rows`.
    """
    found = [
        (name, modules, match.groupdict())
        for parameter, modules in keymap.expert_modules
        for name in shapes
        if (match := name_regex(parameter).fullmatch(name)) is not None
    ]
    split = {
        name: tuple(tuple(m.format(**texts, e=e) + _WEIGHT for m in modules) for e in range(shapes[name][0]))
        for name, modules, texts in found
        if "{e}" in modules[0]
    }
    moved = {name: modules[0].format(**texts) for name, modules, texts in found if name not in split}
    return split, {name: key if key.endswith(_TENSOR_ENDS) else key + _WEIGHT for name, key in moved.items()}


# ---------------------------------------------------------------- routed experts that targets leave out


_MATRICES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""The last parts of the names of an expert's matrices, in transformers 4 and 5."""
_IN_FILES = re.compile(r"(.+\.experts)(?:\.\d+)?\.((?:gate_up|gate|up|down)_proj|w[123])(?:\.weight)?")


def routed_experts(keys: Iterable[str]) -> list[str]:
    """Return the parameters of all routed experts among a base's tensors in files, which may hold each by itself.

    >>> routed_experts(["model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.down_proj"])
    ['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.1.mlp.experts.down_proj']
    """
    found = filter(None, map(_IN_FILES.fullmatch, keys))
    joint = {"down_proj": "down_proj", "w2": "down_proj"}
    return list(dict.fromkeys(f"{each[1]}.{joint.get(each[2], 'gate_up_proj')}" for each in found))


def routed_left_out(config: Config, chosen: Collection[str], parameters: Collection[str]) -> list[str]:
    """Return a warning if the targets name a routed expert's matrices, or all layers, and reach no routed expert.

    transformers 5 holds all experts of a layer in parameters, (experts, out, in), which no module's name selects:
    `target_modules=["up_proj"]` reaches the shared experts and the dense layers of such a model, or nothing. PEFT says
    nothing of it. Only `target_parameters` reaches them.

    Targets name them if they would select them as modules: `"up_proj"` does, `"shared_experts.up_proj"` does not.

    Args:
        config: the configuration.
        chosen: the modules and parameters that are adapted.
        parameters: the parameters of all experts.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_modules=["q_proj", "up_proj"])
    >>> text = routed_left_out(config, ["0.q_proj", "0.shared_experts.up_proj"], ["0.experts.down_proj"])[0]
    >>> text.partition(": ")[0], text.rpartition(". ")[2]
    ('target_modules adapts no routed expert', "Name them too: target_parameters=['experts.down_proj']")
    """
    targets: str | Collection[str] | None = config.get("target_modules")
    if not parameters or targets is None or any(".experts." in f"{name}." for name in chosen):
        return []
    if not matching.is_all_linear(config) and not _names_matrices(config, parameters):
        return []
    others = [name for name in chosen if name.rpartition(".")[2] in _MATRICES]
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))
    reached = f"; its targets reach only {paths.group_names(others)}" if others else ""
    way = (
        f"Name them too: target_parameters={ends}"
        if config.peft_type == "LORA"
        else f"{config.peft_type} adapts modules only; LoRA reaches them by target_parameters={ends}"
    )
    text = "target_modules adapts no routed expert: parameters of all experts of a layer hold them"
    return [f"{text}, {paths.group_names(parameters)}, which no module's name selects{reached}. {way}"]


def _names_matrices(config: Config, parameters: Iterable[str]) -> bool:
    """Return True if the targets would select matrices of routed experts as modules."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    modules = (f"{owner}{end}" for owner in owners for end in ("", *(f".0.{each}" for each in _MATRICES)))
    return any(matching.is_target(config, name) for name in modules)


# ---------------------------------------------------------------- diffusion names


# {a,b} and {0-9} stand for each of their values.
_ATTENTION = (
    "proj_{in,out}",
    "transformer_blocks.{0-9}.attn{1,2}.to_{q,k,v,out.0}",
    "transformer_blocks.{0-9}.ff.net.{0.proj,2}",
)
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
_UNET = (
    *("conv_in", "conv_out", "time_embedding.linear_{1,2}", "add_embedding.linear_{1,2}"),
    *(f"down_blocks.{{0-3}}.resnets.{{0,1}}.{name}" for name in _RESNET),
    *(f"down_blocks.{{0-3}}.attentions.{{0,1}}.{name}" for name in _ATTENTION),
    *(f"up_blocks.{{0-3}}.resnets.{{0-2}}.{name}" for name in _RESNET),
    *(f"up_blocks.{{0-3}}.attentions.{{0-2}}.{name}" for name in _ATTENTION),
    *(f"mid_block.resnets.{{0,1}}.{name}" for name in _RESNET),
    *(f"mid_block.attentions.0.{name}" for name in _ATTENTION),
    "down_blocks.{0-3}.downsamplers.0.conv",
    "up_blocks.{0-3}.upsamplers.0.conv",
)
_CLIP = (
    *(f"{prefix}encoder.layers.{{0-31}}.self_attn.{{q,k,v,out}}_proj" for prefix in ("text_model.", "")),
    *(f"{prefix}encoder.layers.{{0-31}}.mlp.fc{{1,2}}" for prefix in ("text_model.", "")),  # "": transformers 5
    "text_projection",
)
MODULES: Mapping[str, tuple[str, ...]] = {"unet": _UNET, "text_encoder": _CLIP, "text_encoder_2": _CLIP}
"""{model of a diffusers pipeline: patterns of its modules}; the union of all versions."""

# SDXL: Stability AI's names, and diffusers'. Its UNet has three blocks of two (down) and three (up) layers.
_SDXL_RESNET = (
    ("in_layers.2", "conv1"), ("out_layers.3", "conv2"), ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_SDXL_OUTSIDE = (
    ("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
    ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
)  # fmt: skip
_SDXL_LAYERS = (
    *((f"input_blocks.{i}", f"down_blocks.{(i - 1) // 3}", (i - 1) % 3) for i in (1, 2, 4, 5, 7, 8)),
    *((f"output_blocks.{i}", f"up_blocks.{i // 3}", i % 3) for i in range(9)),
)
_SDXL_ATTENTION = ("down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1")


def expand(pattern: str) -> Iterator[str]:
    """Yield each name that a pattern stands for.

    >>> list(expand("fc{1,2}")), len(list(expand("layers.{0-31}.q")))
    (['fc1', 'fc2'], 32)
    """
    pieces: list[list[str]] = []
    for text in re.split(r"(\{[^}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)-(\d+)\}", text)
        if span is not None:
            pieces.append([str(i) for i in range(int(span[1]), int(span[2]) + 1)])
        else:
            pieces.append(text[1:-1].split(",") if text.startswith("{") else [text])
    return map("".join, itertools.product(*pieces))


@functools.cache
def sdxl_names() -> Mapping[str, str]:
    """Return {diffusers' name: Stability AI's name} of the modules of SDXL's UNet."""
    attention = [name for pattern in _ATTENTION for name in expand(pattern)]
    layers = [
        *((f"{ours}.0", f"{block}.resnets.{layer}") for ours, block, layer in _SDXL_LAYERS),
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.2", "mid_block.resnets.1"),
    ]
    attentions = [
        *((f"{i}.1", f"{b}.attentions.{layer}") for i, b, layer in _SDXL_LAYERS if b in _SDXL_ATTENTION),
        ("middle_block.1", "mid_block.attentions.0"),
    ]
    return {
        **{theirs: ours for ours, theirs in _SDXL_OUTSIDE},
        **{f"{theirs}.{b}": f"{ours}.{a}" for ours, theirs in layers for a, b in _SDXL_RESNET},
        **{f"{theirs}.{name}": f"{ours}.{name}" for ours, theirs in attentions for name in attention},
    }


@functools.cache
def dotted_names(model: str) -> Mapping[str, str]:
    """Return {flattened name: diffusers' name} of the modules of one model of a pipeline.

    >>> dotted_names("unet")["input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
    """
    names = {name.replace(".", "_"): name for pattern in MODULES.get(model, ()) for name in expand(pattern)}
    if model == "unet":
        names |= {ours.replace(".", "_"): theirs for theirs, ours in sdxl_names().items()}
    return names


def is_sdxl(modules: Iterable[str]) -> bool:
    """Return True if a module of a UNet is one of SDXL and not of Stable Diffusion 1 or 2.

    >>> is_sdxl(["mid_block.attentions.0.transformer_blocks.1.ff.net.2"])
    True
    """
    return any(re.search(r"transformer_blocks\.[1-9]", name) or name.startswith("add_embedding") for name in modules)
