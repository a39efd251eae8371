"""Where each row has its own schema, that schema checks, constrains, groups and describes the row, and no other."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import byte_tokenizer, selected
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.data import Columns
from formtune.data.cleaning import Example, Quarantined, check_example
from formtune.data.columns import row_schema
from formtune.data.encoded import cache_path, content_hash
from formtune.data.preparation import load_splits, prompt_rows
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.evaluation.baselines import cache_entry, choose_shots, constant_answer, few_shot_rows, shots_by_schema
from formtune.evaluation.metrics import count, ratios
from formtune.evaluation.outcomes import outcome, write_outcomes
from formtune.evaluation.probe import probe_rows
from formtune.formats import JsonSchema, Regex

PER_ROW = JsonSchema()


def keys(**properties) -> str:
    """JSON text of a closed object with these keys."""
    closed = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return json.dumps(closed, separators=(",", ":"))


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
NUMBER, COLOR = keys(n=DIGIT), keys(color={"enum": ["red", "blue"]})
LIST = json.dumps({"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2}, separators=(",", ":"))
ANSWERS = {NUMBER: '{"n":4}', COLOR: '{"color":"red"}', LIST: '["x"]'}


def example(prompt, answer, schema, where="f:1", system=()):
    turns = [("system", text) for text in system] + [("user", prompt), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    value = json.loads(answer) if answer[:1] in "{[" else None
    return Example(messages, where, value=value, schema=schema)


def row(schema, where="f:1", prompt="a question", target=None):
    target = target or ANSWERS[schema]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
    return Row([1, 2], [3, 4], prompt, target, where, messages=turns, schema=schema)


def record(n, schema=None):
    """A row of a file; the three schemas take turns."""
    schema = schema or list(ANSWERS)[n % 3]
    answer = {NUMBER: {"n": n % 10}, COLOR: {"color": ["red", "blue"][n % 2]}, LIST: ["x", "y"][: n % 3]}[schema]
    answer = json.dumps(answer, separators=(",", ":"))
    return {"prompt": f"row {n * 7919} of {n}", "completion": answer, "schema": json.loads(schema)}


@pytest.fixture
def settings(task, base, monkeypatch):
    """A function that makes the settings of a task with these rows."""
    monkeypatch.chdir(task[0])

    def make(rows, format=None, **options):
        path = task[1]("train.jsonl", rows)
        return DataSettings(format or JsonSchema(), train=path, tokenizer=base, near_duplicates=1.0, **options)

    return make


def test_a_json_schema_without_a_schema_takes_each_rows_and_keeps_it():
    assert PER_ROW.per_row and PER_ROW.to_dict()["init_args"]["schema"] == "per row" and PER_ROW.fields == ()
    for schema, answer in ANSWERS.items():
        own = PER_ROW.of_row(schema)
        assert own.schema == json.loads(schema) and own.check(answer).exact and not own.per_row
        assert own is PER_ROW.of_row(schema) and own.of_row(LIST) is own
        assert [PER_ROW.of_row(other).check(answer).exact for other in ANSWERS] == [
            other == schema for other in ANSWERS
        ]
    assert PER_ROW.of_row(COLOR).derived == {"color"} and PER_ROW.of_row(NUMBER).fields == ("n",)
    again = JsonSchema(**PER_ROW.to_dict()["init_args"])
    assert again.per_row and again.to_dict() == PER_ROW.to_dict()


def test_options_of_the_format_hold_for_every_rows_schema_that_has_the_path():
    tags = keys(tags={"type": "array", "items": {"type": "string"}})
    format = JsonSchema(canonical=True, sets=["tags"], derived=["day"])
    assert format.of_row(NUMBER).check('{"n": 4}').kind == "layout"
    assert format.of_row(tags).check('{"tags":["b","a"]}', target='{"tags":["a","b"]}').kind == "ok"
    assert JsonSchema().of_row(tags).check('{"tags":["b","a"]}', target='{"tags":["a","b"]}').kind == "content"
    assert "day" in format.of_row(keys(day={"type": "string"})).derived


def test_a_fixed_format_is_the_format_of_every_row():
    for format in (JsonSchema(json.loads(NUMBER)), Regex("a")):
        assert format.of_row(None) is format and format.of_row(COLOR) is format and not format.per_row


UNREADABLE = {
    "none": (None, "the row has no schema; write it into the column that data.columns.schema names"),
    "no JSON": ('{"type": obj}', "the row's schema: not valid JSON"),
    "a list": ("[1]", r"the schema must be a JSON object, got \[1\]"),
    "a file's name": ("schema.json", "the row's schema: not valid JSON"),
    "a typo": ('{"type":"object","propertys":{}}', r"\$.propertys: not a keyword"),
    "nulls of a table": ('{"type":"object","properties":{"a":null}}', "not a JSON Schema"),
    "a wrong type": ('{"type":"text"}', "not a JSON Schema"),
    "too deep": ('{"items":' * 100 + "{}" + "}" * 100, "nested deeper"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_schema_that_cannot_be_read_is_refused_with_the_reason(case):
    schema, reason = UNREADABLE[case]
    with pytest.raises(UserError, match=reason):
        PER_ROW.of_row(schema)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (json.loads(NUMBER), NUMBER),
        (json.dumps(json.loads(NUMBER), indent=2) + "\n", NUMBER),
        ('{"type":"string","const":"\\u00e9"}', '{"type":"string","const":"é"}'),
        (None, None),
        ("", None),
        ("  ", None),
        ({}, None),
        ({"type": None}, None),  # as a table writes a missing object
        (" {oops", "{oops"),
        ([1], "[1]"),
        (7, "7"),
    ],
)
def test_an_object_and_its_json_text_are_the_same_schema(value, text):
    assert row_schema(value) == text


def test_each_answer_is_checked_repaired_and_quarantined_by_its_own_schema():
    rows = [example("q", answer, schema, f"f:{n}") for n, (schema, answer) in enumerate(ANSWERS.items(), 1)]
    rows += [example("q", ANSWERS[NUMBER], COLOR, "f:4"), example("q", '{"n":4}', None, "f:5")]
    rows += [example("q", '{"n":4}', "{oops", "f:6"), example("q", '```json\n{ "n": 4 }\n```', NUMBER, "f:7")]
    repairs = Counter()
    judged_rows = [check_example(row, PER_ROW, [], ["fence", "canonical"], repairs) for row in rows]
    valid = [row for row in judged_rows if isinstance(row, Example)]
    assert [(e.where, e.target, e.schema) for e in valid] == [
        *((f"f:{n}", answer, schema) for n, (schema, answer) in enumerate(ANSWERS.items(), 1)),
        ("f:7", '{"n":4}', NUMBER),
    ]
    quarantined = {row.where: (row.reason, row.detail) for row in judged_rows if isinstance(row, Quarantined)}
    assert quarantined["f:4"] == ("format", "missing_key: $: 'color' is a required property")
    assert quarantined["f:5"][0] == quarantined["f:6"][0] == "schema"
    assert "has no schema" in quarantined["f:5"][1] and "not valid JSON" in quarantined["f:6"][1]
    assert repairs == {"answer fence": 1, "answer canonical": 1}


def test_rows_with_other_schemas_are_neither_conflicts_nor_duplicates():
    order = keys(a=DIGIT, b=DIGIT), keys(b=DIGIT, a=DIGIT)
    rows = [
        example("the same", ANSWERS[NUMBER], NUMBER, "f:1"),
        example("the same", ANSWERS[COLOR], COLOR, "f:2"),  # would be a conflict
        example("another", '{"a":1,"b":2}', order[0], "f:3"),
        example("another", '{"b":2,"a":1}', order[1], "f:4"),  # would be a duplicate
        example("another", '{"a":1,"b":2}', order[0], "f:5"),
        example("a third", ANSWERS[NUMBER], NUMBER, "f:6"),
        example("a third", '{"n":5}', NUMBER, "f:7"),
    ]
    selection = selected(train=rows)
    assert [e.where for e in selection.examples["train"]] == ["f:1", "f:2", "f:3", "f:4"]
    assert [(q.where, q.reason) for q in selection.quarantine] == [
        ("f:5", "duplicate"),
        ("f:6", "conflict"),
        ("f:7", "conflict"),
    ]


def test_styles_are_compared_within_a_schema_and_layouts_over_all():
    mixtures = pytest.importorskip("formtune.quality.styles").mixtures
    first = keys(a=DIGIT, b={"enum": ["Low", None]})
    second = keys(b={"enum": ["low"]}, a={"type": "number"})
    answers = [('{"a":1,"b":"Low"}', first)] * 5 + [('{"b":"low","a":1.0}', second)] * 3
    rows = [example(f"q {n}", answer, schema, f"f:{n}") for n, (answer, schema) in enumerate(answers)]
    assert mixtures(rows, PER_ROW) == []
    mixed = mixtures([replace(e, schema=None) for e in rows], JsonSchema(json.loads(first)))
    assert {mixture.what for mixture in mixed} == {"key order", "number"}
    odd = [*rows, example("q", '{"b":"low", "a":1.0}', second, "f:8"), example("q", '{"b":"low","a":1}', second, "f:9")]
    assert {(m.what, m.path): m.minority for m in mixtures(odd, PER_ROW)} == {
        ("layout", ""): {"with spaces": ["f:8"]},
        ("number", "a"): {"5": ["f:9"]},
    }


def test_rows_are_read_with_their_schema_in_the_system_prompt(settings):
    rows = [record(n) for n in range(60)]
    rows[7] |= {"system": "Its own prompt."}
    rows[8] |= {"schema": json.dumps(rows[8]["schema"], indent=1)}
    prepared = settings([row | {"id": 1} for row in rows], system="Keep {schema}.")
    splits = load_splits(prepared)
    assert splits.ignored == {"id": 60} and splits.own_system == 1 and not splits.quarantine
    for split in ("train", "validation", "test"):
        for row, e in zip(splits.rows[split], splits.examples[split], strict=True):
            n = int(row.where.rpartition(":")[2]) - 1
            assert row.schema == e.schema == list(ANSWERS)[n % 3]
            assert row.messages[0]["content"] == ("Its own prompt." if n == 7 else f"Keep {row.schema}.")
    again = load_splits(prepared)
    assert again.cached and again.rows == splits.rows, "the cache keeps the schemas"


def test_a_schema_that_all_rows_share_gives_the_same_tokens_as_a_fixed_format(settings):
    rows = [record(n, NUMBER) for n in range(40)]
    own = load_splits(settings(rows, system="Keep {schema}."))
    fixed = load_splits(settings(rows, JsonSchema(json.loads(NUMBER)), system="Keep {schema}."))
    assert fixed.ignored == {"schema": 40} and own.ignored == {}
    for split, members in fixed.rows.items():
        assert [replace(row, schema=None) for row in own.rows[split]] == members
        assert {row.schema for row in members} <= {None}


def test_rows_without_a_readable_schema_stop_training_with_file_and_line(settings):
    rows = [record(n) for n in range(60)]
    del rows[4]["schema"]
    rows[5]["schema"] = {"type": "object", "propertys": {}}
    audit = pytest.importorskip("formtune.audit.findings").audit
    findings, splits = audit(settings(rows))
    assert splits.reasons == {"schema": 2} and sum(map(len, splits.rows.values())) == 58
    [line] = findings["blockers"]
    assert "train.jsonl:5: the row has no schema" in line and line.endswith(
        "(2 such rows); fix them, or set data.bad_rows: drop"
    )
    assert "$.propertys" in splits.quarantine[1].detail
    assert audit(settings(rows, bad_rows="drop"))[0]["verdict"] == "ready"


def test_the_column_of_the_schema_can_be_named(settings):
    rows = [{("form" if key == "schema" else key): value for key, value in record(n).items()} for n in range(40)]
    splits = load_splits(settings(rows, columns=Columns(schema="form")))
    assert not splits.quarantine and splits.ignored == {}
    assert {row.schema for row in splits.rows["train"]} == set(ANSWERS)


def test_prompts_have_their_schema_and_one_without_is_refused(settings, task):
    prompts = [{"prompt": f"p {n}", "schema": schema} for n, schema in enumerate(ANSWERS)]
    prepared = settings([record(0)], prompts=task[1]("prompts.jsonl", prompts), system="Keep {schema}.")
    rows = prompt_rows(prepared)
    assert [row.schema for row in rows] == list(ANSWERS) and prepared.ignored["prompts"] == {}
    assert [row.messages[0]["content"] for row in rows] == [f"Keep {schema}." for schema in ANSWERS]
    for bad, reason in ((None, "has no schema"), ("[]x", "not valid JSON"), ([3], "must be a JSON object")):
        path = task[1]("bad.jsonl", [*prompts, {"prompt": "p", "schema": bad}])
        with pytest.raises(UserError, match=f"bad.jsonl:4: .*{reason}"):
            prompt_rows(settings([record(0)], prompts=path))


def test_hashes_and_caches_tell_schemas_apart(settings, base):
    prepared, open_object = settings([record(0)]), keys(n={"type": "integer"})
    paths = {cache_path([example("q", ANSWERS[NUMBER], schema)], prepared) for schema in (NUMBER, open_object)}
    assert len(paths) == 2
    rows = [row(NUMBER), replace(row(NUMBER), schema=open_object), replace(row(NUMBER), schema=None)]
    assert len({content_hash({"train": [one]}) for one in rows}) == 3
    assert len({cache_entry(base, [one], {}, PER_ROW) for one in rows}) == 3


def answered(schema, target, answer, where="f:1", prompt="a question"):
    one, own = row(schema, where, prompt, target), PER_ROW.of_row(schema)
    return outcome(one, answer, own.check(answer, target=target), own)


def test_one_accuracy_counts_the_fields_of_all_rows():
    wide = keys(**{f"k{n}": DIGIT for n in range(8)})
    right = json.dumps({f"k{n}": n for n in range(8)})
    wrong = json.dumps({f"k{n}": min(n, 5) for n in range(8)})
    outcomes = [answered(wide, right, wrong), answered(NUMBER, '{"n":4}', "?")]
    counts = count([*outcomes, answered(COLOR, ANSWERS[COLOR], ANSWERS[COLOR])], PER_ROW)
    assert [name for name in counts if "field_acc" in name] == ["content/field_acc"]
    assert counts["content/field_acc"] == (6 + 0 + 1, 8 + 1 + 1)
    assert ratios(counts)["content/field_acc"] == pytest.approx(0.7)
    assert counts["format/exact"] == (2, 3) and counts["joint/exact"] == (1, 3)
    assert {name: n for name, (n, _) in counts.items() if name.startswith("fail/") and n} == {
        "fail/ok": 1, "fail/content": 1, "fail/syntax": 1,
    }  # fmt: skip
    fixed = count([answered(wide, right, wrong)], JsonSchema(json.loads(wide)))
    assert "content/field_acc" not in fixed and fixed["content/field_acc/k7"] == (0, 1)


def judged(schema, answer, where, prompt="a question"):
    return answered(schema, ANSWERS[schema], answer, where, prompt)


def test_outcomes_keep_the_schema_and_runs_are_compared_field_by_field_of_it(tmp_path):
    comparison = pytest.importorskip("formtune.report.comparison")
    kinds = [(NUMBER, '{"n":4}'), (COLOR, '{"color":"blue"}'), (NUMBER, '{"n":5}'), (LIST, '["x"]')]
    worse = [judged(schema, answer, f"f:{n}") for n, (schema, answer) in enumerate(kinds)]
    better = [judged(schema, ANSWERS[schema], f"f:{n}") for n, (schema, _) in enumerate(kinds)]
    assert [o.fields for o in worse] == [{"n": True}, {"color": False}, {"n": False}, {}]
    for name, outcomes in (("a", worse), ("b", better[::-1])):
        write_outcomes(tmp_path / f"{name}.jsonl", outcomes)
    compared = comparison.compare(comparison.read_runs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))
    first, second = (run["metrics"] for run in compared["runs"])
    assert [first[f"content/field_acc/{name}"]["value"] for name in ("n", "color")] == [0.5, 0]
    assert [second[f"content/field_acc/{name}"]["value"] for name in ("n", "color")] == [1, 1]
    assert first["joint/exact"]["value"] == 0.5 and second["joint/exact"]["value"] == 1
    write_outcomes(tmp_path / "c.jsonl", [replace(better[0], schema=COLOR), *better[1:]])
    with pytest.raises(UserError, match="3 of its 4 test rows are among the 4"):
        comparison.read_runs([str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")])


def test_a_table_has_the_most_frequent_fields_of_many_schemas(tmp_path):
    comparison = pytest.importorskip("formtune.report.comparison")
    number = comparison.FIELDS
    schemas = [keys(**{f"only{n}": DIGIT, "n": DIGIT}) for n in range(3 * number)]
    answers = [json.dumps({f"only{n}": 1, "n": 2}) for n in range(3 * number)]
    pairs = zip(schemas, answers, strict=True)
    outcomes = [answered(schema, answer, answer, f"f:{n}") for n, (schema, answer) in enumerate(pairs)]
    write_outcomes(tmp_path / "a.jsonl", outcomes)
    [run] = comparison.compare(comparison.read_runs([str(tmp_path / "a.jsonl")]))["runs"]
    fields = [name for name in run["metrics"] if name.startswith("content/field_acc/")]
    assert len(fields) == number and fields[0] == "content/field_acc/n"


def test_slices_take_the_labels_of_each_rows_schema():
    outcomes = [judged([NUMBER, COLOR][n % 2], "?", f"f:{n}") for n in range(20)]
    slices = pytest.importorskip("formtune.report.failures").slices
    assert [part[:2] for part in slices(outcomes, PER_ROW, 99) if part[0] != "prompt tokens"] == [("color", "red")]


def test_few_shot_examples_have_the_schema_of_the_row_and_others_only_where_none_has():
    renderer = Renderer(byte_tokenizer())
    train = [row(schema, f"{schema}{n}", f"train {n}") for n in range(6) for schema in (NUMBER, COLOR)]
    conversations = [(list(shot.messages), f"t:{n}", shot.schema) for n, shot in enumerate(map(row, ANSWERS))]
    test = [shot for shot in renderer.encode(conversations) if isinstance(shot, Row)]
    assert [shot.schema for shot in test] == list(ANSWERS)
    shots = shots_by_schema(train, test, PER_ROW)
    assert {shot.schema for shot in shots[NUMBER]} == {NUMBER} and {shot.schema for shot in shots[COLOR]} == {COLOR}
    assert len(shots[LIST]) == len(shots[COLOR]) == 4 and {shot.schema for shot in shots[LIST]} <= {NUMBER, COLOR}
    longer, count = few_shot_rows(test, shots, renderer, 10**6)
    assert count == 4 and [shot.schema for shot in longer] == list(ANSWERS)
    for shot in longer[:2]:
        assert renderer.tokenizer.decode(shot.prompt_ids).count(ANSWERS[shot.schema]) == 4
    fixed = JsonSchema(json.loads(NUMBER))
    plain = [replace(shot, schema=None) for shot in train if shot.schema == NUMBER]
    assert shots_by_schema(plain, plain[:2], fixed) == {None: choose_shots(plain, 4, fixed)}


def test_the_constant_answer_and_longer_inputs_are_checked_by_the_rows_schema():
    train = [row(NUMBER)] * 3 + [row(COLOR)]
    assert constant_answer(train, [row(NUMBER), row(COLOR), row(LIST)], PER_ROW) == (1, 3)
    renderer = Renderer(byte_tokenizer())
    [encoded] = renderer.encode([(list(row(COLOR).messages), "t:1", COLOR)])
    [[longer]] = probe_rows([encoded], ["some text of others " * 9], {"P99": 120}, renderer).values()
    assert longer.schema == COLOR and len(longer.prompt_ids) > len(encoded.prompt_ids)


def test_labels_and_invented_values_are_those_of_each_schema(settings):
    free = keys(color={"type": "string"})
    rows = [record(n, COLOR) for n in range(20)]
    rows += [{"prompt": f"item {n * 7919}", "completion": '{"color":"teal"}', "schema": free} for n in range(20)]
    findings, _ = pytest.importorskip("formtune.audit.findings").audit(settings(rows))
    assert set(findings["labels"]) == {"color"} and set(findings["labels"]["color"]["train"]) <= {"red", "blue"}
    assert {entry["value"] for entry in findings["ungrounded"]["color"]["rows"]} == {"teal"}
    assert findings["ungrounded"]["color"]["share"] == 1


@pytest.mark.slow
def test_each_answer_is_constrained_by_its_rows_schema():
    pytest.importorskip("llguidance", reason="needs the extra `constrained`")
    decoder = pytest.importorskip("formtune.constrained.decoder")
    renderer = Renderer(byte_tokenizer())
    grammar = decoder.Grammar(PER_ROW, renderer)
    rows = [row(schema, f"f:{n}") for n, schema in enumerate([*ANSWERS, NUMBER])]
    torch.manual_seed(0)
    for _ in range(5):
        matchers, written = [grammar.matcher(one) for one in rows], [[] for _ in rows]
        for _ in range(60):
            alive = [i for i, ids in enumerate(written) if not ids or ids[-1] not in renderer.stop_ids]
            if alive:
                tokens, _ = grammar.choose([matchers[i] for i in alive], torch.randn(len(alive), 259))
                for i, token in zip(alive, tokens, strict=True):
                    written[i].append(token)
        for one, ids in zip(rows, written, strict=True):
            text, finished = renderer.answer(ids)
            assert finished and PER_ROW.of_row(one.schema).check(text).exact, text
    assert grammar._compiled.cache_info().misses == 3, "each schema is compiled once"
    assert grammar._compiled.cache_info().maxsize == decoder.MAX_SCHEMAS


def test_a_row_whose_schema_has_no_grammar_is_named():
    pytest.importorskip("llguidance", reason="needs the extra `constrained`")
    grammar = pytest.importorskip("formtune.constrained.decoder").Grammar(PER_ROW, Renderer(byte_tokenizer()))
    with pytest.raises(UserError, match="^f:9: .*a grammar needs the type of every value"):
        grammar.matcher(row(json.dumps({"minLength": 1}), "f:9", target="1"))


@pytest.mark.contrib
def test_synthesize_needs_one_schema(settings, base, monkeypatch):
    from formtune_contrib.synthesize import run

    settings([record(n) for n in range(9)])
    Path("small.yaml").write_text(
        json.dumps({"model": {"base": base}, "data": {"train": "train.jsonl", "format": "JsonSchema"}})
    )
    with pytest.raises(UserError, match="a teacher needs one schema"):
        run("synthesize", ["-c", "small.yaml", "--endpoint", "http://x", "--teacher", "t", "--out", "o.jsonl"])


def test_a_row_without_a_schema_is_quarantined_whatever_its_answer_is(tmp_path, base):
    rows = [
        {"prompt": "one", "completion": {"n": 1}, "schema": json.loads(NUMBER)},
        {"prompt": "two", "completion": {"a": 1}},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(PER_ROW, train=str(tmp_path / "rows.jsonl"), validation=0.0, test=0.0, tokenizer=base)
    assert [row.reason for row in load_splits(settings).quarantine] == ["schema"]
