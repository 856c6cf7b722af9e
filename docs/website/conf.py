"""The configuration of Sphinx; build.py calls it, and passes the folder of the assembled pages."""

from importlib.metadata import version as version_of

project = "mha-spec"
author = "the authors of mha-spec"
project_copyright = "the authors of mha-spec"
release = version = version_of("mha-spec")

extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = True
highlight_language = "none"

html_theme = "furo"
html_title = "mha-spec"
html_logo = "static/logo.svg"
html_favicon = "static/logo.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
