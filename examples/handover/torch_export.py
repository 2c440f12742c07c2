"""A shrunk network as a program of torch.export: saved, loaded without its class, and run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from shrunk import NETWORKS, compare, make_pair

torch.set_num_threads(1)
for name in NETWORKS:
    pair = make_pair(name)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(pair.smaller, (pair.images,), dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        torch.export.save(program, path)
        print(f"{name}: {path.stat().st_size:,} bytes")
        loaded = torch.export.load(path).module()
    loaded(pair.images[:3])  # another size of the batch
    compare("torch.export", pair, loaded)
