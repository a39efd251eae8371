"""The audit reports what was planted, blocks what training would refuse, and writes a page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from demo_rows import datasets, planted
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import SCHEMA, SHARED, WORDY, pair
from formtune.audit.findings import _histogram, audit, compare_inputs, page, ungrounded
from formtune.cli import main
from formtune.data.blockers import uneven_fractions
from formtune.data.cleaning import Example
from formtune.data.encoded import Splits
from formtune.data.preparation import load_splits
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.formats import JsonSchema, Labels

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "src/formtune/demo"


@pytest.fixture
def task(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    def write(rows, **data):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(text)
        format = {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}}
        content = {
            "model": {"base": base, "lora": {"r": 4}, "max_new_tokens": 128},
            "data": {"train": "train.jsonl", "format": format, "rows_per_step": 4, **data},
            "trainer": {"max_epochs": 1},
        }
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(content))
        return tmp_path

    return write


def read(folder):
    return json.loads((folder / "logs/t/audit/audit.json").read_text())


def test_a_clean_task_is_ready_and_training_prepares_the_same_rows(task, capsys):
    folder = task([pair(n) for n in range(60)])
    assert main(["audit", "-c", "t.yaml"]) == 0
    findings = read(folder)
    assert findings["verdict"] == "ready" and sum(rows["used"] for rows in findings["rows"].values()) == 60
    assert len(list((folder / ".cache/encoded").glob("*.json"))) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2].startswith("verdict: ready") and "with fewer than 500" in printed
    assert not list(folder.glob("logs/t/audit/*.part"))
    base = yaml.safe_load((folder / "t.yaml").read_text())["model"]["base"]
    prepared = DataSettings(JsonSchema("schema.json"), "train.jsonl", tokenizer=base, max_new_tokens=128)
    assert load_splits(prepared).key == findings["data"]


def test_a_schema_without_a_grammar_is_audited_and_forces_no_order(task):
    pytest.importorskip("formtune.constrained.grammar")
    folder = task([{"prompt": f"number {n}", "completion": json.dumps({"s": f"x{n}", "n": n})} for n in range(60)])
    (folder / "schema.json").write_text(
        json.dumps({"type": "object", "additionalProperties": {"type": ["string", "integer"]}})
    )
    assert main(["audit", "-c", "t.yaml"]) == 0
    assert read(folder)["reordered"] == 0
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    assert main(["audit", "-c", "t.yaml"]) == 0
    findings = read(folder)
    assert findings["reordered"] == findings["rows"]["train"]["used"] > 40


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "completion": "five"}, "syntax"),
        ({"prompt": "p", "completion": '{"n": 1, "s": "a"}'}, "layout of the answer: with spaces"),
        ({"prompt": "p", "completion": '{"s":"a","n":1}'}, "key order of the answer: s before n"),
        ({"prompt": "p " * 1000, "completion": '{"n":1,"s":"a"}'}, "tokens, the limit is"),
    ],
)
def test_what_blocks_an_audit_blocks_training_unless_it_is_dropped(task, capsys, bad, reason):
    pytest.importorskip("formtune.quality.duplicates")
    folder = task([*(pair(n) for n in range(60)), bad])
    assert main(["audit", "-c", "t.yaml"]) == 1
    [blocker] = read(folder)["blockers"]
    assert blocker.startswith("train.jsonl:61: ") and reason in blocker and "data.bad_rows: drop" in blocker
    assert "verdict: blocked" in capsys.readouterr().out
    assert main(["train", "-c", "t.yaml"]) == 2
    assert reason in capsys.readouterr().err
    assert main(["audit", "-c", "t.yaml", "--data.bad_rows", "drop"]) == 0


def test_answers_are_repaired_only_if_that_is_asked_for_and_counted(task):
    fenced = {"prompt": "fenced", "completion": '```json\n{"s": "a", "n": 1}\n```'}
    folder = task([*(pair(n) for n in range(60)), fenced])
    assert main(["audit", "-c", "t.yaml"]) == 1
    assert main(["audit", "-c", "t.yaml", "--data.repair_answers", "[edges,fence,canonical]"]) == 0
    findings = read(folder)
    assert findings["repairs"] == {"answer fence": 1, "answer canonical": 1}
    assert not findings["quarantined"]


def test_production_that_is_longer_than_the_limit_blocks(task, tmp_path):
    folder = task([pair(n) for n in range(60)], production="p.jsonl", max_length=200)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{n} " * 90}) + "\n" for n in range(20)))
    assert main(["audit", "-c", "t.yaml"]) == 1
    findings = read(folder)
    assert "production's inputs have" in findings["blockers"][0] and "raise data.max_length" in findings["blockers"][0]
    assert any(line.startswith("production's words differ: ") for line in findings["warnings"])


def test_synthetic_rows_are_counted_and_capped(task):
    rows = [pair(n) | {"source": "human" if n < 20 else "wise-1"} for n in range(60)]
    folder = task(rows, validation=0.1, test=0.1, columns={"source": "source"})
    assert main(["audit", "-c", "t.yaml"]) == 1
    [blocker] = read(folder)["blockers"]
    assert blocker.startswith("data.max_synthetic: models wrote ")
    assert "set data.columns.source: null" in blocker
    assert main(["audit", "-c", "t.yaml", "--data.columns.source", "null"]) == 0
    assert set(read(folder)["sources"]) == {""}
    assert main(["audit", "-c", "t.yaml", "--data.max_synthetic", "0.8"]) == 0
    findings = read(folder)
    assert set(findings["sources"]) == {"human", "wise-1"}


@pytest.mark.parametrize("values", [("email", "phone"), (0, 1), ("Human", "https://a.b/c")])
def test_a_source_column_of_another_meaning_is_not_read(task, values):
    folder = task([pair(n) | {"source": values[n % 2]} for n in range(60)])
    assert main(["audit", "-c", "t.yaml"]) == 0
    assert read(folder)["ignored"] == {"source": 60}


def test_ignored_columns_are_printed_and_written(task, tmp_path, capsys):
    folder = task([pair(n) | {"id": n + 1, "[bold]": "x" * (n < 7)} for n in range(60)], production="p.jsonl")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(pair(n) | {"user": n}) + "\n" for n in range(20)))
    assert main(["audit", "-c", "t.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ignored columns: id (60 rows), [bold] (7 rows)" in lines
    assert "data.production: ignored columns: user (20 rows)" in lines
    findings = read(folder)
    assert findings["next"] == "formtune train -c t.yaml"
    assert findings["ignored"] == {"id": 60, "[bold]": 7} and findings["ignored_of_production"] == {"user": 20}
    text = (folder / "logs/t/audit/report.html").read_text()
    assert "<p>ignored columns: id (60 rows), [bold] (7)</p>" in text
    assert "<p>data.production: ignored columns: user (20 rows)</p>" in text


def test_a_mistake_is_one_line(task, capsys):
    task([pair(1), '{"prompt" 1}'])
    for words, message in (
        (["audit", "-c", "t.yaml"], "train.jsonl:2: not valid JSON"),
        (["audit", "-c", "t.yaml", "--data.trian", "x"], "did you mean data.train?"),
        (["audit", "-c", "t.yaml", "--data.near_duplicates", "2"], "near_duplicates"),
        (["audit", "-c", "none.yaml"], "none.yaml"),
        (["audit"], "name a task, -c TASK.yaml"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def example(where, text, value, origin=""):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(value)}]
    return Example(turns, where, origin, value)


FORMAT = JsonSchema(
    {
        "type": "object",
        "properties": {
            "who": {"type": "string"},
            "n": {"type": "number"},
            "kind": {"enum": ["a", "b"]},
            "on": {"type": "string"},
        },
    },
    derived=["on"],
)


def test_values_that_are_not_in_the_input_are_listed_except_derived_ones():
    rows = [
        example("1", "Anna wants 1,200 pieces", {"who": "anna", "n": 1200, "kind": "a", "on": "2026-01-02"}, "m"),
        example("2", "Anna wants 5", {"who": "Anne", "n": 5, "kind": "b"}, "m"),
        example("3", "Anna wants five", {"who": "Anna", "n": 5}),
    ]
    findings = ungrounded(rows, FORMAT)
    assert {path: [row["where"] for row in entry["rows"]] for path, entry in findings.items()} == {
        "who": ["2"],
        "n": ["3"],
    }
    assert findings["who"]["rows"][0] == {"where": "2", "value": "Anne", "source": "m"}
    assert findings["who"]["share"] == pytest.approx(1 / 3)


def test_of_many_warnings_the_first_are_printed_and_all_are_in_the_report(task, capsys):
    names = [f"f{n}" for n in range(12)]
    rows = [
        {"prompt": f"word{at * 7919}", "completion": json.dumps({n: f"made{at}" if at < 5 + i else f"word{at * 7919}"
         for i, n in enumerate(names)}, separators=(",", ":"))}
        for at in range(60)
    ]  # fmt: skip
    folder = task(rows, near_duplicates=1.0)
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}
    (folder / "schema.json").write_text(json.dumps(schema))
    main(["audit", "-c", "t.yaml", "--model.max_new_tokens", "300"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1:3] for line in printed[1:-1]] == [[f"f{n}:", str(n + 5)] for n in range(11, 2, -1)]
    assert printed[-1] == "warning: 3 more: formtune audit lists all" and len(read(folder)["warnings"]) == 13
    html = (folder / "logs/t/audit/report.html").read_text()
    assert [int(n) for n in re.findall(r'class="warning">f(\d+): ', html)] == [*range(11, -1, -1)]


def test_lengths_are_counted_in_bins_of_equally_many_tokens():
    sizes = {"train": {"prompt": [10, 10, 13, 99], "answer": [5, 5]}, "production": {"prompt": [200], "answer": [0]}}
    prompt, answer = (_histogram(sizes, side) for side in ("prompt", "answer"))
    assert prompt["edges"][:3] == [10, 15, 20] and prompt["edges"][-2] <= 200 < prompt["edges"][-1]
    assert {n: share for n, share in enumerate(prompt["shares"]["train"]) if share} == {0: 0.75, 17: 0.25}
    assert prompt["shares"]["production"] == [0.0] * (len(prompt["edges"]) - 2) + [1.0]
    assert answer == {"edges": [5, 6], "shares": {"train": [1.0]}}


def test_the_words_in_which_production_differs_are_named_with_their_shares():
    texts = [SimpleNamespace(input=f"please send {n} boxes to street {n * 7 % 50}") for n in range(300)]
    assert all(abs(a - b) < 0.1 for a, b in compare_inputs(texts[:150], texts[150:]).values())
    urgent = [SimpleNamespace(input=row.input.replace("please", "Urgent:")) for row in texts[150:]]
    words = compare_inputs(texts[:150], urgent)
    assert {word: words[word] for word in ("please", "urgent")} == {"please": (1, 0), "urgent": (0, 1)}
    assert compare_inputs([], [SimpleNamespace(input="a")]) == {"a": (0, 1)}


class Page(HTMLParser):
    """Collects what a browser would load from elsewhere, and the tags."""

    def __init__(self):
        super().__init__()
        self.outside, self.tags = [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Findings, planted kinds by line, and the split rows of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    for name, rows in datasets().items():
        (folder / f"{name}.jsonl").write_bytes(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )
    options = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["data"]
    options.pop("rows_per_step")
    format = JsonSchema(str(DEMO / "ticket.schema.json"), derived=options.pop("format")["init_args"]["derived"])
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test", "production")}
    before = Path.cwd()
    os.chdir(folder)  # the cache is the working directory's
    try:
        findings, splits = audit(DataSettings(format, tokenizer=str(DEMO / "base"), **(options | files)))
    finally:
        os.chdir(before)
    return findings, {f"{files['train']}:{n}": kind for n, kind in enumerate(planted(), 1)}, splits


@pytest.mark.slow
def test_every_planted_defect_is_detected_and_no_clean_row_is_lost(demo):
    findings, kinds, splits = demo
    reasons_by_place = {row["where"]: row["reason"] for row in findings["quarantine"]}
    table = Counter((kind, reasons_by_place.get(where, "used")) for where, kind in kinds.items())
    # A row and its copy differ only in their place: the first is used. Both rows of a conflict are quarantined.
    for kind, reasons in {
        "leak": {"leak"},
        "conflict": {"conflict"},
        "invisible characters": {"used"},
        "HTML remains": {"used"},
        "stray whitespace": {"format"},
    }.items():
        assert {reason for k, reason in table if k == kind} == reasons, kind
    assert all(reason == "format" for kind, reason in table if kind.startswith("format"))
    copies = sum(n for (_, reason), n in table.items() if reason in ("duplicate", "near_duplicate"))
    assert copies == 60 + 50 - sum(
        n for (kind, reason), n in table.items() if "duplicate" in kind and reason == "conflict"
    )
    assert splits.reasons["leak"] == 25
    # 20 messages contradict others; nothing else that is clean is quarantined, but for the copies.
    lost = Counter(reason for (kind, reason), n in table.items() for _ in range(n) if kind == "" and reason != "used")
    assert set(lost) <= {"conflict", "duplicate", "near_duplicate"}
    assert lost["conflict"] == 20
    messages = {row.where: row.messages for row in splits.quarantine}
    assert all(
        row["other_messages"] for row in findings["quarantine"] if row["reason"] in ("conflict", "duplicate", "leak")
    )
    assert messages and findings["repairs"]["html"] >= 30
    used = [where for where in kinds if where not in reasons_by_place]
    assert len(used) == findings["rows"]["train"]["used"]


@pytest.mark.slow
def test_the_demos_production_inputs_are_longer(demo):
    findings, _, _ = demo
    production, train = findings["lengths"]["production"]["prompt"], findings["lengths"]["train"]["prompt"]
    assert production["P95"] > 1.3 * train["P95"]
    assert findings["production"] and not findings["ungrounded"]


@pytest.mark.slow
def test_the_page_is_self_contained_and_escapes_the_texts_of_rows(demo):
    findings, _, _ = demo
    strange = {
        "where": "f:1",
        "reason": "format",
        "detail": "<script>alert(1)</script>",
        "other": "",
        "other_messages": None,
    }
    text = page(
        findings
        | {"quarantine": [*findings["quarantine"], strange | {"messages": [{"role": "user", "content": "<b>&"}]}]}
    )
    parsed = Page()
    parsed.feed(text)
    assert not parsed.outside and "url(http" not in text
    assert parsed.tags["script"] == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert parsed.tags["details"] >= 5
    assert len(text) < 3_000_000


@pytest.mark.slow
def test_the_page_draws_lengths_labels_and_quarantine_to_scale(demo):
    findings, _, _ = demo
    text = page(findings)
    prompts, answers, *_ = text.split("<svg viewBox=")[1:]
    production = findings["lengths"]["production"]["prompt"]["P95"]
    left, right = (findings["histograms"]["prompt"]["edges"][at] for at in (0, -1))
    at = round(40 + 316 * (production - left) / (right - left), 1)
    assert f'<line class="curve2" x1="{at}" x2="{at}" y1="25" y2="130" stroke-dasharray="4"/>' in prompts
    assert (
        f">■ production P95 {production}</tspan>" in prompts and "limit 1,024 →" in prompts and "limit 256 →" in answers
    )
    shares = findings["histograms"]["answer"]["shares"]["train"]
    heights = [float(h) for h in re.findall(r'<rect class="curve1"[^>]*height="([\d.]+)"', answers.split("</svg>")[0])]
    assert heights == [round(105 * share / max(shares), 1) for share in shares if share]
    most = max(findings["quarantined"].values())
    for reason, count in findings["quarantined"].items():
        width = round(100 * count / most, 1)
        cells = rf'<th scope="row">{reason.replace("_", " ")}</th><td><svg class="bar" aria-hidden="true"><rect class="curve1" '
        assert re.search(rf'{cells}width="{width}%" height="100%"/></svg>\s*</td><td class="n">{count}</td>', text), (
            reason
        )
    for label, count in findings["labels"]["topic"]["train"].items():
        assert re.search(rf'<th scope="row">{label}</th>.*width="[\d.]+%".*\s*</td><td class="n">{count}</td>', text)
    inside = page(findings | {"limit": findings["histograms"]["prompt"]["edges"][-1] + 100}).split("<svg viewBox")[1]
    assert '<line class="limit" x1="356.0" x2="356.0"' in inside and "→" not in inside


@pytest.mark.slow
def test_a_killed_audit_leaves_nothing_half_written(tmp_path, base):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    rows = [pair(n, f"number {n * 7919} of {n * n}") for n in range(4000)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", "formtune", "audit", "--model.base", base, "--data.train", "train.jsonl"]
    words += ["--data.format", "JsonSchema", "--data.format.schema", "schema.json"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob(".cache/encoded/*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.glob("logs/task/audit/*.json"):
        json.loads(path.read_text())
    process = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "verdict: ready" in process.stdout


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda p, c: json.dumps({"prompt": p, "completion": c}).encode(),
                st.text(max_size=20),
                st.sampled_from(['{"n":1,"s":"a"}', '{"n":2,"s":"a"}', '{"s":"a","n":1}', "prose", ""])
                | st.text(max_size=8),
            ),
        ),
        max_size=12,
    )
)
def test_no_row_is_ever_lost_whatever_the_bytes(tmp_path, base, lines):
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    settings = DataSettings(JsonSchema(SCHEMA), str(tmp_path / "train.jsonl"), tokenizer=base, validation=0.2, test=0.2)
    try:
        splits = load_splits(settings)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path}/train.jsonl:")  # the whole file is refused, by its line
        return
    used = [row.where for rows in splits.rows.values() for row in rows]
    places = used + [row.where for row in splits.quarantine]
    assert len(places) == len(set(places)) == splits.read["train"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real rows in ../shared")
@pytest.mark.parametrize(("name", "copies", "conflicts", "leaks"), [("snips", 161, 0, 2), ("wnut17", 91, 11, 0)])
def test_known_defects_of_real_rows_are_detected(tmp_path, monkeypatch, base, name, copies, conflicts, leaks):
    monkeypatch.chdir(tmp_path)
    paths = {file.stem: str(file) for file in (SHARED / "data" / name).glob("*.jsonl")}
    settings = DataSettings(JsonSchema({"type": "object"}), tokenizer=base, bad_rows="drop", **paths)
    splits = load_splits(settings, from_cache=False)
    reasons_by_place = {row.where: row.reason for row in splits.quarantine}
    files = {split: [json.loads(line) for line in Path(path).read_text().splitlines()] for split, path in paths.items()}
    seen, answers, repeated, leaked = set(), {}, [], []
    for number, row in enumerate(files["train"], 1):
        where, pair_ = f"{paths['train']}:{number}", (row["prompt"], row["completion"])
        repeated += [where] if pair_ in seen else []
        seen.add(pair_)
        answers.setdefault(row["prompt"], {}).setdefault(row["completion"], []).append(where)
        leaked += [where] if any(row["prompt"] == r["prompt"] for r in files["validation"]) and not conflicts else []
    assert len(repeated) == copies and all(where in reasons_by_place for where in repeated)
    several = [by_answer for by_answer in answers.values() if len(by_answer) > 1]
    assert len(several) == conflicts
    assert all(
        reasons_by_place[where] == "conflict"
        for by_answer in several
        for places in by_answer.values()
        for where in places
    )
    assert len(leaked) >= leaks and all(reasons_by_place[where] == "leak" for where in leaked)


def test_labels_are_counted_by_split(task):
    rows = [{"prompt": f"row {n} about {n * n}", "completion": "yes" if n % 3 else "no"} for n in range(60)]
    folder = task(rows, format={"class_path": "Labels", "init_args": {"labels": ["yes", "no", "maybe"]}})
    assert main(["audit", "-c", "t.yaml"]) == 0
    counts = read(folder)["labels"]["answer"]
    assert sum(sum(split.values()) for split in counts.values()) == 60 and set(counts["train"]) == {"yes", "no"}
    assert Labels(["yes", "no"]).derived == {""}


def test_one_instruction_above_every_message_leaves_the_shares_as_asked_for(task, capsys):
    pytest.importorskip("formtune.quality.duplicates")
    order = "Read the message and return a JSON object with the keys n and s, and nothing else around the object. " * 4
    words = WORDY[:12]
    rows = [
        pair(n, f"{order}\nMessage: {words[n % 12]} {words[n // 12 % 12]} {words[n * 7 % 11]} number {n * 7919}")
        for n in range(300)
    ]
    folder = task(rows, max_length=1024)
    assert main(["audit", "-c", "t.yaml"]) == 0
    findings = read(folder)
    used = {name: split["used"] for name, split in findings["rows"].items()}
    assert sum(used.values()) == 300 and 200 < used["train"] < 270 and min(used.values()) > 12
    assert 0.8 < findings["shared_text"] < 1
    assert "of the input text is the same in many rows" in capsys.readouterr().out
    assert "of the input text is the same in many rows" in (folder / "logs/t/audit/report.html").read_text()
    task([pair(n, f"{n * n} {words[n % 12]} {n * 7919}") for n in range(60)])
    assert main(["audit", "-c", "t.yaml"]) == 0
    assert read(folder)["shared_text"] == 0 and "the same in many rows" not in capsys.readouterr().out


def test_a_share_far_from_what_was_asked_for_blocks(task):
    pytest.importorskip("formtune.quality.duplicates")
    alike = [pair(n, f"the very same long text as tonight, but for what comes after it: {n}") for n in range(15)]
    folder = task([*(pair(n + 20, f"{n * 7919} and {n * n}") for n in range(30)), *alike])
    assert main(["audit", "-c", "t.yaml"]) == 1
    [line] = read(folder)["blockers"]
    assert line.startswith("data.validation: validation ")
    assert main(["audit", "-c", "t.yaml", "--data.near_duplicates", "1"]) == 0
    splits = Splits(rows={"train": [None] * 130, "validation": [None] * 12, "test": [None] * 257})
    [line] = uneven_fractions(splits, {"validation": 0.1, "test": 0.1})
    assert line.startswith("data.validation: validation 3% instead of 10%, test 64% instead of 10% of 399 rows")
    assert "set data.near_duplicates: 1" in line
    assert not uneven_fractions(splits, {})
    even = Splits(rows={"train": [None] * 330, "validation": [None] * 28, "test": [None] * 42})
    assert not uneven_fractions(even, {"validation": 0.1, "test": 0.1})


def test_every_kind_of_bad_row_has_its_own_line_count_and_remedy(task):
    pytest.importorskip("formtune.quality.duplicates")
    rows = [pair(n, f"{n * 7919} and {n * n}") for n in range(60)]
    rows += [{"prompt": f"fence {n}", "completion": '```\n{"n":1,"s":"a"}\n```'} for n in range(3)]
    rows += [{"prompt": "prose", "completion": "prose"}]
    rows += [{"prompt": f"spaces {n}", "completion": '{"n": 1, "s": "a"}'} for n in range(2)]
    rows += [{"prompt": f"{n} " * 400, "completion": '{"n":1,"s":"a"}'} for n in range(4)]
    rows += [
        {"prompt": f"long {n}", "completion": json.dumps({"n": n, "s": "a" * 130}, separators=(",", ":"))}
        for n in (1, 2)
    ]
    rows += [{"prompt": "bye <|im_end|>", "completion": '{"n":1,"s":"a"}'}]
    folder = task(rows, max_length=500)
    assert main(["audit", "-c", "t.yaml"]) == 1
    lines = read(folder)["blockers"]
    expected = {
        "train.jsonl:61: ": ("(3 such rows); set data.repair_answers: [fence]", "extra_text"),
        "train.jsonl:64: ": ("(1 such rows); fix them", "syntax"),
        "train.jsonl:65: ": ("(2 such rows); set data.repair_answers: [canonical]", "layout"),
        "train.jsonl:67: ": (
            "(4 such rows); shorten them, or use a base with a context of 834 tokens",
            "the limit is 500",
        ),
        "train.jsonl:71: ": ("(2 such rows); set model.max_new_tokens: 145", "the answer has"),
        "train.jsonl:73: ": ("(1 such rows); fix them", "the text contains <|im_end|>"),
    }
    assert len(lines) == len(expected)
    for start, parts in expected.items():
        [line] = [line for line in lines if line.startswith(start)]
        assert all(part in line for part in parts) and line.endswith(parts[0].rpartition("; ")[2])  # 13 of 73: no drop
    assert main(["audit", "-c", "t.yaml", "--data.max_length", "4000"]) == 1  # the base's context is 512
    assert sum("use a base with a context of 834 tokens" in line for line in read(folder)["blockers"]) == 1


def test_an_empty_split_is_one_line_with_the_reason(task, capsys):
    labels = {"class_path": "Labels", "init_args": {"labels": ["yes", "no"]}}
    rows = [{"prompt": f"row {n} about {n * n}", "completion": "yes" if n % 3 else "no"} for n in range(60)]
    folder = task([rows[n] for n in (0, 4, 5, 8, 9)], format=labels)  # their hashes put all of them into train
    assert main(["audit", "-c", "t.yaml"]) == 1
    lines = read(folder)["blockers"]
    assert [line.partition(": ")[0] for line in lines] == ["data.validation", "data.test"]
    assert all(
        line.endswith("(5 read; none quarantined); add rows, or name a file or a larger fraction") for line in lines
    )
    task(rows, format=labels)
    assert main(["audit", "-c", "t.yaml", "--data.test", "0"]) == 1
    [line] = read(folder)["blockers"]
    assert line.startswith("data.test: the split is empty (60 read; none quarantined); add rows, or name a file")
    assert main(["train", "-c", "t.yaml", "--data.test", "0"]) == 2
    assert line in capsys.readouterr().err
    assert main(["audit", "-c", "t.yaml", "--data.validation", "train.jsonl"]) == 1
    [line] = read(folder)["blockers"]
    assert line.startswith(
        "data.train: the split is empty (60 read; 60 leak), such as train.jsonl:1: the input is also"
    )


def test_an_empty_train_split_with_production_is_no_crash(task, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"ask {n}"}) + "\n" for n in range(20)))
    folder = task([pair(n) for n in range(60)], validation="train.jsonl", production="p.jsonl")
    assert main(["audit", "-c", "t.yaml"]) == 1
    assert len(read(folder)["blockers"]) == 1


def test_a_field_that_no_row_of_a_split_has_is_counted_as_none(task, tmp_path):
    format = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "note": {"type": "string"}}}
    (tmp_path / "optional.json").write_text(json.dumps(format))
    for name, texts in (("validation", ("whisper", "granite")), ("test", ("harvest", "meadow"))):
        lines = (json.dumps({"prompt": f"{text} thing", "completion": json.dumps({"note": text})}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    rows = [
        {"prompt": f"row {n * n} {n}", "completion": json.dumps({"kind": "ab"[n % 2], "note": str(n)})}
        for n in range(30)
    ]
    folder = task(
        rows,
        validation="validation.jsonl",
        test="test.jsonl",
        format={"class_path": "JsonSchema", "init_args": {"schema": "optional.json"}},
    )
    assert main(["audit", "-c", "t.yaml"]) == 0
    none = {"a": 0, "b": 0}
    assert read(folder)["labels"]["kind"] == {"train": {"a": 15, "b": 15}, "validation": none, "test": none}
    assert '<th scope="row">b</th>' in (folder / "logs/t/audit/report.html").read_text()
