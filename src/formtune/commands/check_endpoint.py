"""`formtune check-endpoint`: send the test rows to a server; judge its answers as the model's were."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from rich.console import Console

from formtune.base.row import Row
from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.configuration.terminal import shown
from formtune.data.blockers import check_rows
from formtune.data.preparation import load_splits
from formtune.deploy.endpoint import Endpoint, Reply
from formtune.errors import UserError
from formtune.evaluation.comparison import figures, figures_table
from formtune.evaluation.outcomes import Outcome, confidence, outcome, worst_first, write_outcomes
from formtune.evaluation.selective import aurc, calibration_error, judged
from formtune.files import LOGS, write_json
from formtune.formats import KINDS, Format
from formtune.formats.json_schema import JsonSchema

WORST = 3  # answers that are printed


def run(command: str, args: list[str]) -> int:
    """Ask, judge, print, write `logs/<task>/endpoint/`; 1 if fewer answers than `--min_exact` have a valid format."""
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_argument("url", type=str, help="Base URL, such as http://127.0.0.1:8000/v1; the API key, if "
                        "needed, is read from OPENAI_API_KEY")  # fmt: skip
    parser.add_argument("--served_model", type=str | None, help="Name of the model to ask for (default: the task's, as "
                        "formtune serve calls it)")  # fmt: skip
    parser.add_argument("--at_once", type=PositiveInt, default=4, help="Concurrent requests")
    parser.add_argument("--min_exact", type=ClosedUnitInterval, default=0.0, help="Exit with code 1 if the "
                        "share of answers with a valid format is lower")  # fmt: skip
    parser.add_argument("--constrained", type=bool, default=False, help="Send the schema as response_format, for "
                        "constrained decoding by the server")  # fmt: skip
    config, settings = read_task(parser, args)
    folder = LOGS / config.task / "endpoint"
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder}: is a training run, whose answers would be overwritten; rename the folder")
    if not settings.renderer.templated:
        raise UserError(f"check-endpoint asks for chat completions, and {settings.renderer.note}")
    if settings.renderer.replaced:
        print(f"warning: {settings.renderer.note}", flush=True)
    splits = load_splits(settings)
    check_rows(settings, splits)
    rows = [replace(row, messages=settings.renderer.turns(row.messages)) for row in splits.rows["test"]]
    schemas: list[Any] = [None] * len(rows)
    if config.constrained:
        inner = settings.format.inner or settings.format
        if not isinstance(inner, JsonSchema):
            kind = type(settings.format).__name__
            raise UserError(f"--constrained: a server needs a JSON Schema, but data.format is {kind}")
        schemas = [json.loads(row.schema) if row.schema else inner.schema for row in rows]
    endpoint = Endpoint(config.url, config.served_model or config.task, settings.max_new_tokens, settings.renderer)
    endpoint.open(rows[0], schemas[0])
    started, pool = time.perf_counter(), ThreadPoolExecutor(config.at_once)
    try:
        replies = list(shown(pool.map(endpoint.ask, rows, schemas), len(rows), "asking"))
    finally:
        pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - started
    outcomes = [_judge(row, reply, settings.format) for row, reply in zip(rows, replies, strict=True)]
    rated = judged(outcomes)
    kinds = Counter(outcome.kind for outcome in outcomes)
    latencies = [reply.seconds for reply in replies]
    result = {
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "data": splits.key,
        "rows": len(outcomes),
        "prompts": "same tokens" if endpoint.ids else "same number of tokens",
        "figures": figures(outcomes),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "confidence": {"aurc": aurc(rated), "calibration_error": calibration_error(rated)} if rated else None,
        "at_once": config.at_once,
        "latency_s": {f"P{percent}": float(np.percentile(latencies, percent)) for percent in (50, 95)},
        "requests_per_s": len(replies) / seconds,
        "tokens_per_s": sum(reply.count for reply in replies) / seconds,
        "constrained": config.constrained,
    }
    write_outcomes(folder / "outcomes" / "after.jsonl", outcomes)
    write_json(folder / "endpoint.json", result)
    _show(result, outcomes)
    print(f"answers: {folder / 'outcomes/after.jsonl'} (formtune compare RUN {folder})")
    exact = result["figures"]["format/exact"]["value"]
    if exact < config.min_exact:
        print(f"format/exact {exact:.1%} is below --min_exact {config.min_exact:.1%}")
    return int(exact < config.min_exact)


def _judge(row: Row, reply: Reply, format: Format) -> Outcome:
    own = format.of_row(row.schema)
    verdict = own.check(reply.text, finished=reply.finished, target=row.target, input=row.context)
    sure = confidence(**reply.tokens, answer=reply.text, verdict=verdict, format=own) if reply.tokens else None
    return outcome(row, reply.text, verdict, own, sure)


def _show(result: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    runs = [{"name": result["model"], "figures": result["figures"]}]
    Console().print(figures_table(f"Served model, on {result['rows']:,} test rows", runs, [{}]))
    print(f"prompts: {result['prompts']} as formtune's in every row")
    print("kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in result["kinds"].items()))
    confidence = "the server gives no log-probabilities"
    if sure := result["confidence"]:
        confidence = f"AURC {sure['aurc']:.4f}, expected calibration error {sure['calibration_error']:.1%}"
    print(f"confidence: {confidence}")
    latency = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["latency_s"].items())
    speed = f"{result['requests_per_s']:.2f} requests/s, {result['tokens_per_s']:.0f} tokens/s"
    print(f"latency with {result['at_once']} at once: {latency}; {speed}")
    for failed in worst_first(outcomes)[:WORST]:
        print(f"{failed.where}: {failed.kind}: {failed.detail}\n  target {failed.target!r}\n  answer {failed.answer!r}")
