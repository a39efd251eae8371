"""Mistakes in keys and values, named in one line: by the key, where it stands, and the one that may be meant."""

from __future__ import annotations

import argparse
import difflib
import re
from itertools import accumulate
from typing import Any

from formtune.configuration.yaml_file import place
from formtune.errors import UserError

_UNKNOWN = r"[Uu]nrecognized arguments: --([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected|option '([\w.]+)'"


class OneLine:
    """Before a parser class: says what is wrong in one line instead of a page of usage."""

    _actions: Any

    def error(self, message: str, ex: Exception | None = None) -> Any:
        text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        name = ""
        if unknown := re.search(_UNKNOWN, text, re.I):
            name = next(filter(None, unknown.groups()))
            known = {a.dest for p in (self, *_subparsers(self).values()) for a in p._actions}
            known |= {dest.partition(".")[0] for dest in known}
            near = difflib.get_close_matches(name, known, 1) or [
                k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]
            ]
            text += f"; did you mean {near[0]}?" if near else ""
        elif value := re.search(r'Parser key "([\w.]+)"', text):
            name = value[1]
        where = place(name)
        raise UserError(f"{where}: {text}" if where else text)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        config = super().parse_args(*args, **kwargs)  # type: ignore[misc]
        if not hasattr(config, "get"):
            return config  # argparse's own, which knows no groups of keys
        verb = config.get("subcommand")
        parser, values = (_subparsers(self)[verb], config[verb]) if verb else (self, config)
        # A list in place of keys would be taken, and fail where they are needed.
        keys = {action.dest for action in parser._actions}
        groups = {group for key in keys for group in accumulate(key.split(".")[:-1], "{}.{}".format)}
        for group in sorted(groups - {a.dest for a in parser._actions if hasattr(a, "_typehint")}):
            if isinstance(values.get(group), str | int | float | list):
                self.error(f'Parser key "{group}": Expected keys. Got value: {values[group]!r:.40}')
        return config


class CommandParser(OneLine, argparse.ArgumentParser):
    """Reads the options of a command that takes no task."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"formtune {command}", usage=usage, description=description, epilog=epilog,
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip


def _subparsers(parser: Any) -> dict[str, Any]:
    action = getattr(parser, "_subcommands_action", None)
    return dict(action._name_parser_map) if action else {}
