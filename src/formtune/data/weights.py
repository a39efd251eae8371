"""Weights of the files in `data.train`: how often a training row is used, after splits and duplicates are decided."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from formtune.base.row import Row
from formtune.errors import UserError

MAX_WEIGHT = 1000  # times that a row may be used in an epoch


def read_weights(train: Any) -> tuple[Any, dict[str, float]]:
    """The source in `data.train`, and the weight of each of its entries; {} if none has a weight."""
    if not isinstance(train, list) or all(isinstance(entry, str) for entry in train):
        return train, {}
    weights: dict[str, float] = {}
    for item in train:
        entry = {"weight": 1} | ({"path": item} if isinstance(item, str) else item)
        path, weight = entry.get("path"), entry["weight"]
        is_weight = type(weight) in (int, float) and 0 < weight <= MAX_WEIGHT
        if not isinstance(path, str) or path in weights or not is_weight or len(entry) > 2:
            rule = f"{{path: FILE, weight: NUMBER}}, each file once, with a weight above 0 and up to {MAX_WEIGHT}"
            raise UserError(f"data.train: expected a file or {rule}; found {item}")
        weights[path] = float(weight)
    return list(weights), weights


def weighted(
    rows: Sequence[Row], entry_of: Mapping[str, str], weights: Mapping[str, float]
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Each row as often as its entry's weight says, and counts by entry; `entry_of` maps a file to its entry."""
    # The fraction is a share of the rows, drawn once, so that every epoch and a resumed run have the same rows.
    entries = [entry_of[row.where.rpartition(":")[0].removesuffix("[train]")] for row in rows]
    times, counts = [int(weights[entry]) for entry in entries], {}
    for name, weight in weights.items():
        if name not in entry_of.values():
            raise UserError(f"data.train: all files of {name} belong to entries before it; name each file once")
        members = [at for at, entry in enumerate(entries) if entry == name]
        for at in random.Random(0).sample(members, round(weight % 1 * len(members))):
            times[at] += 1
        used = sum(times[at] for at in members)
        if members and not used:
            raise UserError(f"data.train: weight {weight:g} of {name} leaves none of its {len(members)} rows; raise it")
        counts[name] = {"weight": weight, "rows": len(members), "used": used}
    return [row for row, count in zip(rows, times, strict=True) for _ in range(count)], counts
