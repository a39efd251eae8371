"""Only the answer and its end of turn are supervised, with every tokenizer."""

from datetime import datetime
from pathlib import Path

import pytest

from conftest import TEMPLATE, byte_tokenizer, shared
from formtune.base.folder import check_base
from formtune.base.renderer import Renderer, read_template
from formtune.base.row import Row, UnfitRow
from formtune.errors import UserError

ANSWERS = ['{"a":"x y","b":[1,2]}', '{"name":"Zoë  🎉","n":null}', "positive", '{\n  "a": 1\n}']
TOKENIZERS = [
    f"tokenizers/{n}" for n in ("gpt2", "mistral-v3-instruct", "phi-3-mini-instruct", "qwen3", "smollm2-instruct")
]
END = {"gpt2": "<|endoftext|>", "mistral": "</s>", "phi-3": "<|end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>"}


def conversation(answer, system="Be exact."):
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": "héllo  wörld\nsecond line"},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("folder", [*TOKENIZERS, "models/stories260K"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_supervised_tokens_decode_to_the_answer_and_its_end_of_turn(folder, answer):
    renderer = Renderer.load(str(shared(folder)))
    [row] = renderer.encode([(conversation(answer), "f:1")])
    assert isinstance(row, Row)
    assert renderer.answer(row.target_ids) == (answer, True)
    end = renderer.tokenizer.convert_ids_to_tokens(row.target_ids[-1])
    assert end == next((e for name, e in END.items() if name in folder), "</s>")
    assert row.target_ids[-1] in renderer.stop_ids and not set(row.target_ids[:-1]) & set(renderer.stop_ids)
    bos = renderer.tokenizer.bos_token_id
    assert (row.prompt_ids + row.target_ids)[:2] != [bos, bos]
    if any(name in folder for name in ("mistral", "stories")):
        assert row.prompt_ids[0] == bos and bos not in (row.prompt_ids + row.target_ids)[1:]


@pytest.mark.parametrize("folder", TOKENIZERS[1:])
def test_training_and_prediction_see_the_same_prompt(folder):
    renderer = Renderer.load(str(shared(folder)))
    messages = conversation("yes")
    [trained] = renderer.encode([(messages, "f:1")])
    [prompt_only] = renderer.encode([(messages[:-1], "f:1")])
    served = renderer.tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert (
        trained.prompt_ids == prompt_only.prompt_ids == served
        and prompt_only.target_ids == []
        and prompt_only.target is None
    )


def test_earlier_assistant_turns_are_context_only():
    renderer = Renderer(byte_tokenizer())
    [row] = renderer.encode(
        [([*conversation("first"), {"role": "user", "content": "q"}, *conversation("last")[2:]], "f:1")]
    )
    assert renderer.answer(row.target_ids)[0] == "last" and row.input == "q"


def test_a_template_that_trims_the_answer_makes_the_row_unfit():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")
    [row] = Renderer(tokenizer).encode([(conversation(" padded "), "f:1")])
    assert isinstance(row, UnfitRow) and "alters the answer" in str(row)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}<|im_end|>{{ messages[0].content }}", "cannot be verified"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "no end-of-turn token"),
    ],
)
def test_a_template_that_cannot_be_supervised_is_refused(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        Renderer(tokenizer)


OTHER_TURNS = (  # <pad> ends a turn
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("own", [TEMPLATE, None])
def test_a_template_of_ones_own_replaces_the_tokenizers_or_gives_it_one(own):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = own
    renderer = Renderer(tokenizer, template=OTHER_TURNS)
    [row] = renderer.encode([(conversation("yes", "Be exact."), "f:1")])
    ids = tokenizer("[system] Be exact.<pad>[user] héllo  wörld\nsecond line<pad>[assistant] ")["input_ids"]
    assert row.prompt_ids == ids
    assert row.target_ids == [*tokenizer("yes")["input_ids"], 0] and renderer.stop_ids == (0, 2)
    assert renderer.answer([*row.target_ids, 5]) == ("yes", True)
    assert renderer.templated and renderer.replaced
    assert renderer.note.startswith("model.chat_template is set: servers need the exported")
    assert "{{ m.content }}<pad>" in tokenizer.chat_template, "it is saved with the adapter"


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # which some editors put first
def test_the_bases_own_template_given_by_its_file_needs_no_warning(mark, tmp_path):
    (tmp_path / "same.jinja").write_text(mark + TEMPLATE)
    renderer = Renderer(byte_tokenizer(), template=read_template(str(tmp_path / "same.jinja")))
    assert not renderer.replaced and renderer.note == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "FILE is empty; without the key, the base's own template is used"),
        (None, "FILE: No such file or directory"),
        (
            "{% for m in messages %}",
            "the loss mask of the chat template cannot be verified: the chat template refuses the conversa",
        ),
        (
            "{{ messages[0].content }}",
            "the loss mask of the chat template cannot be verified: the chat template alters the answer",
        ),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}",
            "the loss mask of the chat template cannot be verified: the chat temp",
        ),
        (
            TEMPLATE.replace("assistant", "assistant:"),
            "the loss mask of the chat template cannot be verified: the prompt is not a",
        ),
    ],
)
def test_a_bad_template_of_ones_own_is_one_line_with_its_key(template, message, tmp_path):
    file = tmp_path / "own.jinja"
    if template is not None:
        file.write_text(template)
    with pytest.raises(UserError) as error:
        Renderer(byte_tokenizer(), template=read_template(str(file)))
    assert str(error.value).replace(str(file), "FILE").startswith(f"model.chat_template: {message}")


FOLDED = (  # Gemma 3: the system prompt in front of the first user turn
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' and loop.index <= 2 %}{{ system }}\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = "{% set c = m.content if m.role == 'assistant' else m.content | EDIT %}"
WITHOUT_SYSTEM = {  # Gemma 1 and 2 refuse a system turn, others leave it out
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE,
    "leaves out": TEMPLATE.replace("messages", "(messages | selectattr('role', 'in', ['user', 'assistant']))"),
}
LEFT_OUT = {  # template, system prompt, part of the message
    "an earlier turn": (TEMPLATE.replace("messages", "messages[-2 if messages[-1].role == 'assistant' else -1:]"),
                        "Be exact.", "leaves out the user turn 'Be exact. first'"),
    "a user turn": (TEMPLATE.replace("messages", "(messages | rejectattr('role', 'eq', 'user'))"), "Be exact.",
                    "leaves out the user turn"),
    "the end of a text": (TEMPLATE.replace("{{ m.content }}", CONTEXT.replace("EDIT", "truncate(9, true, '', 0)")
                                           + "{{ c }}"), "Be exact, and say nothing else.", "leaves out the system"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_SYSTEM)
def test_without_a_system_role_its_text_is_in_front_of_the_first_user_turn(case):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITHOUT_SYSTEM[case]
    renderer = Renderer(tokenizer)
    turns = [
        *conversation("one", "Be exact."),
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "two"},
    ]
    [row, prompt_only, plain] = renderer.encode([(turns, "f:1"), (turns[:-1], "f:2"), (turns[1:], "f:3")])
    begin = "<|im_start|>user\nBe exact.\n\nhéllo  wörld\nsecond line<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
    assert tokenizer.decode(row.prompt_ids) == begin + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_only.prompt_ids == row.prompt_ids and row.input == "q" and row.messages == turns
    assert "Be exact" not in tokenizer.decode(plain.prompt_ids)
    served = tokenizer.apply_chat_template(renderer.turns(turns[:-1]), add_generation_prompt=True, return_dict=False)
    assert served == row.prompt_ids, "what check-endpoint sends"
    assert renderer.note.startswith("the chat template has no system role: ")
    turns[0] = {"role": "developer", "content": "Be exact."}
    assert [r.prompt_ids for r in renderer.encode([(turns, "f:1")])] == [row.prompt_ids]


def test_a_developer_turn_is_rendered_as_such_or_as_the_system_prompt():
    turns = [{"role": "developer", "content": "Be terse."}, *conversation("yes")[1:]]
    own, other = byte_tokenizer(), byte_tokenizer()
    other.chat_template = TEMPLATE.replace("messages", "(messages | rejectattr('role', 'eq', 'developer'))")
    for tokenizer, role in ((own, "developer"), (other, "system")):
        [row] = Renderer(tokenizer).encode([(turns, "f:1")])
        assert tokenizer.decode(row.prompt_ids).startswith(f"<|im_start|>{role}\nBe terse.<|im_end|>"), role


def test_without_a_chat_template_a_prompt_is_the_system_prompt_and_the_input_before_blank_lines():
    renderer = Renderer.load(str(shared("tokenizers/gpt2")))
    [row] = renderer.encode([(conversation("yes", "Be brief."), "f:1")])
    assert renderer.tokenizer.decode(row.prompt_ids) == "Be brief.\n\nhéllo  wörld\nsecond line\n\n"
    assert renderer.tokenizer.decode(row.target_ids) == "yes<|endoftext|>"
    assert renderer.note == (
        "the base has no chat template, which chat servers need; a prompt is the system prompt, if any, and the input, "
        "each followed by a blank line, and <|endoftext|> ends the answer"
    )


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_turn_that_the_template_leaves_out_makes_the_row_unfit(case):
    template, system, expected = LEFT_OUT[case]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    first = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "of all"}]
    turns = [conversation("yes", system)[0], *first, *conversation("yes")[1:]]
    [row, prompt_only] = Renderer(tokenizer).encode([(turns, "f:1"), (turns[:-1], "f:2")])
    assert isinstance(row, UnfitRow) and isinstance(prompt_only, UnfitRow) and expected in str(row)


@pytest.mark.parametrize("edit", ["trim", "lower", "replace('\n', ' ')", "folded"])
def test_a_template_may_fold_or_trim_a_turn(edit):
    tokenizer = byte_tokenizer()
    edited = TEMPLATE.replace("{{ m.content }}", CONTEXT.replace("EDIT", edit) + "{{ c }}")
    tokenizer.chat_template = FOLDED if edit == "folded" else edited
    system = ' Say "yes" & <no>,\nÄnd  nothing else. '
    [row, short] = Renderer(tokenizer).encode([(conversation("yes", system), "f:1"), (conversation("no")[1:], "f:2")])
    assert isinstance(row, Row) and isinstance(short, Row), row


def test_a_template_may_leave_out_the_thoughts_of_an_earlier_answer():
    messages = [*conversation("<think>well</think>first"), {"role": "user", "content": "q"}, *conversation("last")[2:]]
    [row] = Renderer.load(str(shared("tokenizers/qwen3"))).encode([(messages, "f:1")])
    assert isinstance(row, Row)


@pytest.mark.parametrize(
    "pattern, expected", [("%d %b %Y", "25 Nov 2026"), ("%B %d, %Y %H:%M", "November 25, 2026 00:00")]
)
def test_the_date_of_a_template_is_that_of_the_run(pattern, expected):
    tokenizer = byte_tokenizer()
    # As Llama 3.2 has it.
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('PATTERN') %}"
        "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today is {{ date_string }}\n" + TEMPLATE
    ).replace("PATTERN", pattern)
    renderer = Renderer(tokenizer, "2026-11-25")
    [row] = renderer.encode([(conversation("yes"), "f:1")])
    assert f"Today is {expected}\n" in renderer.tokenizer.decode(row.prompt_ids) and renderer.date == "2026-11-25"
    plain = tokenizer.apply_chat_template(conversation("yes"), tokenize=False)  # what a server writes
    assert datetime.now().strftime(pattern.removesuffix(" %H:%M")) in plain


def test_a_template_without_a_date_has_none():
    assert Renderer(byte_tokenizer(), "2026-11-25").date is None


@pytest.mark.parametrize("base", ["no/such/folder", "./here", "nowhere", "../x", "models/qwen"])
def test_a_mistyped_folder_is_not_looked_up_on_a_hub(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(UserError, match="no folder"):
        check_base(base)


def test_a_refused_conversation_does_not_affect_the_others():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'odd' %}{{ raise_exception('no odd ones') }}{% endif %}" + tokenizer.chat_template
    )
    rows = [(conversation(str(n), "odd" if n in (3, 12) else "even"), f"f:{n}") for n in range(20)]
    encoded = list(Renderer(tokenizer).encode(rows))
    assert [n for n, row in enumerate(encoded) if isinstance(row, UnfitRow)] == [3, 12]
    assert str(encoded[3]) == "the chat template refuses the conversation: no odd ones"
    good = [row for row in encoded if isinstance(row, Row)]
    assert [row.number for row in good] == [n for n in range(20) if n not in (3, 12)]
    assert [row.target for row in good] == [str(row.number) for row in good]


def test_truncation_and_padding_of_a_tokenizer_are_switched_off():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    [row] = Renderer(tokenizer).encode([(conversation("long enough"), "f:1")])
    [plain] = Renderer(byte_tokenizer()).encode([(conversation("long enough"), "f:1")])
    assert row == plain


def test_reasoning_of_an_earlier_answer_is_not_looked_for_in_other_turns():
    """The text of a turn is removed once it was found: a short answer must not be found within a longer turn."""
    renderer = Renderer(byte_tokenizer())
    thought = "<think>\nThe customer is unsure and gives no clear sign of success.\n</think>\n\nno"
    for turns in (("I do not know whether it works", thought, "And now?"), ("okay", "What?", "ok!!!!!!!!")):
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, (*turns, "x"), strict=True)]
        [row] = renderer.encode([(messages, "f:1")])
        assert isinstance(row, Row), row
