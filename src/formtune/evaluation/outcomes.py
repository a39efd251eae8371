"""What became of each test row, on disk: every figure and every comparison can be worked out from it again."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from formtune.base.row import Row
from formtune.errors import UserError
from formtune.files import write_lines
from formtune.formats import Format, Verdict
from formtune.formats.strict_json import loads_strict

VIEWS = {  # evaluations of the test rows, and what they are called
    "before": "base",
    "few_shot": "base with examples",
    "before_constrained": "base under a grammar",
    "after": "tuned",
    "after_constrained": "tuned under a grammar",
}
RATES = {"format/exact": "exact", "format/loose": "loose", "joint/exact": "joint"}  # and their names in an outcome


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row, its answer, and the verdict.

    Args:
        where: Place of the row; with `input` what pairs it with the same row of another run.
        origin: Who wrote the row: "human", the name of a model, or "".
        prompt_tokens: Tokens of the prompt.
        target_tokens: Tokens of the wanted answer, end of turn included.
        input: Text of the last user turn.
        target: Text of the wanted answer.
        answer: Text of the model's.
        kind: Primary kind of failure, "ok" for none.
        detail: What is wrong, in one line.
        exact: Whether the format is kept.
        loose: The same after removing what stands around the document.
        joint: Whether format and content are right.
        matched: Values that answer and target have in common.
        predicted: Values of the answer.
        gold: Values of the target.
        fields: For each field of the contract, whether it is right.
    """

    where: str
    origin: str
    prompt_tokens: int
    target_tokens: int
    input: str
    target: str
    answer: str
    kind: str
    detail: str
    exact: bool
    loose: bool
    joint: bool
    matched: int
    predicted: int
    gold: int
    fields: dict[str, bool]


def outcome(row: Row, answer: str, verdict: Verdict, contract: Format) -> Outcome:
    """The outcome of a row that has a wanted answer."""
    content = verdict.content
    assert content is not None and row.gold is not None, "an outcome needs a wanted answer"
    return Outcome(
        where=row.where,
        origin=row.origin,
        prompt_tokens=len(row.prompt),
        target_tokens=len(row.target),
        input=row.source,
        target=row.gold,
        answer=answer,
        kind=verdict.kind,
        detail=verdict.detail,
        exact=verdict.exact,
        loose=verdict.loose,
        joint=verdict.joint,
        matched=content.matched,
        predicted=content.predicted,
        gold=content.gold,
        fields=dict(zip(contract.fields, content.fields, strict=True)),
    )


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write them as JSON Lines, whole or not at all."""
    write_lines(path, map(asdict, outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what `write_outcomes` wrote.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}; a finished run has it") from None
    found = []
    for number, line in enumerate(io.StringIO(text), 1):  # not splitlines: an answer may hold other ends of line
        try:
            record: Any = loads_strict(line)
            found.append(Outcome(**record))
            if not _typed(found[-1]):
                raise TypeError
        except (ValueError, TypeError):
            raise UserError(f"{path}:{number}: not an outcome of a test row") from None
    return found


def _typed(one: Outcome) -> bool:
    types = {field.name: str(field.type).partition("[")[0] for field in fields(one)}
    right = all(type(getattr(one, name)).__name__ == kind for name, kind in types.items())
    return right and all(isinstance(value, bool) for value in one.fields.values())


def rate(outcomes: Sequence[Outcome], name: str) -> tuple[int, int]:
    """Rows for which `exact`, `loose` or `joint` holds, and all rows."""
    return sum(getattr(one, name) for one in outcomes), len(outcomes)


def field_f1(outcomes: Sequence[Outcome]) -> float:
    """Micro F1 over all values; 0 where there are none."""
    both = sum(one.matched for one in outcomes)
    either = sum(one.predicted + one.gold for one in outcomes)
    return 2 * both / either if either else 0.0
