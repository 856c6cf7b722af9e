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
COLOURS = {
    "color-brand-primary": ("#0b6a63", "#63d2c6"),
    "color-brand-content": ("#0b6a63", "#63d2c6"),
    "color-brand-visited": ("#5b4a8a", "#c0b0ee"),
    "color-background-primary": ("#fdfcfa", "#14171b"),
    "color-background-secondary": ("#f5f3ee", "#1a1e23"),
    "color-code-background": ("#f5f3ee", "#1c2127"),
    "color-inline-code-background": ("#f1eee7", "#22282f"),
    "color-foreground-muted": ("#565c66", "#a2aab6"),
    "color-toc-title-text": ("#4a505a", "#b2bac6"),
    "color-toc-item-text": ("#4a505a", "#b2bac6"),
    "color-sidebar-caption-text": ("#0b6a63", "#63d2c6"),
    "color-sidebar-item-expander-background--hover": ("#e6e1d6", "#2a3138"),
    "color-api-name": ("#0b6a63", "#63d2c6"),
    "color-api-pre-name": ("#4a505a", "#b2bac6"),
    "color-api-keyword": ("#4a505a", "#b2bac6"),
    "mask-seen": ("#0f857b", "#45b8ac"),
    "mask-line": ("#a9adb5", "#59626e"),
    "group-1": ("#a35d0c", "#e0a050"),
}
"""The variables of the style sheets, light and dark."""
html_theme_options = {
    "light_css_variables": {name: light for name, (light, _) in COLOURS.items()},
    "dark_css_variables": {name: dark for name, (_, dark) in COLOURS.items()},
}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
