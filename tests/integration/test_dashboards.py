"""A real TensorBoard on the logs of a short demo, in a real browser: the dashboards show what is ours."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
screenshots = importlib.util.module_from_spec(specification)
specification.loader.exec_module(screenshots)

LAYERS = [f"net.{i}.weight" for i in range(0, 16, 2)]
RUNS = ["delayed", "gradient-coherent", "no-penalty", "plain"]
SHOWN = {
    "custom_scalars": [
        "Is the gate open?",
        "gcsr: share of weights that got the penalty",
        "gcsr/injected (gradient-coherent)",
        "gcsr: coherence over all weights, each of which has its own gate",
        "gcsr/coherence (gradient-coherent)",
        "Which layers collapse?",
        "sparsity, by layer",
        *[f"sparsity/parameter/{layer} (gradient-coherent)" for layer in LAYERS],
        "How sparse is the model, and how good?",
        "test_accuracy (gradient-coherent)",
        "sparsity/model (plain)",
        "compression/stored_ratio (plain)",
        "Should the strength be raised?",
        "gcsr/strength (plain)",
        "gcsr/grad_norm (plain)",
        "gcsr/penalty_grad_norm (plain)",
    ],
    "scalars": ["compression/ratio", "compression/stored_ratio", "gcsr", "sparsity", "test_accuracy"],
    "images": ["layers", "layers/sparsity", "layers/gcsr/injected", "layers/weights", *RUNS],
    "text": ["summary/text_summary", "weights are zero", "encoding", *LAYERS, "gcsr/strength: 0.03", *RUNS],
    "hparams": ["gcsr/strength", "gcsr/gate.coherence", "agreement", "sparsity/model", "test_accuracy", *RUNS],
}


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory):
    """A browser, and the address of a TensorBoard of the four runs."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    for program in (screenshots.CHROMIUM, screenshots.CHROMEDRIVER):
        if not program.exists():
            pytest.skip(f"there is no {program}; install Debian's chromium and chromium-driver")
    folder = tmp_path_factory.mktemp("dashboards")
    arguments = ["--epochs", "3", "--delay_epochs", "1", "--output", folder / "digits"]
    demo = [sys.executable, ROOT / "examples" / "digits.py", *arguments]
    run = subprocess.run(demo, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    logs = folder / "digits" / "version_0"
    with screenshots.tensorboard(logs) as address, screenshots.browser(folder / "profile") as driver:
        yield driver, address


@pytest.mark.browser
@pytest.mark.parametrize("name", SHOWN)
def test_dashboard_shows_what_is_ours(dashboards, name):
    driver, address = dashboards
    # Heat maps of sparsity and histograms of four runs, and of the injected share of three.
    screenshots.open_dashboard(driver, address, name, SHOWN[name], images=11 if name == "images" else 0)


@pytest.mark.browser
def test_a_page_without_the_words_is_not_taken_for_the_dashboard(dashboards):
    driver, address = dashboards
    with pytest.raises(TimeoutError, match="text does not show \\['no such word'\\]"):
        screenshots.open_dashboard(driver, address, "text", ["no such word"], wait=5)
