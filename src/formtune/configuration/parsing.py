"""Parsers whose mistakes are one line: the key, its `file:line`, and the key that may be meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection
from itertools import accumulate
from typing import Any

from formtune.configuration.yaml_file import line_of
from formtune.errors import UserError

# The key in a message of argparse or jsonargparse.
_UNKNOWN = r"[Uu]nrecognized arguments: --([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected|[Oo]ption '([\w.]+)'"
_INVALID = r'Parser key "([\w.]+)"'


class OneLine:
    """A mixin for parser classes: reports a mistake as a `UserError` instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        text = " ".join(str(message).split())
        key = ""
        if unknown := re.search(_UNKNOWN, text):
            key = next(filter(None, unknown.groups()))
            text += did_you_mean(key, known_keys(self))
        elif invalid := re.search(_INVALID, text):
            key = invalid[1]
        line = line_of(key)
        raise UserError(f"{line}: {text}" if line else text)


class CommandParser(OneLine, argparse.ArgumentParser):
    """Reads the options of a command that takes no task."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"formtune {command}", usage=usage, description=description, epilog=epilog,
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip


def did_you_mean(name: str, names: Collection[str]) -> str:
    """A question that names the nearest of `names`; "" if none is near."""
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, names, 1) or [other for other in names if other.rpartition(".")[2] == last]
    return f"; did you mean {near[0]}?" if near else ""


def known_keys(parser: Any) -> set[str]:
    """The dotted keys of a parser and its subcommands, and the groups that hold them."""
    keys = set()
    for action in parser._actions:  # neither argparse nor jsonargparse has a public list
        keys |= set(accumulate(action.dest.split("."), "{}.{}".format))
        if isinstance(action.choices, dict):
            keys |= set().union(*map(known_keys, action.choices.values()))
    return keys
