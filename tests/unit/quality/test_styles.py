"""What answers write in several ways is reported with the rows of the rarer way."""

import json
from types import SimpleNamespace

import pytest

from formtune.data.cleaning import Example
from formtune.formats import JsonSchema
from formtune.quality.styles import mixtures


def minorities(answers, inputs=None, fields=()):
    examples = []
    for n, answer in enumerate(answers):
        text = answer if isinstance(answer, str) else json.dumps(answer, separators=(",", ":"))
        prompt = inputs[n] if inputs else f"input {n}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        examples.append(Example(turns, str(n), value=json.loads(text)))
    own = SimpleNamespace(fields=fields)
    format = SimpleNamespace(split=lambda text: ("", text), of_row=lambda schema: own)
    return {(m.what, m.path): m.minority for m in mixtures(examples, format)}


@pytest.mark.parametrize(
    ("answers", "what", "path", "minority"),
    [
        (['{"a":1,"b":2}'] * 3 + ['{"a": 1, "b": 2}'], "layout", "", {"with spaces": ["3"]}),
        (['{"a":1}'] * 3 + ['{\n"a": 1\n}'], "layout", "", {"over several lines": ["3"]}),
        ([{"d": "2026-01-02"}] * 4 + [{"d": "2 January 2026"}], "date", "d", {"D Month YYYY": ["4"]}),
        ([{"d": "2026-01-02"}] * 4 + [{"d": "02/01/2026"}], "date", "d", {"D/M/YYYY": ["4"]}),
        ([{"a": ["2026-01-02"]}] * 4 + [{"a": ["2.1.2026"]}], "date", "a", {"D.M.YYYY": ["4"]}),
        ([{"a": 5}] * 4 + [{"a": 5.0}], "number", "a", {"5.0": ["4"]}),
        ([{"a": 1, "b": 2, "c": 3}] * 3 + [{"b": 2, "a": 1, "c": 3}], "key order", "", {"b before a": ["3"]}),
        ([{"o": {"a": 1, "b": 2}}] * 3 + [{"o": {"b": 2, "a": 1}}], "key order", "o", {"b before a": ["3"]}),
        ([{"a": None}] * 3 + [{}], "empty", "a", {"absent": ["3"]}),
        (
            [{"a": None, "b": 1}] * 3 + [{"b": 1}, {"c": 1}],
            "empty",
            "a",
            {"absent": ["3"]},
        ),  # {"c": 1} has no place for a
        ([{"o": {"a": None}}] * 3 + [{"o": {"a": ""}}], "empty", "o.a", {"empty text": ["3"]}),
    ],
)
def test_a_minority_is_named_with_its_rows(answers, what, path, minority):
    assert minorities(answers, fields=["a", "o.a"])[what, path] == minority


@pytest.mark.parametrize(
    ("answers", "inputs"),
    [
        # One way throughout; values of different size are no styles.
        ([{"a": 5, "d": "2026-01-02"}, {"a": 7.25, "d": "2026-11-12"}], None),
        # Copied as the inputs write them.
        ([{"n": "Anna"}, {"n": "anna"}], ["I am Anna", "i am anna"]),
        ([{"d": "2 May 2026"}, {"d": "2026-05-02"}], ["on 2 May 2026", "on 2026-05-02"]),
        # Keys that only some rows have are data: their order is the input's.
        ([{"x": 1, "s": {"p": 1}}, {"x": 1, "s": {"q": 1, "r": 1}}, {"x": 1, "s": {"r": 1, "q": 1}}], None),
        # An optional key that is simply left out.
        ([{"a": 1}, {}], None),
        # Free text that happens to hold a date.
        ([{"t": "hello there"}, {"t": "2026-01-02"}, {"t": "what now"}], None),
        # Nothing to lay out.
        (["{}", '{"a":1}'], None),
    ],
)
def test_what_is_not_a_style_is_not_reported(answers, inputs):
    assert not minorities(answers, inputs, fields=["a"])


def test_the_arguments_of_two_tools_are_different_fields():
    day, time = (
        {"name": "book", "arguments": {"on": "2026-01-02"}},
        {"name": "wake", "arguments": {"on": "2026-01-02T07:00"}},
    )
    assert not minorities([[day], [time], [day, time]])
    odd = {"name": "book", "arguments": {"on": "02/01/2026"}}
    assert minorities([[day], [time], [day], [odd]]) == {("date", "book.arguments.on"): {"D/M/YYYY": ["3"]}}


def test_a_name_that_is_no_text_is_no_tool():
    values = [{"name": 5, "arguments": [1]}, {"name": "a", "arguments": {"b": 1}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    examples = [Example(messages, f"f:{n}", value=value) for n, value in enumerate(values)]
    assert {mixture.what for mixture in mixtures(examples, JsonSchema({"type": "object"}))} <= {"empty"}
