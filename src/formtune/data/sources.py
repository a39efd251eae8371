"""Sources of rows: files (also compressed), datasets and custom ones. Each row comes with its `file:line`."""

import csv
import functools
import glob
import io
import json
import os
import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from formtune.base.row import Row
from formtune.errors import UserError, as_user_error, first_line
from formtune.formats.strict_json import loads_strict

MAX_LINE_BYTES = 4 * 2**20  # a million tokens
MAX_WEIGHT = 1000  # times that a row may be used in an epoch
ENDINGS = ".jsonl, .json, .csv, .tsv or .parquet, each also with .gz, .bz2 or .zst"
LISTS = ("Sequence", "List", "LargeList")  # features of `datasets`
SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` writes one of these into its folder

Records = Iterator[tuple[dict[str, Any], str]]  # each record with its place


class Source(ABC):
    """Yields (record, where) pairs; subclass it to read anything else and name the class in YAML."""

    @abstractmethod
    def records(self) -> Records:
        """Yield each record as a dictionary, with its `file:line` or another place."""


class HuggingFace(Source):
    """A dataset of the `datasets` library: a folder from `save_to_disk`, or a Hub id.

    Args:
        path: Local folder or Hub id (a Hub id uses the network).
        split: Name of the split to read.
        name: Name of the configuration, for Hub ids that have several.
    """

    def __init__(self, path: str, split: str = "train", name: str | None = None) -> None:
        self.path, self.split, self.name = path, split, name

    def records(self) -> Records:
        import datasets

        with as_user_error(f"{self.path}: the split {self.split} is not readable", "; set `split`"):
            if Path(self.path).is_dir():
                loaded = datasets.load_from_disk(self.path)
                if isinstance(loaded, dict) and self.split not in loaded:
                    raise ValueError(f"there are {', '.join(loaded)}")
                loaded = loaded[self.split] if isinstance(loaded, dict) else loaded
            else:
                loaded = datasets.load_dataset(self.path, self.name, split=self.split)
        yield from _numbered(map(_table_row, loaded), loaded.features.to_dict(), f"{self.path}[{self.split}]")


def read_records(source: str | list[str] | Source) -> Records:
    """Yield the records of a source; a path is read by its ending, or as a Hugging Face dataset."""
    records = source.records() if isinstance(source, Source) else chain.from_iterable(map(_read, entries(source)))
    places = set[str]()
    for record, where in records:  # in tables, NaN is a missing value
        if where in places:
            raise UserError(f"{where}: two rows have this place; {type(source).__name__} must give each row its own")
        if isinstance(source, Source):
            places.add(where)
        yield {key: None if isinstance(cell, float) and cell != cell else cell for key, cell in record.items()}, where


def entries(source: str | list[str]) -> dict[str, str]:
    """Each file of a source, once, with the first entry of the list that matches it."""
    files: dict[Path, tuple[str, str]] = {}
    for name in [source] if isinstance(source, str) else source:
        for path in _files(name):
            files.setdefault(Path(path).resolve(), (path, name))
    return dict(files.values())


def _files(name: str) -> list[str]:
    """The files of a glob or a folder, sorted by name; any other name as it is."""
    name = os.path.expanduser(name)  # noqa: PTH111 (it leaves the rest unchanged)
    path = Path(name)
    is_folder = _has_files(path)
    if not is_folder and (path.exists() or not glob.has_magic(name)):
        return [name]
    paths = glob.glob(f"{glob.escape(name)}/*" if is_folder else name, recursive=True)  # noqa: PTH207
    files = sorted(file for file in paths if Path(file).is_file() and (_reader(file) or not is_folder))
    if not files and not is_folder:
        raise UserError(f"{name}: no file matches; relative paths start at {Path.cwd()}")
    return files or [name]


def _has_files(path: Path) -> bool:
    """Whether a path is a folder of files, and not one that `save_to_disk` wrote."""
    return path.is_dir() and not any((path / file).is_file() for file in SAVED)


def _read(source: str) -> Records:
    path, reader = Path(source), _reader(source)
    if reader and path.exists():
        return reader(source)
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; use {ENDINGS}, a dataset folder or Hub id")
    if _has_files(path):
        raise UserError(f"{source}: no file of a known kind in this folder; use {ENDINGS}; subfolders are not read")
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w-]+", source) and not path.parent.is_dir()
    if path.is_dir() or looks_like_id:
        return HuggingFace(source).records()
    raise UserError(f"{source}: no such file or folder; relative paths start at {Path.cwd()}")


def _reader(path: str) -> Callable[[str], Records] | None:
    name = Path(path.lower())
    return _READERS.get(Path(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix)


def _json_lines(path: str) -> Records:
    for where, line in _lines(path):
        if text := line.strip():
            record = _parse(text, where, "fix or remove the row; a file has one JSON object per line, or is one array")
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected one JSON object per line, got {json.dumps(record)[:40]}")
            yield record, where


def _json(path: str) -> Records:
    """One array of objects, or one object per line."""
    text = "".join(line for _, line in _lines(path, sys.maxsize - 1)).strip()
    if not text.startswith("["):
        return _json_lines(path)
    records = _parse(text, path, "fix the file")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}:row {number}: expected an object, got {json.dumps(record)[:40]}")
    return _numbered(records, {}, path)


def _parse(text: str, where: str, remedy: str) -> Any:
    with as_user_error(f"{where}: not valid JSON", f"; {remedy}"):
        return loads_strict(text, constants=True)


def _csv(path: str, delimiters: str = ",;") -> Records:
    """Rows of strings below a header line, divided by the most frequent of `delimiters` in the header."""
    # Data-frame libraries guess types (ISO dates become timestamps) and lose line numbers.
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    delimiter = max(delimiters, key=unquoted.count)
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise UserError(f"{path}:1: the header has two columns named `{twice}`; rename one")
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise UserError(f"{where}: expected {len(names)} cells, as in the header")
            yield record, where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from None


def _parquet(path: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    with as_user_error(f"{path}: not a readable Parquet file"), _open(path) as file:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
        stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        records = table.to_pylist(maps_as_pydicts="strict")
    return _numbered(map(_table_row, records), stored.get("info", {}).get("features", {}), path)


def _table_row(record: dict[str, Any]) -> dict[str, Any]:
    """A table row without the nulls in its tools and calls: a table gives each of them the keys of all."""

    def without_nulls(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(without_nulls, value)]
        is_object = isinstance(value, dict)
        return {key: without_nulls(v) for key, v in value.items() if v is not None} if is_object else value

    def turn_without_nulls(turn: Any) -> Any:
        has_calls = isinstance(turn, dict) and turn.get("tool_calls")
        return turn | {"tool_calls": without_nulls(turn["tool_calls"])} if has_calls else turn

    for key, cell in record.items():
        if key == "tools":
            record = record | {key: without_nulls(cell)}
        elif isinstance(cell, list):
            record = record | {key: [*map(turn_without_nulls, cell)]}
    return record


def _numbered(records: Iterable[dict[str, Any]], features: dict[str, Any], name: str) -> Records:
    """Each record with its place; class labels become their names in the `features` of `datasets`."""
    names = {}
    for key, kind in features.items():
        inner = kind.get("feature") if isinstance(kind, dict) and kind.get("_type") in LISTS else kind
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            names[key] = dict(enumerate(inner["names"]))
    for number, record in enumerate(records, 1):
        named = {}
        for key in names.keys() & record.keys():
            value, of = record[key], names[key].get
            named[key] = [*map(of, value)] if isinstance(value, list) else of(value)
        yield record | named, f"{name}:row {number}"


_READERS: dict[str, Callable[[str], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": functools.partial(_csv, delimiters="\t"),
    ".parquet": _parquet,
}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def _open(path: str) -> IO[bytes]:
    import pyarrow

    stream = pyarrow.input_stream(path, compression=_COMPRESSED.get(Path(path).suffix.lower()))
    return io.BufferedReader(stream)  # type: ignore[arg-type]


def _lines(path: str, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[str, str]]:
    """The place and text of each line of a UTF-8 file, read line by line."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
                if len(line) > limit:
                    raise UserError(f"{path}:{number}: the line is longer than {limit >> 20} MiB; split the row")
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: not readable ({first_line(error)})") from None


def read_weights(train: Any) -> tuple[Any, dict[str, float]]:
    """The source in `data.train`, and the weight of each of its entries; {} if none has a weight."""
    if not isinstance(train, list) or all(isinstance(entry, str) for entry in train):
        return train, {}
    weights: dict[str, float] = {}
    for item in train:
        entry = {"weight": 1} | ({"path": item} if isinstance(item, str) else item)
        path, weight = entry.get("path"), entry["weight"]
        is_weight = type(weight) in (int, float) and 0 < weight <= MAX_WEIGHT
        if not isinstance(path, str) or path in weights or not is_weight or len(entry) > 2:
            rule = f"{{path: FILE, weight: NUMBER}}, each file once, with a weight above 0 and up to {MAX_WEIGHT}"
            raise UserError(f"data.train: expected a file or {rule}; got {item}")
        weights[path] = float(weight)
    return list(weights), weights


def weighted(
    rows: Sequence[Row], entry_of: Mapping[str, str], weights: Mapping[str, float]
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Each row as often as its entry's weight says, and counts by entry; `entry_of` maps a file to its entry."""
    # The fractional part is a sample of the rows, drawn once, so that every epoch and a resumed run have the same rows.
    entries = [entry_of[row.where.rpartition(":")[0].removesuffix("[train]")] for row in rows]
    times, counts = [int(weights[entry]) for entry in entries], {}
    for name, weight in weights.items():
        if name not in entry_of.values():
            raise UserError(f"data.train: all files of {name} belong to entries before it; name each file once")
        members = [at for at, entry in enumerate(entries) if entry == name]
        for at in random.Random(0).sample(members, round(weight % 1 * len(members))):
            times[at] += 1
        used = sum(times[at] for at in members)
        if members and not used:
            raise UserError(f"data.train: weight {weight:g} of {name} leaves none of its {len(members)} rows; raise it")
        counts[name] = {"weight": weight, "rows": len(members), "used": used}
    return [row for row, count in zip(rows, times, strict=True) for _ in range(count)], counts
