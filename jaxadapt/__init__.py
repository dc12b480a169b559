"""Parameter-efficient fine-tuning for Flax whose adapters are PEFT's own files.

The names below load on first use (PEP 562), so `import jaxadapt` and `jaxadapt inspect FILE` import neither jax nor
numpy. The packages listed first hold the further public names.

>>> import jaxadapt
>>> config = jaxadapt.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
>>> config.r
16
"""

from jaxadapt.configs.table import config_places
from jaxadapt.core.lazy import lazy_names

__version__ = "0.1.0"

_NAMES = {
    "adapters.adapter": "Adapter",
    "adapters.peft_tensors": "PeftTensors",
    "configs.base": "Config GenericConfig",
    "core.errors": "AdapterError AttachError ConfigError FileError FormatError KeyMapError MismatchError TargetError",
    "keymaps.keymap": "KeyMap",
    "keymaps.weight": "Weight",
    "merging.base_merge": "merge unmerge",
    "merging.combination": "combine",
    "models.attachment": "activate adapt delete detach disable extract init inject",
    "models.graph": "AdapterParam",
    "models.summary_table": "select summary",
    "persistence.consumers": "Card",
    "persistence.folder": "inspect push read read_config write",
    "persistence.load_adapter": "from_peft load",
    "persistence.save_adapter": "MultihostFolder save to_peft",
    "persistence.verify_folder": "repair verify",
    "storage.hub": "pull",
    "training": "optim",
    "training.checkpoint": "CheckpointManager",
}
_PACKAGES = "analysis export initializers merging methods models serving"
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _PACKAGES, config_places())
