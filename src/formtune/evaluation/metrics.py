"""Metrics as sums and counts over all rows, so that the number of processes and uneven batches change nothing."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from formtune.errors import UserError, first_line
from formtune.formats import KINDS, Format, Verdict

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.double  # Apple GPUs have no float64
_RATES = (
    "format/exact", "format/loose", "joint/exact", "content/exact_match",
    "content/invented_rate", "content/omitted_rate", "content/ungrounded_rate",
)  # fmt: skip


class FormatMetrics(Metric):
    """Rates of format and content, accuracies of fields (one of all with a schema per row), and failures by kind."""

    full_state_update = False
    sums: Tensor

    def __init__(self, format: Format) -> None:
        super().__init__()
        self._rates = (*_RATES, *(f"content/field_acc/{field}" for field in format.fields))
        self._per_row, self._fields = format.per_row, len(format.fields)
        # One vector means one exchange between processes: rows, terms of F1, right fields and all, rates, failures.
        self.add_state("sums", torch.zeros(5 + len(self._rates) + len(KINDS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, verdicts: Sequence[Verdict]) -> None:
        """Count verdicts on answers to rows that have a target."""
        for verdict in verdicts:
            content = verdict.content
            if content is None:
                raise ValueError("content can only be measured against a target: check(..., target=...)")
            row = [1, 2 * content.matched, content.predicted + content.expected]
            row += [sum(content.fields), len(content.fields), verdict.exact, verdict.loose, verdict.joint]
            row += [content.equal, content.invented, content.omitted, content.ungrounded]
            row += [*content.fields[: self._fields], *(verdict.kind == kind for kind in KINDS)]
            # Not in place: Lightning tests in inference mode and validates outside it, on the same states.
            self.sums = self.sums + torch.tensor(row, dtype=torch.long, device=self.sums.device)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Numerator and denominator of each rate and of field F1."""
        rows, both, either, right, fields, *sums = self.sums.tolist()
        rates = {name: (count, rows) for name, count in zip(self._rates, sums, strict=False)}
        accuracy = {"content/field_acc": (right, fields)} if self._per_row else {}
        return rates | {"content/field_f1": (both, either)} | accuracy

    def compute(self) -> dict[str, Tensor]:
        """Rates and field F1 between 0 and 1 (NaN without rows); `fail/*` as counts that sum to the rows."""
        # F1 without any value is 0, not NaN: no value of the targets is right.
        none = 0.0 if self.sums[0] else torch.nan
        rates = {name: torch.tensor(k / n if n else none) for name, (k, n) in self.counts().items()}
        failures = self.sums[-len(KINDS) :].float()
        return rates | {f"fail/{kind}": count for kind, count in zip(KINDS, failures, strict=True)}


class OwnMetrics(torch.nn.ModuleDict):
    """The user's own metrics on texts, such as those of torchmetrics.

    Each is called `own/` and its class, and the figure's name if `compute` returns several.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        counts: Counter[str] = Counter()
        for metric in metrics:
            name = type(metric).__name__
            counts[name] += 1
            self[f"{name}-{counts[name]}" if counts[name] > 1 else name] = metric

    def update(self, predictions: list[str], targets: list[str]) -> None:  # type: ignore[override]
        """Add answers and their targets."""
        for name, metric in self.items() if predictions else ():
            _call(name, "update", metric.update, predictions, targets)

    def compute(self) -> dict[str, float]:
        """Every figure, over all processes; NaN before the first answer."""
        figures: dict[str, Any] = {}
        for name, metric in self.items():
            value = _call(name, "compute", metric.compute)
            named = (
                {f"/{part}": figure for part, figure in value.items()} if isinstance(value, Mapping) else {"": value}
            )
            figures |= {f"own/{name}{part}": _call(name, "compute", float, figure) for part, figure in named.items()}
        return figures

    def reset(self) -> None:
        """Reset every metric."""
        for name, metric in self.items():
            _call(name, "reset", metric.reset)

    def alone(self, predictions: list[str], targets: list[str]) -> dict[str, float]:
        """Every figure of these answers, computed without the other processes."""
        copied = copy.deepcopy(self)
        metrics: Any = copied.values()
        for metric in metrics:
            metric.distributed_available_fn = lambda: False
        copied.reset()
        copied.update(predictions, targets)
        return copied.compute()


def _call(name: str, what: str, method: Any, *arguments: Any) -> Any:
    # Lightning tests in inference mode, and a state made there could not be changed in place in a validation.
    with torch.inference_mode(False), torch.no_grad():
        try:
            return method(*arguments)
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"model.metrics: {what} of {name} failed: {type(error).__name__}: {first_line(error)} (update takes "
                "two lists of texts, compute returns a number or numbers by name)"
            ) from error


class LossMetrics(Metric):
    """Loss of the targets under teacher forcing, and how often it predicts the whole target."""

    full_state_update = False
    nats: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=EXACT), dist_reduce_fx="sum")
        # Tokens, rows, rows predicted exactly; answers that were decoded in full, and that were the same.
        self.add_state("sums", torch.zeros(5, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nats: Tensor, correct: Tensor, sizes: list[int]) -> None:
        """Add rows of these sizes: each target token's negative log-likelihood, and if it is the most likely."""
        exact = torch.stack([row.all() for row in correct.split(sizes)]).sum()
        self.nats = self.nats + nats.to(self.nats.dtype).sum()
        self._add(nats.numel(), len(sizes), exact, 0, 0)

    def compare(self, same: list[bool]) -> None:
        """Record whether full generation agrees with the answers read from the teacher-forced pass."""
        self._add(0, 0, 0, len(same), sum(same))

    def _add(self, *counts: int | Tensor) -> None:
        self.sums = self.sums + torch.stack([torch.as_tensor(count, device=self.sums.device) for count in counts])

    def counts(self) -> dict[str, tuple[int, int]]:
        """Numerator and denominator of the rates."""
        _, rows, exact, compared, same = self.sums.tolist()
        return {"val/tf_exact": (exact, rows), "val/parity": (same, compared)}

    def compute(self) -> dict[str, Tensor]:
        """`loss` in nats per token; `tf_exact` and `parity` as rates of rows."""
        tokens, rows, exact, compared, same = self.sums
        return {"loss": self.nats / tokens, "tf_exact": exact / rows, "parity": same / compared}
