"""A JSON Schema validator (draft 2020-12) that ends in time.

The `jsonschema` library does the work. Replaced are the keywords that hand patterns to `re`, which cannot be stopped,
that compare all pairs of items, or that check no date or time; references look at the clock, because alternatives
that refer to each other can cost two to the power of a document's depth.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import date, datetime
from datetime import time as clock
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from formtune.formats.patterns import compile_pattern

CHECK_SECONDS = 0.5  # of processor time (a busy machine changes no verdict); an ordinary check needs 0.0001

_END: ContextVar[float] = ContextVar("end", default=math.inf)

_DATE, _TIME = r"\d{4}-\d\d-\d\d", r"\d\d:\d\d:\d\d(?:\.\d+)?(?:[zZ]|[+-]\d\d:\d\d)"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def _shape(pattern: str, parse: Callable[[str], Any] = bool) -> Callable[[str], Any]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda text: compiled.fullmatch(text) and parse(text.upper())


# RFC 3339 for dates and times, as the standard asks. Each raises ValueError or returns something false.
FORMATS: dict[str, Callable[[str], Any]] = {
    "date": _shape(_DATE, date.fromisoformat),
    "time": _shape(_TIME, clock.fromisoformat),
    "date-time": _shape(f"{_DATE}[Tt]{_TIME}", datetime.fromisoformat),
    "duration": _shape(r"P(?=.)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=.)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)"),
    "email": _shape(r"[^@\s]+@[^@\s]+"),
    "hostname": _shape(rf"(?=.{{1,253}}\Z){_NAME}(?:\.{_NAME})*"),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": lambda text: "%" not in text and ipaddress.IPv6Address(text),
    "uri": _shape(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+"),
    "uuid": _shape(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"),
}


def errors_in_time(validator: Any, value: Any) -> Iterator[ValidationError]:
    """The errors of a value.

    Raises:
        TimeoutError: They took longer than `CHECK_SECONDS` to find.
    """
    start_clock()
    yield from validator.iter_errors(value)


def start_clock() -> None:
    """Give what follows `CHECK_SECONDS`."""
    _END.set(time.thread_time() + CHECK_SECONDS)


@lru_cache(maxsize=1000)
def compile_ecma(pattern: str) -> Any:
    r"""A pattern as ECMA-262 means it: `$` is the end alone, not also before a last line feed, `\d` is 0 to 9.

    Raises:
        regex.error: As `compile_pattern`.
    """

    def translate(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith("["):
            return re.sub(r"\\.", lambda escape: "0-9" if escape[0] == r"\d" else escape[0], token, flags=re.S)
        return {"$": r"\Z", r"\d": "[0-9]"}.get(token, token)

    return compile_pattern(re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]|\$", translate, pattern, flags=re.S))


def seconds_left() -> float:
    """The time that is left.

    Raises:
        TimeoutError: None is.
    """
    left = _END.get() - time.thread_time()
    if left <= 0:
        raise TimeoutError
    return left


def _matches(pattern: str, text: str) -> bool:
    left = seconds_left()
    return compile_ecma(pattern).search(text, timeout=None if math.isinf(left) else left) is not None


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for pattern, inner in patterns.items():
            for key in value:
                if _matches(pattern, key):
                    yield from validator.descend(value[key], inner, path=key, schema_path=pattern)


def _additional(validator: Any, allowed: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        declared, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for key in value:
            if key not in declared and not any(_matches(pattern, key) for pattern in patterns):
                if allowed is False:
                    yield ValidationError(f"the key {key!r} is not declared")
                else:
                    yield from validator.descend(value[key], allowed, path=key)


def _unique_items(validator: Any, unique: bool, value: Any, schema: Any) -> Iterator[ValidationError]:
    if unique and isinstance(value, list) and len({_frozen(item) for item in value}) < len(value):
        yield ValidationError("items are not unique")


def _frozen(value: Any) -> Any:
    """Hashable and equal where JSON Schema says equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(_frozen(inner) for inner in value)
    return (bool, value) if isinstance(value, bool) else value


def _format(validator: Any, name: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str):
        try:
            good = FORMATS[name](value)
        except ValueError:
            good = False
        if not good:
            yield ValidationError(f"{value!r} is no {name}")


def _on_the_clock(keyword: str) -> Callable[..., Iterator[ValidationError]]:
    follow = Draft202012Validator.VALIDATORS[keyword]

    def check(validator: Any, reference: str, value: Any, schema: Any) -> Iterator[ValidationError]:
        seconds_left()
        yield from follow(validator, reference, value, schema)

    return check


BoundedValidator: Any = extend(
    Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional,
        "uniqueItems": _unique_items,
        "format": _format,
        "$ref": _on_the_clock("$ref"),
        "$dynamicRef": _on_the_clock("$dynamicRef"),
    },
)
