"""All metrics of an evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchmetrics import Metric

from formtune.evaluation.metrics import FormatMetrics, LossMetrics, OwnMetrics
from formtune.formats import Format


class Scores(nn.Module):
    """Verdicts, losses and the user's own metrics of one evaluation."""

    def __init__(self, format: Format, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.verdicts, self.losses, self.own = FormatMetrics(format), LossMetrics(), OwnMetrics(metrics)

    @property
    def names(self) -> set[str]:
        """Names of all figures of a validation, for checks before the run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics: compute() before update()
            names = {f"val/{name}" for name in self.losses.compute()} | set(self.verdicts.compute())
        for metrics in (self.losses, self.verdicts):
            metrics.reset()  # else a process without rows would return this figure again, without joining the exchange
        return names

    def update(self, answers: Sequence[Any]) -> None:
        """Add `Answer`s of rows that have a target."""
        self.verdicts.update([answer.verdict for answer in answers])
        self.own.update([answer.text for answer in answers], [answer.row.target or "" for answer in answers])

    def compute(self, test: bool) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Every figure by its logged name, and each rate's numerator and denominator, over all processes."""
        prefix, loss_prefix = ("test/", "test/") if test else ("", "val/")
        values: dict[str, Any] = {loss_prefix + name: value for name, value in self.losses.compute().items()}
        for metrics in (self.verdicts, self.own):
            values |= {prefix + name: value for name, value in metrics.compute().items()}
        # compute() has undone its synchronization
        with self.verdicts.sync_context(), self.losses.sync_context():
            counts = self.verdicts.counts() | self.losses.counts()
        for part in (self.losses, self.verdicts, self.own):
            part.reset()
        return values, counts
