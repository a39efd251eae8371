"""A schema of draft 7 or 2020-12 means here what its own draft says, and a schema that cannot be read is refused with all its problems."""

import contextlib
import json
import re
import time

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formtune.errors import UserError
from formtune.formats import JsonSchema

DRAFTS = {
    "http://json-schema.org/draft-07/schema#": jsonschema.Draft7Validator,
    "https://json-schema.org/draft/2020-12/schema": jsonschema.Draft202012Validator,
}
D7, D20 = DRAFTS
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


def judges_as_its_draft(schema, documents):
    """Whether the reference validator of the schema's draft and the format agree on every document."""
    format = JsonSchema(schema)
    reference = DRAFTS[schema["$schema"]](schema, format_checker=jsonschema.FormatChecker(["date"]))
    for document in documents:
        assert format.check(json.dumps(document)).exact == reference.is_valid(document), (schema, document)
    return format


@pytest.mark.parametrize(
    ("draft", "schema", "good", "bad"),
    [
        (D7, {"type": "integer"}, [1, 1.0], [1.5]),
        (D7, {"const": 1, "exclusiveMinimum": 0}, [1], [2]),
        (D7, {"contains": WHOLE, "propertyNames": {"maxLength": 1}}, [[1], {"a": 1}], [["a"], {"ab": 1}]),
        (D7, {"items": [WHOLE, TEXT], "maxItems": 2}, [[1, "a"], [1]], [["a"], [1, "a", 2]]),
        (D7, {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, [{"a": 1, "b": 1}, {}], [{"a": 1}]),
        (D7, {"definitions": {"t": TEXT}, "properties": {"a": {"$ref": "#/definitions/t", "maxLength": 1}}},
         [{"a": "long"}], [{"a": 1}]),  # what is beside a reference is ignored up to draft 7
        (D20, {"$defs": {"t": TEXT}, "properties": {"a": {"$ref": "#/$defs/t", "maxLength": 1}}},
         [{"a": "l"}], [{"a": "long"}, {"a": 1}]),
        (D20, {"dependentRequired": {"a": ["b"]}}, [{"a": 1, "b": 1}], [{"a": 1}]),
        (D20, {"contains": WHOLE, "minContains": 2, "maxContains": 3}, [[1, 2]], [[1], [1, 2, 3, 4]]),
        (D20, {"prefixItems": [WHOLE], "items": TEXT}, [[1, "a"]], [["a"], [1, 2]]),
        (D20, {"$ref": "#/$defs/a", "$defs": {"a": WHOLE}, "allOf": [{"maximum": 3}]}, [2, 3], [4, "a"]),
    ],
)  # fmt: skip
def test_each_draft_keeps_its_meaning(draft, schema, good, bad):
    format = judges_as_its_draft({"$schema": draft, **schema}, [*good, *bad])
    assert all(format.check(json.dumps(value)).exact for value in good)
    assert not any(format.check(json.dumps(value)).exact for value in bad)


@pytest.mark.parametrize(
    ("draft", "schema"),
    [
        (D7, {"definitions": {"t": TEXT}, "items": {"$ref": "#/definitions/t"}}),
        (D7, {"definitions": {"a/b~c d%": TEXT}, "items": {"$ref": "#/definitions/a~1b~0c%20d%25"}}),
        (D7, {"properties": {"a": TEXT}, "items": {"$ref": "#/properties/a"}}),
        (D20, {"$id": "urn:x:y", "$defs": {"t": TEXT}, "items": {"$ref": "#/$defs/t"}}),
        (D20, {"$defs": {"t": {"anyOf": [WHOLE, TEXT]}}, "items": {"$ref": "#/$defs/t/anyOf/1"}}),
    ],
)  # fmt: skip
def test_pointers_are_followed_within_the_schema(draft, schema):
    format = judges_as_its_draft({"$schema": draft, **schema}, [["a"], [1], ["a", 1]])
    assert format.check('["a"]').exact and not format.check("[1]").exact


def schemas_of(draft):
    """Schemas of keywords that two drafts read differently."""
    names = st.sampled_from("abc")
    legacy = draft == D7

    def objects(inner):
        lists = st.lists(inner, min_size=1, max_size=2)
        either = {
            "items": inner | lists if legacy else inner,
            "definitions" if legacy else "$defs": st.fixed_dictionaries({"t": inner}),
            "anyOf": lists,
            "properties": st.dictionaries(names, inner, max_size=2),
            "required": st.lists(names, min_size=1, unique=True),
            "minimum": st.integers(-1, 2),
            "maximum": st.integers(1, 3),
            "not": inner,
        }
        either |= {"exclusiveMinimum": st.integers(-1, 2), "const": st.integers(0, 2), "contains": inner}
        either |= {
            "propertyNames": st.sampled_from([{"enum": ["a", "b"]}, True]),
            "if": inner,
            "then": inner,
            "else": inner,
        }
        if not legacy:
            either |= {"prefixItems": lists, "minContains": st.integers(0, 2), "maxContains": st.integers(0, 2)}
            either |= {"dependentRequired": st.dictionaries(names, st.lists(names, unique=True), max_size=1)}
        return st.fixed_dictionaries({}, optional=either)

    leaves = [{"type": "integer"}, {"type": "object"}, {"type": ["string", "null"]}, {"minimum": 1}, {"enum": [1, "a"]}]
    leaves += [True, False]
    leaves += [{"$ref": "#/definitions/t" if legacy else "#/$defs/t", "maximum": 1}]
    tree = st.recursive(st.sampled_from(leaves), objects, max_leaves=8)
    return tree.filter(lambda schema: isinstance(schema, dict)).map(lambda schema: {**schema, "$schema": draft})


DOCUMENTS = st.recursive(
    st.none() | st.integers(-1, 3) | st.sampled_from(["a", 1.0, 1.5, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@pytest.mark.parametrize("draft", DRAFTS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_verdict_is_that_of_the_drafts_own_validator(draft, data):
    schema = data.draw(schemas_of(draft))
    documents = data.draw(st.lists(DOCUMENTS, min_size=4, max_size=8))
    try:
        JsonSchema(schema)
    except UserError as error:
        assert any(
            why in str(error) for why in ("points to nothing", "endless $ref loop", "the schema checks nothing")
        ), error
        return
    with contextlib.suppress(RecursionError):  # of the reference, for a schema that refers to itself endlessly
        judges_as_its_draft(schema, documents)


def test_a_list_of_items_is_that_of_draft_7_in_any_draft():
    for more in ({}, {"$schema": "https://example.com/provider.schema.json"}, {"$schema": D7}, {"$schema": D20}):
        format = JsonSchema({**more, "items": [WHOLE], "maxItems": 1})
        assert format.notes == () and format.check("[1]").exact
        assert not format.check("[1,2]").exact and not format.check('["a"]').exact


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("additionalItems", False, "prefixItems and items"),
        ("dependencies", {"a": ["b"]}, "dependentRequired, or if and then"),
        ("unevaluatedProperties", False, "additionalProperties"),
        ("$dynamicRef", "#x", r"\$ref"),
    ],
)
def test_rare_keywords_are_refused_with_what_to_write_instead(key, value, instead):
    with pytest.raises(UserError, match=rf"\$\.items\.{re.escape(key)}: not supported; use {instead}$"):
        JsonSchema({"type": "array", "items": {"type": "object", key: value}})
    # A property of that name is none.
    assert JsonSchema({"properties": {key: {"type": "object"}, "items": {"enum": [[1]]}}}).notes == ()


@pytest.mark.parametrize("draft", ["draft-04/schema#", "draft-06/schema#", "draft/2019-09/schema"])
def test_other_drafts_are_refused_with_what_to_write(draft):
    with pytest.raises(UserError, match=r"draft [0-9-]+ is not supported; write the schema as draft-07 or 2020-12"):
        JsonSchema({"$schema": f"http://json-schema.org/{draft}", "type": "object"})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$dynamicRef": "#x", "$defs": {"x": {"$dynamicAnchor": "x"}}}, r"\$\.\$dynamicRef: not supported; use \$ref"),
        ({"$ref": "#x", "$defs": {"x": {"$anchor": "x"}}}, r"\$\.\$ref: '#x' points to nothing in the schema; copy what it names"),
        ({"$id": "http://a/b", "$ref": "http://a/b#/$defs/x", "$defs": {"x": TEXT}}, "points to nothing in the schema"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"$id": "x"}}}, r"\$\.\$defs\.x\.\$id: `\$id` in a subschema is not supported"),
    ],
)  # fmt: skip
def test_references_that_are_not_pointers_are_refused(schema, message):
    with pytest.raises(UserError, match=message):
        JsonSchema(schema)


def test_formats_that_are_annotations_are_listed_once_as_unchecked():
    number = {"type": "integer", "format": "int64"}
    format = JsonSchema(
        {"properties": {"a": number, "b": number, "c": {**TEXT, "format": "password"}, "d": {**TEXT, "format": "date"}}}
    )
    assert format.notes == ("data.format.schema: not checked: format 'int64', format 'password'",)
    assert format.check('{"a":1,"c":"x","d":"2026-01-02"}').exact and not format.check('{"d":"x"}').exact


def test_all_problems_are_named_at_once_up_to_ten():
    schema = {
        "type": "objct",
        "requried": ["a"],
        "properties": {"a": {"minLength": "3"}, "b": {"pattern": "("}, "d": []},
    }
    with pytest.raises(UserError) as error:
        JsonSchema(schema)
    text = str(error.value)
    assert text.count(" | ") == 4 and "\n" not in text
    for part in ("$.type: not a JSON Schema ('objct' is not one of ['array', ", "$.requried: not a keyword",
                 "$.properties.d: not a JSON Schema ([] is not of type 'object', 'boolean')",
                 "$.properties.a.minLength: not a JSON Schema ('3' is not of type 'integer')",
                 "$.properties.b.pattern: not a JSON Schema ('(' is not a 'regex': missing )"):  # fmt: skip
        assert part in text, part
    with pytest.raises(UserError, match=r"\$\.properties\.k9\.type.* \| and 5 more$"):
        JsonSchema({"properties": {f"k{number}": {"type": "text"} for number in range(15)}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("type", []), ("type", 3), ("enum", "a"), ("required", True), ("required", [1]), ("minimum", "1"), ("minLength", -1),
     ("maxItems", 1.5), ("multipleOf", 0), ("uniqueItems", "yes"), ("pattern", 1), ("properties", []), ("anyOf", {}),
     ("allOf", []), ("not", "x"), ("items", 1), ("dependentRequired", {"a": "b"}), ("$ref", 1), ("format", 1),
     ("patternProperties", {"(": {}}), ("exclusiveMinimum", "x"), ("minContains", None), ("prefixItems", [1])],
)  # fmt: skip
def test_a_value_that_no_keyword_may_have_is_refused(key, value):
    schema = {key: value, "type": "object", "contains": {}} | {key: value}
    with pytest.raises(UserError, match="not a JSON Schema"):
        JsonSchema(schema)


@pytest.mark.parametrize("identifier", ["ticket", "schemas/ticket.json", "C:\\ticket.json", "", "http://[ticket", 3])
@pytest.mark.parametrize("draft", [D7, D20])
def test_an_identifier_of_the_whole_may_be_anything(draft, identifier):
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    format = JsonSchema({"$schema": draft, "$id": identifier, "definitions": {"a": inner}, "$ref": "#/definitions/a"})
    assert format.check('{"n":1}').exact and not format.check('{"n":"x"}').exact


@pytest.mark.parametrize(
    ("wrapped", "keys"),
    [
        (lambda schema: {"name": "x", "strict": True, "schema": schema}, "schema"),
        (lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, "json_schema.schema"),
        (lambda schema: {"type": "json_schema", "name": "x", "strict": True, "schema": schema}, "schema"),
        (lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
         "response_format.json_schema.schema"),
        (lambda schema: {"type": "function", "function": {"name": "x", "parameters": schema}}, "function.parameters"),
        (lambda schema: {"name": "x", "description": "y", "input_schema": schema}, "input_schema"),
    ],
)  # fmt: skip
def test_a_schema_is_taken_out_of_the_request_that_holds_it(wrapped, keys):
    schema = {"type": "object", "properties": {"schema": TEXT, "name": TEXT}, "required": ["name"]}
    format = JsonSchema(wrapped(schema))
    assert format.schema == schema and format.fields == ("schema", "name")
    assert format.notes == (f"data.format.schema: the schema is read from {keys!r}",)
    assert JsonSchema(schema).schema == schema


@pytest.mark.parametrize("schema", [{}, {"title": "t", "description": "d"}, {"$defs": {"a": TEXT}}, {"name": "x"}])
def test_a_schema_that_accepts_everything_is_refused(schema):
    with pytest.raises(UserError, match="the schema checks nothing, so any JSON would be valid"):
        JsonSchema(schema)
    with pytest.raises(UserError, match="the schema must be a JSON object, got True"):
        JsonSchema(True)


def test_a_pydantic_class_is_read_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("pydantic")
    (tmp_path / "forms_of_test.py").write_text(
        "from pydantic import BaseModel\nclass Who(BaseModel):\n    name: str\n    age: int | None = None\nclass Plain: pass\n"
    )
    (tmp_path / "needs_more_of_test.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    format = JsonSchema("forms_of_test:Who")
    assert format.fields == ("name", "age") and format.check('{"name":"Ann","age":null}').exact
    assert format.to_dict()["init_args"]["schema"]["title"] == "Who"
    for name, message in {
        "forms_of_test:Plain": "forms_of_test:Plain must be a Pydantic model",
        "forms_of_test:Gone": "has no attribute 'Gone'",
        "needs_more_of_test:Who": "No module named 'a_package_nobody_has'",
        "gone_of_test:Who": "No module named 'gone_of_test'",
    }.items():
        with pytest.raises(UserError, match=message):
            JsonSchema(name)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\d+$", ["12"], ["\u0661", "1\n", "a"]),
        (r"^\w+$", ["aZ_9"], ["é", "a b", "\u0661"]),
        (r"^[\w-]+$", ["a-b"], ["é"]),
        (r"^\s$", [" ", "\t", "\u00a0", "\ufeff", "\u2003", "\u2028"], ["\u0085", "\u001c", "\u180e", "x"]),
        (r"^\S$", ["x", "\u0085", "é", "😀"], [" ", "\u00a0", "\ufeff"]),
        (r"^[^\s]$", ["x", "\u0085"], ["\u00a0"]),
        (r"^[\D]$", ["é", "\u0661"], ["1"]),
        (r"^[\W_]$", ["é", "_", "-"], ["a", "1"]),
        (r"^.$", ["a", "é"], ["\n", "\r", "\u2028", "ab"]),
        (r"^[.\\d]$", [".", "d"], ["1"]),
        (r"^[+-\d]+$", ["+5", "123", "-"], ["a", ","]),
        (r"^[\d-x]+$", ["5-x"], ["a"]),
        (r"^[\\d-f]$", ["\\", "e"], ["5", "-"]),
        (r"\bx\b", ["éxé"], ["axa"]),
        (r"\Aab\Z", ["ab"], ["ab\n", "xab"]),
        (r"^\$[$.]$", ["$$", "$."], ["$a"]),
    ],
)
def test_patterns_mean_what_they_mean_in_ecma_262(pattern, good, bad):
    for format in (JsonSchema({"pattern": pattern}), JsonSchema({"patternProperties": {pattern: False}})):
        for text in (*good, *bad):
            is_key = "pattern" not in format.schema
            verdict = format.check(json.dumps({text: 1} if is_key else text, ensure_ascii=False))
            assert verdict.exact == ((text in good) != is_key), (pattern, text)


def test_a_pattern_of_many_repetitions_is_read_and_one_without_end_is_not():
    address = r"^((([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])\.){3}([0-9]){1,3}|(([0-9a-fA-F]{1,4}:){7,7}[0-9a-f]{1,4}))$"
    key = r"^-{5}BEGIN-{5}\n([A-Za-z0-9/+]{64}\n)*-{5}END-{5}$"
    assert JsonSchema({"anyOf": [{"pattern": address}, {"pattern": key}]}).check('"10.0.0.1"').exact
    for pattern in (r"((a{99}){99}){99}", "[)]{999999}", r"(?:a|(b{5000})){5000}"):
        started = time.process_time()
        with pytest.raises(UserError, match="its repetitions amount to more than"):
            JsonSchema({"pattern": pattern})
        assert time.process_time() - started < 1


def test_a_large_schema_is_read_in_time():
    part = {"type": "object", "properties": {f"k{n}": {"$ref": f"#/definitions/d{n}"} for n in range(20)}}
    schema = {"$schema": D7, **part, "definitions": {f"d{n}": {**part, "description": "d" * 500} for n in range(500)}}
    started = time.process_time()
    format = JsonSchema(schema)
    assert time.process_time() - started < 2 and len(format.fields) == 2000
    assert format.check('{"k1":{"k2":{}}}').exact and not format.check('{"k1":{"k2":1}}').exact


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "integer"}, {"allOf": [{"$ref": "#"}]}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}},
        {"if": {"$ref": "#"}},
    ],
)
def test_a_schema_that_applies_itself_to_the_same_value_is_refused(schema):
    with pytest.raises(UserError, match=r"an endless \$ref loop"):
        JsonSchema(schema)


def test_a_part_that_refers_to_itself_endlessly_is_refused():
    with pytest.raises(UserError, match=r"\$\.\$defs\.x: an endless \$ref loop"):
        JsonSchema({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}})
