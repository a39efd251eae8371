"""Each verdict ends with a command that does what it asks for; docs/training.md has the rules."""

import contextlib
import json
import math
import shlex
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.callbacks import Timer

from formtune.cli import main
from formtune.report.next_step import next_step
from formtune.training.validations import Validation


def history(train, val, right=None, valid=None, every=100, rows=100):
    """Validations at equal intervals; right and valid are numbers of rows."""
    right, valid = right or [0] * len(val), valid or [50] * len(val)
    return [
        Validation(every * i, t, v, r / rows, rows, (1 << ok) - 1, (1 << r) - 1)
        for i, (t, v, r, ok) in enumerate(zip(train, val, right, valid, strict=True))
    ]


def after(
    seen, command="train", rows=2000, epoch=125, steps=None, lr=2e-4, rank=16, adapter=None, full=None, **trainer
):
    """What to do after a run, and the command's words."""
    run = {
        "default_root_dir": "logs/t/r", "num_training_batches": epoch, "global_step": steps or seen[-1].step,
        "datamodule": SimpleNamespace(splits=SimpleNamespace(rows={"train": range(rows)})),
        "optimizers": [SimpleNamespace(defaults={"lr": lr})], "max_steps": -1, "callbacks": [],
        "lightning_module": SimpleNamespace(lora=SimpleNamespace(r=rank), adapter=adapter),
    }  # fmt: skip
    what, _, line = next_step(seen, SimpleNamespace(**run | trainer), command, full or {}).rpartition(": ")
    assert line.startswith("formtune ")
    return what, line.removeprefix("formtune ")


TRAIN = "train -c logs/t/r/config.yaml "
AUDIT = "audit -c logs/t/r/config.yaml"
FALLING = [2.0, 1.0, 0.8, 0.7, 0.6, 0.5]
RISING = [2.0, 1.0, 0.8, 0.86, 0.88, 0.9]  # validation loss of a run that overfits since step 200
FLAT = [2.0] * 5
SLOW = [2.0, 1.96, 1.92, 1.88, 1.84]
LEVEL = [2.0, 1.0, 0.9, 0.9, 0.9, 0.9]
CASES = {
    "diverged": (history([2, 1, math.nan], [2, 1, math.nan]), {}, TRAIN + "--model.optimizer.lr 2.0e-05"),
    "spikes": (history([2, 1, 1.5, 0.8, 0.7], [2, 1, 1.5, 0.8, 0.7]), {}, TRAIN + "--model.optimizer.lr 6.7e-05"),
    "rises": (history([2, 2.08, 2.14, 2.2, 2.2], FLAT), {}, TRAIN + "--model.optimizer.lr 6.7e-05"),
    "not learning": (history(FLAT, FLAT), {}, TRAIN + "--model.optimizer.lr 2.0e-03"),
    "slow": (history(SLOW, SLOW), {}, TRAIN + "--model.optimizer.lr 6.0e-04"),
    "overfitting, few rows": (history(FALLING, RISING), {"rows": 300}, AUDIT),
    "overfitting": (history(FALLING, RISING), {}, TRAIN + "--trainer.max_epochs 2"),
    "overfitting in one epoch": (history(FALLING, RISING), {"epoch": 500}, TRAIN + "--model.lora.r 8"),
    "overfitting at the lowest rank": (history(FALLING, RISING), {"epoch": 500, "rank": 4}, AUDIT),
    "far below validation": (history(FALLING, LEVEL), {}, AUDIT),
    "level": (history(LEVEL, LEVEL), {}, TRAIN + "--model.lora.r 32"),
    "level, from an adapter": (
        history(LEVEL, LEVEL),
        {"adapter": "a"},
        TRAIN + "--model.lora.r 32 --model.adapter null",
    ),
    "level at the highest rank": (history(LEVEL, LEVEL), {"rank": 64}, AUDIT),
    "too early": (history(FLAT[:2], FLAT[:2]), {"epoch": 50}, TRAIN + "--trainer.max_epochs 6"),
    "all right": (history(FALLING, RISING, [0, 50, 99, 99, 99, 99], [99] * 6), {}, "export logs/t/r"),
    "fit, all right": (history([2, 1], [2, 1], [0, 99], [0, 99]), {"command": "fit"}, "test logs/t/r"),
    "fit": (history(FLAT, FLAT), {"command": "fit"}, "fit -c logs/t/r/config.yaml --model.optimizer.lr 2.0e-03"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_verdict_has_its_command(case):
    seen, run, command = CASES[case]
    assert after(seen, **run)[1] == command


def test_a_format_that_is_learned_while_content_rises_leads_to_training_longer_and_names_both():
    seen = history([2, 1, 0.6, 0.5, 0.4], [2, 1.1, 0.7, 0.6, 0.5], [0, 10, 20, 30, 42], [0, 90, 97, 98, 98])
    assert after(seen) == (
        "train longer (joint/exact 20% at step 200, 42% at step 400, format/exact 98%)",
        TRAIN + "--trainer.max_epochs 10",
    )
    # Also where the loss rises already.
    rising = history([2, 1, 0.6, 0.5, 0.4], [2, 0.7, 0.8, 0.9, 1.0], [0, 10, 20, 30, 42], [0, 90, 97, 98, 98])
    assert after(rising)[1] == TRAIN + "--trainer.max_epochs 10"


@pytest.mark.parametrize(("power", "epochs"), [(2.0, 12), (1.0, 16), (0.7, 22), (0.5, 24), (0.1, 24)])
def test_longer_is_until_the_error_halves_and_at_most_three_times_as_long(power, epochs):
    loss = [4.0, *((step / 100) ** -power for step in range(100, 900, 100))]
    assert after(history(loss, loss), epoch=100)[1] == TRAIN + f"--trainer.max_epochs {epochs}"


def test_after_a_quick_run_the_next_one_is_measured_in_full():
    seen = history([2, 1, 0.6, 0.5, 0.4], [2, 1.1, 0.7, 0.6, 0.5])
    assert "--baselines" not in after(seen)[1]
    full = {"baselines": "[few_shot]", "data.max_evaluation_rows": 90}
    assert after(seen, full=full)[1].endswith(" --baselines '[few_shot]' --data.max_evaluation_rows 90")


def test_less_than_an_epoch_is_counted_in_steps_and_other_limits_are_lifted():
    seen = history([2, 1], [2, 1], every=20)
    assert after(seen, max_steps=20)[1] == TRAIN + "--trainer.max_epochs 1 --trainer.max_steps 60"
    assert after(seen, epoch=50, max_steps=20)[1] == TRAIN + "--trainer.max_epochs 2 --trainer.max_steps -1"
    timed = after(seen, epoch=20, callbacks=[Timer(timedelta(minutes=1))])[1]
    assert timed == TRAIN + "--trainer.max_epochs 3 --trainer.max_time null"


@pytest.mark.slow
def test_the_commands_work_as_they_are_printed(write_project, capsys):
    write_project({"max_epochs": 4, "val_check_interval": 2}, {"r": 4, "dropout": 0.0}, {"rows_per_step": 5})
    assert main(["train", "-c", "small.yaml", "--run", "one", "--model.optimizer.lr", "1e-9"]) == 0
    line = json.loads(Path("logs/small/one/metrics.json").read_text())["training"]["next"]
    assert line == (
        "raise the learning rate (training loss has not fallen): "
        "formtune train -c logs/small/one/config.yaml --model.optimizer.lr 1.0e-08"
    )
    assert f"\nnext: {line}\n" in capsys.readouterr().out
    what, command = line.split(": ")
    shown = f'<b>Next:</b> {what}</p><pre class="command">{command}</pre>'
    assert shown in Path("logs/small/one/report.html").read_text()
    words = shlex.split(line.rpartition(": ")[2])[1:]
    assert main([*words, "--run", "two"]) == 0
    assert (
        yaml.safe_load(Path("logs/small/two/config.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"] == 1e-8
    )
    capsys.readouterr()

    assert main(["fit", *words[1:], "--run", "three"]) == 0
    line = capsys.readouterr().out.partition("\nnext: ")[2].splitlines()[0]
    assert line.endswith("formtune fit -c logs/small/three/config.yaml --model.optimizer.lr 1.0e-07")

    for name in ("overfitting", "overfitting in one epoch", "fit", "too early"):
        seen, run, _ = CASES[name]
        trainer = run | {"default_root_dir": "logs/small/one", "max_steps": 7}
        words = shlex.split(after(seen, **trainer, callbacks=[Timer("00:01:00:00")])[1])
        with contextlib.suppress(SystemExit):
            main([*words, "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        for key, value in zip(words[3::2], words[4::2], strict=True):
            *groups, last = key.removeprefix("--").replace("optimizer", "optimizer.init_args").split(".")
            node = config
            for group in groups:
                node = node[group]
            assert node[last] == yaml.safe_load(value)
    assert main(shlex.split(after(*CASES["far below validation"][:1], default_root_dir="logs/small/one")[1])) in (0, 1)
