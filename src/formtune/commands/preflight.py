"""`formtune preflight`: whether what a task would train can go to production, before it is trained."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.base.folder import context_length
from formtune.base.row import Row, quantile
from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.data.preparation import encode_inputs, production_rows
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.export.quantize import lacking
from formtune.export.rules import MERGED, TARGETS, Plan, check, read_plan
from formtune.export.trial import Trial, attempt
from formtune.files import LOGS, write_json
from formtune.model.lora import Lora

RENDERED = 16  # prompts that llama.cpp must render as training does
COLORS = {"ok": "green", "warning": "yellow", "fails": "red", "not tried": "yellow"}


def run(command: str, args: list[str]) -> int:
    """Check, print, write `logs/<task>/preflight.json`; 1 if a target that was asked for would fail."""
    warnings.simplefilter("ignore")  # libraries warn of what is tried here and judged by its result
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_class_arguments(Lora, "model.lora")
    parser.add_argument("--model.quantize", type=Literal["4bit"] | None, help="As in training")
    parser.add_argument("--for", type=str, default="merge,vllm", dest="targets", help="What to do with the adapter, of "
                        f"{', '.join(TARGETS)} (default: merge,vllm)")  # fmt: skip
    config, settings = read_task(parser, args)
    targets, base = _targets(config.targets), config.model.base
    lora: Lora = parser.instantiate_classes(config).model.lora
    plan, prompts = read_plan(base, lora, config.model.quantize), _prompts(settings)
    length = min(quantile([len(row) for row in prompts], 95), (context_length(base) or 10**9) - 8)
    short = sorted((row for row in prompts if len(row) <= length), key=len, reverse=True)
    rendered = short[:RENDERED] if "gguf" in targets else []
    checks = [*_rules(plan, targets), *_trials(targets, base, lora, length, rendered)]
    if settings.renderer.note and "vllm" in targets:
        checks.append(_check("vllm", "chat template", "warning", settings.renderer.note))
    failed = [name for name in targets if any(it["target"] == name and it["verdict"] == "fails" for it in checks)]
    path = LOGS / config.task / "preflight.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"targets": targets, "failed": failed, "input_tokens": length, "checks": checks})
    _print_checks(checks, targets, failed, path)
    return int(bool(failed))


def _check(target: str, name: str, verdict: str, detail: str) -> dict[str, str]:
    return {"target": target, "check": name, "verdict": verdict, "detail": detail}


def _targets(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [f"no target {name!r}; " for name in names if name not in TARGETS]
    if unknown or not names:
        raise UserError(f"--for: {''.join(unknown[:1])}name some of {', '.join(TARGETS)}")
    return [name for name in TARGETS if name in names]


def _prompts(settings: DataSettings) -> list[Row]:
    """Production's inputs; the training rows' if the task names none."""
    if rows := production_rows(settings):
        return rows
    if settings.sources["train"] is None:
        raise UserError("data.train: name a file to train on")
    return encode_inputs(settings, settings.sources["train"], "train")


def _rules(plan: Plan, targets: Sequence[str]) -> Iterator[dict[str, str]]:
    for target in targets:
        findings = check(plan, [target])
        for rule, line in findings:
            verdict = "fails" if rule.severity == "error" else "warning"
            yield _check(target, rule.name, verdict, f"{line} ({rule.versions})")
        if not findings:
            yield _check(target, "rules", "ok", "no rule applies")


def _trials(
    targets: Sequence[str], base: str, lora: Lora, length: int, rendered: Sequence[Row]
) -> Iterator[dict[str, str]]:
    """Try each target that begins with the merged model."""
    targets = [target for target in targets if target in MERGED]
    if not targets:
        return
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(base, lora, length, Path(folder), rendered)
        merges, merged = attempt(trial.merged)
        for target in targets:
            if missing := lacking(target):
                yield _check(target, "trial", "not tried", f"{missing}; only the rules were checked")
                continue
            quantizes = merges and target != "merge"
            passed, detail = attempt(partial(trial.quantized, target)) if quantizes else (merges, merged)
            yield _check(target, "trial", "ok" if passed else "fails", detail)


def _print_checks(checks: Sequence[dict[str, str]], targets: Sequence[str], failed: Sequence[str], path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("target", "check", "verdict", "detail", title="Preflight", title_justify="left")
    for it in checks:
        verdict = f"[{COLORS[it['verdict']]}]{it['verdict']}[/]"
        table.add_row(it["target"], it["check"], verdict, escape(it["detail"]))
    console.print(table, soft_wrap=False)
    console.print(f"figures: {path}")
    untried = [it["target"] for it in checks if it["verdict"] == "not tried"]
    verdict = f"fails for {', '.join(failed)}" if failed else f"no objection to {', '.join(targets)}"
    verdict += f", by the rules alone for {', '.join(untried)}" if untried else ""
    console.print(f"[bold]verdict: {verdict}[/]")
