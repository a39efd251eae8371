"""The audit's files, its HTML page, and its lines in the terminal."""

from pathlib import Path
from typing import Any

from formtune.configuration.terminal import say
from formtune.data.encoded import Splits
from formtune.data.settings import DataSettings
from formtune.data.table import print_data
from formtune.evaluation.page import render
from formtune.files import write_json, write_lines, write_whole

MAX_PRINTED = 10  # warnings; the page has all of them
MAX_ROWS = 200  # of a reason on the page; quarantine.jsonl has all of them


def write_report(findings: dict[str, Any], folder: Path) -> None:
    """Write `audit.json`, `quarantine.jsonl` and `report.html` into the folder, each atomically."""
    write_lines(folder / "quarantine.jsonl", findings["quarantine"])
    write_json(folder / "audit.json", {name: value for name, value in findings.items() if name != "quarantine"})
    write_whole(folder / "report.html", page(findings))


def page(findings: dict[str, Any]) -> str:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(findings["quarantine"], key=lambda row: -findings["quarantined"][row["reason"]]):
        reasons.setdefault(row["reason"], []).append(row)
    return render("audit/report.html.jinja", audit=findings, reasons=reasons, shown=MAX_ROWS)


def print_audit(findings: dict[str, Any], settings: DataSettings, splits: Splits, folder: Path) -> None:
    """Print the data table, the blockers and warnings, and the verdict."""
    print_data(settings, splits, folder)
    print_problems(findings)
    print(f"report: {folder / 'report.html'}")
    counts = [(findings["blockers"], "to fix first"), (findings["warnings"], "to look at")]
    parts = [f", {len(lines)} {what}" for lines, what in counts if lines]
    say(f"verdict: {findings['verdict']}{''.join(parts)}", "bold")


def print_problems(findings: dict[str, Any]) -> None:
    """Print the blockers and the first warnings, one per line."""
    for line in findings["blockers"]:
        say(f"blocker: {line}", "red")
    for line in findings["warnings"][:MAX_PRINTED]:
        say(f"warning: {line}", "yellow")
    if more := findings["warnings"][MAX_PRINTED:]:
        say(f"warning: {len(more):,} more: formtune audit lists all", "yellow")
