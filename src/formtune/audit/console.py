"""The audit in the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from formtune.data.encoded import Splits
from formtune.data.table import print_data, print_ignored


def print_audit(found: dict[str, Any], splits: Splits, folder: Path) -> None:
    """The data table, what was found, and one line with the verdict."""
    print_data(splits, folder)
    if found["production"]:
        print_ignored(Counter(found["production"]["ignored"]), "production")
    console = Console()
    for what, color in (("blockers", "red"), ("warnings", "yellow")):
        for line in found[what]:
            console.print(f"[{color}]{what[:-1]}:[/] {escape(line)}", highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    looked = f", {len(found['warnings'])} to look at" if found["warnings"] else ""
    stops = f", {len(found['blockers'])} to mend first" if found["blockers"] else ""
    console.print(f"[bold]verdict: {found['verdict']}[/]{stops}{looked}", highlight=False, soft_wrap=True)
