"""Texts that are nearly the same: MinHash and LSH propose pairs, their exact Jaccard index decides.

A text is the set of its shingles (runs of five characters). No reported pair is wrong; about one in 500 is missed.
`bands` and `similar` work on any part of the texts, so that `distributed` can run them on several machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import rensa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from formtune.data.progress import shown

SHINGLE = 5  # characters
PERMUTATIONS = 120  # numbers of a signature
MISSED = 0.003  # of the pairs right at the threshold, at most
TEXTS, PAIRS = 8192, 100_000  # processed at a time
SEED = 1

Indices = NDArray[np.int64]
Pairs = tuple[Indices, Indices, NDArray[np.float64]]  # indices i < j, and their Jaccard index

_ODD = np.random.default_rng(SEED).integers(2**63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], Indices]:
    """Hashes of the shingles of all texts, and the offset of each text's first one; a short text is one shingle."""
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = np.zeros(max(len(codes) - SHINGLE + 1, 0), np.uint64)
    for at in range(SHINGLE):
        hashes += codes[at : at + len(hashes)] * _ODD[at]
        hashes ^= hashes >> np.uint64(29)
    lengths = np.array([len(text) for text in padded], np.int64)
    in_one_text = np.ones(len(codes), np.bool_)
    for back in range(1, SHINGLE):
        in_one_text[lengths.cumsum() - back] = False
    offsets = np.concatenate(([0], (lengths - SHINGLE + 1).cumsum()))
    return hashes[in_one_text[: len(hashes)]], offsets


def band_size(threshold: float) -> int:
    """Numbers of a band: as many as miss no more than `MISSED` of the pairs at the threshold."""
    sizes = (size for size in range(24, 1, -1) if PERMUTATIONS % size == 0)
    return next((size for size in sizes if (1 - threshold**size) ** (PERMUTATIONS // size) <= MISSED), 1)


def bands(texts: Sequence[str], threshold: float) -> NDArray[np.uint64]:
    """Keys of the texts, shape (texts, bands): texts that share one in the same band are candidates."""
    flat, offsets = shingles(texts)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets.astype(np.uint64), PERMUTATIONS, SEED)
    size = band_size(threshold)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), -1, size)
    keys = np.zeros(signatures.shape[:2], np.uint64)
    for at in range(size):
        keys = (keys ^ signatures[..., at]) * _ODD[at]
        keys ^= keys >> np.uint64(32)
    return keys


def similar(texts: Sequence[str], left: Indices, right: Indices) -> NDArray[np.float64]:
    """The Jaccard index of each pair of texts, by their indices."""
    used, where = np.unique(np.concatenate((left, right)), return_inverse=True)
    flat, offsets = shingles([texts[i] for i in used.tolist()])
    names, columns = np.unique(flat, return_inverse=True)
    sets = csr_array((np.ones(len(flat), np.float32), columns, offsets), shape=(len(used), len(names)))
    sets.sum_duplicates()
    sets.data[:] = 1
    a, b = where[: len(left)], where[len(left) :]
    sizes = np.diff(sets.indptr)
    both = np.asarray(sets[a].multiply(sets[b]).sum(axis=1)).ravel()
    return both / (sizes[a] + sizes[b] - both)


def near_pairs(texts: Sequence[str], threshold: float) -> Pairs:
    """All pairs of texts whose Jaccard index reaches the threshold."""
    keys = [bands(texts[start : start + TEXTS], threshold) for start in range(0, len(texts), TEXTS)]
    left, right = _candidates(np.concatenate(keys)) if keys else np.zeros((2, 0), np.int64)
    index = np.zeros(len(left))
    for start in shown(range(0, len(left), PAIRS), -(-len(left) // PAIRS), "comparing"):
        part = slice(start, start + PAIRS)
        index[part] = similar(texts, left[part], right[part])
    close = index >= threshold
    return left[close], right[close], index[close]


def _candidates(keys: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """All pairs of indices i < j with an equal key in any band."""
    pairs = []
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        ordered, places = band[order], np.arange(len(order))
        for step in itertools.count(1):
            places = places[places + step < len(order)]
            places = places[ordered[places] == ordered[places + step]]
            if not len(places):
                break
            pairs.append(order[places] * len(order) + order[places + step])
    return np.divmod(np.unique(np.concatenate(pairs or [np.zeros(0, np.int64)])), len(keys))


def components(count: int, left: Indices, right: Indices) -> NDArray[np.int32]:
    """For each of `count` texts the number of its cluster: texts that pairs join, directly or in a chain."""
    edges = csr_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]
