"""`formtune check-endpoint`: the test rows, asked of what is served, judged by the contract that judged the model."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from rich.console import Console

from formtune.base.row import Row
from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.data.progress import shown
from formtune.deploy.endpoint import Endpoint, Reply
from formtune.errors import UserError
from formtune.evaluation.comparison import figures, figures_table
from formtune.evaluation.outcomes import Outcome, outcome, write_outcomes
from formtune.evaluation.statistics import quantile_interval
from formtune.files import LOGS, write_json
from formtune.formats import KINDS, Format

WORST = 3  # answers that are printed


def run(command: str, args: list[str]) -> int:
    """Ask, judge, print, write `logs/<task>/<run>/`; 1 if fewer answers than `--min_exact` are in format.

    Raises:
        UserError: A mistake in the configuration, a server that does not answer, or one that renders another prompt.
    """
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_argument("url", type=str, help="Base URL, such as http://127.0.0.1:8000/v1; the key, where one is "
                        "needed, is read from OPENAI_API_KEY")  # fmt: skip
    parser.add_argument("--served_model", type=str | None, help="Name of the model to ask for (default: the task's, as "
                        "formtune serve calls it)")  # fmt: skip
    parser.add_argument("--rows", type=PositiveInt | None, help="Test rows to ask, drawn at random and the same each "
                        "time (default: all, as formtune compare needs them)")  # fmt: skip
    parser.add_argument("--at_once", type=PositiveInt, default=4, help="Requests at the same time")
    parser.add_argument("--min_exact", type=ClosedUnitInterval, default=0.0, help="Share of answers in format below "
                        "which the exit code is 1")  # fmt: skip
    parser.add_argument("--run", type=str, default="endpoint", help="Name of the folder to write in logs/<task>/")
    config, preparation = read_task(parser, args)
    folder = LOGS / config.task / config.run
    if (folder / "checkpoints").exists():
        raise UserError(f"--run: {folder} holds a training run; choose another name")
    splits = preparation.split()
    preparation.check(splits)
    rows = splits.rows["test"]
    if config.rows and config.rows < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), config.rows))]
    endpoint = Endpoint(config.url, config.served_model or config.task, preparation.max_new_tokens, preparation.date)
    replies, seconds = ask_all(endpoint, rows, config.at_once)
    outcomes = [judge(row, reply, preparation.format) for row, reply in zip(rows, replies, strict=True)]
    if all(not reply.text for reply in replies):
        raise UserError(f"{config.url}: every answer is empty; is {endpoint.model} the tuned model?")
    found = findings(endpoint, outcomes, replies, seconds, config.at_once) | {"data": splits.key}
    write_outcomes(folder / "outcomes" / "after.jsonl", outcomes)
    write_json(folder / "endpoint.json", found)
    print_findings(found, outcomes, folder)
    reached = found["figures"]["format/exact"]["value"]
    if reached < config.min_exact:
        print(f"format/exact {reached:.1%} is below --min_exact {config.min_exact:.1%}")
    return int(reached < config.min_exact)


def ask_all(endpoint: Endpoint, rows: Sequence[Row], at_once: int) -> tuple[list[Reply], float]:
    """Every row's reply, and the seconds that all took together.

    Raises:
        UserError: As in `Endpoint.ask`.
    """
    endpoint.open(rows[0])
    pool = ThreadPoolExecutor(at_once)
    try:
        started = time.perf_counter()
        replies = list(shown(pool.map(endpoint.ask, rows), len(rows), "asking"))
        return replies, time.perf_counter() - started
    finally:
        pool.shutdown(cancel_futures=True)


def judge(row: Row, reply: Reply, contract: Format) -> Outcome:
    """The row's outcome, as an evaluation of the run makes it."""
    verdict = contract.check(reply.text, finished=reply.finished, gold=row.gold, source=row.source)
    return outcome(row, reply.text, verdict, contract)


def findings(
    endpoint: Endpoint, outcomes: Sequence[Outcome], replies: Sequence[Reply], seconds: float, at_once: int
) -> dict[str, Any]:
    """All figures with their intervals, as `endpoint.json` holds them."""
    times = [reply.seconds for reply in replies]
    tokens = [reply.tokens for reply in replies if reply.tokens is not None]
    kinds = Counter(one.kind for one in outcomes)
    return {
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "rows": len(outcomes),
        "prompts": "same tokens" if endpoint.gives_ids else "same number of tokens",
        "figures": figures(outcomes),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "at_once": at_once,
        "latency_s": {
            f"P{percent}": {
                "value": float(np.percentile(times, percent)), "interval": quantile_interval(times, percent),
            }
            for percent in (50, 95)
        },
        "requests_per_s": len(replies) / seconds,
        "tokens_per_s": sum(tokens) / seconds if len(tokens) == len(replies) else None,
    }  # fmt: skip


def print_findings(found: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> None:
    """One table, a line on each other thing, and the worst answers beside their targets."""
    console = Console()
    title = f"What is served, on {found['rows']:,} test rows"
    console.print(figures_table(title, [{"name": found["model"], "figures": found["figures"]}], [{}]))
    latency = ", ".join(
        f"{name} {one['value']:.2f} s ({one['interval'][0]:.2f} to {one['interval'][1]:.2f})"
        for name, one in found["latency_s"].items()
    )
    speed = f"{found['requests_per_s']:.2f} requests/s"
    if found["tokens_per_s"] is not None:
        speed += f", {found['tokens_per_s']:.1f} tokens/s"
    lines = [
        f"prompts: {found['prompts']} as formtune's in every row",
        "kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in found["kinds"].items()),
        f"latency with {found['at_once']} at once: {latency}; {speed}",
    ]
    failed = sorted((one for one in outcomes if one.kind != "ok"), key=lambda one: KINDS.index(one.kind))
    for one in failed[:WORST]:
        lines += [f"{one.where}: {one.kind}: {one.detail}", f"  target {one.target!r}", f"  answer {one.answer!r}"]
    lines.append(f"answers: {folder / 'outcomes/after.jsonl'} (formtune compare RUN {folder})")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
