"""Counting zeros and bytes."""
