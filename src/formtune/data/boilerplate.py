"""Text that many inputs share, such as an instruction around every message: the near comparison leaves it out.

A run has at least 15 words, letter for letter as in many inputs. A piece, such as "Message:", is shorter: nearly all
inputs hold its words equally often and in the same order. Where little is shared, such words belong to the message.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, pairwise
from statistics import median
from typing import Any

WINDOW = 8  # words; a run has as many windows
STEADY = 0.8  # the lower of two neighboring windows' counts by the higher, within a run: it ends where texts branch
SHARE, LEAST = 0.02, 20  # of the sampled inputs, and how many at least, that hold a run
NEARLY_ALL = 0.9  # of the inputs hold the words of a short piece equally often
MOST = 0.65  # of an input's letters, in the median, are shared text where short pieces count
INPUTS = 4000  # sampled at most

# Scripts without spaces between words: each letter is a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


def split_shared(texts: Sequence[str], hashes: Sequence[float]) -> Iterator[tuple[str, str]]:
    """What each text says beyond shared text (all of it if that is nothing), and the runs that it shares."""
    # The texts with the lowest hashes decide, so that the order of the rows changes nothing.
    sample = [_words(texts[at]) for at in sorted(range(len(texts)), key=hashes.__getitem__)[:INPUTS]]
    windows = _frequent(map(_windows, sample), max(LEAST, SHARE * len(sample)))
    pieces = _short_pieces(sample, max(LEAST, NEARLY_ALL * len(sample)))
    shares = []
    for words in sample:
        flags = zip(words, _in_runs(words, windows), _in_pieces(words, pieces), strict=True)
        shares.append(sum(len(word) for word, run, piece in flags if run or piece) / max(sum(map(len, words)), 1))
    if not shares or median(shares) < MOST:
        pieces = {}
    for text in texts:
        words = _words(text) if windows or pieces else []
        in_run = _in_runs(words, windows)
        own = (not run and not piece for run, piece in zip(in_run, _in_pieces(words, pieces), strict=True))
        yield " ".join(compress(words, own)) or text, " ".join(compress(words, in_run))


def _words(text: str) -> list[str]:
    return text.split() if text.isascii() else _WORD.findall(text)


def _windows(words: list[str]) -> list[int]:
    """The hash of the window that begins at each word."""
    return list(map(hash, zip(*(words[at:] for at in range(WINDOW)), strict=False)))


def _frequent(texts: Iterable[Iterable[Any]], least: float) -> dict[Any, int]:
    """How many texts hold each item, for those that at least so many hold."""
    counts = Counter(item for items in texts for item in set(items))
    return {item: count for item, count in counts.items() if count >= least}


def _short_pieces(sample: list[list[str]], least: float) -> dict[str, int]:
    """The words of short pieces, with how often a text holds each."""
    pieces = dict(_frequent((Counter(words).items() for words in sample), least).keys())  # of (word, count) pairs
    orders = (pairwise(["", *compress(words, _in_pieces(words, pieces))]) for words in sample)
    ordered = {word for pair in _frequent(orders, least) for word in pair}
    return {word: count for word, count in pieces.items() if word in ordered}


def _in_pieces(words: list[str], pieces: dict[str, int]) -> list[bool]:
    """For each word whether it is one of a short piece, and the text holds it as often."""
    counts = Counter(words) if pieces else {}
    return [word in pieces and counts[word] == pieces[word] for word in words]


def _in_runs(words: list[str], windows: dict[int, int]) -> list[bool]:
    """For each word whether it is part of a shared run."""
    in_run = [False] * len(words)
    start = previous = 0
    for at, window in enumerate([*_windows(words), 0]):
        count = windows.get(window, 0)
        if not min(count, previous) >= STEADY * max(count, previous, 1):
            if at - start >= WINDOW and previous:
                in_run[start : at - 1 + WINDOW] = [True] * (at - 1 + WINDOW - start)
            start = at
        previous = count
    return in_run
