"""What is done with the answers of an evaluation: a table in the logger, outcomes of the test rows, a file."""

from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from formtune.evaluation.outcomes import Outcome, worst_first
from formtune.files import write_lines
from formtune.model.ranks import gathered
from formtune.training.loggers import log_table


class AnswerTable(Callback):
    """A table of the worst answers of each evaluation beside their targets, in the loggers.

    Args:
        rows: Number of answers, invalid formats first.
    """

    def __init__(self, rows: int = 12) -> None:
        self.rows = rows
        self._failed: list[Outcome] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        self._failed = worst_first([*self._failed, *outputs])[: self.rows]

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.logged:
            rows = [(f"{one.kind}: {one.detail}", one.input, one.target, one.answer) for one in self._failed]
            tag = "answers/test" if trainer.testing else "answers/validation"
            nothing = [("every answer is right", "", "", "")]
            log_table(trainer, tag, ("why", "input", "target", "answer"), rows or nothing)
        self._failed = []

    on_test_epoch_end = on_validation_epoch_end


class Outcomes(Callback):
    """Holds the outcomes of the last test on every process, in the order of the rows."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._numbered: list[tuple[int, Outcome]] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._numbered += [(row.number, outcome) for row, outcome in zip(batch.rows, outputs, strict=True)]

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        numbered = sorted(gathered(trainer, self._numbered), key=itemgetter(0))
        self.outcomes, self._numbered = [outcome for _, outcome in numbered], []


class AnswerFile(Callback):
    """Writes the predictions of all processes as JSON Lines.

    With a minimum confidence there are two files: the answers that reach it, and the others, for a person to review.
    """

    def __init__(self, path: str, untuned: str | None = None, minimum: float | None = None) -> None:
        self.path, self._model, self._minimum = Path(path), {"model": untuned} if untuned else {}, minimum
        self._numbered: list[tuple[int, Outcome]] = []
        self.written: dict[Path, int] = {}  # answers in each file

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after all the work

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._numbered += [(row.number, outcome) for row, outcome in zip(batch.rows, outputs, strict=True)]

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        records: list[dict[str, Any]] = [
            {
                "where": one.where, "prompt": one.input, "answer": one.answer,
                "compliant": one.exact, "kind": one.kind, "detail": one.detail,
                "confidence": one.confidence, "field_confidences": one.field_confidences or {}, **self._model,
            }
            for _, one in sorted(gathered(trainer, self._numbered), key=itemgetter(0))
        ]  # fmt: skip
        files = {self.path: records}
        if self._minimum is not None:
            names = [self.path.with_stem(f"{self.path.stem}.{name}") for name in ("review", "accepted")]
            files = {path: [] for path in names}
            for record in records:
                files[names[record["compliant"] and record["confidence"] >= self._minimum]].append(record)
        self.written = {path: len(part) for path, part in files.items()}
        if trainer.is_global_zero:
            for path in files if len(files) > 1 else ():
                path.unlink(missing_ok=True)  # after a kill between the two, no old file is beside a new one
            for path, part in files.items():
                write_lines(path, part)
