"""Configuration of the documentation."""

from lightning_gcsr import __version__

project = "lightning-gcsr"
copyright = "the lightning-gcsr developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["deflist", "dollarmath"]  # $...$ is set by MathJax
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "lightning-gcsr"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Every script there is run in each fresh build; what it needs beyond this package is in the extra `examples`.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e6,  # how long it took here is nobody's concern
    "write_computation_times": False,
    "nested_sections": False,
}
