"""Parsers whose mistakes are one line: the key, its `file:line`, and the key that may be meant."""

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Any, get_args

from formtune.configuration.keys import MEANT
from formtune.configuration.yaml_file import line_of
from formtune.errors import UserError, first_line

# The key in a message of argparse or jsonargparse, and the group that holds it.
_UNKNOWN = (
    r"[Uu]nrecognized arguments: --([\w.-]+)|"
    r"(?:Group '([\w.]+)' does not accept o|.*\bo|O)ption '([\w.-]+)'(?: is not accepted)?"
)
_VALUE = (
    r"(?m)(?:base 10|to float): '(.*?)'|(\S+) does not conform|"
    r"Given value: NestedArg.* val='(.*)'\)|(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$"
)
_TYPES = {
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list",
    "PositiveInt": "a positive integer", "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1",
}  # fmt: skip


class OneLine:
    """A mixin for parser classes: reports a mistake as a `UserError` instead of a page of usage."""

    exit_on_error: bool
    _actions: list[Any]

    def error(self, message: str, ex: Exception | None = None) -> Any:
        parent, text = ("", message) if not self.exit_on_error else _innermost(message)
        key, unknown = parent, re.match(_UNKNOWN, text)
        if unknown:
            key = ".".join(filter(None, [unknown[2] or parent, unknown[1] or unknown[3]]))
            near = did_you_mean(key, known_keys(self))
            if parent and f"did you mean {parent}." not in near:  # by the parser of the class, which has no other keys
                near = text[unknown.end() :].replace("you mean ", f"you mean {parent}.")
            text = (text if unknown[1] or not self.exit_on_error else f"unknown key {key}") + near
        elif key:
            key = {"model.format": "data.format"}.get(key, key)  # linked: the key that a user sets
            hints = [getattr(action, "_typehint", None) for action in self._actions if action.dest == key]
            text = f"{key}: {_reason(text, {kind.__name__ for kind in _subclasses(*hints)})}"
        if not self.exit_on_error:  # the arguments of a class: the parser of the command reports the whole key
            return super().error(text if unknown else message, ex)  # type: ignore[misc]
        line = line_of(key)
        raise UserError(f"{line}: {text}" if line else text)

    def instantiate(self, namespace: Any, *args: Any, **kwargs: Any) -> Any:
        """The same, but what a class of a library or of a user raises is a `UserError`."""
        failed: list[str] = []

        def build(kind: Any, *values: Any, **named: Any) -> Any:
            try:
                return kind(*values, **named)
            except Exception as error:
                keys = (key for key, value in vars(namespace.as_flat()).items() if f"{kind.__name__}'" in repr(value))
                key = next(keys, "").removesuffix(".class_path")
                if isinstance(error, UserError):
                    failed.append(str(error))
                elif not kind.__module__.startswith("formtune."):
                    failed.append(f"{key}: {kind.__name__}: {_reason(first_line(error))}")
                raise

        if self.exit_on_error:
            kwargs.setdefault("instantiators", [(build, object, True)])
        try:
            return super().instantiate(namespace, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            # jsonargparse tries every type that a key may have; the class that was named says what is wrong.
            if failed and not isinstance(error, UserError):
                raise UserError(failed[0]) from error
            raise


class CommandParser(OneLine, argparse.ArgumentParser):
    """Reads the options of a command that takes no task."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            f"formtune {command}", usage, description, epilog, formatter_class=formatter, allow_abbrev=False
        )


def did_you_mean(name: str, names: Collection[str]) -> str:
    """A question that names the one of `names` that is meant; "" if none is near."""
    words = name.lower().replace("-", "_").split(".")
    for start in range(len(words)):
        key, meaning = MEANT.get(".".join(words[start:]), ("", ""))
        if key and {key, key.rpartition(".")[0]} & {*names}:  # the argument of a class is not among the names
            return f"; did you mean {key} ({meaning})?"
    split = [(other, *other.lower().rpartition(".")[::2]) for other in sorted(names)]
    ends = Counter(end for *_, end in split)
    anywhere = {end: other for other, _, end in split if ends[end] == 1}
    beside = {end: other for other, group, end in split if group == ".".join(words[:-1])}
    elsewhere = {end: key for end, (key, _) in MEANT.items() if key in names}
    for near in (beside, anywhere, elsewhere):
        for other in difflib.get_close_matches(words[-1], near, len(near) or 1):
            # Few letters tell val_steps from max_steps: a mistyped name has the same ones, or nearly all of them.
            if sorted(other) == sorted(words[-1]) or difflib.SequenceMatcher(None, words[-1], other).ratio() >= 0.8:
                return f"; did you mean {near[other]}?"
    return ""


def known_keys(parser: Any) -> set[str]:
    """The dotted keys of a parser and its subcommands, and the groups that hold them."""
    keys = set()
    for action in parser._actions:  # neither argparse nor jsonargparse has a public list
        if not action.dest.endswith(".help"):
            keys |= set(accumulate(action.dest.split("."), "{}.{}".format))
        if isinstance(action.choices, dict):
            keys |= set().union(*map(known_keys, action.choices.values()))
    return keys


def _innermost(text: str) -> tuple[str, str]:
    """The key that jsonargparse's message is about, through the classes that values name, and what it says of it."""
    keys = []
    while True:
        if match := re.match(
            r'\s*(?:Parser key "([\w.]+)":|Problem with given class_path .*:\n|Type .* class:)\s*', text
        ):
            keys.append(match[1])
            text = text[match.end() :]
        elif match := re.search(r"^( *)- (Problem with .*(?:\n\1 +.*)*)", text, re.MULTILINE):  # one of several types
            text = match[2]
        else:
            return ".".join(filter(None, keys)), text.strip()


def _reason(text: str, classes: Collection[str] = ()) -> str:
    """What is wrong with a value, in one sentence; `classes` are those that it can name."""
    if match := re.search(r"No module named '([\w.]+)'|module '([\w.]+)' has no attribute '(\w+)'", text):
        install = f"; pip install {match[1]}, or set PYTHONPATH to the folder that holds it"
        return match[0] + (install if match[1] else did_you_mean(match[3], dir(sys.modules.get(match[2]))))
    if match := re.search(r"arguments? (?:is|are) required: (.*)", text):
        return f"the argument {match[1]} is missing"
    match = re.search(_VALUE, text)
    value = next((group for group in match.groups() if group is not None), "") if match else ""
    matches = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])|Not of type (\w+)", text)
    choices = dict.fromkeys(choice.strip("'") for _, literal, _ in matches for choice in literal.split(", ") if literal)
    types = dict.fromkeys(_TYPES[word] for name, _, restricted in matches if (word := name or restricted) in _TYPES)
    named = re.search(r"dot import path string: (.*)|Not a valid subclass of (\w+)", text)
    if named and ("NestedArg" in text or not {"a text", "a number"} & {*types}):
        few = f"one of {', '.join(sorted(classes))}, or " * (0 < len(classes) < 9)
        near = did_you_mean(named[1] or "", classes) or f"; name {few}MODULE.CLASS"
        return (f"no class {named[1]!r}" if named[1] else f"{named[2]} needs a class") + near
    if match := re.search(r"correspond to a (subclass of \w+)", text):
        return f"{value} is not a {match[1]}"
    if not value or not (choices or types):
        return next(iter(re.findall(r"Errors:\n *- (.*)", text)), text)
    if choices or "a number" in types:
        types.pop("an integer", None)
    expected = [*(["one of " * (len(choices) > 1) + ", ".join(choices)] if choices else []), *types]
    shown = value if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|True|False|[\[{].*", value) else repr(value)
    shown = "null" if value == "None" else shown
    yes = " (YAML reads yes, no, on and off as true and false)" if value in ("True", "False") else ""
    quote = f"; put it in quotes{yes}" if [*types] == ["a text"] and shown not in ("null", repr(value)) else ""
    return f"{shown} is not {' or '.join(expected)}{'; write a list as [a, b]' if 'a list' in types else quote}"


def _subclasses(hint: Any = None) -> Iterator[type]:
    """The classes that a value of this type can name."""
    kinds: list[type] = hint.__subclasses__() if isinstance(hint, type) else []
    yield from kinds
    for part in (*get_args(hint), *kinds):
        yield from _subclasses(part)
