"""Flags, callbacks, loggers and checkpoints work as a Lightning user expects."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as L
import pytest
import torch
import yaml

from formtune.cli import main
from formtune.configuration.parsing import KEYS
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.formats import JsonSchema
from formtune.model import FormatModule, Lora
from interrupting import ROWS, SCHEMA

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def task_yaml(tmp_path, base, monkeypatch):
    """The YAML of a small task in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORMTUNE_RUN", raising=False)
    Path("schema.json").write_text(json.dumps(SCHEMA))
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "model": {"base": base, "max_new_tokens": 4, "lora": {"r": 2}},
        "data": {
            "train": "train.jsonl",
            "near_duplicates": 1.0,
            "format": {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}},
        },
        "trainer": {
            "max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "precision": "32-true",
            "enable_progress_bar": False,
        },
        "baselines": [],
    }  # fmt: skip
    Path("small.yaml").write_text(yaml.safe_dump(config))
    return "small.yaml"


def fit(*arguments):
    return main(["fit", "-c", "small.yaml", "--run", "one", *arguments])


def callbacks(*classes):
    return "--trainer.callbacks=" + json.dumps(
        [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": given} for name, given in classes]
    )


def test_fit_is_lightnings_fit_it_trains_validates_and_keeps_checkpoints(task_yaml, capsys):
    assert fit() == 0
    run = Path("logs/small/one")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2.ckpt", "step-4.ckpt"]
    assert (run / "config.yaml").exists() and not (run / "metrics.json").exists() and not (run / "adapter").exists()
    assert "best checkpoint: step" in capsys.readouterr().out


def test_callbacks_of_formtune_are_groups_of_the_yaml(task_yaml, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "-c", task_yaml, "--print_config"])
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["checkpoint"] == {"every_n_seconds": 30.0, "save_last": 2}
    assert config["overfitting"] == {"patience": None} and config["answer_table"] == {"rows": 12}


def test_a_model_checkpoint_of_the_users_own_works_beside_the_best_checkpoint(task_yaml):
    own = ("ModelCheckpoint", {"dirpath": "custom/deep", "monitor": "val/loss", "save_top_k": 1, "save_last": True})
    assert fit(callbacks(own)) == 0
    assert any(path.name == "last.ckpt" for path in Path("custom/deep").iterdir())
    assert list(Path("logs/small/one/checkpoints").glob("step-*.ckpt"))


@pytest.mark.parametrize(
    "other",
    [
        ("EarlyStopping", {"monitor": "val/loss", "patience": 1}),
        ("LearningRateMonitor", {}),
        ("Timer", {"duration": "00:01:00:00"}),
        ("DeviceStatsMonitor", {"cpu_stats": True}),
    ],
)
def test_other_callbacks_work(task_yaml, other):
    assert fit(callbacks(other)) == 0


def test_a_run_with_callbacks_that_need_a_logger_is_tested(task_yaml):
    assert fit(callbacks(("LearningRateMonitor", {}))) == 0
    assert main(["test", "logs/small/one"]) == 0


def test_a_run_that_a_callback_stopped_early_stays_stopped_when_it_is_resumed(task_yaml):
    early = callbacks(("EarlyStopping", {"monitor": "val/loss", "patience": 1, "min_delta": 1e9}))
    assert fit(early, "--trainer.max_steps", "8") == 0
    folder = Path("logs/small/one/checkpoints")
    stopped = {path.name: path.stat().st_mtime for path in folder.iterdir()}
    assert max(stopped) == "step-4.ckpt"
    assert fit(early, "--trainer.max_steps", "8", "--resume") == 0
    assert {path.name: path.stat().st_mtime for path in folder.iterdir()} == stopped, "nothing was trained or validated"


def test_a_callback_needs_no_list(task_yaml):
    assert fit("--trainer.callbacks", "LearningRateMonitor") == 0


class Unsafe(L.Callback):
    """A callback whose state safe loading refuses."""

    def state_dict(self):
        return {"place": Path("somewhere")}

    def load_state_dict(self, state_dict):
        pass


def test_a_state_that_cannot_be_loaded_again_is_refused_at_the_first_checkpoint(task_yaml, capfd):
    flags = "--trainer.callbacks=" + json.dumps([{"class_path": f"{__name__}.Unsafe"}])
    assert fit(flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint: the state of a callback, optimizer or schedule cannot be loaded" in error
    assert not list(Path("logs/small/one/checkpoints").glob("*.ckpt"))


def test_a_run_that_has_only_damaged_checkpoints_does_not_begin_again(task_yaml, capfd):
    assert fit() == 0
    for path in Path("logs/small/one/checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    for _ in range(2):
        assert fit("--resume") == 2
        assert "every checkpoint is damaged; start a new run" in capfd.readouterr().err


def test_less_memory_may_be_set_when_a_run_is_resumed(task_yaml):
    flags = "--trainer.callbacks=" + json.dumps([{"class_path": f"{__name__}.StopAt"}])
    with pytest.raises(MemoryError):
        fit(flags, "--checkpoint.every_n_seconds", "0")
    StopAt.step = None
    less = ["--model.tokens_per_micro_batch", "64", "--model.gradient_checkpointing", "true"]
    assert fit(flags, "--resume", *less) == 0


class StopAt(L.Callback):
    """Ends the run by an error after a step."""

    step = 3

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise MemoryError


def test_a_progress_bar_of_ones_own_replaces_formtunes(task_yaml):
    assert fit(callbacks(("RichProgressBar", {})), "--trainer.enable_progress_bar", "true") == 0


def test_a_custom_metric_can_be_monitored(task_yaml):
    monitor = callbacks(("EarlyStopping", {"monitor": "custom/CharErrorRate", "patience": 9}))
    assert fit(monitor, "--model.metrics", "[torchmetrics.text.CharErrorRate]") == 0


def test_overfitting_to_a_batch_takes_the_same_rows_in_every_epoch(task_yaml, monkeypatch):
    seen, collate = [], FormatModule.collate

    def noted(self, rows, evaluation, decoding=None):
        seen.append([row.where for row in rows]) if not evaluation else None
        return collate(self, rows, evaluation, decoding)

    monkeypatch.setattr(FormatModule, "collate", noted)
    assert fit("--trainer.overfit_batches", "1") == 0
    assert len(seen) > 2 and all(sorted(rows) == sorted(seen[0]) for rows in seen)


def test_a_run_without_checkpoints_is_not_measured_as_the_base(task_yaml, capsys):
    assert fit() == 0
    shutil.rmtree("logs/small/one/checkpoints")
    assert main(["test", "logs/small/one"]) == 2
    assert (
        "logs/small/one: the run has no checkpoints; continue it with formtune train -c logs/small/one/config.yaml"
        in capsys.readouterr().err
    )


def test_answers_that_cannot_be_written_are_refused_before_the_work(task_yaml, capsys):
    assert fit() == 0
    Path("prompts.jsonl").write_text('{"prompt": "number 5"}\n')
    Path("folder").mkdir()
    for name, reason in (("folder", "is a folder"), ("prompts.jsonl/answers.jsonl", "exists")):
        assert main(["predict", "logs/small/one", "prompts.jsonl", "--answers", name]) == 2
        assert f"answers: {name}" in (error := capsys.readouterr().err) and reason in error


def test_a_dry_run_takes_a_schedule_of_few_steps_and_trains_nothing_whatever_the_least(task_yaml, capsys):
    schedule = ["--model.scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.scheduler.max_lr", "1e-3"]
    schedule += ["--model.scheduler.total_steps", "4", "--trainer.min_steps", "2"]
    assert fit(*schedule, "--dry_run") == 0
    assert capsys.readouterr().out.endswith("dry run: nothing was trained\n")


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_weight_averaging_is_refused_with_the_reason(task_yaml, capfd, name):
    given = {"swa_lrs": 1e-3} if name.startswith("Stochastic") else {}
    assert fit(callbacks((name, given))) == 2
    assert f"{name} averages weights after the best checkpoint was chosen" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.overfit_batches", "1"],
        ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"],
        ["--trainer.profiler", "simple"],
        ["--trainer.detect_anomaly", "true"],
        ["--trainer.logger", '{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}'],
    ],
)
@pytest.mark.parametrize("command", ["fit", "train"])
def test_flags_of_the_trainer_work(task_yaml, command, flags):
    assert main([command, "-c", task_yaml, "--run", "one", *flags]) == 0
    assert ("fast_dev_run" not in flags[0]) == Path("logs/small/one/config.yaml").exists()
    assert bool(list(Path().glob("csv/**/metrics.csv"))) == ("csv" in flags[-1])


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_missing_gets_one_line(task_yaml, capfd, name):
    assert fit("--trainer.logger", f"lightning.pytorch.loggers.{name}") in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("formtune: error:")]
    assert len(errors) == 1 and name.removesuffix("Logger").lower() in errors[0].lower()


def test_a_schedule_of_torch_replaces_the_cosine(task_yaml):
    schedule = '{"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}'
    assert fit("--model.scheduler", schedule) == 0
    state = torch.load("logs/small/one/checkpoints/step-4.ckpt", weights_only=True)["lr_schedulers"][0]
    assert state["factor"] == 1.0


def test_commands_take_a_run_and_measure_its_best_checkpoint(task_yaml, capsys):
    assert main(["train", "-c", task_yaml, "--run", "one"]) == 0
    result = json.loads(Path("logs/small/one/metrics.json").read_text())
    capsys.readouterr()
    assert main(["test", "logs/small/one"]) == 0
    out = capsys.readouterr().out
    assert f"step-{result['training']['best_step']}.ckpt, the run's best checkpoint" in out
    Path("prompts.jsonl").write_text('{"prompt": "number 5"}\n')
    assert main(["predict", "logs/small/one", "prompts.jsonl", "--answers", "a.jsonl"]) == 0
    assert len(Path("a.jsonl").read_text().splitlines()) == 1
    assert main(["test", "logs/small/two"]) == 2
    assert "logs/small/two: not a run" in capsys.readouterr().err


@pytest.mark.contrib
def test_try_shows_the_answers_of_both_models(task_yaml, capsys, monkeypatch):
    assert main(["train", "-c", task_yaml, "--run", "one", "--baselines", "[]"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("number 5\n"))
    assert main(["try", "logs/small/one"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"\n(?:> )?(\w+), confidence [\d.]+: ", "\n" + out) == ["base", "tuned"]
    assert out.endswith("next: formtune export logs/small/one\n")


def test_quick_measures_no_baselines_no_longer_inputs_and_few_rows(task_yaml, capsys):
    assert main(["train", "-c", task_yaml, "--run", "one", "--quick", "--data.validation", "train.jsonl"]) == 2
    assert main(["train", "-c", task_yaml, "--run", "two", "--quick", "--baselines", "[few_shot]"]) == 0
    result = json.loads(Path("logs/small/two/metrics.json").read_text())
    assert "few_shot" not in result and result["rows"] <= 50 and result["probe"] == []


def test_baselines_are_measured_on_a_sample_and_print_how_long_they_take(task_yaml, capsys):
    arguments = ["--data.test", "0.4", "--baseline_rows", "9", "--baselines", "[few_shot]"]
    assert main(["train", "-c", task_yaml, "--run", "one", *arguments]) == 0
    result = json.loads(Path("logs/small/one/metrics.json").read_text())
    rows = {name: result["counts"][name]["format/exact"][1] for name in ("before", "few_shot", "after")}
    assert rows["before"] == rows["few_shot"] == 9 < rows["after"]
    out = capsys.readouterr().out
    assert f"baselines: 1 more on 9 of {rows['after']} test rows, about 1 min" in out and "--baselines '[]'" in out


def test_the_short_help_is_quick_and_prints_the_defaults(task_yaml, capfd):
    program = "import sys; from formtune.cli import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 55 and time.monotonic() - started < 30
    with pytest.raises(SystemExit):
        main(["fit", "-c", task_yaml, "--print_config"])
    config = yaml.safe_load(capfd.readouterr().out)
    printed = {key: entry.get("default", "") for key, entry in KEYS.items()}
    defaults = yaml.safe_load((ROOT / "configs/reference.yaml").read_text())
    for key, default in printed.items():
        node = defaults
        for part in key.split("."):
            if node is None:  # a class whose defaults are in its own signature
                break
            node = node["init_args"] if "init_args" in node and part not in node else node
            node = node[part]
        assert default == "" or node is None or yaml.safe_load(default) == node, key
    assert config["model"]["lora"]["r"] == 2


@pytest.mark.slow
def test_the_reference_configuration_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from reference import REFERENCE, reference

    assert REFERENCE.read_text() == reference(), "run make reference"


def test_the_classes_work_by_hand_and_refuse_a_second_split_of_the_rows(task_yaml, base):
    class Loss(L.Callback):
        values: ClassVar[list[float]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append(float(outputs["loss"]))

    format = JsonSchema("schema.json")
    data = FormatDataModule(format=format, tokenizer=base, train="train.jsonl", rows_per_step=8)
    model = FormatModule(base=base, format=format, lora=Lora(r=4))
    options = {"max_steps": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [Loss()]}
    trainer = L.Trainer(**options, **quiet, use_distributed_sampler=False)
    trainer.fit(model, data)
    assert len(Loss.values) == 3 and all(value > 0 for value in Loss.values)
    [figures] = trainer.test(model, data, verbose=False)
    assert "test/format/exact" in figures
    data.trainer = SimpleNamespace(
        world_size=2,
        state=SimpleNamespace(fn="fit"),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=True),
    )
    with pytest.raises(UserError, match="would split the rows a second time; set it to False"):
        data.setup("fit")


@pytest.mark.parametrize("command", ["train", "fit", "validate", "test", "predict"])
def test_without_a_task_the_line_says_so(command, capsys):
    assert main([command]) == 2
    assert "formtune: error: name a task, -c TASK.yaml" in capsys.readouterr().err


def test_a_share_of_an_epoch_and_a_rate_monitor_work_and_what_stops_a_run_is_named(task_yaml, capsys):
    monitor = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.log_every_n_steps", "1", "--logger", "csv"]
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stopping += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100"]
    assert fit("--trainer.max_steps", "9", "--trainer.val_check_interval", "0.5", *monitor, *stopping) == 0
    assert re.search(r"stopped at step \d of 9: EarlyStopping", capsys.readouterr().out)
    rows = list(csv.DictReader(next(Path("logs/small/one").rglob("metrics.csv")).open()))
    assert len([row for row in rows if row.get("lr-AdamW")]) > 2


def test_a_run_that_was_refused_before_its_first_step_is_no_run(task_yaml, capsys):
    words = ["--model.scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.scheduler.max_lr", "1"]
    assert fit(*words, "--model.scheduler.total_steps", "1") == 2
    assert "total_steps is 1, but the run has" in capsys.readouterr().err
    assert not Path("logs/small/one/config.yaml").exists() and fit() == 0
