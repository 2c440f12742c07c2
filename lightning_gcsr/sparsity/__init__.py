"""Counting the zeros and the bytes of tensors: counts, metrics and tables."""
