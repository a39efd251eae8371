"""What becomes of the demo's planted defects, by kind, as a table: docs/benchmarks/planted.md.

    python planted.py

The demo's training rows are messy on purpose, and its generator says what it did to each row.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from formtune.data.preparation import load_splits
from formtune.data.settings import DataSettings
from formtune.formats import JsonSchema

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from demo_rows import datasets, planted

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the table."""
    options = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))["data"]
    options.pop("rows_per_step")
    format = JsonSchema(**options.pop("format")["init_args"])
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}.jsonl" for name in ("train", "validation", "test", "production")}
        for name, path in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in datasets()[name])
            Path(path).write_text("".join(lines), encoding="utf-8")
        splits = load_splits(DataSettings(format, tokenizer=str(ROOT / "src/formtune/demo/base"), **(options | files)))
        aside = {row.where: row.reason for row in splits.quarantine}
        table = Counter((kind, aside.get(f"{files['train']}:{n}", "used")) for n, kind in enumerate(planted(), 1))
    lines = [
        "# The demo's planted defects",
        "",
        "Written by `python benchmarks/planted.py`. Of a row and its copy, the first in the file is used, so an "
        "original can be dropped",
        "and its copy kept. Both rows of a conflict are dropped.",
        "",
        "| planted | rows | result |",
        "|---|---|---|",
    ]
    for kind in sorted({kind for kind, _ in table}):
        counts = {reason: count for (k, reason), count in table.items() if k == kind}
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])
        )
        lines.append(f"| {kind or 'nothing'} | {sum(counts.values()):,} | {reasons} |")
    (ROOT / "docs/benchmarks/planted.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
