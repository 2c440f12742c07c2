"""The package with real models, optimizers and libraries of others, used with its defaults."""
