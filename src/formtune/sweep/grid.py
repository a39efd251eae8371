"""The points of a grid, in the words that `formtune fit` takes for them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from formtune.errors import UserError

RANKS = "model.lora.r=8,16,32,64"


@dataclass(frozen=True, slots=True)
class Point:
    """One value for each key of the grid; the name is short and distinct, fit for a folder: `r8-lr1e-4`."""

    name: str
    values: dict[str, str]  # as they were written

    @property
    def words(self) -> list[str]:
        """What sets these values on a command line."""
        return [f"--{key}={value}" for key, value in self.values.items()]


def points(over: Sequence[str]) -> list[Point]:
    """All combinations of `key=value,value,...`, the last key changing fastest."""
    grid: dict[str, list[str]] = {}
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"--over {text}: expected a key and its values, as in --over {RANKS}")
        if key in grid:
            raise UserError(f"--over {key}: duplicate key; name all its values at once")
        grid[key] = _values(key, values)
    last = [key.rpartition(".")[2] for key in grid]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(grid, last, strict=True)}
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return [Point("-".join(short[key] + _slug(value) for key, value in one.items()), one) for one in combinations]


def seeds(text: str) -> list[int]:
    """Seeds that are given as `0,1,2`."""
    words = text.split(",")
    if not all(re.fullmatch(r"\s*\d+\s*", word) for word in words):
        raise UserError(f"--seeds {text}: expected whole numbers from 0, as in --seeds 0,1,2")
    numbers = [int(word) for word in words]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}: duplicate seed; name each once")
    return numbers


def _values(key: str, text: str) -> list[str]:
    source = f"[{text}]"
    try:
        node = yaml.compose(source, yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"--over {key}: {text} is not a list of values, such as 8,16")
    # As they are written: `fit` reads 1e-4 as a number, YAML alone does not.
    values = [source[item.start_mark.index : item.end_mark.index] for item in node.value]
    if len(values) < 2:
        raise UserError(f"--over {key}: name two values at least, without brackets around them, as in --over {RANKS}")
    if repeated := next((value for i, value in enumerate(values) if value in values[:i]), None):
        raise UserError(f"--over {key}: duplicate value {repeated}; name each once")
    return values


def _slug(value: str) -> str:
    plain = re.sub(r"[^\w.+]+", "-", value).strip("-")[:40]
    if plain != value:  # two values that differ only in characters a folder's name cannot have must not share it
        plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    return plain if plain[:1].isdigit() else f"-{plain}"
