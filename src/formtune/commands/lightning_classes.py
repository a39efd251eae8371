"""Lightning's Trainer and parser as the command line needs them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from formtune.configuration.parsing import OneLine
from formtune.data.datamodule import FormatDataModule
from formtune.model import FormatModule

# An argument that is a `str` can have a default of an enum that is one too, such as that of Lightning's Timer.
yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)


class Trainer(L.Trainer):
    """Lightning's Trainer, with a name for the whole job in LightningCLI's table of methods."""

    def train(self, model: FormatModule, datamodule: FormatDataModule) -> None:
        """Baselines, fit, test of the best checkpoint, adapter and report: `formtune.training.pipeline`."""
        raise NotImplementedError(
            "the command line runs the pipeline; in Python, call formtune.training.pipeline.train"
        )


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser; a mistake is one line, and a file that a value names is never read as configuration.

    It would be: a file of rows that begins with `{"class_path": ...}` could name a class to import.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)  # a mistyped key could be the beginning of another

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})
