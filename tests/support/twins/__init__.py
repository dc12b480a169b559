"""Flax twins of PyTorch models, and small modules to attach adapters to.

    trees.py    flat leaves <-> Linen parameters and NNX models
    gpt2.py     GPT-2 with Flax' own naming (FlaxConv1D's (out, in) kernels), Linen and NNX
    llama.py    the demo's Llama, filled from a tiny transformers Llama
    layers.py   a registry of small modules: every way a weight can be used that attaching has to know

Nothing here imports torch until a function that needs it is called.
"""
