"""Image adapters in one file (kohya-ss, LyCORIS, diffusers) ↔ `PeftTensors`.

    kohya-ss    lora_unet_down_blocks_0_…_to_q.lora_down.weight     one alpha for each module, as a tensor
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight             the modules' real names

The name in PEFT is base_model.model.<model>.<module>.<tensor>, with the model of the pipeline: unet, text_encoder, …

The values never change: a file that is read and written again has the same tensors, bit for bit (an alpha becomes
one number in the dtype of its module, where that holds it). kohya-ss stores each module's alpha as a tensor; in PEFT
it is `lora_alpha` (or `alpha`) of the configuration, with a pattern for each module that differs. A file without
alphas has the scale 1, so that its alpha is the rank. The configuration is inferred from the tensors and alphas.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Collection, Generator, Iterable, Mapping
from typing import Any

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.arrays.tensor_source import TensorSource, View, as_source, rename
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, FormatError, MismatchError, Report, byte_counter, raise_as, raise_listed
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence.formats import OPAQUE, Finding, Format, Opened, Place, Wanted, note
from jaxadapt.storage import location, safetensors

# ---------------------------------------------------------------- names


KOHYA, DIFFUSERS = "kohya-ss", "diffusers"
ALPHA = "alpha"
# {tensor of kohya-ss or LyCORIS: (method of PEFT, its tensor)}
_TENSORS: Mapping[str, tuple[str, str]] = {
    "lora_down.weight": ("LORA", "lora_A.weight"),
    "lora_up.weight": ("LORA", "lora_B.weight"),
    "dora_scale": ("LORA", "lora_magnitude_vector"),
    **{name: ("LOHA", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: ("LOKR", name) for name in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}  # fmt: skip
# {beginning of a tensor's name: the type of LyCORIS that has it}, for tensors that pass through.
_LYCORIS_TYPES: Mapping[str, str] = {
    "oft_blocks": "OFT or BOFT, in another form than PEFT's", "a1.": "GLoRA", "diff": "full", "on_input": "IA3",
    "lora_mid": "LoCon with a middle tensor", "hada_": "LoHa", "lokr_": "LoKr in sizes that PEFT lacks",
    "w_norm": "Norms", "lora_": "LoRA",
}  # fmt: skip
KOHYA_ENDINGS = {(method, name): key for key, (method, name) in _TENSORS.items()}
_METHODS = {name: method for method, name in _TENSORS.values()}

# {prefix of kohya-ss: model of the pipeline}
_PREFIXES: Mapping[str, str] = {
    "lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
}  # fmt: skip
_KOHYA = re.compile(r"(lora_(?:unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_([^.]+)\.(.+)")

_DIFFUSERS = re.compile(
    r"(unet|text_encoder(?:_[23])?|transformer|prior|denoiser|controlnet)\.(.+?)"
    r"\.(lora_[AB]\.weight|lora_magnitude_vector|lora(?:_linear_layer)?\.(?:down|up)\.weight|alpha)"
)
# The attention processors of diffusers before 0.22.
_PROCESSOR = re.compile(
    r"(?:(unet|text_encoder(?:_2)?)\.)?(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight"
)
_MATRICES = {"down": "lora_A.weight", "up": "lora_B.weight"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one file.

    Attributes:
        style: "kohya-ss" or "diffusers".
        method: PEFT's type; `OPAQUE` for tensors of another method, which only pass through.
        keys: {PEFT's key: the file's key}.
        alphas: {module: the file's key of its alpha}.
        unknown: modules that no list has; their names stay flattened.
    """

    style: str
    method: str
    keys: Mapping[str, str]
    alphas: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the pipeline that the file adapts."""
        return tuple(dict.fromkeys(key.removeprefix(PEFT_PREFIX).partition(".")[0] for key in self.keys))


def find_layout(keys: Collection[str]) -> Layout | None:
    """Return the layout of a file's keys; None if they are not those of an image adapter.

    >>> list(find_layout(["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]).keys)
    ['base_model.model.unet.mid_block.attentions.0.proj_in.lora_A.weight']
    """
    for style, parse in ((KOHYA, _parse_kohya), (DIFFUSERS, _parse_diffusers)):
        parsed = {key: parts for key in keys if (parts := parse(key)) is not None}
        if parsed and len(parsed) == len(keys):
            return _layout(style, parsed)
    return None


def _layout(style: str, parsed: Mapping[str, tuple[str, str, bool]]) -> Layout:
    tensors = {key: (module, name) for key, (module, name, _) in parsed.items() if name != ALPHA}
    methods = {"LORA" if style == DIFFUSERS else _METHODS.get(name, "") for _, name in tensors.values()}
    method = methods.pop() if len(methods) == 1 else ""
    renamed = {f"{PEFT_PREFIX}{module}.{name}": key for key, (module, name) in tensors.items()}
    alphas = {module: key for key, (module, name, _) in parsed.items() if name == ALPHA}
    unknown = tuple(dict.fromkeys(module for module, _, is_known in parsed.values() if not is_known))
    is_clear = len(renamed) + len(alphas) == len(parsed) and alphas.keys() <= {module for module, _ in tensors.values()}
    if not method or not is_clear:
        return Layout(style, OPAQUE, {key: key for key in parsed}, {}, unknown)
    return Layout(style, method, renamed, alphas, unknown)


def lycoris_types(keys: Iterable[str]) -> str:
    """Return the types of LyCORIS whose tensors are among the keys.

    >>> lycoris_types(["lora_unet_conv_in.oft_blocks", "lora_unet_conv_out.diff"])
    "LyCORIS' OFT or BOFT, in another form than PEFT's; full"
    """
    endings = {key.partition(".")[2] for key in keys}
    found = {next((t for name, t in _LYCORIS_TYPES.items() if end.startswith(name)), "") for end in endings - {ALPHA}}
    known = [text for text in _LYCORIS_TYPES.values() if text in found]
    return f"LyCORIS' {'; '.join(known)}" if known else "a type that jaxadapt does not know"


def _parse_kohya(key: str) -> tuple[str, str, bool] | None:
    """Return (model and module, tensor's name in PEFT, whether a list has the module)."""
    match = _KOHYA.fullmatch(key)
    if match is None:
        return None
    prefix, flat, ending = match.groups()
    model = _PREFIXES.get(prefix)
    module = None if model is None else pytorch.dotted_names(model).get(flat)
    name = ALPHA if ending == ALPHA else _TENSORS.get(ending, ("", ending))[1]
    # Without "lora_", which begins the names of LoRA's tensors.
    return (
        (f"{prefix.removeprefix('lora_')}_{flat}", name, False) if module is None else (f"{model}.{module}", name, True)
    )


def _parse_diffusers(key: str) -> tuple[str, str, bool] | None:
    old = _PROCESSOR.fullmatch(key)
    if old is not None:
        model, module, name, side = old.groups()
        model = model or "unet"
        target = {"unet": f"to_{name}" + (".0" if name == "out" else "")}.get(model, f"{name}_proj")
        return f"{model}.{module}.{target}", _MATRICES[side], True
    match = _DIFFUSERS.fullmatch(key)
    if match is None:
        return None
    model, module, ending = match.groups()
    side = re.fullmatch(r"lora(?:_linear_layer)?\.(down|up)\.weight", ending)
    return f"{model}.{module}", _MATRICES[side[1]] if side else ending, True


def kohya_keys(modules: Iterable[str]) -> dict[str, str]:
    """Return {module with its model: the name that kohya-ss gives it}; modules without one keep theirs.

    SDXL's UNet gets Stability AI's names, and its text encoders the numbers 1 and 2, as kohya-ss writes them.

    >>> kohya_keys(["unet.mid_block.attentions.0.proj_in"])
    {'unet.mid_block.attentions.0.proj_in': 'lora_unet_mid_block_attentions_0_proj_in'}
    """
    split = {module: module.partition(".")[::2] for module in modules}
    is_sdxl = pytorch.is_sdxl(name for model, name in split.values() if model == "unet") or any(
        model == "text_encoder_2" for model, _ in split.values()
    )
    names: dict[str, str] = {}
    for module, (model, name) in split.items():
        if is_sdxl and model == "unet":
            name = pytorch.sdxl_names().get(name, name)
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_sdxl else "lora_te"}.get(model, "lora_te2")
        flat = module if module.startswith("lycoris_") else f"lora_{module.replace('.', '_')}"
        names[module] = f"{prefix}_{name.replace('.', '_')}" if model in pytorch.MODULES else flat
    return names


def split_key(key: str) -> tuple[str, str]:
    """Return the module and the tensor's name of a key of PEFT.

    >>> split_key("base_model.model.unet.conv_in.lora_A.weight")
    ('unet.conv_in', 'lora_A.weight')
    """
    name = key.removeprefix(PEFT_PREFIX)
    match = re.fullmatch(r"(.+)\.((?:lora_|hada_|lokr_)\w*(?:\.weight|\.bias)?)", name)
    return (name, "") if match is None else (match[1], match[2])


# ---------------------------------------------------------------- configurations


METADATA = "lora_adapter_metadata"
"""diffusers' key of a header: {"<model>.<field>": value} of the LoraConfig of each model of the pipeline, as JSON."""

_RANK = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first axis is the rank, the first of them in a module."""


def infer_config(tensors: View, layout: Layout, file: TensorSource, metadata: Mapping[str, str]) -> Config | None:
    """Return the configuration that the tensors, the alphas and diffusers' metadata show; None if PEFT has none."""
    modules = paths.nest((*split_key(key), shape) for key, shape in tensors.shapes.items())
    fields = None if layout.method == OPAQUE else _FIELDS[layout.method](modules)
    if fields is None:
        return None
    ranks = {module: _rank(shapes) for module, shapes in modules.items()}
    values = {module: _alpha(file, key) for module, key in layout.alphas.items()}
    stated = _stated_alphas(layout, ranks, values, file.source, metadata)
    # LyCORIS does not scale a product of two full matrices.
    full = {module for module, shapes in modules.items() if {"lokr_w1", "lokr_w2"} <= shapes.keys()}
    known = {module: alpha for module, alpha in (stated | values).items() if module not in full}
    alphas = {module: known.get(module, float(rank)) for module, rank in ranks.items()}
    alpha_field = "lora_alpha" if layout.method == "LORA" else "alpha"
    r, rank_pattern = split_common(ranks)
    alpha, alpha_pattern = split_common({m: int(a) if a.is_integer() else a for m, a in alphas.items()})
    return Config.from_dict({
        "peft_type": layout.method, "r": r, "rank_pattern": rank_pattern, alpha_field: alpha,
        "alpha_pattern": alpha_pattern, "target_modules": sorted(modules), "inference_mode": True, **fields,
    }, file.source)  # fmt: skip


def _stated_alphas(
    layout: Layout, ranks: Mapping[str, int], alphas: Mapping[str, float], source: str, metadata: Mapping[str, str]
) -> dict[str, float]:
    """Return the alpha of each module of a model that diffusers' metadata configures; with rsLoRA times √rank.

    Raises `FormatError` for metadata that is no JSON object or contradicts the tensors, `ConfigError` for its values.
    """
    if METADATA not in metadata or (layout.style, layout.method) != (DIFFUSERS, "LORA"):
        return {}
    place = f"{source}: {METADATA} of the header"
    with raise_as(
        FormatError, f"{place}: expected a JSON object", ValueError, AttributeError, RecursionError,
        advice="; save the file again with diffusers",
    ):  # fmt: skip
        fields = dict(json.loads(metadata[METADATA]).items())
    by_model = {
        model: {key.removeprefix(f"{model}."): x for key, x in fields.items() if key.startswith(f"{model}.")}
        for model in layout.models
    }
    # diffusers takes a model without fields as one without metadata, if its rank is 8.
    configs = {model: LoraConfig.from_dict(own, f"{place}: {model}") for model, own in by_model.items() if own}
    stated: dict[str, float] = {}
    wrong: list[str] = []
    for module, rank in ranks.items():
        model, _, name = module.partition(".")
        if (config := configs.get(model)) is None:
            continue
        alpha = config.alpha_of(name) * (math.sqrt(rank) if config.use_rslora else 1)
        if config.rank_of(name) != rank:
            wrong.append(f"{module}: rank {config.rank_of(name)} in the header, {rank} in its tensors")
        elif alphas.get(module, alpha) != alpha:
            wrong.append(f"{module}: alpha {alpha:g} in the header, {alphas[module]:g} in its tensor")
        stated[module] = float(alpha)
    raise_listed(
        FormatError,
        f"{place} contradicts the tensors:",
        wrong,
        "\nSave the file again with the program that trained it; or without metadata (safetensors' load_file and"
        " save_file), so that each alpha is the rank",
    )
    return stated


def diffusers_metadata(settings: Mapping[str, tuple[int, float]], use_dora: bool) -> str:
    """Return the text of diffusers' metadata, from {module: (rank, alpha)}: the fields that it needs for every file."""
    split = {module: module.partition(".") for module in settings}
    # transformers 5 has no "text_model" in CLIP; without it, the name is the end of that of every version.
    models = paths.nest(
        (model, name.removeprefix("text_model."), settings[module]) for module, (model, _, name) in split.items()
    )
    fields: dict[str, Any] = {}
    for model, own in models.items():
        for number, (field, pattern) in enumerate((("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))):
            common, others = split_common({name: values[number] for name, values in own.items()})
            fields |= {f"{model}.{field}": common, f"{model}.{pattern}": anchored(others, own)}
        fields |= {f"{model}.target_modules": sorted(own), f"{model}.use_dora": use_dora}
    return json.dumps(fields, indent=2, sort_keys=True)


def anchored(values: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return {pattern: value} that matches only the given names, where others of the modules end with one of them.

    >>> anchored({"proj_out": 4, "conv": 2}, ["proj_out", "blocks.0.proj_out", "conv"])
    {'^proj_out': 4, 'conv': 2}
    """
    ends = {name[i + 1 :] for name in modules for i, letter in enumerate(name) if letter == "."}
    return {f"^{name}" if name in ends else name: value for name, value in values.items()}


Modules = Mapping[str, Mapping[str, tuple[int, ...]]]


def _lora_fields(modules: Modules) -> dict[str, Any] | None:
    vectors = [shapes for shapes in modules.values() if "lora_magnitude_vector" in shapes]
    if (
        any(not {"lora_A.weight", "lora_B.weight"} <= shapes.keys() for shapes in modules.values())
        or any(0 in s or len(s) < 2 for shapes in modules.values() for n, s in shapes.items() if n.endswith(".weight"))
        or any(shapes["lora_magnitude_vector"] != _magnitude_shape(shapes["lora_B.weight"]) for shapes in vectors)
        or 0 < len(vectors) < len(modules)
    ):
        return None
    return {"use_dora": True} if vectors else {}


def _magnitude_shape(b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of PEFT's magnitude for the shape of B, whose window of a convolution has size 1."""
    return (b[0],) if len(b) == 2 else (1, b[0], *(1 for _ in b[2:]))


def _loha_fields(modules: Modules) -> dict[str, Any] | None:
    wanted = {f"hada_w{i}_{side}" for i in "12" for side in "ab"}
    if any(not wanted <= shapes.keys() or not shapes["hada_w1_b"] for shapes in modules.values()):
        return None
    return {"use_effective_conv2d": any("hada_t1" in shapes for shapes in modules.values())}


def _lokr_fields(modules: Modules) -> dict[str, Any] | None:
    """Return the fields of LoKr; None if no one factor gives the sizes of all modules."""
    from jaxadapt.methods.matrix import split_size

    wanted: list[tuple[int, int]] = []  # (size of the module, its first factor)
    both = any("lokr_w1_a" in shapes for shapes in modules.values())
    for shapes in modules.values():
        first = shapes.get("lokr_w1") or _product(shapes.get("lokr_w1_a"), shapes.get("lokr_w1_b"))
        turned = "lokr_t2" in shapes  # (r, k) and (r, n) around the middle tensor
        a, b = shapes.get("lokr_w2_a"), shapes.get("lokr_w2_b")
        second = shapes.get("lokr_w2") or _product(a[::-1] if a and turned else a, b)
        if not first or not second or len(first) < 2 or len(second) < 2 or 0 in (*first, *second):
            return None
        if ("lokr_w1" in shapes) != (not both or _rank(shapes) >= max(first[:2]) / 2):  # as PEFT builds the module
            return None
        wanted += [(first[0] * second[0], first[0]), (first[1] * second[1], first[1])]
    candidates = [-1, *sorted({factor for _, factor in wanted})]
    factor = next((f for f in candidates if all(split_size(size, f)[0] == one for size, one in wanted)), None)
    if factor is None:
        return None
    return {
        "decompose_factor": factor,
        "decompose_both": both,
        "use_effective_conv2d": any("lokr_t2" in shapes for shapes in modules.values()),
    }


def _product(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if not a or not b else (a[0], *b[1:])


_FIELDS = {"LORA": _lora_fields, "LOHA": _loha_fields, "LOKR": _lokr_fields}


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the rank of a module; for LoKr with two full matrices the smallest with which PEFT keeps them full."""
    for name in _RANK:
        if shapes.get(name):
            return shapes[name][0]
    return max(*shapes["lokr_w1"][:2], *shapes["lokr_w2"][:2])


def _alpha(file: TensorSource, key: str) -> float:
    """Read one alpha. Raises `FormatError` if it is not one finite number."""
    value = file[key]
    if value.size != 1 or not math.isfinite(number := float(value.reshape(())[()])):
        found = f"{value.size} values" if value.size != 1 else str(value.reshape(())[()])
        raise FormatError(f"{file.source}: {key}: expected one finite number, found {found}")
    return number


def split_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and {module: value} of the others."""
    counts = collections.Counter(values.values())
    common = max(counts, key=lambda value: (counts[value], value))
    return common, {module: value for module, value in sorted(values.items()) if value != common}


def find_settings(config: Config, module: str) -> tuple[int, float]:
    """Return the rank and alpha of a module."""
    from jaxadapt.configs.frozen import find_pattern_value

    alpha_field = "lora_alpha" if config.peft_type == "LORA" else "alpha"
    return (
        find_pattern_value(config.get("rank_pattern"), module, config.get("r")),
        find_pattern_value(config.get("alpha_pattern"), module, config.get(alpha_field)),
    )


# ---------------------------------------------------------------- reading


def recognizes(place: Place) -> bool:
    """Return True for a file with the names of an image adapter. Reads only the header."""
    return (
        place.names is None
        and place.at.suffix == ".safetensors"
        and find_layout(safetensors.read_header(place.at).tensors) is not None
    )


@contextlib.contextmanager
def open_file(place: location.Location) -> Generator[Opened]:
    """Open an image adapter; its tensors are read on demand.

    Raises `FormatError` if the file is not one, or `FileError` if it cannot be read.
    """
    with safetensors.TensorFile(place) as file:
        layout = find_layout(file.header.tensors)
        if layout is None:
            raise FormatError(
                f"{place}: expected the keys of an image adapter of kohya-ss, LyCORIS or diffusers, such as"
                f" lora_unet_….lora_down.weight or unet.….lora_A.weight, found {next(iter(file), 'no tensor')}"
            )
        yield read_tensors(file, layout, file.header.metadata, place)


def read_tensors(file: TensorSource, layout: Layout, metadata: Mapping[str, str], place: location.Location) -> Opened:
    """Return the content of an open file; its tensors are read on demand.

    Raises `FormatError` for an alpha that is no number, and for metadata of diffusers that contradicts the tensors.
    """
    scales = [name for name, key in layout.keys.items() if key.endswith(".dora_scale") and layout.method == "LORA"]
    outputs = {name: _outputs(file, layout, name) for name in scales}
    config, tensors = None, rename(file, layout.keys)
    if all(outputs.values()):  # else one magnitude for each input, or a damaged one
        shaped = as_source({name: tensors[name].reshape(_magnitude_shape(b)) for name, b in outputs.items()})
        tensors = View(file.source, {name: (shaped if name in shaped else tensors, name) for name in tensors})
        config = infer_config(tensors, layout, file, metadata)
    if config is None:  # PEFT's configuration cannot describe these tensors: they only pass through
        config = Config.from_dict({"peft_type": OPAQUE, "peft_version": None, "inference_mode": True})
        layout = dataclasses.replace(layout, method=OPAQUE, keys={key: key for key in file}, alphas={})
        tensors = rename(file, layout.keys)
    adapter = PeftTensors(config, tensors, file.source)
    return Opened(adapter, place, "an image adapter's file", layout.style, layout, dict(metadata), split_models)


def _outputs(file: TensorSource, layout: Layout, name: str) -> tuple[int, ...]:
    """Return the shape of B beside a magnitude of (out, 1, …), one for each output; () for another magnitude."""
    b_key = layout.keys.get(name.replace("lora_magnitude_vector", "lora_B.weight"), "")
    b = tuple(file.specs[b_key].shape) if b_key in file else ()
    return b if b and tuple(file.specs[layout.keys[name]].shape) == (b[0], *(1 for _ in b[1:])) else ()


# ---------------------------------------------------------------- writing


def write_file(tensors: PeftTensors, target: location.Location, wanted: Wanted, report: Report) -> int:
    """Write an image adapter as one file, durably and atomically; return the number of its tensors.

    Args:
        tensors: the modules have the names of a pipeline's models: unet.…, text_encoder.…
        target: the file.
        wanted: the style, "kohya-ss" or "diffusers"; in the style of its origin, the modules keep their names.
        report: called with ("save", bytes done, total bytes).

    Raises `MismatchError` for tensors and settings that the style has no form for.
    """
    origin = wanted.origin
    require_floats(tensors.config, as_source(tensors.tensors).specs, target)
    layout = origin.names if origin is not None and origin.style == wanted.style else None
    file, alphas = file_tensors(tensors, wanted.style, layout)
    header = dict(origin.metadata if origin is not None and origin.metadata else {"format": "pt"})
    stated = header.pop(METADATA, None) if tensors.config.peft_type == "LORA" else None
    if alphas and (stated is not None or any(rank != alpha for rank, alpha in alphas.values())):
        header[METADATA] = diffusers_metadata(alphas, bool(tensors.config.get("use_dora")))
    count = byte_counter(report, "save", sum(map(file.nbytes, file)))
    safetensors.write(target, file.kinds, file.read, header, progress=count)
    return len(file)


def file_tensors(tensors: PeftTensors, style: str, layout: Layout | None) -> tuple[View, dict[str, tuple[int, float]]]:
    """Return the tensors of the file, and {module: (rank, alpha)} that its header must state.

    The header of diffusers' file states the rank and alpha of each module. It has no tensors of alphas, which its
    loader refuses for most pipelines, unless the file that the adapter came from has them.
    """
    names, alphas, stated = _file_keys(tensors, style, layout)
    source, small = as_source(tensors.tensors), dict[str, Any]()
    dtypes: dict[str, Any] = {}
    for key, name in names.items():
        dtypes.setdefault(split_key(key)[0], source.specs[key].dtype)
        if name.endswith(".dora_scale") and key != name:
            b = source.specs[key.replace("lora_magnitude_vector", "lora_B.weight")].shape
            small[name] = source.read_into(key, None).reshape(b[0], *(1 for _ in b[1:]))
    for module, (name, alpha) in alphas.items():
        small[name] = _exact(alpha, dtypes[module])
    origins: dict[str, tuple[TensorSource, str]] = {name: (source, key) for key, name in names.items()}
    return View(tensors.source, origins | {name: (as_source(small), name) for name in small}), stated


def _exact(number: float, dtype: Any) -> Any:
    """Return a number in the dtype if that holds it exactly, or else in the narrowest one that does."""
    import numpy as np

    with np.errstate(over="ignore"):
        arrays = [np.asarray(number, each) for each in (dtype, "float32", "float64")]
    return next((array for array in arrays if float(array) == number), arrays[-1])


def _file_keys(
    tensors: PeftTensors, style: str, layout: Layout | None
) -> tuple[dict[str, str], dict[str, tuple[str, float]], dict[str, tuple[int, float]]]:
    """Return {PEFT's key: the file's key}, {module: (the key of its alpha, alpha)}, and what the header states."""
    method = tensors.config.peft_type
    if method == OPAQUE:
        return {key: key for key in tensors.tensors}, {}, {}
    modules = {key: split_key(key) for key in tensors.tensors}
    settings = _file_settings(tensors, modules) if method in _FIELDS else {}
    kohya = kohya_keys(settings)
    found = {**_new_keys(modules, method, style, kohya), **({} if layout is None else layout.keys)}
    names = {key: found[key] for key in modules if key in found}
    raise_listed(
        MismatchError,
        f"{tensors.source}: cannot write one file of {style}, which has no name for:",
        (key for key, (_, name) in modules.items() if key not in names or not name),
        "\nkohya-ss has names for LoRA, LoHa and LoKr (--format kohya-ss); keep PEFT's folder for all else",
    )
    if layout is None:
        _require_pipeline(tensors, style, {name: modules[key][0] for key, name in names.items()})
    stored = {} if layout is None else layout.alphas
    if style == DIFFUSERS and not stored:
        return names, {}, settings
    beginnings = kohya if style == KOHYA else {module: module for module in settings}
    alphas = {
        module: (stored.get(module, f"{beginnings[module]}.{ALPHA}"), alpha)
        for module, (rank, alpha) in settings.items()
        if module in stored or rank != alpha or (style == KOHYA and layout is None)
    }
    return names, alphas, {}


def _require_pipeline(tensors: PeftTensors, style: str, modules: Mapping[str, str]) -> None:
    """Raise `MismatchError` if readers would not recognize a file, from {the file's key: module}."""
    if find_layout(modules) is None:
        raise_listed(
            MismatchError,
            f"{tensors.source}: cannot write one file of {style}: these modules are in no model of a pipeline (unet,"
            " text_encoder, transformer …):",
            list(dict.fromkeys(m for name, m in modules.items() if find_layout([name]) is None)),
            "\nName a PEFT folder as its model, and convert the folder above it. The flattened names of an unknown"
            " model have only kohya-ss' form",
        )


def _new_keys(
    modules: Mapping[str, tuple[str, str]], method: str, style: str, kohya: Mapping[str, str]
) -> dict[str, str]:
    """Return {PEFT's key: the key in a new file} of the tensors for which the style has a name.

    Args:
        modules: the module and the tensor's name of each key.
        method: the method.
        style: the style.
        kohya: the names of the modules in kohya-ss.
    """
    if style == DIFFUSERS:
        return {key: key.removeprefix(PEFT_PREFIX) for key, (_, name) in modules.items() if name and method == "LORA"}
    endings = {key: KOHYA_ENDINGS.get((method, name), "") for key, (_, name) in modules.items()}
    return {key: f"{kohya[modules[key][0]]}.{ending}" for key, ending in endings.items() if ending}


def _file_settings(tensors: PeftTensors, modules: Mapping[str, tuple[str, str]]) -> dict[str, tuple[int, float]]:
    """Return {module: (rank, alpha)} of a file, whose scale is alpha divided by the rank of its tensors.

    Raises `MismatchError` if the configuration has other ranks than the tensors.
    """
    specs, pairs = as_source(tensors.tensors).specs, {m: find_settings(tensors.config, m) for m, _ in modules.values()}
    found = {module: list(specs[key].shape) for key, (module, name) in modules.items() if name == "lora_A.weight"}
    raise_listed(
        MismatchError,
        f"{tensors.source}: the configuration has other ranks than the tensors:",
        [f"{m}: {pairs[m][0]}, the tensor is {shape}" for m, shape in found.items() if shape[:1] != [pairs[m][0]]],
    )
    rooted = bool(tensors.config.get("use_rslora"))  # PEFT's scale is then alpha / √rank
    return {module: (rank, alpha * math.sqrt(rank) if rooted else alpha) for module, (rank, alpha) in pairs.items()}


# ---------------------------------------------------------------- one folder for each model


def split_models(tensors: PeftTensors) -> dict[str, PeftTensors]:
    """Return {model of the pipeline: its adapter}, each with the names that the model itself gives its modules.

    Raises `MismatchError` for modules whose names stay flattened, because no list has them, and for tensors of a method
    that PEFT does not have.
    """
    if tensors.config.peft_type == OPAQUE:
        raise MismatchError(
            f"{tensors.source}: PEFT has no method for these tensors ({lycoris_types(tensors.tensors)}), so"
            " that they only pass through; write one file (.safetensors) instead"
        )
    split = {key: key.removeprefix(PEFT_PREFIX).partition(".") for key in tensors.tensors}
    by_model = paths.nest((model, PEFT_PREFIX + rest, key) for key, (model, _, rest) in split.items())
    raise_listed(
        MismatchError,
        f"{tensors.source}: cannot write PEFT's folders, because these modules are of a model whose names"
        " jaxadapt does not know (it knows Stable Diffusion 1, 2 and XL). Write one file instead:",
        [key for key in tensors.tensors if "." not in split_key(key)[0]],
    )
    return {
        model: PeftTensors(_config_of(tensors.config, model), rename(as_source(tensors.tensors), names), tensors.source)
        for model, names in by_model.items()
    }


def _config_of(config: Config, model: str) -> Config:
    """Return the settings of the modules of one model, under the model's own names."""
    values = config.to_dict()
    targets = [name.partition(".")[2] for name in values["target_modules"] if name.partition(".")[0] == model]
    for field in ("rank_pattern", "alpha_pattern"):
        items = (values.get(field) or {}).items()
        own = {name.partition(".")[2]: value for name, value in items if name.partition(".")[0] == model}
        values[field] = anchored(own, targets)
    values["target_modules"] = targets
    return Config.from_dict(values)


def join_models(parts: Mapping[str, PeftTensors], source: str) -> PeftTensors:
    """Return one adapter from {model of the pipeline: its adapter}; the reverse of `split_models`.

    Raises `MismatchError` if their methods differ in more than ranks and alphas.
    """
    whole = {model: part.config.to_dict() for model, part in parts.items()}
    first = next(iter(whole.values()))
    scale = "lora_alpha" if first["peft_type"] == "LORA" else "alpha"
    own = ("r", scale, "rank_pattern", "alpha_pattern", "target_modules", "base_model_name_or_path", "auto_mapping")
    differing = sorted({k for v in whole.values() for k in v if k not in own and v[k] != first.get(k)})
    if differing:
        raise MismatchError(f"{source}: the adapters of {', '.join(whole)} differ in {', '.join(differing)}")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    origins: dict[str, tuple[TensorSource, str]] = {}
    for model, part in parts.items():
        tensors = as_source(part.tensors)
        for key in tensors:
            module, _ = split_key(key)
            ranks[f"{model}.{module}"], alphas[f"{model}.{module}"] = find_settings(part.config, module)
            origins[f"{PEFT_PREFIX}{model}.{key.removeprefix(PEFT_PREFIX)}"] = (tensors, key)
    (r, rank_pattern), (alpha, alpha_pattern) = split_common(ranks), split_common(alphas)
    config = Config.from_dict(first | {
        "r": r, "rank_pattern": rank_pattern, scale: alpha, "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks), "auto_mapping": None, "base_model_name_or_path": None,
    })  # fmt: skip
    return PeftTensors(config, View(source, origins), source)


def describe(source: str, opened: Opened | AdapterError) -> Finding:
    """Return the finding about a file, which is sound. Raises the error that refused it."""
    if isinstance(opened, AdapterError):
        raise opened
    layout = opened.names
    if layout.method == OPAQUE:
        text = f"a file of {layout.style} whose method PEFT does not have ({lycoris_types(layout.keys)})"
        text += "; it passes through as it is"
    elif layout.unknown:
        text = f"a file of {layout.style} with modules of an unknown model, whose names stay flattened"
    else:
        text = f"a file of {layout.style} for {', '.join(layout.models)}"
    return note("image-file", layout.unknown, text)


FORMAT = Format(recognizes, lambda place: open_file(place.at), write_file, describe=describe, join=join_models)
