"""Checks YAML files before anything slow is imported, and records the line of each key."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from formtune.errors import UserError

LINES: dict[str, str] = {}  # `file:line` of each dotted key in the command line's files
GROUPS = ("model", "model.lora", "data", "trainer", "checkpoint", "overfitting", "answer_table")  # keys with keys


def check_configs(args: list[str]) -> None:
    LINES.clear()
    for path in config_paths(args):
        check_yaml(path)
    for option in args:  # the command line overrides the file
        LINES[_key(option.partition("=")[0].removeprefix("--").removesuffix("+"))] = ""


def config_paths(args: list[str]) -> list[str]:
    paths = []
    for option, value in zip(args, [*args[1:], ""], strict=False):
        name, equals, attached = option.partition("=")
        if name in ("-c", "--config"):
            paths.append(attached if equals else value)
    if "" in paths:
        raise UserError("-c: name the YAML of a task")
    return paths


def line_of(key: str) -> str:
    """The `file:line` of a dotted key or its group; "" if no file, or the command line, sets it."""
    while key and key not in LINES:
        key = key.rpartition(".")[0]
    return LINES.get(key, "")


def is_set(key: str) -> bool:
    """Whether the command line, or one of its files, sets a key."""
    return key in LINES or LINES.get(key.rpartition(".")[0]) == ""  # "": the command line sets the whole group


def check_yaml(path: str) -> None:
    """Check that a file is a YAML mapping without duplicate keys, and record the lines of its keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        lines = dict(_lines(yaml.compose(text, yaml.SafeLoader)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: 2026-13-45 looks like a date
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({problem or error})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected keys such as model and data, each on a line")
    LINES.update({_key(key): f"{path}:{line}" for key, line in lines.items()})


def _key(path: str) -> str:
    """A key in a file or on a command line, as in messages."""
    return path.replace(".init_args", "")


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    names = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{path}{key.value}"
        if name in names:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
        # jsonargparse would accept a list or a number here, and fail where its keys are needed.
        if name in GROUPS and not isinstance(value, yaml.MappingNode) and not value.tag.endswith(":null"):
            raise yaml.MarkedYAMLError(problem=f"{name} must contain keys", problem_mark=key.start_mark)
        names.add(name)
        yield name, key.start_mark.line + 1
        yield from _lines(value, f"{name}.")
