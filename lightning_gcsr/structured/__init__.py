"""Removing whole units from a network."""
