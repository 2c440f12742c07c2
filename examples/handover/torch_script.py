"""A shrunk network as TorchScript: saved, loaded without its class, also from C++, and run."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from shrunk import NETWORKS, compare, make_pair

torch.set_num_threads(1)
warnings.filterwarnings("ignore", ".*torch.jit.* is (deprecated|not supported)")  # new work goes into torch.export
warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")  # in checks of torchvision's code
for name in NETWORKS:
    pair = make_pair(name)
    with torch.no_grad():
        script = torch.jit.trace(pair.smaller, pair.images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.ts"
        script.save(path)
        print(f"{name}: {path.stat().st_size:,} bytes")
        loaded = torch.jit.load(path)
    loaded(pair.images[:3])  # another size of the batch
    compare("TorchScript", pair, loaded)
