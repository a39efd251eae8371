"""The data table: rows per split, repairs, and quarantined rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.data.encoded import Splits
from formtune.formats import Format

NAMED = 20  # ignored columns named in the terminal


def print_data(splits: Splits, folder: Path | None) -> None:
    """Print rows per split with their lengths in tokens, and what was ignored, repaired and quarantined."""
    table = Table("split", "rows", title="Data", title_justify="left")
    for column in ("prompt P50", "P95", "max", "answer P50", "P95", "max"):
        table.add_column(column, justify="right")
    for name, rows in splits.rows.items():
        table.add_row(name, f"{len(rows):,}", *(f"{n:,}" for n in splits.lengths(name)))
    Console().print(table)
    print_shapes(splits.notes)
    if splits.own_system:
        _print(f"rows with their own system prompt: {splits.own_system:,}")
    if splits.note:
        _print(splits.note)
    print_ignored(splits.ignored)
    if splits.cached:
        _print(f"encoded rows read from {splits.cached}")
    if splits.quarantined:
        listed = f" (each with its reason in {folder / 'quarantine.jsonl'})" if folder else ""
        _print(f"quarantined: {splits.quarantined}{listed}")
    if splits.shared:
        share = f"{splits.shared:.0%} of the input text is the same in many rows"
        _print(f"shared text: {share}; it was left out of the near-duplicate comparison")
    if splits.repairs:
        _print("inputs repaired: " + ", ".join(f"{count:,} {step}" for step, count in splits.repairs.most_common()))


def print_notes(format: Format) -> None:
    """Print how the format was read, such as what it leaves unchecked."""
    for note in format.notes:
        _print(note)


def print_shapes(notes: dict[str, str]) -> None:
    """Print which rows of other tools were recognized, each with the first file."""
    for text, where in notes.items():
        _print(f"{where.rpartition(':')[0]}: {text}")


def print_ignored(counts: Counter[str], key: str = "") -> None:
    """Print the columns that have values and are not read; `key` is the option that names the file."""
    if counts:
        columns = ", ".join(f"{name} ({count:,} rows)" for name, count in counts.most_common(NAMED))
        _print(f"{f'data.{key}: ' if key else ''}ignored columns: {columns}")


def _print(line: str) -> None:
    Console().print(escape(line), highlight=False, soft_wrap=True)
