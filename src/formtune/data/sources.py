"""Sources of rows: each yields plain records, each with the place where a person finds it.

JSON Lines are read here and not by a data-frame library: those guess types (ISO dates become timestamps, missing
keys become null) and lose the line number of what they cannot read.
"""

from __future__ import annotations

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formtune.data.turns import REFUSED, empty, kind, note_unread, read_turns
from formtune.errors import UserError, first_line
from formtune.formats.strict_json import loads_strict

MAX_LINE_BYTES = 4 * 2**20  # a million tokens
_FIELD = re.compile(r"\{([\w .-]+)\}")  # of a template over columns


class Source(ABC):
    """Yields (record, where) pairs; subclass it to read anything else and name the class in YAML."""

    @abstractmethod
    def records(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield each record as a dictionary, with its `file:line` or another place."""


class FileSource(Source):
    """A source that is one file.

    Args:
        path: File to read.
    """

    def __init__(self, path: str) -> None:
        self.path = path


class JsonLines(FileSource):
    """JSON Lines: one object per line, UTF-8, blank lines skipped."""

    def records(self) -> Iterator[tuple[dict[str, Any], str]]:
        for where, line in _lines(self.path):
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


class Csv(FileSource):
    """Comma-separated values with a header line, UTF-8; every value stays text."""

    def records(self) -> Iterator[tuple[dict[str, Any], str]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.DictReader((line for _, line in _lines(self.path)), strict=True)
        try:
            for record in reader:
                where = f"{self.path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{where}: the row does not have the header's {len(reader.fieldnames or ())} cells")
                yield record, where
        except csv.Error as error:
            raise UserError(f"{self.path}:{reader.line_num}: not readable as CSV ({error})") from None


class Parquet(FileSource):
    """A Parquet file."""

    def records(self) -> Iterator[tuple[dict[str, Any], str]]:
        import pyarrow
        import pyarrow.parquet

        _open(self.path).close()
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                batches = (record for batch in file.iter_batches() for record in batch.to_pylist())
                for number, record in enumerate(batches, 1):
                    yield record, f"{self.path}:{number}"
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path}: not a readable Parquet file ({first_line(error)})") from None


class HuggingFace(Source):
    """A data set of the `datasets` library: a folder written by `save_to_disk`, or a hub id.

    Args:
        path: Local folder or hub id (a hub id uses the network).
        split: Name of the split to read.
        name: Name of the configuration, for hub ids that have several.
    """

    def __init__(self, path: str, split: str = "train", name: str | None = None) -> None:
        self.path, self.split, self.name = path, split, name

    def records(self) -> Iterator[tuple[dict[str, Any], str]]:
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


def open_source(path: str) -> Source:
    """The source that reads `path`: by its ending for files, a Hugging Face data set otherwise."""
    reader: Any = {".jsonl": JsonLines, ".ndjson": JsonLines, ".csv": Csv, ".parquet": Parquet}.get(Path(path).suffix)
    if reader is not None:
        return reader(path)
    if Path(path).is_file():
        raise UserError(
            f"{path}: unknown kind of file; known are .jsonl, .csv, .parquet, a data set's folder or hub id"
        )
    parent, name = Path(path).parent, Path(path).name
    looks_like_id = path.count("/") == 1 and not path.startswith((".", "/")) and "." not in name
    if Path(path).is_dir() or (looks_like_id and not parent.is_dir()):
        return HuggingFace(path)
    raise UserError(f"{path}: no such file or folder")


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
        if self.source is None or (name := record.get(self.source)) is None:
            return ""
        if not isinstance(name, str):
            raise UserError(
                f"{where}: `{self.source}` is {kind(name)}, not the name of who wrote the row; write `human` or the "
                "model's name, or set data.columns.source: null"
            )
        return "human" if name.strip().casefold() == "human" else name

    def conversation(
        self, record: dict[str, Any], where: str, with_target: bool, ignored: set[str] | None = None
    ) -> list[dict[str, str]]:
        """The record's turns; the last one is the assistant's with a target, the user's without.

        `ignored` takes the names of the keys that have a value and are not read.
        """
        ignored = set() if ignored is None else ignored
        chat = self.messages in record
        content = [self.messages] if chat else [*self._in_prompt, self.completion]
        note_unread(record, {*content, self.system, self.source}, REFUSED, where, "", ignored)
        if chat:
            turns = read_turns(record[self.messages], self.messages, where, with_target, ignored)
        else:
            turns = [{"role": "user", "content": self._prompt(record, where)}]
            if with_target:
                turns.append({"role": "assistant", "content": _text(record, self.completion, where)})
        if self.system is None or empty(record.get(self.system)):
            return turns
        system = record[self.system]
        if not isinstance(system, str):
            raise UserError(
                f"{where}: `{self.system}` is {kind(system)}, not text; write the row's system prompt as a string, or "
                "set data.columns.system: null"
            )
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


def _text(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise UserError(f"{where}: no column `{column}` among {', '.join(record)}; set data.columns")
    if not isinstance(record[column], str):
        raise UserError(
            f"{where}: `{column}` is {kind(record[column])}, not text; write it as a string, JSON answers too"
        )
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


def _open(path: str) -> Any:
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: No such file; name it as seen from {Path.cwd()}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
