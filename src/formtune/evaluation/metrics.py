"""Verdicts and losses to figures: integer sums, so that processes and uneven batches change nothing.

Every rate of format and content has all rows of the set in its denominator: an answer that cannot be parsed scores 0
and is never left out. The one exception says so in its name (`_given_valid`). Content is compared on the document that
was found, even if text stands around it, so that a model which knows the content and not the format is told apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from formtune.errors import UserError, first_line
from formtune.formats import KINDS, Format, Verdict

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.double  # Apple's GPUs have no 64 bits
_LADDER = ("exact", "loose", "terminated", "no_extra_text", "parse", "schema", "keys_exact", "canonical")


class FormatMetrics(Metric):
    """Rates of format and content, and counts of each kind of failure.

    Args:
        contract: Its fields get an accuracy each.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, contract: Format) -> None:
        super().__init__()
        self.fields = contract.fields
        # A contract that leaves the layout free has no rate of it.
        self._ladder = _LADDER if contract.is_canonical else _LADDER[:-1]
        content = ("exact_match", "invented", "omitted", "ungrounded", "matched", "predicted", "gold")
        valid = ("valid_matched", "valid_predicted", "valid_gold")
        self._names = ["rows", *self._ladder, "joint", *content, *valid, *(f"fail/{k}" for k in KINDS)]
        self._at = {name: i for i, name in enumerate(self._names)}
        size = len(self._names) + len(self.fields)
        # One vector: one exchange between processes, whatever is counted.
        self.add_state("sums", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, verdicts: Sequence[Verdict]) -> None:
        """Count verdicts, each made with the wanted answer at hand."""
        for verdict in verdicts:
            content = verdict.content
            if content is None:
                raise ValueError("content can only be measured against a wanted answer: check(..., gold=...)")
            counted = {name: int(getattr(verdict, name)) for name in self._ladder}
            counted |= {"rows": 1, "joint": int(verdict.joint), f"fail/{verdict.kind}": 1}
            counted |= {
                "exact_match": int(content.equal),
                "invented": int(content.invented),
                "omitted": int(content.omitted),
                "ungrounded": int(content.ungrounded),
                "matched": content.matched,
                "predicted": content.predicted,
                "gold": content.gold,
            }
            if verdict.exact:
                counted |= {f"valid_{name}": counted[name] for name in ("matched", "predicted", "gold")}
            row = [counted.get(name, 0) for name in self._names] + [int(equal) for equal in content.fields]
            # Not in place: Lightning tests in inference mode and validates outside it, with the same states.
            self.sums = self.sums + torch.tensor(row, device=self.sums.device)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Numerator and denominator of each figure, by its name."""
        sums = self.sums.tolist()
        n = {name: sums[i] for name, i in self._at.items()}
        rows = n["rows"]
        found = {f"format/{name}": (n[name], rows) for name in self._ladder}
        found["joint/exact"] = (n["joint"], rows)
        found["content/exact_match"] = (n["exact_match"], rows)
        found["content/field_precision"] = (n["matched"], n["predicted"])
        found["content/field_recall"] = (n["matched"], n["gold"])
        found["content/field_f1"] = (2 * n["matched"], n["predicted"] + n["gold"])
        found["content/field_f1_given_valid"] = (2 * n["valid_matched"], n["valid_predicted"] + n["valid_gold"])
        for name in ("invented", "omitted", "ungrounded"):
            found[f"content/{name}_rate"] = (n[name], rows)
        for i, field in enumerate(self.fields, len(self._names)):
            found[f"content/field_acc/{field}"] = (sums[i], rows)
        return found

    def compute(self) -> dict[str, Tensor]:
        """Every figure: rates between 0 and 1 (NaN without rows), `fail/*` as counts that sum to the rows."""
        # 0 of 0 pairs is 0, not NaN: a model that finds nothing has found nothing.
        rates = {
            name: torch.tensor(k / n if n else (0.0 if self.sums[0] and "field_" in name else torch.nan))
            for name, (k, n) in self.counts().items()
        }
        return rates | {f"fail/{kind}": self.sums[self._at[f"fail/{kind}"]].float() for kind in KINDS}


class OwnMetrics(torch.nn.ModuleList):
    """Metrics of the user's own: `update` takes the answers and the wanted answers, two lists of texts.

    Any metric of torchmetrics on texts will do. Each is called `own/` and its class; where `compute` gives several
    figures by name, this name follows.
    """

    def update(self, predictions: list[str], targets: list[str]) -> None:
        """Show every metric the same answers."""
        for name, metric in self._named() if predictions else ():
            _mine(name, "update", metric.update, predictions, targets)

    def compute(self) -> dict[str, float]:
        """Every figure, of all processes; NaN before the first answer."""
        found: dict[str, float] = {}
        for name, metric in self._named():
            value = _mine(name, "compute", metric.compute)
            parts = {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, Mapping) else {name: value}
            for part, one in parts.items():
                found[part] = _mine(name, "compute", float, one)
        return found

    def reset(self) -> None:
        """Forget all answers."""
        for name, metric in self._named():
            _mine(name, "reset", metric.reset)

    def alone(self, predictions: list[str], targets: list[str]) -> dict[str, float]:
        """Every figure of these answers, worked out by this process for itself."""
        copied = copy.deepcopy(self)
        for _, metric in copied._named():
            metric.distributed_available_fn = lambda: False
        copied.reset()
        copied.update(predictions, targets)
        return copied.compute()

    def _named(self) -> list[tuple[str, Metric]]:
        named: dict[str, Any] = {}
        for metric in self:
            name = f"own/{type(metric).__name__}"
            same = sum(known.partition("-")[0] == name for known in named)
            named[f"{name}-{same + 1}" if same else name] = metric
        return list(named.items())


def _mine(name: str, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    # Lightning tests in inference mode, and a state that is made there could not be changed in place in a validation.
    with torch.inference_mode(False), torch.no_grad():
        try:
            return call(*arguments)
        except Exception as error:  # whatever a stranger's code makes of its input
            raise UserError(
                f"model.metrics: {what} of {name.removeprefix('own/')} failed: {type(error).__name__}: "
                f"{first_line(error)} (update is given two lists of texts, compute gives a number or numbers by name)"
            ) from error


class LossMetrics(Metric):
    """Loss of the wanted answers under teacher forcing, in nats per token, split into structure and values."""

    full_state_update = False
    nats: Tensor
    value_nats: Tensor
    tokens: Tensor
    value_tokens: Tensor
    rows: Tensor
    exact_rows: Tensor
    compared: Tensor
    same: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "value_nats"):
            self.add_state(name, torch.zeros((), dtype=EXACT), dist_reduce_fx="sum")
        for name in ("tokens", "value_tokens", "rows", "exact_rows", "compared", "same"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nats: Tensor, correct: Tensor, is_value: Tensor, sizes: list[int]) -> None:
        """Add rows, their targets one after the other; tensors have the shape (targets,).

        Args:
            nats: Negative log-likelihood of each target token.
            correct: Whether the most likely token is the target.
            is_value: Whether the target belongs to a value of the answer.
            sizes: Number of targets of each row.
        """
        nats = nats.to(self.nats.dtype)
        self.nats = self.nats + nats.sum()
        self.value_nats = self.value_nats + (nats * is_value).sum()
        self.tokens = self.tokens + nats.numel()
        self.value_tokens = self.value_tokens + is_value.sum()
        self.rows = self.rows + len(sizes)
        wrong = torch.stack([(~row).any() for row in correct.split(sizes)]).sum()
        self.exact_rows = self.exact_rows + (len(sizes) - wrong)

    def compare(self, same: list[bool]) -> None:
        """Add rows whose answer was decoded in full too, and whether it came out the same."""
        self.compared, self.same = self.compared + len(same), self.same + sum(same)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Numerator and denominator of the rates."""
        return {
            "val/tf_exact": (int(self.exact_rows), int(self.rows)),
            "val/parity": (int(self.same), int(self.compared)),
        }

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `loss_structure`, `loss_value` in nats per token; `tf_exact` and `parity` as rates of rows."""
        return {
            "loss": self.nats / self.tokens,
            "loss_structure": (self.nats - self.value_nats) / (self.tokens - self.value_tokens),
            "loss_value": self.value_nats / self.value_tokens,
            "tf_exact": self.exact_rows / self.rows,
            "parity": self.same / self.compared,
        }
