"""Sphinx's settings for ``make docs``. The pages are Markdown files of the repository, where they are."""

from dense_ext.version import __version__

project = "dense_ext"
author = "The dense_ext developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "[a-z]*/README.md", "tests/emulator/README.md"]
exclude_patterns = ["README.md", ".venv", "build", "runs"]  # docs/index.md stands for the README

myst_heading_anchors = 3

# A reference to a name that is not documented fails the build, but for those of other projects.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections|typing)\..*|Tensor|.*Model|optional")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring, napoleon_numpy_docstring = True, False

html_theme = "furo"
html_title = f"dense_ext {version}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_additional_pages = {"index": "home.html"}
templates_path = ["templates"]
html_copy_source = False
