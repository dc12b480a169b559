"""PEFT's adapter folder: save, load, read, write, inspect, verify, repair and push."""

from jaxadapt.core.lazy import lazy_names

_NAMES = {
    "persistence.folder": "inspect read read_config write",
    "persistence.load_adapter": "load",
    "persistence.peft": "from_peft to_peft",
    "persistence.save_adapter": "save",
    "persistence.upload": "push",
    "persistence.verify_folder": "repair verify",
    "storage.hub": "pull",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
