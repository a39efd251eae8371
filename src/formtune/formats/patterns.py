"""Regular expressions from a contract, compiled within bounds: of memory here, of time where they are matched."""

from __future__ import annotations

import math
import re
from typing import Any

import regex

MAX_STEPS = 100_000  # of a pattern with its repetitions written out, some 30 MB

_PIECE = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<comment>\(\?#[^)]*\))|(?P<open>\()|(?P<close>\))|\{(?P<least>\d+)|.", re.S
)
_OTHER_SYNTAX = re.compile(r"\(\?[\w-]*[xV]")  # comments and nested sets, in which a bracket may be no bracket


def compile_pattern(pattern: str) -> Any:
    """Compile a pattern in the syntax of the `regex` package.

    Raises:
        regex.error: It is none, or its repetitions would take too much memory.
    """
    if _steps(pattern) > MAX_STEPS:
        raise regex.error(f"its repetitions amount to more than {MAX_STEPS:,} steps")
    try:
        return regex.compile(pattern)
    except RecursionError:
        raise regex.error("nested too deeply") from None


def _steps(pattern: str) -> int:
    """About how large the compiled pattern is: `regex` writes a repetition out as often as it has to match."""
    if _OTHER_SYNTAX.search(pattern):
        return len(pattern) * math.prod(_count(least) for least in re.findall(r"\{(\d+)", pattern))
    sizes, last = [0], 0  # of the groups that are open, and of what a repetition would repeat
    for piece in _PIECE.finditer(pattern):
        if piece["comment"]:
            continue
        if piece["open"]:
            sizes.append(0)
        elif piece["close"]:
            last = sizes.pop() if len(sizes) > 1 else 0
            sizes[-1] += last
        elif piece["least"]:
            more = last * (_count(piece["least"]) - 1)
            sizes[-1] += more
            last += more
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def _count(least: str) -> int:
    return max(int(least), 1) if len(least) < 10 else 10**9
