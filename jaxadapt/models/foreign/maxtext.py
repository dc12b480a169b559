"""MaxText 0.2.5's serving format (`load_adapter`): keys with dots, in a tree separate from the base.

(MaxText trains in Qwix' format.) Its layers are stacked on axis 1; its output for other stack axes is malformed.
"""

from jaxadapt.models.foreign import Dialect, Pair

DIALECT = Dialect(
    "maxtext",
    (Pair("{module}.lora_a.kernel", "{module}.lora_b.kernel", "{module}.kernel"),),
    scale="the lora_alpha of its adapter_config.json",
)
