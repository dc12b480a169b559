"""Codecs: how named tensors become bytes, and bytes named tensors.

- `safetensors`: header, reading (whole, lazily, by slices), durable and atomic writing
- `torch_bin`: PyTorch `.bin`/`.pt` state dicts, read-only, nothing in them is executed
- `atomic`: replacing a file so that a reader, or a crash, sees the old bytes or the new ones

Importing any of them, and reading a header, loads neither numpy nor jax.
"""
