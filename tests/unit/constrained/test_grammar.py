"""Which formats have a grammar, and that it allows what their check allows."""

import json

import pytest

from formtune.constrained.grammar import grammar
from formtune.errors import UserError
from formtune.formats import JsonSchema, Reasoning, ToolCalls

TOOLS = json.dumps([{"name": "f", "parameters": {"type": "object", "properties": {}}}])


@pytest.mark.parametrize("format", [ToolCalls("mistral"), ToolCalls(tool_choice="auto")])
def test_a_format_without_a_grammar_says_why(format):
    with pytest.raises(UserError, match=r"has a grammar only if every row has tools, syntax is hermes or llama"):
        grammar(format.of_row(TOOLS))
    with pytest.raises(UserError, match="has a grammar only if every row has tools"):
        grammar(ToolCalls().of_row(None))


@pytest.mark.parametrize("pattern", [r"^\d+$", r"^[\w-]+$", r"^\S+\s\D$", r"\Aab.\Z", r"^[\W]+$"])
def test_the_grammar_has_the_same_characters_as_the_check(pattern):
    llguidance = pytest.importorskip("llguidance")
    text = {"type": "string", "pattern": pattern}
    rules = grammar(JsonSchema({"type": "object", "properties": {"a": text}, "additionalProperties": False}))
    assert not any(name in rules for name in (r"\\d", r"\\w", r"\\s", r"\\D", r"\\W", r"\\S", r"\\Z"))
    assert not llguidance.LLMatcher.validate_grammar(f"start: answer\n{rules}")


@pytest.mark.parametrize("identifier", ["ticket", "schemas/ticket.json", "C:\\ticket.json", "", "http://[ticket", 3])
def test_a_schema_whose_identifier_is_no_address_has_a_grammar(identifier):
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    assert grammar(JsonSchema({"$id": identifier, "definitions": {"a": inner}, "$ref": "#/definitions/a"}))


def test_a_grammar_of_ones_own_replaces_that_of_the_base_class():
    class Short(JsonSchema):
        def grammar(self):
            return 'answer: "{}"'

    assert grammar(Short({"type": "object"})) == 'answer: "{}"'
    assert 'answer: "{}"' in grammar(Reasoning(Short({"type": "object"})))
