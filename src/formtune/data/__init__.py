"""From files to the rows of optimizer steps. Knows nothing of models."""

from formtune.data.module import FormatDataModule
from formtune.data.sources import Columns, Csv, HuggingFace, JsonLines, Parquet, Source

__all__ = ["Columns", "Csv", "FormatDataModule", "HuggingFace", "JsonLines", "Parquet", "Source"]
