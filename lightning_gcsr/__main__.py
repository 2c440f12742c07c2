"""``python -m lightning_gcsr`` is the command ``lightning-gcsr``."""

import sys

from lightning_gcsr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
