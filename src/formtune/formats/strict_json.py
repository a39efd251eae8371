"""JSON as the standard has it: what Python's reader lets through (NaN, duplicate keys, lone surrogates) is an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from formtune.formats.verdict import SyntaxProblem

MAX_DEPTH = 64  # of arrays and objects in each other: what follows values into their depth must not run out of stack
MAX_STARTS = 64  # brackets tried as the beginning of a document within other text
MAX_DIGITS = 300  # of an integer: more do not fit a float, and arithmetic on them raises

_SPACE = " \t\n\r"
_LITERALS = ("True", "False", "None", "NaN", "Infinity", "-Infinity", "undefined", "nan", "inf")
# A string that never ends runs to the end of the text, so that its quotes are not tried one by one.
_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*(?:"|\Z)|([\[{])|[\]}]', re.S)


def loads_strict(text: str) -> Any:
    """The value of a JSON text (RFC 8259) with unique keys, finite numbers and valid Unicode.

    Raises:
        SyntaxProblem: The text is not that; a ValueError whose message is one line.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise SyntaxProblem("other", f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = _STRICT.decode(text)
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _problem(error) from None
    except UnicodeEncodeError:
        raise SyntaxProblem("other", "a lone surrogate is no character") from None
    except _Refused as error:
        raise SyntaxProblem(error.subkind, str(error)) from None
    except RecursionError:
        raise SyntaxProblem("other", "nested too deeply") from None
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

    A document that breaks off is skipped as far as it was read: a part of it is no document of its own.
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
    deepest = depth = 0
    for match in _BRACKET.finditer(text):
        if match[0][0] != '"':
            depth += 1 if match[1] else -1
            deepest = max(deepest, depth)
    return deepest


class _Refused(ValueError):
    def __init__(self, subkind: str, message: str) -> None:
        super().__init__(message)
        self.subkind = subkind


def _constant(name: str) -> NoReturn:
    raise _Refused("literal", f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused("literal", f"{text[:20]} is too large for a number")
    return number


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused("other", f"an integer of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused("duplicate_key", f"the key {twice!r} stands twice")
    return found


_STRICT = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, parse_int=_short, object_pairs_hook=_unique)
_PLAIN = json.JSONDecoder(parse_int=len)  # finds ends only: int() would raise at thousands of digits


def _problem(error: json.JSONDecodeError) -> SyntaxProblem:
    place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
    return SyntaxProblem(_subkind(error), f"{error.msg} at {place}")


def _subkind(error: json.JSONDecodeError) -> str:
    text, at = error.doc, error.pos
    rest, before = text[at:], text[:at].rstrip(_SPACE)
    if "control character" in error.msg:
        return "control_char"
    if re.match(r",?\s*[}\]]", rest) and (before.endswith(",") or rest.startswith(",")):
        return "trailing_comma"
    if rest.lstrip(_SPACE).startswith(_LITERALS):
        return "literal"
    if not rest.strip(_SPACE) or "Unterminated" in error.msg:
        return "unbalanced"
    if rest[0] in "'‘’“”`" or ("double quotes" in error.msg and re.match(r"\w|\$", rest)):
        return "quotes"
    return "other"
