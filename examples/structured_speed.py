"""How fast a ResNet-20 with fewer hidden channels is on this machine, without training it.

Channels between the two convolutions of its blocks are set to zero and removed. Run it while nothing else runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torchvision.models.resnet import BasicBlock

from lightning_gcsr import shrink_units, speed_report

sys.path.append(str(Path(__file__).parent / "study"))  # whose network this is
from networks import make_network


def main(
    widths: tuple[PositiveInt, ...] = (8, 8, 8, 16, 16, 16, 32, 32, 24),
    batches: tuple[PositiveInt, ...] = (32, 128),
    repeats: PositiveInt = 60,
) -> None:
    """Print the milliseconds of the dense and the smaller network, with one thread.

    Args:
        widths: How many hidden channels are left in each of the nine blocks, of 16, 32 and 64 in three blocks each.
        batches: Numbers of images.
        repeats: How often each network is timed, in turn.
    """
    torch.set_num_threads(1)
    network = make_network("resnet_20", (3, 32, 32), 10).eval()
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    with torch.no_grad():
        for block, width in zip(blocks, widths, strict=True):
            for parameter in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
                parameter[width:] = 0.0
    smaller, report = shrink_units(network, torch.randn(2, 3, 32, 32))
    print(f"{1 - report.flops.after / report.flops.before:.0%} fewer operations")
    for images in batches:
        speed = speed_report(network, torch.randn(images, 3, 32, 32), smaller, repeats=repeats, runtimes=False)
        dense, less = speed.dense.milliseconds.median, speed.smaller.milliseconds.median
        print(f"{images} images: {dense:.1f} ms, now {less:.1f} ms: {dense / less:.2f} times as fast")


if __name__ == "__main__":
    auto_cli(main)
