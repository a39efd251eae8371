"""LightningCLI with one folder per run."""

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import ClosedUnitInterval, OpenUnitInterval, PositiveInt
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from formtune.base.renderer import today
from formtune.commands import COMMANDS
from formtune.configuration import trainer_checks
from formtune.configuration.yaml_file import LINES
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.evaluation.console import print_result
from formtune.evaluation.outcomes import write_answers
from formtune.files import LOGS, leaves_folder, optional
from formtune.model import FormatModule
from formtune.model.ranks import ShardedBase
from formtune.training import callback
from formtune.training.callbacks import AnswerTable, OverfittingWatch, Signals, StepsBar
from formtune.training.checkpoint import BestCheckpoint, CheckpointFiles, choose, newest
from formtune.training.diagnosis import diagnose
from formtune.training.evaluator import Baseline
from formtune.training.loggers import Name, make_loggers
from formtune.training.pipeline import prepare, train
from formtune.training.run_folder import RunFolder, choose_run, measured_run, minimum_confidence
from formtune.training.validations import reason

TRAINS = ("train", "fit")
QUICK_ROWS = 50  # validation and test rows of `train --quick`

# The default of a `str` argument can be a string enum, such as that of Lightning's Timer.
yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)


class Trainer(L.Trainer):
    train = L.Trainer.fit  # LightningCLI looks for a method with the name of each command


class FormtuneCLI(LightningCLI):
    """Runs the Lightning commands from one YAML per task, with overrides on the command line."""

    def __init__(self, args: list[str], signals: Signals) -> None:
        self.argv, self.signals = args, signals
        full_keys = {"allow_abbrev": False}  # a mistyped key could be an abbreviation of another
        command, description = args[0], COMMANDS[args[0]].description
        super().__init__(
            FormatModule,
            FormatDataModule,
            trainer_class=Trainer,
            args=args,
            parser_class=trainer_checks.Parser,
            parser_kwargs={"prog": "formtune", **full_keys, command: {"description": description, **full_keys}},
            save_config_callback=None,  # written once, in the run's folder
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
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that is called: a parser takes about 0.1 seconds to build."""
        loaders = {"datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        return {self.argv[0]: loaders | {"model", "ckpt_path", "weights_only", "verbose", "return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(OverfittingWatch, "overfitting")
        parser.add_lightning_class_args(AnswerTable, "answer_table")
        # Every command knows all of these, since `test -c` takes a run's own configuration.
        parser.add_argument("--task", type=str | None, help="Folder in logs/ (default: the YAML's name)")
        parser.add_argument("--run", type=str | None, help="Folder in logs/TASK/ (default: the date and time)")
        parser.add_argument("--resume", action="store_true", help="Continue --run, or the task's last run, if it was "
                            "interrupted and has this configuration; otherwise start a new run")  # fmt: skip
        parser.add_argument("--logger", type=Name | list[Name], default="tensorboard", help="One logger or a list, in "
                            "the run's folder; for a class or false set trainer.logger")  # fmt: skip
        parser.add_argument("--baselines", type=list[Baseline], default=["few_shot", "constrained"], help="Baselines "
                            "that train measures besides the zero-shot base; [] for none")  # fmt: skip
        parser.add_argument("--baseline_rows", type=PositiveInt, default=200, help="Maximum test rows for baselines")
        parser.add_argument("--quick", action="store_true", help="A quick first run: only the zero-shot "
                            "baseline, few evaluation rows, no test on longer inputs")  # fmt: skip
        parser.add_argument("--dry_run", action="store_true", help="Print steps, time and memory; do not train")
        parser.add_argument("--answers", type=str, default="answers.jsonl", help="JSON Lines file that predict writes")
        parser.add_argument("--min_confidence", type=ClosedUnitInterval | None, help="predict writes answers of at "
                            "least this confidence to answers.accepted.jsonl, the others to answers.review.jsonl "
                            "(named after --answers)")  # fmt: skip
        parser.add_argument("--target_precision", type=OpenUnitInterval | None, help="Choose --min_confidence so that "
                            "this fraction of the accepted validation answers is right")  # fmt: skip
        parser.add_argument("--ckpt_path", type=str | None, help="Weights to evaluate: best (default with a run), "
                            "last, base (the untuned base, default without a run), or a checkpoint file")  # fmt: skip
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.chat_template", "data.chat_template")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("data.format", "model.format")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: values in an unchecked checkpoint would override YAML and flags."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        files = [Path(str(file)) for file in config.get("config") or []]
        config.task = config.task or (files[-1].stem if files else "task")
        for key in ("task", "run"):
            if leaves_folder(config[key] or "."):
                raise UserError(f"{key}: {config[key]} is a path; give a name")
        self.without_quick: dict[str, Any] = {}  # the keys that --quick changes, with their values before
        if config.quick:
            most = config.data.max_evaluation_rows
            self.without_quick = {
                "baselines": f"[{','.join(config.baselines)}]",
                "data.max_evaluation_rows": most or "null",
            }
            config.baselines, config.data.max_evaluation_rows = [], min(most or QUICK_ROWS, QUICK_ROWS)
        if config.model.adapter and (take_settings := optional("warm_start.adapter", "take_settings")):
            take_settings(config.model)
        trainer_checks.complete_trainer(config.trainer)
        trainer_checks.check_trainer(config, str(self.subcommand))
        self.checkpoint: Path | None = None
        trainer = config.trainer
        if self.subcommand not in TRAINS:
            self._choose_weights(config, files)
        elif config.dry_run:
            trainer.logger, trainer.enable_checkpointing, trainer.callbacks = False, False, None
            trainer.min_steps = trainer.min_epochs = None  # they would prevent an end before training
        else:
            self._choose_run(config)

    def _choose_run(self, config: Namespace) -> None:
        if config.ckpt_path:
            raise UserError(f"ckpt_path: {self.subcommand} continues a run with --resume")
        launched = os.environ.get("FORMTUNE_RUN")  # by Lightning, with the command line and environment of rank 0
        external = trainer_checks.launched_externally()
        if launched is None and config.run is None and external:
            raise UserError("run: processes from torchrun or srun must agree on a folder; name it with --run")
        # Under torchrun only rank 0 chooses: a slower rank would find the run that rank 0 has just created.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if launched is None and (config.resume or not external or rank == "0"):
            config.run = choose_run(LOGS / config.task, config.run, config.resume, lambda: self._dump(config))
        config.run = os.environ["FORMTUNE_RUN"] = launched or config.run or time.strftime("%Y%m%d-%H%M%S")
        self.folder = RunFolder(LOGS / config.task / config.run)
        config.trainer.default_root_dir = str(self.folder.path)
        config.data.date = config.data.date or self.folder.date or today()  # the day on which the run began
        self.checkpoint = newest(self.folder.path / "checkpoints")
        options = {"--run": ["--run", config.run], "--resume": ["--resume"]}
        words = [word for name, option in options.items() if name not in self.argv for word in option]
        self.signals.remedy = f"continue with: {shlex.join(['formtune', *self.argv, *words])}"

    def _choose_weights(self, config: Namespace, files: list[Path]) -> None:
        run = self.run = measured_run(files, LOGS / config.task / config.run if config.run else None)
        self.checkpoint = choose(config.ckpt_path, run)
        # "": the command line sets it
        if self.checkpoint and config.model.adapter and LINES.get("model.adapter") == "":
            raise UserError(f"model.adapter: {self.checkpoint} is evaluated; for an adapter, use -c TASK.yaml")
        if self.checkpoint or config.ckpt_path == "base":
            config.model.adapter = None
        untuned = f"adapter {config.model.adapter}" if config.model.adapter else "untuned base"
        self.evaluated = str(self.checkpoint or untuned)
        best = ", the run's best checkpoint" if self.checkpoint and config.ckpt_path in (None, "best") else ""
        rank_zero_only(print)(f"evaluating: {self.evaluated}{best}", flush=True)
        config.trainer.default_root_dir = str(LOGS / config.task)
        if config.target_precision is not None and self.subcommand == "predict":
            config.min_confidence = minimum_confidence(config, run)
        if self.checkpoint:
            config.data.date = config.data.date or RunFolder(self.checkpoint.parent.parent).date

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init[self.subcommand]
        options = dict(config.trainer)
        for key in ("callbacks", "plugins"):  # Lightning also takes one alone
            value = options[key]
            options[key] = value if isinstance(value, list) else [] if value is None else [value]
        # formtune's checkpoints come first: `trainer.checkpoint_callback` and `ckpt_path="best"` refer to them.
        callbacks: list[Any] = [config.answer_table, self.signals]
        if self.subcommand in TRAINS and not config.dry_run:
            callbacks += [config.overfitting, config.checkpoint]
            if options["logger"] in (None, True):
                again = int(self.checkpoint.stem.removeprefix("step-")) + 1 if self.checkpoint else None
                options["logger"] = make_loggers(config.logger, config.task, config.run, again)
        else:
            options["logger"] = False
        custom_bar = any(isinstance(one, ProgressBar) for one in options["callbacks"])
        if options["enable_progress_bar"] is not False and not custom_bar:
            # 0: no bar in a file, or if standard output is closed.
            callbacks.append(StepsBar(int(bool(sys.stdout and sys.stdout.isatty()))))
        options["callbacks"] = callbacks + options["callbacks"]
        options["plugins"] = [*options["plugins"], CheckpointFiles()]
        if SLURMEnvironment.detect():
            # Lightning would save in a signal handler, and load that file unasked.
            options["plugins"].append(SLURMEnvironment(auto_requeue=False))
        if options["strategy"] == "fsdp":
            options["strategy"] = ShardedBase()  # Lightning's would shard the adapters too
        try:
            trainer = self.trainer_class(**options | kwargs)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            flags = (f".{flag}" for flag, v in options.items() if isinstance(v, str) and repr(v) in str(error))
            raise UserError(f"trainer{next(flags, '')}: {error}") from error
        if self.subcommand in TRAINS:
            trainer_checks.check_callbacks(trainer, self.model.scores.names)
        return trainer

    def train(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        """Run `train` or `fit`; with --dry_run print an estimate."""
        config, all_stages = self.config[self.subcommand], self.subcommand == "train"
        trainer: Any = self.trainer
        before_training = optional("export.rules", "before_training") if all_stages else None
        for line in before_training(model.base, model.lora) if before_training else ():
            rank_zero_only(print)(f"preflight: {line}")
        baselines = config.baselines if all_stages else None
        if config.dry_run:
            plan = optional("start.plan", "plan", "dry_run")
            return plan(trainer, model, datamodule, self._final_config, baselines, config.baseline_rows)
        next_step = optional("report.next_step", "next_step")
        writes = trainer.is_global_zero and not trainer.fast_dev_run
        with self.folder.locked() if writes else contextlib.nullcontext():
            result = train(
                trainer, model, datamodule, self.folder, self._final_config, baselines, config.baseline_rows,
                self.checkpoint, self.without_quick, next_step, optional("report.report", "write_report"),
            )  # fmt: skip
        if writes and result:
            print_result(result, self.folder.path)
        elif writes:
            history = callback(trainer, OverfittingWatch).history
            print(f"{reason(history)}\ndiagnosis: {diagnose(history).text}")
            if next_step:
                print(f"next: {next_step(history, trainer, 'fit', {})}")
            print(f"run: {self.folder.path}")

    fit = train

    def test(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        prepare(self.trainer, datamodule)
        getattr(self.trainer, str(self.subcommand))(model, datamodule, ckpt_path=self.checkpoint, verbose=False)
        rows = model.counts["format/exact"][1]
        result = {"result": model.evaluation, "counts": {"result": model.counts}, "rows": rows}
        split = "validation" if self.subcommand == "validate" else "test"
        rank_zero_only(print_result)(result, None, split, self.evaluated)
        words = "train -c TASK.yaml"
        if self.checkpoint:
            named = self.config[self.subcommand].ckpt_path
            run = self.run or self.checkpoint.parent.parent
            words = f"predict {run} PROMPTS{f' --ckpt_path {named}' if named else ''}"
        rank_zero_only(print)(f"next: formtune {words}")

    validate = test

    def predict(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        config, path = self.config.predict, Path(self.config.predict.answers)
        prepare(self.trainer, datamodule, "predict")
        try:  # before the work
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"answers: {path}: {error.strerror}") from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"answers: {path} is a folder, or its folder is not writable")
        self.trainer.predict(model, datamodule, return_predictions=False, ckpt_path=self.checkpoint)
        more = {} if self.checkpoint else {"model": self.evaluated}
        if self.trainer.is_global_zero:
            files = write_answers(path, model.outcomes, config.min_confidence, more).items()
            print(f"answers of {self.evaluated}: {', '.join(f'{count:,} in {file}' for file, count in files)}")
            what, least = "answers with an invalid format or a low confidence", config.min_confidence
            separated = f"they are below {least:.6g}" if least is not None else "--min_confidence separates them"
            print(f"next: look at {what}; {separated}")

    def _final_config(self) -> str:
        config = self.config[self.subcommand]
        config.data.date = self.datamodule.settings.date
        return self._dump(config)

    def _dump(self, config: Namespace) -> str:
        """The configuration as YAML, to start another run from and to compare with a resumed run."""
        config = config.clone()
        for key in ("config", "ckpt_path", "answers", "min_confidence", "target_precision", "dry_run"):
            config.pop(key, None)
        config.run, config.resume, config.quick, config.trainer.default_root_dir = None, False, False, None
        return self._parser(self.subcommand).dump(config, skip_none=False)
