"""What a person reads in the terminal: the data before training, the result after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from formtune.data.encoded import Splits
from formtune.data.module import FEW_ROWS

HEADLINES = (
    "format/exact",
    "format/loose",
    "joint/exact",
    "content/exact_match",
    "content/field_f1",
    "val/tf_exact",
    "val/loss",
)


class DataTable(Callback):
    """Prints the data as soon as it is prepared, before anything slow begins."""

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        splits = getattr(trainer.datamodule, "splits", None)
        if splits is not None and trainer.is_global_zero and not self._done:
            print_data(splits, Path(trainer.default_root_dir) if trainer.loggers else None)
            self._done = True


def print_data(splits: Splits, folder: Path | None) -> None:
    """Rows per split with their lengths in tokens, what was repaired and what was set aside."""
    table = Table("split", "rows", title="Data", title_justify="left")
    for column in ("prompt P50", "P95", "max", "answer P50", "P95", "max"):
        table.add_column(column, justify="right")
    for name, rows in splits.rows.items():
        table.add_row(name, f"{len(rows):,}", *(f"{n:,}" for n in splits.lengths(name).values()))
    console = Console()
    console.print(table)
    if splits.cached:
        console.print(f"encoded rows read from {splits.cached}", highlight=False, soft_wrap=True)
    listed = f" (each with its reason in {folder / 'quarantine.jsonl'})" if folder else ""
    if splits.set_aside:
        console.print(f"set aside: {splits.set_aside}{listed}", highlight=False, soft_wrap=True)
    if splits.repairs:
        repairs = ", ".join(f"{count:,} {step}" for step, count in splits.repairs.most_common())
        console.print(f"inputs repaired: {repairs}", highlight=False, soft_wrap=True)
    if (count := len(splits.rows["train"])) < FEW_ROWS:
        console.print(
            f"[yellow]warning: {count} training rows; below about {FEW_ROWS} a model learns the examples more than the "
            "task, and 2,000 or more are usual for answers with many fields[/]",
            soft_wrap=True,
        )


def print_result(result: dict[str, Any], folder: Path | None) -> None:
    """One table: every headline before and after with its count, the failures by kind, and where the files lie."""
    views = [name for name in ("before", "after", "result") if name in result]
    first = result[views[0]]
    console = Console()
    table = Table("metric", title="Result", title_justify="left")
    for view in views:
        table.add_column(view, justify="right")
    fields = [name for name in first if name.startswith("content/field_acc/")]
    kinds = [name for name in first if name.startswith("fail/") and any(result[view][name] for view in views)]
    for name in (*HEADLINES, *fields, *kinds):
        cells = [_cell(name, result[view][name], result["counts"][view].get(name)) for view in views]
        table.add_row(name, *cells, end_section=name in (HEADLINES[-1], *fields[-1:]))
    console.print(table)
    if folder is None:
        return
    training = result["training"]
    console.print(
        f"{training['steps']} steps in {training['seconds']:.0f} s; best checkpoint: step {training['best_step']} "
        f"(lowest loss: step {training['lowest_loss_step']})",
        highlight=False,
    )
    checkpoint = f"checkpoints/step-{training['best_step']}.ckpt"
    for what, name in (
        ("checkpoint", checkpoint),
        ("adapter", "adapter"),
        ("figures", "metrics.json"),
        ("configuration", "config.yaml"),
    ):
        console.print(f"{what:>14}: {folder / name}", highlight=False, soft_wrap=True)
    console.print(f"{'curves':>14}: make tensorboard", highlight=False)


def _cell(name: str, value: float, count: tuple[int, int] | None) -> str:
    if name.startswith("fail/"):
        return f"{value:,.0f}"
    if count is None or name == "content/field_f1":
        return f"{value:.4f}" if name == "val/loss" else f"{value:.1%}"
    return f"{value:.1%} ({count[0]:,}/{count[1]:,})"
