"""A finished run's folder, with the test rows that its adapter is to be judged by again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from formtune.base.folder import context_length
from formtune.base.renderer import Renderer
from formtune.base.row import Row, quantile
from formtune.configuration.task import read_task, task_parser
from formtune.configuration.yaml_file import check_yaml
from formtune.errors import UserError
from formtune.evaluation.outcomes import Outcome, outcome, read_outcomes
from formtune.formats import Format
from formtune.training.manifest import base_files, verify

COMPARED, CALIBRATION = 32, 128  # rows


@dataclass(frozen=True, slots=True)
class Finished:
    """What an export needs of a run.

    Args:
        folder: The run's folder.
        base: Folder or hub id of the base, as configured.
        quantize: How the base was quantised in training.
        manifest: Of the adapter.
        contract: Judges the answers.
        test: The test rows that the run was judged by.
        outcomes: What became of each of them in the run; decoded under a grammar there, as the adapter was measured.
        grammar: Whether they were decoded under a grammar, and the adapter has not been measured without yet.
        compared: Token ids to compare logits on: test rows of all lengths, and an input as long as production's P95.
        calibration: Token ids of training rows.
        timed: A prompt of that length.
        max_new_tokens: Tokens that an answer may have.
    """

    folder: Path
    base: str
    quantize: str | None
    manifest: dict[str, Any]
    contract: Format
    test: list[Row]
    outcomes: list[Outcome]
    grammar: bool
    compared: list[list[int]]
    calibration: list[list[int]]
    timed: list[int]
    max_new_tokens: int

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.folder / "adapter"

    @property
    def limits(self) -> list[int]:
        """Tokens that the answer to each test row may have."""
        context = context_length(self.base) or 10**9
        return [min(self.max_new_tokens, context - len(row.prompt)) for row in self.test]

    def judge(self, answers: Sequence[Sequence[int]]) -> list[Outcome]:
        """What becomes of the test rows with these answers, in token ids."""
        renderer, found = Renderer.load(self.base), []
        for row, ids in zip(self.test, answers, strict=True):
            text, finished = renderer.answer(ids)
            verdict = self.contract.check(text, finished=finished, gold=row.gold, source=row.source)
            found.append(outcome(row, text, verdict, self.contract))
        return found


def read_run(folder: Path) -> Finished:
    """Read a run, and show that adapter, base and rows are the ones that it was judged with.

    Raises:
        UserError: A file is missing or damaged, or one of them is another than it was.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: No such file; name the folder of a finished run, such as logs/demo/RUN")
    check_yaml(str(config))
    parser = task_parser("export")
    parser.add_argument("--model.quantize", type=Literal["4bit"] | None)
    parser.add_argument("--model.constrained", type=bool, default=False)
    task, preparation = read_task(parser, ["-c", str(config)], ("base", "max_new_tokens", "quantize", "constrained"))
    manifest = verify(folder / "adapter")
    base, known = task.model.base, manifest["base"]["files"]
    now = base_files(base)
    if changed := sorted(name for name in {*known, *now} if known.get(name) != now.get(name)):
        raise UserError(f"model.base: {changed[0]} of {base} is not the one that the adapter was trained on")
    # What is exported is judged without a grammar, and so must be what it is compared with.
    free = folder / "outcomes" / "adapter.jsonl"
    judged = free if task.model.constrained and free.is_file() else folder / "outcomes" / "after.jsonl"
    outcomes = read_outcomes(judged)
    if json.loads((folder / "adapter/contract.json").read_text(encoding="utf-8")) != preparation.format.to_dict():
        raise UserError(f"{config}: the contract is not the one that the run was judged by; train again")
    # By their content and not by the hash of the run's rows, which changes with every version of formtune.
    splits = preparation.split()
    test = splits.rows["test"][: len(outcomes)]
    seen = [(one.input, one.target, one.prompt_tokens) for one in outcomes]
    if [(row.source, row.gold, len(row.prompt)) for row in test] != seen:
        raise UserError(f"{judged}: {config} makes other test rows or prompts than these; train again")
    timed = _at_p95(preparation.production_rows or test)
    step = max(1, len(test) // COMPARED)
    lengths = sorted(test, key=len)[::step][:COMPARED]
    return Finished(
        folder=folder,
        base=base,
        quantize=task.model.quantize,
        manifest=manifest,
        contract=preparation.format,
        test=test,
        outcomes=outcomes,
        grammar=task.model.constrained and judged != free,
        compared=[timed, *(row.prompt + row.target for row in lengths)],
        calibration=[row.prompt + row.target for row in splits.rows["train"][:CALIBRATION]],
        timed=timed,
        max_new_tokens=task.model.max_new_tokens,
    )


def metrics(folder: Path) -> dict[str, Any]:
    """What the exports of a run were measured to be, by kind; none where there is none yet."""
    try:
        found: dict[str, Any] = json.loads((folder / "exports.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _at_p95(rows: Sequence[Row]) -> list[int]:
    length = quantile([len(row.prompt) for row in rows], 95)
    return next(row.prompt for row in rows if len(row.prompt) == length)
