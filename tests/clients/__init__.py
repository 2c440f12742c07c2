"""Real clients of the package."""
