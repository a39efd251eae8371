"""Text that many inputs share, such as an instruction around every message: the comparison leaves it out.

Below one long instruction all messages look nearly the same. Two kinds of text count as shared, wherever in an input
they are, so that the parts of a template, several templates in one file and few-shot examples are found alike:

* a **run** of at least 15 words that many inputs hold letter for letter;
* short **pieces**, such as "Message:", whose words nearly all inputs hold equally often and in the same order. They
  count only where shared text is most of the text: words that are merely frequent ("play", "by") belong to what is
  said.

Both are found in a sample that the texts alone decide, so rows keep their place whatever their order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 8  # words; a run has as many windows, each shared by about as many inputs, so it begins and ends at a branch
STEADY = 0.8  # the lower of two neighboring windows' counts by the higher, within a run
SHARE, LEAST = 0.02, 20  # of the sampled inputs, and how many at least, that hold a run
NEARLY_ALL = 0.9  # of the inputs hold the words of a short piece equally often
MOST = 0.65  # of an input's letters, in the median, are shared text where short pieces count
INPUTS, WORDS = 4000, 1_000_000  # sampled at most
CHUNK = 8192  # inputs worked on at a time

# Scripts without spaces between words: each letter is a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
_ODD = np.random.default_rng(2).integers(2**63, size=WINDOW, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class Boilerplate:
    """What many of the texts share.

    Args:
        texts: Different inputs, as they are compared.
        places: A number for each that its text alone decides; the inputs with the lowest are the sample.
    """

    def __init__(self, texts: Sequence[str], places: Sequence[float]) -> None:
        self._ids: dict[str, int] = {}
        sample: list[list[str]] = []
        order = np.argsort(np.array(places), kind="stable")[:INPUTS].tolist()
        left = WORDS
        for words in map(_words, map(texts.__getitem__, order)):
            left -= len(words)
            if left < 0 and len(sample) >= 2 * LEAST:
                break
            sample.append(words)
            for word in words:
                self._ids.setdefault(word, len(self._ids))
        ids, owners = self._numbers(sample)
        windows, where = _windows(ids, owners)
        self._windows, self._counts = _inputs_with(windows, owners[where], max(LEAST, SHARE * len(sample)))
        pieces = self._pieces(ids, owners, max(LEAST, NEARLY_ALL * len(sample)))
        letters = np.array([len(word) for words in sample for word in words], np.int64)
        shared = np.bincount(owners, letters * (self._in_runs(ids, owners) | _in_pieces(ids, owners, pieces)))
        counts = bool(len(ids)) and np.median(shared / np.maximum(np.bincount(owners, letters), 1)) >= MOST
        # How often a short piece's word is held; 0: it is none.
        self._often = pieces if counts else np.zeros_like(pieces)

    def _pieces(self, ids: NDArray[np.int64], owners: NDArray[np.int64], least: float) -> NDArray[np.int64]:
        """For each word how often nearly all texts hold it, 0 if they do not, or not in the same order."""
        often = np.zeros(len(self._ids) + 1, np.int64)
        held, counts = np.unique(owners * len(often) + ids, return_counts=True)
        equally, _ = _inputs_with((held % len(often) << 20) + counts, held // len(often), least)
        often[equally >> 20] = equally & (1 << 20) - 1
        found = _in_pieces(ids, owners, often)
        ids, owners = ids[found], owners[found]
        before = np.roll(ids, 1)
        before[np.flatnonzero(np.diff(owners, prepend=-1))] = len(self._ids)  # the text's beginning
        pairs, _ = _inputs_with(before * len(often) + ids, owners, least)
        often[np.setdiff1d(ids, np.concatenate(np.divmod(pairs, len(often))))] = 0
        return often

    def split(self, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """What each text says beyond the shared text (all of it if that is nothing), and the runs that it shares."""
        if not len(self._windows) and not self._often.any():
            yield from ((text, "") for text in texts)
            return
        for start in range(0, len(texts), CHUNK):
            given = list(map(_words, texts[start : start + CHUNK]))
            ids, owners = self._numbers(given)
            runs = self._in_runs(ids, owners)
            own = ~(runs | _in_pieces(ids, owners, self._often))
            ends = np.cumsum([len(words) for words in given]).tolist()
            for words, begin, end in zip(given, [0, *ends], ends, strict=False):
                rest = itertools.compress(words, own[begin:end].tolist())
                yield " ".join(rest) or " ".join(words), " ".join(itertools.compress(words, runs[begin:end].tolist()))

    def _numbers(self, texts: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The number of each word, the highest for all that the sample lacks, and of its text."""
        lengths = [len(words) for words in texts]
        unknown = len(self._ids)
        ids = (self._ids.get(word, unknown) for words in texts for word in words)
        return np.fromiter(ids, np.int64, sum(lengths)), np.repeat(np.arange(len(texts)), lengths)

    def _in_runs(self, ids: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each word whether it is part of a shared run."""
        found = np.zeros(len(ids) + 1, np.int64)
        hashes, where = _windows(ids, owners)
        at = np.searchsorted(self._windows, hashes)
        known = at < len(self._windows)
        known[known] = self._windows[at[known]] == hashes[known]
        where, counts = where[known], self._counts[at[known]]
        if not len(where):
            return found[:-1] > 0
        steady = np.minimum(counts[1:], counts[:-1]) >= STEADY * np.maximum(counts[1:], counts[:-1])
        apart = np.flatnonzero((np.diff(where) > 1) | (np.diff(owners[where]) > 0) | ~steady)
        firsts, lasts = where[np.concatenate(([0], apart + 1))], where[np.concatenate((apart, [len(where) - 1]))]
        long = lasts - firsts + 1 >= WINDOW
        np.add.at(found, firsts[long], 1)
        np.add.at(found, lasts[long] + WINDOW, -1)
        return found[:-1].cumsum() > 0


def _words(text: str) -> list[str]:
    return text.split() if text.isascii() else _WORD.findall(text)


def _windows(ids: NDArray[np.int64], owners: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of each run of `WINDOW` words within a text, and where it begins."""
    count = max(len(ids) - WINDOW + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for at in range(WINDOW):
        hashes += ids[at : at + count].astype(np.uint64) * _ODD[at]
        hashes ^= hashes >> np.uint64(29)
    where = np.flatnonzero(owners[:count] == owners[WINDOW - 1 :]) if count else np.zeros(0, np.int64)
    return hashes[where], where


def _inputs_with(marks: NDArray, owners: NDArray[np.int64], least: float) -> tuple[NDArray, NDArray[np.int64]]:
    """The marks that at least so many texts hold, in order, and how many texts hold each."""
    order = np.lexsort((owners, marks))
    marks, owners = marks[order], owners[order]
    new = np.ones(len(marks), np.bool_)
    new[1:] = (marks[1:] != marks[:-1]) | (owners[1:] != owners[:-1])
    found, counts = np.unique(marks[new], return_counts=True)
    return found[counts >= least], counts[counts >= least]


def _in_pieces(ids: NDArray[np.int64], owners: NDArray[np.int64], often: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each word whether its text holds it as often as a short piece's word is held."""
    _, back, counts = np.unique(owners * len(often) + ids, return_inverse=True, return_counts=True)
    return (counts[back] == often[ids]) & (often[ids] > 0)
