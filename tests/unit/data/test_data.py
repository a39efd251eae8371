"""Rows are read with their line numbers, cleaned with reasons, split by content and handed over step by step."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from conftest import SCHEMA, WORDY, byte_tokenizer, pair, shared
from formtune.data import Columns
from formtune.data.cleaning import Example, judge, repair, repair_answer
from formtune.data.datamodule import FormatDataModule, Order
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.formats import JsonSchema, ToolCalls
from formtune.training.pipeline import prepare


def module(task, rows, **options):
    folder, write = task
    found = FormatDataModule(
        train=write("train.jsonl", rows),
        **({"format": JsonSchema(str(folder / "schema.json")), "validation": 0.2, "test": 0.2} | options),
    )
    found._trainer = None
    return found


@pytest.fixture
def data(task, base, monkeypatch):
    monkeypatch.chdir(task[0])  # the cache is the working directory's

    def make(rows, **options):
        made = module(task, rows, tokenizer=base, **options)
        made.trainer = None
        made.setup("fit")
        return made

    return make


def test_json_lines_survive_bom_crlf_and_blank_lines_and_keep_dates_as_text(tmp_path):
    plain, odd = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_bytes(b'{"d": "2026-01-02"}\n{"d": "x"}\n')
    odd.write_bytes(b'\xef\xbb\xbf{"d": "2026-01-02"}\r\n\r\n{"d": "x"}')
    rows = [[record for record, _ in read_records(str(path))] for path in (plain, odd)]
    assert rows[0] == rows[1] == [{"d": "2026-01-02"}, {"d": "x"}]
    assert [where.rpartition(":")[2] for _, where in read_records(str(odd))] == ["1", "3"]


def test_csv_parquet_and_saved_data_sets_give_the_same_records(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": "a, b", "completion": "2026-01-02"}, {"prompt": 'q"', "completion": "7"}]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('prompt,completion\n"a, b",2026-01-02\n"q""",7\n')
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "a.csv", "saved"):
        assert [r for r, _ in read_records(str(tmp_path / name))] == records


@pytest.mark.parametrize("path", ["missing.jsonl", "rows.txt", "no/such/place", "rows.csv", "rows.parquet"])
def test_a_source_that_cannot_be_read_is_refused(tmp_path, path):
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "rows.csv").write_text("a,b\n1\n")
    (tmp_path / "rows.parquet").write_text("x")
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        list(read_records(str(tmp_path / path)))


def test_a_template_over_columns_is_filled_as_plain_text():
    record = {"title": "{body} {body.__class__}", "body": "B"}
    assert Columns(prompt="T {title}: {body}")._prompt(record, "f:1") == "T {body} {body.__class__}: B"
    with pytest.raises(UserError, match="f:1: no column `titel`"):
        Columns(prompt="T {titel}: {body}")._prompt(record, "f:1")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def read(record, with_target=True, **columns):
    """Turns of a record as pairs, and the names of its keys that are not read."""
    ignored = set()
    turns = Columns(**columns).conversation(record, "f:1", with_target, ignored)
    return [(turn["role"], turn["content"]) for turn in turns], ignored


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "f:1: `functions`"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "f:1: `chat_template_kwargs`"),
        ({"prompt": "a", "completion": "b", "reasoning_content": "r"}, "f:1: `reasoning_content`"),
        ({"messages": [USER, ANSWER | {"tools": CALL}]}, r"f:1: messages\[1\]: `tools` .* text of a turn"),
        ({"messages": [USER | {"tool_calls": CALL}, ANSWER]}, r"f:1: messages\[0\]: `tool_calls`"),
        ({"messages": [USER, ANSWER | {"tool_calls": ["f"]}]}, r"messages\[1\].tool_calls\[0\]: write .*JSON text"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "x"}]}]}, r"tool_calls\[0\]: write"),
        ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, r"messages\[1\]: `function_call`"),
        ({"messages": [USER, ANSWER | {"thinking": "r"}, USER, ANSWER]}, r"messages\[1\]: `thinking`"),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}]}, r"messages\[1\]: `refusal`"),
        ({"messages": [USER, ANSWER | {"audio": {"id": "x"}}]}, r"messages\[1\]: `audio`"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, r"messages\[1\]: `weight` is 0, .* remove the row"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}, USER, ANSWER]}, r"messages\[1\]: `weight` is 0.5"),
        ({"messages": [USER, ANSWER | {"train": False}]}, r"messages\[1\]: `train` is False"),
        ({"prompt": "a", "completion": "b", "system": 7}, "f:1: `system` is int, .* data.columns.system: null"),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "t"}, "both hold a system prompt"),
    ],
)
def test_a_part_that_would_change_what_is_trained_is_refused_by_name(record, message):
    with pytest.raises(UserError, match=message):
        Columns().conversation(record, "f:1", True)


def test_parts_that_say_nothing_change_nothing():
    nothing = {"tools": [], "functions": None, "parallel_tool_calls": None, "system": "", "id": None}
    quiet = {
        "tool_calls": None,
        "function_call": {"name": None, "arguments": None},
        "reasoning_content": "",
        "name": None,
    }
    turns = [USER | quiet, ANSWER | quiet | {"weight": 1, "refusal": None, "thinking": False}]
    assert read({"messages": turns} | nothing) == ([("user", "a"), ("assistant", "b")], {"messages[].thinking"})
    assert read({"prompt": "a", "completion": "b", "tools": "[]"} | nothing) == (
        [("user", "a"), ("assistant", "b")],
        set(),
    )


def test_weight_zero_is_what_every_turn_before_the_answer_has():
    turns = [USER | {"weight": 0}, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1.0}]
    assert len(read({"messages": turns})[0]) == 4
    # Where no answer is trained, neither are the parts of an answer at the end.
    assert read({"messages": [USER, ANSWER | {"weight": 0, "tool_calls": CALL}]}, with_target=False)[0] == [
        ("user", "a")
    ]


def test_calls_get_their_arguments_as_an_object_and_results_keep_their_id():
    result = {"role": "tool", "tool_call_id": "c", "name": "f", "content": "1", "extra": 1}
    for given in (None, "", "x"):
        turns = [USER, {"role": "assistant", "content": given, "tool_calls": CALL}, result, ANSWER]
        ignored = set()
        found = Columns().conversation({"messages": turns}, "f:1", True, ignored)
        function = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
        assert found[1] == {"role": "assistant", "content": given or "", "tool_calls": [function]}
        assert found[2] == {key: value for key, value in result.items() if key != "extra"}
        assert ignored == {"messages[].extra"}
    assert Columns().conversation({"messages": turns[:3]}, "f:1", False)[-1]["role"] == "tool"


@pytest.mark.parametrize("written", [list, json.dumps])
def test_tools_are_read_as_a_list_or_as_json_text(written):
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
    assert json.loads(Columns().tools({"tools": written(tools)}, "f:1")) == tools
    assert Columns().tools({"tools": []}, "f:1") is None and Columns().tools({}, "f:1") is None
    assert Columns(prompt="{a} {tools}").tools({"tools": "saw"}, "f:1") is None, "the prompt holds them"
    for bad in ("saw, hammer", [{"x": 1}], [*tools, tools[1]], {"name": "f"}):
        with pytest.raises(UserError, match="f:1: `tools` must be a list of tools .* rename the column"):
            Columns().tools({"tools": bad}, "f:1")


def tool_rows(count, **more):
    """Rows whose answers call a tool; a number in each input."""
    tool = {"name": "count", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    for n in range(count):
        call = {"type": "function", "function": {"name": "count", "arguments": json.dumps({"n": n})}}
        user = {"role": "user", "content": f"{WORDY[n % 16]} {WORDY[n // 16]} please, {n}"}
        yield {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": [tool], **more}


def test_rows_of_tool_calls_are_judged_by_their_tools_and_encoded(task, monkeypatch):
    monkeypatch.chdir(task[0])
    rows = list(tool_rows(60))
    rows[7]["tools"] = [{"name": "other"}]
    rows[8]["tools"] = json.dumps([{"name": "count", "parameters": {"type": "dict"}}])
    made = module(task, rows, tokenizer=str(shared("tokenizers/qwen3")), format=ToolCalls(), bad_rows="drop")
    made.trainer = None
    made.setup("fit")
    found = {row.where.rpartition(":")[2]: row for split in made.splits.rows.values() for row in split}
    assert len(found) == 58 and found["6"].target == (
        '<tool_call>\n{"name": "count", "arguments": {"n": 5}}\n</tool_call>'
    )
    assert found["6"].tools == found["6"].schema and '"count"' in found["6"].tools
    reasons = {row.where.rpartition(":")[2]: (row.reason, row.detail) for row in made.splits.quarantine}
    assert reasons["8"] == ("format", "bad_value_form: $[0].name: 'count'; the tools are 'other'")
    assert reasons["9"][0] == "schema" and reasons["9"][1].startswith(
        "the parameters of count: $.type: not a JSON Schema"
    )


def test_rows_with_other_tools_are_neither_duplicates_nor_conflicts(task, monkeypatch):
    monkeypatch.chdir(task[0])
    rows = list(tool_rows(40))
    rows += [{"messages": row["messages"], "tools": [*row["tools"], {"name": "more"}]} for row in rows[:5]]
    made = module(task, rows, tokenizer=str(shared("tokenizers/qwen3")), format=ToolCalls(), validation=0.1, test=0.1)
    made.trainer = None
    made.setup("fit")
    assert sum(map(len, made.splits.rows.values())) + len(made.splits.quarantine) == 45
    assert not [row for row in made.splits.quarantine if row.reason == "conflict"]


def test_parts_of_text_are_joined():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "image_url": None, "cache_control": {"type": "e"}},
    ]
    turns, ignored = read({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert turns[0] == ("user", "ab") and ignored == {"messages[].content[].cache_control"}


def test_every_key_that_is_not_read_is_named():
    row = {"prompt": "a", "completion": "b", "id": 0, "ok": False, "source": 7, "input": "more", "weight": 3}
    assert read(row)[1] == {"id", "ok", "source", "input", "weight"}
    assert read(row, source="source", prompt="{prompt} {input}")[1] == {"id", "ok", "weight"}
    named = {
        "messages": [USER | {"name": "Ann"}, ANSWER],
        "prompt": "x",
        "completion": "y",
        "parallel_tool_calls": False,
    }
    assert read(named) == (
        [("user", "a"), ("assistant", "b")],
        {"prompt", "completion", "parallel_tool_calls", "messages[].name"},
    )
    alpaca = {"instruction": "a", "input": "more", "output": "b"}
    assert read(alpaca, prompt="instruction", completion="output")[1] == {"input"}


def test_a_system_column_is_the_rows_own_system_prompt():
    row = {"prompt": "a", "completion": "b", "system": "s"}
    with_system = [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert read(row) == (with_system, set())
    assert read({"messages": [USER, ANSWER], "system": "s"}) == (with_system, set())
    assert read(row, system=None) == (with_system[1:], {"system"})
    assert read(row, prompt="{prompt} on {system}") == ([("user", "a on s"), ("assistant", "b")], set())


def test_a_rows_own_system_prompt_comes_before_the_tasks(data):
    made = data([pair(n) | {"system": "Row's." if n % 2 else None} for n in range(60)], system="Task's.")
    prompts = {r.where: byte_tokenizer().decode(r.prompt_ids) for rows in made.splits.rows.values() for r in rows}
    assert len(prompts) == 60 and made.splits.own_system == 30
    for where, text in prompts.items():
        even_line = int(where.rpartition(":")[2]) % 2 == 0  # line 1 is row 0
        assert ("Row's." in text, "Task's." in text) == (even_line, not even_line)


def test_ignored_columns_are_counted_over_all_files_and_printed_before_training(task, data, capsys):
    _, write = task
    rows = [pair(n) | {"id": n, "topic": "t" if n < 9 else None} for n in range(60)]
    held = write("test.jsonl", [pair(61, "another text") | {"id": 61}])
    made = data(rows, test=held, prompts=write("prompts.jsonl", [{"prompt": "p", "user": 4}] * 3))
    assert made.splits.ignored == {"id": 61, "topic": 9}
    trainer = SimpleNamespace(is_global_zero=True, loggers=[], default_root_dir="")
    prepare(trainer, made)
    assert "\nignored columns: id (61 rows), topic (9 rows)\n" in capsys.readouterr().out
    made.splits = None
    prepare(trainer, made, "predict")
    assert capsys.readouterr().out == "data.prompts: ignored columns: user (3 rows)\n"


def test_who_wrote_a_row_is_read_where_the_column_is_named():
    assert Columns().origin({"source": 7}, "f:1") == ""
    named = Columns(source="by")
    assert [named.origin(row, "f:1") for row in ({"by": "m"}, {"by": "Human "}, {"by": None}, {})] == [
        "m",
        "human",
        "",
        "",
    ]
    with pytest.raises(UserError, match="f:1: `by` is int, .* data.columns.source: null"):
        named.origin({"by": 7}, "f:1")


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
    with pytest.raises(UserError, match=r"train.jsonl:1: the text holds <\|im_end\|>"):
        data([pair(1, "bye <|im_end|> now"), *(pair(n) for n in range(2, 60))])


def test_repairs_touch_inputs_by_name_and_never_answers():
    turns = [
        {"role": "user", "content": " <p>Cafe\u0301&nbsp;&amp;\u200b  x</p> "},
        {"role": "assistant", "content": " <b> "},
    ]
    assert [m["content"] for m in repair(turns, ["edges"])] == ["<p>Cafe\u0301&nbsp;&amp;\u200b  x</p>", " <b> "]
    everything = repair(turns, ["unicode", "control", "html", "spaces", "edges"])
    assert [m["content"] for m in everything] == ["Café & x", " <b> "]


def test_every_row_is_kept_or_quarantined_with_its_reason(task):
    folder, _ = task
    format = JsonSchema(schema=str(folder / "schema.json"))

    def example(prompt, completion, line):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return Example(turns, f"f:{line}")

    one, two = '{"n":1,"s":"a"}', '{"n":2,"s":"a"}'
    rows = [
        example("kept", one, 1),
        example("twice", one, 2),
        example(" twice ", one, 3),
        example("torn", one, 4),
        example("torn", two, 5),
        example("torn", one, 6),
        example("", one, 7),
        example("fenced", f"```json\n{one}\n```", 8),
    ]
    repairs = Counter()
    judged = list(judge(rows, format, ["edges"], [], repairs))
    assert [getattr(row, "reason", "") for row in judged] == ["", "", "", "", "", "", "empty", "format"]
    assert judged[2].input == "twice" and judged[2].value == {"n": 1, "s": "a"} and repairs == {"edges": 1}


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
def test_an_answer_is_repaired_only_as_asked_and_only_if_it_then_keeps_the_format(answer, steps, repaired):
    repairs = Counter()
    assert repair_answer(answer, JsonSchema(SCHEMA), steps, repairs) == (repaired or answer)
    assert bool(repairs) == (repaired is not None)


def test_a_wrong_encoding_is_repaired_and_right_ones_are_left():
    turns = [{"role": "user", "content": "cafÃ© crÃ¨me"}, {"role": "user", "content": "café Ã la carte №5 日本"}]
    assert [m["content"] for m in repair(turns, ["encoding"])] == ["café crème", turns[1]["content"]]


def test_equal_inputs_never_stand_on_both_sides_of_a_split(data):
    texts = [f"number {n * 7919} of {n}" for n in range(200)]
    rows = [pair(n, text) for n, text in enumerate(texts)] + [
        pair(n, f" {text.upper()}!") for n, text in enumerate(texts)
    ]
    splits = data(rows).splits.rows
    keys = {name: {" ".join(r.input.casefold().split()) for r in rows} for name, rows in splits.items()}
    assert sum(map(len, splits.values())) == 200  # those in capitals repeat the others
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert all(10 < len(splits[name]) < 80 for name in ("validation", "test"))


def test_a_split_does_not_change_when_rows_are_added(data):
    few, many = (data([pair(n) for n in range(count)]).splits.rows for count in (100, 150))
    for name in few:
        assert {r.input for r in few[name]} <= {r.input for r in many[name]}


def test_rows_of_the_given_test_file_are_taken_out_of_train(task, data):
    _, write = task
    held = write("test.jsonl", [pair(61, "another text")])
    made = data([*(pair(n) for n in range(60)), pair(61, "Another text!")], test=held)
    assert made.splits.reasons["leak"] == 1
    assert [r.input for r in made.splits.rows["test"]] == ["another text"]


@pytest.mark.parametrize(("limits", "reason"), [({"max_length": 70}, "too_long"), ({"max_new_tokens": 5}, "too_long")])
def test_long_rows_are_refused_or_dropped_and_never_cut(data, limits, reason):
    rows = [pair(n, "x" * n + f" {n}") for n in range(60)]
    with pytest.raises(UserError, match=r"train.jsonl:\d+: .*tokens.* is \d+"):
        data(rows, **limits)
    if "max_length" in limits:
        made = data(rows, bad_rows="drop", **limits)
        kept = [r for rows in made.splits.rows.values() for r in rows]
        assert all(len(r) <= 70 for r in kept) and made.splits.reasons[reason] + len(kept) == 60


def test_nothing_left_is_an_error_with_the_reasons(data):
    with pytest.raises(UserError, match=r"data.train: no row is left to use \(2 read; 2 conflict\)"):
        data([pair(1, "a"), pair(2, "a")])


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    order = Order(50, seed=3)
    first = list(order)
    assert list(Order(50, seed=3)) == first and sorted(first) == list(range(50))
    order.set_epoch(1)
    assert list(order) != first and list(Order(50, seed=4)) != first


def test_a_batch_is_the_rows_of_one_step_and_the_last_one_may_be_short(data):
    made = data([pair(n) for n in range(100)], rows_per_step=16)
    sizes = [len(batch) for batch in made.train_dataloader()]
    total = len(made.splits.rows["train"])
    assert sizes == [16] * (total // 16) + ([total % 16] if total % 16 else [])


def test_the_schema_can_stand_in_the_system_prompt(data):
    made = data([pair(n) for n in range(60)], system="Keep this: {schema}")
    text = byte_tokenizer().decode(made.splits.rows["train"][0].prompt_ids)
    assert json.dumps(made.settings.format.to_dict()["init_args"]["schema"], separators=(",", ":")) in text
