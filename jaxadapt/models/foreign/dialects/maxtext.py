"""MaxText 0.2.5's serving format (`load_adapter`): keys with a dot in them, a tree apart from the base's.

(What MaxText trains is Qwix' form.) Its layers are stacked on axis 1; what it makes of another axis is malformed.
"""

from jaxadapt.models.foreign.dialect import Dialect, Pair

MAXTEXT = Dialect(
    "maxtext",
    (Pair("{module}.lora_a.kernel", "{module}.lora_b.kernel", "{module}.kernel"),),
    scale="the lora_alpha of its adapter_config.json",
)
