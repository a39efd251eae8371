"""`formtune init`, and `--dry_run`: from a file of rows to a task that trains."""

import json
import re
from pathlib import Path

import pytest
import yaml

from conftest import pair
from formtune.cli import main
from formtune.tasks.parsers import read_task, task_parser

CITIES = ("Oslo", "Bern", "Rome", "Bonn", "Lima", "Kyiv")


def rows(count):
    for n in range(count):
        word = "".join(chr(97 + (n * k) % 26) for k in (1, 3, 7, 11, 13, 17))
        value = {"city": CITIES[n % 6], "kind": ("red", "blue")[n % 2], "note": None if n % 3 else word}
        yield {
            "prompt": f"{word} {n * 7919 % 1000} to {CITIES[n % 6]}",
            "completion": json.dumps(value, separators=(",", ":")),
        }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORMTUNE_RUN", raising=False)
    return tmp_path


def write(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def contents(folder):
    return {path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


@pytest.mark.slow
def test_rows_become_a_task_that_is_audited_planned_and_trained(folder, base, capsys):
    write("tickets.jsonl", rows(150))
    assert main(["init", "tickets.jsonl", "--base", base]) == 0
    output = capsys.readouterr().out
    assert contents(folder) == {
        folder / name for name in ("tickets.jsonl", "configs/tickets.yaml", "data/tickets/schema.json")
    }
    assert output.endswith("--quick --trainer.max_steps 25\nthen: formtune train -c configs/tickets.yaml\n")
    assert re.search(
        r"^steps: \d+ with 16 rows each, 3 epochs; .*\n(.*\n)+?time: about \d+:\d\d:\d\d .*, estimated on this machine now\npeak memory: ",
        output,
        re.M,
    )
    schema = json.loads(Path("data/tickets/schema.json").read_text())
    assert schema["properties"] == {
        "city": {"type": "string"},
        "kind": {"enum": ["blue", "red"]},
        "note": {"type": ["null", "string"]},
    }
    command = output.splitlines()[-1].split()[2:]
    limits = ["--trainer.max_steps", "2", "--trainer.precision", "32-true", "--model.max_new_tokens", "64"]
    assert main([*command, *limits, "--data.bad_rows", "drop"]) == 0
    assert [*Path("logs/tickets").glob("*/adapter/adapter_model.safetensors")]


def test_the_yaml_holds_what_the_rows_show_and_says_why(folder, base, capsys):
    task = [
        {"text": f"Give the intent: {row['prompt']}", "intent": "go" if n % 2 else "stay", "user": n // 4}
        for n, row in enumerate(rows(160))
    ]
    write("train.jsonl", task[:120])
    write("test.jsonl", task[120:])
    assert main(["init", "train.jsonl", "--task", "trips", "--base", base]) == 0
    text = Path("configs/trips.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["base"] == base and config["model"]["max_new_tokens"] == 16
    assert config["data"] == {
        "train": "train.jsonl",
        "test": "test.jsonl",
        "columns": {"prompt": "text", "completion": "intent"},
        "group": "user",
        "system": "Answer with one of: go, stay",
        "format": {"class_path": "Labels", "init_args": {"labels": ["go", "stay"]}},
    }
    keys = [line for line in text.splitlines() if re.match(r" *\w+: [^{\[]", line)]
    assert "  # 2 answers repeat over 160 rows, the rarest is 'go': 80 times" in text.splitlines() and len(keys) > 8
    read_task(task_parser("audit"), ["-c", "configs/trips.yaml"])


def test_an_instruction_in_all_prompts_becomes_the_system_prompt_and_is_said_once(folder, base, capsys):
    instruction = "Say in which city the customer wants to arrive."
    write("trips.jsonl", [row | {"prompt": f"{instruction}\n\n{row['prompt']}"} for row in rows(60)])
    assert main(["init", "trips.jsonl", "--base", base, "--task", "moved"]) == 0
    assert yaml.safe_load(Path("configs/moved.yaml").read_text())["data"]["system"] == instruction
    write("trips.jsonl", rows(60))
    _, settings = read_task(task_parser("audit"), ["-c", "configs/moved.yaml"])
    from formtune.data.preparation import load_splits

    plain = load_splits(settings)
    write("trips.jsonl", [row | {"prompt": f"{instruction}\n\n{row['prompt']}"} for row in rows(60)])
    assert load_splits(settings).key == plain.key


def test_rows_that_do_not_fit_are_named_and_dropped(folder, base, capsys):
    write("trips.jsonl", [*rows(150), {"prompt": "hello", "completion": "I cannot say"}])
    assert main(["init", "trips.jsonl", "--base", base]) == 0
    assert "data.bad_rows: drop  (1 rows do not fit, first trips.jsonl:151 (syntax: " in capsys.readouterr().out


def test_answers_in_a_fence_are_repaired(folder, base):
    write("trips.jsonl", [row | {"completion": f"```json\n{row['completion']}\n```"} for row in rows(100)])
    assert main(["init", "trips.jsonl", "--base", base]) == 0
    assert "fence" in yaml.safe_load(Path("configs/trips.yaml").read_text())["data"]["repair_answers"]


def test_reasoning_before_the_answers_and_a_split_column_are_found(folder, base, capsys):
    task = [{**row, "completion": f"<think>\nto {row['prompt']}\n</think>\n\n{row['completion']}",
             "split": "test" if n % 4 == 0 else "train"} for n, row in enumerate(rows(120))]  # fmt: skip
    write("trips.jsonl", task)
    assert main(["init", "trips.jsonl", "--base", base]) == 0
    _, settings = read_task(task_parser("audit"), ["-c", "configs/trips.yaml"])
    assert settings.format.tags == ("<think>", "</think>") and "city" in settings.format.inner.fields
    assert settings.system.startswith("Think first, between <think> and </think>. Answer with one JSON document")
    assert settings.split_column == "split"
    from formtune.data.preparation import load_splits

    counted = load_splits(settings).read
    assert counted == {"test": 30, "train": 90}


@pytest.mark.parametrize("existing", ["configs/trips.yaml", "data/trips/schema.json"])
def test_nothing_is_overwritten(folder, base, capsys, existing):
    write("trips.jsonl", rows(30))
    Path(existing).parent.mkdir(parents=True)
    Path(existing).write_text("mine")
    before = contents(folder)
    assert main(["init", "trips.jsonl", "--base", base]) == 2
    assert f"{existing}: already exists; choose another name with --task" in capsys.readouterr().err
    assert contents(folder) == before and Path(existing).read_text() == "mine"


@pytest.mark.parametrize(
    "content, args, message",
    [
        ("", (), "trips.jsonl: has no rows"),
        ('{"prompt": "p"', (), "trips.jsonl:1: not valid JSON"),
        ('{"a": "p", "b": "q", "c": "r"}\n', (), "trips.jsonl:1: which of the columns a, b, c is the prompt"),
        ('{"prompt": "p", "completion": "free text"}\n', (), "trips.jsonl:1: no format fits"),
        ('{"prompt": "p", "completion": "{}"}\n', ("--task", "a/b"), "--task: a/b is a path"),
        ('{"prompt": "p", "completion": "{}"}\n', ("--base", "./nowhere"), "model.base: no folder ./nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, content, args, message):
    Path("trips.jsonl").write_text(content)
    assert main(["init", "trips.jsonl", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert contents(folder) == {folder / "trips.jsonl"}


def test_without_the_base_on_this_machine_the_task_is_written_and_one_line_says_what_is_not_checked(folder, capsys):
    write("trips.jsonl", rows(60))
    assert main(["init", "trips.jsonl", "--base", "owner/unknown"]) == 0
    assert Path("configs/trips.yaml").exists()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "not checked: owner/unknown is not on this machine; bad rows, limits, time and memory are unknown",
        "next: formtune audit -c configs/trips.yaml (it downloads the tokenizer; or set model.base to a folder)",
    ]


def test_rows_that_mix_styles_are_not_dropped_but_named(folder, base, capsys):
    days = [f"2026-03-{n % 28 + 1:02}" if n % 20 else f"{n % 28 + 1}.03.2026" for n in range(100)]
    task = [{"prompt": row["prompt"], "completion": json.dumps({"day": day})}
            for day, row in zip(days, rows(100), strict=True)]  # fmt: skip
    write("trips.jsonl", task)
    assert main(["init", "trips.jsonl", "--base", base]) == 1
    output = capsys.readouterr().out
    assert "data.bad_rows" not in Path("configs/trips.yaml").read_text()
    assert "blocker: trips.jsonl:1: date of day: D.M.YYYY" in output


def test_keys_that_only_other_splits_have_are_in_the_schema(folder, base, capsys):
    free = [{"prompt": row["prompt"], "completion": {"tool": "find", "arguments": {f"key{n}": n, "at": "home"}}}
            for n, row in enumerate(rows(90))]  # fmt: skip
    write("train.jsonl", free[:60])
    write("test.jsonl", free[60:75])
    write("validation.jsonl", free[75:])
    assert main(["init", "train.jsonl", "--task", "tools", "--base", base]) == 0
    output = capsys.readouterr().out
    assert "data.bad_rows" not in output and "quarantined" not in output


@pytest.mark.parametrize("command", ["train", "fit"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(write_project, capsys, command):
    folder = write_project({"max_epochs": 2, "val_check_interval": 2}, lora={"r": 4})
    before = contents(folder)
    assert main([command, "-c", "small.yaml", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert contents(folder) == before
    assert re.search(
        r"^steps: \d+ with 16 rows each, 2 epochs; each has [\d,]+ tokens, 1.0 micro-batches, .* s$", output, re.M
    )
    assert re.search(r"^validations: \d on \d+ rows$", output, re.M)
    assert ("baselines: zero-shot, few_shot, constrained, on" in output) == (command == "train")


def test_a_dry_run_refuses_what_training_refuses(write_project, task, capsys):
    write_project({"max_epochs": 2})
    task[1]("train.jsonl", [pair(n) | {"completion": "no"} for n in range(60)])
    assert main(["train", "-c", "small.yaml", "--dry_run"]) == 2
    assert "train.jsonl:1: syntax: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_compares_the_estimates_of_a_dry_run_with_what_the_run_took(write_project, capsys):
    write_project({"max_epochs": 1}, lora={"r": 4})
    words = ["train", "-c", "small.yaml", "--baselines", "[]"]
    assert main([*words, "--dry_run"]) == 0
    steps = int(re.search(r"^steps: (\d+)", capsys.readouterr().out, re.M)[1])
    # Where a run is and how it is watched makes no difference; what is trained does.
    for run, more, compared in (("same", ["--logger", "csv"], True), ("other", ["--model.lora.r", "2"], False)):
        assert main([*words, "--run", run, *more]) == 0
        result = json.loads(Path(f"logs/small/{run}/metrics.json").read_text())
        page = Path(f"logs/small/{run}/report.html").read_text()
        assert ("estimates" in result) == ("estimated</th>" in page) == compared
        if compared:
            assert result["estimates"]["steps"] == {"estimated": steps, "measured": steps}
            for name in ("training, min", "baselines, min", "test, min", "peak memory, GiB"):
                assert all(value > 0 for value in result["estimates"].pop(name).values())


def test_a_dry_run_counts_the_baseline_of_the_adapter_that_training_begins_at(write_project, capsys):
    write_project({"max_epochs": 1, "max_steps": 1}, lora={"r": 4})
    assert main(["train", "-c", "small.yaml", "--run", "first", "--quick"]) == 0
    words = ["--model.adapter", "logs/small/first/adapter", "--baselines", "[few_shot]"]
    assert main(["train", "-c", "small.yaml", "--dry_run", *words]) == 0
    assert "\nbaselines: zero-shot, few_shot, adapter, on" in capsys.readouterr().out


def test_the_schema_is_not_written_among_the_rows_of_a_folder(folder, base, capsys):
    Path("data/tickets").mkdir(parents=True)
    write("data/tickets/a.jsonl", rows(40))
    main(["init", "data/tickets", "--base", base])
    assert Path("configs/tickets.schema.json").is_file() and not Path("data/tickets/schema.json").exists()
    assert "not valid JSON" not in capsys.readouterr().err


def test_a_glob_gives_no_name(folder, base):
    Path("data").mkdir()
    write("data/a.jsonl", rows(40))
    main(["init", "data/*.jsonl", "--base", base])
    assert [path.stem for path in Path("configs").iterdir()] == [folder.name]


def test_schemas_of_the_rows_are_shown_to_the_model_and_the_target_is_no_group(folder, base):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    write("own.jsonl", ({"prompt": f"take {n}", "completion": {"n": n}, "schema": schema} for n in range(40)))
    main(["init", "own.jsonl", "--base", base])
    assert "{schema}" in yaml.safe_load(Path("configs/own.yaml").read_text())["data"]["system"]
    write("books.jsonl", ({"text": f"words {n * 7919} of it", "author": f"person {n % 4}"} for n in range(80)))
    main(["init", "books.jsonl", "--base", base])
    data = yaml.safe_load(Path("configs/books.yaml").read_text())["data"]
    assert data["columns"]["completion"] == "author" and "group" not in data
