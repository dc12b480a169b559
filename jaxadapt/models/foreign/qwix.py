"""Qwix 0.1.8 (and Tunix, which trains with it): `<weight>_lora_a`, `<weight>_lora_b` beside the weight.

An einsum keeps the weight's axes: A has the axes shared with the input, B the rest. A dot_general flattens the
inputs and the outputs, and its batch axes lead. A convolution's A keeps the window.
"""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "qwix",
    (
        Pair(
            "{leaf}_lora_a",
            "{leaf}_lora_b",
            "{leaf}",
            (
                ("in r", "r outs"),
                ("ins r", "r out"),
                ("batch (in) r", "batch r (out)"),
                ("(in) r", "r (outs)"),
            ),
        ),
    ),
    scale="the alpha of its LoraProvider",
    shares=True,
    trains=("tunix", "maxtext/flat"),
    moved=(("{leaf}.array.qvalue", "{leaf}"),),
)
