"""From files to the rows of optimizer steps. Imports no models, and torch only in `datamodule`."""

from formtune.data.columns import Columns
from formtune.data.sources import HuggingFace, Source

__all__ = ["Columns", "HuggingFace", "Source"]
