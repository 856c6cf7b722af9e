"""The documentation site: pages in Markdown, and what is generated from SPEC.md, the suite and the docstrings."""
