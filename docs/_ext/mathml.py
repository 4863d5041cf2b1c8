"""Formulas as MathML, which browsers draw themselves: no script, no network, no LaTeX."""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _visit(self: Any, node: nodes.Element, block: bool) -> None:
    try:
        self.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logger.warning("formula cannot be read: %s", error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _visit(self, node, block=False), None),
        block_renderers=(lambda self, node: _visit(self, node, block=True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
