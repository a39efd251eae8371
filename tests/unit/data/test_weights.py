"""Weights of the files in `data.train`: exact counts, training rows alone, the same rows in every epoch."""

import re
from collections import Counter

import pytest

from conftest import pair
from formtune.cli import main
from formtune.data.columns import Columns
from formtune.data.datamodule import FormatDataModule
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.formats import JsonSchema


@pytest.fixture
def options(task, base, monkeypatch):
    """A task with training rows in two files, of 40 and 30 rows, and files for the other splits."""
    folder, write = task
    monkeypatch.chdir(folder)
    for name, start, end in (("a", 0, 40), ("b", 40, 70), ("validation", 70, 80), ("test", 80, 90)):
        write(f"{name}.jsonl", [pair(n) for n in range(start, end)])
    given = {"validation": "validation.jsonl", "test": "test.jsonl", "near_duplicates": 1.0}
    return {"format": JsonSchema("schema.json"), "tokenizer": base} | given


def prepared(options, train, **more):
    datamodule = FormatDataModule(train=train, **options | more)
    datamodule.trainer = None
    datamodule.setup("fit")
    return datamodule


def by_file(rows):
    return Counter(row.where.partition(":")[0] for row in rows)


@pytest.mark.parametrize(
    ("weight", "count", "times"), [(2, 80, {2}), (2.5, 100, {2, 3}), (0.25, 10, {1}), (1, 40, {1}), (1.01, 40, {1})]
)
def test_a_weight_gives_exactly_so_many_rows(options, weight, count, times):
    data = prepared(options, [{"path": "a.jsonl", "weight": weight}])
    rows = data.rows["train"]
    assert len(rows) == count == sum(map(len, data.train_dataloader()))
    assert set(Counter(row.where for row in rows).values()) == times
    assert data.splits.weights == {"a.jsonl": {"weight": weight, "rows": 40, "used": count}}


def test_each_file_has_its_weight_and_one_without_is_used_once(options):
    rows = prepared(options, [{"path": "b.jsonl", "weight": 0.5}, "a.jsonl"]).rows["train"]
    assert by_file(rows) == {"b.jsonl": 15, "a.jsonl": 40}


def test_weights_of_one_give_the_rows_of_a_plain_list(options):
    plain = prepared(options, ["a.jsonl", "b.jsonl"])
    weighted = prepared(options, [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}])
    assert weighted.rows == plain.rows and weighted.state_dict() == plain.state_dict()
    assert not plain.splits.weights


def test_rows_are_weighted_after_splits_and_duplicates(options, task):
    write = task[1]
    write("b.jsonl", [pair(n) for n in range(30, 70)])  # ten rows are in a.jsonl too
    train = [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1.5}]
    data = prepared(options, train, validation=0.2)
    held_out = {row.where for name in ("validation", "test") for row in data.rows[name]}
    assert len(data.rows["validation"]) == len({row.where for row in data.rows["validation"]})
    assert not held_out & {row.where for row in data.rows["train"]}
    assert data.splits.reasons == {"duplicate": 10}
    counts = data.splits.weights
    assert counts["a.jsonl"]["rows"] + counts["b.jsonl"]["rows"] + len(data.rows["validation"]) == 70
    assert by_file(data.rows["train"]) == {name: it["used"] for name, it in counts.items()}
    assert counts["a.jsonl"]["used"] == 2 * counts["a.jsonl"]["rows"]


def test_another_weight_is_another_run_and_the_cache_holds_for_every_weight(options):
    first, again, other = (
        prepared(options, [{"path": "a.jsonl", "weight": weight}, "b.jsonl"]) for weight in (2.5, 2.5, 2.25)
    )
    assert again.splits.cached and other.splits.cached
    assert again.rows["train"] == first.rows["train"]
    assert again.state_dict() == first.state_dict() != other.state_dict()


def test_the_audit_counts_rows_by_file(options):
    audit = pytest.importorskip("formtune.audit.findings").audit
    findings, _ = audit(DataSettings(train=[{"path": "a.jsonl", "weight": 2.5}, "b.jsonl"], **options))
    assert findings["rows"]["train"]["used"] == 70
    assert findings["weights"] == {
        "a.jsonl": {"weight": 2.5, "rows": 40, "used": 100},
        "b.jsonl": {"weight": 1.0, "rows": 30, "used": 30},
    }


def test_a_repeated_synthetic_file_counts_as_often_as_it_is_used(options, task):
    write = task[1]
    write("a.jsonl", [pair(n) | {"by": "some-model"} for n in range(40)])
    write("b.jsonl", [pair(n) | {"by": "human"} for n in range(40, 70)])
    columns = {"max_synthetic": 0.6, "columns": Columns(source="by")}
    prepared(options, ["a.jsonl", "b.jsonl"], **columns)
    with pytest.raises(UserError, match="models wrote 80 of 110 training rows"):
        prepared(options, [{"path": "a.jsonl", "weight": 2}, "b.jsonl"], **columns)


RULE = "expected a file or {path: FILE, weight: NUMBER}, each file once, with a weight above 0 and up to 1000; got "


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.jsonl", "weight": -1}, RULE + "{'path': 'a.jsonl', 'weight': -1}"),
        ({"path": "a.jsonl", "weight": "twice"}, RULE + "{'path': 'a.jsonl', 'weight': 'twice'}"),
        ({"path": "a.jsonl", "weight": True}, RULE + "{'path': 'a.jsonl', 'weight': True}"),
        ({"path": "a.jsonl", "weight": float("nan")}, RULE + "{'path': 'a.jsonl', 'weight': nan}"),
        ({"path": "a.jsonl", "wieght": 2}, RULE + "{'path': 'a.jsonl', 'wieght': 2}"),
        ({"weight": 2}, RULE + "{'weight': 2}"),
        ({"path": "b.jsonl"}, RULE + "{'path': 'b.jsonl'}"),
        ({"path": "./b.jsonl"}, "all files of ./b.jsonl belong to entries before it; name each file once"),
        ({"path": "b.json*"}, "all files of b.json* belong to entries before it; name each file once"),
        ({"path": "a.jsonl", "weight": 0.001}, "weight 0.001 of a.jsonl leaves none of its 40 rows; raise it"),
    ],
)  # fmt: skip
def test_a_bad_weight_is_one_line_with_the_key(options, entry, message):
    with pytest.raises(UserError) as error:
        prepared(options, ["b.jsonl", entry])
    assert str(error.value) == f"data.train: {message}"


def test_a_yaml_and_a_command_line_take_weights(write_project, capfd):
    pytest.importorskip("formtune.audit.findings")
    write_project({"max_steps": 2}, data={"train": [{"path": "train.jsonl", "weight": 1.5}]})
    assert main(["audit", "-c", "small.yaml"]) == 0
    line = r"train.jsonl: (\d+) training rows, weight 1.5: (\d+) in an epoch"
    rows, used = map(int, re.search(line, capfd.readouterr().out).groups())
    assert used == rows + round(rows / 2)
    assert main(["audit", "-c", "small.yaml", "--data.train", '[{"path": "train.jsonl", "weight": 0}]']) == 2
    assert "with a weight above 0 and up to 1000; got {'path': 'train.jsonl', 'weight': 0}" in capfd.readouterr().err
    assert main(["audit", "-c", "small.yaml", "--data.validation", '[{"path": "train.jsonl", "weight": 2}]']) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
