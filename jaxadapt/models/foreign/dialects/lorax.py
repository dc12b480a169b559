"""lorax 0.3.1: a weight becomes a `LoraWeight(w, a, b, alpha)` with W + alpha/r · b @ a, whatever W's axes mean.

Of a Flax kernel (in, out) b is the input's side; of a weight (out, in) a is.
"""

from jaxadapt.models.foreign.dialect import Dialect, Pair

LORAX = Dialect(
    "lorax",
    (
        Pair("{leaf}.LoraWeight.b", "{leaf}.LoraWeight.a", "{leaf}", (("first r", "r last"),)),
        Pair("{leaf}.LoraWeight.a", "{leaf}.LoraWeight.b", "{leaf}", (("r last", "first r"),)),
    ),
    scale="the alpha of its LoraWeights",
    moved=(("{leaf}.LoraWeight.w", "{leaf}"),),
)
