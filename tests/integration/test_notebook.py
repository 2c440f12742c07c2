"""A notebook shows results as tables and figures, and callbacks as what could be typed in."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

TESTS = Path(__file__).parents[1]
CELLS = [
    f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from integration.models import loader, make_trainer
from integration.searching import learner
from lightning_gcsr import CompressionMonitor, find_strength

result = find_strength(make_trainer(Path(), max_epochs=20), learner(), loader(), loader(), target_sparsities=[0.5])
monitor = CompressionMonitor(verbose=False)
make_trainer(Path(), [monitor], max_epochs=2).fit(learner(), loader(), loader())
""",
    "result",
    "print(result)",
    "result.plot()",
    "monitor.plot()",
    "monitor",
]


def test_notebook_shows_tables_figures_and_reprs(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [
        {
            kind: text
            for output in cell.outputs
            for kind, text in output.get("data", {"text": output.get("text")}).items()
        }
        for cell in notebook.cells
    ]
    _, table, printed, figure, curves, monitor = shown
    assert "<td>target_sparsity=0.5</td>" in table["text/html"]
    assert 'src="data:image/png;base64,' in table["text/html"]
    assert printed["text"].startswith("val_loss against ")
    assert "image/png" in figure
    assert "image/png" in curves
    assert monitor["text/plain"] == "CompressionMonitor(verbose=False)"
