"""The parser of the Lightning commands."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from formtune.configuration.parsing import OneLine


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser; a mistake is one line, and a file that a value names is never read as configuration."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        # Else a file of rows that begins with `{"class_path": ...}` could name a class to import.
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})
