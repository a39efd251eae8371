"""How far two models are apart that should say the same, and how far they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS = 64  # of each row, its last: the answer, and the end of the prompt that it follows


@dataclass(frozen=True, slots=True)
class Closeness:
    """A model against the one that it should equal.

    Args:
        relative_max: Largest difference of two logits, as a share of the largest logit.
        kl: Kullback-Leibler divergence from the reference, mean over tokens, in nats.
        top1: Share of tokens of which both hold the same most likely.
        finite: Whether every logit is a number.
    """

    relative_max: float
    kl: float
    top1: float
    finite: bool

    def __str__(self) -> str:
        return f"logits {self.relative_max:.1e} apart, KL {self.kl:.1e}, top-1 {self.top1:.1%}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a difference may be; None where it is not looked at.

    Args:
        relative_max: As in `Closeness`.
        kl: As in `Closeness`.
        top1: The least share.
    """

    relative_max: float | None = None
    kl: float | None = None
    top1: float | None = None

    def broken_by(self, found: Closeness) -> str | None:
        """What is too far, in words; None if nothing is."""
        if not found.finite:
            return "logits that are not finite numbers"
        if self.relative_max is not None and not found.relative_max <= self.relative_max:
            return f"logits {found.relative_max:.1e} apart (at most {self.relative_max:.0e})"
        if self.kl is not None and not found.kl <= self.kl:
            return f"KL {found.kl:.1e} (at most {self.kl:.0e})"
        if self.top1 is not None and not found.top1 >= self.top1:
            return f"top-1 {found.top1:.1%} (at least {self.top1:.0%})"
        return None


# The first two were measured with room of 2 to 100 times (docs/deployment.md); the last two are judgement, and the
# format metric on the test rows stands beside them.
EXACT = Tolerance(relative_max=1e-4)  # float32: nothing but the order of sums
# Stored in 16 bits: sound adapters and merges of the demo were seen 2.4e-2 and 5.4e-2 apart, at one logit of thousands.
ROUNDED = Tolerance(relative_max=1e-1, kl=1e-3, top1=0.99)
QLORA = Tolerance(kl=1e-2, top1=0.97)  # an adapter that was trained on a base of 4 bits, put on the whole one
QUANTIZED = Tolerance(kl=0.05, top1=0.95)


@torch.no_grad()
def last_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits after each of the last tokens of each row, in float32 on the CPU.

    Args:
        model: A causal language model in evaluation mode.
        rows: Token ids; each row is computed on its own, so that no padding is in the way.
    """
    found = []
    for ids in rows:
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        found.append(out.logits[0, -POSITIONS:].float().cpu())
    return found


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Closeness:
    """The second against the first, over all rows together."""
    largest = scale = nats = same = tokens = 0.0
    finite = True
    for wanted, got in zip(reference, other, strict=True):
        finite &= bool(torch.isfinite(got).all())
        largest = max(largest, float((got - wanted).abs().max()))
        scale = max(scale, float(wanted.abs().max()))
        nats += float(F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
        same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        tokens += len(wanted)
    return Closeness(largest / scale, max(nats / tokens, 0.0), same / tokens, finite)
