"""Which confidence tells right answers from wrong ones best: definitions compared on a finished run's test rows.

    python benchmarks/confidence.py logs/demo/RUN [--constrained] [--rows 500] [--out confidence.json]

The run's adapter answers its test rows again, and each definition ranks the same answers. AURC is the mean share of
wrong answers among the k most confident ones, over all k: lower is better, random order gives the share of wrong
answers. Answers with an invalid format come last in every ranking, as they are known to be wrong.
ECE is given where a definition is a probability of the whole answer. Definitions:

- mean probability: the mean over the tokens of the largest softmax probability
- minimum: the probability of the least likely token
- mean log-probability: the logarithm of one over the perplexity
- product: the probability of the whole answer, stop token included; what formtune records
- value product, value minimum: over the tokens of the fields' values alone
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from formtune.constrained.decoder import Grammar
from formtune.data.preparation import load_splits
from formtune.evaluation.outcomes import check_answer
from formtune.formats import Format
from formtune.model.lora import load_base
from formtune.model.micro_batches import choose_micro_batches
from formtune.report.selective import aurc, calibration_error
from formtune.tasks.parsers import read_run

PROBABILITIES = ("product", "value product", "minimum", "value minimum")  # of the whole answer, more or less


def value_tokens(pieces: list[str], text: str, format: Format) -> list[int]:
    """The indices of the tokens that overlap with a field's value; all of them if the format has no fields."""
    spans = [span for path, span in format.value_spans(text).items() if path in format.fields]
    begin = "".join(pieces).find(text)
    ends = list(accumulate(map(len, pieces), initial=-begin))
    inside = [i for i in range(len(pieces)) if any(ends[i] < b and max(ends[i + 1], ends[i] + 1) > a for a, b in spans)]
    return inside or list(range(len(pieces)))


def definitions(logprobs: list[float], values: list[int]) -> dict[str, float]:
    """Every definition's confidence in one answer with a valid format."""
    each, of_values = np.array(logprobs), np.array(logprobs)[values]
    return {
        "mean probability": float(np.exp(each).mean()),
        "minimum": math.exp(each.min()),
        "mean log-probability": float(each.mean()),
        "product": math.exp(each.sum()),
        "value product": math.exp(of_values.sum()),
        "value minimum": math.exp(of_values.min()),
    }


def compared(rows: list[tuple[dict[str, float] | None, bool]]) -> dict[str, Any]:
    """The figures of each definition, from each answer's confidences (None if invalid) and whether it is right."""
    names = next((sure for sure, _ in rows if sure), {})
    figures: dict[str, Any] = {}
    for name in names:
        ranked = [(sure[name] if sure else -math.inf, right) for sure, right in rows]
        figures[name] = {"aurc": aurc(ranked)}
        if name in PROBABILITIES:
            figures[name]["ece"] = calibration_error([(max(value, 0.0), right) for value, right in ranked])
    figures["a perfect order"] = {"aurc": aurc([(float(right), right) for _, right in rows])}
    figures["random order"] = {"aurc": sum(not right for _, right in rows) / len(rows)}
    return figures


def answered(run: Path, limit: int | None, constrained: bool, tokens: int) -> list[tuple[Any, bool]]:
    """What `compared` takes, for the run's test rows."""
    task, settings = read_run(run)
    rows = load_splits(settings).rows["test"][:limit]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(task.model.base, torch.float32, None, device).to(device)
    micro_batches = choose_micro_batches(PeftModel.from_pretrained(base, run / "adapter").eval())
    limits = [min(settings.max_new_tokens, settings.limit - len(row.prompt_ids)) for row in rows]
    grammar = Grammar(settings.format, settings.renderer) if constrained else None
    split = micro_batches.split(rows, tokens, max(limits))
    decoded = micro_batches.decode(rows, split, settings.renderer.stop_ids, limits, grammar)
    result: list[tuple[Any, bool]] = []
    for row, one in zip(rows, decoded, strict=True):
        answer = check_answer(row, one, settings.renderer, settings.format)
        sure = None
        if answer.exact:
            own = settings.format.of_row(row.schema)
            sure = definitions(one.logprobs, value_tokens(settings.renderer.pieces(one.ids), answer.answer, own))
        result.append((sure, answer.joint))
    return result


def main() -> None:
    """Print a table, and write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--rows", type=int, help="test rows at most")
    parser.add_argument("--constrained", action="store_true", help="decode so")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a micro-batch, answers included")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = answered(args.run, args.rows, args.constrained, args.tokens)
    figures = compared(rows)
    print(f"{len(rows)} answers, {sum(right for _, right in rows)} right, {sum(not sure for sure, _ in rows)} invalid")
    print("| confidence | AURC | ECE |\n|---|---|---|")
    for name, figure in sorted(figures.items(), key=lambda item: item[1]["aurc"]):
        print(f"| {name} | {figure['aurc']:.4f} | {figure['ece']:.1%} |" if "ece" in figure
              else f"| {name} | {figure['aurc']:.4f} | |")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"rows": len(rows), "metrics": figures, "each": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
