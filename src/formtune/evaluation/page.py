"""What the HTML pages share: one style, and plots as SVG."""

from __future__ import annotations

import io

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#8a94a0"

matplotlib.rcParams.update({
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "formtune",  # the same figures give the same file
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip


def environment(autoescape: bool = True) -> Environment:
    """Templates by their path in the package; each includes `page.css`, so that a page is one file."""
    loader = PackageLoader("formtune", ".")
    templates = Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["percent"] = lambda share: f"{share:.1%}"
    templates.filters["thousands"] = lambda number: f"{number:,}"
    return templates


def svg(figure: Figure) -> str:
    """The figure as an SVG element without the XML header."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
