"""Callbacks for answers, overfitting, signals and progress."""

import math
import os
import signal
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf

from formtune.errors import Stopped
from formtune.evaluation.metrics import ratios
from formtune.evaluation.outcomes import worst_first
from formtune.model.ranks import max_over_ranks
from formtune.training.diagnosis import diagnose, should_stop
from formtune.training.loggers import log_table
from formtune.training.validations import Validation

# Ctrl-C, kill, a batch system (SLURM can announce a preemption by SIGUSR1), and a closed terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PRINTED = ("val/loss", "format/exact", "joint/exact", "content/field_f1")
PRINTED_STEPS = 50  # between two lines of progress in a file


class AnswerTable(Callback):
    """Logs a table of the worst answers of each evaluation beside their targets.

    Args:
        rows: Maximum number of answers; invalid formats come first.
    """

    def __init__(self, rows: NonNegativeInt = 12) -> None:
        self.rows = rows

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.logged and self.rows:
            failed = worst_first(pl_module.outcomes)[: self.rows]
            rows = [(f"{one.kind}: {one.detail}", one.input, one.target, one.answer) for one in failed]
            tag = "answers/test" if trainer.testing else "answers/validation"
            nothing = [("every answer is right", "", "", "")]
            log_table(trainer, tag, ("why", "input", "target", "answer"), rows or nothing)

    on_test_end = on_validation_end


class OverfittingWatch(Callback):
    """Measures a sample of training rows in each validation, and diagnoses the history of both losses.

    The loss of a step is not comparable with the validation loss: it has dropout, other rows and older weights. The
    cost is a forward pass over as many rows as validation has; nothing is decoded.

    Args:
        patience: Validations in a row that find overfitting or saturation before training stops; None: never.
    """

    def __init__(self, patience: PositiveInt | None = None) -> None:
        self.patience = patience
        self.history: list[Validation] = []  # the same on all processes

    def state_dict(self) -> dict[str, Any]:
        # As strings: safe loading accepts no integers of more than 255 bytes.
        return {"history": [asdict(v) | {"valid": f"{v.valid:x}", "right": f"{v.right:x}"} for v in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [
            Validation(**record | {name: int(record[name], 16) for name in ("valid", "right")})
            for record in state_dict["history"]
        ]

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Not in a later hook: the model is still in evaluation mode, and its metrics are not yet reset.
        if not trainer.sanity_checking:
            loss = pl_module.teacher_forced_loss(trainer.datamodule.training_sample())
            gap = ratios(pl_module.scores.losses.compute())["val/loss"] - loss
            pl_module.log_dict({"train/eval_loss": loss, "val/loss_gap": gap}, batch_size=1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        outcomes, metrics, history = pl_module.outcomes, trainer.callback_metrics, self.history
        # The same rows each time, in the order of the file, for any number of processes.
        bits = ("".join("01"[getattr(one, name)] for one in outcomes) for name in ("exact", "joint"))
        valid, right = (int(row_bits or "0", 2) for row_bits in bits)
        names = ("train/eval_loss", "val/loss", "content/field_f1")
        train, loss, f1 = (float(metrics.get(name, math.nan)) for name in names)
        history.append(Validation(trainer.global_step, train, loss, f1, len(outcomes), valid, right))
        now = diagnose(history)
        if len(history) == 1 or diagnose(history[:-1]).kind != now.kind:
            log_table(trainer, "diagnosis", ("diagnosis",), [(now.text,)])
        if trainer.state.fn != "fit":
            return
        printed = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in PRINTED)
        lines = [f"step {trainer.global_step}  {printed}"]
        if self.patience and should_stop(history, self.patience):
            trainer.should_stop = True
            lines.append(f"stopped at step {trainer.global_step}: {now.text}")
        if trainer.is_global_zero:
            pl_module.print("\n".join(lines))  # above the progress bar
            print(end="", flush=True)


class Signals(Callback):
    """Stops a run on a signal: in training after the step, which is saved; else, or at a second Ctrl-C, at once."""

    def __init__(self) -> None:
        self.remedy = ""  # how to continue, for the last line
        self.number = 0
        self._in_loop = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers, except for ignored signals (`nohup`)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before.setdefault(number, signal.signal(number, self._note))

    def restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: Any) -> None:
        if not self._in_loop:
            self.number = number  # for the next poll, if the exception is swallowed where it is raised
            raise Stopped(number, self.remedy)
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number

    def _poll(self, trainer: Any, *_: Any, **__: Any) -> None:
        [number] = max_over_ranks(trainer, self.number)
        if number:
            raise Stopped(int(number), self.remedy)

    def _end(self, *_: Any, **__: Any) -> None:
        self._in_loop = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.install()  # again: Lightning has just replaced them
        self._in_loop = True

    # An evaluation has nothing to save and its batches can take minutes, so a single process stops at once.
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.install()
        self._in_loop = trainer.world_size > 1

    on_test_start = on_predict_start = on_validation_start

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _poll

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._in_loop = trainer.state.fn == "fit"

    on_train_end = on_test_end = on_predict_end = on_exception = _end


class StepsBar(TQDMProgressBar):
    """One line: steps, rows, training loss, and the time left at the mean speed so far, validations included.

    If the output is not a terminal, a line is printed every 50 steps.
    """

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} rows |{bar}| {elapsed}"

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.total = convert_inf(self.trainer.estimated_stepping_batches)
        bar.initial = bar.n = self.trainer.global_step
        clock = "left={remaining}" if bar.total else "{elapsed}"
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} steps{postfix}, " + clock + " |{bar}|"
        return bar

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_start(trainer, *_)
        self._started = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        super().on_train_batch_end(trainer, pl_module, outputs, batch, step - 1)
        if self.is_disabled and trainer.is_global_zero and step % PRINTED_STEPS == 0 and step < total:
            started, first = self._started
            parts = [f"step {step}", f"train/loss {self.get_metrics(trainer, pl_module)['loss']}"]
            if total < math.inf:  # no time limit alone
                left = timedelta(seconds=round((time.monotonic() - started) / (step - first) * (total - step)))
                parts = [f"{parts[0]} of {total}", parts[1], f"{left} left"]
            print("  ".join(parts), flush=True)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        if trainer.sanity_checking:
            return {}
        loader = trainer.train_dataloader
        rows = trainer.current_epoch * _rows(loader, trainer.num_training_batches)
        rows += _rows(loader, trainer.fit_loop.batch_idx + 1)
        return {"rows": f"{rows:,}", "loss": f"{float(trainer.callback_metrics.get('train/loss', math.nan)):.4f}"}

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        stage = "test" if trainer.testing else "predict" if trainer.predicting else "val"
        bar, loader = getattr(self, f"{stage}_progress_bar"), getattr(trainer, f"{stage}_dataloaders")
        bar.total, bar.n = _rows(loader, getattr(trainer, f"num_{stage}_batches")[0]), _rows(loader, batch_idx)
        bar.refresh()

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.on_validation_batch_start(trainer, args[0], args[2], args[3] + 1)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]


def _rows(loader: Any, batches: int) -> int:
    return min(len(loader.dataset), batches * loader.batch_sampler.batch_size)
