"""Encodings of tensors, the compressed file, and reading files of weights."""
