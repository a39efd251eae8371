"""Sources of rows, and how a record becomes a conversation."""

from __future__ import annotations

import glob
import json
import os
import re
from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path
from typing import Any

from formtune.data.readers import ENDINGS, Records, reader_of, with_class_names
from formtune.data.shapes import KINDS, from_sharegpt, is_turns, recognize
from formtune.data.turns import REFUSED, empty, kind, read_tools, read_turns, unread
from formtune.errors import UserError, first_line
from formtune.formats.strict_json import loads_strict

SAVED = ("state.json", "dataset_dict.json")  # one of these is in a folder that `save_to_disk` wrote
ANSWERS = (str, *KINDS)
_FIELD = re.compile(r"\{([\w .-]+)\}")  # of a template over columns


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
        for number, record in enumerate(with_class_names(loaded, loaded.features.to_dict()), 1):
            yield record, f"{self.path}[{self.split}]:{number}"


def read_records(source: str | list[str] | Source) -> Records:
    """Yield the records of a source; a path is read by its ending, or as a Hugging Face data set."""
    if isinstance(source, Source):
        return source.records()
    names = [source] if isinstance(source, str) else source
    return chain.from_iterable(map(_read, dict.fromkeys(path for name in names for path in _files(name))))


def _files(name: str) -> list[str]:
    """The files of a glob or a folder, sorted by name; any other name as it is."""
    name = os.path.expanduser(name)  # noqa: PTH111 (it leaves the rest of the name as it is)
    path = Path(name)
    is_folder = path.is_dir() and not any((path / file).is_file() for file in SAVED)
    if not is_folder and (path.exists() or not glob.has_magic(name)):
        return [name]
    paths = glob.glob(f"{glob.escape(name)}/*" if is_folder else name, recursive=True)  # noqa: PTH207
    files = sorted(file for file in paths if Path(file).is_file() and (reader_of(file) or not is_folder))
    if not files and not is_folder:
        raise UserError(f"{name}: no file matches; name it as seen from {Path.cwd()}")
    return files or [name]


def _read(source: str) -> Records:
    path = Path(source)
    if reader := reader_of(source):
        return reader(source)
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; use {ENDINGS}, a data set folder or hub id")
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w-]+", source) and not path.parent.is_dir()
    if path.is_dir() or looks_like_id:
        return HuggingFace(source).records()
    raise UserError(f"{source}: no such file or folder")


class Columns:
    """How a record becomes a conversation.

    Args:
        prompt: Column of the input, or a template such as `"Title: {title}\\n{body}"` over several columns.
        completion: Column of the target.
        messages: Column of chat turns; where a record has it, `prompt` and `completion` are not read.
        system: Column of the row's own system prompt, in place of `data.system`; may be absent or empty.
        source: Column that says who wrote the row: "human", or the name of the model that did; may be absent.
        schema: Column of the row's own JSON Schema, an object or JSON text; read if `data.format` names none.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        completion: str = "completion",
        messages: str = "messages",
        system: str | None = "system",
        source: str | None = None,
        schema: str = "schema",
    ) -> None:
        self.prompt, self.completion, self.messages = prompt, completion, messages
        self.source, self.schema = source, schema
        self._in_prompt = re.findall(_FIELD, prompt) if "{" in prompt else [prompt]
        self.system = None if system in (*self._in_prompt, completion) else system
        self._is_default = (prompt, completion, messages) == ("prompt", "completion", "messages")
        self.notes: dict[str, str] = {}  # what was recognized, each with the place of the first such row

    def origin(self, record: dict[str, Any], where: str) -> str:
        """Who wrote a record, "" where it does not say."""
        if self.source is None or record.get(self.source) is None:
            return ""
        remedy = "write `human` or the name of the model that wrote the row, or set data.columns.source: null"
        name = _text(record, self.source, where, remedy)
        return "human" if name.strip().casefold() == "human" else name

    def conversation(
        self, record: dict[str, Any], where: str, with_target: bool | str, ignored: set[str] | None = None
    ) -> list[dict[str, Any]]:
        """The record's turns; the last one is the assistant's with a target, the user's without (see `read_turns`).

        `ignored` collects the names of the keys that have a value and are not read. The last answer may be no text.
        """
        ignored = set() if ignored is None else ignored
        # In tables, NaN is a value that is missing.
        record = {name: None if kind(value) == "float" and value != value else value for name, value in record.items()}
        own = {*self._in_prompt, self.completion}
        is_other = self._is_default and all(record.get(name) is None for name in (*own, self.messages))
        if is_other and (shape := recognize(record, where, bool(with_target))):
            columns = Columns(**shape[1], system=self.system, source=self.source, schema=self.schema)
            columns.notes = self.notes
            if columns.messages == self.messages:  # the note on turns says more
                self.notes.setdefault(shape[0], where)
            return columns.conversation(record, where, with_target, ignored)
        is_chat = self.messages in record and (record[self.messages] is not None or self.prompt not in record)
        column = self.messages if is_chat else self.prompt
        content = [column] if is_chat else own
        ignored |= unread(record, {*content, self.system, self.source, "tools"}, REFUSED, where)
        if is_chat or is_turns(record.get(column)):
            turns = self._chat(record, column, where, with_target, ignored)
        else:
            turns = [{"role": "user", "content": self._prompt(record, where)}]
            if with_target:
                turns.append({"role": "assistant", "content": _read_column(record, self.completion, where, ANSWERS)})
        if self.system is None or empty(record.get(self.system)):
            return turns
        remedy = "write the row's system prompt as a string, or set data.columns.system: null"
        system = _text(record, self.system, where, remedy)
        if turns[0]["role"] == "system":
            raise UserError(
                f"{where}: `{column}` and the column `{self.system}` both hold a system prompt; remove one, or "
                "set data.columns.system: null"
            )
        return [{"role": "system", "content": system}, *turns]

    def tools(self, record: dict[str, Any], where: str) -> str | None:
        """The record's tools as JSON text, None where it has none or the prompt's template writes them."""
        return None if "tools" in self._in_prompt else read_tools(record.get("tools"), "tools", where)

    def _chat(
        self, record: dict[str, Any], column: str, where: str, with_target: bool | str, ignored: set[str]
    ) -> list[dict[str, Any]]:
        given, shape = record[column], f"{column} (role, content)"
        if column != self.messages:
            shape = f"TRL conversations ({column}, {self.completion})"
            if with_target:
                answer = _read_column(record, self.completion, where, ANSWERS)
                given = [*given, *(answer if is_turns(answer) else [{"role": "assistant", "content": answer}])]
                column = f"{column}+{self.completion}"
        turns = [*map(from_sharegpt, given)] if isinstance(given, list) else given
        if turns != given:
            shape = f"ShareGPT {column} (from, value)"
        if shape != "messages (role, content)":
            self.notes.setdefault(shape, where)
        return read_turns(turns, column, where, with_target, ignored)

    def _prompt(self, record: dict[str, Any], where: str) -> str:
        if "{" not in self.prompt:
            return _text(record, self.prompt, where)
        # A column may be null, but not all columns of the template.
        null = [name for name in self._in_prompt if name in record and record[name] is None]
        record = record | dict.fromkeys(null if len(null) < len(self._in_prompt) else (), "")
        # Not str.format: it would look up attributes, and replace braces in the data.
        return re.sub(_FIELD, lambda m: _text(record, m[1], where), self.prompt)


def own_schema(value: Any) -> str | None:
    """JSON text of a row's schema, always written alike; the text as it is if it is not JSON; None for an empty one."""
    if isinstance(value, str):
        try:
            value = loads_strict(value.strip())
        except ValueError:
            return value.strip() or None
    return None if empty(value) else json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _text(record: dict[str, Any], column: str, where: str, remedy: str = "") -> str:
    return _read_column(record, column, where, (str,), remedy)


def _read_column(record: dict[str, Any], column: str, where: str, types: tuple[type, ...], remedy: str = "") -> Any:
    if column not in record:
        raise UserError(f"{where}: no column `{column}` among {', '.join(record)}; set data.columns")
    if not isinstance(record[column], types):
        remedy = remedy or "write it as a string, JSON answers too"
        raise UserError(f"{where}: `{column}` is {kind(record[column])}, not text; {remedy}")
    return record[column]
