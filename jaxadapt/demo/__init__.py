"""The demo: a small Llama in NNX and in Linen, SmolLM2's weights, and a fine-tuning run.

It is used by ``jaxadapt demo`` and the tests, not by the library.
"""
