"""JSON as the standard has it: what Python's reader lets through (NaN, duplicate keys, lone surrogates) is an error."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from formtune.formats.contract import SyntaxProblem

_SPACE = " \t\n\r"
_LITERALS = ("True", "False", "None", "NaN", "Infinity", "-Infinity", "undefined", "nan", "inf")


def loads_strict(text: str) -> Any:
    """The value of a JSON text (RFC 8259) with unique keys, finite numbers and valid Unicode.

    Raises:
        SyntaxProblem: The text is not that; a ValueError whose message is one line.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise SyntaxProblem(_subkind(error), f"{error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise SyntaxProblem("other", "a lone surrogate is no character") from None
    except RecursionError:
        raise SyntaxProblem("other", "nested too deeply") from None
    except _Refused as error:
        raise SyntaxProblem(error.subkind, str(error)) from None
    except ValueError:  # int() refuses thousands of digits
        raise SyntaxProblem("other", "a number has too many digits") from None
    return value


def document_end(text: str, start: int) -> int | None:
    """Where the JSON document that begins at `start` ends, None if there is none."""
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused("duplicate_key", f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, object_pairs_hook=_unique)


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
    if rest[0] in "'‘’“”`" or "double quotes" in error.msg:
        return "quotes"
    return "other"
