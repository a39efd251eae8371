"""The audit as one self-contained HTML page, as JSON, and in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formtune.audit.pictures import pictures
from formtune.evaluation.page import environment, svg
from formtune.files import write_json, write_lines, write_whole

SHOWN = 200  # rows of a reason on the page; quarantine.jsonl has all of them
ABOUT = {
    "empty": "The input or the answer is empty.",
    "format": "The answer breaks the contract.",
    "conflict": "The same or nearly the same input with another answer: none of them can be trusted.",
    "leak": "The input belongs to a cluster of the validation or test rows.",
    "duplicate": "The same input and answer once more; the first is used.",
    "near_duplicate": "Nearly the same input and the same answer; the first is used.",
    "style": "The answer writes something in another way than most do.",
    "unfit": "The tokenizer or its template cannot carry the row unchanged.",
    "too_long": "More tokens than the limit; nothing is ever cut.",
}


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Write `audit.json`, `quarantine.jsonl` and `report.html` into the folder, each whole or not at all."""
    write_lines(folder / "quarantine.jsonl", found["quarantine"])
    write_json(folder / "audit.json", {name: value for name, value in found.items() if name != "quarantine"})
    write_whole(folder / "report.html", page(found))


def page(found: dict[str, Any]) -> str:
    """The page."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in found["quarantine"]:
        reasons.setdefault(row["reason"], []).append(row)
    plots = {name: (caption, svg(figure)) for name, caption, figure in pictures(found)}
    template = environment().get_template("audit/report.html.jinja")
    return template.render(found=found, reasons=reasons, plots=plots, about=ABOUT, shown=SHOWN)


def write_tensorboard(found: dict[str, Any], folder: Path) -> None:
    """The verdict, the counts and the plots in TensorBoard's format."""
    from torch.utils.tensorboard import SummaryWriter  # seconds: nothing before needs torch

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()  # an audit replaces the one before
    with SummaryWriter(str(folder)) as writer:
        lines = [f"**{found['verdict']}**", *(f"- blocked: {line}" for line in found["blockers"])]
        writer.add_text("audit/verdict", "\n".join([*lines, *(f"- {line}" for line in found["warnings"])]))
        for name, counts in (("rows", {k: v["used"] for k, v in found["rows"].items()}), ("aside", found["set_aside"])):
            for key, count in counts.items():
                writer.add_scalar(f"audit_{name}/{key}", count)
        for name, _, figure in pictures(found):
            writer.add_figure(f"audit/{name}", figure)
