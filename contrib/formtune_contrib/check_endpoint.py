"""`formtune check-endpoint`: send the test rows to a server; check its answers as in evaluation."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from rich.console import Console

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.commands import COMMANDS
from formtune.configuration.terminal import progress
from formtune.data.blockers import check_rows
from formtune.data.preparation import load_splits, sample
from formtune.errors import UserError
from formtune.evaluation.outcomes import Outcome, confidence, confidences, outcome, worst_first, write_outcomes
from formtune.files import LOGS, write_json
from formtune.formats import KINDS, Format
from formtune.formats.json_schema import JsonSchema
from formtune.report.comparison import metrics_of, metrics_table
from formtune.report.selective import aurc, calibration_error
from formtune.tasks.parsers import read_task, task_parser
from formtune_contrib.endpoint import Endpoint


def run(command: str, args: list[str]) -> int:
    """Ask, check, print, write `logs/<task>/endpoint/`; 1 if fewer answers than `--min_exact` have a valid format."""
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_argument("url", type=str, help="Such as http://127.0.0.1:8000/v1; the API key is in OPENAI_API_KEY")
    parser.add_argument("--served_model", type=str | None, help="Name of the model (default: the task's)")
    parser.add_argument("--concurrency", type=PositiveInt, default=4, help="Concurrent requests")
    parser.add_argument("--min_exact", type=ClosedUnitInterval, default=0.0, help="Exit 1 if format/exact is lower")
    parser.add_argument("--constrained", type=bool, default=False, help="Send the schema for constrained decoding")
    config, settings = read_task(parser, args)
    folder, renderer, format = LOGS / config.task / "endpoint", settings.renderer, settings.format
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder}: a training run; its answers would be overwritten; rename the folder")
    if not renderer.templated:
        raise UserError(f"check-endpoint asks for chat completions, and {renderer.note}")
    if renderer.replaced:
        print(f"warning: {renderer.note}", flush=True)
    splits = load_splits(settings)
    check_rows(settings, splits)
    tested = sample(splits.rows["test"], settings.max_evaluation_rows)
    rows = [replace(row, messages=renderer.turns(row.messages)) for row in tested]
    schemas: list[Any] = [None] * len(rows)
    if config.constrained:
        inner: Any = format.inner or format
        if not isinstance(inner, JsonSchema):
            raise UserError(f"--constrained: a server needs a JSON Schema, but data.format is {type(format).__name__}")
        schemas = [inner.of_row(row.schema).schema for row in rows]  # type: ignore[attr-defined]
    endpoint = Endpoint(config.url, config.served_model or config.task, settings.max_new_tokens, renderer)
    endpoint.open(rows[0], schemas[0])
    started, pool = time.perf_counter(), ThreadPoolExecutor(config.concurrency)
    try:
        replies = list(progress(pool.map(endpoint.ask, rows, schemas), len(rows), "asking"))
    finally:
        pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - started
    choices, sizes, latencies = zip(*replies, strict=True)
    outcomes = [_check(row, choice, format, renderer) for row, choice in zip(rows, choices, strict=True)]
    rated, kinds = confidences(outcomes), Counter(outcome.kind for outcome in outcomes)
    result = {
        "endpoint": endpoint.url, "model": endpoint.model, "data": splits.key, "rows": len(outcomes),
        "concurrency": config.concurrency, "constrained": config.constrained,
        "prompts": "same tokens" if endpoint.ids else "same number of tokens",
        "metrics": metrics_of(outcomes),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "confidence": {"aurc": aurc(rated), "calibration_error": calibration_error(rated)} if rated else None,
        "latency_s": {f"P{p}": float(np.percentile(latencies, p)) for p in (50, 95)},
        "requests_per_s": len(replies) / seconds,
        "tokens_per_s": sum(sizes) / seconds,
    }  # fmt: skip
    write_outcomes(folder / "outcomes" / "after.jsonl", outcomes)
    write_json(folder / "endpoint.json", result)
    title, column = f"Served model, on {len(rows):,} test rows", {"name": endpoint.model, "metrics": result["metrics"]}
    Console().print(metrics_table(title, [column]))
    print(f"prompts: {result['prompts']} as formtune's in every row")
    print("kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in result["kinds"].items()))
    quality = "AURC {aurc:.4f}, expected calibration error {calibration_error:.1%}"
    print(f"confidence: {quality.format(**result['confidence']) if rated else 'the server gives no log-probabilities'}")
    speed = "P50 {P50:.2f} s, P95 {P95:.2f} s".format(**result["latency_s"])
    speed += f"; {result['requests_per_s']:.2f} requests/s, {result['tokens_per_s']:.0f} tokens/s"
    print(f"latency with concurrency {config.concurrency}: {speed}")
    for failed in worst_first(outcomes)[:3]:
        print(f"{failed.where}: {failed.kind}: {failed.detail}\n  target {failed.target!r}\n  answer {failed.answer!r}")
    print(f"answers: {folder / 'outcomes/after.jsonl'} (formtune compare RUN {folder})")
    exact = result["metrics"]["format/exact"]["value"]
    if exact < config.min_exact:
        print(f"format/exact {exact:.1%} is below --min_exact {config.min_exact:.1%}")
    return int(exact < config.min_exact)


def _check(row: Row, choice: Any, format: Format, renderer: Renderer) -> Outcome:
    row_format, text = format.of_row(row.schema), (choice.message.content or "").removeprefix(renderer.lead)
    verdict = row_format.check(text, finished=choice.finish_reason != "length", target=row.target)
    tokens = getattr(choice.logprobs, "content", None) or []
    texts, logprobs = [token.token for token in tokens], [token.logprob for token in tokens]
    confidences = confidence(texts, logprobs, text, verdict, row_format) if texts else None
    return outcome(row, text, verdict, row_format, confidences)
