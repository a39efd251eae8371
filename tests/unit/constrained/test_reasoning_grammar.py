"""With constrained decoding reasoning is free, and the answer after it keeps the grammar of its format."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import SCHEMA, byte_tokenizer, shared
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.constrained.decoder import Grammar
from formtune.constrained.grammar import grammar as rules_of
from formtune.formats import Format, JsonSchema, Labels, Reasoning, Regex, Tagged, ToolCalls
from formtune.formats.content import learn_orders

pytest.importorskip("llguidance", reason="needs the extra `constrained`")

TAGS = ("<think>", "</think>")
ANSWER = '{"n":1,"s":"x"}'
QWEN3 = pytest.param("qwen3", marks=pytest.mark.slow)  # its vocabulary is large
TOKENIZERS = [QWEN3, "mistral-v3-instruct", "smollm2-instruct", "gpt2", "bytes"]


def renderer_of(name, tags=TAGS):
    if name == "bytes":
        return Renderer(byte_tokenizer(), tags=tags)
    return Renderer.load(str(shared(f"tokenizers/{name}")), tags=tags)


def taken(grammar, renderer, text, schema=None):
    """Whether the grammar accepts the tokens of a whole answer."""
    ids = renderer.tokenizer(renderer.lead + text, add_special_tokens=False)["input_ids"]
    return accepts(grammar, [*ids, renderer.stop_ids[0]], schema)


def accepts(grammar, ids, schema=None):
    return grammar.accepted(grammar.matcher(Row([0], [], "", None, "", schema=schema)), ids) == len(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("inner", [JsonSchema(SCHEMA), JsonSchema(SCHEMA, canonical=True)])
def test_the_grammar_takes_the_tokens_of_every_target(name, inner):
    renderer, format = renderer_of(name), Reasoning(inner)
    for orders in (None, {}, learn_orders([{"s": "", "n": 1}])):
        grammar = Grammar(format, renderer, orders)
        for reasoning in ("", 'One <b>, then\n\n{"n": 2} 😀.', "a < think> b"):
            turn = {"role": "assistant", "content": ANSWER} | ({"reasoning_content": reasoning} if reasoning else {})
            [row] = renderer.encode([([{"role": "user", "content": "q"}, turn], "")])
            assert format.check(row.target).exact
            ordered = orders is not None and "s" in orders.get("", {})
            wanted = not ordered or inner.canonical
            assert accepts(grammar, row.target_ids) == wanted, (reasoning, orders)
            swapped = row.target.replace(ANSWER, '{"s":"x","n":1}')
            assert taken(grammar, renderer, swapped) == (orders is None or ordered) * (not inner.canonical)


@pytest.mark.parametrize("name", [QWEN3, "bytes"])
def test_what_the_grammar_takes_is_a_valid_answer_and_the_other_way_round(name):
    renderer, format = renderer_of(name), Reasoning(JsonSchema(SCHEMA))
    grammar = Grammar(format, renderer)
    pieces = ["<think>", "</think>", ANSWER, '{"n":1}', "a", " ", "\n", "</thin", "k>", "{", "\x1c"]
    seen = set()

    @given(
        st.lists(st.sampled_from(pieces), max_size=4),
        st.sampled_from(pieces),
        st.lists(st.sampled_from(pieces), max_size=2),
    )
    @example([], ANSWER, [])
    @settings(max_examples=300, deadline=None)
    def compare(reasoning, answer, rest):
        reasoning = "".join(reasoning)
        text = f"<think>{reasoning}</think>{answer}{''.join(rest)}"
        valid = format.check(text).exact
        seen.add(valid)
        # In the middle of reasoning the opening tag, as one token, is no text.
        own = text.removeprefix("<think>").partition("</think>")[0]
        if name != "qwen3" or "<think>" not in own:
            assert taken(grammar, renderer, text) == valid, text
        assert valid or not taken(grammar, renderer, text), text
        assert not taken(grammar, renderer, text.removeprefix("<think>")) or format.check(text[7:]).exact

    compare()
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("inner", "right", "wrong"),
    [
        (Labels(["yes", "no"]), "yes", "maybe"),
        (Regex(r"[0-9]+-[0-9]+"), "1-2", "1-x"),
        (Tagged(["why", "label"]), "<why>a</why>\n<label>b</label>", "<label>b</label>"),
    ],
)
@pytest.mark.parametrize("name", [QWEN3, "smollm2-instruct"])
def test_any_format_with_a_grammar_can_follow(name, inner, right, wrong):
    renderer = renderer_of(name)
    grammar = Grammar(Reasoning(inner), renderer)
    assert taken(grammar, renderer, f"<think>\n{wrong}\n</think>\n\n{right}")
    assert not taken(grammar, renderer, f"<think>\n{right}\n</think>\n\n{wrong}")
    assert not taken(grammar, renderer, right)


@pytest.mark.slow
def test_calls_of_the_rows_tools_follow_in_tags_that_are_one_token():
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools, renderer = json.dumps([{"name": "weather", "parameters": city}]), renderer_of("qwen3")
    grammar = Grammar(Reasoning(ToolCalls()), renderer)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert taken(grammar, renderer, f"<think>\nhm\n</think>\n\n{call}", tools)
    assert not taken(grammar, renderer, f"<think>\nhm\n</think>\n\n{call.replace('weather', 'time')}", tools)


@pytest.mark.slow
def test_other_tags_and_a_block_that_the_prompt_opened():
    for tags, text in (
        (("[R]", "[/R]"), f"[R]a</think>[/R] {ANSWER}"),
        (("", "</think>"), f"hm\n</think>\n\n{ANSWER}"),
    ):
        renderer = renderer_of("smollm2-instruct", tags)
        grammar = Grammar(Reasoning(JsonSchema(SCHEMA), *tags), renderer)
        assert taken(grammar, renderer, text) and not taken(grammar, renderer, ANSWER)


def test_white_space_before_the_answer_is_bounded():
    renderer = renderer_of("bytes")
    grammar = Grammar(Reasoning(JsonSchema(SCHEMA)), renderer)
    assert taken(grammar, renderer, f"<think></think>\n\n{ANSWER}")
    assert not taken(grammar, renderer, f"<think></think>{' ' * 40}{ANSWER}")


def test_a_format_without_a_grammar_has_none_after_reasoning_either():
    class Own(Format):
        def parse(self, text):
            return text

    assert rules_of(Reasoning(Own())) is None
