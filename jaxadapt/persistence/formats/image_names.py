"""The keys of image adapters in one file, as kohya-ss, LyCORIS and diffusers write them, and PEFT's names for them.

    kohya-ss    lora_unet_down_blocks_0_…_to_q.lora_down.weight     one alpha for each module, as a tensor
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight             the modules' real names

The name in PEFT is base_model.model.<model>.<module>.<tensor>, with the model of the pipeline: unet, text_encoder, …
Strings and shapes only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX

KOHYA, DIFFUSERS = "kohya-ss", "diffusers"
ALPHA = "alpha"
LYCORIS = "LYCORIS"
"""The type of tensors that PEFT has no method for."""

Shapes = Mapping[str, tuple[int, ...]]

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
        method: PEFT's type; `LYCORIS` for tensors of another method, which only pass through.
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
    methods = {_method_of(style, name) for _, name, _ in parsed.values() if name != ALPHA}
    method = methods.pop() if len(methods) == 1 else ""
    renamed = {f"{PEFT_PREFIX}{module}.{name}": key for key, (module, name, _) in parsed.items() if name != ALPHA}
    alphas = {module: key for key, (module, name, _) in parsed.items() if name == ALPHA}
    unknown = tuple(dict.fromkeys(module for module, _, is_known in parsed.values() if not is_known))
    modules = {module for module, name, _ in parsed.values() if name != ALPHA}
    if not method or len(renamed) + len(alphas) < len(parsed) or not alphas.keys() <= modules:
        return Layout(style, LYCORIS, {key: key for key in parsed}, {}, unknown)
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


def _method_of(style: str, name: str) -> str:
    if style == DIFFUSERS:
        return "LORA"
    return next((method for method, known in _TENSORS.values() if known == name), "")


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


# ---------------------------------------------------------------- writing


def kohya_keys(modules: Iterable[str]) -> dict[str, str]:
    """Return {module with its model: the name that kohya-ss gives it}; modules without one keep theirs.

    SDXL's UNet gets Stability AI's names, and its text encoders the numbers 1 and 2, as kohya-ss writes them.

    >>> kohya_keys(["unet.mid_block.attentions.0.proj_in"])
    {'unet.mid_block.attentions.0.proj_in': 'lora_unet_mid_block_attentions_0_proj_in'}
    """
    modules = list(modules)
    split = {module: module.partition(".")[::2] for module in modules}
    is_sdxl = pytorch.is_sdxl(name for model, name in split.values() if model == "unet") or any(
        model == "text_encoder_2" for model, _ in split.values()
    )
    names: dict[str, str] = {}
    for module, (model, name) in split.items():
        if is_sdxl and model == "unet":
            name = pytorch.sdxl_names().get(name, name)
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_sdxl else "lora_te"}.get(model, "lora_te2")
        is_model = model in pytorch.MODULES
        flat = module if module.startswith("lycoris_") else f"lora_{module.replace('.', '_')}"
        names[module] = f"{prefix}_{name.replace('.', '_')}" if is_model else flat
    return names


def split_key(key: str) -> tuple[str, str]:
    """Return the module and the tensor's name of a key of PEFT.

    >>> split_key("base_model.model.unet.conv_in.lora_A.weight")
    ('unet.conv_in', 'lora_A.weight')
    """
    name = key.removeprefix(PEFT_PREFIX)
    match = re.fullmatch(r"(.+)\.((?:lora_|hada_|lokr_)\w*(?:\.weight|\.bias)?)", name)
    return (name, "") if match is None else (match[1], match[2])
