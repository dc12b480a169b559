"""A small server with OpenAI's HTTP interface: one base, many adapters, requests in one running batch.

It is there to read, and to try adapters. `jaxadapt serve` runs it; the library does not use it.
"""
