"""Encoded rows are read again only if nothing that decides them has changed, and never from a damaged file."""

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
from formtune.data import Columns, cache, preparation
from formtune.data.preparation import load_splits
from formtune.data.settings import DataSettings
from formtune.files import read_entry, write_entry
from formtune.formats import Format, JsonSchema

STEPS = ["unicode", "control", "edges"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory whose rows are many enough to be kept: some kept, some quarantined, some repaired."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "CACHED_CHARACTERS", 0)
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


def test_what_is_read_again_is_what_was_worked_out(folder):
    first, again = split(), split()
    assert first.cached is None and again.cached == entries()[0] and len(entries()) == 1
    assert again == first and list(again.rows) == list(first.rows)
    assert {"format", "too_long", "unfit", "conflict"} <= set(again.reasons) and again.repairs and again.read
    row = again.rows["train"][0]
    assert all(type(token) is int for token in row.prompt_ids)


def test_what_is_ignored_is_counted_anew_where_rows_are_read_again(folder):
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
def test_whatever_decides_the_rows_decides_what_is_read_again(folder, change):
    split()
    assert split(**CHANGES[change]()).cached is None and len(entries()) == 2


def test_the_date_decides_only_where_the_template_writes_it(folder):
    split(date="2026-11-25")
    assert split(date="2026-11-26").cached is not None
    dated = byte_tokenizer()
    dated.chat_template = "{{ strftime_now('%Y') }}" + dated.chat_template
    limits = (160, 60)
    split(dated, date="2026-11-25", limits=limits)
    assert split(dated, date="2026-11-25", limits=limits).cached is not None
    assert split(dated, date="2026-11-26", limits=limits).cached is None


def test_a_version_or_a_line_of_code_decides_too(folder, monkeypatch, tmp_path):
    split()
    monkeypatch.setattr(cache, "version", lambda name: "0")
    assert split().cached is None
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(preparation, "CACHED_CHARACTERS", 0)
    Path("code.py").write_text("a = 1")
    monkeypatch.setattr(cache, "own_code", lambda *rooms: [Path("code.py")])
    split()
    assert split().cached is not None
    Path("code.py").write_text("a = 2")
    assert split().cached is None


def load_format(folder, body):
    (folder / "mine.py").write_text(
        f"from formtune.formats import Format\nimport mine_rules\nclass Mine(Format):\n{body}\n"
        "    def parse(self, text):\n        return mine_rules.parse(text)\n"
    )
    for name in ("mine", "mine_rules"):
        sys.modules.pop(name, None)
    import mine

    return mine.Mine


def test_a_format_of_ones_own_is_told_by_its_code_that_of_its_neighbours_and_the_files_it_is_given(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (folder / "mine_rules.py").write_text("def parse(text):\n    return text\n")
    (folder / "words.txt").write_text("a")
    body = "    def __init__(self, words: str = 'words.txt') -> None:\n        pass"
    found = load_format(folder, body)
    split(format=found())
    assert split(format=found()).cached is not None
    (folder / "words.txt").write_text("b")
    assert split(format=found()).cached is None
    (folder / "mine_rules.py").write_text("def parse(text):\n    return text + ''\n")
    assert split(format=load_format(folder, body)()).cached is None
    assert split(format=load_format(folder, body + "\n    # another")()).cached is None


def test_a_format_with_arguments_that_are_no_data_is_worked_out_each_time(folder):
    class Opaque(Format):
        def __init__(self, rule: object) -> None:
            pass

        def parse(self, text: str) -> object:
            return text

    assert [split(format=Opaque(object())).cached for _ in range(2)] == [None, None] and not entries()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other format", "a folder"])
def test_a_damaged_file_is_worked_out_and_written_again(folder, damage):
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


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read(folder):
    program = (
        "import os, time\nfrom formtune.data import cache\nfrom formtune.data.encoded import Splits\n"
        "def stop(*_):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "os.fsync = stop\ncache.store('0' * 32, Splits(rows={'train': []}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in entries()] == [".part"] and cache.load("0" * 32) is None


def test_a_full_disk_leaves_the_old_entry_and_no_part_of_the_new(tmp_path, monkeypatch):
    write_entry(tmp_path / "a.json", "old", kept=2)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    write_entry(tmp_path / "a.json", "new", kept=2)
    assert [read_entry(path) for path in tmp_path.iterdir()] == ["old"]


def test_the_entries_used_last_are_kept(folder):
    for limit in range(cache.KEPT + 3):
        split(limits=(150, 60 + limit))
        now = time.time() + limit - 100
        newest = max(entries(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (now, now))
        if limit:
            assert split().cached is not None  # used each time, so it stays
    assert len(entries()) == cache.KEPT


def test_a_few_rows_are_not_worth_a_file(folder, monkeypatch):
    monkeypatch.setattr(preparation, "CACHED_CHARACTERS", 500_000)
    split()
    assert not entries()
