"""fit, validate, test and predict: LightningCLI with the two classes of this project, and one folder per run."""

from __future__ import annotations

import logging
import os
import shlex
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from formtune.commands import COMMANDS
from formtune.commands.preflight import before_training
from formtune.configuration.parsing import OneLine
from formtune.configuration.trainer_checks import check_monitors, check_trainer, checked_precision, started_by_others
from formtune.data.datamodule import FormatDataModule
from formtune.errors import Fault, UserError, first_line
from formtune.evaluation.console import print_result
from formtune.files import LOGS, write_json, write_whole
from formtune.model import FormatModule
from formtune.model.fsdp import ShardedBase
from formtune.training import checkpoint_files
from formtune.training.adapter import export_adapter
from formtune.training.answers import AnswerFile, WorstAnswers
from formtune.training.checkpoints import Checkpoints
from formtune.training.data_table import DataTable
from formtune.training.evaluations import Baseline, Evaluations, results
from formtune.training.overfitting import OverfittingWatch
from formtune.training.progress_bar import ProgressBar
from formtune.training.run_folder import RunFolder, choose_run
from formtune.training.signals import Signals
from formtune.training.test_outcomes import Outcomes
from formtune.training.validations import Validations, reason

LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "Broken pipe")  # in messages


QUIET = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*args parameter is intended to run from within Python.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # what is logged was summed over all processes already
    ".*callbacks used to create the checkpoint need to be provided.*",  # by fit alone
)


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser with mistakes in one line, in which a file that a value names is never read as configuration.

    It would be: a file of rows that begins with `{"class_path": ...}` could name a class to import.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)  # a mistyped key could be the beginning of another

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})


class FormtuneCLI(LightningCLI):
    """Runs fit, validate, test and predict from one YAML per task, with overrides on the command line."""

    def __init__(self, args: list[str], signals: Signals) -> None:
        self._words, self.signals = args, signals
        super().__init__(
            FormatModule,
            FormatDataModule,
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
                "use_distributed_sampler": False,  # rows are dealt by the data module
            },
            parser_kwargs={
                "prog": "formtune",
                "description": "Fine-tune a language model so that its answers have exactly the declared format.",
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skip = {"model", "datamodule", "dataloaders", "weights_only"}
        return {
            "fit": {"model", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only", "ckpt_path"},
            "validate": skip | {"verbose"},
            "test": skip | {"verbose"},
            "predict": skip | {"return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", type=str | None, help="Name of the task's folder in logs/ (default: the YAML's)")
        parser.add_argument("--run", type=str | None, help="Name of the run's folder (default: the date and time)")
        parser.add_argument(
            "--early_stopping",
            type=PositiveInt | None,
            # Off: the schedule lowers the rate over all steps, and the best checkpoint is kept in any case.
            help="Stop fit after so many validations in a row that find it memorising or saturated (default: never)",
        )
        # Of fit alone, and known to all verbs: `test -c` takes a run's own configuration.
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on with --run, or with the task's last run, if it was interrupted and its configuration is this "
            "one; the result is the same as without the interruption. Else begin a run",
        )
        parser.add_argument(
            "--baselines",
            type=list[Baseline],
            default=["few_shot", "constrained"],
            help="What fit measures beside the plain base: few_shot, with training rows in its prompt; constrained, "
            "under the contract's grammar, and the tuned model too; [] measures neither",
        )
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("data.format", "model.format")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs["description"] = COMMANDS[subcommand].description
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--answers", type=str, default="answers.jsonl", help="File to write, as JSON Lines")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let values in a checkpoint, not yet checked, beat YAML and flags."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        sources = config.get("config") or []
        if config.task is None:
            config.task = Path(str(sources[0])).stem if sources else "task"
        for key in ("task", "run"):
            if {"..", "/"} & set(Path(config[key] or ".").parts):
                raise UserError(f"{key}: {config[key]} leads out of {LOGS}/; give it a name")
        trainer = config.trainer
        trainer.precision = checked_precision(trainer.precision, trainer.accelerator)
        check_trainer(config, str(self.subcommand))
        if config.get("ckpt_path") is not None:
            checkpoint_files.read(Path(config.ckpt_path))
        # Lightning starts further processes with this command line and environment: they must find the same folder.
        known = os.environ.get("FORMTUNE_RUN")
        if known is None and config.run is None and started_by_others():
            raise UserError("run: processes that torchrun or srun started must agree on a folder; name it by --run")
        if known is None and self.subcommand == "fit":
            config.run = choose_run(LOGS / config.task, config.run, config.resume, lambda: self._dump(config))
        config.run = known or config.run or time.strftime("%Y%m%d-%H%M%S")
        os.environ["FORMTUNE_RUN"] = config.run
        self.folder = RunFolder(LOGS / config.task / config.run)
        self.run_dir = self.folder.path
        trainer.default_root_dir = str(self.run_dir)
        self.checkpoint = checkpoint_files.newest(self.run_dir / "checkpoints") if self.subcommand == "fit" else None
        words = [*self._words, *([] if "--run" in self._words else ["--run", config.run]), "--resume"]
        self.signals.remedy = (
            f"go on with: {shlex.join(['formtune', *dict.fromkeys(words)])}" if self.subcommand == "fit" else ""
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config_init, "trainer")
        self.outcomes = Outcomes()
        callbacks: list[Any] = [DataTable(), WorstAnswers(), self.outcomes, self.signals]
        kwargs["plugins"] = [*(config.plugins or []), checkpoint_files.CheckpointFiles()]
        if SLURMEnvironment.detect():
            # Lightning's would save within a signal's handler, and take up such a file without being asked.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        if config.strategy == "fsdp":
            kwargs["strategy"] = ShardedBase()  # Lightning's would split the adapters too
        if self.subcommand == "fit":
            self.validations = Validations()  # before those that look at what it has recorded
            self.watch = OverfittingWatch(self.validations, self.config.fit.early_stopping)
            self.checkpoints = Checkpoints(self.signals, self.validations)
            callbacks += [self.validations, self.watch, self.checkpoints]
            if config.logger is None or config.logger is True:
                # What was written after the checkpoint is written again: the curves show it once.
                again = checkpoint_files.step(self.checkpoint) + 1 if self.checkpoint else None
                kwargs["logger"] = TensorBoardLogger(LOGS, self.config.fit.task, self.config.fit.run, purge_step=again)
        else:
            kwargs["logger"] = False
        if self.subcommand == "predict":
            callbacks.append(AnswerFile(self.config.predict.answers))
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        trainer = self._instantiate_trainer({**config, **kwargs}, callbacks)
        check_monitors(trainer, self.model.validation_names)
        return trainer

    def fit(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        """The whole job: base on the test rows, training, best checkpoint on the same rows, export."""
        try:
            self._fit(model, datamodule)
        finally:
            self.folder.release()

    def _fit(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        trainer: Any = self.trainer
        result: dict[str, Any] = {}
        writes = trainer.is_global_zero and not trainer.fast_dev_run
        if writes:
            self.folder.hold()
        evaluations = Evaluations(trainer, model, datamodule, self.outcomes, self.run_dir)
        for line in before_training(model.base, model.lora, model.quantize):
            rank_zero_only(print)(f"preflight: {line}")
        if writes and not self.folder.begun:
            write_whole(self.run_dir / "config.yaml", self._dump(self.config.fit))
        result |= evaluations.baselines(self.config.fit.baselines)
        if self.checkpoint is None:
            trainer.validate(model, datamodule, verbose=False)  # the curves begin at the base
        trainer.fit(model, datamodule, ckpt_path=self.checkpoint)
        steps, best, history = trainer.global_step, self.validations.best, self.validations.history
        why, lowest = reason(history), self.validations.lowest_loss
        if best is None and not trainer.fast_dev_run:
            raise UserError(f"{why}; lower model.optimizer.lr")
        if best is not None and not trainer.fast_dev_run:
            # Written before the last evaluation: whatever happens there, the adapter is safe.
            model.load_state_dict(
                checkpoint_files.read(self.run_dir / "checkpoints" / f"step-{best.step}.ckpt")["state_dict"]
            )
            if trainer.is_global_zero and not (self.run_dir / "adapter").exists():  # or it is there, and the same
                data = datamodule.splits.key if datamodule.splits else None
                export_adapter(model, self.run_dir / "adapter", self.run_dir / "config.yaml", data)
        evaluations.tuned(result)
        result["probe"] = evaluations.probe()
        result["rows"] = result["counts"]["after"]["format/exact"][1]
        result["data"] = datamodule.splits.key if datamodule.splits else None  # as in audit.json
        result["training"] = {
            "steps": steps,
            "seconds": round(self.checkpoints.elapsed(), 1),
            "skipped_steps": model.skipped,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "best_step": best.step if best else None,
            "best_reason": why,
            # On the validation rows, so that runs can be chosen among without a look at the test rows.
            "best": best.figures() | {"loss": best.val_loss} if best else None,
            "lowest_loss_step": lowest.step if lowest else None,
            "diagnosis": self.watch.diagnosis.text if self.watch.diagnosis else None,
            "history": [validation.figures() for validation in history],
        }
        if writes:
            evaluations.report(result)
            self._save_result(result)  # last: it says that the run is finished
            print_result(result, self.run_dir)

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test rows and print the figures."""
        self._evaluate("test", **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation rows and print the figures."""
        self._evaluate("validate", **kwargs)

    def _evaluate(self, verb: str, **kwargs: Any) -> None:
        getattr(self.trainer, verb)(verbose=False, **kwargs)
        values, counts = results(self.model)
        if self.trainer.is_global_zero:
            print_result({"result": values, "counts": {"result": counts}}, None)

    def predict(self, **kwargs: Any) -> None:
        """Answer the prompts and write the file."""
        self.trainer.predict(return_predictions=False, **kwargs)
        if self.trainer.is_global_zero:
            print(f"answers: {self.config.predict.answers}")

    def _dump(self, config: Namespace) -> str:
        """The configuration as YAML: a record to start another run from, and what a run that goes on is held to."""
        config = config.clone()
        config.pop("config", None)
        config.run, config.resume, config.trainer.default_root_dir = None, False, None
        return self._parser("fit").dump(config, skip_none=False)

    def _save_result(self, result: dict[str, Any]) -> None:
        if isinstance(self.trainer.logger, TensorBoardLogger):
            config = self.config.fit
            lora, data = config.model.lora, config.data
            parameters = {
                "base": config.model.base,
                "r": lora.r,
                "alpha": lora.alpha or 2 * lora.r,
                "dropout": lora.dropout,
                "targets": str(lora.targets),
                "optimizer": str(config.model.optimizer.as_dict()),
                "warmup": config.model.warmup,
                "rows_per_step": data.rows_per_step,
                "epochs": config.trainer.max_epochs,
                "precision": config.trainer.precision,
                "seed": config.seed_everything,
            }
            shown = ("format/exact", "joint/exact", "content/field_f1", "val/loss")
            final = {f"final/{name}": result["after"][name] for name in shown}
            self.trainer.logger.log_hyperparams(parameters, final)
            self.trainer.logger.save()
        write_json(self.run_dir / "metrics.json", result)


def run(command: str, args: list[str]) -> None:
    """Run a command line that begins with fit, validate, test or predict.

    Raises:
        UserError: A mistake of the user's, in one line.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # from calls inside libraries
    # Lightning's notes on hardware and on its other products; warnings still come through.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signals = Signals()
    signals.install()
    # TensorBoard's writer fails in a thread of its own, and once more, in order, in the one that writes next.
    threading.excepthook = lambda a: None if issubclass(a.exc_type, OSError) else threading.__excepthook__(a)
    try:
        FormtuneCLI([command, *args], signals)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.errno is None:
            raise
        name = error.filename.decode() if isinstance(error.filename, bytes) else error.filename or "a file"
        raise Fault(f"{name}: {error.strerror}; mend this and go on with --resume") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        time.sleep(1)  # the process that failed prints its own line, and first
        raise Fault(f"another process of this run ended, see its message ({first_line(error)[:80]})") from error
    finally:
        threading.excepthook = threading.__excepthook__
        signals.restore()
        os.environ.pop("FORMTUNE_RUN", None)  # the next call in this process is another run
