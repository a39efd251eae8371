"""What the pages of this project share: one style, plots as SVG, and a file that is written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

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


def environment() -> Environment:
    """Templates by their path in the package; each includes `page.css`, so that a page is one file."""
    found = Environment(
        loader=PackageLoader("formtune", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
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


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
