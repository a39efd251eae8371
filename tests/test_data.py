"""Rows are read with their line numbers, cleaned with reasons, split by content and handed over step by step."""

import json
from collections import Counter

import pytest

from conftest import SCHEMA, byte_tokenizer, pair
from formtune.data import Columns
from formtune.data.cleaning import Example, judge, repair, repair_answer
from formtune.data.module import FormatDataModule, Order
from formtune.data.sources import JsonLines, open_source
from formtune.errors import UserError
from formtune.formats import JsonSchema


def module(task, rows, **options):
    folder, write = task
    found = FormatDataModule(
        format=JsonSchema(schema=str(folder / "schema.json")),
        train=write("train.jsonl", rows),
        **({"validation": 0.2, "test": 0.2} | options),
    )
    found._trainer = None
    return found


@pytest.fixture
def data(task, base):
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
    rows = [[record for record, _ in JsonLines(str(path)).records()] for path in (plain, odd)]
    assert rows[0] == rows[1] == [{"d": "2026-01-02"}, {"d": "x"}]
    assert [where.rpartition(":")[2] for _, where in JsonLines(str(odd)).records()] == ["1", "3"]


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
        assert [r for r, _ in open_source(str(tmp_path / name)).records()] == records


@pytest.mark.parametrize("path", ["missing.jsonl", "rows.txt", "no/such/place", "rows.csv", "rows.parquet"])
def test_a_source_that_cannot_be_read_is_refused(tmp_path, path):
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "rows.csv").write_text("a,b\n1\n")
    (tmp_path / "rows.parquet").write_text("x")
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        list(open_source(str(tmp_path / path)).records())


def test_a_template_over_columns_is_filled_as_plain_text():
    record = {"title": "{body} {body.__class__}", "body": "B"}
    assert Columns(prompt="T {title}: {body}")._prompt(record, "f:1") == "T {body} {body.__class__}: B"
    with pytest.raises(UserError, match="f:1: no column `titel`"):
        Columns(prompt="T {titel}: {body}")._prompt(record, "f:1")


def test_rows_under_different_system_prompts_do_not_conflict(data):
    def row(task, n, answer):
        turns = [("system", task), ("user", f"text {n}"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [row(t, n, f'{{"n":{n},"s":"{t}"}}') for n in range(40) for t in ("a", "b")]
    splits = data(rows).splits
    assert sum(map(len, splits.rows.values())) == 80 and not splits.reasons
    for name, others in (("validation", "test"), ("train", "test"), ("train", "validation")):
        assert not {r.source for r in splits.rows[name]} & {r.source for r in splits.rows[others]}


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


def test_every_row_is_kept_or_set_aside_with_its_reason(task):
    folder, _ = task
    contract = JsonSchema(schema=str(folder / "schema.json"))

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
    judged = list(judge(rows, contract, ["edges"], [], repairs))
    assert [getattr(row, "reason", "") for row in judged] == ["", "", "", "", "", "", "empty", "format"]
    assert judged[2].input == "twice" and judged[2].value == {"n": 1, "s": "a"} and repairs == {"edges": 1}


@pytest.mark.parametrize(
    ("answer", "steps", "mended"),
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
def test_an_answer_is_repaired_only_as_asked_and_only_if_it_then_keeps_the_contract(answer, steps, mended):
    repairs = Counter()
    assert repair_answer(answer, JsonSchema(SCHEMA), steps, repairs) == (mended or answer)
    assert bool(repairs) == (mended is not None)


def test_a_wrong_encoding_is_repaired_and_right_ones_are_left():
    turns = [{"role": "user", "content": "cafÃ© crÃ¨me"}, {"role": "user", "content": "café Ã la carte №5 日本"}]
    assert [m["content"] for m in repair(turns, ["encoding"])] == ["café crème", turns[1]["content"]]


def test_equal_inputs_never_stand_on_both_sides_of_a_split(data):
    texts = [f"number {n * 7919} of {n}" for n in range(200)]
    rows = [pair(n, text) for n, text in enumerate(texts)] + [
        pair(n, f" {text.upper()}!") for n, text in enumerate(texts)
    ]
    splits = data(rows).splits.rows
    keys = {name: {" ".join(r.source.casefold().split()) for r in rows} for name, rows in splits.items()}
    assert sum(map(len, splits.values())) == 200  # those in capitals repeat the others
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert all(10 < len(splits[name]) < 80 for name in ("validation", "test"))


def test_a_split_does_not_change_when_rows_are_added(data):
    few, many = (data([pair(n) for n in range(count)]).splits.rows for count in (100, 150))
    for name in few:
        assert {r.source for r in few[name]} <= {r.source for r in many[name]}


def test_rows_of_the_given_test_file_are_taken_out_of_train(task, data):
    _, write = task
    held = write("test.jsonl", [pair(61, "another text")])
    made = data([*(pair(n) for n in range(60)), pair(61, "Another text!")], test=held)
    assert made.splits.reasons["leak"] == 1
    assert [r.source for r in made.splits.rows["test"]] == ["another text"]


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
    text = byte_tokenizer().decode(made.splits.rows["train"][0].prompt)
    assert json.dumps(made.preparation.format.to_dict()["init_args"]["schema"], separators=(",", ":")) in text
