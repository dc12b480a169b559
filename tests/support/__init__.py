"""Helpers of the tests: small models, twins of PyTorch models, reference libraries, programs that are killed."""
