"""Sources of rows, and how a record becomes a conversation.

Text files are not read by a data-frame library: those guess types (ISO dates become timestamps) and lose line numbers.
"""

from __future__ import annotations

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from formtune.data.turns import REFUSED, empty, kind, read_turns, unread
from formtune.errors import UserError, first_line
from formtune.formats.strict_json import loads_strict

MAX_LINE_BYTES = 4 * 2**20  # a million tokens
_FIELD = re.compile(r"\{([\w .-]+)\}")  # of a template over columns

Records = Iterator[tuple[dict[str, Any], str]]  # each record with its place


class Source(ABC):
    """Yields (record, where) pairs; subclass it to read anything else and name the class in YAML."""

    @abstractmethod
    def records(self) -> Records:
        """Yield each record as a dictionary, with its `file:line` or another place."""


class HuggingFace(Source):
    """A data set of the `datasets` library: a folder written by `save_to_disk`, or a hub id.

    Args:
        path: Local folder or hub id (a hub id uses the network).
        split: Name of the split to read.
        name: Name of the configuration, for hub ids that have several.
    """

    def __init__(self, path: str, split: str = "train", name: str | None = None) -> None:
        self.path, self.split, self.name = path, split, name

    def records(self) -> Records:
        import datasets

        try:
            if Path(self.path).is_dir():
                loaded = datasets.load_from_disk(self.path)
            else:
                loaded = datasets.load_dataset(self.path, self.name)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: not a readable data set ({first_line(error)})") from None
        if isinstance(loaded, dict):
            if self.split not in loaded:
                raise UserError(f"{self.path}: no split {self.split!r}, only {', '.join(loaded)}; set `split`")
            loaded = loaded[self.split]
        for number, record in enumerate(loaded, 1):
            yield record, f"{self.path}[{self.split}]:{number}"


def read_records(source: str | Source) -> Records:
    """Yield the records of a source; a path is read by its ending, or as a Hugging Face data set."""
    if isinstance(source, Source):
        return source.records()
    path = Path(source)
    if reader := READERS.get(path.suffix):
        return reader(source)
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; use .jsonl, .csv, .parquet, a data set folder or hub id")
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w-]+", source) and not path.parent.is_dir()
    if path.is_dir() or looks_like_id:
        return HuggingFace(source).records()
    raise UserError(f"{source}: no such file or folder")


def _json_lines(path: str) -> Records:
    """One object per line, UTF-8, blank lines skipped."""
    for where, line in _lines(path):
        text = line.strip()
        if not text:
            continue
        try:
            record = loads_strict(text)
        except ValueError as error:
            if text[0] == "[" or text == "{":
                raise UserError(f"{where}: expected one JSON object per line; write each on its own line") from None
            raise UserError(f"{where}: not valid JSON ({error}); fix or remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected one JSON object per line, found {json.dumps(record)[:40]}")
        yield record, where


def _csv(path: str) -> Records:
    """Comma-separated values with a header line, UTF-8; every value stays text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise UserError(f"{where}: the row does not have the header's {len(reader.fieldnames or ())} cells")
            yield record, where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from None


def _parquet(path: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            records = (record for batch in file.iter_batches() for record in batch.to_pylist())
            for number, record in enumerate(records, 1):
                yield record, f"{path}:{number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


READERS: dict[str, Callable[[str], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


class Columns:
    """How a record becomes a conversation.

    Args:
        prompt: Column of the input, or a template such as `"Title: {title}\\n{body}"` over several columns.
        completion: Column of the target.
        messages: Column of chat turns; where a record has it, `prompt` and `completion` are not read.
        system: Column of the row's own system prompt, in place of `data.system`; may be absent or empty.
        source: Column that says who wrote the row: "human", or the name of the model that did; may be absent.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        completion: str = "completion",
        messages: str = "messages",
        system: str | None = "system",
        source: str | None = None,
    ) -> None:
        self.prompt, self.completion, self.messages, self.source = prompt, completion, messages, source
        self._in_prompt = re.findall(_FIELD, prompt) if "{" in prompt else [prompt]
        self.system = None if system in (*self._in_prompt, completion) else system

    def origin(self, record: dict[str, Any], where: str) -> str:
        """Who wrote a record, "" where it does not say."""
        if self.source is None or record.get(self.source) is None:
            return ""
        remedy = "write `human` or the name of the model that wrote the row, or set data.columns.source: null"
        name = _text(record, self.source, where, remedy)
        return "human" if name.strip().casefold() == "human" else name

    def conversation(
        self, record: dict[str, Any], where: str, with_target: bool | str, ignored: set[str] | None = None
    ) -> list[dict[str, str]]:
        """The record's turns; the last one is the assistant's with a target, the user's without (see `read_turns`).

        `ignored` collects the names of the keys that have a value and are not read.
        """
        ignored = set() if ignored is None else ignored
        is_chat = self.messages in record
        content = [self.messages] if is_chat else [*self._in_prompt, self.completion]
        ignored |= unread(record, {*content, self.system, self.source}, REFUSED, where)
        if is_chat:
            turns = read_turns(record[self.messages], self.messages, where, with_target, ignored)
        else:
            turns = [{"role": "user", "content": self._prompt(record, where)}]
            if with_target:
                turns.append({"role": "assistant", "content": _text(record, self.completion, where)})
        if self.system is None or empty(record.get(self.system)):
            return turns
        remedy = "write the row's system prompt as a string, or set data.columns.system: null"
        system = _text(record, self.system, where, remedy)
        if turns[0]["role"] == "system":
            raise UserError(
                f"{where}: `{self.messages}` and the column `{self.system}` both hold a system prompt; remove one, or "
                "set data.columns.system: null"
            )
        return [{"role": "system", "content": system}, *turns]

    def _prompt(self, record: dict[str, Any], where: str) -> str:
        if "{" not in self.prompt:
            return _text(record, self.prompt, where)
        # Not str.format: it would look up attributes, and replace braces in the data.
        return re.sub(_FIELD, lambda m: _text(record, m[1], where), self.prompt)


def _text(record: dict[str, Any], column: str, where: str, remedy: str = "") -> str:
    if column not in record:
        raise UserError(f"{where}: no column `{column}` among {', '.join(record)}; set data.columns")
    if not isinstance(record[column], str):
        remedy = remedy or "write it as a string, JSON answers too"
        raise UserError(f"{where}: `{column}` is {kind(record[column])}, not text; {remedy}")
    return record[column]


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Place and text of each line of a UTF-8 file, read line by line."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; split the row")
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


def _open(path: str) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: No such file; name it as seen from {Path.cwd()}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
