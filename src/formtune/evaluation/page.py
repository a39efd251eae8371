"""What the HTML pages share: the template settings, and one style."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(autoescape: bool = True) -> Environment:
    """Templates by their path in the package; each includes `page.css`, so that a page is one file."""
    loader = PackageLoader("formtune", ".")
    templates = Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["percent"] = lambda share: f"{share:.1%}"
    templates.filters["thousands"] = lambda number: f"{number:,}"
    return templates
