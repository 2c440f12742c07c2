"""Gradient-coherent strong regularization for PyTorch Lightning."""

import lazy_loader

__version__ = "0.1.0"

# The public names are listed in `__init__.pyi`. A name is imported at its first use, so that the command starts without
# Lightning and `import lightning_gcsr` costs next to nothing.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
