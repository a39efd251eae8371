"""Text that many inputs share, such as an instruction around every message; near-duplicates are found without it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, pairwise
from statistics import median
from typing import Any

# A run is text that many inputs contain letter for letter: at least WINDOW windows of WINDOW words, so 15 words.
WINDOW = 8
MIN_RATIO = 0.8  # of the counts of neighboring windows in a run (lower to higher): it ends where texts branch
RUN_SHARE, MIN_INPUTS = 0.02, 20  # share and number of the sampled inputs that contain a run, at least
# A piece, such as "Message:", is shorter: nearly all inputs contain its words equally often and in the same order.
PIECE_SHARE = 0.9  # of the sampled inputs, at least
MIN_SHARED = 0.65  # median share of shared letters in an input; with less, the words of pieces belong to the message
MAX_SAMPLE = 4000  # inputs

# Scripts without spaces between words: each letter is a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


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
