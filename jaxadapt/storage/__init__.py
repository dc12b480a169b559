"""Read and durably write named tensors: safetensors, PyTorch files, Orbax, object stores and the Hugging Face Hub."""
