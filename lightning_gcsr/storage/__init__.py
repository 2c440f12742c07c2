"""Bytes and files: encodings of one tensor, and the compressed file."""
