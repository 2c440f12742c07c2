"""Runs every Python code block of the README and the documentation."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.sybil import SybilCollection
from torch.utils.data import DataLoader


@pytest.fixture(scope="session", autouse=True)
def _quiet_folder(tmp_path_factory: pytest.TempPathFactory):
    """Code blocks and doctests may write logs; they must not land in the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("run"))
    yield
    os.chdir(before)


collect_ignore = ["docs/_build", "docs/api", "docs/tutorials"]  # made by the build of the documentation


class _Model(LightningModule):
    """The reader's own module, of which the README speaks."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 32)

    def training_step(self, batch):
        return (self.layer(batch) - batch).square().sum(dim=1).mean()

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _give_a_model(names):
    torch.manual_seed(0)
    loader = DataLoader(torch.randn(128, 32), batch_size=16)
    names.update(model=_Model(), train_dataloader=loader, val_dataloader=loader)


_COMMON = {
    "parsers": [PythonCodeBlockParser(), SkipParser()],
    "fixtures": ["_quiet_folder"],  # autouse does not reach code blocks
}
pytest_collect_file = SybilCollection(
    [
        Sybil(patterns=["docs/*.md", "docs/*/*.md"], **_COMMON),
        Sybil(patterns=["README.md"], setup=_give_a_model, **_COMMON),
    ]
).pytest()
