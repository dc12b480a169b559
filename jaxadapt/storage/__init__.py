"""Named tensors as bytes, written durably: safetensors, PyTorch files, Orbax, object stores, the Hugging Face Hub."""
