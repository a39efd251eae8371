"""Parsers that report a mistake in one line: the key, its `file:line`, and a similar key."""

import difflib
import re
import sys
from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import yaml

from formtune.configuration.yaml_file import line_of
from formtune.errors import UserError, first_line

KEYS = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8"))
# Key and meaning by another tool's name.
MEANT = {name: (key, entry["meaning"]) for key, entry in KEYS.items() for name in entry.get("names", "").split()}
USAGE = {
    "train": "formtune train -c TASK.yaml [--quick] [--dry_run] [--key value ...]",
    "fit": "formtune fit -c TASK.yaml [--dry_run] [--key value ...]",
    "validate": "formtune validate RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "test": "formtune test RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "predict": "formtune predict RUN PROMPTS | -c TASK.yaml [--answers FILE] [--target_precision P] [--key value ...]",
}

_UNKNOWN = (  # in a message of argparse or jsonargparse: the group of a key, and the key
    r"[Uu]nrecognized arguments: --([\w.-]+)|(?:Group '([\w.]+)' does not accept o|\b[Oo])ption '([\w.-]+)'"
)
# Lines of jsonargparse's messages that add nothing to the others.
_FRAME = r"\W*(Parser key|Type |Problem with given|Does not validate|Subtypes:|Errors:|Given value type|.*NoneType)"
_EXPECTED = r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])|Not of type (\w+)"
_LIST = "a list such as [a, b]"
_TYPES = {  # what a message expects, in words
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "a string", "dict": "a mapping",
    "list": _LIST, "Sequence": _LIST, "Iterable": _LIST, "PositiveInt": "a positive integer",
    "NonNegativeFloat": "a number of at least 0", "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
}  # fmt: skip


def short_help(command: str, description: str) -> str:
    lines = [f"usage: {USAGE[command]}", "", description, "", "the most important keys (default):"]
    for key, entry in KEYS.items():
        name = f"--{key}" + (f" ({entry['default']})" if "default" in entry else "")
        lines.append(f"  {name:<46} {entry['meaning']}")
    lines += ["", "--help-all lists every key, --print_config=comments prints them as YAML (configs/reference.yaml)."]
    return "\n".join(lines)


class OneLine:
    """A mixin for parsers: reports a mistake as a `UserError` instead of a page of usage."""

    exit_on_error: bool
    _actions: list[Any]

    def error(self, message: str, ex: Exception | None = None) -> Any:
        unknown = re.search(_UNKNOWN, message)
        if not self.exit_on_error:  # arguments of a class: the parser of the command reports the full key
            near = did_you_mean(unknown[unknown.lastindex or 0], known_keys(self)) if unknown else ""
            return super().error(message + near, ex)  # type: ignore[misc]
        keys = re.findall(r'(?:Parser key|^Key) "([\w.]+)"', message)  # through classes that values name
        key = ".".join(dict.fromkeys(keys))
        if unknown:
            parent = unknown[2] or key
            key = ".".join(filter(None, [parent, unknown[unknown.lastindex or 0]]))
            hint = re.search(r"; did you mean (\w+\?)", message)  # from the parser of the class
            near = f"; did you mean {parent}.{hint[1]}" if hint else did_you_mean(key, known_keys(self))
            text = (message if unknown[1] else f"unknown key {key}") + near
        elif key:
            key = {"model.format": "data.format"}.get(key, key)  # linked: the key that a user sets
            hints = [getattr(action, "_typehint", None) for action in self._actions if action.dest == key]
            text = f"{key}: {_reason(message, {kind.__name__ for kind in _subclasses(*hints)})}"
        else:
            text = message
        line = line_of(key)
        raise UserError(f"{line}: {text}" if line else text)

    def instantiate(self, namespace: Any, *args: Any, **kwargs: Any) -> Any:
        """Instantiate the classes; a library's or custom class that fails raises a `UserError`."""
        failed: list[UserError] = []

        def build(kind: Any, *values: Any, **named: Any) -> Any:
            try:
                return kind(*values, **named)
            except UserError as error:
                failed.append(error)
                raise
            except Exception as error:
                keys = (key for key, value in vars(namespace.as_flat()).items() if f"{kind.__name__}'" in repr(value))
                key = next(keys, "").removesuffix(".class_path")
                if not kind.__module__.startswith("formtune."):
                    failed.append(UserError(f"{key}: {kind.__name__}: {first_line(error)}"))
                raise

        if self.exit_on_error:
            kwargs.setdefault("instantiators", [(build, object, True)])
        try:
            return super().instantiate(namespace, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            # jsonargparse tries every type of a key; the error of the named class says what is wrong.
            if failed and not isinstance(error, UserError):
                raise failed[0] from error
            raise


def did_you_mean(name: str, names: Collection[str]) -> str:
    """A question with the most similar of `names`; "" if none is similar."""
    words = name.lower().replace("-", "_").split(".")
    for start in range(len(words)):
        key, meaning = MEANT.get(".".join(words[start:]), ("", ""))
        if key and {key, key.rpartition(".")[0]} & {*names}:  # the argument of a class is not among the names
            return f"; did you mean {key} ({meaning})?"
    ends = {end: key for end, (key, _) in MEANT.items() if key in names}
    group = ".".join(words[:-1])
    for other in sorted(names, key=lambda name: (name.rpartition(".")[0] == group, name)):  # the same group last
        ends[other.lower().rpartition(".")[2]] = other
    # val_steps and max_steps differ in few letters: a mistyped name has nearly all letters of the right one.
    letters = [end for end in ends if sorted(end) == sorted(words[-1])]
    near = letters or difflib.get_close_matches(words[-1], ends, 1, cutoff=0.8)
    if not near and group and group not in names:  # the group may be the mistyped part
        return did_you_mean(group, names)
    return f"; did you mean {ends[near[0]]}?" if near else ""


def known_keys(parser: Any) -> set[str]:
    """The dotted keys of a parser and its subcommands, and their groups."""
    keys = set()
    for action in parser._actions:  # neither argparse nor jsonargparse has a public list
        if not action.dest.endswith(".help"):
            keys |= set(accumulate(action.dest.split("."), "{}.{}".format))
        if isinstance(action.choices, dict):
            keys |= set().union(*map(known_keys, action.choices.values()))
    return keys


def _reason(message: str, classes: Collection[str]) -> str:
    """The reason in jsonargparse's message, in one line; `classes` are those that the value can name."""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return match[0] + did_you_mean(match[2], dir(sys.modules[match[1]]))
    if match := re.search(r"No module named '([\w.]+)'", message):
        return f"{match[0]}; pip install {match[1]}, or set PYTHONPATH to its folder"
    if match := re.search(r"arguments are required: (.*)", message):
        return f"the argument {match[1]} is missing"
    if message.startswith("Key "):
        return "is missing; set it"
    if match := re.search(r"correspond to a (subclass of \w+)", message):
        return f"must name a {match[1]}"
    expectations = re.findall(_EXPECTED, message)
    names = ", ".join(names for _, names, _ in expectations if names).replace("'", "")
    choices = dict.fromkeys(names.split(", ") if names else ())
    types = dict.fromkeys(_TYPES[kind or name] for kind, _, name in expectations if (kind or name) in _TYPES)
    named = re.search(r"dot import path string: (.*)|Not a valid subclass of (\w+)|(\w+) is abstract", message)
    if named and ("NestedArg" in message or not (choices or types.keys() - {_LIST, "true or false"})):
        few = f"one of {', '.join(sorted(classes))}, or " if 0 < len(classes) < 9 else ""
        near = did_you_mean(named[1] or "", classes) or f"; name {few}MODULE.CLASS"
        return (f"no class {named[1]!r}" if named[1] else f"{named[2] or named[3]} needs a class") + near
    if expected := [*(["one of " * (len(choices) > 1) + ", ".join(choices)] if choices else []), *types]:
        values = re.findall(r"(?m)(?:Got|Given) value: (.*?)(?:\. Got value: .*)?$", message)
        value = next((value for value in values if len(value) < 60 and "Namespace(" not in value), "")
        actual = f", not {'null' if value == 'None' else value}" if value else ""
        unquoted = [*types] == ["a string"] and value not in ("", "None")
        quotes = "; quote it (yes, no, on and off too)" if unquoted else ""
        return f"must be {' or '.join(expected)}{actual}{quotes}"
    lines = [line.strip(" -") for line in message.splitlines() if not re.match(_FRAME, line)]
    return "; ".join(dict.fromkeys(lines))


def _subclasses(hint: Any = None) -> Iterator[type]:
    kinds: list[type] = hint.__subclasses__() if isinstance(hint, type) else []
    yield from kinds
    for part in (*get_args(hint), *kinds):
        yield from _subclasses(part)
