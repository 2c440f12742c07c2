"""Configuration of the documentation."""

import sys
from pathlib import Path

from lightning_gcsr import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lightning-gcsr"
copyright = "the lightning-gcsr developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "support_tests",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]  # $...$ is set by MathJax
myst_heading_anchors = 3
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"lightning-gcsr {version}"
html_logo = "_static/logo.svg"  # drawn by logo.py
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Options of the pages of single objects, for which members are shown unless something else is said here.
_NO_MEMBERS = [":no-members:"]
_NO_INIT = [":exclude-members: __init__, __new__"]
autosummary_context = {
    "options": {
        **dict.fromkeys(("CompressedCheckpoint", "CompressionMonitor", "KeepZeros"), _NO_MEMBERS),
        **dict.fromkeys(("GradientCoherentRegularization", "L1", "L2", "ElasticNet", "GroupLasso"), _NO_MEMBERS),
        **dict.fromkeys(("Clock", "CoupledGroup", "GroupSlice", "ShrinkReport", "UnitCount"), _NO_INIT),
        **dict.fromkeys(("StrengthFinderResult", "Suggestion", "ToleranceLevel", "Trial", "SpeedReport"), _NO_INIT),
        **dict.fromkeys(("ThresholdCurve", "ThresholdPoint"), _NO_INIT),
        **{name: [":members: update"] for name in ("Sparsity", "CompressionRatio")},
        "Gate": [
            ":members: uses_previous_gradient, by_element, decide",
            ":exclude-members: __init__, coherence, scope, threshold, tolerance, averaging",
        ],
        "GateReport": [":no-show-inheritance:", ":exclude-members: __init__"],
        "Schedule": [
            ":members: acts, factor, phase, fractions",
            ":exclude-members: __init__, delay, warmup, stop",
        ],
    }
}

# Every script there is run in each fresh build; what it needs beyond this package is in the extra `examples`.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "first_notebook_cell": "# On Colab.\n%pip install --quiet lightning-gcsr scikit-learn matplotlib",
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e6,  # how long it took here is nobody's concern
    "write_computation_times": False,
    "nested_sections": False,
}
