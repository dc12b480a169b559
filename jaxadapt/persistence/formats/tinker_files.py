"""Tinker's downloaded adapter → `PeftTensors`: files with PEFT's names, and keys of Tinker's own.

| key in Tinker's file | module in PyTorch |
|---|---|
| `…mlp.experts.w1`, `w3`, `w2`, tensors of three axes | gate_proj, up_proj and down_proj of each expert |
| the same of GPT-OSS | the parameters gate_up_proj, with gate and up in alternate columns, and down_proj |
| the same of Qwen 3.5 | the parameters gate_up_proj, with the rows of gate before those of up, and down_proj |
| `…mixer.experts.w1` and `w2` of Nemotron, whose w3 is empty | the parameters up_proj and down_proj |
| `…in_proj_q`, `in_proj_k` and `in_proj_v` of Qwen 3.5 | in_proj_qkv, with their rows in this order |
| `model.unembed_tokens`, `model.lm_head` | lm_head |
| `model.layers.N.attn.…`, of GPT-OSS | `model.layers.N.self_attn.…` |
| `backbone.layers.N.mixer.…`, of Nemotron | `model.layers.N.mixer.…` |

A is (r, in) and B (out, r), as PEFT's; those of experts have the experts' axis before them. It has size 1 for a factor
that all experts share. The change of a weight is lora_alpha / r · B·A with the `r` of the configuration, whatever the
rank of the tensors. Modules that are parts of one weight in PyTorch have an A each: their ranks are concatenated, which
computes the same. Nothing is read that has two meanings without the base.

The source is the weights' code of Tinker's cookbook (0.6.1: `weights/_adapter.py`, `weights/_merge*.py`). It shows no
reader of such files but its own conversion and merge. Tinker's client (0.38.0) loads checkpoints of its server alone
(`types/load_weights_request.py`: "A tinker URI") and has no upload, so that this format is only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import Derived, TensorSource, TensorSpec, combine, is_float, rename
from jaxadapt.configs.base import Config, unique_keys
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, MismatchError, Report, raise_listed
from jaxadapt.core.lazy import np
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.keymaps.pytorch import flow_position
from jaxadapt.persistence.formats import EXPECTED, Finding, Format, Opened, Place, Wanted, error, module_keys, read_text
from jaxadapt.storage import location, safetensors

MERGE = "merge it into its base with Tinker's own cookbook"
# {axes of a tensor: the keys that only Tinker gives to such tensors}; PEFT's have two axes
_SIGNS = {
    2: re.compile(r".+\.(model\.unembed_tokens|linear_attn\.in_proj_[qkv])\.lora_[AB]\..+"),
    3: re.compile(r".+\.experts\.w[123]\.lora_[AB]\..+"),
}
_KEY = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts|(?:model|backbone)\.layers\.\d+\.mixer\.experts)\.(w[123])")
_EACH = re.compile(r".+\.experts\.\d+\.\w+_proj")  # in files that the cookbook has converted
_QKV = re.compile(r"(.+\.linear_attn\.in_proj_)([qkv])")
_LAYER = re.compile(r"model\.layers\.(\d+)\..+")
_GPT_OSS = re.compile(r"(model\.layers\.\d+)\.attn(\.[qkvo]_proj)")
_ATTENTION = re.compile(r"model\.layers\.\d+\.(self_attn|attn|linear_attn)\..+")
# {family: (modules that only it has, its name)}
_FAMILIES = {
    "gpt-oss": (_GPT_OSS, re.compile(r"(?i)gpt-oss")),
    "qwen3.5": (_QKV, re.compile(r"(?i)qwen3\.[56]")),
}
_UNKNOWN = (
    "experts of GPT-OSS, Qwen 3.5 and other models have different forms in PEFT, and neither a module of attention nor"
    " base_model_name_or_path tells the model; set base_model_name_or_path in adapter_config.json"
)
_NEMOTRON = re.compile(r"(?:model|backbone)(\.layers\.\d+\.mixer\..+)")
_NO_GATE = re.compile(r".+\.mixer\.experts\.w3")
_HEADS = ("model.unembed_tokens", "model.lm_head", "lm_head")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MOST_EXPERTS = 4096  # a factor that all share is repeated for each: a small file must not become terabytes
# {(family, name in Tinker's file): (parameter, place of the rows among the parts of its rows)}
_PARAMETERS = {
    ("gpt-oss", "w1"): ("gate_up_proj", 0), ("gpt-oss", "w3"): ("gate_up_proj", 1), ("gpt-oss", "w2"): ("down_proj", 0),
    ("qwen3.5", "w1"): ("gate_up_proj", 0), ("qwen3.5", "w3"): ("gate_up_proj", 1), ("qwen3.5", "w2"): ("down_proj", 0),
    ("nemotron", "w1"): ("up_proj", 0), ("nemotron", "w2"): ("down_proj", 0),
}  # fmt: skip
# (pattern of a module's name, why no tensor of PEFT has its values without the base)
_REFUSED = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r".+\.mixer\.(gate_proj|x_proj)",
         "Nemotron: in the base these are rows of in_proj, and the file does not tell how many others in_proj has"),
        (_NO_GATE.pattern, "Nemotron: its experts have no gate, so that this tensor should be empty"),
        (r".+\.embed_tokens", "Tinker's source names no adapter of the token embedding"),
    )
)  # fmt: skip
# {field of PEFT: the value that leaves the change of a weight at lora_alpha / r · B·A}
_PLAIN: Mapping[str, Any] = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
    "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None, "target_parameters": None,
}  # fmt: skip


# ---------------------------------------------------------------- finding


def recognizes(place: Place) -> bool:
    """Return False: the names of the files are PEFT's. `peft_folder` asks `is_named_like` after reading them."""
    return False


def is_named_like(tensors: Mapping[str, safetensors.TensorInfo], config: location.Location) -> bool:
    """Return True for keys of Tinker, or a configuration of Tinker: `r` and `lora_alpha` without a type and targets."""
    signs = ((_SIGNS.get(len(info.shape)), key) for key, info in tensors.items())
    if any(sign is not None and sign.fullmatch(key) for sign, key in signs):
        return True
    values: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError, FileError):  # the reader of PEFT's folder reports it
        values = _parse_object(read_text(config)) if location.exists(config) else {}
    return {"r", "lora_alpha"} <= values.keys() and values.keys().isdisjoint({"peft_type", "target_modules"})


def _parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other text."""
    try:
        values: object = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, ConfigError, RecursionError):
        return {}
    return cast("dict[str, Any]", values) if isinstance(values, dict) else {}


# ---------------------------------------------------------------- reading


def parse_settings(text: str, source: str) -> LoraConfig:
    """Return PEFT's configuration for Tinker's, without the modules, which the tensors name.

    Raises `ConfigError` for another method than LoRA, a missing or invalid number, or a setting that changes the scale.
    """
    values = _parse_object(text)
    if not {"r", "lora_alpha"} <= values.keys():
        raise ConfigError(f"{source}: expected a JSON object with r and lora_alpha, as Tinker writes; fetch it again")
    config = Config.from_dict({"peft_type": "LORA", **values}, source)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{source}: peft_type: expected LORA in Tinker's adapter, found {config.peft_type}")
    raise_listed(
        ConfigError,
        f"{source}: Tinker's adapter changes a weight by lora_alpha / r · B·A, and these fields say otherwise. Remove"
        " them, or correct the keys of the file if it is PEFT's:",
        [
            f"{name}: expected {plain!r}, found {config.get(name)!r}"
            for name, plain in _PLAIN.items()
            if config.get(name) and config.get(name) != plain
        ],
    )
    return config


@contextlib.contextmanager
def open_files(place: Place) -> Generator[Opened]:
    """Open an adapter of Tinker under PEFT's names; the tensors of an expert are cut from a file's when they are read.

    Raises:
        ConfigError: see `parse_settings`.
        MismatchError: a tensor is missing, or PEFT has no form for it; all are listed.
        FileError: a file cannot be read.
    """
    weights = place.at if place.names is None else place.at / location.WEIGHTS[0]
    config = weights.parent / location.CONFIG
    settings = parse_settings(read_text(config), str(config))
    with safetensors.TensorFile(weights) as file:
        yield Opened(read_tensors(file, settings, os.fspath(place.path)), weights, "Tinker's folder")


class _Joint(NamedTuple):
    """One weight of PyTorch whose parts are modules of Tinker's.

    Attributes:
        parts: {its place among the parts: {"A": its key, "B": its key}}, by place.
        form: "qkv" for the rows of three parts one after the other; for each expert, "halves" for those of two parts,
            "alternate" for rows of two parts that alternate, and "" for one part.
    """

    parts: Mapping[int, Mapping[str, str]]
    form: str

    @classmethod
    def empty(cls, name: str, family: str) -> _Joint:
        """Return the weight of this name without parts."""
        forms = {"in_proj_qkv": "qkv", "gate_up_proj": "alternate" if family == "gpt-oss" else "halves"}
        return cls({}, forms.get(name.rpartition(".")[2], ""))

    def sizes(self, file: TensorSource) -> tuple[int, int]:
        """Return the number of experts, 1 for a module, and the rank of all parts together."""
        shapes = [file.specs[keys[side]].shape for keys in self.parts.values() for side in "AB"]
        return max(shape[0] if len(shape) == 3 else 1 for shape in shapes), sum(shape[-2] for shape in shapes[::2])

    def problem(self, file: TensorSource) -> str:
        """Return why the parts do not fit; "" if they do."""
        if self.form == "qkv" and len(self.parts) != 3:
            found = ", ".join(f"in_proj_{'qkv'[place]}" for place in self.parts)
            return f"the rows are those of in_proj_q, in_proj_k and in_proj_v; expected all three, found {found}"
        a, b = ([file.specs[keys[side]] for keys in self.parts.values()] for side in "AB")
        sizes = {
            "inputs": [spec.shape[-1] for spec in a],
            "outputs": [spec.shape[-2] for spec in b if self.form != "qkv"],
            "experts": sorted({spec.shape[0] for spec in (*a, *b) if self.form != "qkv"} - {1}),
            "dtypes": [str(spec.dtype) for spec in (*a, *b)],
        }
        different = [f"{what} {' and '.join(map(str, found))}" for what, found in sizes.items() if len(set(found)) > 1]
        return f"the parts of this weight must agree, found {'; '.join(different)}" if different else ""


def read_tensors(file: TensorSource, settings: LoraConfig, source: str) -> PeftTensors:
    """Return the content of an open file as PEFT's; see `open_files`."""
    modules, joints = _group_keys(file, settings, source)
    whole: dict[str, str] = {}
    parts: dict[str, tuple[str, int]] = {}
    ranks = {name: joint.sizes(file)[1] for name, joint in joints.items()}
    twice: list[str] = []
    for module, keys in modules.items():
        shapes = {side: file.specs[key].shape for side, key in keys.items()}
        names = _module_names(module, max(shapes["A"][0], shapes["B"][0]))
        twice += [f"{PEFT_PREFIX}{module}: {name} has an adapter already" for name in names if name in ranks]
        ranks |= dict.fromkeys(names, shapes["A"][-2])
        for side, key in keys.items():
            new = [f"{PEFT_PREFIX}{name}.lora_{side}.weight" for name in names]
            if len(shapes[side]) == 2:
                whole[new[0]] = key
            else:
                parts |= {name: (key, expert % shapes[side][0]) for expert, name in enumerate(new)}
    raise_listed(MismatchError, f"{source}: two modules of the file are one in PyTorch; remove one of each:", twice)
    parameters = [name for name in joints if ".experts." in name]
    joined = {
        f"{PEFT_PREFIX}{_wrapper(name, parameters)}.lora_{side}.weight": (joint, side)
        for name, joint in joints.items()
        for side in "AB"
    }
    tensors = [rename(file, whole), _single_experts(file, parts), _joined(file, joined)]
    return PeftTensors(_config(settings, ranks, parameters), combine(source, tensors), source)


def _config(settings: LoraConfig, ranks: Mapping[str, int], parameters: Sequence[str]) -> LoraConfig:
    """Return PEFT's configuration for modules and parameters of these ranks."""
    config = settings.replace(
        target_modules=_targets([name for name in ranks if name not in parameters], parameters),
        target_parameters=_target_parameters(parameters) or None,
    )
    if set(ranks.values()) == {settings.r}:
        return config
    return config.with_ranks(ranks, {name: _alpha(settings, rank) for name, rank in ranks.items()})


def _group_keys(
    file: TensorSource, settings: LoraConfig, source: str
) -> tuple[dict[str, dict[str, str]], dict[str, _Joint]]:
    """Return {module: {"A": its key, "B": its key}}, and {weight of PyTorch: its parts} for those that are joined.

    Raises `MismatchError` listing tensors without a form in PEFT.
    """
    modules, problems = module_keys(file, _KEY, f"{PEFT_PREFIX}<module>.lora_A.weight or lora_B.weight")
    family = _family(modules, settings.base_model_name_or_path or "")
    alone: dict[str, dict[str, str]] = {}
    joints: dict[str, _Joint] = {}
    for module, keys in modules.items():
        specs = {side: file.specs[key] for side, key in keys.items()}
        name, place = _part_of(module, family or "")
        joint = joints.get(name, _Joint.empty(name, family or ""))
        if _NO_GATE.fullmatch(module) and all(0 in spec.shape for spec in specs.values()):
            continue  # a placeholder
        twice = place in joint.parts and f"this part of {name} is there twice"
        if problem := _problem(module, specs, family) or twice:
            problems.append(f"{PEFT_PREFIX}{module}: {problem}")
        elif name:
            joints[name] = joint._replace(parts=dict(sorted([*joint.parts.items(), (place, keys)])))
        else:
            alone[module] = keys
    problems += [f"{PEFT_PREFIX}{name}: {why}" for name, joint in joints.items() if (why := joint.problem(file))]
    raise_listed(MismatchError, f"{source}: cannot read Tinker's adapter in PEFT's form; {MERGE}:", problems)
    return alone, joints


def _family(modules: Iterable[str], base: str) -> str | None:
    """Return "gpt-oss", "qwen3.5", "" for another, or None if neither attention nor the name of the base tells it.

    >>> _family(["model.layers.0.attn.q_proj"], ""), _family(["model.layers.0.self_attn.q_proj"], "")
    ('gpt-oss', '')
    >>> _family(["model.layers.0.mlp.experts.w1"], "openai/gpt-oss-20b"), _family(["model.layers.0.mlp.experts.w1"], "")
    ('gpt-oss', None)
    """
    attention = list(filter(_ATTENTION.fullmatch, modules))
    for family, (module, name) in _FAMILIES.items():
        if any(map(module.fullmatch, attention)) if attention else name.search(base):
            return family
    return "" if attention or base else None


def _part_of(module: str, family: str) -> tuple[str, int]:
    """Return the weight of PyTorch that holds a module's rows, and their place; ("", 0) if the module is PyTorch's.

    >>> _part_of("model.layers.0.linear_attn.in_proj_k", "")
    ('model.layers.0.linear_attn.in_proj_qkv', 1)
    >>> _part_of("model.layers.0.mlp.experts.w3", "gpt-oss"), _part_of("model.layers.0.mlp.experts.w3", "")
    (('model.layers.0.mlp.experts.gate_up_proj', 1), ('', 0))
    """
    if match := _QKV.fullmatch(module):
        return f"{match[1]}qkv", "qkv".index(match[2])
    match = _EXPERTS.fullmatch(module)
    family = "nemotron" if ".mixer." in module else family
    if match is None or (family, match[2]) not in _PARAMETERS:
        return "", 0
    name, place = _PARAMETERS[family, match[2]]
    return _rename(f"{match[1]}.{name}"), place


def _alpha(settings: LoraConfig, rank: int) -> float:
    """Return the alpha with which a rank has the scale lora_alpha / r."""
    alpha = settings.lora_alpha * rank / settings.r
    return int(alpha) if float(alpha).is_integer() else alpha


def _rename(module: str) -> str:
    """Return PyTorch's name for a module of Tinker that differs by its path alone.

    >>> _rename("model.unembed_tokens"), _rename("model.layers.0.attn.q_proj")
    ('lm_head', 'model.layers.0.self_attn.q_proj')
    >>> _rename("backbone.layers.0.mixer.q_proj")
    'model.layers.0.mixer.q_proj'
    """
    return "lm_head" if module in _HEADS else _NEMOTRON.sub(r"model\1", _GPT_OSS.sub(r"\1.self_attn\2", module))


def _module_names(module: str, count: int) -> list[str]:
    """Return PyTorch's names for a module of Tinker: one, or one for each of `count` experts.

    >>> _module_names("model.layers.0.mlp.experts.w2", 2)
    ['model.layers.0.mlp.experts.0.down_proj', 'model.layers.0.mlp.experts.1.down_proj']
    """
    if match := _EXPERTS.fullmatch(module):
        return [f"{match[1]}.{expert}.{_PROJECTIONS[match[2]]}" for expert in range(count)]
    return [_rename(module)]


def _problem(module: str, specs: Mapping[str, TensorSpec], family: str | None) -> str:
    """Return why a module of Tinker has no form in PEFT; "" if it has one."""
    if why := next((why for pattern, why in _REFUSED if pattern.fullmatch(module)), ""):
        return why
    if len(specs) != 2:
        return f"expected lora_A.weight and lora_B.weight, found only lora_{''.join(specs)}.weight"
    a, b = (tuple(specs[side].shape) for side in "AB")
    if not all(is_float(spec.dtype) for spec in specs.values()):
        return f"expected floating-point numbers, found {specs['A'].dtype} and {specs['B'].dtype}"
    if "experts" in module.split(".") and not _EACH.fullmatch(module):
        return _problem_of_experts(module, a, b, family)
    is_pair = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
    return "" if is_pair else f"expected A (r, in) and B (out, r), found {list(a)} and {list(b)}"


def _problem_of_experts(module: str, a: tuple[int, ...], b: tuple[int, ...], family: str | None) -> str:
    if not _EXPERTS.fullmatch(module):
        return "expected model.layers.<N>.mlp.experts.w1, w2 or w3, or those of a mixer, the names in Tinker's source"
    if len(a) != 3 or len(b) != 3 or a[1] != b[2] or 0 in (*a, *b):
        return f"expected A (experts, r, in) and B (experts, out, r), found {list(a)} and {list(b)}"
    if a[0] != b[0] and 1 not in (a[0], b[0]):
        return f"expected as many experts in A as in B, or 1 in the factor that all share, found {a[0]} and {b[0]}"
    if max(a[0], b[0]) > _MOST_EXPERTS:
        return f"expected at most {_MOST_EXPERTS} experts, found {max(a[0], b[0])}"
    if max(a[0], b[0]) == 1:
        return "A and B are both shared, so that the number of experts is not known"
    return _UNKNOWN if family is None and ".mlp." in module else ""


def _targets(modules: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """Return `target_modules` for names of modules: the last part of the names, if modules in each layer have it.

    The projections of experts have no other form: PEFT finds their modules' names only by this part.

    >>> _targets(["model.layers.0.mlp.q", "model.layers.1.mlp.q", "model.layers.1.v", "lm_head"], [])
    ['lm_head', 'model.layers.1.v', 'q']
    >>> _targets(["model.layers.0.mlp.q"], ["model.layers.1.mlp.experts.up_proj"])
    ['model.layers.0.mlp.q']
    """
    layers = paths.group((name.rpartition(".")[2], match[1]) for name in modules if (match := _LAYER.fullmatch(name)))
    everywhere = {match[1] for name in (*modules, *parameters) if (match := _LAYER.fullmatch(name))}
    short = {end for end, found in layers.items() if set(found) == everywhere} | {
        name.rpartition(".")[2] for name in modules if ".experts." in name
    }
    return sorted({end if (end := name.rpartition(".")[2]) in short else name for name in modules})


def _target_parameters(parameters: Sequence[str]) -> list[str]:
    """Return `target_parameters`: the last two parts of the names, if all layers have the same ones; else the names.

    >>> _target_parameters(["model.layers.0.mlp.experts.up_proj", "model.layers.1.mlp.experts.up_proj"])
    ['experts.up_proj']
    >>> _target_parameters(["model.layers.0.mlp.experts.up_proj", "model.layers.1.mlp.experts.down_proj"])
    ['model.layers.0.mlp.experts.up_proj', 'model.layers.1.mlp.experts.down_proj']
    """
    layers = paths.group((module, last) for module, _, last in (name.rpartition(".") for name in parameters))
    if len(set(map(frozenset, layers.values()))) > 1:
        return list(parameters)
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))


def _wrapper(name: str, parameters: Sequence[str]) -> str:
    """Return the module of PEFT's tensors for a weight. PEFT wraps a module once for each of its parameters.

    >>> both = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    >>> [_wrapper(name, both) for name in (*both, "linear_attn.in_proj_qkv")]
    ['mlp.experts', 'mlp.experts.base_layer', 'linear_attn.in_proj_qkv']
    """
    if name not in parameters:
        return name
    owner = name.rpartition(".")[0]
    others = sorted((each for each in parameters if each.rpartition(".")[0] == owner), key=flow_position)
    return owner + ".base_layer" * (len(others) - 1 - others.index(name))


def _joined(file: TensorSource, joined: Mapping[str, tuple[_Joint, str]]) -> TensorSource:
    """Return the tensors of joined weights, from `{new name: (weight, "A" or "B")}`, as PEFT flattens them.

    A is (experts · r, in) with the rows of one expert together, and B (out, r · experts) with the columns of one rank.
    """

    def spec(name: str) -> TensorSpec:
        joint, side = joined[name]
        experts, rank = joint.sizes(file)
        first, *_ = shapes = [file.specs[keys[side]] for keys in joint.parts.values()]
        if side == "A":
            return TensorSpec((experts * rank, first.shape[-1]), first.dtype)
        is_pair = joint.form in ("alternate", "halves")
        rows = 2 * first.shape[-2] if is_pair else sum(each.shape[-2] for each in shapes)
        return TensorSpec((rows, rank * experts), first.dtype)

    def read(name: str, slices: Sequence[slice]) -> np.ndarray:
        joint, side = joined[name]
        (experts, rank), (shape, dtype) = joint.sizes(file), spec(name)
        bits = f"u{np.dtype(dtype).itemsize}"  # numpy copies the 16-bit floats of other packages one by one
        parts = [file.read(keys[side]).view(bits) for keys in joint.parts.values()]
        if side == "A":
            parts = [np.broadcast_to(x, (experts, *x.shape[-2:])) for x in parts]
            values = np.concatenate(parts, axis=1).reshape(shape)
        else:
            values = np.zeros((experts, shape[0], rank), bits)
            row = column = 0
            for place, x in zip(joint.parts, parts, strict=True):
                row = place * x.shape[-2] if joint.form == "halves" else row
                rows = slice(place, None, 2) if joint.form == "alternate" else slice(row, row + x.shape[-2])
                values[:, rows, column : column + x.shape[-1]] = x
                row, column = row + x.shape[-2], column + x.shape[-1]
            values = values.transpose(1, 2, 0).reshape(shape)
        return np.ascontiguousarray(values.view(dtype)[tuple(slices)])

    return Derived(file.source, joined, spec, read)


def _single_experts(file: TensorSource, parts: Mapping[str, tuple[str, int]]) -> TensorSource:
    """Return the matrices of single experts, from `{new name: (key, expert)}`; each is cut when it is read."""

    def spec(name: str) -> TensorSpec:
        shape, dtype = file.specs[parts[name][0]]
        return TensorSpec(tuple(shape[1:]), dtype)

    def read(name: str, slices: Sequence[slice]) -> np.ndarray:
        key, expert = parts[name]
        return file.read_slice(key, (slice(expert, expert + 1), *slices))[0]

    return Derived(file.source, parts, spec, read)


# ---------------------------------------------------------------- the other direction


def refuse_writing(tensors: PeftTensors, target: location.Location, wanted: Wanted, report: Report) -> NoReturn:
    """Raise `FileError`: Tinker's client loads no files."""
    raise FileError(
        f"{target}: cannot write Tinker's files: no program loads them, and Tinker's client (0.38.0) trains on from"
        " tinker:// paths of its own server only; write PEFT's folder"
    )


def describe(source: str, opened: Opened | AdapterError) -> Finding:
    """Return the finding about a folder: how to convert it, or why it cannot be converted."""
    if isinstance(opened, AdapterError):
        return error(
            "other-library", (), str(opened), "an adapter of Tinker that PEFT has a form for",
            f"correct what the message names; otherwise {MERGE}",
        )  # fmt: skip
    return error(
        "other-library", (), "the keys are Tinker's, which PEFT and vLLM do not read; jaxadapt does", EXPECTED,
        f"run: jaxadapt convert {source} OUT",
    )  # fmt: skip


FORMAT = Format(recognizes, open_files, refuse_writing, describe=describe)
