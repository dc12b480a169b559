"""PEFT-compatible configuration classes, read from and written to `adapter_config.json`. Imports no JAX."""

from jaxadapt.configs.table import config_places
from jaxadapt.core.lazy import lazy_names

_NAMES = {
    "configs.base": "PEFT_VERSION Config GenericConfig dumps from_dict loads",
    "configs.frozen": "FrozenDict freeze thaw",
    "configs.validation": "TASK_TYPES",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, "", config_places())
