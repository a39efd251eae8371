"""The stages of `formtune train`, in the order in which they run."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from formtune.data.datamodule import FormatDataModule
from formtune.data.encoded import FEW_ROWS
from formtune.data.table import print_data
from formtune.errors import UserError
from formtune.files import optional, write_json
from formtune.model import FormatModule
from formtune.training import callback
from formtune.training.callbacks import OverfittingWatch
from formtune.training.checkpoint import BestCheckpoint, read
from formtune.training.diagnosis import diagnose
from formtune.training.evaluator import Baseline, Evaluator
from formtune.training.loggers import save_config
from formtune.training.run_folder import RunFolder
from formtune.training.validations import best, reason


def train(
    trainer: Any,  # with the callbacks of the run
    model: FormatModule,
    datamodule: FormatDataModule,
    folder: RunFolder,
    config: Callable[[], str],  # returns the configuration as YAML
    baselines: Sequence[Baseline] | None,  # what to measure besides the zero-shot base; None only fits
    baseline_rows: int,  # test rows that the baselines are measured on, at most
    checkpoint: Path | None,  # to resume from
    without_quick: dict[str, Any],  # the keys that --quick changes, with their values before; else empty
    next_step: Callable[..., str] | None = None,  # what to do after the run, in one line
    report: Callable[[Evaluator], None] | None = None,  # writes the report, from all measurements
) -> dict[str, Any] | None:
    """Measure the base, fit, test the best checkpoint, write its adapter.

    Returns the content of `metrics.json`; None for `fit` and under `fast_dev_run`, which writes nothing.
    """
    # Rows
    prepare(trainer, datamodule)
    writes = trainer.is_global_zero and not trainer.fast_dev_run
    if writes and not folder.begun:
        save_config(trainer, folder.path / "config.yaml", config())
    if baselines is None:
        _fit(trainer, model, datamodule, checkpoint)
        return None
    evaluator = Evaluator(trainer, model, datamodule, folder.path)

    # Prompting baselines
    began = time.monotonic()
    evaluator.baselines(baselines, baseline_rows)

    # Training; the curves start at the untuned base, or the adapter
    if checkpoint is None and not without_quick:
        trainer.validate(model, datamodule, verbose=False)
    before = time.monotonic() - began
    _fit(trainer, model, datamodule, checkpoint)
    steps, fitted = trainer.global_step, time.monotonic()
    if trainer.fast_dev_run:
        return None

    # The best checkpoint; its adapter is written before the test
    history, checkpoints = callback(trainer, OverfittingWatch).history, callback(trainer, BestCheckpoint)
    chosen, advice = best(history), next_step(history, trainer, "train", without_quick) if next_step else ""
    if chosen is None:
        raise UserError(f"{reason(history)}; {advice}".removesuffix("; "))
    model.load_state_dict(read(Path(checkpoints.best_model_path))["state_dict"])
    adapter = {"path": model.adapter.name, "sha256": model.adapter.hash} if model.adapter else None
    origin = {"adapter": adapter, "weights": evaluator.splits.weights}
    if writes and not (folder.path / "adapter").exists():
        export_adapter(model, folder.path / "adapter", folder.path / "config.yaml", evaluator.splits.key, origin)

    # The tuned model on the test rows, and on longer inputs
    evaluator.tuned()
    result = evaluator.result
    result["probe"] = [] if without_quick else evaluator.probe()
    result["rows"] = result["counts"]["after"]["format/exact"][1]
    result["data"] = evaluator.splits.key  # as in audit.json
    result["training"] = origin | {
        "steps": steps,
        "seconds": round(checkpoints.seconds, 1),
        "skipped_steps": model.skipped,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "best_step": chosen.step,
        "best_reason": reason(history),
        "best": chosen.to_dict() | {"loss": chosen.val_loss},
        "history": [validation.to_dict() for validation in history],
        "diagnosis": diagnose(history).text,
        "next": advice,
    }
    minutes = {"training": checkpoints.seconds, "baselines": before, "test": time.monotonic() - fitted}
    took = {"steps": steps, "peak memory, GiB": peak_memory()} | {f"{k}, min": s / 60 for k, s in minutes.items()}
    if writes:
        if estimated := optional("start.plan", "estimated"):
            result |= estimated(config(), evaluator.splits.key, took)
        if report:
            report(evaluator)
        write_json(folder.path / "metrics.json", result)  # last of all: it says that the run is finished
    return result


def _fit(trainer: Any, model: FormatModule, datamodule: FormatDataModule, checkpoint: Path | None) -> None:
    """Fit, and say what ended it early."""
    trainer.fit(model, datamodule, ckpt_path=checkpoint)
    enders = [type(one).__name__ for one in trainer.callbacks if isinstance(one, EarlyStopping | Timer)]
    if enders and trainer.global_step < trainer.estimated_stepping_batches and trainer.is_global_zero:
        print(f"stopped at step {trainer.global_step} of {trainer.estimated_stepping_batches}: {' or '.join(enders)}")
    if trainer.fast_dev_run and trainer.is_global_zero:
        print("fast_dev_run: nothing was written")


def prepare(trainer: Any, datamodule: FormatDataModule, stage: str = "fit") -> None:
    """Prepare the rows, and describe them before anything slow starts."""
    datamodule.trainer, trainer.datamodule = trainer, datamodule  # before Lightning does it: baselines need the rows
    datamodule.setup(stage)
    if not trainer.is_global_zero:
        return
    splits, settings = datamodule.splits, datamodule.settings
    listed = trainer.loggers and not trainer.fast_dev_run
    print_data(settings, splits, Path(trainer.default_root_dir) if listed else None)
    count = len(splits.rows.get("train", ())) if splits else 0
    if 0 < count < FEW_ROWS:
        print(f"few rows: {count} to train on; a task needs at least {FEW_ROWS} (see formtune audit)")
    if splits and settings.date:
        print(f"the chat template writes the date: {settings.date} in this run; a server writes the current date")


def peak_memory() -> float:
    """Peak GiB of this process so far, on its GPU if it has one."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return (on_gpu or unit * getrusage(RUSAGE_SELF).ru_maxrss) / 2**30


def export_adapter(module: FormatModule, folder: Path, config: Path, data: str | None, origin: dict[str, Any]) -> None:
    """Write a folder that PEFT alone loads, with tokenizer, format and configuration, in one rename."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    # False: PEFT would otherwise ask a hub whether the base's vocabulary was resized.
    module.model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    module.renderer.tokenizer.save_pretrained(partial)
    write_json(partial / "format.json", module.format.to_dict())
    shutil.copyfile(config, partial / "config.yaml")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    if write_manifest := optional("export.manifest", "write_manifest"):
        write_manifest(partial, "adapter", module.base, data, training=origin)
    partial.replace(folder)
