"""fit, validate, test and predict: LightningCLI with the two classes of this project, and one folder per run."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from formtune.callbacks import (
    AnswerFile,
    BestCheckpoint,
    DataTable,
    Outcomes,
    OverfittingWatch,
    ProgressBar,
    WorstAnswers,
)
from formtune.cli import LOGS, VERBS
from formtune.data.module import FormatDataModule
from formtune.deploy.adapter import export_adapter
from formtune.deploy.preflight import before_training
from formtune.errors import UserError
from formtune.evaluations import Evaluations, results
from formtune.model import FormatModule
from formtune.parsing import OneLine
from formtune.summary import print_result


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser with mistakes in one line."""


class FormtuneCLI(LightningCLI):
    """Runs fit, validate, test and predict from one YAML per task, with overrides on the command line."""

    def __init__(self, args: Any = None) -> None:
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
            "--shots",
            type=NonNegativeInt,
            default=4,
            help="Training rows in the prompt of fit's second baseline, as many as fit in; 0 leaves it out",
        )
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("data.format", "model.format")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs["description"] = VERBS[subcommand].description
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--answers", type=str, default="answers.jsonl", help="File to write, as JSON Lines")
        return parser

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        sources = config.get("config") or []
        if config.task is None:
            config.task = Path(str(sources[0])).stem if sources else "task"
        # Lightning starts further processes with this command line and environment: they must find the same folder.
        config.run = config.run or os.environ.get("FORMTUNE_RUN") or time.strftime("%Y%m%d-%H%M%S")
        os.environ["FORMTUNE_RUN"] = config.run
        self.run_dir = LOGS / config.task / config.run
        trainer = config.trainer
        trainer.precision = _checked_precision(trainer.precision, trainer.accelerator)
        trainer.default_root_dir = str(self.run_dir)
        self._check_trainer(trainer)
        path = config.get("ckpt_path")
        if path is not None and not Path(path).is_file():
            raise UserError(f"ckpt_path: no file {path}; a run's best checkpoint is named at its end")
        main_process = os.environ.get("LOCAL_RANK", "0") == "0"
        if self.subcommand == "fit" and main_process and (self.run_dir / "checkpoints").exists():
            raise UserError(f"run: {self.run_dir} already holds a run; choose another --run or leave it out")

    def _check_trainer(self, trainer: Namespace) -> None:
        """Refuse what would train for nothing, or fail only after the first evaluation."""
        for name in {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(str(self.subcommand), ()):
            if trainer[f"limit_{name}_batches"] == 0:
                raise UserError(f"trainer.limit_{name}_batches: 0 leaves nothing to judge the model by")
        if trainer.gradient_clip_val:
            raise UserError("trainer.gradient_clip_val: set model.max_grad_norm instead")
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches: a batch is a whole step here; set data.rows_per_step instead"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config_init, "trainer")
        self.best, self.outcomes = BestCheckpoint(), Outcomes()
        callbacks: list[Any] = [DataTable(), WorstAnswers(), self.outcomes]
        if self.subcommand == "fit":
            self.watch = OverfittingWatch(self.config.fit.early_stopping)
            callbacks += [self.best, self.watch]
            if config.logger is None or config.logger is True:
                kwargs["logger"] = TensorBoardLogger(LOGS, self.config.fit.task, self.config.fit.run)
        else:
            kwargs["logger"] = False
        if self.subcommand == "predict":
            callbacks.append(AnswerFile(self.config.predict.answers))
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        return self._instantiate_trainer({**config, **kwargs}, callbacks)

    def fit(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        """The whole job: base on the test rows, training, best checkpoint on the same rows, export."""
        trainer: Any = self.trainer
        result: dict[str, Any] = {}
        evaluations = Evaluations(trainer, model, datamodule, self.outcomes, self.run_dir)
        if trainer.is_global_zero:
            self._save_config()
        for line in before_training(model.base, model.lora, model.quantize):
            rank_zero_only(print)(f"preflight: {line}")
        result |= evaluations.baselines(self.config.fit.shots)
        trainer.validate(model, datamodule, verbose=False)  # the curves begin at the base
        # Evaluations draw from the same generators: training must not depend on whether a baseline was found on disk.
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            seed_everything(int(seed), verbose=False)
        started = time.monotonic()
        trainer.fit(model, datamodule)
        seconds = time.monotonic() - started
        steps, best = trainer.global_step, self.best.path
        if best is None and not trainer.fast_dev_run:
            raise UserError("no best checkpoint: no validation gave a finite loss; lower model.optimizer.lr")
        if best is not None:
            # Written before the last evaluation: whatever happens there, the adapter is safe.
            model.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
            if trainer.is_global_zero:
                data = datamodule.splits.key if datamodule.splits else None
                export_adapter(model, self.run_dir / "adapter", self.run_dir / "config.yaml", data)
        result["after"], result["counts"]["after"] = evaluations.tuned()
        result["probe"] = evaluations.probe()
        result["rows"] = result["counts"]["after"]["format/exact"][1]
        result["data"] = datamodule.splits.key if datamodule.splits else None  # as in audit.json
        result["training"] = {
            "steps": steps,
            "seconds": round(seconds, 1),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "best_step": self.best.best.step if self.best.best else None,
            # On the validation rows, so that runs can be chosen among without a look at the test rows.
            "best": asdict(self.best.best) | {"rows": self.best.rows} if self.best.best else None,
            "lowest_loss_step": self.best.lowest_loss.step if self.best.lowest_loss else None,
            "diagnosis": self.watch.diagnosis.text if self.watch.diagnosis else None,
            "history": [asdict(validation) for validation in self.watch.history],
        }
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._save_result(result)
            evaluations.report(result)
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

    def _save_config(self) -> None:
        config = self.config.fit.clone()
        config.pop("config", None)
        config.run = None  # a record to start another run from, not a reason to be refused
        config.trainer.default_root_dir = None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(self._parser("fit").dump(config, skip_none=False), encoding="utf-8")

    def _save_result(self, result: dict[str, Any]) -> None:
        text = json.dumps(result, indent=2)
        (self.run_dir / "metrics.json").write_text(text + "\n", encoding="utf-8")
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


def _checked_precision(precision: Any, accelerator: Any) -> str:
    """The precision to train in; where none is given, bfloat16 arithmetic if the hardware has it."""
    if precision is None:
        if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
        return "bf16-mixed" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "32-true"
    if str(precision) in ("bf16-true", "bf16", "16-true", "16"):
        # Adam's second moments and the adapters would be rounded away in 16 bits.
        raise UserError(
            f"trainer.precision: {precision} would store the adapters in 16 bits; use bf16-mixed or 16-mixed"
        )
    return str(precision)


def run(args: list[str]) -> None:
    """Run a command line that begins with fit, validate, test or predict.

    Raises:
        UserError: A mistake of the user's, in one line.
    """
    # Lightning's notes on hardware and on its other products; warnings still come through.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        FormtuneCLI(args)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        os.environ.pop("FORMTUNE_RUN", None)  # the next call in this process is another run
