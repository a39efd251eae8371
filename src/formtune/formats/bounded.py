"""JSON Schema validation and regular expressions, bounded in time and memory for every text."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from datetime import time as clock
from fractions import Fraction
from functools import cache, lru_cache
from itertools import islice
from typing import Any
from urllib.parse import unquote

import regex
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from formtune.formats.content import typed

CHECK_SECONDS = 0.5  # CPU time, so that a busy machine changes no verdict; an ordinary check takes 0.0001
MAX_REPEATS = 100_000  # repetitions in a pattern; the `regex` package expands those that must match

_DEADLINE: ContextVar[float] = ContextVar("deadline", default=1e9)
_PROBING: ContextVar[bool] = ContextVar("probing", default=False)  # True while the alternatives of a union are tried

_ECMA = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|[$.]", re.S)
_CLASSES = {  # character classes of ECMA-262: ASCII digits and word characters, Unicode whitespace
    r"\d": "0-9",
    r"\D": r"\x00-/:-\U0010ffff",
    r"\w": "0-9A-Z_a-z",
    r"\W": r"\x00-/:-@\[-\^`{-\U0010ffff",
    r"\s": r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
    r"\S": r"\x00-\x08\x0e-\x1f!-\u009f\u00a1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\ufefe\uff00-\U0010ffff",
    ".": r"\x00-\t\x0b\x0c\x0e-\u2027\u202a-\U0010ffff",
}
# In a character class: text to keep (group 1), and characters that Rust's regex (in grammars) may read as operators.
_IN_CLASS = re.compile(r"(^\[\^?-?|\\.|\[:\^?\w+:\])|--|[\[&~]", re.S)
# In a character class: a hyphen beside an escape such as \d, which is no range; other escapes are kept.
_NO_RANGE = re.compile(r"(\\[dDwWsS])-(?!\])|\\.|(?<!\[)-(?=\\[dDwWsS])", re.S)
_ANCHORS = {r"\A": "^", r"\Z": "$", r"\z": "$"}  # not in ECMA-262, but widely used
_ANCHOR_PATTERNS = {"$": r"\Z", r"\b": r"(?a:\b)", r"\B": r"(?a:\B)"}

_TIME = r"\d\d:\d\d:\d\d(?:\.\d+)?(?:[zZ]|[+-]\d\d:\d\d)"


def _format_check(pattern: str, parse: Callable[[str], Any] = bool) -> tuple[Callable[[Any], Any], type[Exception]]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: not isinstance(value, str) or (compiled.fullmatch(value) and parse(value.upper())), ValueError


FORMATS = FormatChecker(("date", "ipv4", "ipv6"))
FORMATS.checkers |= {  # formats that the library leaves to other packages, or checks only in part
    "time": _format_check(_TIME, clock.fromisoformat),
    "date-time": _format_check(rf"\d{{4}}-\d\d-\d\d[Tt]{_TIME}", datetime.fromisoformat),
    "duration": _format_check(r"P(?=.)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=.)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)"),
    "email": _format_check(r"[^@\s]+@[^@\s]+"),
    "uri": _format_check(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+"),
    "uuid": _format_check(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"),
}


@contextmanager
def time_limit() -> Iterator[None]:
    """Limit a block to `CHECK_SECONDS`, or to the rest of an outer limit; `seconds_left` raises the TimeoutError."""
    token = _DEADLINE.set(min(_DEADLINE.get(), time.thread_time() + CHECK_SECONDS))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def seconds_left() -> float:
    """Seconds until the time limit; raises TimeoutError after it."""
    left = _DEADLINE.get() - time.thread_time()
    if left <= 0:
        raise TimeoutError
    return left


def compile_pattern(pattern: str) -> Any:
    """Compile a pattern of the `regex` package; raises `regex.error` also if it is too large."""
    single, grouped = (map(int, re.findall(before + r"\s*\{(\d{1,9})", pattern)) for before in (r"(?<!\))", r"\)"))
    if max(sum(single), 1) * math.prod(count or 1 for count in grouped) > MAX_REPEATS:
        raise regex.error(f"its repetitions amount to more than {MAX_REPEATS:,}")
    try:
        return regex.compile(pattern)
    except RecursionError:
        raise regex.error("nested too deeply") from None
    except ValueError as error:  # flags that exclude one another
        raise regex.error(str(error)) from None


def escape_class(text: str) -> str:
    """Escape the operators in a character class: `[a&&[b]` must not become an intersection in a grammar."""
    return _IN_CLASS.sub(lambda match: match[1] or f"{match[0][:-1]}\\{match[0][-1]}", text)


@lru_cache(maxsize=1000)
def compile_ecma(pattern: str) -> Any:
    """Compile a pattern as ECMA-262 defines it: `$` matches only at the end, not before a final line feed."""
    return compile_pattern(_ECMA.sub(lambda match: _ANCHOR_PATTERNS.get(match[0], match[0]), ecma(pattern)))


def ecma(pattern: str) -> str:
    r"""Replace `.`, `\d`, `\w`, `\s` and their opposites by the characters that ECMA-262 defines for them."""

    def write_out(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith("["):
            token = _NO_RANGE.sub(lambda m: f"{m[1]}\\-" if m[1] else "\\-" if m[0] == "-" else m[0], token)
            return escape_class(re.sub(r"\\.", lambda escape: _CLASSES.get(escape[0], escape[0]), token, flags=re.S))
        return f"[{_CLASSES[token]}]" if token in _CLASSES else _ANCHORS.get(token, token)

    return _ECMA.sub(write_out, pattern)


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


def _multiple_of(validator: Any, divisor: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    # As decimals: for floats, 19.99 / 0.01 is 1998.9999999999998.
    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value!r} is not a multiple of {divisor}")


def _union(most: int) -> Callable[[Any, Any, Any, Any], Iterator[ValidationError]]:
    """anyOf (1) or oneOf (2); the library's take time that is exponential in the depth of unions within unions."""

    def check(validator: Any, options: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        seconds_left()
        within, token = _PROBING.get(), _PROBING.set(True)
        try:  # an alternative fails at its discriminator, before its parts are checked
            fitting = (option for option in options if validator.evolve(schema=option).is_valid(value))
            count = len([*islice(fitting, most)])
            tried = [] if count or within else [[*validator.descend(value, option)] for option in options]
        finally:
            _PROBING.reset(token)
        if count == 1:
            return
        context = []
        if tried:  # report the alternative that comes closest
            sizes = [(-max(len(error.path) for error in errors), len(errors)) for errors in tried]
            closest = sizes.index(min(sizes))
            context = [*validator.descend(value, options[closest], schema_path=closest)]
        yield ValidationError(f"valid under {'several' if count else 'none'} of the alternatives", context=context)

    return check


def resolver(root: dict[str, Any]) -> Callable[[str], Any]:
    """A function that resolves references if they are JSON pointers within the schema; else it returns None."""

    def resolve(reference: str) -> Any:
        start, *parts = unquote(reference).split("/")
        node: Any = root if start == "#" else None
        try:
            for part in (part.replace("~1", "/").replace("~0", "~") for part in parts):
                node = node[int(part) if isinstance(node, list) else part]
        except (LookupError, TypeError, ValueError):
            return None
        return node

    return cache(resolve)


def bounded_validator(root: dict[str, Any], formats: FormatChecker = FORMATS) -> Any:
    """The bounded validator of a draft 2020-12 schema whose references are all JSON pointers within it."""
    resolve = resolver(root)

    def follow(validator: Any, reference: str, value: Any, schema: Any) -> Iterator[ValidationError]:
        seconds_left()
        yield from validator.descend(value, resolve(reference))

    # The library hands patterns to `re`, compares all pairs of items, and follows references up to 2**depth times.
    keywords: dict[str, Any] = {"pattern": _pattern, "patternProperties": _pattern_properties, "$ref": follow}
    keywords |= {"additionalProperties": _additional, "uniqueItems": _unique_items, "multipleOf": _multiple_of}
    keywords |= {"anyOf": _union(1), "oneOf": _union(2)}
    cls: Any = extend(Draft202012Validator, keywords)
    return cls(root, format_checker=formats)
