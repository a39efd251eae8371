"""Encoded rows are read from the cache only if nothing that decides them has changed, and never from a damaged file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SCHEMA, byte_tokenizer, pair
from formtune.base.renderer import Renderer
from formtune.data import Columns, encoded
from formtune.data.encoded import read_cache
from formtune.data.preparation import load_splits
from formtune.data.settings import DataSettings
from formtune.files import read_entry, write_entry
from formtune.formats import JsonSchema

STEPS = ["unicode", "control", "edges"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with rows of which some are kept, some quarantined and some repaired."""
    monkeypatch.chdir(tmp_path)
    rows = [pair(n, f"  number {n} \u200b\U0001f389") for n in range(60)] + [pair(3, "number 4 \U0001f389"), pair(5)]
    rows += [{"prompt": "bad", "completion": "no JSON"}, pair(70, "x" * 200), pair(71, "<|im_end|>")]
    write(rows)
    return tmp_path


def write(rows):
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path="train.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def split(
    tokenizer=None,
    format=None,
    system=None,
    steps=STEPS,
    limits=(150, 60),
    shares=(0.2, 0.2),
    columns=None,
    date=None,
):
    settings = DataSettings(
        format or JsonSchema(SCHEMA),
        "train.jsonl",
        *shares,
        system=system,
        columns=columns,
        clean=steps,
        max_new_tokens=limits[1],
    )
    settings.renderer, settings.limit = Renderer(tokenizer or byte_tokenizer(), date), limits[0]
    return load_splits(settings)


def entries():
    return sorted(Path(".cache/encoded").glob("*"))


def test_the_rows_in_the_cache_are_those_that_were_prepared(folder):
    first, again = split(), split()
    assert first.cached is None and again.cached == entries()[0] and len(entries()) == 1
    assert again == first and list(again.rows) == list(first.rows)
    assert {"format", "too_long", "unfit", "conflict"} <= set(again.reasons) and again.repairs and again.read
    row = again.rows["train"][0]
    assert all(type(token) is int for token in row.prompt_ids)


def test_ignored_columns_are_counted_on_each_reading(folder):
    split()
    write([{**row, "id": n + 1, "system": None} for n, row in enumerate(rows_of())])
    again = split()
    assert again.cached is not None and again.ignored == {"id": len(rows_of())} and again.own_system == 0


def other_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    return tokenizer


def other_vocabulary():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["number"])
    return tokenizer


def one_letter():
    rows = rows_of()
    write([{**rows[0], "prompt": rows[0]["prompt"].replace("number", "Number")}, *rows[1:]])


def one_line_lower():
    Path("train.jsonl").write_text("\n" + Path("train.jsonl").read_text())


def other_columns():
    write([{**row, "other": "y" + row["prompt"]} for row in rows_of()])
    return Columns(prompt="other")


CHANGES = {
    "a letter": lambda: one_letter() or {},
    "a line number": lambda: one_line_lower() or {},
    "a column": lambda: {"columns": other_columns()},
    "system prompt": lambda: {"system": "Be exact."},
    "cleaning": lambda: {"steps": ["edges"]},
    "a share": lambda: {"shares": (0.2, 0.3)},
    "length": lambda: {"limits": (151, 60)},
    "length of answers": lambda: {"limits": (150, 61)},
    "template": lambda: {"tokenizer": other_template()},
    "vocabulary": lambda: {"tokenizer": other_vocabulary()},
    "schema": lambda: {"format": JsonSchema({**SCHEMA, "description": "another"})},
    "an argument": lambda: {"format": JsonSchema(SCHEMA, canonical=True)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_decides_the_rows_prepares_them_again(folder, change):
    split()
    assert split(**CHANGES[change]()).cached is None and len(entries()) == 2


def test_the_date_matters_only_if_the_template_writes_it(folder):
    split(date="2026-11-25")
    assert split(date="2026-11-26").cached is not None
    dated = byte_tokenizer()
    dated.chat_template = "{{ strftime_now('%Y') }}" + dated.chat_template
    limits = (160, 60)
    split(dated, date="2026-11-25", limits=limits)
    assert split(dated, date="2026-11-25", limits=limits).cached is not None
    assert split(dated, date="2026-11-26", limits=limits).cached is None


def test_another_version_or_another_line_of_code_prepares_the_rows_again(folder, monkeypatch):
    split()
    with monkeypatch.context() as patch:
        patch.setattr(encoded, "version", lambda name: "0")
        assert split().cached is None
    Path("code.py").write_text("a = 1")
    monkeypatch.setattr(encoded, "own_code", lambda *rooms: [Path("code.py")])
    split()
    assert split().cached is not None
    Path("code.py").write_text("a = 2")
    assert split().cached is None


def test_rows_of_your_own_format_are_prepared_each_time(folder):
    class Own(JsonSchema):
        pass

    first, again = split(format=Own(SCHEMA)), split(format=Own(SCHEMA))
    assert first == again and first.key and again.cached is None and not entries()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other format", "a folder"])
def test_a_damaged_file_is_written_again(folder, damage):
    first = split()
    [path] = entries()
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
        assert split() == first
        return
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "other format": b"PAR1" + whole,
        }[damage]
    )
    again = split()
    assert again == first and again.cached is None and path.read_bytes() == whole
    assert split().cached == path


def test_a_folder_that_cannot_be_written_stops_nothing(folder):
    Path(".cache").write_text("a file in the way")
    assert sum(map(len, split().rows.values())) and split().cached is None


def test_a_process_killed_while_it_writes_leaves_no_entry(folder):
    program = (
        "import os, time\nfrom pathlib import Path\nfrom formtune.data.encoded import Splits, write_cache\n"
        "def stop(*_):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "os.fsync = stop\nwrite_cache(Path('.cache/encoded/a.json'), Splits(rows={'train': []}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in entries()] == [".part"] and read_cache(Path(".cache/encoded/a.json")) is None


def test_a_full_disk_leaves_the_old_entry_and_no_part_of_the_new(tmp_path, monkeypatch):
    write_entry(tmp_path / "a.json", "old", kept=2)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    write_entry(tmp_path / "a.json", "new", kept=2)
    assert [read_entry(path) for path in tmp_path.iterdir()] == ["old"]


def test_the_entries_used_last_are_kept(folder):
    for limit in range(encoded.MAX_ENTRIES + 3):
        split(limits=(150, 60 + limit))
        now = time.time() + limit - 100
        newest = max(entries(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (now, now))
        if limit:
            assert split().cached is not None  # used each time, so it stays
    assert len(entries()) == encoded.MAX_ENTRIES
