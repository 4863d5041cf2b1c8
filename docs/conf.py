"""How Sphinx builds these pages: `make docs`.

Sphinx and MyST, because both are kept by several people, are older than this project, and read plain Markdown, so that
the pages can be read where they lie. (MkDocs 1 has had no release since August 2024, version 2 drops its plug-ins, and
Material for MkDocs has only had fixes since November 2025.) The theme is one line.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Prunella"
copyright = "the Prunella authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "mathml", "methods"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Docstrings (reference.md): `name` in them is code, and a signature shows the names that its source does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Track", "OnStep")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "Prunella"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
