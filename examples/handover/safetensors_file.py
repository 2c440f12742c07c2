"""A shrunk network in a safetensors file, under the names that its parameters have always had."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shrunk import NETWORKS, compare, make_pair

torch.set_num_threads(1)
for name in NETWORKS:
    pair = make_pair(name)
    assert set(pair.dense.state_dict()) <= set(pair.smaller.state_dict())  # a folded constant may add a bias
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_file(pair.smaller.state_dict(), path)
        print(f"{name}: {path.stat().st_size:,} bytes")
        # The file has the weights only: the sizes of the layers are those of a network that was built or copied.
        network = copy.deepcopy(pair.smaller)
        torch.nn.init.zeros_(next(network.parameters()))
        network.load_state_dict(load_file(path))
    compare("safetensors", pair, network, closeness=0)
