"""The part of a task's YAML that describes its rows, for verbs that load no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from formtune import formats  # noqa: F401 (so that a format can be named by its class alone)
from formtune.configuration.parsing import OneLine
from formtune.configuration.yaml_file import check_yaml
from formtune.data.settings import DataSettings
from formtune.errors import UserError

BATCHES = ("rows_per_step", "max_evaluation_rows")  # keys of `data` that only the data module knows


class TaskParser(OneLine, ArgumentParser):
    """Reads a task's YAML without what only training needs."""


def task_parser(command: str, description: str = "") -> TaskParser:
    """The parser of a command that needs a task's rows."""
    parser = TaskParser(prog=f"formtune {command}", description=description)
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="YAML of the task; what only training needs is left out"
    )
    parser.add_argument("--task", type=str | None, help="Name of the task's folder in logs/ (default: the YAML's)")
    parser.add_argument("--model.base", type=str, required=True, help="Folder or hub id of the base: its tokenizer")
    parser.add_argument("--model.max_new_tokens", type=int, default=256, help="Tokens that an answer may have")
    parser.add_class_arguments(DataSettings, "data")
    parser.link_arguments("model.base", "data.tokenizer")
    parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
    return parser


def read_task(
    parser: TaskParser, args: list[str], model: tuple[str, ...] = ("base", "max_new_tokens")
) -> tuple[Namespace, DataSettings]:
    """The command line's values, with `task` set, and the rows it describes.

    Args:
        parser: Made by `task_parser`.
        args: The command line without the verb.
        model: Keys below `model` that the parser knows.

    Raises:
        UserError: A key or a value is wrong; names it.
    """
    args, paths = _without_training(args, model)
    config = parser.parse_args(args)
    config.task = config.task or (Path(paths[-1]).stem if paths else "task")
    return config, parser.instantiate_classes(config).data


def _without_training(args: list[str], model: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The command line with each YAML replaced by what is needed of it, and the YAMLs' paths."""
    kept, paths = [], []
    rest = iter(args)
    for option in rest:
        name, equals, value = option.partition("=")
        if name not in ("-c", "--config"):
            kept.append(option)
            continue
        paths.append(value if equals else next(rest))
        content: dict[str, Any] = yaml.safe_load(Path(paths[-1]).read_text(encoding="utf-8"))
        parts = {name: content.get(name) or {} for name in ("model", "data")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise UserError(f"{paths[-1]}: model and data must hold keys")
        needed = {
            "model": {key: value for key, value in parts["model"].items() if key in model},
            "data": {
                key: value
                for key, value in parts["data"].items()
                if key not in ("rows_per_step", "max_evaluation_rows")
            },
        } | ({"task": content["task"]} if content.get("task") else {})
        kept.append(f"--config={yaml.safe_dump(needed)}")
    return kept, paths


def read_run(folder: Path) -> tuple[Namespace, DataSettings]:
    """The same of a run's own configuration.

    Raises:
        UserError: There is no run in the folder, or its configuration cannot be read.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: No such file; name the folder of a run, such as logs/demo/RUN")
    check_yaml(str(config))
    parser = task_parser("")
    return read_task(parser, ["-c", str(config)])
