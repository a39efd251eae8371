"""The outcome of each test row, from all processes, in the order of the file."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from formtune.evaluation.outcomes import Outcome, outcome
from formtune.model.ranks import gathered


class Outcomes(Callback):
    """Holds the outcomes of the last test in `outcomes`, on every process."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._numbered: list[tuple[int, Outcome]] = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        format: Any = pl_module.format
        self._numbered += [(a.row.number, outcome(a.row, a.text, a.verdict, format)) for a in outputs]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbered = sorted(gathered(trainer, self._numbered), key=lambda pair: pair[0])
        self.outcomes, self._numbered = [outcome for _, outcome in numbered], []
