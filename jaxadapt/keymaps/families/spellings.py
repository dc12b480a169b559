"""Other prefixes of the same keys in PyTorch, for `KeyMap.spellings`."""

VISION_LANGUAGE = (
    ("vl", (("model.", "model.language_model."),)),  # since transformers 4.52, as in Gemma3ForConditionalGeneration
    ("vl4", (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))),  # before transformers 4.52
)
"""The spellings of the language model in a vision-language model."""


def bare(prefix: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return the spelling of a model without its head, for which transformers omits the prefix."""
    return (("bare", ((prefix, ""),)),)
