"""Answers to read: the worst ones in TensorBoard, all of them in a file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from formtune.files import write_lines
from formtune.formats import KINDS


class WorstAnswers(Callback):
    """Shows the worst answers of each evaluation beside their targets, as a text table in TensorBoard.

    Args:
        rows: Number of answers to show, format failures first.
    """

    def __init__(self, rows: int = 12) -> None:
        self.rows = rows
        self._failed: list[Any] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._failed += [answer for answer in outputs if answer.verdict.kind != "ok"]
        # Format failures first, the earlier kinds (nothing there at all) before the later (a wrong value).
        self._failed = sorted(self._failed, key=lambda a: KINDS.index(a.verdict.kind))[: self.rows]

    def on_test_batch_end(self, *args: Any) -> None:
        self.on_validation_batch_end(*args)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "answers/validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "answers/test")

    def _show(self, trainer: Trainer, pl_module: Any, tag: str) -> None:
        shown = trainer.is_global_zero and pl_module.logs_evaluations
        if shown and isinstance(trainer.logger, TensorBoardLogger):
            lines = ["| why | input | target | answer |", "|---|---|---|---|"]
            for a in self._failed:
                cells = (f"{a.verdict.kind}: {a.verdict.detail}", a.row.source, a.row.gold or "", a.text)
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
            text = "\n".join(lines) if self._failed else "every answer is right"
            trainer.logger.experiment.add_text(tag, text, trainer.global_step)
        self._failed = []


def _cell(text: str, limit: int = 400) -> str:
    text = text if len(text) <= limit else text[:limit] + " ..."
    return "<code>" + html.escape(text).replace("|", "&#124;").replace("\n", "<br>") + "</code>"


class AnswerFile(Callback):
    """Writes predictions as JSON Lines: where, prompt, answer, and the contract's verdict.

    Args:
        path: File to write; under several devices each further process appends its rank to the name.
        untuned: What to call the model in each record, where it is not a tuned one.
    """

    def __init__(self, path: str, untuned: str | None = None) -> None:
        self.path, self._more = Path(path), {"model": untuned} if untuned else {}
        self._answers: list[Any] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the work

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._answers += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = trainer.global_rank
        path = self.path.with_name(f"{self.path.name}.{rank}") if rank else self.path
        # The loader sorts by length; a reader expects the order of the prompts.
        answers = sorted(self._answers, key=lambda a: a.row.number)
        write_lines(path, (_record(a) | self._more for a in answers))


def _record(answer: Any) -> dict[str, Any]:
    return {
        "where": answer.row.where,
        "prompt": answer.row.source,
        "answer": answer.text,
        "compliant": answer.verdict.exact,
        "kind": answer.verdict.kind,
        "detail": answer.verdict.detail,
    }
