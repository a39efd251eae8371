"""In a terminal a fit draws one line: steps of the whole fit, rows, loss and the time left."""

import re

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from formtune.training.callbacks import StepsBar

SECONDS = {"step": 2.0, "validation": 30.0}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Model(L.LightningModule):
    """Each step and each validation take a fixed time."""

    def __init__(self, clock):
        super().__init__()
        self.layer, self.clock = torch.nn.Linear(1, 1), clock

    def training_step(self, batch, _):
        self.clock.now += SECONDS["step"]
        self.log("train/loss", 0.01234)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, _):
        self.clock.now += SECONDS["validation"] / 2

    def test_step(self, batch, _):
        return batch

    predict_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Last(L.Callback):
    """As the checkpoints' callback does: the last step is validated too."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= trainer.estimated_stepping_batches


def loader(rows, size):
    return DataLoader(TensorDataset(torch.zeros(rows, 1)), batch_size=size)


@pytest.fixture
def drawn(monkeypatch, capsys):
    """Lines that a fit of 2 epochs of 50 rows in steps of 8, and evaluations of 300 rows, draw at 80 columns."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock.monotonic)
    monkeypatch.setattr("formtune.training.callbacks.time", clock)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (80, 24))

    def lines(command="fit", refresh_rate=1, **options):
        model = Model(clock)
        given = {
            "max_epochs": 2, "val_check_interval": 5, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
            "logger": False, "accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False,
        }  # fmt: skip
        trainer = L.Trainer(callbacks=[Last(), StepsBar(refresh_rate)], log_every_n_steps=1, **given | options)
        if command == "fit":
            trainer.fit(model, loader(50, 8), loader(300, 256))
        else:
            getattr(trainer, command)(model, loader(300, 256))
        text = capsys.readouterr().out
        return [re.sub(r"\x1b\[\w", "", line).rstrip() for line in re.split(r"[\r\n]", text) if line.strip()]

    return lines


def test_a_line_of_a_fit_counts_the_steps_of_all_epochs_and_fits_into_80_columns(drawn):
    lines = drawn()
    assert max(map(len, lines)) <= 80
    shown = [line.partition(" |")[0] for line in lines if "loss" in line]
    assert "Epoch 0: 1/14 steps, rows=8, loss=0.0123, left=00:26" in shown
    # A validation of 30 seconds after step 5, and another after step 10.
    assert "Epoch 0: 6/14 steps, rows=48, loss=0.0123, left=00:56" in shown
    assert "Epoch 1: 8/14 steps, rows=58, loss=0.0123, left=00:34" in shown
    assert "Epoch 1: 11/14 steps, rows=82, loss=0.0123, left=00:22" in shown
    assert shown[-1] == "Epoch 1: 14/14 steps, rows=100, loss=0.0123, left=00:00"


@pytest.mark.parametrize(
    ("command", "name"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting")]
)
def test_the_bar_of_an_evaluation_counts_rows(drawn, command, name):
    counts = re.findall(rf"^{name} (\d+)/300 rows \|", "\n".join(drawn(command)), re.M)
    assert list(dict.fromkeys(map(int, counts))) == [0, 256, 300]


def test_validations_within_a_fit_count_rows_too_and_a_limit_lowers_the_total(drawn):
    lines = drawn(limit_val_batches=1, limit_train_batches=3)
    assert any(line.startswith("Validation 256/256 rows |") for line in lines)
    assert any(line.startswith("Epoch 1: 4/6 steps, rows=32, ") for line in lines)  # 24 rows of an epoch


def test_nothing_is_drawn_if_the_output_is_not_a_terminal(drawn):
    assert drawn(refresh_rate=0) == drawn("test", refresh_rate=0) == []


def test_a_file_gets_a_line_of_progress_every_few_steps(drawn, monkeypatch):
    monkeypatch.setattr("formtune.training.callbacks.PRINTED_STEPS", 4)
    lines = ["step 4 of 14  train/loss 0.0123  0:00:20 left", "step 8 of 14  train/loss 0.0123  0:00:34 left"]
    assert drawn(refresh_rate=0) == [*lines, "step 12 of 14  train/loss 0.0123  0:00:14 left"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"fast_dev_run": 2}, "Epoch 0: 2/2 steps, rows=16, loss=0.0123, left=00:00"),
        ({"overfit_batches": 2, "val_check_interval": 2}, "Epoch 1: 3/4 steps, rows=24, loss=0.0123, left=00:12"),
        ({"val_check_interval": 1.0, "check_val_every_n_epoch": 1}, "Epoch 1: 8/14 steps, rows=58, loss=0.0123, left=00:34"),
        ({"num_sanity_val_steps": 1}, "Epoch 0: 1/14 steps, rows=8, loss=0.0123, left=00:26"),
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, "Epoch 0: 1/? steps, rows=8, loss=0.0123, 00:02"),
    ],
)  # fmt: skip
def test_flags_of_the_trainer_are_taken_into_account(drawn, options, line):
    assert line in [shown.partition(" |")[0] for shown in drawn(**options)]
