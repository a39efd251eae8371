"""Parsers of the optional commands: without a task, or with the part of a task's YAML that describes its rows."""

import argparse
from collections.abc import Set
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from formtune import formats  # noqa: F401 (so that a format can be named by its class alone)
from formtune.configuration.parsing import OneLine
from formtune.configuration.yaml_file import check_yaml, config_paths
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.files import leaves_folder

# Keys that only training reads.
TRAINING = {
    "seed_everything", "trainer", "logger", "checkpoint", "overfitting", "answer_table", "run", "resume",
    "baselines", "quick", "dry_run", "baseline_rows", "answers", "min_confidence", "target_precision", "ckpt_path",
    "model.lora", "model.optimizer", "model.scheduler", "model.max_grad_norm", "model.tokens_per_micro_batch",
    "model.gradient_checkpointing", "model.compile", "model.quantize", "model.metrics", "model.constrained",
    "model.format", "model.adapter", "data.rows_per_step",
}  # fmt: skip


class CommandParser(OneLine, argparse.ArgumentParser):
    """Reads the options of a command without a task."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            f"formtune {command}", usage, description, epilog, formatter_class=formatter, allow_abbrev=False
        )


class TaskParser(OneLine, ArgumentParser):
    """Reads a task's YAML without the keys that only training needs."""


def task_parser(command: str, description: str = "", used: Set[str] = frozenset()) -> TaskParser:
    """The parser of a command that needs a task's rows; `used` are keys of training that the command adds itself."""
    parser = TaskParser(prog=f"formtune {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML of the task; training keys are ignored")
    parser.add_argument("--task", type=str | None, help="Folder in logs/ (default: the YAML's name)")
    parser.add_argument("--model.base", type=str, required=True, help="Folder or Hub id of the base: its tokenizer")
    parser.add_argument("--model.chat_template", type=str | None, help="Chat template file that replaces the base's")
    parser.add_argument("--model.max_new_tokens", type=int, default=256, help="Maximum tokens of an answer")
    parser.add_class_arguments(DataSettings, "data")
    for key in TRAINING - used:
        parser.add_argument(f"--{key}", type=Any, help=argparse.SUPPRESS)
    parser.link_arguments("model.base", "data.tokenizer")
    parser.link_arguments("model.chat_template", "data.chat_template")
    parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
    return parser


def read_task(parser: TaskParser, args: list[str]) -> tuple[Namespace, DataSettings]:
    """The values of a command line, with `task` set, and its data settings."""
    if not args:
        raise UserError("name a task, -c TASK.yaml")
    config = parser.parse_args(args)
    config.task = config.task or Path(["task", *config_paths(args)][-1]).stem
    if leaves_folder(config.task):
        raise UserError(f"task: {config.task} is a path; give a name")
    config.data.pop("rows_per_step", None)
    # Only data: no loggers or callbacks are created here.
    return config, parser.instantiate_classes(Namespace(data=config.data)).data


def read_run(folder: Path) -> tuple[Namespace, DataSettings]:
    """The values and data settings in a run's configuration; a UserError if the folder has no run."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: No such file; name the folder of a run, such as logs/demo/RUN")
    check_yaml(str(config))
    task, settings = read_task(task_parser(""), ["-c", str(config)])
    saved = folder / "adapter" / "chat_template.jinja"
    if settings.template is not None and saved.is_file() and saved.read_text(encoding="utf-8") != settings.template:
        raise UserError(f"model.chat_template: {task.model.chat_template} has changed since training, see {saved}")
    return task, settings
