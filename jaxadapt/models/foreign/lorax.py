"""lorax 0.3.1: a weight becomes a `LoraWeight(w, a, b, alpha)` with W + alpha/r · b @ a, regardless of W's axis roles.

For a Flax kernel (in, out) the input side is b; for a weight (out, in) it is a.
"""

from jaxadapt.models.foreign import Dialect, Pair

_ALPHA = "{leaf}.LoraWeight.alpha"

DIALECT = Dialect(
    "lorax",
    (
        Pair("{leaf}.LoraWeight.b", "{leaf}.LoraWeight.a", "{leaf}", (("first r", "r last"),), alpha_leaf=_ALPHA),
        Pair("{leaf}.LoraWeight.a", "{leaf}.LoraWeight.b", "{leaf}", (("r last", "first r"),), alpha_leaf=_ALPHA),
    ),
    like=r"\.LoraWeight\.[ab]$",
    scale="the alpha of its LoraWeights",
    moved=(("{leaf}.LoraWeight.w", "{leaf}"),),
)
