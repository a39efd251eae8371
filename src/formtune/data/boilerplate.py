"""Text that many inputs share, such as an instruction around every message: the near comparison leaves it out.

It is a run of at least 15 words, letter for letter as in many inputs.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress

WINDOW = 8  # words; a run has as many windows
STEADY = 0.8  # the lower of two neighboring windows' counts by the higher, within a run: it ends where texts branch
SHARE, LEAST = 0.02, 20  # of the sampled inputs, and how many at least, that hold a run
INPUTS = 4000  # sampled at most

# Scripts without spaces between words: each letter is a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


def split_shared(texts: Sequence[str], hashes: Sequence[float]) -> Iterator[tuple[str, str]]:
    """What each text says beyond shared text (all of it if that is nothing), and the runs that it shares."""
    # The texts with the lowest hashes decide, so that the order of the rows changes nothing.
    sample = sorted(range(len(texts)), key=hashes.__getitem__)[:INPUTS]
    counts = Counter(window for at in sample for window in set(_windows(_words(texts[at]))))
    least = max(LEAST, SHARE * len(sample))
    windows = {window: count for window, count in counts.items() if count >= least}
    for text in texts:
        words = _words(text) if windows else []
        in_run = _in_runs(words, windows)
        own = " ".join(word for word, shared in zip(words, in_run, strict=True) if not shared)
        yield own or text, " ".join(compress(words, in_run))


def _words(text: str) -> list[str]:
    return text.split() if text.isascii() else _WORD.findall(text)


def _windows(words: list[str]) -> list[int]:
    """The hash of the window that begins at each word."""
    return list(map(hash, zip(*(words[at:] for at in range(WINDOW)), strict=False)))


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
