"""Reasoning before an answer is rendered by the chat template, supervised, and asked for as at inference."""

import json

import pytest

from conftest import TEMPLATE, byte_tokenizer, shared
from formtune.base.renderer import Renderer
from formtune.base.row import Row, UnfitRow
from formtune.errors import UserError
from formtune.formats import JsonSchema, Reasoning

FORMAT = Reasoning(JsonSchema({"type": "object"}))
ANSWER = '{"a": [1, 2], "b": "x  y"}'
USER = {"role": "user", "content": "q"}


def encode(renderer, *turns, tools=None):
    [row] = renderer.encode([([USER, *turns], "f:1", None, tools)])
    if isinstance(row, Row):
        [asked] = renderer.encode([([USER, *turns[:-1]], "f:1", None, tools)])
        assert asked.prompt_ids == row.prompt_ids
        text = renderer.tokenizer.decode(row.target_ids, clean_up_tokenization_spaces=False)
        assert text == row.target + "<|im_end|>" and renderer.answer(row.target_ids) == (row.target, True)
    return row


def answer(content=ANSWER, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def qwen3():
    return Renderer.load(str(shared("tokenizers/qwen3")), tags=FORMAT.tags)


@pytest.mark.parametrize(
    ("turn", "reasoning"),
    [
        (answer(), ""),
        (answer(reasoning_content="First this.\n\nThen <b>that</b>."), "First this.\n\nThen <b>that</b>."),
        (answer(reasoning_content="\nspaces at the ends \n"), "spaces at the ends "),
        (answer(f"<think>\nFirst this.\n</think>\n\n{ANSWER}"), "First this."),
        (answer(f"<think>First this.</think>{ANSWER}"), "First this."),
        (answer(f"<think></think>\n{ANSWER}"), ""),
    ],
)
def test_qwen3_writes_and_supervises_the_reasoning_and_the_answer(qwen3, turn, reasoning):
    row = encode(qwen3, turn)
    assert row.target == f"<think>\n{reasoning}\n</think>\n\n{ANSWER}" and FORMAT.check(row.target).exact
    assert row.target_ids[0] == qwen3.tokenizer.convert_tokens_to_ids("<think>")
    assert qwen3.tokenizer.convert_tokens_to_ids("</think>") in row.target_ids
    assert encode(qwen3, answer(row.target)).target_ids == row.target_ids, "rendering it again changes nothing"


def test_the_prompt_ends_as_at_inference_with_thinking_on(qwen3):
    served = qwen3.tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    row = encode(qwen3, answer(reasoning_content="hm"))
    assert row.prompt_ids == served and qwen3.tokenizer.decode(served).endswith("<|im_start|>assistant\n")


def test_without_the_format_thinking_is_off_as_before():
    renderer = Renderer.load(str(shared("tokenizers/qwen3")))
    row = encode(renderer, answer())
    assert row.target == ANSWER and renderer.tokenizer.decode(row.prompt_ids).endswith("<think>\n\n</think>\n\n")


def test_reasoning_of_earlier_answers_is_left_out_of_the_context_as_qwen3_does(qwen3):
    first = answer(f"<think>\nfar away\n</think>\n\n{ANSWER}")
    row = encode(qwen3, first, USER, answer("<think>near</think>{}"))
    prompt = qwen3.tokenizer.decode(row.prompt_ids)
    assert "far away" not in prompt and ANSWER in prompt and row.target == "<think>\nnear\n</think>\n\n{}"


def test_calls_of_tools_follow_the_reasoning(qwen3):
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = encode(qwen3, answer("", reasoning_content="I call f.", tool_calls=[call]), tools=tools)
    assert row.target.startswith("<think>\nI call f.\n</think>\n\n<tool_call>\n{")


@pytest.mark.parametrize("content", [f"<think>a</think>b</think>{ANSWER}", f"lost <think>a</think>{ANSWER}"])
def test_a_row_of_which_the_template_leaves_out_a_part_is_unfit(qwen3, content):
    row = encode(qwen3, answer(content))
    assert isinstance(row, UnfitRow) and "alters the answer or its reasoning" in str(row)


def test_a_template_whose_prompt_opens_the_block_needs_no_opening_tag():
    tokenizer = Renderer.load(str(shared("tokenizers/qwen3"))).tokenizer
    template = tokenizer.chat_template
    start = template.rindex("{%- if enable_thinking is defined")
    opened = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    opened.chat_template = template[:start] + "{{- '<think>\\n' }}\n{%- endif %}"
    with pytest.raises(
        UserError, match="data.format.open: must be '' if the template's prompt ends with <think>, else not"
    ):
        Renderer(opened, tags=FORMAT.tags)
    with pytest.raises(UserError, match="data.format.open: must be '' if"):
        Renderer(tokenizer, tags=("", "</think>"))
    format = Reasoning(FORMAT.format, open="")
    renderer = Renderer(opened, tags=format.tags)
    for turn in (answer(reasoning_content="hm"), answer(f"<think>hm</think>{ANSWER}")):
        row = encode(renderer, turn)
        assert row.target == f"hm\n</think>\n\n{ANSWER}" and format.check(row.target).exact
        assert renderer.tokenizer.decode(row.prompt_ids).endswith("<think>\n")
    assert encode(renderer, answer(row.target)).target_ids == row.target_ids


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("<reason>", "</reason>")])
def test_where_the_template_knows_no_such_block_it_is_written_in_front_of_the_answer(tags):
    renderer, (opening, closing) = Renderer(byte_tokenizer(), tags=tags), tags
    assert not renderer.thinking
    for turn, reasoning in ((answer(), ""), (answer(reasoning_content="hm"), "hm")):
        assert encode(renderer, turn).target == f"{opening}\n{reasoning}\n{closing}\n\n{ANSWER}"
    text = f"{opening}hm{closing} {ANSWER}"
    assert encode(renderer, answer(text)).target == text


def test_tags_that_are_control_tokens_are_allowed_where_the_format_has_them_and_no_others():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]})
    tokenizer.chat_template = TEMPLATE
    turn = answer(f"<think>hm</think>{ANSWER}")
    row = encode(Renderer(tokenizer, tags=FORMAT.tags), turn)
    assert row.target == turn["content"] and len(row.target_ids) == len("hm") + len(ANSWER) + 3
    assert "special token" in str(encode(Renderer(tokenizer), turn))
    assert "special token" in str(encode(Renderer(tokenizer, tags=FORMAT.tags), answer("<|im_start|>")))


def test_an_answer_before_any_question_is_no_traceback(qwen3):
    greeting = [{"role": "system", "content": "s"}, answer("Hello", reasoning_content="hm")]
    [row] = qwen3.encode([(greeting, "f:1")])
    assert isinstance(row, UnfitRow) or row.input == ""


def test_a_template_that_escapes_the_text_is_refused_at_once():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | e")
    [row] = Renderer(tokenizer).encode([([{"role": "user", "content": 'say "a"'}, answer("b")], "f:1")])
    assert str(row) == "the chat template refuses the conversation: it escapes the quotes in a text"
