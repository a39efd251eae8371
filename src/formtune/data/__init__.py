"""From files to the rows of optimizer steps. Knows nothing of models, and of torch only in `module`."""

from formtune.data.sources import Columns, Csv, HuggingFace, JsonLines, Parquet, Source

__all__ = ["Columns", "Csv", "HuggingFace", "JsonLines", "Parquet", "Source"]
