"""Each logger writes into the run's folder, shows the tables that it can show, and continues where a run resumes."""

import csv
import importlib.util
import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from formtune.cli import main
from formtune.training.loggers import CHARTS, OneEventFile, log_table, make_loggers, save_config

COLUMNS, ROWS = ("why", "answer"), [("syntax: a | b", "```\n{"), ("ok", "{}")]


@pytest.fixture
def project(write_project):
    return write_project({"max_epochs": 1, "val_check_interval": 2}, {"r": 2})


def train(*words):
    return main(["train", "-c", "small.yaml", "--run", "one", "--baselines", "[]", *words])


def trainer(*loggers, step=3):
    return SimpleNamespace(loggers=loggers, global_step=step, is_global_zero=True)


@pytest.mark.slow
def test_a_run_writes_one_event_file_with_the_headline_charts_and_the_csv_beside_it(project, capsys):
    assert train("--logger", "[tensorboard,csv]") == 0
    run = project / "logs/small/one"
    [file] = run.glob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode(errors="replace")
    assert all(title in layout for title in CHARTS)
    assert {"format/exact", "test/format/exact"} <= {*tags["scalars"]}
    assert {"answers/validation/text_summary", "answers/test/text_summary", "diagnosis/text_summary"} <= {
        *tags["tensors"]
    }
    rows = list(csv.DictReader((run / "csv/metrics.csv").open()))
    assert {"0", "2", "4"} <= {row["step"] for row in rows if row["val/loss"]}
    assert "curves: make tensorboard" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(project, capfd, monkeypatch, name):
    monkeypatch.setattr("formtune.training.loggers.find_spec", lambda name: None)
    assert train("--logger", name) == 2
    assert f"formtune: error: logger: {name} is not installed; pip install {name}\n" in capfd.readouterr().err
    assert not (project / "logs").exists()


def test_a_mistyped_logger_is_refused(project, capfd):
    assert train("--logger", "tensorbord") == 2
    assert "logger: must be one of tensorboard, csv, wandb, mlflow" in capfd.readouterr().err


def test_a_resumed_run_logs_beside_the_rows_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step, numbers in ((None, range(1, 6)), (4, (4, 5, 6))):
        [logger] = make_loggers(["csv"], "t", "r", step)
        for number in numbers:
            logger.log_metrics({"train/loss": number}, number)
        logger.finalize("success")
    files = [Path("logs/t/r/csv", name, "metrics.csv") for name in ("", "from-step-4")]
    assert [[row["step"] for row in csv.DictReader(path.open())] for path in files] == [[*"12345"], [*"456"]]


def test_tables_go_to_every_logger(tmp_path):
    class Table(WandbLogger):
        def __init__(self):
            self.log_table = lambda *args, **kw: tables.append((args, kw))
            self.log_hyperparams = configurations.append

    class Client(MLFlowLogger):
        run_id = "7"
        experiment = SimpleNamespace(log_table=lambda *args: tables.append((args, {})))

        def __init__(self):
            self.log_hyperparams = configurations.append

    tables, configurations = [], []
    board, file = OneEventFile(tmp_path, "t", "r"), CSVLogger(tmp_path, "csv", "")
    every = trainer(board, file, Table(), Client())
    log_table(every, "answers/test", COLUMNS, ROWS)
    save_config(every, tmp_path / "config.yaml", "model: {base: b}")
    assert configurations == [{"model": {"base": "b"}}] * 2
    assert tables[0] == (("answers/test", ["why", "answer"], [list(row) for row in ROWS]), {"step": 3})
    whole = {"step": [3, 3], "why": ["syntax: a | b", "ok"], "answer": ["```\n{", "{}"]}
    assert tables[1] == (("7", whole, "answers/test.json"), {})
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "t/r"))
    events.Reload()
    [event] = events.Tensors("answers/test/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.startswith("| why | answer |\n| --- | --- |\n| <code>syntax&#58; a &#124; b</code> |")


def test_a_logger_that_is_only_made_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name)]
    assert len(make_loggers(["tensorboard", "csv", *there], "t", "r", None)) == 2 + len(there)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wandb_logs_offline_into_the_runs_folder(project, capfd, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert train("--logger", "wandb") == 0
    wandb.finish()
    run = project / "logs/small/one"
    [folder] = run.glob("wandb/offline-*")
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/answers/*.json")]
    assert len(tables) > 3 and all(table["columns"] == ["why", "input", "target", "answer"] for table in tables)
    assert "curves: logs/small/one" in capfd.readouterr().out
    assert not list(project.glob("wandb*")) and not list(run.glob("events.*"))


@pytest.mark.slow
def test_mlflow_logs_into_the_runs_folder(project, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert train("--logger", "mlflow") == 0
    run = project / "logs/small/one"
    database = sqlite3.connect(run / "mlflow.db")
    [(name, status)] = database.execute("select name, status from runs").fetchall()
    steps = database.execute("select step from metrics where key = 'val/loss' order by step").fetchall()
    assert (name, status) == ("one", "FINISHED") and steps == [(0,), (2,), (4,)]
    assert database.execute("select value from params where key = 'model/lora/r'").fetchall() == [("2",)]
    [path] = run.glob("mlflow/*/artifacts/answers/validation.json")
    assert json.loads(path.read_text())["columns"] == ["step", "why", "input", "target", "answer"]
    assert not list(Path().glob("ml*"))
