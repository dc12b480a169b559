"""gemma 4.0 (`gm.nn.LoRA`, `gemma.peft`): a submodule `lora` with `a` and `b`.

What gemma's own Einsum holds is wrapped once more, in a module of the weight's name (`_LoRAEinsum_gating_einsum`)
or, for a weight called `w`, a number. Fused parts (k and v, gate and up) share one A.
"""

from jaxadapt.models.foreign.dialect import Dialect, Pair

_AXES = (("in r", "r outs"), ("ins r", "r out"), ("batch in r", "batch r out"))

GEMMA = Dialect(
    "gemma",
    (
        Pair("{module}._LoRAEinsum_0.lora.a", "{module}._LoRAEinsum_0.lora.b", "{module}.w", _AXES),
        Pair("{module}._LoRAEinsum_{name}.lora.a", "{module}._LoRAEinsum_{name}.lora.b", "{module}.{name}", _AXES),
        Pair("{module}.lora.a", "{module}.lora.b", "{module}.kernel", _AXES),
    ),
    unscaled=True,
    shares=True,
)
