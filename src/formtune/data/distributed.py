"""`duplicates.near_pairs` on several machines, with Ray Data; needs the extra `scale`."""

from __future__ import annotations

from typing import Any

import numpy as np

from formtune.data.duplicates import Pairs, bands, similar

GROUP = 2000  # texts of one group that are compared at a time with all of the group


def near_pairs_on_ray(texts: Any, threshold: float) -> Pairs:
    """The near pairs of a `ray.data.Dataset`, such as `ray.data.read_parquet("inputs/")`, by their ids.

    Its columns are `id` (integers) and `text` (each text once).
    """

    def explode(batch: dict[str, Any]) -> dict[str, Any]:
        """One row for each band of a text."""
        keys = bands(batch["text"].tolist(), threshold)
        # A band's number goes into its key: equal keys of different bands mean nothing.
        marks = keys ^ (np.arange(keys.shape[1], dtype=np.uint64) << np.uint64(58))
        repeated = np.repeat(np.arange(len(keys)), keys.shape[1])
        return {"mark": marks.ravel().view(np.int64), "id": batch["id"][repeated], "text": batch["text"][repeated]}

    def compare(group: dict[str, Any]) -> dict[str, Any]:
        """The near pairs of texts with the same key."""
        order = np.argsort(group["id"], kind="stable")
        ids, texts = group["id"][order], group["text"][order].tolist()
        pairs = []
        for start in range(0, len(ids), GROUP):
            left, right = np.nonzero(np.arange(start, min(start + GROUP, len(ids)))[:, None] < np.arange(len(ids)))
            left += start
            index = similar(texts, left, right) if len(left) else np.zeros(0)
            close = index >= threshold
            pairs.append((ids[left[close]], ids[right[close]], index[close]))
        return dict(zip(("left", "right", "index"), map(np.concatenate, zip(*pairs, strict=True)), strict=True))

    pairs = texts.map_batches(explode).groupby("mark").map_groups(compare).to_pandas()
    pairs = pairs.drop_duplicates(["left", "right"])
    return tuple(pairs[name].to_numpy() for name in ("left", "right", "index"))  # type: ignore[return-value]
