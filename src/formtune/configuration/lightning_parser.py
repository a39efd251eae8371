"""The parser of the Lightning commands."""

import inspect
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser

from formtune.configuration.parsing import OneLine

# `typing` caches a union in the order that is imported first; with float first, 1 batch would be 1.0, which is all.
_HINTS: dict[str, Any] = inspect.unwrap(L.Trainer.__init__).__annotations__
_HINTS |= {flag: int | float | None for flag, hint in _HINTS.items() if hint == int | float | None}


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser; a mistake is one line, and a file that a value names is never read as configuration."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        # Else a file of rows that begins with `{"class_path": ...}` could name a class to import.
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})
