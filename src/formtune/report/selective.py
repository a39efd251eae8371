"""Which answers to accept: risk and coverage, calibration, and the minimum confidence for a precision."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from formtune.evaluation.outcomes import Confidences, Outcome, confidences, threshold
from formtune.evaluation.statistics import wilson_interval

TARGETS = (0.9, 0.95, 0.98, 0.99, 0.995)  # precisions of the report's table
FIELD_TARGET = 0.99  # precision of the table of fields
FIELDS = 20  # of that table
BINS = 10  # of the calibration, equally wide


def selective_risk(rows: Confidences) -> np.ndarray:
    """The fraction of wrong answers among the k most confident ones, for each k from 1 to all."""
    # Answers of equal confidence have no order: each counts as their mean.
    confidence, right = np.array(rows, dtype=float).T
    _, group = np.unique(-confidence, return_inverse=True)
    wrong = np.bincount(group, 1 - right) / np.bincount(group)
    return wrong[np.sort(group)].cumsum() / np.arange(1, len(group) + 1)


def aurc(rows: Confidences) -> float:
    """Area under the risk-coverage curve (Geifman et al., 2019): the mean of `selective_risk`."""
    return float(selective_risk(rows).mean())


def calibration(rows: Confidences) -> list[tuple[int, float, float]]:
    """For each bin with rows, from low to high: their number, their mean confidence, and the fraction that is right."""
    table = np.array(sorted(rows), dtype=float)
    starts = np.searchsorted(table[:, 0] * BINS, np.arange(1, BINS))  # the last bin includes 1
    bins = [part for part in np.split(table, starts) if len(part)]
    return [(len(part), *map(float, part.mean(axis=0))) for part in bins]  # type: ignore[misc]


def calibration_error(rows: Confidences) -> float:
    """Expected calibration error (Guo et al., 2017): the mean distance of confidence and precision over the rows."""
    return sum(count * abs(confidence - right) for count, confidence, right in calibration(rows)) / len(rows)


def coverage_and_precision(rows: Confidences, minimum: float) -> dict[str, Any]:
    """Coverage, and precision with its interval, if answers of at least this confidence are accepted."""
    verdicts = [is_right for confidence, is_right in rows if confidence >= minimum]
    count, right = len(verdicts), sum(verdicts)
    metrics = {"min_confidence": minimum, "accepted": count, "coverage": count / len(rows)}
    return metrics | {"precision": right / count if count else None, "interval": wilson_interval(right, count)}


def summary(validation: Sequence[Outcome], test: Sequence[Outcome]) -> dict[str, Any]:
    """For `metrics.json`: thresholds chosen on the validation rows, all else measured on the test rows.

    Empty if a callback has replaced the answers, whose confidence is then unknown.
    """
    if not (rows := confidences(test)):
        return {}
    chosen_on = confidences(validation)
    fields = {name: confidences(test, name) for name in dict.fromkeys(name for o in test for name in o.fields)}
    fraction = {name: float(np.mean([right for _, right in field])) for name, field in fields.items()}
    worst = sorted((name for name in fields if fraction[name] < 1), key=fraction.__getitem__)[:FIELDS]
    return {
        "aurc": aurc(rows),
        "calibration_error": calibration_error(rows),
        "validation_rows": len(chosen_on),
        "accept": [_accept(chosen_on, rows, target) for target in TARGETS],
        "fields": {
            name: {"right": fraction[name], **_accept(confidences(validation, name), fields[name], FIELD_TARGET)}
            for name in worst
        },
    }


def _accept(validation: Confidences, test: Confidences, target: float) -> dict[str, Any]:
    minimum = threshold(validation, target)
    return {"target": target, **({} if minimum is None else coverage_and_precision(test, minimum))}
