"""Mistakes in keys and values, named in one line: by the key and the one that may be meant."""

from __future__ import annotations

import difflib
import re
from typing import Any

from formtune.errors import UserError


class OneLine:
    """Before a parser class: says what is wrong in one line instead of a page of usage."""

    _actions: Any

    def error(self, message: str, ex: Exception | None = None) -> Any:
        text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        if unknown := re.search(r"[Uu]nrecognized arguments: --([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected", text):
            name = unknown[1] or unknown[2]
            known = {a.dest for p in (self, *_subparsers(self)) for a in p._actions}
            near = difflib.get_close_matches(name, known, 1) or [
                k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]
            ]
            text += f"; did you mean {near[0]}?" if near else ""
        raise UserError(text)


def _subparsers(parser: Any) -> list[Any]:
    action = getattr(parser, "_subcommands_action", None)
    return list(action._name_parser_map.values()) if action else []
