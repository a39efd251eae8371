"""Readers of files, also of compressed ones: each yields the rows with their `file:line`.

Text files are not read by a data-frame library: those guess types (ISO dates become timestamps) and lose line numbers.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from formtune.errors import UserError, first_line
from formtune.formats.strict_json import loads_strict

MAX_LINE_BYTES = 4 * 2**20  # a million tokens
ENDINGS = ".jsonl, .json, .csv, .tsv or .parquet, each also with .gz, .bz2, .xz or .zst"

Records = Iterator[tuple[dict[str, Any], str]]  # each record with its place

_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what reading a damaged file raises
_PLAIN = json.JSONDecoder(parse_int=len)  # finds ends only: int() would raise at thousands of digits
# Of an array. White space is JSON's: `\s` would take more.
_OPENING = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*(?:][ \t\r\n]*\Z)?")
_SEPARATOR = re.compile(r"[ \t\r\n]*(?:,[ \t\r\n]*(?=[^ \t\r\n])|][ \t\r\n]*\Z)")


def reader_of(path: str) -> Callable[[str], Records] | None:
    """The reader of a file by its ending, None if that is not known."""
    name = Path(path.lower())
    return READERS.get(Path(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix)


def with_class_names(records: Iterable[dict[str, Any]], features: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Records with the names of class labels in place of their numbers; `features` are the data set's."""
    labels = {key: it["names"] for key, it in features.items() if isinstance(it, dict) and "names" in it}
    names = {key: dict(enumerate(texts)) for key, texts in labels.items()}
    for record in records:
        yield record | {key: names[key].get(record[key]) for key in names.keys() & record.keys()}


def _json_lines(path: str) -> Records:
    """One object per line, UTF-8, blank lines skipped."""
    for where, line in _lines(path):
        if text := line.strip():
            yield _record(text, where), where


def _json(path: str) -> Records:
    """One array of objects, or one object per line."""
    first = next((text for _, line in _lines(path, sys.maxsize - 1) if (text := line.lstrip())), "")
    return (_json_array if first.startswith("[") else _json_lines)(path)


def _json_array(path: str) -> Records:
    text = "".join(line for _, line in _lines(path, sys.maxsize - 1))
    opening = _OPENING.match(text)
    at, line, counted, previous = opening.end() if opening else 0, 1, 0, 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        # Each place is one row's: in a line where several rows begin, with the column.
        column = f":{at - text.rfind(chr(10), 0, at)}" if line == previous else ""
        where = f"{path}:{line}{column}"
        previous = line
        try:
            end = _PLAIN.raw_decode(text, at)[1]
            if (separator := _SEPARATOR.match(text, end)) is None:
                raise json.JSONDecodeError("Expecting ',' or the array's end", text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else where
            raise UserError(f"{place}: not valid JSON ({first_line(error)}); fix the file") from None
        yield _record(text[at:end], where), where
        at = separator.end()


def _record(text: str, where: str) -> dict[str, Any]:
    try:
        record = loads_strict(text, constants=True)
    except ValueError as error:
        if text[0] == "[" or text == "{":
            remedy = "write each on its own line, or all as one array in a .json file"
            raise UserError(f"{where}: expected one JSON object per line; {remedy}") from None
        raise UserError(f"{where}: not valid JSON ({error}); fix or remove the row") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected one JSON object per line, found {json.dumps(record)[:40]}")
    return record


def _csv(path: str, delimiters: str = ",;") -> Records:
    """Cells below a header line, UTF-8, divided by the first of `delimiters` that divides the header; all are text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    delimiter = next((sign for sign in delimiters if sign in unquoted), delimiters[0])
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
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
        with _open(path) as opened:
            # Parquet is read from its end, which a compressed file has only once all of it was read.
            source = opened if path.lower().endswith(".parquet") else io.BytesIO(opened.read())
            with pyarrow.parquet.ParquetFile(source) as file:
                stored = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
                features = stored.get("info", {}).get("features", {})
                records = (record for batch in file.iter_batches() for record in batch.to_pylist())
                for number, record in enumerate(with_class_names(records, features), 1):
                    yield record, f"{path}:{number}"
    except (pyarrow.ArrowException, ValueError, *_DAMAGED) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def _zstd(path: str, mode: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(path, "zstd"))  # type: ignore[arg-type]


READERS: dict[str, Callable[[str], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": functools.partial(_csv, delimiters="\t"),
    ".parquet": _parquet,
}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def _lines(path: str, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[str, str]]:
    """Place and text of each line of a UTF-8 file, read line by line."""
    with _open(path) as file:
        for number in count(1):
            where = f"{path}:{number}"
            try:
                line = file.readline(limit + 1)
            except _DAMAGED as error:
                raise UserError(f"{where}: not readable ({first_line(error)})") from None
            if not line:
                return
            if len(line) > limit:
                raise UserError(f"{where}: the line is longer than {limit >> 20} MiB; split the row")
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


def _open(path: str) -> IO[bytes]:
    try:
        return _COMPRESSED.get(Path(path).suffix.lower(), io.open)(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: No such file; name it as seen from {Path.cwd()}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or first_line(error)}") from None
