"""All metrics of an evaluation."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchmetrics import Metric

from formtune.evaluation.metrics import FormatMetrics, LossMetrics, OwnMetrics
from formtune.formats import Format
from formtune.model.batch import Answer


class Scores(nn.Module):
    """Verdicts, losses and the user's own metrics of one evaluation."""

    def __init__(self, format: Format, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.verdicts, self.losses, self.own = FormatMetrics(format), LossMetrics(), OwnMetrics(metrics)

    @property
    def names(self) -> set[str]:
        """Names of all figures of a validation but the user's own, for checks before the run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics: compute() before update()
            names = {f"val/{name}" for name in self.losses.compute()} | set(self.verdicts.compute())
        self._reset()  # else a process without rows would return this figure again, without joining the exchange
        return names

    def update(self, answers: Sequence[Answer]) -> None:
        self.verdicts.update([answer.verdict for answer in answers])
        self.own.update([answer.text for answer in answers], [answer.row.target or "" for answer in answers])

    def compute(self) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Every figure by its name in validation, and each rate's numerator and denominator, over all processes."""
        values: dict[str, Any] = {f"val/{name}": value for name, value in self.losses.compute().items()}
        values |= self.verdicts.compute() | self.own.compute()
        # compute() has undone its synchronization
        with self.verdicts.sync_context(), self.losses.sync_context():
            counts = self.verdicts.counts() | self.losses.counts()
        self._reset()
        return values, counts

    def _reset(self) -> None:
        for metrics in (self.losses, self.verdicts, self.own):
            metrics.reset()
