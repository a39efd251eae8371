"""What the pages of this project share: one style, and plots as SVG."""

from __future__ import annotations

import io

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#2a6fbb", "#d9822b", "#8a94a0", "#c0392b"

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, selectable, read aloud
        "svg.hashsalt": "formtune",  # the same findings give the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
    }
)


def environment(autoescape: bool = True) -> Environment:
    """Templates by their path in the package; each includes `page.css`, so that a page is one file."""
    found = Environment(
        loader=PackageLoader("formtune", "."), autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters["percent"] = lambda share: f"{share:.1%}"
    found.filters["thousands"] = lambda number: f"{number:,}"
    return found


def svg(figure: Figure) -> str:
    """The figure as an SVG element without the XML header."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
