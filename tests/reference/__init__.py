"""Slow and obvious versions of what the package does, used as oracles; they share no code with it."""
