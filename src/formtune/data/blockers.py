"""Reasons not to train on prepared rows: one line each with its count, first place and remedy."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt

from formtune.base.folder import context_length
from formtune.base.row import quantile
from formtune.data.cleaning import Quarantined
from formtune.data.encoded import Splits
from formtune.data.preparation import production_rows
from formtune.data.settings import DataSettings
from formtune.errors import UserError

# Reasons that point to a mistake in the data or the settings; others, such as duplicates and leaks, are ordinary.
BAD = ("schema", "format", "style", "too_long", "unfit")
MAX_BAD_SHARE = 0.1  # of the rows, for dropping them to be a remedy
MAX_DEVIATIONS = 4  # standard deviations between the actual and the requested fraction of a split


def check_rows(settings: DataSettings, splits: Splits) -> None:
    """Raise a UserError with the first reason not to train on these rows, if there is one."""
    if lines := blockers(settings, splits):
        more = f" (and {len(lines) - 1} more: formtune audit lists all)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def blockers(settings: DataSettings, splits: Splits) -> list[str]:
    """Reasons not to train on the rows, each with its remedy."""
    lines = []
    bad = [row for row in splits.quarantine if row.reason in BAD] if settings.bad_rows == "refuse" else []
    drop = ", or set data.bad_rows: drop" if len(bad) < MAX_BAD_SHARE * splits.read.total() else ""
    for rows in _kinds(bad):
        lines.append(f"{rows[0].where}: {rows[0].detail} ({len(rows):,} such rows); {_remedy(settings, rows)}{drop}")
    empty = [name for name, rows in splits.rows.items() if not rows]
    # If train is empty, its fractions are empty for the same reason.
    empty = [name for name in empty if "train" not in empty or name not in settings.fractions]
    lines += [_empty_split(settings, splits, name) for name in empty] or uneven_fractions(splits, settings.fractions)
    inputs = quantile([len(row) for row in ([] if empty else production_rows(settings))], 95)
    answers = quantile([len(row.target_ids) for row in splits.rows.get("train", ())], 99)
    if inputs and inputs + answers > settings.limit:
        lines.append(
            f"data.max_length: production's inputs have {inputs} tokens at P95 and answers {answers} at P99, together "
            f"more than the limit of {settings.limit}; raise data.max_length or use a base with a longer context"
        )
    origins = Counter(row.origin for row in splits.training if row.origin)
    total, by_models = origins.total(), origins.total() - origins["human"]
    source, limit = settings.columns.source, settings.max_synthetic
    if by_models > limit * total:
        lines.append(
            f"data.max_synthetic: models wrote {by_models:,} of {total:,} training rows, more than {limit:.0%}; add "
            f"rows by people, raise it, or set data.columns.source: null if `{source}` does not name authors"
        )
    return lines


def _kinds(rows: Sequence[Quarantined]) -> list[list[Quarantined]]:
    """The rows grouped by their reason and what would fix them."""
    kinds: dict[tuple[str, str], list[Quarantined]] = defaultdict(list)
    for row in rows:
        kinds[row.reason, row.fix.rstrip("0123456789")].append(row)
    return list(kinds.values())


def _remedy(settings: DataSettings, rows: Sequence[Quarantined]) -> str:
    key, _, value = rows[0].fix.partition(": ")
    if rows[0].reason == "too_long":
        value = str(longest := max(int(row.fix.rpartition(" ")[2]) for row in rows))
        if key == "data.max_length" and longest > (context_length(settings.base) or longest):
            return f"shorten them, or use a base with a context of {longest:,} tokens"
    return f"set {key}: {value}" if key else "fix them"


def _empty_split(settings: DataSettings, splits: Splits, name: str) -> str:
    from_train = ("train", *settings.fractions)
    source = from_train if name in from_train else (name,)
    lost = [row for row in splits.quarantine if row.split in source]
    read, reasons = sum(splits.read[split] for split in source), Splits(quarantine=lost).quarantined
    reasons = reasons or "none quarantined"
    line, remedy = f"data.{name}: the split is empty ({read:,} read; {reasons})", ""
    if lost:
        most = max(_kinds(lost), key=len)
        line += f", such as {most[0].where}: {most[0].detail}"
        remedy = _remedy(settings, most) if most[0].reason in BAD else ""
    return f"{line}; {remedy or 'add rows, or name a file or a larger fraction'}"


def uneven_fractions(splits: Splits, fractions: Mapping[str, float]) -> list[str]:
    """A line if chance does not explain a split's distance from the requested fraction."""
    total = sum(len(splits.rows[name]) for name in ("train", *fractions))
    groups = min(splits.groups or total, total)
    parts, is_even = [], True
    for name, fraction in fractions.items():
        actual, deviation = len(splits.rows[name]) / total, sqrt(fraction * (1 - fraction) / groups)
        is_even &= abs(actual - fraction) <= max(fraction / 2, MAX_DEVIATIONS * deviation)
        parts.append(f"{name} {actual:.0%} instead of {fraction:.0%}")
    if is_even:
        return []
    return [
        f"data.{next(iter(fractions))}: {', '.join(parts)} of {total:,} rows, since near-duplicates and rows of one "
        "group stay in one split; set data.near_duplicates: 1, put shared text into data.system, or name a file per "
        "split"
    ]
