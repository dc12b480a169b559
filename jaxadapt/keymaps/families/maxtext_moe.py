"""MaxText's mixtures of experts (maxtext 0.2.5), unrolled: Mixtral, Qwen 3 MoE, GPT-OSS, DeepSeek V3, Kimi K2.

Gate and up of all experts are two arrays (expert, in, out). transformers 5 concatenates them in one array; its GPT-OSS
interleaves them, and stores (expert, in, out). In a stacked GPT-OSS, two layers are one block. DeepSeek's layers with
experts are numbered separately from the dense layers before them: three in DeepSeek V3, one in Kimi K2.
"""

from collections.abc import Iterator
from typing import Any

from jaxadapt.keymaps.families import moe
from jaxadapt.keymaps.families.maxtext import NORMS, PLAIN, QUERY_SCALED, SHARED, make_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_OURS, _HF = "decoder.layers_{l}.", "model.layers.{l}."


def _experts(
    block: str, torch: str, wide: str, down: str, halves: tuple[str, str], prefix: str = _OURS
) -> Iterator[Weight]:
    """Yield the entries of a layer's experts.

    Args:
        block: the name of the module.
        torch: PyTorch's name of the module.
        wide: PyTorch's axes of the array of gate and up; those of GPT-OSS are (in, out).
        down: PyTorch's axes of the array of the down projection.
        halves: the parts of gate and up in PyTorch's array.
        prefix: the prefix of the layer's names.
    """
    turned = wide == "e d f"
    for ours, half in zip(("wi_0", "wi_1"), halves, strict=True):
        key = f"{_HF}{torch}.experts.gate_up_proj[f {half}]"
        yield Weight(f"{prefix}{block}.{ours}", key, f"e d f -> {wide}", kind="experts", fan_in_fan_out=turned)
    key = f"{_HF}{torch}.experts.down_proj"
    yield Weight(f"{prefix}{block}.wo", key, f"e f d -> {down}", kind="experts", fan_in_fan_out=turned)


def _router(block: str, torch: str, prefix: str = _OURS) -> Weight:
    return Weight(f"{prefix}{block}.gate.kernel", f"{_HF}{torch}.weight", "d e -> e d", kind="parameter")


_SIDE_BY_SIDE, _IN_TURNS = ("0/2", "1/2"), ("0::2", "1::2")
_MLP = tuple(w.leaf for w in SHARED if ".mlp." in w.leaf)
_COMMON = tuple(w for w in SHARED if w.leaf not in _MLP)


_LAYER_NORMS = tuple(w for w in SHARED if "layer_norm" in w.leaf)
_OUTSIDE = tuple(w for w in SHARED if _OURS not in w.leaf)
_USUAL = ("e f d", "e d f", _SIDE_BY_SIDE)


def _usual(block: str) -> tuple[Weight, ...]:
    return (_router(block, "mlp.gate"), *_experts(block, "mlp", *_USUAL))


_MIXTRAL, _QWEN3 = _usual("MoeBlock_0"), _usual("moe_block")
MIXTRAL = make_keymap(
    "mixtral",
    (*QUERY_SCALED, *_MIXTRAL),
    tuple(w.leaf for w in _MIXTRAL),
    shared=_COMMON,
    expert_modules=moe.EACH_MIXTRAL,
)
_NEEDS = tuple(w.leaf for w in (*NORMS, *_QWEN3))
QWEN3_MOE = make_keymap("qwen3_moe", (*PLAIN, *NORMS, *_QWEN3), _NEEDS, shared=_COMMON, expert_modules=moe.EACH_QWEN3)

_PROJ = (("query", "q", "n"), ("key", "k", "k"), ("value", "v", "k"))


def _with_layers(layers: tuple[int, int], w: Weight) -> Weight:
    options: dict[str, Any] = {**w.options, "layers": layers}
    return Weight(w.leaf, w.key, w.pattern, **options)


def _gpt_oss(prefix: str, layers: tuple[int, int] = (1, 0)) -> tuple[Weight, ...]:
    attention = f"{prefix}GptOssAttention."
    entries = (
        *(
            Weight(f"{attention}{a}.kernel", f"{_HF}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
            for a, p, n in _PROJ
        ),
        *(Weight(f"{attention}{a}.bias", f"{_HF}self_attn.{p}_proj.bias", f"{n} h -> ({n} h)") for a, p, n in _PROJ),
        Weight(f"{attention}out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        Weight(f"{attention}out.bias", f"{_HF}self_attn.o_proj.bias", "d -> d"),
        Weight(f"{attention}sinks", f"{_HF}self_attn.sinks", "n -> n"),
        _router("GptOssMlp", "mlp.router", prefix),
        Weight(f"{prefix}GptOssMlp.gate.bias", f"{_HF}mlp.router.bias", "e -> e"),
        *_experts("GptOssMlp", "mlp", "e d f", "e f d", _IN_TURNS, prefix),
        *(
            Weight(f"{prefix}GptOssMlp.{a}_bias", f"{_HF}mlp.experts.{b}", "e f -> e f", kind="other")
            for a, b in (
                ("wi_0", "gate_up_proj_bias[f 0::2]"),
                ("wi_1", "gate_up_proj_bias[f 1::2]"),
                ("wo", "down_proj_bias"),
            )
        ),
        *(Weight(w.leaf.replace(_OURS, prefix), w.key, w.pattern) for w in _LAYER_NORMS),
    )
    return tuple(_with_layers(layers, w) for w in entries)


def _top(name: str, entries: tuple[Weight, ...]) -> KeyMap:
    return make_keymap(name, entries, needs=tuple(w.leaf for w in entries), shared=_OUTSIDE)


GPT_OSS = _top("gpt_oss", _gpt_oss(_OURS))
_BLOCK = f"{_OURS}layers_"
GPT_OSS_BLOCKS = _top("gpt_oss-blocks", (*_gpt_oss(f"{_BLOCK}0.", (2, 0)), *_gpt_oss(f"{_BLOCK}1.", (2, 1))))

# ---- DeepSeek V3: dense layers first; the layers with experts are numbered separately --------------------------


def _deepseek(name: str, dense: int) -> KeyMap:
    entries: list[Weight] = []
    for prefix, first in (("decoder.dense_layers_{l}.", 0), ("decoder.moe_layers_{l}.", dense)):
        attention, block = f"{prefix}self_attention.", f"{prefix}DeepSeekMoeBlock_0."
        layer_entries = [Weight(w.leaf.replace(_OURS, prefix), w.key, w.pattern) for w in _LAYER_NORMS]
        for a, b, pattern in (
            ("wq_a", "q_a_proj", "d r -> r d"),
            ("wq_b", "q_b_proj", "r n h -> (n h) r"),
            ("wkv_a", "kv_a_proj_with_mqa", "d r -> r d"),
            ("wkv_b", "kv_b_proj", "r n h -> (n h) r"),
            ("out", "o_proj", "n h d -> d (n h)"),
        ):
            layer_entries.append(Weight(f"{attention}{a}.kernel", f"{_HF}self_attn.{b}.weight", pattern))
        for a, b in (("q", "q_a"), ("kv", "kv_a")):
            layer_entries.append(Weight(f"{attention}{a}_norm.scale", f"{_HF}self_attn.{b}_layernorm.weight", "d -> d"))
        mlp = (f"{prefix}mlp.", f"{_HF}mlp.") if not first else (f"{block}shared_experts.", f"{_HF}mlp.shared_experts.")
        for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            layer_entries.append(Weight(f"{mlp[0]}{a}.kernel", f"{mlp[1]}{b}_proj.weight", "i o -> o i"))
        if first:
            layer_entries += [
                _router("MoeBlock_0", "mlp.gate", block),
                *_experts("MoeBlock_0", "mlp", *_USUAL, prefix=block),
            ]
            bias = f"{_HF}mlp.gate.e_score_correction_bias"  # not a parameter, so it is always stacked on axis 0
            layer_entries.append(Weight(f"{block}MoeBlock_0.gate.bias", bias, "e -> e", scan=0))
        entries += [_with_layers((1, first), w) for w in layer_entries]
    needs = tuple(w.leaf for w in entries if "moe_layers" in w.leaf and w.scan is None)
    counts = ((next(w.leaf for w in entries if "dense_layers" in w.leaf), dense),)
    return make_keymap(name, entries, needs, shared=_OUTSIDE, expert_modules=moe.EACH_DEEPSEEK, counts=counts)


DEEPSEEK_V3 = _deepseek("deepseek_v3", 3)
KIMI_K2 = _deepseek("kimi_k2", 1)
