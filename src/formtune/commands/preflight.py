"""`formtune preflight`: whether what a task would train can go to production, found out before it is trained."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.base.folder import context_length
from formtune.base.row import quantile
from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.data.preparation import Preparation
from formtune.errors import UserError
from formtune.export.fresh_process import Maker, find_maker, lacking
from formtune.export.plan import Plan, plan, skeleton
from formtune.export.rules import MERGED, TARGETS, check, refuse
from formtune.export.trial import Trial, attempt
from formtune.files import LOGS, write_json
from formtune.model.lora import Lora, lora_config

COLORS = {"ok": "green", "warning": "yellow", "fails": "red", "not tried": "yellow"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the verdict.

    Args:
        target: The way to production.
        check: Name of the rule, or `trial`.
        verdict: What came out.
        detail: Why, with the remedy, or what was measured.
        versions: What a rule was established for; empty for a trial, which is of today.
    """

    target: str
    check: str
    verdict: Literal["ok", "warning", "fails", "not tried"]
    detail: str
    versions: str = ""


def run(command: str, args: list[str]) -> int:
    """Check, print, write `logs/<task>/preflight.json`; 1 if a target that was asked for would fail.

    Raises:
        UserError: A mistake in the configuration or in the command line.
    """
    warnings.simplefilter("ignore")  # libraries warn of what is tried here and judged by its result
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_class_arguments(Lora, "model.lora")
    parser.add_argument("--model.quantize", type=Literal["4bit"] | None, help="As in training")
    parser.add_argument(
        "--for", type=str, default="merge,vllm", dest="targets",
        help=f"What is to be done with the adapter, of {', '.join(TARGETS)} (default: merge,vllm)",
    )  # fmt: skip
    parser.add_argument(
        "--interpreter", type=str | None, metavar="PATH",
        help="Python of an environment that has llm-compressor or GPTQModel, for gptq and awq (default: this one, with "
        "GPTQModel)",
    )  # fmt: skip
    config, preparation = read_task(parser, args, ("base", "max_new_tokens", "lora", "quantize"))
    targets = _targets(config.targets)
    maker = find_maker(config.interpreter, targets)
    lora: Lora = parser.instantiate_classes(config).model.lora
    lines = rule_lines(read_plan(config.model.base, lora, config.model.quantize), targets)
    length = longest_input(preparation, config.model.base)
    lines += trial_lines(config.model.base, lora, length, targets, maker)
    folder = LOGS / config.task
    failed = [target for target in targets if any(one.target == target and one.verdict == "fails" for one in lines)]
    folder.mkdir(parents=True, exist_ok=True)
    found = {"targets": targets, "failed": failed, "input_tokens": length, "checks": [asdict(line) for line in lines]}
    write_json(folder / "preflight.json", found)
    _show(lines, targets, failed, folder / "preflight.json")
    return int(bool(failed))


def read_plan(base: str, lora: Lora, quantize: str | None) -> Plan:
    """What the rules look at, of a task.

    Raises:
        UserError: The base or a target is not there.
    """
    model = skeleton(base)
    return plan(model, lora_config(model, lora), bool(quantize))


def before_training(base: str, lora: Lora, quantize: str | None) -> list[str]:
    """What to know of a task that is about to be trained, a line each: what a merge will need, what vLLM will refuse.

    Raises:
        UserError: It would merge into another model, or not at all.
    """
    found = read_plan(base, lora, quantize)
    warnings = refuse(found, ["merge"])
    vllm = [finding for finding in check(found, ["vllm"]) if finding.rule.severity == "error"]
    return [finding.line for finding in (*warnings, *vllm)]


def rule_lines(found: Plan, targets: Sequence[str]) -> list[Line]:
    """What the rules say, or that they find nothing, for each target."""
    lines = []
    for target in targets:
        findings = check(found, [target])
        for one in findings:
            verdict: Literal["fails", "warning"] = "fails" if one.rule.severity == "error" else "warning"
            lines.append(Line(target, one.rule.name, verdict, one.line, one.rule.versions))
        if not findings:
            lines.append(Line(target, "rules", "ok", "no rule applies"))
    return lines


def trial_lines(base: str, lora: Lora, length: int, targets: Sequence[str], maker: Maker) -> list[Line]:
    """What comes out of trying it, for each target that begins with the merged model."""
    lines: list[Line] = []
    merged = [target for target in targets if target in MERGED]
    if not merged:
        return lines
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(base, lora, length, Path(folder))
        went, detail = attempt(trial.merged)
        for target in merged:
            if missing := lacking(target, maker):
                lines.append(Line(target, "trial", "not tried", f"{missing}; the rules alone speak for it"))
                continue
            good, said = went, detail
            if went and target != "merge":
                good, said = attempt(partial(trial.quantized, target, maker))
            lines.append(Line(target, "trial", "ok" if good else "fails", said))
    return lines


def longest_input(preparation: Preparation, base: str) -> int:
    """Tokens of production's inputs at P95, of the training rows' where the task names no file of production's."""
    rows = preparation.production_rows
    if not rows:
        train = preparation.sources[0]
        if train is None:
            raise UserError("data.train: name a file to train on")
        rows = preparation.encode_inputs(train, "train")
    return min(quantile([len(row) for row in rows], 95), (context_length(base) or 10**9) - 8)


def _targets(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TARGETS:
            raise UserError(f"--for: no target {name!r}; there are {', '.join(TARGETS)}")
    if not names:
        raise UserError(f"--for: name some of {', '.join(TARGETS)}")
    return [name for name in TARGETS if name in names]


def _show(lines: Sequence[Line], targets: Sequence[str], failed: Sequence[str], path: Path) -> None:
    console = Console()
    table = Table("target", "check", "verdict", "what", title="Preflight", title_justify="left")
    for line in lines:
        known = f" ({line.versions})" if line.versions else ""
        table.add_row(
            line.target, line.check, f"[{COLORS[line.verdict]}]{line.verdict}[/]", escape(line.detail + known)
        )
    console.print(table)
    rest = [name for name in TARGETS if name not in targets]
    if rest:
        console.print(f"not asked for: {', '.join(rest)} (--for {','.join(TARGETS)})", highlight=False, soft_wrap=True)
    console.print(f"figures: {path}", highlight=False, soft_wrap=True)
    untried = [line.target for line in lines if line.verdict == "not tried"]
    verdict = f"fails for {', '.join(failed)}" if failed else f"nothing stands against {', '.join(targets)}"
    verdict += f", by the rules alone for {', '.join(untried)}" if untried else ""
    console.print(f"[bold]verdict: {verdict}[/]", highlight=False, soft_wrap=True)
