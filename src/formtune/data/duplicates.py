"""Near-duplicate texts: MinHash and LSH propose pairs, the exact Jaccard index of their character 5-grams decides."""

from collections.abc import Sequence

import numpy as np
import rensa
from numpy.typing import NDArray
from scipy.sparse import csr_array, triu
from scipy.sparse.csgraph import connected_components

from formtune.configuration.terminal import shown

SHINGLE = 5  # characters
PERMUTATIONS = 120  # length of a MinHash signature
MAX_MISSED = 0.003  # share of the pairs right at the threshold that are not proposed; of all pairs about 1 in 500
TEXTS, PAIRS = 8192, 100_000  # processed at once
SEED = 1

Indices = NDArray[np.int64]
Pairs = tuple[Indices, Indices, NDArray[np.float64]]  # indices i < j, and their Jaccard index

_ODD = np.random.default_rng(SEED).integers(2**63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], Indices]:
    """Hashes of the shingles (character 5-grams) of all texts, and the offset of each text; short texts have one."""
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
    """Rows of an LSH band: as many as miss no more than `MAX_MISSED` of the pairs at the threshold."""
    sizes = (size for size in range(24, 1, -1) if PERMUTATIONS % size == 0)
    return next((size for size in sizes if (1 - threshold**size) ** (PERMUTATIONS // size) <= MAX_MISSED), 1)


def bands(texts: Sequence[str], threshold: float) -> NDArray[np.uint64]:
    """Band hashes of the texts, shape (texts, bands): texts that share one are candidates."""
    flat, offsets = shingles(texts)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets.astype(np.uint64), PERMUTATIONS, SEED)
    size = band_size(threshold)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), -1, size)
    hashes = np.zeros(signatures.shape[:2], np.uint64)
    for at in range(size):
        hashes = (hashes ^ signatures[..., at]) * _ODD[at]
        hashes ^= hashes >> np.uint64(32)
    # Equal hashes of different bands mean nothing, so a hash includes the index of its band.
    return hashes ^ (np.arange(hashes.shape[1], dtype=np.uint64) << np.uint64(58))


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
    shared = np.asarray(sets[a].multiply(sets[b]).sum(axis=1)).ravel()
    return shared / (sizes[a] + sizes[b] - shared)


def near_pairs(texts: Sequence[str], threshold: float) -> Pairs:
    """Pairs of texts whose Jaccard index reaches the threshold; none is wrong, about one in 500 is missed."""
    hashes = [bands(texts[start : start + TEXTS], threshold) for start in range(0, len(texts), TEXTS)]
    if not hashes:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    columns = np.unique(np.concatenate(hashes), return_inverse=True)[1].ravel()
    offsets = np.arange(len(texts) + 1) * len(hashes[0][0])
    holders = csr_array((np.ones(len(columns), np.bool_), columns, offsets))
    candidates = triu(holders @ holders.T, 1, format="csr").sorted_indices().tocoo()
    left, right = (indices.astype(np.int64) for indices in candidates.coords)
    index = np.zeros(len(left))
    for start in shown(range(0, len(left), PAIRS), -(-len(left) // PAIRS), "comparing"):
        part = slice(start, start + PAIRS)
        index[part] = similar(texts, left[part], right[part])
    close = index >= threshold
    return left[close], right[close], index[close]


def components(count: int, left: Indices, right: Indices) -> NDArray[np.int32]:
    """The cluster number of each of `count` texts; pairs join texts directly or in a chain."""
    edges = csr_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]
