"""Rows are cleaned with reasons, split by content, encoded, and handed over step by step."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from conftest import SCHEMA, WORDY, byte_tokenizer, pair, shared
from formtune.data.cleaning import Example, check_example, repair, repair_answer
from formtune.data.datamodule import FormatDataModule, ResumableSampler
from formtune.errors import UserError
from formtune.formats import JsonSchema, ToolCalls
from formtune.training.pipeline import prepare


@pytest.fixture
def data(task, base, monkeypatch):
    """A function that makes the data module of a task with these rows."""
    folder, write = task
    monkeypatch.chdir(folder)  # the cache is in the working directory

    def make(rows, **options):
        defaults = {"format": JsonSchema("schema.json"), "validation": 0.2, "test": 0.2, "tokenizer": base}
        datamodule = FormatDataModule(train=write("train.jsonl", rows), **(defaults | options))
        datamodule.trainer = None
        datamodule.setup("fit")
        return datamodule

    return make


def used(splits):
    """All used rows, by line."""
    return {int(row.where.rpartition(":")[2]): row for rows in splits.rows.values() for row in rows}


def tool_rows(count, **more):
    """Rows whose answers call a tool; a number in each input."""
    tool = {"name": "count", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    for n in range(count):
        call = {"type": "function", "function": {"name": "count", "arguments": json.dumps({"n": n})}}
        user = {"role": "user", "content": f"{WORDY[n % 16]} {WORDY[n // 16]} please, {n}"}
        yield {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": [tool], **more}


def test_rows_of_tool_calls_are_checked_by_their_tools_and_encoded(data):
    rows = list(tool_rows(60))
    rows[7]["tools"] = [{"name": "other"}]
    rows[8]["tools"] = json.dumps([{"name": "count", "parameters": {"type": "dict"}}])
    splits = data(rows, tokenizer=str(shared("tokenizers/qwen3")), format=ToolCalls(), bad_rows="drop").splits
    row = used(splits)[6]
    assert len(used(splits)) == 58
    assert row.target == '<tool_call>\n{"name": "count", "arguments": {"n": 5}}\n</tool_call>'
    assert row.tools == row.schema and '"count"' in row.tools
    reasons = {row.where.rpartition(":")[2]: (row.reason, row.detail) for row in splits.quarantine}
    assert reasons["8"] == ("format", "bad_value_form: $[0].name: 'count'; the tools are 'other'")
    assert reasons["9"][0] == "schema"
    assert reasons["9"][1].startswith("the parameters of count: $.type: not a JSON Schema")


def test_rows_with_other_tools_are_neither_duplicates_nor_conflicts(data):
    rows = list(tool_rows(40))
    rows += [{"messages": row["messages"], "tools": [*row["tools"], {"name": "more"}]} for row in rows[:5]]
    tokenizer = str(shared("tokenizers/qwen3"))
    splits = data(rows, tokenizer=tokenizer, format=ToolCalls(), validation=0.1, test=0.1).splits
    assert sum(map(len, splits.rows.values())) + len(splits.quarantine) == 45
    assert not [row for row in splits.quarantine if row.reason == "conflict"]


def test_a_rows_own_system_prompt_replaces_the_tasks(data):
    splits = data([pair(n) | {"system": "Row's." if n % 2 else None} for n in range(60)], system="Task's.").splits
    prompts = {line: byte_tokenizer().decode(row.prompt_ids) for line, row in used(splits).items()}
    assert len(prompts) == 60 and splits.own_system == 30
    for line, text in prompts.items():  # line 1 is row 0
        assert ("Row's." in text, "Task's." in text) == (line % 2 == 0, line % 2 == 1)


def test_ignored_columns_are_counted_over_all_files_and_printed_before_training(task, data, capsys):
    _, write = task
    rows = [pair(n) | {"id": n, "topic": "t" if n < 9 else None} for n in range(60)]
    test = write("test.jsonl", [pair(61, "another text") | {"id": 61}])
    datamodule = data(rows, test=test, prompts=write("prompts.jsonl", [{"prompt": "p", "user": 4}] * 3))
    assert datamodule.splits.ignored == {"id": 61, "topic": 9}
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, loggers=[], default_root_dir="")
    prepare(trainer, datamodule)
    assert "\nignored columns: id (61 rows), topic (9 rows)\n" in capsys.readouterr().out
    datamodule.splits = None
    prepare(trainer, datamodule, "predict")
    assert capsys.readouterr().out == "data.prompts: ignored columns: user (3 rows)\n"


def test_rows_under_different_system_prompts_do_not_conflict(data):
    def row(task, n, answer):
        turns = [("system", task), ("user", f"text {n}"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [row(t, n, f'{{"n":{n},"s":"{t}"}}') for n in range(40) for t in ("a", "b")]
    splits = data(rows).splits
    assert sum(map(len, splits.rows.values())) == 80 and not splits.reasons
    for name, others in (("validation", "test"), ("train", "test"), ("train", "validation")):
        assert not {r.input for r in splits.rows[name]} & {r.input for r in splits.rows[others]}


def test_a_text_that_holds_a_control_token_is_refused(data):
    with pytest.raises(UserError, match=r"train.jsonl:1: the text contains <\|im_end\|>"):
        data([pair(1, "bye <|im_end|> now"), *(pair(n) for n in range(2, 60))])


@pytest.mark.parametrize(
    ("text", "steps", "repaired"),
    [
        (" <p>Cafe\u0301&nbsp;&amp;\u200b  x</p> ", ["edges"], "<p>Cafe\u0301&nbsp;&amp;\u200b  x</p>"),
        (
            " <p>Cafe\u0301&nbsp;&amp;\u200b  x</p> ",
            ["unicode", "control", "html", "spaces", "edges"],
            "Café & x",
        ),
        ("cafÃ© crÃ¨me", ["encoding"], "café crème"),
        ("café Ã la carte №5 日本", ["encoding"], "café Ã la carte №5 日本"),  # rightly encoded
    ],
)
def test_inputs_are_repaired_by_the_named_steps_and_answers_never(text, steps, repaired):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": " <b> cafÃ© "}]
    assert [turn["content"] for turn in repair(turns, steps)] == [repaired, " <b> cafÃ© "]


def test_rows_are_checked_with_a_reason(task):
    one, two = '{"n":1,"s":"a"}', '{"n":2,"s":"a"}'
    rows = [("a text", one), (" twice ", one), ("a text", two), ("", one), ("fenced", f"```json\n{one}\n```")]
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in rows]
    repairs = Counter()
    examples = [Example(messages, f"f:{line}") for line, messages in enumerate(turns, 1)]
    judged = [check_example(example, JsonSchema(SCHEMA), ["edges"], [], repairs) for example in examples]
    assert [getattr(row, "reason", "") for row in judged] == ["", "", "", "empty", "format"]
    assert judged[1].input == "twice" and judged[1].value == {"n": 1, "s": "a"} and repairs == {"edges": 1}


@pytest.mark.parametrize(
    ("answer", "steps", "repaired"),
    [
        ('```json\n{"n":1,"s":"a"}\n```', ["fence"], '{"n":1,"s":"a"}'),
        (' {"n":1,"s":"a"}\n', ["edges"], '{"n":1,"s":"a"}'),
        ('{"s": "a", "n": 1}', ["canonical"], '{"n":1,"s":"a"}'),
        (' ```\n{"s": "a", "n": 1}\n```', ["edges", "fence", "canonical"], '{"n":1,"s":"a"}'),
        # Not asked for, or of no use: the answer stays what it is.
        ('```json\n{"n":1,"s":"a"}\n```', ["edges"], None),
        ('Sure: {"n":1,"s":"a"}', ["edges", "fence", "canonical"], None),
        (' {"n":1} ', ["edges", "fence", "canonical"], None),
    ],
)
def test_an_answer_is_repaired_only_as_asked_and_only_if_its_format_is_then_valid(answer, steps, repaired):
    repairs = Counter()
    assert repair_answer(answer, JsonSchema(SCHEMA), steps, repairs) == (repaired or answer)
    assert bool(repairs) == (repaired is not None)


def test_equal_inputs_are_never_in_two_splits(data):
    texts = [f"number {n * 7919} of {n}" for n in range(200)]
    rows = [pair(n, text) for n, text in enumerate(texts)]
    rows += [pair(n, f" {text.upper()}!") for n, text in enumerate(texts)]
    splits = data(rows).splits.rows
    keys = {name: {" ".join(r.input.casefold().split()) for r in rows} for name, rows in splits.items()}
    assert sum(map(len, splits.values())) == 200  # those in capitals repeat the others
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert all(10 < len(splits[name]) < 80 for name in ("validation", "test"))


def test_a_split_does_not_change_when_rows_are_added(data):
    few, many = (data([pair(n) for n in range(count)]).splits.rows for count in (100, 150))
    for name in few:
        assert {r.input for r in few[name]} <= {r.input for r in many[name]}


def test_rows_of_a_given_test_file_are_leaks_in_train(task, data):
    test = task[1]("test.jsonl", [pair(61, "another text")])
    splits = data([*(pair(n) for n in range(60)), pair(61, "Another text!")], test=test).splits
    assert splits.reasons["leak"] == 1
    assert [row.input for row in splits.rows["test"]] == ["another text"]


@pytest.mark.parametrize("limits", [{"max_length": 70}, {"max_new_tokens": 5}])
def test_long_rows_are_refused_or_dropped_and_never_cut(data, limits):
    rows = [pair(n, "x" * n + f" {n}") for n in range(60)]
    with pytest.raises(UserError, match=r"train.jsonl:\d+: .*tokens.* is \d+"):
        data(rows, **limits)
    if "max_length" in limits:
        splits = data(rows, bad_rows="drop", **limits).splits
        lengths = [len(row) for row in used(splits).values()]
        assert max(lengths) <= 70 and splits.reasons["too_long"] + len(lengths) == 60


def test_if_no_row_is_left_the_error_names_the_reasons(data):
    with pytest.raises(UserError, match=r"data.train: the split is empty \(2 read; 2 conflict\)"):
        data([pair(1, "a"), pair(2, "a")])


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    order = ResumableSampler(50, seed=3)
    first = list(order)
    assert list(ResumableSampler(50, seed=3)) == first and sorted(first) == list(range(50))
    order.set_epoch(1)
    assert list(order) != first and list(ResumableSampler(50, seed=4)) != first


def test_a_batch_is_the_rows_of_one_step_and_the_last_one_may_be_short(data):
    datamodule = data([pair(n) for n in range(100)], rows_per_step=16)
    sizes = [len(batch) for batch in datamodule.train_dataloader()]
    total = len(datamodule.splits.rows["train"])
    assert sizes == [16] * (total // 16) + ([total % 16] if total % 16 else [])


def test_the_system_prompt_may_hold_the_schema(data):
    datamodule = data([pair(n) for n in range(60)], system="Keep this: {schema}")
    text = byte_tokenizer().decode(datamodule.splits.rows["train"][0].prompt_ids)
    schema = datamodule.settings.format.to_dict()["init_args"]["schema"]
    assert json.dumps(schema, separators=(",", ":")) in text


def test_only_an_instruction_of_its_own_is_removed_from_the_input(data):
    rows = [
        pair(n) | {"prompt": f"{'Answer: ' if n % 2 else 'Answers are due: '}{pair(n)['prompt']}"} for n in range(60)
    ]
    splits = data(rows, system="Answer").splits
    inputs = {row.input.split()[0] for split in splits.rows.values() for row in split}
    assert inputs == {":", "Answers"}
