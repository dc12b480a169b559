"""The LoRA leaves of other libraries."""
