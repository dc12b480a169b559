"""LoRA and its variants."""
