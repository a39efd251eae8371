"""The rows that a run trains on and is judged by, in token ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from formtune.data.cleaning import Quarantined
from formtune.rendering import Row


@dataclass(slots=True)
class Splits:
    """Encoded rows per split, and what became of all the others."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    quarantine: list[Quarantined] = field(default_factory=list)
    cached: Path | None = field(default=None, compare=False)  # the file they were read from

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were set aside for each reason."""
        return Counter(row.reason for row in self.quarantine)

    @property
    def set_aside(self) -> str:
        """The same in words, the most frequent first; empty if no row was."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())

    def lengths(self, split: str) -> dict[str, int]:
        """P50, P95 and maximum of prompt and answer in tokens."""
        found = {}
        for name in ("prompt", "target"):
            sizes = [len(getattr(row, name)) for row in self.rows[split]]
            for label, q in (("P50", 50), ("P95", 95), ("max", 100)):
                found[f"{name} {label}"] = int(np.percentile(sizes, q, method="higher"))
        return found
