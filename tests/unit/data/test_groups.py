"""Every answer of a conversation is a row, rows of one group stay in one split, and given files stay comparable."""

import json
from collections import defaultdict

import pytest

from conftest import WORDY, selected
from formtune.data.blockers import _remedy, blockers, uneven_fractions
from formtune.data.cleaning import Example, Quarantined
from formtune.data.encoded import Splits
from formtune.data.preparation import load_splits, read_splits
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.formats import JsonSchema, Labels


@pytest.fixture
def prepare(task, base, monkeypatch):
    """Prepares rows of the small task."""
    folder, write = task
    monkeypatch.chdir(folder)

    def prepared(rows, **options):
        files = {name: write(f"{name}.jsonl", options.pop(name)) for name in ("validation", "test") if name in options}
        shares = {"validation": 0.2, "test": 0.2}
        settings = DataSettings(
            JsonSchema(str(folder / "schema.json")),
            write("train.jsonl", rows),
            tokenizer=base,
            **shares | files | options,
        )
        return load_splits(settings, from_cache=False)

    return prepared


def answer(n, text="x"):
    return json.dumps({"n": n, "s": text}, separators=(",", ":"))


def talk(n, turns=3, opening=None, **keys):
    """A conversation about one thing, with an answer to each of its turns."""
    messages = []
    for turn in range(turns):
        text = opening if opening and not turn else f"{WORDY[n % 16]} {WORDY[n // 16]} {n * 7919} asks {WORDY[turn]}"
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer(n * 10 + turn)}]
    return {"messages": messages} | keys


def places(splits):
    """The rows of each split by line and answer."""
    return {name: [row.where.rpartition(":")[2] for row in rows] for name, rows in splits.rows.items()}


def test_near_duplicates_are_as_often_in_each_split_as_other_rows(prepare):
    pytest.importorskip("formtune.quality.duplicates")
    texts = [
        f"please book table {n * 7919} for the {WORDY[n % 16]} {WORDY[n // 16]} party of ours on" for n in range(60)
    ]
    rows = [
        {"prompt": f"{text} day {i}", "completion": answer(n * 10 + i)}
        for n, text in enumerate(texts)
        for i in range(10)
    ]
    splits = prepare(rows)
    sizes = {name: len(members) / 600 for name, members in splits.rows.items()}
    assert sizes["train"] > 0.4  # by the lowest of its ten hashes, a cluster would be in test nine times of ten


def test_every_answer_is_a_row_and_all_of_a_conversation_are_in_one_split(prepare):
    rows = [talk(n) for n in range(40)] + [{"prompt": "one turn", "completion": answer(1)}]
    last, every = prepare(rows), prepare(rows, train_on="all")
    assert sum(map(len, last.rows.values())) == 41 and not last.quarantine
    assert every.read["train"] == 121 == sum(map(len, every.rows.values())) and not every.quarantine
    lines = {name: {place.partition(",")[0] for place in members} for name, members in places(every).items()}
    assert not lines["train"] & lines["test"] and not lines["train"] & lines["validation"]
    assert not lines["validation"] & lines["test"] and sum(map(len, lines.values())) == 41
    assert 2 < len(lines["test"]) < 16 and 2 < len(lines["validation"]) < 16
    rows_by_place = {row.where.rpartition(":")[2]: row for rows in every.rows.values() for row in rows}
    assert {"1, answer 1", "1, answer 2", "1, answer 3", "41"} <= rows_by_place.keys()
    row = rows_by_place["1, answer 2"]
    assert row.target == answer(1) and row.input.endswith(WORDY[1]) and len(row.messages) == 4
    # The same conversations in another order are split in the same way.
    again = prepare(rows[::-1], train_on="all")
    assert {name: {r.input for r in rows} for name, rows in again.rows.items()} == {
        name: {r.input for r in rows} for name, rows in every.rows.items()
    }


def test_conversations_that_open_alike_keep_their_rows_together_and_the_opening_is_used_once(prepare):
    rows = [talk(n, opening="hello") for n in range(60)]
    for row in rows:
        row["messages"][1]["content"] = answer(0, "how can I help?")
    splits = prepare(rows, train_on="all")
    assert splits.reasons == {"duplicate": 59}
    split_of = defaultdict(set)
    for name, members in places(splits).items():
        for place in members:
            split_of[place.partition(",")[0]].add(name)
    assert len(split_of) == 60 and all(len(names) == 1 for names in split_of.values())
    assert 20 < len(splits.rows["train"]) < 110 and splits.rows["test"] and splits.rows["validation"]


def test_test_files_are_read_in_the_same_way_and_a_shared_conversation_is_a_leak_in_train(prepare):
    rows = [talk(n) for n in range(20)]
    splits = prepare(rows, train_on="all", test=[rows[0], talk(30)], validation=[talk(31)])
    assert {name: len(members) for name, members in splits.rows.items()} == {"test": 6, "validation": 3, "train": 57}
    leaks = [row for row in splits.quarantine if row.reason == "leak"]
    assert len(leaks) == 3 == len(splits.quarantine) and all(row.split == "train" for row in leaks)
    assert leaks[1].where.endswith("train.jsonl:1, answer 2") and leaks[1].other.endswith("test.jsonl:1, answer 2")


def test_weight_zero_excludes_one_answer_and_a_bad_answer_is_quarantined_alone(prepare):
    rows = [talk(n) for n in range(30)]
    rows[4]["messages"][1]["weight"] = 0
    rows[5]["messages"][5]["train"] = False
    rows[6]["messages"][3]["content"] = "prose"
    splits = prepare(rows, train_on="all", bad_rows="drop")
    lines = [place for members in places(splits).values() for place in members]
    assert len(lines) == 90 - 3 and not {"5, answer 1", "6, answer 3", "7, answer 2"} & set(lines)
    assert [(row.reason, row.where.rpartition(":")[2]) for row in splits.quarantine] == [("format", "7, answer 2")]
    assert all(set(m) == {"role", "content"} for rows in splits.rows.values() for row in rows for m in row.messages)
    rows = [talk(1, turns=1)]
    rows[0]["messages"][1]["weight"] = 0
    with pytest.raises(UserError, match="train.jsonl:1: every answer has weight 0"):
        prepare(rows, train_on="all")
    rows[0]["messages"][1]["weight"] = 0.5
    with pytest.raises(UserError, match=r"train.jsonl:1: messages\[1\]: `weight` is 0.5"):
        prepare(rows, train_on="all")


def test_the_answers_of_a_conversation_share_the_computation_of_their_context(prepare):
    splits = prepare([talk(n, turns=6) for n in range(30)], train_on="all")
    rows = [
        row
        for row in splits.rows["train"]
        if row.where.partition(",")[0] == splits.rows["train"][0].where.partition(",")[0]
    ]
    assert len(rows) == 6
    separate = sum(len(row) - 1 for row in rows)
    [packed] = pytest.importorskip("formtune.packing.packed").pack(rows, 10**6)
    # The longest row, and each other answer once more, after the turns before it.
    answers = sum(len(row.target_ids) for row in rows[:-1])
    assert packed.ids.size(1) <= len(rows[-1]) + answers + 6
    assert packed.ids.size(1) < 0.45 * separate


def test_rows_of_a_group_are_in_one_split(prepare):
    rows = [
        {
            "prompt": f"{WORDY[n % 16]} {n * 7919} {WORDY[n * 7 % 16]} of {n * n}",
            "completion": answer(n),
            "customer": n % 40,
        }
        for n in range(200)
    ]
    alone = [
        {"prompt": f"alone {n * n * 31} {WORDY[n]}", "completion": answer(n)} | ({"customer": None} if n % 2 else {})
        for n in range(16)
    ]
    splits = prepare([*rows, *alone], group="customer")
    assert not splits.ignored and not splits.quarantine
    split_of = defaultdict(set)
    for name, members in places(splits).items():
        for place in members:
            line = int(place)
            split_of[(line - 1) % 40 if line <= 200 else f"alone {line}"].add(name)
    assert len(split_of) == 56 and all(len(names) == 1 for names in split_of.values())
    # A group of five rows is as likely in train as a row of its own.
    assert 90 < len(splits.rows["train"]) < 170
    assert 40 < splits.groups < 56  # of one size


def test_a_group_in_two_given_files_is_a_leak_in_the_later_split(prepare):
    def row(n, group):
        return {"prompt": f"{WORDY[n % 16]} {n * 7919}", "completion": answer(n), "doc": group}

    splits = prepare(
        [row(1, "a"), row(2, "b"), row(3, None)],
        test=[row(4, "a"), row(5, None)],
        validation=[row(6, "c")],
        group="doc",
    )
    assert {name: len(members) for name, members in splits.rows.items()} == {"test": 2, "validation": 1, "train": 2}
    [leak] = splits.quarantine
    assert leak.reason == "leak" and leak.where.endswith("train.jsonl:1")
    assert leak.detail.startswith("another row of its group, 'a', is in ") and leak.other.endswith("test.jsonl:1")


def test_an_empty_group_column_is_refused(prepare):
    with pytest.raises(UserError, match="data.group: no row has a value in the column `doc`"):
        prepare([{"prompt": "p", "completion": answer(1), "doc": None}], group="doc")


def test_a_column_says_in_which_split_a_row_is(prepare, base):
    def rows(*names):
        return [{"prompt": f"{WORDY[n % 16]} {n * 7919} {WORDY[n * 7 % 16]} of {n * n}", "completion": answer(n), "part": names[n % 4]}
                for n in range(80)]  # fmt: skip

    splits = prepare(rows("train", "Dev", "train", "test"), split_column="part")
    assert splits.read == {"test": 20, "validation": 20, "train": 40} and not splits.ignored
    lines = {name: {(int(place) - 1) % 4 for place in members} for name, members in places(splits).items()}
    assert lines == {"test": {3}, "validation": {1}, "train": {0, 2}}
    # A split that the column does not name is a fraction of train.
    splits = prepare(rows("train", "train", "train", "test"), split_column="part")
    assert splits.read == {"test": 20, "train": 60} and 0 < len(splits.rows["validation"]) < 30
    # Settings are read more than once, by `formtune init` with other limits.
    settings = DataSettings(JsonSchema("schema.json"), "train.jsonl", tokenizer=base, split_column="part")
    read = [load_splits(settings, from_cache=False).read for _ in range(2)]
    assert read == [{"test": 20, "train": 60}] * 2
    with pytest.raises(UserError, match="train.jsonl:4: `part` is 'x', not one of train, test, validation"):
        prepare(rows("train", "train", "train", "x"), split_column="part")


def test_an_input_of_many_groups_joins_none_of_them():
    rows = [Example([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}], f"{g} {text}", value=g, group=str(g))
            for g in range(20) for text in ("cancel my order", f"{WORDY[g % 16]} number {g * 7919}")]  # fmt: skip
    for row in rows[::2]:
        row.value = 0
    selection = selected(train=rows)
    assert len(set(selection.cluster.values())) == 20
    assert [row.reason for row in selection.quarantine] == ["duplicate"] * 19
    # Below different system prompts it is no duplicate: where splits are cut it stays with its first group.
    for row in rows:
        row.messages.insert(0, {"role": "system", "content": f"You serve {row.group}."})
    assert [row.reason for row in selected(train=rows).quarantine] == ["leak"] * 19
    assert not selected(train=rows, cut=False).quarantine


def test_repeats_within_a_given_file_are_used(prepare):
    long = "I would like to book a table for many people in the old harbour restaurant on Friday evening please"
    test_rows = [
        {"prompt": text, "completion": answer(1)} for text in ("call Anna", "call Anna", long, long + " thanks")
    ]
    rows = [{"prompt": f"{WORDY[n]} {n * 7919}", "completion": answer(n)} for n in range(16)]
    splits = prepare([*rows, test_rows[0], rows[3]], test=test_rows)
    assert [row.where.rpartition(":")[2] for row in splits.rows["test"]] == ["1", "2", "3", "4"]
    # In train they are quarantined, and so is what train shares with the test file.
    assert [(row.reason, row.where.rpartition("/")[2]) for row in splits.quarantine] == [
        ("leak", "train.jsonl:17"),
        ("duplicate", "train.jsonl:18"),
    ]


GROUNDED = [
    {"role": "system", "content": "Today is 2026-03-12."},
    {"role": "user", "content": "Where is Anna?"},
    {"role": "assistant", "content": "In room 42."},
    {"role": "user", "content": "Book it."},
]


def test_values_of_any_earlier_turn_are_grounded():
    ungrounded = pytest.importorskip("formtune.audit.findings").ungrounded
    format = JsonSchema(
        {
            "type": "object",
            "properties": {"on": {"type": "string"}, "room": {"type": "integer"}, "who": {"type": "string"}},
        }
    )
    value = {"on": "2026-03-12", "room": 42, "who": "Anna"}
    target = json.dumps(value)
    messages = [*GROUNDED, {"role": "assistant", "content": target}]
    assert not ungrounded([Example(messages, "f:1", value=value)], format)
    wrong = value | {"who": "Berta"}
    assert list(ungrounded([Example(messages, "f:1", value=wrong)], format)) == ["who"]


def test_a_tools_result_tells_two_rows_apart():
    def row(where, result):
        return Example(
            [GROUNDED[1], {"role": "tool", "content": f"room {result}"}, {"role": "assistant", "content": "x"}],
            where,
            value=result,
        )

    assert not selected(train=[row("a", 41), row("b", 42)]).quarantine


def too_long(*sizes, key="data.max_length"):
    return [Quarantined("f:1", "too_long", "", [], fix=f"{key}: {size}") for size in sizes]


def test_the_remedy_of_long_rows_is_the_limit_that_takes_them_all(base):
    settings = DataSettings(Labels(["a", "b"]), "train.jsonl", tokenizer=base, max_length=100)  # its context is 512
    assert _remedy(settings, too_long(120, 300)) == "set data.max_length: 300"
    assert _remedy(settings, too_long(120, 700)) == "shorten them, or use a base with a context of 700 tokens"
    assert _remedy(settings, too_long(70, 60, key="model.max_new_tokens")) == "set model.max_new_tokens: 70"


@pytest.mark.parametrize(
    ("form", "steps", "remedy"),
    [
        ("```json\n{}\n```", [], "set data.repair_answers: [fence]"),
        ("{}\n", [], "set data.repair_answers: [edges]"),
        (" {}", ["canonical"], "set data.repair_answers: [canonical, edges]"),
        (" ```\n{}\n``` ", [], "set data.repair_answers: [fence]"),
        ("Sure: {}", [], "fix them"),
    ],
)
def test_the_remedy_of_answers_is_the_repair_that_makes_them_valid(task, base, monkeypatch, form, steps, remedy):
    folder, write = task
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"{WORDY[n % 16]} {n * 7919}", "completion": answer(n)} for n in range(120)]
    rows += [{"prompt": f"bad {n * 7919}", "completion": form.replace("{}", answer(n))} for n in range(4)]

    def lines(count, repairs=steps):
        settings = DataSettings(
            JsonSchema("schema.json"), write("train.jsonl", rows[-count:]), tokenizer=base, repair_answers=repairs
        )
        return blockers(settings, load_splits(settings, from_cache=False))

    [line] = lines(124)
    assert line.endswith(f"(4 such rows); {remedy}, or set data.bad_rows: drop")
    assert lines(14)[0].endswith(f"(4 such rows); {remedy}")  # dropping them would drop a quarter
    if remedy != "fix them":
        assert not lines(124, remedy.partition("[")[2].rstrip("]").split(", "))


def test_an_empty_split_names_what_became_of_its_rows(task, base, monkeypatch):
    folder, write = task
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"{WORDY[n % 16]} {n * 7919}", "completion": answer(n)} for n in range(40)]
    test_rows = [{"prompt": f"{row['prompt']} held out " + "and on " * 30, "completion": answer(1)} for row in rows[:3]]
    settings = DataSettings(
        JsonSchema("schema.json"), write("train.jsonl", [*rows, rows[0], rows[1]]), write("v.jsonl", test_rows),
        tokenizer=base, bad_rows="drop", max_length=200,
    )  # fmt: skip
    [line] = blockers(settings, load_splits(settings, from_cache=False))
    assert line.startswith("data.validation: the split is empty (3 read; 3 too_long), such as ")
    assert "v.jsonl:1: 261 tokens, " in line and line.endswith("; set data.max_length: 266")


def test_with_few_groups_shares_may_deviate_more():
    rows = {"train": [None] * 400, "validation": [None] * 100, "test": [None] * 100}
    assert uneven_fractions(Splits(rows=rows), {"validation": 0.1, "test": 0.1})
    assert not uneven_fractions(Splits(rows=rows, groups=60), {"validation": 0.1, "test": 0.1})


def test_a_missing_group_in_a_table_is_no_group(tmp_path, base):
    rows = [{"prompt": f"{n} words", "completion": "{}", "customer": n / 2 and None} for n in range(3)]
    lines = [json.dumps(row).replace("null", "NaN") for row in rows] + [
        '{"prompt": "x y", "completion": "{}", "customer": 7.0}'
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings = DataSettings(
        JsonSchema({"type": "object"}), train=str(tmp_path / "rows.jsonl"), tokenizer=base, group="customer"
    )
    assert [example.group for example in read_splits(settings)[0]][1:] == ["", "", "7"]
