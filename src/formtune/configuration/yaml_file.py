"""A YAML file that is broken is named by file and line, before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from formtune.errors import UserError

PLACES: dict[str, str] = {}  # the `file:line` of each dotted key of the command line's files

MAX_VALUES = 100_000  # of a file with its aliases written out, which multiply


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with the same key twice; elsewhere the last one wins without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands here twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_configs(args: list[str]) -> None:
    """Check each YAML that a command line names.

    Raises:
        UserError: One is broken; names the file, the line and the reason.
    """
    PLACES.clear()
    for path in config_paths(args):
        check_yaml(path)
    for option in args:
        PLACES.pop(option.partition("=")[0].removeprefix("--"), None)  # the command line overrides the file


def config_paths(args: list[str]) -> list[str]:
    """The YAMLs that a command line names."""
    paths = []
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, attached = option.partition("=")
        if name in ("-c", "--config"):
            paths.append(attached if equals else value)
            if not paths[-1]:
                raise UserError(f"{name}: name the YAML of a task")
    return paths


def place(key: str) -> str:
    """Where a dotted key (or its end) stands, as `file:line`; "" if in no file."""
    ends = [where for name, where in PLACES.items() if name == key or name.endswith(f".{key}")]
    return PLACES.get(key) or (ends[0] if key and len(ends) == 1 else "")


def check_yaml(path: str) -> None:
    """Check that a file is a YAML mapping without duplicate keys, and remember where its keys stand.

    Raises:
        UserError: It is not; names the file, the line and the reason.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.load(text, _UniqueKeys)
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for 2026-13-45, which looks like a date
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deeply)") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected keys such as model and data, found {type(content).__name__}")
    values = [content]
    for count, value in enumerate(values):  # grows as it goes
        if count > MAX_VALUES:
            raise UserError(f"{path}: more than {MAX_VALUES:,} values, aliases written out; a task needs fewer")
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    PLACES.update({key: f"{path}:{line}" for key, line in _lines(root)})


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    """The line of each dotted key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{path}{key.value}", key.start_mark.line + 1
                yield from _lines(value, f"{path}{key.value}.")
