"""A search in two processes gives each the same result."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from .finder_workers import WORLD, searches
from .workers import in_processes

pytestmark = pytest.mark.distributed

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    return [process["searches"] for process in in_processes(tmp_path_factory.mktemp("finder"), WORLD, (searches,))]


def test_each_process_gets_the_same_result(found):
    first, second = found
    assert first["own"] != second["own"]  # what they see is not the same
    assert first["results"] == second["results"]
    assert first["suggestion"] == second["suggestion"]


def test_result_is_equal_to_itself(found):
    for process in found:
        once, again = process["results"]
        assert once == again
        assert once["trials"][1]["learned"]
        assert not all(trial["learned"] for trial in once["trials"])


def test_processes_are_as_before(found):
    for process in found:
        assert process["same weights"]
        assert process["same random state"]


def test_script_that_lightning_starts_anew_for_each_process(tmp_path):
    """As users run it: the search starts the processes, and the training that follows goes on in them."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys, warnings
            from pathlib import Path

            warnings.filterwarnings("ignore")
            sys.path.insert(0, sys.argv[1])
            from integration.models import loader, make_trainer, weights_of
            from integration.searching import learner, search

            folder = Path(sys.argv[2])
            trainer = make_trainer(folder, strategy="ddp", devices=2, max_epochs=5)
            model = learner()
            result = search(trainer, model, loader(32), loader(32), progress=True)
            trainer.fit(model, loader(32), loader(32))
            rank = trainer.global_rank
            numbers = {"rows": result.table, "norm": float(model.net[0].weight.norm()), "steps": trainer.global_step}
            (folder / f"{rank}.json").write_text(json.dumps(numbers))
            """
        )
    )
    command = [sys.executable, str(script), str(TESTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["steps"] == 20
    assert [row["learned"] for row in first["rows"]] == [True, True, False]
    verdicts = [line for line in done.stdout.splitlines() if " learned " in line or " failed " in line]
    assert len(verdicts) == 3  # of the first process alone
