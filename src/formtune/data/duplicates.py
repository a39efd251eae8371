"""Texts that are nearly the same: MinHash and locality-sensitive hashing propose pairs, their Jaccard index decides.

A text is the set of its runs of five characters (its shingles). MinHash (Broder, 1997) turns a set into numbers of
which two sets share the more the more similar they are; a pair with an equal band of these numbers is a candidate.
Candidates are compared by their sets, so no reported pair is wrong; about one pair in five hundred is missed.

Each step is a map over texts or a group by key, so the same functions run on several machines (`distributed`): `bands`
maps, equal (band, key) is the group, `similar` judges the pairs of a group, `components` joins them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rensa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

SHINGLE = 5  # characters
PERMUTATIONS = 120  # numbers of a signature
MISSED = 0.003  # of the pairs right at the threshold, at most
TEXTS, PAIRS = 8192, 100_000  # worked on at a time
SEED = 1

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]  # indices i < j, and their Jaccard index

_ODD = np.random.default_rng(SEED).integers(2**63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all shingles of the texts, text after text, and where each text's begin (one more than texts).

    A text that is shorter than a shingle is one shingle.
    """
    gap = "\0" * SHINGLE  # no shingle reaches into the next text, not even that of an empty one
    joined = gap.join((*texts, ""))
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    hashes = np.zeros(max(len(codes) - SHINGLE + 1, 0), np.uint64)
    for at in range(SHINGLE):
        hashes += codes[at : at + len(hashes)] * _ODD[at]
        hashes ^= hashes >> np.uint64(29)
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    offsets = np.concatenate(([0], counts.cumsum()))
    begins = np.concatenate(([0], (lengths + SHINGLE).cumsum()))[:-1]
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
    return hashes[places], offsets


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


def similar(texts: Sequence[str], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
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


def near_pairs(
    texts: Sequence[str], threshold: float, progress: Callable[[Iterator[int], int], Iterator[int]] | None = None
) -> Pairs:
    """All pairs of different texts whose Jaccard index reaches the threshold; `progress` wraps an iterator of steps."""
    starts = range(0, len(texts), TEXTS)
    count = PERMUTATIONS // band_size(threshold)
    steps: Iterator[int] = iter(range(len(starts) + count))
    steps = progress(steps, len(starts) + count) if progress else steps
    keys = np.empty((len(texts), count), np.uint64)
    for start, _ in zip(starts, steps, strict=False):
        keys[start : start + TEXTS] = bands(texts[start : start + TEXTS], threshold)
    pairs: list[Pairs] = []
    for band in range(count):
        for left, right in _candidates(keys, band):
            index = similar(texts, left, right)
            close = index >= threshold
            pairs.append((left[close], right[close], index[close]))
        next(steps, None)
    if not pairs:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0)
    i, j, index = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return i, j, index


def _candidates(keys: NDArray[np.uint64], band: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of indices i < j with equal keys in the band and in no earlier one, so that each pair comes once."""
    order = np.argsort(keys[:, band], kind="stable")
    ordered = keys[order, band]
    places = np.arange(len(order))
    waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for step in itertools.count(1):
        places = places[places + step < len(order)]
        places = places[ordered[places] == ordered[places + step]]
        if not len(places):
            break
        for start in range(0, len(places), PAIRS):
            part = places[start : start + PAIRS]
            left, right = order[part], order[part + step]
            new = ~(keys[left, :band] == keys[right, :band]).any(1)
            waiting.append((left[new], right[new]))
        if sum(len(left) for left, _ in waiting) >= PAIRS:
            yield from _joined(waiting)
            waiting = []
    yield from _joined(waiting)


def _joined(
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if parts:
        left, right = (np.concatenate(part) for part in zip(*parts, strict=True))
        for start in range(0, len(left), PAIRS):
            yield left[start : start + PAIRS], right[start : start + PAIRS]


def components(count: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int32]:
    """For each of `count` texts the number of its cluster: texts that pairs join, directly or in a chain."""
    edges = csr_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]
