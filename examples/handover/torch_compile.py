"""A shrunk network under torch.compile, which needs a C++ compiler on the CPU."""

from __future__ import annotations

import os
import shutil
import sys
import time

import torch
from shrunk import compare, make_pair

if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
    sys.exit("There is no C++ compiler. Install one, such as g++.")

torch.set_num_threads(1)
for name in sys.argv[1:] or ["ResNet-20"]:
    pair = make_pair(name)
    network = torch.compile(pair.smaller)
    start = time.perf_counter()
    with torch.no_grad():
        network(pair.images)
    print(f"{name}: {time.perf_counter() - start:.0f} s to compile")
    compare("torch.compile", pair, network)
