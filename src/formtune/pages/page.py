"""What the HTML pages share: the template settings, one style, one script, and a policy that allows nothing else."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup


def render(template: str, /, **values: Any) -> str:
    """The text of a template of the package; `*.html.jinja` escapes all values, and is one file that loads nothing."""
    templates = Environment(
        loader=PackageLoader("formtune", "."), autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["percent"] = lambda fraction: f"{fraction:.1%}"
    templates.filters["thousands"] = lambda number: f"{number:,}"
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # By hash: text of a row or a model that got around the escaping would still not run.
    sources = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    policy = Markup(f"{sources}; base-uri 'none'; form-action 'none'")
    return templates.get_template(template).render(values, style=Markup(style), script=Markup(script), policy=policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
