"""Metrics as sums and counts over all rows, so that the number of processes and uneven batches change nothing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from formtune.errors import UserError, first_line
from formtune.evaluation.outcomes import F1, FIELD, RATES, Outcome
from formtune.formats import KINDS, Format

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.double  # Apple GPUs have no float64
_RATES = RATES | {
    "content/exact_match": "equal",
    "content/invented_rate": "invented",
    "content/omitted_rate": "omitted",
    "content/ungrounded_rate": "ungrounded",
}

Counts = dict[str, tuple[float, int]]  # numerator and denominator of each figure


class _Sums(Metric):
    """Numerators and denominators of figures, in one tensor: one exchange between processes."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = names
        self.add_state("sums", torch.zeros(len(names), 2, dtype=EXACT), dist_reduce_fx="sum")

    def _add(self, counts: Mapping[str, tuple[float, float]]) -> None:
        pairs = [counts.get(name, (0, 0)) for name in self._names]
        # Not in place: Lightning tests in inference mode and validates outside it, on the same states.
        self.sums = self.sums + torch.tensor(pairs, dtype=EXACT, device=self.sums.device)

    def compute(self) -> Counts:
        pairs = zip(self._names, self.sums.tolist(), strict=True)
        return {name: (int(count) if count.is_integer() else count, int(whole)) for name, (count, whole) in pairs}


class FormatMetrics(_Sums):
    """Rates of format and content, accuracies of fields (one of all with a schema per row), and failures by kind."""

    def __init__(self, format: Format) -> None:
        fields = (FIELD + name for name in format.fields)
        kinds = (f"fail/{kind}" for kind in KINDS)
        super().__init__(*_RATES, *fields, *kinds, F1, *(["content/field_acc"] if format.per_row else []))

    def update(self, outcomes: Sequence[Outcome]) -> None:
        """Count answers to rows that have a target."""
        for one in outcomes:
            right = one.fields.values()
            counts = {name: (getattr(one, attribute), 1) for name, attribute in _RATES.items()}
            counts |= {FIELD + name: (is_right, 1) for name, is_right in one.fields.items()}
            counts |= {f"fail/{kind}": (one.kind == kind, 1) for kind in KINDS}
            self._add(counts | {F1: (2 * one.matched, one.values), "content/field_acc": (sum(right), len(right))})


class LossMetrics(_Sums):
    """Loss of the targets under teacher forcing, and how often it predicts the whole target."""

    def __init__(self) -> None:
        super().__init__("val/loss", "val/tf_exact", "val/parity")

    def update(self, nats: Tensor, correct: Tensor, sizes: list[int]) -> None:
        """Add rows of these sizes: each target token's negative log-likelihood, and if it is the most likely."""
        exact = torch.stack([row.all() for row in correct.split(sizes)]).sum()
        loss = float(nats.to(EXACT).sum())
        self._add({"val/loss": (loss, nats.numel()), "val/tf_exact": (int(exact), len(sizes))})

    def compare(self, same: list[bool]) -> None:
        """Record whether full generation agrees with the answers read from the teacher-forced pass."""
        self._add({"val/parity": (sum(same), len(same))})


def ratios(counts: Counts) -> dict[str, float]:
    """Each figure: a number of answers for `fail/*`, else a ratio, NaN without rows; 0 if no answer has a value."""
    none = 0.0 if counts.get("format/exact", (0, 0))[1] else math.nan
    return {
        name: float(count) if name.startswith("fail/") else count / whole if whole else none
        for name, (count, whole) in counts.items()
    }


@contextmanager
def _own(what: str) -> Iterator[None]:
    # Lightning tests in inference mode, and a state made there could not be changed in place in a validation.
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"model.metrics: {what} failed: {type(error).__name__}: {first_line(error)} (update takes two lists of "
                "texts, compute returns a number or numbers by name)"
            ) from error


class Scores(nn.Module):
    """All metrics of an evaluation: verdicts, losses and the user's own.

    The user's are named by `own/` and the class, or the figure's name if `compute` returns several.
    """

    def __init__(self, format: Format, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.verdicts, self.losses = FormatMetrics(format), LossMetrics()
        names = [type(metric).__name__ for metric in metrics]
        numbered = (f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1))
        own = dict(zip(numbered, metrics, strict=True))
        self.own = MetricCollection(own, prefix="own/", compute_groups=False)  # type: ignore[arg-type]

    @property
    def names(self) -> set[str]:
        """Names of all figures of a validation but the user's own, for checks before the run."""
        # By their classes: called on the metrics, torchmetrics would keep the result.
        return {*LossMetrics.compute(self.losses), *FormatMetrics.compute(self.verdicts)}

    def update(self, outcomes: Sequence[Outcome]) -> None:
        self.verdicts.update(outcomes)
        if outcomes:  # a process may get no row
            with _own("update"):
                self.own.update([one.answer for one in outcomes], [one.target for one in outcomes])

    def compute(self) -> tuple[dict[str, float], Counts]:
        """Every figure, and its counts unless it is the user's own, over all processes; then begin anew."""
        counts = self.losses.compute() | self.verdicts.compute()
        with _own("compute"):
            figures = ratios(counts) | {name: float(value) for name, value in self.own.compute().items()}
        with _own("reset"):
            self.own.reset()
        self.losses.reset()
        self.verdicts.reset()
        return figures, counts
