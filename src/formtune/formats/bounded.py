"""A JSON Schema validator and regular expressions with bounds of time and memory, whatever the text.

The `jsonschema` library validates, but for the keywords that hand patterns to `re`, which has no timeout, that compare
all pairs of items, or that follow references: alternatives that refer to each other can cost 2**depth.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from datetime import time as clock
from functools import cache, lru_cache
from typing import Any

import referencing
import referencing.jsonschema
import regex
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from formtune.formats.content import typed

ROOT_ONLY = ("$schema", "$id")
CHECK_SECONDS = 0.5  # of processor time, so that a busy machine changes no verdict; an ordinary check needs 0.0001
MAX_STEPS = 100_000  # of a pattern with its repetitions written out, some 30 MB

_END: ContextVar[float] = ContextVar("end", default=1e9)

_TIME = r"\d\d:\d\d:\d\d(?:\.\d+)?(?:[zZ]|[+-]\d\d:\d\d)"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def _shape(pattern: str, parse: Callable[[str], Any] = bool) -> tuple[Callable[[Any], Any], type[Exception]]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: not isinstance(value, str) or (compiled.fullmatch(value) and parse(value.upper())), ValueError


FORMATS = FormatChecker(("date", "ipv4", "ipv6"))
FORMATS.checkers |= {  # which the library leaves to other packages, or does not check to the end
    "time": _shape(_TIME, clock.fromisoformat),
    "date-time": _shape(rf"\d{{4}}-\d\d-\d\d[Tt]{_TIME}", datetime.fromisoformat),
    "duration": _shape(r"P(?=.)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=.)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)"),
    "email": _shape(r"[^@\s]+@[^@\s]+"),
    "hostname": _shape(rf"(?=.{{1,253}}\Z){_NAME}(?:\.{_NAME})*"),
    "uri": _shape(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+"),
    "uuid": _shape(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"),
}


@contextmanager
def time_limit() -> Iterator[None]:
    """Stop the work within by a TimeoutError after `CHECK_SECONDS`, or earlier if an outer limit ends."""
    token = _END.set(min(_END.get(), time.thread_time() + CHECK_SECONDS))
    try:
        yield
    finally:
        _END.reset(token)


def seconds_left() -> float:
    """The time that is left; raises TimeoutError if there is none."""
    left = _END.get() - time.thread_time()
    if left <= 0:
        raise TimeoutError
    return left


def compile_pattern(pattern: str) -> Any:
    """Compile a pattern of the `regex` package; raises `regex.error` also if it is too large."""
    # `regex` writes a repetition out as often as it must match: the counts of groups multiply.
    counts = [(before, max(int(count), 1)) for before, count in re.findall(r"(.?)\{(\d{1,9})", pattern, re.S)]
    of_characters = [count for before, count in counts if re.match(r"[\w\].]", before)]
    of_groups = [count for before, count in counts if not re.match(r"[\w\].]", before)]
    if (len(pattern) + sum(of_characters)) * math.prod(of_groups) > MAX_STEPS:
        raise regex.error(f"its repetitions amount to more than {MAX_STEPS:,} steps")
    try:
        return regex.compile(pattern)
    except RecursionError:
        raise regex.error("nested too deeply") from None


@lru_cache(maxsize=1000)
def compile_ecma(pattern: str) -> Any:
    r"""As `compile_pattern`, with ECMA-262's meaning: `$` is only the end, not before a last line feed; `\d` is 0-9."""

    def translate(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith("["):
            return re.sub(r"\\.", lambda escape: "0-9" if escape[0] == r"\d" else escape[0], token, flags=re.S)
        return {"$": r"\Z", r"\d": "[0-9]"}.get(token, token)

    return compile_pattern(re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]|\$", translate, pattern, flags=re.S))


def _matches(pattern: str, text: str) -> bool:
    return compile_ecma(pattern).search(text, timeout=seconds_left()) is not None


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
    # 1 and 1.0 are equal here, 1 and true are not.
    if unique and isinstance(value, list):
        distinct = {typed(item, scalar=lambda inner: (isinstance(inner, bool), inner)) for item in value}
        if len(distinct) < len(value):
            yield ValidationError("items are not unique")


def resolver(root: dict[str, Any]) -> Callable[[str], Any]:
    """The function that looks up references within a schema; it raises `Unresolvable` and never fetches anything."""
    resource = referencing.jsonschema.DRAFT202012.create_resource(root)
    within = referencing.Registry().with_resource("", resource).resolver()
    return cache(lambda reference: within.lookup(reference).contents)


def bounded_validator(schema: dict[str, Any]) -> Any:
    """The validator of a schema without references to other files."""
    # With `$schema` in it a reference to the root would leave the keywords below for the library's own.
    root = {key: value for key, value in schema.items() if key not in ROOT_ONLY}
    resolve = resolver(root)

    def follow(validator: Any, reference: str, value: Any, schema: Any) -> Iterator[ValidationError]:
        seconds_left()
        yield from validator.descend(value, resolve(reference))

    keywords = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional,
        "uniqueItems": _unique_items,
        "$ref": follow,
        "$dynamicRef": follow,
    }
    cls: Any = extend(Draft202012Validator, keywords)
    return cls(root, registry=referencing.Registry(), format_checker=FORMATS)
