"""Near-duplicates of more texts than one machine can compare, by the functions that formtune uses itself, on Ray.

    pairs = near_pairs_on_ray(ray.data.from_items([{"id": 0, "text": "..."}, ...]), 0.8)

Needs the extra `scale`.
"""

from typing import Any

import numpy as np

from formtune.quality.duplicates import Pairs, bands, similar

BLOCK = 2000  # texts of a group, compared with all others at a time


def near_pairs_on_ray(texts: Any, threshold: float) -> Pairs:
    """As `near_pairs` of formtune, on several machines, by id.

    `texts` is a `ray.data.Dataset` with the columns `id` (integers) and `text` (each text once).
    """

    def explode(batch: dict[str, Any]) -> dict[str, Any]:
        """One row for each mark of a text."""
        marks = bands(batch["text"].tolist(), threshold)
        repeated = np.repeat(np.arange(len(marks)), marks.shape[1])
        return {"mark": marks.ravel().view(np.int64), "id": batch["id"][repeated], "text": batch["text"][repeated]}

    def compare(group: dict[str, Any]) -> dict[str, Any]:
        """The near pairs of texts with the same mark."""
        order = np.argsort(group["id"], kind="stable")
        ids = group["id"][order]
        texts, parts = group["text"][order].tolist(), []
        for first in range(0, len(ids), BLOCK):  # all pairs of a large group do not fit into memory at once
            rows = np.arange(first, min(first + BLOCK, len(ids)))
            left, right = np.nonzero(rows[:, None] < np.arange(len(ids)))
            index = similar(texts, left := left + first, right) if len(left) else np.zeros(0)
            close = index >= threshold
            parts.append((ids[left[close]], ids[right[close]], index[close]))
        return dict(zip(("left", "right", "index"), map(np.concatenate, zip(*parts, strict=True)), strict=True))

    pairs = texts.map_batches(explode).groupby("mark").map_groups(compare).to_pandas()
    pairs = pairs.drop_duplicates(["left", "right"])
    return tuple(pairs[name].to_numpy() for name in ("left", "right", "index"))  # type: ignore[return-value]
