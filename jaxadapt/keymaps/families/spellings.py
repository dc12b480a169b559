"""What one architecture is called in PyTorch besides its own name: beginnings of keys, for `KeyMap.spellings`."""

VISION_LANGUAGE = (
    ("vl", (("model.", "model.language_model."),)),  # since transformers 4.52, Gemma3ForConditionalGeneration and kin
    ("vl4", (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))),  # before
)
"""The language model inside a vision-language one."""


def bare(prefix: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """The model without its head, saved by itself: transformers then leaves the prefix out."""
    return (("bare", ((prefix, ""),)),)
