"""A YAML file that is broken is named by file and line, before anything slow is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from formtune.errors import UserError


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


def check_yaml(path: str) -> None:
    """Check that a file is a YAML mapping without duplicate keys.

    Raises:
        UserError: It is not; names the file, the line and the reason.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected keys such as model and data, found {type(content).__name__}")
