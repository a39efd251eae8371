"""LightningCLI with one folder per run."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from formtune.base.renderer import today
from formtune.commands import COMMANDS
from formtune.commands.lightning_classes import Parser, Trainer
from formtune.configuration.trainer_checks import (
    check_callbacks,
    check_processes,
    check_trainer,
    checked_precision,
    started_by_others,
)
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.evaluation.console import print_result
from formtune.files import LOGS, write_whole
from formtune.model import FormatModule
from formtune.model.fsdp import ShardedBase
from formtune.training import callback, checkpoint_files
from formtune.training.answers import AnswerFile, AnswerTable, Outcomes
from formtune.training.checkpoint import BestCheckpoint
from formtune.training.evaluator import Baseline, results
from formtune.training.overfitting import OverfittingWatch
from formtune.training.pipeline import prepare, train
from formtune.training.run_folder import RunFolder, choose_run, measured_run
from formtune.training.signals import Signals
from formtune.training.throughput import Throughput
from formtune.training.validations import Validations, reason

TRAINS = ("train", "fit")
UNTUNED = "untuned base"
QUICK_ROWS = 50  # validation and test rows of `train --quick`


class FormtuneCLI(LightningCLI):
    """Runs the Lightning commands from one YAML per task, with overrides on the command line."""

    def __init__(self, args: list[str], signals: Signals) -> None:
        self._words, self.signals = args, signals
        super().__init__(
            FormatModule,
            FormatDataModule,
            trainer_class=Trainer,
            args=args,
            parser_class=Parser,
            save_config_callback=None,  # written here, once, beside the run
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": 3,
                "log_every_n_steps": 10,
                "val_check_interval": 100,
                "check_val_every_n_epoch": None,  # count optimizer steps, not epochs
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,  # the evaluation before training checks more
                "use_distributed_sampler": False,  # the data module gives each process its share
            },
            parser_kwargs={"prog": "formtune"},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        data = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {
            "train": data,
            "fit": data | {"ckpt_path"},  # --resume finds the newest checkpoint and checks the configuration
            "validate": data | {"verbose"},
            "test": data | {"verbose"},
            "predict": data | {"return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(OverfittingWatch, "overfitting")
        parser.add_lightning_class_args(AnswerTable, "answer_table")
        parser.add_argument("--task", type=str | None, help="Name of the task's folder in logs/ (default: the YAML's)")
        parser.add_argument("--run", type=str | None, help="Name of the run's folder (default: the date and time)")
        # For train and fit; every command knows them, since `test -c` takes a run's own configuration.
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Continue --run, or the task's last run, if it was interrupted and has this configuration; the result "
            "is the same as without the interruption. Otherwise begin a run",
        )
        parser.add_argument(
            "--baselines",
            type=list[Baseline],
            default=["few_shot", "constrained"],
            help="What train measures beside the plain base: few_shot, with training rows in the prompt; constrained, "
            "with constrained decoding, and the tuned model too; [] measures neither",
        )
        parser.add_argument(
            "--baseline_rows",
            type=PositiveInt,
            default=200,
            help="Test rows that the baselines are measured on, at most; a sample that is the same in every run",
        )
        parser.add_argument(
            "--quick",
            action="store_true",
            help=f"A first look: train without baselines, on at most {QUICK_ROWS} validation and test rows",
        )
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("data.format", "model.format")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs["description"] = COMMANDS[subcommand].description
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = (
                    "Weights to measure: best, the best checkpoint of the run that -c RUN/config.yaml or --run names "
                    "(the default with a run); last, its newest one; base, the untuned base (the default without a "
                    "run); or a checkpoint's file"
                )
        if subcommand == "predict":
            parser.add_argument("--answers", type=str, default="answers.jsonl", help="File to write, JSON Lines")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let values in a checkpoint, not yet checked, override YAML and flags."""

    def before_instantiate_classes(self) -> None:
        config, command = self.config[self.subcommand], str(self.subcommand)
        sources = config.get("config") or []
        if config.task is None:
            config.task = Path(str(sources[0])).stem if sources else "task"
        for key in ("task", "run"):
            if {"..", "/"} & set(Path(config[key] or ".").parts):
                raise UserError(f"{key}: {config[key]} leads out of {LOGS}/; give it a name")
        if config.quick:
            config.baselines, config.data.max_evaluation_rows = [], QUICK_ROWS
        config.trainer.precision = checked_precision(config.trainer.precision, config.trainer.accelerator)
        check_trainer(config, "fit" if command == "train" else command)
        if command not in TRAINS:
            self._choose_checkpoint(config)
        self._choose_folder(config, command)

    def _choose_folder(self, config: Namespace, command: str) -> None:
        """The run's folder; processes that Lightning starts with this command line and environment find the same."""
        known = os.environ.get("FORMTUNE_RUN")
        if known is None and config.run is None and started_by_others():
            raise UserError("run: processes that torchrun or srun started must agree on a folder; name it by --run")
        if known is None and command in TRAINS:
            config.run = choose_run(LOGS / config.task, config.run, config.resume, lambda: self._dump(config))
        config.run = known or config.run or time.strftime("%Y%m%d-%H%M%S")
        os.environ["FORMTUNE_RUN"] = config.run
        self.folder = RunFolder(LOGS / config.task / config.run)
        config.trainer.default_root_dir = str(self.folder.path)
        self.checkpoint, self.signals.remedy = None, ""
        if command in TRAINS:
            # Of the run's first day, and at midnight that of the process which starts the others.
            config.data.date = config.data.date or self.folder.date or os.environ.get("FORMTUNE_DATE") or today()
            os.environ["FORMTUNE_DATE"] = config.data.date
            self.checkpoint = checkpoint_files.newest(self.folder.path / "checkpoints")
            words = [*self._words, *([] if "--run" in self._words else ["--run", config.run]), "--resume"]
            self.signals.remedy = f"continue with: {shlex.join(['formtune', *dict.fromkeys(words)])}"

    def _choose_checkpoint(self, config: Namespace) -> None:
        """Name what is measured, a checkpoint or the untuned base, and take the date of its run."""
        named = LOGS / config.task / config.run if config.run else None
        run = measured_run([Path(str(path)) for path in config.get("config") or []], named)
        chosen = checkpoint_files.choose(config.ckpt_path, run)
        self.measured = str(chosen or UNTUNED)
        best = ", the run's best checkpoint" if chosen and config.ckpt_path in (None, "best") else ""
        rank_zero_only(print)(f"measuring: {self.measured}{best}", flush=True)
        if chosen is not None:
            config.data.date = config.data.date or RunFolder(chosen.parent.parent).date
        config.ckpt_path = chosen and str(chosen)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config_init, "trainer")
        checkpoint, overfitting, answers = (
            self._get(self.config_init, group) for group in ("checkpoint", "overfitting", "answer_table")
        )
        # The recorder comes before those that look at what it recorded, and formtune's checkpoints before a user's own,
        # so that `trainer.checkpoint_callback` and `ckpt_path="best"` mean them.
        callbacks: list[Any] = [answers, Outcomes(), self.signals]
        kwargs["plugins"] = [*(config.plugins or []), checkpoint_files.CheckpointFiles()]
        if SLURMEnvironment.detect():
            # Lightning's would save within a signal's handler, and load such a file without being asked.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        if config.strategy == "fsdp":
            kwargs["strategy"] = ShardedBase()  # Lightning's would shard the adapters too
        if self.subcommand in TRAINS:
            callbacks += [Validations(), overfitting, checkpoint, Throughput()]
            if config.logger is None or config.logger is True:
                # What was written after the checkpoint is written again: the curves show it once.
                again = checkpoint_files.step(self.checkpoint) + 1 if self.checkpoint else None
                command = self.config[self.subcommand]
                kwargs["logger"] = TensorBoardLogger(LOGS, command.task, command.run, purge_step=again)
        else:
            kwargs["logger"] = False
        if self.subcommand == "predict":
            untuned = self.measured if self.config.predict.ckpt_path is None else None
            callbacks.append(AnswerFile(self.config.predict.answers, untuned))
        if config.enable_progress_bar is not False:
            callbacks.append(TQDMProgressBar(refresh_rate=int(sys.stdout.isatty())))  # 0: none is drawn into a file
        callbacks += config.callbacks or []
        trainer = self.trainer_class(**{**config, **kwargs, "callbacks": callbacks})
        check_processes(trainer)
        check_callbacks(trainer, self.model.scores.names)
        return trainer

    def train(self, **kwargs: Any) -> None:
        """The whole job."""
        config = self.config.train
        try:
            result = train(
                self.trainer,
                self.model,
                self.datamodule,
                self.folder,
                self._recorded,
                config.baselines,
                config.baseline_rows,
                self.checkpoint,
                _checks(),
            )
            if result and self.trainer.is_global_zero:
                print_result(result, self.folder.path)
        finally:
            self.folder.release()

    def fit(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        """Lightning's fit in the run's folder."""
        trainer: Any = self.trainer
        try:
            if trainer.is_global_zero and not trainer.fast_dev_run:
                self.folder.hold()
            prepare(trainer, datamodule)
            if trainer.is_global_zero and not trainer.fast_dev_run and not self.folder.begun:
                write_whole(self.folder.path / "config.yaml", self._recorded())
            self.trainer.fit(model, datamodule, ckpt_path=self.checkpoint)
        finally:
            self.folder.release()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            print(f"{reason(callback(self.trainer, Validations).history)}\nrun: {self.folder.path}")

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the rows, those of validation for `validate`, and print the figures."""
        command = str(self.subcommand)
        prepare(self.trainer, self.datamodule)
        getattr(self.trainer, command)(verbose=False, **kwargs)
        values, counts = results(self.model)
        if self.trainer.is_global_zero:
            result = {"result": values, "counts": {"result": counts}, "rows": counts["format/exact"][1]}
            print_result(result, None, "validation" if command == "validate" else "test", self.measured)

    validate = test

    def predict(self, **kwargs: Any) -> None:
        """Answer the prompts and write the file."""
        prepare(self.trainer, self.datamodule, "predict")
        self.trainer.predict(return_predictions=False, **kwargs)
        if self.trainer.is_global_zero:
            print(f"answers of {self.measured}: {self.config.predict.answers}")

    def _recorded(self) -> str:
        """The configuration as YAML, with the date that the chat template writes."""
        config = self.config[self.subcommand]
        config.data.date = self.datamodule.settings.date
        return self._dump(config)

    def _dump(self, config: Namespace) -> str:
        """The configuration as YAML: a record to start another run from, and what a resumed run is compared with."""
        config = config.clone()
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        config.run, config.resume, config.trainer.default_root_dir = None, False, None
        return self._parser(self.subcommand).dump(config, skip_none=False)


def _checks() -> list[Any]:
    """Checks before training that optional rooms bring: what could not be merged or served is refused now."""
    try:
        rules = importlib.import_module("formtune.export.rules")
    except ModuleNotFoundError:
        return []
    return [lambda model: rules.before_training(model.base, model.lora, model.quantize)]
