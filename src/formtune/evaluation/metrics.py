"""Metrics as sums and counts over all rows, so that the number of processes and uneven batches change nothing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from formtune.errors import as_user_error
from formtune.evaluation.outcomes import F1, FIELD, RATES, Outcome
from formtune.formats import KINDS, Format

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.double  # Apple GPUs have no float64

Counts = dict[str, tuple[float, int]]  # numerator and denominator of each metric


def count(outcomes: Sequence[Outcome], format: Format) -> Counts:
    """Rates of format and content, accuracy of each field (of all, if rows have schemas), and failures by kind."""
    rows = len(outcomes)
    counts: Counts = {name: (sum(getattr(one, what) for one in outcomes), rows) for name, what in RATES.items()}
    fields = {FIELD + name: [one.fields[name] for one in outcomes if name in one.fields] for name in format.fields}
    counts |= {name: (sum(right), len(right)) for name, right in fields.items()}
    counts |= {f"fail/{kind}": (sum(one.kind == kind for one in outcomes), rows) for kind in KINDS}
    counts[F1] = (2 * sum(one.matched for one in outcomes), sum(one.values for one in outcomes))
    if format.per_row:
        right = [is_right for one in outcomes for is_right in one.fields.values()]
        counts["content/field_acc"] = (sum(right), len(right))
    return counts


class LossMetrics(Metric):
    """Loss of the targets under teacher forcing, and how often decoding agrees with full generation."""

    names = ("val/loss", "val/parity")
    sums: Tensor  # numerator and denominator of each

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names), 2, dtype=EXACT), dist_reduce_fx="sum")

    def update(self, nats: Tensor) -> None:
        """Add the negative log-likelihood of target tokens."""
        self._add({"val/loss": (float(nats.to(EXACT).sum()), nats.numel())})

    def compare(self, same: list[bool]) -> None:
        """Record whether full generation agrees with the answers read from the teacher-forced pass."""
        self._add({"val/parity": (sum(same), len(same))})

    def _add(self, counts: Counts) -> None:
        pairs = [counts.get(name, (0, 0)) for name in self.names]
        # Not in place: Lightning tests in inference mode and validates outside it, on the same states.
        self.sums = self.sums + torch.tensor(pairs, dtype=EXACT, device=self.sums.device)

    def compute(self) -> Counts:
        pairs = zip(self.names, self.sums.tolist(), strict=True)
        return {name: (int(value) if value.is_integer() else value, int(total)) for name, (value, total) in pairs}


def ratios(counts: Counts) -> dict[str, float]:
    """Each metric: a number of answers for `fail/*`, else a ratio; 0/0 is NaN if there are no rows, else 0."""
    none = 0.0 if counts.get("format/exact", (0, 0))[1] else math.nan
    return {
        name: float(count) if name.startswith("fail/") else count / total if total else none
        for name, (count, total) in counts.items()
    }


class Scores(nn.Module):
    """All metrics of an evaluation: of the outcomes, the losses and the custom metrics.

    A custom metric is named `custom/` and its class, or the value's name if `compute` returns several.
    """

    def __init__(self, format: Format, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.format, self.losses = format, LossMetrics()
        names = [type(metric).__name__ for metric in metrics]
        numbered = (f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1))
        custom = dict(zip(numbered, metrics, strict=True))
        self.custom = MetricCollection(custom, prefix="custom/", compute_groups=False)  # type: ignore[arg-type]
        self.custom.requires_grad_(False)  # a network within a metric is not trained

    @property
    def names(self) -> set[str]:
        """Names of all metrics of a validation except custom metrics, for checks before the run."""
        return {*LossMetrics.names, *count((), self.format)}

    def compute(self, outcomes: Sequence[Outcome], local: Sequence[Outcome]) -> tuple[dict[str, float], Counts]:
        """Every metric, with its counts unless it is custom, from the outcomes of all processes and those of this one.

        All metrics are then reset.
        """
        counts = self.losses.compute() | count(outcomes, self.format)
        expected = "; update takes two lists of strings, compute returns a number or numbers by name"
        # Lightning tests in inference mode, and a state made there could not be changed in place in a validation.
        with torch.inference_mode(False), torch.no_grad(), as_user_error("model.metrics: a metric failed", expected):
            if local:
                self.custom.update([one.answer for one in local], [one.target for one in local])
            metrics = ratios(counts) | {name: float(value) for name, value in self.custom.compute().items()}
            self.custom.reset()
        self.losses.reset()
        return metrics, counts
