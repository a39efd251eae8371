"""The outcome of each test row, kept on disk: every figure and comparison can be computed from it again."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from formtune.base.row import Row
from formtune.errors import UserError
from formtune.evaluation.confidence import UNKNOWN, Confidence
from formtune.files import write_lines
from formtune.formats import KINDS, Format, Verdict

VIEWS = {  # the evaluations of the test rows, and how they are displayed
    "before": "base",
    "few_shot": "base few-shot",
    "before_constrained": "base constrained",
    "after": "tuned",
    "after_constrained": "tuned constrained",
}
RATES = {"format/exact": "exact", "format/loose": "loose", "joint/exact": "joint"}  # attributes of `Outcome`
FIELD = "content/field_acc/"  # before a field's name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row, the model's answer, and the verdict on it."""

    where: str  # file:line of the row
    origin: str  # author of the row: "human", the name of a model, or ""
    prompt_tokens: int
    input: str  # the last user turn
    target: str
    answer: str
    kind: str  # primary kind of failure, "ok" for none
    detail: str  # what is wrong, in one line
    loose: bool  # whether the format is valid without the text around the document
    matched: int  # values that answer and target share
    values: int  # values in the answer and values in the target
    fields: dict[str, bool]  # whether each field of the format is right
    schema: str | None = None  # JSON text of the row's own schema
    confidence: float | None = None  # probability of the answer by the model's own account, None if unknown
    field_confidences: dict[str, float] | None = None  # of each field's value; None for an invalid format

    @property
    def exact(self) -> bool:
        """Whether the format is valid."""
        return self.kind in ("ok", "content")

    @property
    def joint(self) -> bool:
        """Whether the format is valid and the content right."""
        return self.kind == "ok"


def outcome(row: Row, answer: str, verdict: Verdict, format: Format, sure: Confidence = UNKNOWN) -> Outcome:
    """The outcome of a row that has a target."""
    content = verdict.content
    assert content is not None and row.target is not None, "an outcome needs a target"
    return Outcome(
        where=row.where, origin=row.origin, prompt_tokens=len(row.prompt_ids), input=row.input, target=row.target,
        answer=answer, kind=verdict.kind, detail=verdict.detail, loose=verdict.loose,
        matched=content.matched, values=content.predicted + content.expected,
        fields=dict(zip(format.of_row(row.schema).fields, content.fields, strict=True)), schema=row.schema,
        confidence=sure.answer, field_confidences=sure.fields or None,
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
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path}:{number}: not an outcome of a test row") from None
    return outcomes


def rate(outcomes: Sequence[Outcome], name: str) -> tuple[int, int]:
    """Rows for which `exact`, `loose` or `joint` holds, and all rows."""
    return sum(getattr(outcome, name) for outcome in outcomes), len(outcomes)


def field_f1(outcomes: Sequence[Outcome]) -> float:
    """Micro F1 over all values; 0 if there are none."""
    values = sum(outcome.values for outcome in outcomes)
    return 2 * sum(outcome.matched for outcome in outcomes) / values if values else 0.0


def paired(*evaluations: Sequence[Outcome]) -> list[list[Outcome]]:
    """The rows of each evaluation, identified by `where`, that all of them have, in the order of the first."""
    by_place = [{outcome.where: outcome for outcome in outcomes} for outcomes in evaluations]
    common = [where for where in by_place[0] if all(where in outcomes for outcomes in by_place)]
    return [[outcomes[where] for where in common] for outcomes in by_place]


def worst_first(judged: Iterable[T], kind: Callable[[T], str] = attrgetter("kind")) -> list[T]:
    """The failed answers, in the order of their kinds in `KINDS`."""
    return sorted((item for item in judged if kind(item) != "ok"), key=lambda item: KINDS.index(kind(item)))
