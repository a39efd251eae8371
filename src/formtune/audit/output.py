"""The audit's files, its HTML page, and its lines in the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from formtune.audit.pictures import pictures
from formtune.data.encoded import Splits
from formtune.data.table import print_data, print_ignored
from formtune.evaluation.page import environment, svg
from formtune.files import write_json, write_lines, write_whole

SHOWN = 200  # rows of a reason on the page; quarantine.jsonl has all of them
ABOUT = {
    "empty": "The input or the answer is empty.",
    "format": "The answer breaks the format.",
    "conflict": "The same or nearly the same input with another answer: none of them can be trusted.",
    "leak": "The input belongs to a cluster of the validation or test rows.",
    "duplicate": "The same input and answer once more; the first is used.",
    "near_duplicate": "Nearly the same input and the same answer; the first is used.",
    "style": "The answer writes something in another way than most do.",
    "unfit": "The tokenizer or its template cannot carry the row unchanged.",
    "too_long": "More tokens than the limit; nothing is ever cut.",
}


def write_report(findings: dict[str, Any], folder: Path) -> None:
    """Write `audit.json`, `quarantine.jsonl` and `report.html` into the folder, each atomically."""
    write_lines(folder / "quarantine.jsonl", findings["quarantine"])
    write_json(folder / "audit.json", {name: value for name, value in findings.items() if name != "quarantine"})
    write_whole(folder / "report.html", page(findings))


def page(findings: dict[str, Any]) -> str:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in findings["quarantine"]:
        reasons.setdefault(row["reason"], []).append(row)
    plots = {name: (caption, svg(figure)) for name, caption, figure in pictures(findings)}
    template = environment().get_template("audit/report.html.jinja")
    return template.render(found=findings, reasons=reasons, plots=plots, about=ABOUT, shown=SHOWN)


def print_audit(findings: dict[str, Any], splits: Splits, folder: Path) -> None:
    """Print the data table, the blockers and warnings, and one line with the verdict."""
    print_data(splits, folder)
    if findings["production"]:
        print_ignored(Counter(findings["production"]["ignored"]), "production")
    console = Console(highlight=False, soft_wrap=True)
    for kind, color in (("blockers", "red"), ("warnings", "yellow")):
        for line in findings[kind]:
            console.print(f"[{color}]{kind[:-1]}:[/] {escape(line)}")
    console.print(f"report: {folder / 'report.html'}")
    counts = [(findings["blockers"], "to fix first"), (findings["warnings"], "to look at")]
    parts = [f", {len(lines)} {what}" for lines, what in counts if lines]
    console.print(f"[bold]verdict: {findings['verdict']}[/]{''.join(parts)}")
