"""What every test shares: fixed seeds, one thread and a quiet hypothesis."""

import logging
import random

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
def levels_of_loggers() -> None:
    """Set the levels of Lightning's loggers as its packages do; a test before may have raised them to be quiet."""
    for package in ("lightning.pytorch", "pytorch_lightning"):  # the one that was imported last says our lines
        logging.getLogger(package).setLevel(logging.INFO)
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.NOTSET)
