"""What every test shares: fixed seeds, one thread and a quiet hypothesis."""

import logging
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "gcsr",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("gcsr")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Make every test start from the same random state, on one thread, whatever the one before asked of torch."""
    torch.use_deterministic_algorithms(False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def levels_of_loggers() -> Iterator[None]:
    """Put the levels of Lightning's loggers back, which a test may have raised to be quiet."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "pytorch_lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
