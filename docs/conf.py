"""Sphinx: the pages of this folder as a site that opens from disk and asks no network for anything."""

from docutils import nodes
from latex2mathml.converter import convert

project = "m3i_large"
copyright = "the m3i_large authors"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "none"
html_theme = "furo"
html_title = "m3i_large"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
exclude_patterns = ["deepspeed_defects"]


def _math(display):
    def visit(translator, node):
        translator.body.append(convert(node.astext(), display="block" if display else "inline"))
        raise nodes.SkipNode

    return visit


def setup(app):
    """Equations become MathML, which browsers show by themselves; other renderers fetch a script."""
    app.add_html_math_renderer("mathml", (_math(False), None), (_math(True), None))
