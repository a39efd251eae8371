"""Whatever the bytes, texts and values: an answer or a UserError, in time, and nothing accepted that should not be.

`HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py` looks a hundred times as long.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from formtune.configuration.yaml_file import check_yaml
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.formats import KINDS, JsonSchema, Labels, Regex, Tagged
from formtune.formats.dialect import schema_nodes
from formtune.formats.strict_json import loads_strict

settings.register_profile("fast", max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
settings.register_profile("long", max_examples=15_000, deadline=5000, suppress_health_check=list(HealthCheck))
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SETTINGS = settings.get_profile("long" if LONG else "fast")
TEMPORARY = tempfile.TemporaryDirectory()  # no fixture of pytest: benchmarks/fuzz.py calls these tests without it
FOLDER = Path(TEMPORARY.name)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
CHUNKS = [
    '{"prompt": "a"',
    ', "completion": ',
    '"x"',
    "}",
    "[",
    "]",
    "\\u",
    "d800",
    "\\",
    "\n",
    "\r",
    "\0",
    "\ufeff",
    "1e999",
    "NaN",
    "-",
    "0",
    "e5",
    ".",
    " ",
    ",",
    ":",
    "{",
    '"',
    "null",
    "é",
    "\u2028",
    "7" * 400,
]
NEAR_JSON = st.lists(st.sampled_from(CHUNKS), max_size=12).map("".join)


def strictly(text: str, constants: bool = False):
    """What Python's own reader makes of a JSON text, None if the standard, or that with NaN, does not allow it."""

    def unique(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    def no(name):
        raise ValueError

    try:
        return [json.loads(text, object_pairs_hook=unique, parse_constant=float if constants else no)]
    except (ValueError, RecursionError):
        return None


@SETTINGS
@given(
    st.binary(max_size=80) | NEAR_JSON.map(lambda text: text.encode()) | VALUES.map(lambda v: json.dumps(v).encode())
)
def test_json_lines(content):
    path = FOLDER / "fuzz.jsonl"
    path.write_bytes(content)
    lines = content.split(b"\n")
    try:
        for record, where in read_records(str(path)):
            line = lines[int(where.rpartition(":")[2]) - 1].decode("utf-8-sig")
            assert isinstance(record, dict)
            [value] = strictly(line.strip(), constants=True)
            read = {key: None if it != it else it for key, it in value.items()}  # NaN is a missing value
            assert json.dumps(read) == json.dumps(record)
            json.dumps(record, ensure_ascii=False).encode()
    except UserError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)


@SETTINGS
@given(NEAR_JSON.map(lambda text: f"[{text}]") | st.lists(VALUES).map(json.dumps) | st.text(max_size=40))
def test_json_arrays(text):
    path = FOLDER / "fuzz.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        rows = list(read_records(str(path)))
    except UserError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        return
    assert len({where for _, where in rows}) == len(rows)
    if text.lstrip(" \t\r\n").startswith("["):
        assert json.dumps(strictly(text, constants=True)) == json.dumps([[record for record, _ in rows]])


@SETTINGS
@given(st.binary(max_size=80) | st.text(alphabet='a,"\r\n\0é', max_size=40).map(lambda text: text.encode()))
def test_csv(content):
    path = FOLDER / "fuzz.csv"
    path.write_bytes(content)
    try:
        for record, _ in read_records(str(path)):
            assert all(isinstance(key, str) and isinstance(value, str) for key, value in record.items())
    except UserError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)


@SETTINGS
@given(NEAR_JSON | st.text(max_size=40) | VALUES.map(json.dumps))
def test_strict_json(text):
    try:
        value = loads_strict(text)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert strictly(text) == [value]
    assert loads_strict(json.dumps(value)) == value


KEYWORDS = [
    "type",
    "properties",
    "items",
    "required",
    "enum",
    "const",
    "anyOf",
    "allOf",
    "oneOf",
    "not",
    "$ref",
    "$defs",
    "pattern",
    "minimum",
    "additionalProperties",
    "patternProperties",
    "uniqueItems",
    "format",
    "$schema",
    "$id",
    "if",
    "then",
    "minItems",
    "prefixItems",
    "contains",
    "multipleOf",
    "x-note",
    "dependentRequired",
]
SCHEMAS = st.recursive(
    st.sampled_from([{}, True, False, {"type": "object"}, {"type": "string"}, {"type": ["integer", "null"]}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"pattern": "^(a|a)+$"}, {"pattern": "("}, {"enum": [1, "a", None]}, {"format": "date"}, {"minimum": 3}, {"multipleOf": 0.1}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3)}, optional={"required": st.lists(st.sampled_from("abc"), unique=True), "additionalProperties": inner, "$defs": st.dictionaries(st.just("a"), inner)}),
        st.fixed_dictionaries({"items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        st.dictionaries(st.sampled_from(KEYWORDS), inner | SCALARS | st.lists(inner, max_size=2), max_size=3),
    ),
    max_leaves=10,
)  # fmt: skip
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["a", "aaa", "2026-01-02", "x", 0.1, 1.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@example({"anyOf": [False]}, [None])
@example({"properties": {}, "$id": {}}, [None])
@SETTINGS
@given(SCHEMAS | VALUES, st.lists(DOCUMENTS, max_size=4))
def test_a_schema_is_refused_or_checks_as_the_reference_does(schema, documents):
    started = time.process_time()
    try:
        format = JsonSchema(schema)  # type: ignore[arg-type]
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(schema, dict)
    if any(isinstance(node.get("items"), list) for _, node in schema_nodes(schema)):
        return  # no draft has both this and all the other keywords
    schema = {key: value for key, value in schema.items() if key != "$id"}  # of any type here, a string for jsonschema
    reference = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date"]))
    for document in documents:
        text = json.dumps(document)
        verdict = format.check(text, target=text)
        if "took more than" not in verdict.detail:
            assert verdict.exact == reference.is_valid(document), (schema, document, verdict)
        if verdict.exact:
            assert verdict.joint and loads_strict(format.write(document)) == document
    assert time.process_time() - started < 10


PATTERNS = st.lists(st.sampled_from(["a", "b", "(", ")", "(?:", "(?P<x>", "[", "]", "^", "-", "*", "+", "?", "{", "}", "{2}", "{9999}", "{1,}", "|", "\\", "d", "\\p{L}", ".", "$", "(?i)", "(?x)", "#", "(?=", "(?<!", "é", "\n", "(?R)", "(?1)", "\\1", "(?V1)", "&&", "(?e)", "{e<=1}"]), max_size=10).map("".join)  # fmt: skip


@pytest.mark.slow
@example("(?R)+b*", "")
@settings(SETTINGS, deadline=None)  # the processor time is checked below; a busy machine takes longer
@given(PATTERNS | st.text(max_size=15), st.text(alphabet="ab1é\n", max_size=30))
def test_a_pattern_is_refused_or_matches_in_time(pattern, text):
    started = time.process_time()
    for make in (lambda: Regex(pattern), lambda: JsonSchema({"type": "string", "pattern": pattern})):
        try:
            format = make()
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for answer in (text, json.dumps(text)):
            verdict = format.check(answer)
            assert verdict.kind in KINDS and "\n" not in verdict.detail
            if verdict.exact and isinstance(format, Regex):
                assert format._pattern.fullmatch(answer)
    assert time.process_time() - started < 3


@SETTINGS
@given(st.lists(st.text(max_size=6), max_size=4), st.text(max_size=30) | st.text(alphabet="<>/ab \n", max_size=40))
def test_labels_and_sections(names, text):
    for make in (Labels, Tagged):
        try:
            format = make(names)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        verdict = format.check(text)
        if make is Labels:
            assert verdict.exact == (text in names)
        elif verdict.exact:
            assert list(verdict.value) == names
            assert all(f"<{name}>{inner}</{name}>" in text for name, inner in verdict.value.items())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}}, "required": ["a"], "additionalProperties": False}  # fmt: skip
CONTRACTS = [JsonSchema(SCHEMA), JsonSchema(SCHEMA, canonical=True), Regex(r"(?P<a>\w+)=(?P<b>.*)"), Labels(["a", "a b"]), Tagged(["a", "b"])]  # fmt: skip
GOOD = '{"a":1,"b":["x"]}'


@st.composite
def broken(draw):
    """A good answer with a few characters changed."""
    text = GOOD
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at]
            + draw(st.sampled_from([*CHUNKS, "```", "<think>", "</think>", "<a>", "</a>"]))
            + text[at + draw(st.integers(0, 2)) :]
        )
    return text


@SETTINGS
@given(broken() | st.text(max_size=60), st.booleans())
def test_every_text_gets_a_verdict_and_no_invalid_text_is_valid(text, finished):
    for format in CONTRACTS:
        verdict = format.check(text, finished=finished)
        assert verdict.kind in KINDS and "\n" not in verdict.detail
        assert finished or not verdict.exact
        if verdict.exact and isinstance(format, JsonSchema):
            [value] = strictly(text)
            jsonschema.validate(value, SCHEMA)
            assert text == text.strip() and verdict.value == value


YAML = st.lists(st.sampled_from(["a", "b", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&x ", "*x", "<<", "? ", "!!set ", "!!python/name:os.system ", "'", '"', "|", ">", "#", "\t", "1e5", "2026-13-45", "2026-01-01", "~", "0x", "---\n", "é", "%YAML", "!!binary =", "=", "no"]), max_size=14).map("".join)  # fmt: skip


@SETTINGS
@given(st.binary(max_size=40) | YAML.map(lambda text: text.encode()) | VALUES.map(lambda v: json.dumps(v).encode()))
def test_yaml(content):
    path = FOLDER / "fuzz.yaml"
    path.write_bytes(content)
    try:
        check_yaml(str(path))
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert isinstance(yaml.safe_load(content.decode()), dict)
