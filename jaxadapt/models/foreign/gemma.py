"""gemma 4.0 (`gm.nn.LoRA`, `gemma.peft`): a submodule `lora` with `a` and `b`.

The weights of gemma's own Einsum are in a further module, called after the weight (`_LoRAEinsum_gating_einsum`) or, for
a weight called `w`, after a number. Fused parts (k and v, gate and up) share one A.
"""

from jaxadapt.models.foreign import Dialect, Pair

_AXES = (("in r", "r outs"), ("ins r", "r out"), ("batch in r", "batch r out"))

DIALECT = Dialect(
    "gemma",
    (
        Pair("{module}._LoRAEinsum_0.lora.a", "{module}._LoRAEinsum_0.lora.b", "{module}.w", _AXES),
        Pair("{module}._LoRAEinsum_{name}.lora.a", "{module}._LoRAEinsum_{name}.lora.b", "{module}.{name}", _AXES),
        Pair("{module}.lora.a", "{module}.lora.b", "{module}.kernel", _AXES),
    ),
    unscaled=True,
    shares=True,
    trains=("gemma",),
)
