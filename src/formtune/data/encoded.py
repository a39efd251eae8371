"""The rows of a run in token ids, and what became of all the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from formtune.base.row import Row, quantile
from formtune.data.cleaning import Quarantined
from formtune.data.styles import Mixture

FEW_ROWS = 500  # below this, fine-tuning mostly learns the examples; the guide's lower bound
NAMED = 20  # ignored columns named in the terminal


@dataclass(slots=True)
class Splits:
    """Encoded rows per split, and what became of all the others."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    quarantine: list[Quarantined] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    origins: dict[str, dict[str, int]] = field(default_factory=dict)  # rows of each split by who wrote them
    ignored: Counter[str] = field(default_factory=Counter)  # rows that have a key which is not read, by its name
    own_system: int = 0  # rows with their own system prompt
    shared: float = 0.0  # share of the inputs' text that many share and the near comparison left out
    key: str | None = None  # content hash of all that decides the rows
    cached: Path | None = field(default=None, compare=False)  # the file they were read from

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were quarantined for each reason."""
        return Counter(row.reason for row in self.quarantine)

    @property
    def quarantined(self) -> str:
        """The same in words, the most frequent first; empty if no row was."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())

    def lengths(self, split: str) -> list[int]:
        """P50, P95 and maximum of the prompts and then of the answers, in tokens; zeros where there are no rows."""
        rows = self.rows[split]
        sides = [len(row.prompt_ids) for row in rows], [len(row.target_ids) for row in rows]
        return [quantile(sizes, percent) for sizes in sides for percent in (50, 95, 100)]


def ignored_columns(counts: Counter[str]) -> str:
    """The counts in words, the most frequent first; empty if there are none."""
    parts = [f"{name} ({count:,})" for name, count in counts.most_common(NAMED)]
    if parts:
        parts[0] = parts[0].removesuffix(")") + " rows)"
    if len(counts) > NAMED:
        parts.append(f"{len(counts) - NAMED:,} more")
    return ", ".join(parts)
