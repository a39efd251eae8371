"""The diagnosis says what constructed histories and real tiny runs are, and measuring changes nothing in a run."""

import contextlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from conftest import byte_tokenizer, pair, tiny_model
from formtune.cli import main
from formtune.data.datamodule import FormatDataModule
from formtune.evaluation.outcomes import outcome
from formtune.formats import JsonSchema
from formtune.model import FormatModule, Lora
from formtune.training import checkpoint
from formtune.training.callbacks import OverfittingWatch
from formtune.training.diagnosis import PATIENCE, diagnose, should_stop
from formtune.training.validations import Validation, reason


def history(train, val, exact=None, f1=None, right=None, rows=100):
    """Validations every 100 steps; format and content stay as they are unless given.

    `exact` and `right` are numbers of rows, each set within the larger ones, or the rows themselves, one bit each.
    """
    exact, right, f1 = exact or [50] * len(val), right or [0] * len(val), f1 or [0.5] * len(val)
    return [
        Validation(100 * i, t, v, f, rows, *(e if e > rows else (1 << e) - 1 for e in (e, r)))
        for i, (t, v, f, e, r) in enumerate(zip(train, val, f1, exact, right))  # noqa: B905
    ]


def kind(*args, **kwargs):
    return diagnose(history(*args, **kwargs)).kind


FALLING = [2.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4]


def test_overfitting_names_its_metrics():
    val = [2.0, 1.0, 0.80, 0.86, 0.88, 0.90]
    diagnosis = diagnose(history(FALLING[:6], val, exact=[10, 70, 90, 90, 91, 90]))
    assert diagnosis.kind == "overfitting"
    assert diagnosis.text == ("overfitting since step 200: validation loss +12% from its lowest while train fell 38%")


def test_a_run_that_gets_better_is_learning():
    assert kind(FALLING, [x + 0.1 for x in FALLING]) == "learning"
    assert kind([2.0, 1.0], [2.0, 1.1]) == "learning"


@pytest.mark.parametrize(
    "score",
    [
        {"exact": [10, 20, 30, 40, 50, 60, 70]},
        {"right": [10, 20, 30, 40, 50, 60, 70]},
        {"f1": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]},
    ],
)
def test_while_format_or_content_rises_a_rising_loss_is_told_but_stops_nothing(score):
    seen = history(FALLING, [2.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5], **score)
    diagnosis = diagnose(seen)
    assert diagnosis.kind == "learning" and "validation loss +50% from its lowest" in diagnosis.text
    assert not should_stop(seen, 1)


def test_one_row_more_or_less_is_no_change():
    loss = [2.0, *[1.0] * 6]
    assert kind(loss, loss, exact=[50, 51, 50, 51, 50, 51, 50]) == "saturated"
    assert kind(loss, loss, f1=[0.5, 0.5, 0.509, 0.5, 0.509, 0.5, 0.509]) == "saturated"
    assert kind(loss, loss, exact=[50, 50, 50, 50, 50, 51, 52]) == "learning"


def test_more_rows_that_are_noise_are_no_change_and_more_right_rows_that_are_not_are_learning():
    loss, some = [2.0, *[1.0] * 6], (1 << 50) - 1
    noise = [some, *[some] * 4, some << 12 | 3, some << 12 | 7]  # 2 and 3 rows more, of 22 and 23 that differ
    assert [bits.bit_count() for bits in noise[-2:]] == [52, 53]
    assert kind(loss, loss, exact=noise) == kind(loss, loss, right=noise) == "saturated"
    assert (
        diagnose(history(loss, loss, right=[20, 20, 20, 20, 20, 21, 22])).text == "learning: joint/exact still improves"
    )


def test_small_gains_add_up():
    slow = [2.0 * 0.996**i for i in range(12)]
    assert all(diagnose(history(slow, slow)[:n]).kind == "learning" for n in range(5, 13))


def test_saturated_names_the_last_step_that_brought_something():
    diagnosis = diagnose(history(FALLING, [2.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9]))
    assert (diagnosis.kind, diagnosis.text) == (
        "saturated",
        "saturated: nothing improved since step 200, while train fell 50%",
    )
    assert diagnose(history([2.0, *[1.0] * 4], [2.0, *[1.0] * 4])).text == "saturated: nothing improved since step 100"


def test_a_loss_too_low_to_matter_is_not_compared():
    train = [0.05, 0.003, 0.001, 0.0005, 0.0003, 0.0002]
    assert kind(train, [0.05, 0.0030, 0.0020, 0.0025, 0.0026, 0.0026]) == "saturated"


def test_not_learning_and_too_early():
    flat = [2.0, 1.999, 2.001, 2.0, 1.998]
    assert diagnose(history(flat, flat)).text == "not learning: neither loss has fallen in 5 validations"
    assert [kind(flat[:n], flat[:n]) for n in (1, 2, 3, 4)] == ["too early"] * PATIENCE + ["not learning"]


def test_a_run_that_rises_on_validation_rows_from_the_start_is_overfitting():
    assert kind(FALLING[:4], [2.0, 2.2, 2.4, 2.6]) == "overfitting"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_diverged_until_it_is_finite_again(bad):
    diagnosis = diagnose(history([2.0, 1.0, bad, bad], [2.0, 1.0, bad, bad]))
    assert diagnosis.kind == "diverged"
    assert kind([bad], [bad]) == kind([2.0, 1.0], [2.0, bad]) == "diverged"
    assert kind([2.0, 1.0, bad, 0.8], [2.0, 1.0, bad, 0.8]) == "learning"


def test_training_rows_far_above_the_start_have_diverged_and_validation_rows_alone_have_not():
    assert kind([2.0, 1.5, 6.0, 7.0], [2.0, 1.5, 6.0, 7.0]) == "diverged"
    assert kind([2.0, 1.0, 0.1, 0.1, 0.05], [2.0, 3.0, 6.0, 6.5, 7.0]) == "overfitting"


def noisy(values, rng, share):
    return [value * (1 + rng.uniform(-share, share)) for value in values]


def test_noise_neither_hides_learning_nor_looks_like_overfitting():
    rng = random.Random(0)
    for _ in range(300):
        n = 20
        falling, level = [2.0 * 0.95**i for i in range(n)], [2.0] + [1.0] * (n - 1)
        learning = history(noisy(falling, rng, 0.03), noisy(falling, rng, 0.03))
        assert not any(should_stop(learning[:end], 2) for end in range(1, n + 1))
        flat = history(noisy(falling, rng, 0.03), noisy(level, rng, 0.02))
        assert all(diagnose(flat[:end]).kind != "overfitting" for end in range(1, n + 1))
        rising = [2.0, 1.0] + [1.0 + 0.05 * i for i in range(1, n - 1)]
        assert diagnose(history(noisy(falling, rng, 0.03), noisy(rising, rng, 0.03))).kind == "overfitting"


def test_noise_does_not_stop_a_format_that_rises():
    rng = random.Random(1)
    for _ in range(300):
        exact = [min(300, 100 + 4 * i + rng.randint(-4, 4)) for i in range(40)]
        exact[5] += 30  # a lucky validation that nothing beats for long
        seen = history([1.0] * 40, [1.0] * 40, exact=exact, rows=300)
        assert not any(should_stop(seen[:end], 3) for end in range(1, 41))


def test_early_stopping_waits_for_as_many_validations_as_asked_for():
    seen = history(FALLING, [2.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9])  # saturated at the sixth and the seventh
    assert [should_stop(seen, n) for n in (1, 2, 3)] == [True, True, False]
    assert not should_stop(seen[:1], 2)


# Real runs of the tiny random model


def run(
    base, folder, write, rows=8, lr=0.01, steps=240, interval=20, watched=True, patience=None, after=None, **options
):
    """Train on a few rows of random letters, validate on others; returns the trainer and the watch."""
    rng = random.Random(0)

    def some(first, count):
        return [
            pair(n, f"{n} {''.join(rng.choices('abcdefgh', k=12))}") | {"completion": _answer(rng)}
            for n in range(first, first + count)
        ]

    format = JsonSchema(schema=str(folder / "schema.json"))
    data = FormatDataModule(
        format=format, tokenizer=base, rows_per_step=8, train=write("train.jsonl", some(0, rows)),
        validation=write("validation.jsonl", some(1000, 24)), test=write("test.jsonl", some(2000, 4)),
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    module = FormatModule(
        base=base, format=format, lora=Lora(r=8, dropout=0.1, targets="all-linear"), max_new_tokens=24,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
    )  # fmt: skip
    watch = OverfittingWatch(patience) if watched else None
    trainer = L.Trainer(
        **{
            "max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
            "val_check_interval": interval, "check_val_every_n_epoch": None, "default_root_dir": folder, "callbacks": [watch] if watch else [],
        } | options
    )  # fmt: skip
    if after:
        after(trainer, module, data)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return trainer, module, watch


def _answer(rng):
    return json.dumps({"n": rng.randrange(1000), "s": "".join(rng.choices("abcdefgh", k=6))}, separators=(",", ":"))


@pytest.fixture(scope="module")
def teachable(tmp_path_factory) -> str:
    """The tiny model with weights so large that adapters alone can teach it something."""
    folder = tmp_path_factory.mktemp("teachable")
    tiny_model(initializer_range=0.3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(teachable, task):
    folder, write = task
    return lambda **options: run(teachable, folder, write, **options)


@pytest.mark.slow
def test_few_rows_and_a_high_rate_overfit_and_are_stopped(train):
    trainer, _, watch = train(patience=2, steps=400, lr=0.02, interval=40)
    assert diagnose(watch.history).kind == "overfitting"
    assert trainer.global_step == watch.history[-1].step < 400
    assert watch.history[0].step == 0 and watch.history[-1].val_loss - watch.history[-1].train_loss > 0.1


@pytest.mark.slow
def test_a_tiny_rate_does_not_learn(train):
    _, _, watch = train(lr=1e-7, steps=80)
    assert diagnose(watch.history).kind == "not learning"


@pytest.mark.slow
def test_many_rows_and_a_usual_rate_learn_and_are_not_stopped(train):
    trainer, _, watch = train(rows=200, lr=5e-3, steps=120, patience=1)
    assert diagnose(watch.history).kind == "learning" and trainer.global_step == 120
    assert [v.step for v in watch.history] == list(range(0, 121, 20))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_same_rows_have_the_same_loss_as_validation_rows_and_dropout_is_off(train, precision):
    def same_rows(trainer, module, data):
        data.prepare_data()
        data.trainer = trainer
        data.setup("fit")
        data.rows["validation"] = data.rows["train"]

    trainer, module, watch = train(steps=20, rows=24, after=same_rows, precision=precision)
    assert len(watch.history) == 2
    assert all(v.train_loss == pytest.approx(v.val_loss, abs=1e-12) for v in watch.history)
    assert float(trainer.callback_metrics["val/loss_gap"]) == pytest.approx(0.0, abs=1e-12)
    if precision == "32-true":
        nats, tokens = 0.0, 0
        module.eval()
        for row in trainer.datamodule.splits.rows["train"]:
            logits = plain(module)(torch.tensor([row.prompt_ids + row.target_ids])).logits[
                0, len(row.prompt_ids) - 1 : -1
            ]
            nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target_ids), reduction="sum"))
            tokens += len(row.target_ids)
        assert watch.history[-1].train_loss == pytest.approx(nats / tokens, abs=1e-5)


class Half(L.Callback):
    """Has two of three rows answered in a valid format, and half of these right."""

    def setup(self, trainer, pl_module, stage):
        def judge(row):
            text = ("no JSON", row.target, '{"n":-1,"s":""}')[row.number % 3]
            return outcome(row, text, pl_module.format.check(text, target=row.target), pl_module.format)

        pl_module._check = lambda rows, decoded: [(row.number, judge(row)) for row in rows]


@pytest.mark.slow
def test_a_limited_validation_records_the_rows_that_it_saw(train, monkeypatch):
    monkeypatch.setattr("formtune.data.datamodule.EVALUATION_ROWS", 8)
    for batches, valid in ((2, "0110110110110110"), (3, "011011011011011011011011")):
        _, module, watch = train(
            steps=20, limit_val_batches=batches, after=lambda trainer, *_: trainer.callbacks.append(Half())
        )
        for one in watch.history:
            assert (one.rows, f"{one.valid:0{one.rows}b}") == (len(valid), valid)
            assert f"{one.right:0{one.rows}b}" == "".join("010"[n % 3] for n in range(one.rows))
            assert [tuple(module.counts[name]) for name in ("format/exact", "joint/exact")] == [
                (one.exact, one.rows), (one.joint, one.rows)
            ]  # fmt: skip


def plain(module):
    return torch.no_grad()(module.model)


@contextlib.contextmanager
def random_states_stay():
    before = (torch.get_rng_state(), random.getstate())
    yield
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.slow
def test_the_sample_is_fixed_and_no_larger_than_what_is_validated_and_draws_nothing(train):
    def look(trainer, module, data):
        class Look(L.Callback):
            def on_validation_epoch_end(self, trainer, pl_module):
                with random_states_stay():
                    sample = trainer.datamodule.training_sample()
                    pl_module.teacher_forced_loss(sample)
                seen.append([row.number for row in sample])

        trainer.callbacks.append(Look())

    seen = []
    train(steps=20, rows=60, after=look)
    assert seen[0] == seen[1] == sorted(set(seen[0])) and len(seen[0]) == 24
    seen = []
    train(steps=20, rows=10, after=look)
    assert len(seen[0]) == 10


@pytest.mark.slow
def test_the_watch_does_not_change_what_is_trained(train):
    (_, watched, _), (_, alone, _) = train(steps=40), train(steps=40, watched=False)
    one, two = watched.state_dict(), alone.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# The command line


@pytest.fixture
def project(write_project):
    return write_project({"max_epochs": 2, "val_check_interval": 4}, {"r": 4, "dropout": 0.0}, {"rows_per_step": 5})


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[2]}:{os.environ['PYTHONPATH']}")
    half = "--trainer.callbacks+=test_overfitting.Half", "--baselines", "[]"
    assert main(["train", "-c", "small.yaml", "--run", "on1", *half]) == 0
    arguments = ["--run", "on2", *half, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "formtune", "train", "-c", "small.yaml", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (curves(project / f"logs/small/on{n}") for n in (1, 2))
    for name in ("train/eval_loss", "val/loss_gap"):
        assert [e.step for e in one.Scalars(name)] == [e.step for e in two.Scalars(name)]
        values = [[e.value for e in run.Scalars(name)] for run in (one, two)]
        assert len(values[0]) > 3 and values[0] == pytest.approx(values[1], abs=1e-5)
    assert one.Scalars("train/eval_loss")[0].step == 0
    lines = [
        json.loads((project / f"logs/small/on{n}/metrics.json").read_text())["training"]["diagnosis"] for n in (1, 2)
    ]
    assert lines[0] == lines[1]
    rows = [
        [(v["rows"], v["valid"], v["right"]) for v in checkpoint.read(path)["callbacks"]["OverfittingWatch"]["history"]]
        for path in (checkpoint.newest(project / f"logs/small/on{n}/checkpoints") for n in (1, 2))
    ]
    (count, valid, right), *others = rows[0]
    assert rows[0] == rows[1] and set(others) == {rows[0][0]}
    assert count > int(valid, 16).bit_count() > int(right, 16).bit_count() > 0


@pytest.mark.slow
def test_fit_prints_logs_and_writes_the_diagnosis_and_stops_only_if_asked_to(project, capsys):
    arguments = ["--model.optimizer.lr", "1e-9", "--trainer.max_epochs", "4", "--trainer.val_check_interval", "2"]
    assert main(["train", "-c", "small.yaml", "--run", "one", *arguments]) == 0
    result = json.loads(Path("logs/small/one/metrics.json").read_text())["training"]
    assert result["diagnosis"].startswith("not learning: neither loss has fallen")
    output = capsys.readouterr().out
    assert f"diagnosis: {result['diagnosis']}" in output and f"s; {result['best_reason']}\n" in output
    assert result["best_reason"].startswith(f"best checkpoint: step {result['best_step']} (0 of ")
    assert all(point["joint"] == 0 for point in result["history"])
    texts = curves(Path("logs/small/one")).Tensors("diagnosis/text_summary")
    shown = [event.tensor_proto.string_val[0].decode().partition("<code>")[2] for event in texts]
    assert [text.partition("&#58;")[0] for text in shown] == ["too early to tell", "not learning"]


def test_early_stopping_is_a_key_of_the_run_and_is_refused_below_one(project, capfd):
    assert main(["train", "-c", "small.yaml", "--overfitting.patience", "0"]) == 2
    assert "overfitting.patience" in capfd.readouterr().err


def test_without_a_validation_it_is_too_early():
    assert diagnose([]).kind == "too early" and "no validation was run" in reason([])


@pytest.mark.slow
def test_the_last_weights_are_validated_whatever_the_lower_limits(project):
    words = ["--trainer.max_steps", "3", "--trainer.min_epochs", "1", "--trainer.val_check_interval", "50"]
    assert main(["fit", "-c", "small.yaml", "--run", "one", *words]) == 0
    assert [path.stem for path in Path("logs/small/one/checkpoints").glob("step-3.ckpt")] == ["step-3"]
    [*_, last] = checkpoint.read(Path("logs/small/one/checkpoints/step-3.ckpt"))["callbacks"]["OverfittingWatch"][
        "history"
    ]
    assert last["step"] == 3
