"""Dynamic int8 quantization of the linear layers, after shrinking."""

from __future__ import annotations

import io
import warnings

import torch
from shrunk import compare, make_pair
from torch import nn


def file_bytes(network: nn.Module) -> int:
    """The bytes of the weights as torch saves them."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return len(buffer.getvalue())


torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="torch.ao|torch.quantization|torch._utils")
warnings.filterwarnings("ignore", ".*quantiz.*")
pair = make_pair("ViT")
# The names of the layers: the projection of an `nn.MultiheadAttention` that kept its heads must stay as it is.
layers = {name for name, layer in pair.smaller.named_modules() if type(layer) is nn.Linear}
quantized = torch.ao.quantization.quantize_dynamic(pair.smaller, layers, dtype=torch.qint8)
sizes = [file_bytes(network) for network in (pair.dense, pair.smaller, quantized)]
print("{}: {:,} bytes dense, {:,} shrunk, {:,} quantized".format(pair.name, *sizes))
compare("int8", pair, quantized, closeness=0.05)  # weights and inputs have 8 bits
