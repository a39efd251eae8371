"""The whole job of `formtune train`, in the order in which it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.files import write_json, write_whole
from formtune.model import FormatModule
from formtune.training import checkpoint_files
from formtune.training.adapter import export_adapter
from formtune.training.checkpoint import BestCheckpoint
from formtune.training.data_table import DataTable
from formtune.training.evaluator import Baseline, Evaluator
from formtune.training.overfitting import OverfittingWatch
from formtune.training.run_folder import RunFolder
from formtune.training.validations import Validations, reason


@dataclass(slots=True)
class Job:
    """A run of `formtune train`.

    Args:
        trainer: With the callbacks of the run.
        model: The model, its adapters still at zero.
        datamodule: The rows.
        folder: Where the run writes.
        config: Gives the configuration as YAML.
        baselines: What to measure beside the plain base.
        baseline_rows: Test rows that the baselines are measured on, at most.
        checkpoint: Checkpoint to resume from, None to begin.
        checks: Each returns lines to print, or refuses the run before it begins.
    """

    trainer: Any
    model: FormatModule
    datamodule: FormatDataModule
    folder: RunFolder
    config: Callable[[], str]
    baselines: Sequence[Baseline]
    baseline_rows: int
    checkpoint: Any
    checks: Sequence[Callable[[FormatModule], list[str]]] = ()


def train(job: Job) -> dict[str, Any] | None:
    """Measure the base, fit, test the best checkpoint, export the adapter and write the report.

    Returns:
        What `metrics.json` holds; None under `fast_dev_run`, which writes nothing.

    Raises:
        UserError: The rows must not be trained on, or no validation gave a finite loss.
    """
    trainer, model, datamodule, folder = job.trainer, job.model, job.datamodule, job.folder
    writes = trainer.is_global_zero and not trainer.fast_dev_run
    if writes:
        folder.hold()

    # Rows, and checks that need no training
    datamodule.trainer = trainer
    datamodule.prepare_data()
    callback(trainer, DataTable).show(trainer, datamodule)
    evaluator = Evaluator(trainer, model, datamodule, folder.path)
    for check in job.checks:
        for line in check(model):
            rank_zero_only(print)(f"preflight: {line}")
    if writes and not folder.begun:
        write_whole(folder.path / "config.yaml", job.config())

    # What prompting reaches
    result = evaluator.baselines(job.baselines, job.baseline_rows)

    # Training; the curves start at the untuned base
    if job.checkpoint is None:
        trainer.validate(model, datamodule, verbose=False)
    trainer.fit(model, datamodule, ckpt_path=job.checkpoint)
    steps = trainer.global_step
    if trainer.fast_dev_run:
        return None

    # The best checkpoint and its adapter, which is safe before anything else can fail
    validations, best = callback(trainer, Validations), callback(trainer, BestCheckpoint)
    if not best.best_model_path:
        raise UserError(f"{reason(validations.history)}; lower model.optimizer.lr")
    model.load_state_dict(checkpoint_files.read(Path(best.best_model_path))["state_dict"])
    data = datamodule.splits.key if datamodule.splits else None
    if trainer.is_global_zero and not (folder.path / "adapter").exists():
        export_adapter(model, folder.path / "adapter", folder.path / "config.yaml", data)

    # The tuned model on the test rows, and on longer inputs
    evaluator.tuned(result)
    result["probe"] = evaluator.probe()
    result["rows"] = result["counts"]["after"]["format/exact"][1]
    result["data"] = data  # as in audit.json
    diagnosis = callback(trainer, OverfittingWatch).diagnosis
    result["training"] = {
        "steps": steps,
        "seconds": round(best.elapsed(), 1),
        "skipped_steps": model.guard.skipped,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **validations.summary(),
        **best.summary(),
        "diagnosis": diagnosis.text if diagnosis else None,
    }
    if writes:
        evaluator.report(result)
    return result


def finish(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write `metrics.json`, last of all: it says that the run is finished."""
    write_json(folder.path / "metrics.json", result)


def callback(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a class."""
    return next(one for one in trainer.callbacks if type(one) is kind)
