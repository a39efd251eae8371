"""JSON by the standard: NaN, duplicate keys and lone surrogates, which Python's reader accepts, are errors."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from formtune.formats.format import SyntaxProblem

MAX_DEPTH = 64  # levels of nesting, so that recursive functions do not run out of stack
MAX_STARTS = 64  # brackets tried as the beginning of a document within other text
MAX_DIGITS = 300  # of an integer: more do not fit a float, and arithmetic on them raises


def loads_strict(text: str, constants: bool = False) -> Any:
    """The value of a JSON text by RFC 8259, or SyntaxProblem; `constants` allows NaN and Infinity, as pandas writes."""
    try:
        value = (_WITH_CONSTANTS if constants else _STRICT).decode(text)
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise SyntaxProblem(f"{error.msg.removesuffix(' at')} at {position}") from None
    except UnicodeEncodeError:
        raise SyntaxProblem("a lone surrogate is not a character") from None
    except RecursionError:
        raise SyntaxProblem(f"nested deeper than {MAX_DEPTH} levels") from None
    return value


def find_documents(text: str, start: int, brackets: str) -> Iterator[tuple[int, int]]:
    """Spans of the outermost JSON documents that begin with one of `brackets`; parts of a broken one do not count."""
    opening = re.compile(f"[{re.escape(brackets)}]")
    for _ in range(MAX_STARTS):
        if (match := opening.search(text, start)) is None:
            return
        try:
            start = PLAIN.raw_decode(text, match.start())[1]
        except json.JSONDecodeError as error:
            if "Unterminated" in error.msg:  # a string to the end of the text; the position is its beginning
                return
            start = max(error.pos, match.end())
        except (ValueError, RecursionError):
            return
        else:
            yield match.start(), start


def value_spans(text: str, start: int = 0, path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """The dotted path and the span (see `Format.value_spans`) of the document and each value outside of arrays."""
    value, end = _STRICT.raw_decode(text, start)
    yield path, (start, end + (text[start] not in '"{['))
    at = start + 1
    for key in value if isinstance(value, dict) else ():
        _, at = _STRICT.raw_decode(text, _skip(text, at))
        at = _skip(text, at)
        yield from value_spans(text, at, f"{path}.{key}" if path else key)
        _, at = _STRICT.raw_decode(text, at)


def _skip(text: str, at: int) -> int:
    """Where the next value or key begins."""
    return next(i for i in range(at, len(text)) if text[i] not in " \t\n\r,:")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        depth += 1
    return depth


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
_WITH_CONSTANTS = json.JSONDecoder(parse_float=_finite, parse_int=_short, object_pairs_hook=_unique)
PLAIN = json.JSONDecoder(parse_int=len)  # finds ends only: int() would raise at thousands of digits
