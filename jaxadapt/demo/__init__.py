"""The demo: a small Llama in NNX and in Linen, SmolLM2's weights, and a fine-tuning run.

What is here serves ``jaxadapt demo`` and the tests; the library itself needs none of it.
"""
