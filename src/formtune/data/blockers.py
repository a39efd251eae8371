"""Why prepared rows must not be trained on: one line for each reason with its count, first place and remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt

from formtune.base.row import quantile
from formtune.data.cleaning import Quarantined, repair_answer
from formtune.data.encoded import Splits
from formtune.data.preparation import production_rows
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.formats import Format

# Reasons that point to a mistake in the data; the others (duplicates, leaks, ...) are ordinary and only counted.
BAD_REASONS = ("format", "style", "too_long", "unfit")
NEEDED = {
    "validation": "fit chooses the best checkpoint on validation rows",
    "test": "fit measures the base and the tuned model on test rows",
}
DEVIATIONS = 4  # standard deviations by which a share may miss what was asked for


def check_rows(settings: DataSettings, splits: Splits) -> None:
    """Refuse to train on rows that must not be trained on.

    Raises:
        UserError: The first reason, with the remedy.
    """
    if lines := blockers(settings, splits):
        more = f" (and {len(lines) - 1} more: formtune audit lists all)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def blockers(settings: DataSettings, splits: Splits) -> list[str]:
    """Why the rows must not be trained on, each with the remedy; empty if they may."""
    context = settings.limit if settings.limit < settings.max_length else None
    bad = _bad_rows(splits, settings.format, context) if settings.bad_rows == "refuse" else []
    if empty := _empty_splits(splits, settings.shares):
        return [*bad, *empty, *_synthetic(settings, splits)]
    return [
        *bad,
        *uneven_shares(splits, settings.shares),
        *_production_length(settings, splits),
        *_synthetic(settings, splits),
    ]


def _bad_rows(splits: Splits, format: Format, context: int | None) -> list[str]:
    """A line for each kind of bad rows; `context` is the base's, where it is what limits the rows."""
    kinds: dict[tuple[str, bool], list[Quarantined]] = defaultdict(list)
    for row in splits.quarantine:
        if row.reason in BAD_REASONS:
            kinds[row.reason, row.reason == "too_long" and row.detail.startswith("the answer")].append(row)
    return [
        f"{rows[0].where}: {rows[0].detail} ({len(rows):,} such rows); "
        f"{_remedy(reason, answer, rows, format, context)}, or set data.bad_rows: drop"
        for (reason, answer), rows in kinds.items()
    ]


def _remedy(reason: str, answer: bool, rows: Sequence[Quarantined], format: Format, context: int | None) -> str:
    if answer:
        return "raise model.max_new_tokens"
    if reason == "too_long":
        return "raise data.max_length" if context is None else f"take a base with a context of more than {context}"
    steps = {"format": ["edges", "fence"], "style": ["canonical"]}.get(reason, [])
    repairs: Counter[str] = Counter()
    answers = [row.messages[-1]["content"] for row in rows]
    repaired = sum(repair_answer(answer, format, steps, repairs) != answer for answer in answers)
    if not repaired:
        return "fix them"
    names = ", ".join(name.removeprefix("answer ") for name in repairs)
    return f"set data.repair_answers: [{names}], which repairs {repaired:,} of them"


def _empty_splits(splits: Splits, shares: Mapping[str, float]) -> list[str]:
    """A line for each split without rows."""
    lines = []
    total = _rows_to_share(splits, shares)
    none_left = f"no row is left to use ({sum(splits.read.values())} read; {splits.quarantined or 'none quarantined'})"
    for name, rows in splits.rows.items():
        share = shares.get(name)
        if rows or (share and not total):  # without rows to share, the line of train says all
            continue
        if share == 0:
            line = f"{share:g} keeps no row, and {NEEDED[name]}; name a file, or a share such as 0.1"
        elif share is not None:
            line = f"{none_left}: {share:.0%} of {total:,} rows, drawn by hash, came to none; add rows, or name a file"
        elif name == "train" and total:
            remedy = "set data.near_duplicates: 1, or name a file for each"
            line = f"{none_left}: all {total:,} are in the other splits; {remedy}"
        else:
            reason = next(iter(splits.reasons.most_common(1)), ("",))[0]
            first = next((row for row in splits.quarantine if row.reason == reason), None)
            line = none_left + (f", such as {first.where}: {first.detail}" if first else "")
        lines.append(f"data.{name}: {line}")
    return lines


def uneven_shares(splits: Splits, shares: Mapping[str, float]) -> list[str]:
    """A line if a split's share is further from what was asked for than chance explains."""
    total = _rows_to_share(splits, shares)
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


def _rows_to_share(splits: Splits, shares: Mapping[str, float]) -> int:
    """Rows left of those that the shares are split off from."""
    return sum(len(splits.rows[name]) for name in ("train", *shares))


def _production_length(settings: DataSettings, splits: Splits) -> list[str]:
    """A line if production's inputs and the answers to them do not fit the limit."""
    if settings.production is None:
        return []
    input_tokens = quantile([len(row) for row in production_rows(settings)], 95)
    answer_tokens = quantile([len(row.target_ids) for row in splits.rows["train"]], 99)
    if input_tokens + answer_tokens <= settings.limit:
        return []
    return [
        f"data.max_length: production's inputs have {input_tokens} tokens at P95 and answers {answer_tokens} at P99, "
        f"together more than the limit of {settings.limit}; raise data.max_length or take a base with more context"
    ]


def _synthetic(settings: DataSettings, splits: Splits) -> list[str]:
    """A line if models wrote too many of the training rows whose origin is known."""
    origins = {name: count for name, count in splits.origins.get("train", {}).items() if name}
    known = sum(origins.values())
    by_models = known - origins.get("human", 0)
    if by_models <= settings.max_synthetic * known:
        return []
    return [
        f"data.max_synthetic: by their column `{settings.columns.source}`, models wrote {by_models:,} of {known:,} "
        f"training rows, more than {settings.max_synthetic:.0%}; add rows that people wrote, or raise it; if the "
        "column says something else, set data.columns.source: null"
    ]
