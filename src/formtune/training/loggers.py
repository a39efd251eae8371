"""The loggers that `--logger` names, each in the run's folder, and their tables."""

import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from formtune.errors import UserError
from formtune.files import LOGS, write_atomic

Name = Literal["tensorboard", "csv", "wandb", "mlflow"]
# The page "Custom Scalars" of TensorBoard; tags are regular expressions.
CHARTS = {
    "valid format": ["^format/exact$"],
    "right": ["^joint/exact$"],
    "loss": ["^train/loss$", "^train/eval_loss$", "^val/loss$"],
    "failures by kind": ["^fail/(?!ok$)"],
}


class OneEventFile(TensorBoardLogger):
    """TensorBoard in one file: Lightning would close it after each evaluation and start another."""

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()


class LazyMLflow(MLFlowLogger):
    """Opens its store when the first value is logged, so that a refused run leaves no files."""

    def __init__(self, task: str, run: str, folder: Path) -> None:
        server, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), (folder / "mlflow").resolve().as_uri()
        self._store = server or f"sqlite:///{folder / 'mlflow.db'}"
        # The address opens no connection.
        super().__init__(task, run, "http://127.0.0.1", artifact_location=None if server else artifacts)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if not self._initialized:
            self._tracking_uri, self._mlflow_client = self._store, type(self._mlflow_client)(self._store)
        return super().experiment


def make_loggers(names: Name | Sequence[Name], task: str, run: str, step: int | None) -> list[Logger]:
    """The loggers of a run; a resumed run logs from `step` on."""
    names = [names] if isinstance(names, str) else names
    for name in {"wandb", "mlflow"} & {*names}:
        if find_spec(name) is None:
            raise UserError(f"logger: {name} is not installed; pip install {name}")
    folder, wandb_id = LOGS / task / run, f"{task}-{run}".replace("/", "-")
    mode = os.environ.get("WANDB_MODE", "offline")
    makers: dict[Name, Callable[[], Logger]] = {
        # Values after the checkpoint are logged again, and TensorBoard shows them once.
        "tensorboard": lambda: OneEventFile(LOGS, task, run, purge_step=step),
        # A resumed run has another folder: Lightning deletes an existing file.
        "csv": lambda: CSVLogger(folder, "csv", "" if step is None else f"from-step-{step}"),
        "wandb": lambda: WandbLogger(run, folder, version=wandb_id, project=task, mode=mode),
        "mlflow": lambda: LazyMLflow(task, run, folder),
    }
    return [make() for name, make in makers.items() if name in names]


def save_config(trainer: Any, file: Path, configuration: str) -> None:
    """Write a new run's configuration, in YAML, to its file and to the loggers that compare runs by it."""
    write_atomic(file, configuration)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            charts = {title: ["Multiline", tags] for title, tags in CHARTS.items()}
            logger.experiment.add_custom_scalars({"headlines": charts})
        elif isinstance(logger, WandbLogger | MLFlowLogger):
            logger.log_hyperparams(yaml.safe_load(configuration))


def log_table(trainer: Any, tag: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Log a table to every logger that has tables."""
    step = trainer.global_step
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
            lines += [" | ".join(map(_cell, row)) for row in rows]
            logger.experiment.add_text(tag, "\n".join(f"| {line} |" for line in lines), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(tag, list(columns), [list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            table = {"step": [step] * len(rows)} | dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
            logger.experiment.log_table(logger.run_id, table, f"{tag}.json")


def _cell(text: str, limit: int = 400) -> str:
    text = text if len(text) <= limit else text[:limit] + " ..."
    # Markdown reads the punctuation within <code> too: the fence of an answer would swallow the cells after it.
    escaped = re.sub(r"[!-/:-@\[-`{-~]", lambda mark: f"&#{ord(mark[0])};", text)
    return "<code>" + escaped.replace("\n", "<br>") + "</code>"
