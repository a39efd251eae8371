"""`formtune preflight`: whether what a task would train can go to production, before it is trained."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.base.folder import context_length
from formtune.base.row import quantile
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

COLORS = {"ok": "green", "warning": "yellow", "fails": "red", "not tried": "yellow"}


class Line(NamedTuple):
    """What a rule or the trial says of one target."""

    target: str
    check: str
    verdict: str  # one of `COLORS`
    detail: str
    versions: str = ""  # that the rule was seen to hold for


def run(command: str, args: list[str]) -> int:
    """Check, print, write `logs/<task>/preflight.json`; 1 if a target that was asked for would fail."""
    warnings.simplefilter("ignore")  # libraries warn of what is tried here and judged by its result
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_class_arguments(Lora, "model.lora")
    parser.add_argument("--model.quantize", type=Literal["4bit"] | None, help="As in training")
    parser.add_argument("--for", type=str, default="merge,vllm", dest="targets", help="What to do with the adapter, of "
                        f"{', '.join(TARGETS)} (default: merge,vllm)")  # fmt: skip
    config, settings = read_task(parser, args, ("base", "max_new_tokens", "lora", "quantize"))
    targets, base = _targets(config.targets), config.model.base
    lora: Lora = parser.instantiate_classes(config).model.lora
    lines = _rule_lines(read_plan(base, lora, config.model.quantize), targets)
    length = _input_tokens(settings, base)
    if merged := [target for target in targets if target in MERGED]:
        lines += _trial_lines(base, lora, length, merged)
    failed = [target for target in targets if any(one.target == target and one.verdict == "fails" for one in lines)]
    path = LOGS / config.task / "preflight.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    checks = [line._asdict() for line in lines]
    write_json(path, {"targets": targets, "failed": failed, "input_tokens": length, "checks": checks})
    _show(lines, targets, failed, path)
    return int(bool(failed))


def _rule_lines(plan: Plan, targets: Sequence[str]) -> list[Line]:
    lines = []
    for target in targets:
        findings = check(plan, [target])
        for rule, line in findings:
            verdict = "fails" if rule.severity == "error" else "warning"
            lines.append(Line(target, rule.name, verdict, line, rule.versions))
        if not findings:
            lines.append(Line(target, "rules", "ok", "no rule applies"))
    return lines


def _trial_lines(base: str, lora: Lora, length: int, targets: Sequence[str]) -> list[Line]:
    """What comes of trying it, for each target that begins with the merged model."""
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(base, lora, length, Path(folder))
        merges, measured = attempt(trial.merged)
        for target in targets:
            if missing := lacking(target):
                lines.append(Line(target, "trial", "not tried", f"{missing}; only the rules were checked"))
            else:
                quantizes = merges and target != "merge"
                passed, detail = attempt(partial(trial.quantized, target)) if quantizes else (merges, measured)
                lines.append(Line(target, "trial", "ok" if passed else "fails", detail))
    return lines


def _input_tokens(settings: DataSettings, base: str) -> int:
    """Tokens of production's inputs at P95; of the training rows' where the task names no production inputs."""
    rows = production_rows(settings)
    if not rows:
        train = settings.sources["train"]
        if train is None:
            raise UserError("data.train: name a file to train on")
        rows = encode_inputs(settings, train, "train")
    return min(quantile([len(row) for row in rows], 95), (context_length(base) or 10**9) - 8)


def _targets(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [f"no target {name!r}; " for name in names if name not in TARGETS]
    if wrong or not names:
        raise UserError(f"--for: {''.join(wrong[:1])}name some of {', '.join(TARGETS)}")
    return [name for name in TARGETS if name in names]


def _show(lines: Sequence[Line], targets: Sequence[str], failed: Sequence[str], path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("target", "check", "verdict", "what", title="Preflight", title_justify="left")
    for line in lines:
        detail = line.detail + (f" ({line.versions})" if line.versions else "")
        table.add_row(line.target, line.check, f"[{COLORS[line.verdict]}]{line.verdict}[/]", escape(detail))
    console.print(table, soft_wrap=False)
    console.print(f"figures: {path}")
    untried = [line.target for line in lines if line.verdict == "not tried"]
    verdict = f"fails for {', '.join(failed)}" if failed else f"no objection to {', '.join(targets)}"
    verdict += f", by the rules alone for {', '.join(untried)}" if untried else ""
    console.print(f"[bold]verdict: {verdict}[/]")
