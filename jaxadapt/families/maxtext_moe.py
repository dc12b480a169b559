"""MaxText's mixtures of experts (maxtext 0.2.5): Mixtral, Qwen 3 MoE, GPT-OSS. Unrolled; `scanned` says the rest.

Gate and up of all experts are two arrays (expert, in, out), where transformers 5 has them side by side in one; GPT-OSS
has them there in turns, and stores (expert, in, out). GPT-OSS is proved unrolled only: scanned, MaxText stacks every
second layer.
"""

from collections.abc import Iterator

from jaxadapt.families import moe
from jaxadapt.families.maxtext import NORMS, PLAIN, QUERY_SCALED, SHARED, table
from jaxadapt.weight import Weight

_OURS, _HF = "decoder.layers_{l}.", "model.layers.{l}."


def _experts(block: str, torch: str, wide: str, down: str, halves: tuple[str, str]) -> Iterator[Weight]:
    """`wide` and `down` are PyTorch's axes of the two arrays; GPT-OSS' alone say they are (in, out)."""
    turned = wide == "e d f"
    for ours, half in zip(("wi_0", "wi_1"), halves, strict=True):
        key = f"{_HF}{torch}.experts.gate_up_proj[f {half}]"
        yield Weight(f"{_OURS}{block}.{ours}", key, f"e d f -> {wide}", kind="experts", fan_in_fan_out=turned)
    key = f"{_HF}{torch}.experts.down_proj"
    yield Weight(f"{_OURS}{block}.wo", key, f"e f d -> {down}", kind="experts", fan_in_fan_out=turned)


def _router(block: str, torch: str) -> Weight:
    return Weight(f"{_OURS}{block}.gate.kernel", f"{_HF}{torch}.weight", "d e -> e d", kind="parameter")


_SIDE_BY_SIDE, _IN_TURNS = ("0/2", "1/2"), ("0::2", "1::2")
_MLP = tuple(w.leaf for w in SHARED if ".mlp." in w.leaf)
_COMMON = tuple(w for w in SHARED if w.leaf not in _MLP)


def _usual(block: str) -> tuple[Weight, ...]:
    return (_router(block, "mlp.gate"), *_experts(block, "mlp", "e f d", "e d f", _SIDE_BY_SIDE))


_MIXTRAL, _QWEN3 = _usual("MoeBlock_0"), _usual("moe_block")
MIXTRAL = table(
    "mixtral", (*QUERY_SCALED, *_MIXTRAL), tuple(w.leaf for w in _MIXTRAL), shared=_COMMON, each=moe.EACH_MIXTRAL
)
_NEEDS = tuple(w.leaf for w in (*NORMS, *_QWEN3))
QWEN3_MOE = table("qwen3_moe", (*PLAIN, *NORMS, *_QWEN3), _NEEDS, shared=_COMMON, each=moe.EACH_QWEN3)

_ATTENTION = f"{_OURS}GptOssAttention."
_PROJ = (("query", "q", "n"), ("key", "k", "k"), ("value", "v", "k"))
_GPT_OSS = (
    *(
        Weight(f"{_ATTENTION}{a}.kernel", f"{_HF}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
        for a, p, n in _PROJ
    ),
    *(Weight(f"{_ATTENTION}{a}.bias", f"{_HF}self_attn.{p}_proj.bias", f"{n} h -> ({n} h)") for a, p, n in _PROJ),
    Weight(f"{_ATTENTION}out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
    Weight(f"{_ATTENTION}out.bias", f"{_HF}self_attn.o_proj.bias", "d -> d"),
    Weight(f"{_ATTENTION}sinks", f"{_HF}self_attn.sinks", "n -> n"),
    _router("GptOssMlp", "mlp.router"),
    Weight(f"{_OURS}GptOssMlp.gate.bias", f"{_HF}mlp.router.bias", "e -> e"),
    *_experts("GptOssMlp", "mlp", "e d f", "e f d", _IN_TURNS),
    *(
        Weight(f"{_OURS}GptOssMlp.{a}_bias", f"{_HF}mlp.experts.{b}", "e f -> e f", kind="other")
        for a, b in (
            ("wi_0", "gate_up_proj_bias[f 0::2]"),
            ("wi_1", "gate_up_proj_bias[f 1::2]"),
            ("wo", "down_proj_bias"),
        )
    ),
)
GPT_OSS = table(
    "gpt_oss",
    _GPT_OSS,
    needs=tuple(w.leaf for w in _GPT_OSS),
    shared=tuple(w for w in _COMMON if ".self_attention." not in w.leaf),
)
