"""Why prepared rows must not be trained on: one line for each reason with its count, first place and remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from math import sqrt

from formtune.base.row import quantile
from formtune.data.cleaning import Quarantined
from formtune.data.encoded import Splits
from formtune.data.preparation import production_rows
from formtune.data.settings import DataSettings
from formtune.errors import UserError

# For each reason that points to a mistake in the data; others, such as duplicates and leaks, are ordinary.
REMEDIES = {
    "schema": "fix them",
    "format": "fix them, try data.repair_answers: [edges, fence]",
    "style": "fix them, try data.repair_answers: [canonical]",
    "too_long": "raise data.max_length",
    "long_answer": "raise model.max_new_tokens",
    "unfit": "fix them",
}
NEEDED = {
    "validation": "fit chooses the best checkpoint on validation rows",
    "test": "fit measures the base and the tuned model on test rows",
}
DEVIATIONS = 4  # standard deviations by which a share may miss what was asked for


def check_rows(settings: DataSettings, splits: Splits) -> None:
    """Raise a `UserError` with the first reason not to train on these rows, if there is one."""
    if lines := blockers(settings, splits):
        more = f" (and {len(lines) - 1} more: formtune audit lists all)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def blockers(settings: DataSettings, splits: Splits) -> list[str]:
    """Why the rows must not be trained on, each with the remedy; empty if they may."""
    bad = list(_bad_rows(settings, splits)) if settings.bad_rows == "refuse" else []
    empty = list(_empty_splits(splits, settings.shares))
    full = [] if empty else [*uneven_shares(splits, settings.shares), *_production_length(settings, splits)]
    return [*bad, *empty, *full, *_synthetic(settings, splits)]


def _bad_rows(settings: DataSettings, splits: Splits) -> Iterator[str]:
    remedies = REMEDIES.copy()
    if settings.limit < settings.max_length:
        remedies["too_long"] = f"take a base with a context of more than {settings.limit}"
    kinds: dict[str, list[Quarantined]] = defaultdict(list)
    for row in splits.quarantine:
        kinds["long_answer" if row.detail.startswith("the answer has") else row.reason].append(row)
    for kind, rows in kinds.items():
        if remedy := remedies.get(kind):
            yield f"{rows[0].where}: {rows[0].detail} ({len(rows):,} such rows); {remedy}, or set data.bad_rows: drop"


def _empty_splits(splits: Splits, shares: Mapping[str, float]) -> Iterator[str]:
    total = sum(len(splits.rows[name]) for name in ("train", *shares))
    for name, rows in splits.rows.items():
        share = shares.get(name)
        if rows or (share and not total):  # without rows to share, the line of train says why
            continue
        left = f"no row is left to use ({splits.read.total()} read; {splits.quarantined or 'none quarantined'})"
        if share == 0:
            left = f"0 keeps no row, and {NEEDED[name]}; name a file, or a share such as 0.1"
        elif share:
            left += f": {share:.0%} of {total:,} rows, drawn by hash, came to none; add rows, or name a file"
        elif splits.quarantine:
            [(reason, _)] = splits.reasons.most_common(1)
            first = next(row for row in splits.quarantine if row.reason == reason)
            left += f", such as {first.where}: {first.detail}"
        yield f"data.{name}: {left}"


def uneven_shares(splits: Splits, shares: Mapping[str, float]) -> list[str]:
    """A line if a split's share is further from what was asked for than chance explains."""
    total = sum(len(splits.rows[name]) for name in ("train", *shares))
    actual = {name: len(splits.rows[name]) / total for name in shares}
    if all(
        abs(actual[name] - share) <= max(share / 2, DEVIATIONS * sqrt(share * (1 - share) / total))
        for name, share in shares.items()
    ):
        return []
    parts = ", ".join(f"{name} {actual[name]:.0%} where {share:.0%} was asked for" for name, share in shares.items())
    return [
        f"data.{next(iter(shares))}: of {total:,} rows {parts}, since many inputs are nearly the same and stay in one "
        "split; set data.near_duplicates: 1, put text that inputs share into data.system, or name a file for each split"
    ]


def _production_length(settings: DataSettings, splits: Splits) -> Iterator[str]:
    input_tokens = quantile([len(row) for row in production_rows(settings)], 95)
    answer_tokens = quantile([len(row.target_ids) for row in splits.rows["train"]], 99)
    if input_tokens and input_tokens + answer_tokens > settings.limit:
        yield (
            f"data.max_length: production's inputs have {input_tokens} tokens at P95 and answers {answer_tokens} at "
            f"P99, together more than the limit of {settings.limit}; raise data.max_length or take a base with more "
            "context"
        )


def _synthetic(settings: DataSettings, splits: Splits) -> Iterator[str]:
    origins = Counter(row.origin for row in splits.rows.get("train", ()) if row.origin)
    known, by_models = origins.total(), origins.total() - origins["human"]
    if by_models > settings.max_synthetic * known:
        yield (
            f"data.max_synthetic: by their column `{settings.columns.source}`, models wrote {by_models:,} of {known:,} "
            f"training rows, more than {settings.max_synthetic:.0%}; add rows that people wrote, or raise it; if the "
            "column says something else, set data.columns.source: null"
        )
