"""A shrunk network as an ONNX file, run by ONNX Runtime (pip install '.[onnx]')."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from shrunk import NETWORKS, compare, make_pair
from torch import Tensor

try:
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx.export needs it
except ImportError as error:
    sys.exit(f"{error}. In a checkout: pip install '.[onnx]'.")

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="onnxscript|torch.onnx|copyreg")
logging.getLogger("onnxscript").setLevel(logging.ERROR)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for name in NETWORKS:
    pair = make_pair(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        batch = torch.export.Dim("batch", min=2, max=1024)
        torch.onnx.export(
            pair.smaller,
            (pair.images,),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
        print(f"{name}: {path.stat().st_size:,} bytes")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name

    def network(
        images: Tensor, session: onnxruntime.InferenceSession = session, input_name: str = input_name
    ) -> Tensor:
        return torch.from_numpy(session.run(None, {input_name: images.numpy()})[0])

    network(pair.images[:3])  # another size of the batch
    compare("ONNX Runtime", pair, network)
