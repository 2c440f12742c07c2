"""The metrics count the tensors of all processes together."""

import pytest

from lightning_gcsr import CompressionRatio, Sparsity

from .workers import TENSORS

pytestmark = pytest.mark.distributed


@pytest.fixture
def found(processes):
    """What each of two processes computed."""
    return [process["metrics"] for process in processes]


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("name", TENSORS)
def test_each_process_gets_the_pooled_value(found, name, threshold):
    tensors = [tensor for process in TENSORS[name] for tensor in process]
    zeros = sum(int((tensor.abs() <= threshold).sum()) for tensor in tensors)
    total = sum(tensor.numel() for tensor in tensors)
    sparsity = zeros / max(1, total)
    ratio = 1.0 if total == 0 else float("inf") if zeros == total else total / (total - zeros)
    for process in found:
        assert process[name, threshold, "Sparsity"] == pytest.approx(sparsity)
        assert process[name, threshold, "CompressionRatio"] == pytest.approx(ratio)


def test_pooled_value_is_neither_a_local_one_nor_their_mean(found):
    locals_ = []
    for tensors in TENSORS["unequal counts"]:
        for metric in (Sparsity(), CompressionRatio()):
            locals_.append(float(metric(tensors)))
    sparsities, ratios = locals_[0::2], locals_[1::2]
    for process in found:
        pooled = process["unequal counts", 0.0, "Sparsity"], process["unequal counts", 0.0, "CompressionRatio"]
        assert pooled[0] not in {*sparsities, sum(sparsities) / 2}
        assert pooled[1] not in {*ratios, sum(ratios) / 2}
