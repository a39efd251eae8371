"""JSON by the standard: NaN, duplicate keys and lone surrogates, which Python's reader accepts, are errors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NoReturn

from formtune.formats.format import SyntaxProblem

MAX_DEPTH = 64  # of arrays and objects in each other: recursive functions must not run out of stack
MAX_STARTS = 64  # brackets tried as the beginning of a document within other text
MAX_DIGITS = 300  # of an integer: more do not fit a float, and arithmetic on them raises

# A string that never ends runs to the end of the text, so that its quotes are not tried one by one.
_NOT_A_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*(?:"|\Z)|[^"\[{\]}]+', re.S)


def loads_strict(text: str) -> Any:
    """The value of a JSON text (RFC 8259) with unique keys, finite numbers and valid Unicode.

    Raises:
        SyntaxProblem: The text is not that; a ValueError whose message is one line.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise SyntaxProblem(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = _STRICT.decode(text)
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _problem(error) from None
    except UnicodeEncodeError:
        raise SyntaxProblem("a lone surrogate is not a character") from None
    except RecursionError:
        raise SyntaxProblem("nested too deeply") from None
    return value


def first_error(text: str, start: int) -> SyntaxProblem | None:
    """Why no JSON document begins at `start`, None if one does or if only its values are refused."""
    try:
        _PLAIN.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return _problem(error)
    except (ValueError, RecursionError):
        pass
    return None


def find_documents(text: str, start: int, brackets: str) -> Iterator[tuple[int, int]]:
    """Spans of the outermost JSON documents that begin with one of `brackets`.

    A document that breaks off is skipped as far as it was read: a part of it is not a document.
    """
    opening = re.compile(f"[{re.escape(brackets)}]")
    for _ in range(MAX_STARTS):
        if (match := opening.search(text, start)) is None:
            return
        try:
            start = _PLAIN.raw_decode(text, match.start())[1]
        except json.JSONDecodeError as error:
            if "Unterminated" in error.msg:  # its position is where the string begins, and it takes all the rest
                return
            start = max(error.pos, match.end())
        except (ValueError, RecursionError):
            return
        else:
            yield match.start(), start


def _depth(text: str) -> int:
    brackets = _NOT_A_BRACKET.sub("", text)
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _constant(name: str) -> NoReturn:
    raise SyntaxProblem(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise SyntaxProblem(f"{text[:20]} is too large for a number")
    return number


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise SyntaxProblem(f"an integer of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise SyntaxProblem(f"duplicate key {key!r}")
    return value


_STRICT = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, parse_int=_short, object_pairs_hook=_unique)
_PLAIN = json.JSONDecoder(parse_int=len)  # finds ends only: int() would raise at thousands of digits


def _problem(error: json.JSONDecodeError) -> SyntaxProblem:
    place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
    return SyntaxProblem(f"{error.msg.removesuffix(' at')} at {place}")
