"""What merging and quantizing a run's adapter costs in answers, as the table in docs/deployment.md.

python benchmarks/quantisation.py logs/demo/RUN

Makes every kind that is not there yet, as `formtune export RUN --as KIND` does; needs the extras `quantize` and `gptq`
for the whole table. What cannot be made or is refused says why.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from formtune.errors import UserError
from formtune.evaluation.outcomes import COMPARED
from formtune.export.exported import KINDS
from formtune.export.exporter import FinishedRun, export
from formtune.export.quantize import folder_name, missing_package

DOCS = Path(__file__).parents[1] / "docs" / "deployment.md"
MARKS = ("<!-- quantisation: begin -->", "<!-- quantisation: end -->")
MAX_LOSS = 0.01
QUANTS = ("q8_0", "q4_k_m")  # of GGUF
SPEEDS = ("tokens_per_second", "constrained_tokens_per_second")
COLUMNS = ("kind", *COMPARED, "weights", "tokens/s", "KL", "top-1")


def table(run: Path) -> str:
    """The rows of all kinds, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    finished = FinishedRun(run)
    for kind, options in [*((kind, {}) for kind in KINDS if kind != "gguf"), *(("gguf", {"quant": q}) for q in QUANTS)]:
        reason, name = missing_package(kind), folder_name(kind, **options)
        if reason is None and (kind == "adapter" or not (run / name).exists()):
            try:
                export(finished, kind, MAX_LOSS, **options)
            except UserError as error:
                reason = str(error).removeprefix(f"--as {kind}: ")
        path = run / "outcomes" / f"{name}.json"
        cells = _cells(name, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else [f"{name}: {reason}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(kind: str, figures: dict[str, Any]) -> list[str]:
    rates = (figures[name] for name in COMPARED)
    closeness = figures["closeness"]
    return [
        kind + (" (refused)" if figures["refused"] else ""),
        *(f"{rate['right'] / rate['rows']:.1%}, +{rate['gained']} -{rate['lost']}" for rate in rates),
        f"{figures['bytes'] / 1e6:,.1f} MB",
        " / ".join(f"{figures[name]:,.0f}" for name in SPEEDS if name in figures),
        f"{closeness['kl']:.1e}", f"{closeness['top1']:.1%}",
    ]  # fmt: skip


def main() -> None:
    """Make the table and put it into the document."""
    text = DOCS.read_text(encoding="utf-8")
    begin, end = map(re.escape, MARKS)
    made = f"{MARKS[0]}\n{table(Path(sys.argv[1]))}\n{MARKS[1]}"
    DOCS.write_text(re.sub(f"{begin}.*{end}", lambda _: made, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
