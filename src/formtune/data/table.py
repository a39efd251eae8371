"""The data table: rows per split, repairs, and quarantined rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.data.encoded import Splits

NAMED = 20  # ignored columns named in the terminal


def print_data(splits: Splits, folder: Path | None) -> None:
    """Print rows per split with their lengths in tokens, and what was ignored, repaired and quarantined."""
    table = Table("split", "rows", title="Data", title_justify="left")
    for column in ("prompt P50", "P95", "max", "answer P50", "P95", "max"):
        table.add_column(column, justify="right")
    for name, rows in splits.rows.items():
        table.add_row(name, f"{len(rows):,}", *(f"{n:,}" for n in splits.lengths(name)))
    console = Console()
    console.print(table)
    if splits.own_system:
        console.print(f"rows with their own system prompt: {splits.own_system:,}", highlight=False)
    print_ignored(splits.ignored)
    if splits.cached:
        console.print(f"encoded rows read from {splits.cached}", highlight=False, soft_wrap=True)
    listed = f" (each with its reason in {folder / 'quarantine.jsonl'})" if folder else ""
    if splits.quarantined:
        console.print(f"quarantined: {splits.quarantined}{listed}", highlight=False, soft_wrap=True)
    if splits.shared:
        console.print(
            f"shared text: {splits.shared:.0%} of the input text is the same in many rows, such as an instruction; "
            "it was left out of the near-duplicate comparison",
            highlight=False,
            soft_wrap=True,
        )
    if splits.repairs:
        repairs = ", ".join(f"{count:,} {step}" for step, count in splits.repairs.most_common())
        console.print(f"inputs repaired: {repairs}", highlight=False, soft_wrap=True)


def print_ignored(counts: Counter[str], key: str = "") -> None:
    """The columns that have values and are not read, in one line; `key` is the option that names the file."""
    if counts:
        columns = ", ".join(f"{name} ({count:,} rows)" for name, count in counts.most_common(NAMED))
        line = f"{f'data.{key}: ' if key else ''}ignored columns: {columns}"
        Console().print(escape(line), highlight=False, soft_wrap=True)
