"""Near-duplicates on more than one machine: the functions of `duplicates` as map and group-by-key on Ray Data.

    import ray
    from formtune.data.distributed import near_pairs_on_ray

    pairs = near_pairs_on_ray(ray.data.read_parquet("keys/"), 0.8)  # columns: id (integer) and text

One row for each band of a text travels between machines; the pairs, which are few, come back to one machine. Needs
the extra `scale`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from formtune.data.duplicates import Pairs, bands, similar

GROUP = 2000  # texts of one group compared at a time with all of the group


def near_pairs_on_ray(texts: Any, threshold: float) -> Pairs:
    """As `duplicates.near_pairs`, of a `ray.data.Dataset` with columns `id` (integers) and `text` (each text once)."""

    def explode(batch: dict[str, Any]) -> dict[str, Any]:
        """A row for each band: its key, the text and its id."""
        keys = bands(batch["text"].tolist(), threshold)
        # A band's number goes into its key: equal keys of different bands mean nothing.
        marks = keys ^ (np.arange(keys.shape[1], dtype=np.uint64) << np.uint64(58))
        repeated = np.repeat(np.arange(len(keys)), keys.shape[1])
        return {"mark": marks.ravel().view(np.int64), "id": batch["id"][repeated], "text": batch["text"][repeated]}

    def compare(group: dict[str, Any]) -> dict[str, Any]:
        """The pairs of a group that are near; smaller id first."""
        ids, pairs = group["id"], []
        order = np.argsort(ids, kind="stable")
        texts_, ids = group["text"][order].tolist(), ids[order]
        for start in range(0, len(ids), GROUP):
            i, j = np.meshgrid(np.arange(start, min(start + GROUP, len(ids))), np.arange(len(ids)), indexing="ij")
            left, right = i[i < j], j[i < j]
            index = similar(texts_, left, right) if len(left) else np.zeros(0)
            close = index >= threshold
            pairs.append((ids[left[close]], ids[right[close]], index[close]))
        left, right, index = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return {"left": left, "right": right, "index": index}

    pairs = texts.map_batches(explode).groupby("mark").map_groups(compare).to_pandas()
    pairs = pairs.drop_duplicates(["left", "right"])
    return tuple(pairs[name].to_numpy() for name in ("left", "right", "index"))  # type: ignore[return-value]
