"""How Sphinx builds the documentation: `python -m sphinx -W -b html docs docs/_build`, without network."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "taskgpt"
release = version = version("taskgpt")
project_copyright = "taskgpt contributors, MIT"

extensions = ["myst_parser", "sphinx.ext.autodoc", "plain_docstrings", "gpt2_tables"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3  # [a link](page.md#heading)

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings say what matters of a type; signatures stay short enough to read
autodoc_preserve_defaults = True

html_theme = "pydata_sphinx_theme"
html_title = f"taskgpt {release}"
html_context = {"default_mode": "auto"}  # light or dark as the system
html_show_sourcelink = False
html_sidebars = {"measurements": []}  # has no pages below it
html_static_path = ["static"]
html_css_files = ["taskgpt.css"]
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
