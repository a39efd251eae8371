"""The points of a grid, as arguments of `formtune train`."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from formtune.errors import UserError

RANKS = "model.lora.r=8,16,32,64"


class Point(NamedTuple):
    """One value for each key of the grid; the name is short, distinct and fit for a folder: `r8-lr1e-4`."""

    name: str
    arguments: list[str]  # for `formtune train`


def points(over: Sequence[str]) -> list[Point]:
    """All combinations of `key=value,value,...`, the last key changing fastest."""
    grid: dict[str, list[str]] = {}
    for text in over:
        key, _, values = text.partition("=")
        if key in grid:
            raise UserError(f"--over {key}: duplicate key; name all its values at once")
        # Commas inside brackets belong to a value. Values stay text: `train` reads 1e-4 as a number, YAML does not.
        grid[key] = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not re.fullmatch(r"\w+(\.\w+)*", key) or not all(grid[key]) or len(set(grid[key])) < max(2, len(grid[key])):
            raise UserError(f"--over {text}: expected a key and two or more different values, as in --over {RANKS}")
    last = [key.rpartition(".")[2] for key in grid]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(grid, last, strict=True)}
    return [
        Point(
            "-".join(short[key] + _slug(value) for key, value in zip(grid, values, strict=True)),
            [f"--{key}={value}" for key, value in zip(grid, values, strict=True)],
        )
        for values in itertools.product(*grid.values())
    ]


def seeds(text: str) -> list[int]:
    """Seeds that are given as `0,1,2`."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--seeds {text}: expected whole numbers from 0, as in --seeds 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def _slug(value: str) -> str:
    plain = re.sub(r"[^\w.+]+", "-", value).strip("-")[:40]
    if plain != value:  # values that differ only in characters that a folder name cannot have need different names
        plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    return plain if plain[:1].isdigit() else f"-{plain}"
