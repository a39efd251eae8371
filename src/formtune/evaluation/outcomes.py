"""The outcome of each test row, kept on disk: every figure and comparison can be computed from it again."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from formtune.base.row import Row
from formtune.errors import UserError
from formtune.files import write_lines
from formtune.formats import KINDS, Format, Verdict
from formtune.formats.strict_json import loads_strict

VIEWS = {  # the evaluations of the test rows, and how they are displayed
    "before": "base",
    "few_shot": "base few-shot",
    "before_constrained": "base constrained",
    "after": "tuned",
    "after_constrained": "tuned constrained",
}
RATES = {"format/exact": "exact", "format/loose": "loose", "joint/exact": "joint"}  # and their fields in `Outcome`

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row, the model's answer, and the verdict on it."""

    where: str  # file:line of the row
    origin: str  # author of the row: "human", the name of a model, or ""
    prompt_tokens: int
    target_tokens: int  # end of turn included
    input: str  # the last user turn
    target: str
    answer: str
    kind: str  # primary kind of failure, "ok" for none
    detail: str  # what is wrong, in one line
    exact: bool  # whether the format is valid
    loose: bool  # whether it is valid without the text around the document
    joint: bool  # whether the format is valid and the content right
    matched: int  # values that answer and target share
    predicted: int  # values in the answer
    expected: int  # values in the target
    fields: dict[str, bool]  # whether each field of the format is right


def outcome(row: Row, answer: str, verdict: Verdict, format: Format) -> Outcome:
    """The outcome of a row that has a target."""
    content = verdict.content
    assert content is not None and row.target is not None, "an outcome needs a target"
    return Outcome(
        where=row.where, origin=row.origin, prompt_tokens=len(row.prompt_ids), target_tokens=len(row.target_ids),
        input=row.input, target=row.target, answer=answer, kind=verdict.kind, detail=verdict.detail,
        exact=verdict.exact, loose=verdict.loose, joint=verdict.joint,
        matched=content.matched, predicted=content.predicted, expected=content.expected,
        fields=dict(zip(format.fields, content.fields, strict=True)),
    )  # fmt: skip


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes as JSON Lines, atomically."""
    write_lines(path, map(asdict, outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """Read outcomes; raise a UserError if there is no such file, or a line is not an outcome."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}; a finished run has it") from None
    outcomes = []
    for number, line in enumerate(io.StringIO(text), 1):  # not splitlines: an answer may hold other line separators
        try:
            record: Any = loads_strict(line)
            outcomes.append(Outcome(**record))
            if not _typed(outcomes[-1]):
                raise TypeError
        except (ValueError, TypeError):
            raise UserError(f"{path}:{number}: not an outcome of a test row") from None
    return outcomes


def _typed(outcome: Outcome) -> bool:
    types = {field.name: str(field.type).partition("[")[0] for field in fields(outcome)}
    right = all(type(getattr(outcome, name)).__name__ == kind for name, kind in types.items())
    return right and all(isinstance(value, bool) for value in outcome.fields.values())


def rate(outcomes: Sequence[Outcome], name: str) -> tuple[int, int]:
    """Rows for which `exact`, `loose` or `joint` holds, and all rows."""
    return sum(getattr(outcome, name) for outcome in outcomes), len(outcomes)


def field_f1(outcomes: Sequence[Outcome]) -> float:
    """Micro F1 over all values; 0 if there are none."""
    both = sum(outcome.matched for outcome in outcomes)
    either = sum(outcome.predicted + outcome.expected for outcome in outcomes)
    return 2 * both / either if either else 0.0


def paired(*evaluations: Sequence[Outcome]) -> list[list[Outcome]]:
    """Of each evaluation the rows, identified by `where`, that all of them have, in the order of the first."""
    by_place = [{outcome.where: outcome for outcome in outcomes} for outcomes in evaluations]
    common = [where for where in by_place[0] if all(where in outcomes for outcomes in by_place)]
    return [[outcomes[where] for where in common] for outcomes in by_place]


def worst_first(judged: Iterable[T], kind: Callable[[T], str] = attrgetter("kind")) -> list[T]:
    """The failed answers, in the order of their kinds in `KINDS`."""
    return sorted((item for item in judged if kind(item) != "ok"), key=lambda item: KINDS.index(kind(item)))
