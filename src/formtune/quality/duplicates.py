"""Near-duplicate texts: MinHash and LSH propose pairs, the exact Jaccard index of their character 5-grams decides."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, pairwise
from statistics import median
from typing import Any

import numpy as np
import rensa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from formtune.configuration.terminal import progress

SHINGLE = 5  # characters
PERMUTATIONS = 120  # length of a MinHash signature
MAX_MISSED = 0.003  # miss rate for pairs exactly at the threshold; over all pairs about 1 in 500
TEXTS, PAIRS = 8192, 20_000  # processed at once
MAX_BUCKET = 16  # texts that a text with the same band is compared with
SEED = 1

Indices = NDArray[np.int64]
Pairs = tuple[Indices, Indices, NDArray[np.float64]]  # indices i < j, and their Jaccard index

_ODD = np.random.default_rng(SEED).integers(2**63, size=64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

# A run is text that many inputs contain letter for letter: at least WINDOW windows of WINDOW words, so 15 words.
WINDOW = 8
MIN_RATIO = 0.8  # of the counts of neighboring windows in a run (lower to higher): it ends where texts branch
RUN_SHARE, MIN_INPUTS = 0.02, 20  # share and number of the sampled inputs that contain a run, at least
# A piece, such as "Message:", is shorter: nearly all inputs contain its words equally often and in the same order.
PIECE_SHARE = 0.9  # of the sampled inputs, at least
MIN_SHARED = 0.65  # median fraction of shared letters in an input; with less, the words of pieces belong to the message
MAX_SAMPLE = 4000  # inputs

# Scripts without spaces between words: each letter is a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


def near_duplicates(
    texts: Sequence[str], hashes: Sequence[float], threshold: float
) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Each text and its shared runs, see `split_shared`; and the pairs of texts whose other parts are near-duplicates.

    `hashes` order the texts; `threshold` is the Jaccard index from which two are near-duplicates.
    """
    parts = list(split_shared(texts, hashes))
    left, right, _ = near_pairs([rest for rest, _ in parts], threshold)
    return parts, list(zip(left.tolist(), right.tolist(), strict=True))


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
    """Pairs of texts whose Jaccard index reaches the threshold; no false positives, about 1 in 500 is missed.

    If more than `MAX_BUCKET` texts share a band, each is compared with only that many, so that time stays linear for
    rows of one template. More pairs are missed there: of 3,000 such rows, a quarter of the pairs at the threshold.
    """
    hashes = [bands(texts[start : start + TEXTS], threshold) for start in range(0, len(texts), TEXTS)]
    if not hashes:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    left, right = _candidates(np.concatenate(hashes))
    index = np.zeros(len(left))
    for start in progress(range(0, len(left), PAIRS), -(-len(left) // PAIRS), "comparing"):
        part = slice(start, start + PAIRS)
        index[part] = similar(texts, left[part], right[part])
    close = index >= threshold
    return left[close], right[close], index[close]


def _candidates(hashes: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """The different pairs of texts that share a band, from their band hashes."""
    pairs = np.zeros(0, np.int64)  # as one number each
    for band in hashes.T:
        order = band.argsort(kind="stable")
        at, shared = np.arange(len(order)), [pairs]
        for distance in range(1, MAX_BUCKET + 1):
            at = at[: np.searchsorted(at, len(order) - distance)]
            at = at[band[order[at]] == band[order[at + distance]]]
            shared.append(order[at] * len(order) + order[at + distance])
        pairs = np.unique(np.concatenate(shared))
    return pairs // max(len(hashes), 1), pairs % max(len(hashes), 1)


def split_shared(texts: Sequence[str], hashes: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Each text without shared text (all of it if nothing remains), and its shared runs."""
    # The texts with the lowest hashes decide, so that the order of the rows changes nothing.
    sample = [_words(texts[at]) for at in sorted(range(len(texts)), key=hashes.__getitem__)[:MAX_SAMPLE]]
    windows = _frequent(map(_windows, sample), max(MIN_INPUTS, RUN_SHARE * len(sample)))
    pieces = _short_pieces(sample, max(MIN_INPUTS, PIECE_SHARE * len(sample)))
    shares = []
    for words in sample:
        flags = zip(words, _in_runs(words, windows), _in_pieces(words, pieces), strict=True)
        shares.append(sum(len(word) for word, run, piece in flags if run or piece) / max(sum(map(len, words)), 1))
    if not shares or median(shares) < MIN_SHARED:
        pieces = {}
    for text in texts:
        words = _words(text) if windows or pieces else []
        in_run = _in_runs(words, windows)
        unshared = (not run and not piece for run, piece in zip(in_run, _in_pieces(words, pieces), strict=True))
        yield " ".join(compress(words, unshared)) or text, " ".join(compress(words, in_run))


def _words(text: str) -> list[str]:
    return text.split() if text.isascii() else _WORD.findall(text)


def _windows(words: list[str]) -> list[int]:
    """The hashes of the windows, by their first word."""
    return list(map(hash, zip(*(words[at:] for at in range(WINDOW)), strict=False)))


def _frequent(texts: Iterable[Iterable[Any]], least: float) -> dict[Any, int]:
    """The number of texts that contain an item, for items in at least `least` texts."""
    counts = Counter(item for items in texts for item in set(items))
    return {item: count for item, count in counts.items() if count >= least}


def _short_pieces(sample: list[list[str]], least: float) -> dict[str, int]:
    """The words of short pieces, and how often a text contains each."""
    pieces = dict(_frequent((Counter(words).items() for words in sample), least).keys())  # of (word, count) pairs
    orders = (pairwise(["", *compress(words, _in_pieces(words, pieces))]) for words in sample)
    ordered = {word for pair in _frequent(orders, least) for word in pair}
    return {word: count for word, count in pieces.items() if word in ordered}


def _in_pieces(words: list[str], pieces: dict[str, int]) -> list[bool]:
    """For each word, whether it is in a short piece and the text contains it equally often."""
    counts = Counter(words) if pieces else {}
    return [word in pieces and counts[word] == pieces[word] for word in words]


def _in_runs(words: list[str], windows: dict[int, int]) -> list[bool]:
    in_run = [False] * len(words)
    start = previous = 0
    for at, window in enumerate([*_windows(words), 0]):
        count = windows.get(window, 0)
        if not min(count, previous) >= MIN_RATIO * max(count, previous, 1):
            if at - start >= WINDOW and previous:
                in_run[start : at - 1 + WINDOW] = [True] * (at - 1 + WINDOW - start)
            start = at
        previous = count
    return in_run
