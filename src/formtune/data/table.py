"""The data table in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from formtune.base.row import quantile
from formtune.configuration.terminal import echo
from formtune.data.encoded import Splits
from formtune.data.settings import DataSettings
from formtune.files import optional

MAX_COLUMNS = 20  # ignored columns listed in the terminal


def print_data(settings: DataSettings, splits: Splits | None, folder: Path | None) -> None:
    """Print rows per split with their lengths in tokens, and what was ignored, repaired and quarantined."""
    ignored = settings.ignored
    lines = [*settings.format.notes]
    if splits is not None:
        table = Table("split", "rows", title="Data", title_justify="left")
        for column in ("prompt P50", "P95", "max", "answer P50", "P95", "max"):
            table.add_column(column, justify="right")
        for name, rows in splits.rows.items():
            sides = [len(row.prompt_ids) for row in rows], [len(row.target_ids) for row in rows]
            lengths = [quantile(sizes, percent) for sizes in sides for percent in (50, 95, 100)]
            table.add_row(name, f"{len(rows):,}", *(f"{length:,}" for length in lengths))
        Console().print(table)
        ignored = {"": splits.ignored} | ignored
        renderer, note = settings.renderer, settings.renderer.note
        differs = settings.system or splits.own_system or renderer.replaced or not renderer.templated
        shared = f"{splits.shared:.0%} of the input text is the same in many rows"
        listed = f" (each with its reason in {folder / 'quarantine.jsonl'})" if folder else ""
        repairs = ", ".join(f"{count:,} {step}" for step, count in splits.repairs.most_common())
        facts = {
            f"rows with their own system prompt: {splits.own_system:,}": splits.own_system,
            note: note and differs,
            f"encoded rows read from {splits.cached}": splits.cached,
            f"quarantined: {splits.quarantined}{listed}": splits.quarantined,
            "near-duplicates are not compared: the optional folder `quality` was deleted": not (
                settings.near_duplicates == 1 or optional("quality.duplicates", "near_duplicates")
            ),
            f"shared text: {shared}; the near-duplicate comparison ignores it": splits.shared,
            f"inputs repaired: {repairs}": repairs,
        }
        lines += [line for line, applies in facts.items() if applies]
        for name, n in splits.weights.items():
            lines.append(f"{name}: {n['rows']:,} training rows, weight {n['weight']:g}: {n['used']:,} in an epoch")
    for key, counts in ignored.items():
        columns = ", ".join(f"{name} ({count:,} rows)" for name, count in counts.most_common(MAX_COLUMNS))
        lines += [f"{f'data.{key}: ' if key else ''}ignored columns: {columns}"] if columns else []
    for line in lines:
        echo(line)
