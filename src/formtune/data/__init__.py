"""From files to the rows of optimizer steps. Knows nothing of models, and of torch only in `datamodule`."""

from formtune.data.shapes import Columns
from formtune.data.sources import HuggingFace, Source

__all__ = ["Columns", "HuggingFace", "Source"]
