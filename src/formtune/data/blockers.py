"""Why prepared rows must not be trained on, one line for each reason with its count, first place and remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt

from formtune.data.cleaning import Quarantined, repair_answer
from formtune.data.encoded import Splits
from formtune.formats import Format

# Reasons that speak of a mistake in the data; the others (duplicates, leaks, ...) are ordinary and only counted.
BAD_REASONS = ("format", "style", "too_long", "unfit")
NEEDED = {
    "validation": "fit chooses the best checkpoint on validation rows",
    "test": "fit measures the base and the tuned model on test rows",
}
CHANCE = 4  # standard deviations by which a share may miss what was asked for


def bad_rows(splits: Splits, contract: Format, context: int | None) -> list[str]:
    """A line for each kind of bad rows.

    Args:
        splits: The rows.
        contract: What repairs of answers are tried by.
        context: Tokens that the base can hold, where it is this that limits the rows.
    """
    kinds: dict[tuple[str, bool], list[Quarantined]] = defaultdict(list)
    for row in splits.quarantine:
        if row.reason in BAD_REASONS:
            kinds[row.reason, row.reason == "too_long" and row.detail.startswith("the answer")].append(row)
    found = []
    for (reason, answer), rows in kinds.items():
        remedy = _remedy(reason, answer, rows, contract, context)
        found.append(
            f"{rows[0].where}: {rows[0].detail} ({len(rows):,} such rows); {remedy}, or set data.bad_rows: drop"
        )
    return found


def _remedy(reason: str, answer: bool, rows: Sequence[Quarantined], contract: Format, context: int | None) -> str:
    if answer:
        return "raise model.max_new_tokens"
    if reason == "too_long":
        return "raise data.max_length" if context is None else f"take a base with a context of more than {context}"
    steps = {"format": ["edges", "fence"], "style": ["canonical"]}.get(reason, [])
    made: Counter[str] = Counter()
    texts = [row.messages[-1]["content"] for row in rows]
    helped = sum(repair_answer(text, contract, steps, made) != text for text in texts)
    if not helped:
        return "fix them"
    names = ", ".join(name.removeprefix("answer ") for name in made)
    return f"set data.repair_answers: [{names}], which repairs {helped:,} of them"


def empty_splits(splits: Splits, shares: Mapping[str, float]) -> list[str]:
    """A line for each split without rows.

    Args:
        splits: The rows.
        shares: Of the rows of `data.train`, for the splits that are cut from it.
    """
    found = []
    total = _cut(splits, shares)
    told = f"no row is left to use ({sum(splits.read.values())} read; {splits.set_aside or 'nothing set aside'})"
    for name, rows in splits.rows.items():
        share = shares.get(name)
        if share == 0:
            line = f"{share:g} keeps no row, and {NEEDED[name]}; name a file, or a share such as 0.1"
        elif share is not None:
            line = f"{told}: {share:.0%} of {total:,} rows, drawn by hash, came to none; add rows, or name a file"
        elif name == "train" and total:
            line = (
                f"{told}: all {total:,} fell to the other splits; set data.near_duplicates: 1, or name a file for each"
            )
        else:
            reason = next(iter(splits.reasons.most_common(1)), ("",))[0]
            first = next((row for row in splits.quarantine if row.reason == reason), None)
            line = told + (f", such as {first.where}: {first.detail}" if first else "")
        if not rows and (share is None or share == 0 or total):
            found.append(f"data.{name}: {line}")
    return found


def uneven_shares(splits: Splits, shares: Mapping[str, float]) -> list[str]:
    """A line if a split's share is far from what was asked for, further than chance explains."""
    total = _cut(splits, shares)
    got = {name: len(splits.rows[name]) / total for name in shares}
    if all(
        abs(got[name] - share) <= max(share / 2, CHANCE * sqrt(share * (1 - share) / total))
        for name, share in shares.items()
    ):
        return []
    said = ", ".join(f"{name} {got[name]:.0%} where {share:.0%} was asked for" for name, share in shares.items())
    return [
        f"data.{next(iter(shares))}: of {total:,} rows {said}, since many inputs are nearly the same and stay in one "
        "split; set data.near_duplicates: 1, put text that inputs share into data.system, or name a file for each split"
    ]


def _cut(splits: Splits, shares: Mapping[str, float]) -> int:
    """Rows left of those that the shares are cut from."""
    return sum(len(splits.rows[name]) for name in ("train", *shares))
