"""The outcome of each row: one record, from which every metric and comparison is computed."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError
from formtune.files import write_lines
from formtune.formats import KINDS, Format, Verdict
from formtune.formats.content import Comparison

EVALUATIONS = {  # the evaluations of the test rows, and how they are displayed
    "before": "base",
    "few_shot": "base few-shot",
    "before_constrained": "base constrained",
    "start": "adapter",  # that training starts from
    "after": "tuned",
    "after_constrained": "tuned constrained",
}
RATES = {"format/exact": "exact", "format/loose": "loose", "joint/exact": "joint"}  # attributes of `Outcome`
COMPARED = ("format/exact", "joint/exact")  # rates that say whether one model is worse than another
FIELD = "content/field_acc/"  # before a field's name
F1 = "content/field_f1"

DIGITS = 6  # of a probability

Confidences = Sequence[tuple[float, bool]]  # the confidence of each answer, and whether the answer is right


@dataclass(slots=True)
class Decoded:
    """An answer as decoded so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, given those before it


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a row and the format's verdict on it; without a target, only the format is checked."""

    where: str  # file:line of the row
    origin: str  # author of the row: "human", the name of a model, or ""
    prompt_tokens: int
    input: str  # the last user turn
    target: str  # "" without one
    answer: str
    kind: str  # primary kind of failure, "ok" for none
    detail: str  # what is wrong, in one line
    loose: bool  # whether the format is valid once the text around the document is removed
    matched: int  # values that answer and target share
    values: int  # values in the answer and values in the target
    fields: dict[str, bool]  # whether each field of the format is right
    schema: str | None = None  # JSON text of the row's own schema
    confidence: float | None = None  # the model's probability of the answer, None if unknown
    field_confidences: dict[str, float] | None = None  # of each field's value; None for an invalid format

    @property
    def exact(self) -> bool:
        """Whether the format is valid."""
        return self.kind in ("ok", "content")

    @property
    def joint(self) -> bool:
        """Whether the format is valid and the content right."""
        return self.kind == "ok"


def check_answer(row: Row, decoded: Decoded, renderer: Renderer, format: Format) -> Outcome:
    """The outcome of a decoded answer."""
    text, finished = renderer.answer(decoded.ids)
    row_format = format.of_row(row.schema)
    verdict = row_format.check(text, finished=finished, target=row.target)
    pieces = renderer.pieces(decoded.ids) if verdict.exact else ()  # an invalid format has confidence 0
    return outcome(row, text, verdict, row_format, confidence(pieces, decoded.logprobs, text, verdict, row_format))


def outcome(
    row: Row, answer: str, verdict: Verdict, format: Format, confidences: tuple[float, dict[str, float]] | None = None
) -> Outcome:
    """The outcome of an answer, by the verdict of the row's own format and its `confidence`."""
    content = verdict.content or Comparison()
    overall, by_field = confidences or (None, None)
    return Outcome(
        where=row.where, origin=row.origin, prompt_tokens=len(row.prompt_ids), input=row.input, target=row.target or "",
        answer=answer, kind=verdict.kind, detail=verdict.detail, loose=verdict.loose, matched=content.matched,
        values=content.values, fields=dict(zip(format.fields, content.fields, strict=False)), schema=row.schema,
        confidence=overall, field_confidences=by_field or None,
    )  # fmt: skip


def confidence(
    tokens: Sequence[str], logprobs: Sequence[float], answer: str, verdict: Verdict, format: Format
) -> tuple[float, dict[str, float]]:
    """The model's probability of an answer, and of the value of each field.

    Products over the answer's tokens, without its reasoning; an invalid format has confidence 0.
    """
    if not verdict.exact:
        return 0.0, {}
    reasoning, document = format.split(answer)
    spans = (format.inner or format).value_spans(document) if format.fields else {}
    begin = "".join(tokens).find(answer)  # after whitespace that the template puts before every answer
    ends = list(accumulate(map(len, tokens), initial=-begin - len(reasoning)))  # 0 where the answer begins
    fields = {}
    for name in format.fields if begin >= 0 else ():
        path = name  # for a missing field, the nearest object around it
        while path and path not in spans:
            path = path.rpartition(".")[0]
        start, end = spans.get(path, (0, len(document) + 1))
        # A token that is part of a character has no text: it belongs to the character that is completed later.
        inside = (p for p, a, b in zip(logprobs, ends, ends[1:], strict=False) if a < end and max(b, a + 1) > start)
        fields[name] = _product(inside)
    counted = [p for p, end in zip(logprobs, ends[1:], strict=False) if end > 0] if reasoning else logprobs
    return _product(counted), fields


def _product(logprobs: Iterable[float]) -> float:
    return round(math.exp(math.fsum(logprobs)), DIGITS)


def confidences(outcomes: Sequence[Outcome], field: str | None = None) -> list[tuple[float, bool]]:
    """The confidence of each answer, or of one field, and whether it is right; empty if no confidence is known."""
    known = [o for o in outcomes if o.confidence is not None]
    if field is None:
        return [(o.confidence or 0.0, o.joint) for o in known]
    return [((o.field_confidences or {}).get(field, 0.0), o.fields[field]) for o in known if field in o.fields]


def threshold(rows: Confidences, target: float) -> float | None:
    """The lowest confidence from which at least `target` of the answers are right; None if there is none.

    One right and one wrong answer are added to those counted (Laplace's rule of succession). Confidence 0 means an
    invalid format and is never accepted.
    """
    lowest, count, right = None, 0, 0
    for confidence, group in groupby(sorted(rows, reverse=True), itemgetter(0)):
        verdicts = [is_right for _, is_right in group]
        count, right = count + len(verdicts), right + sum(verdicts)
        if confidence > 0 and right + 1 >= target * (count + 2) - 1e-9:
            lowest = confidence
    return lowest


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    write_lines(path, map(asdict, outcomes))


def write_answers(
    path: Path, outcomes: Sequence[Outcome], minimum: float | None, more: dict[str, str]
) -> dict[Path, int]:
    """Write predictions as JSON Lines, each with `more`; returns the number of answers in each file.

    With a minimum confidence there are two files: accepted answers, and answers to review.
    """
    records: list[dict[str, Any]] = [
        {
            "where": one.where, "prompt": one.input, "answer": one.answer,
            "valid": one.exact, "kind": one.kind, "detail": one.detail,
            "confidence": one.confidence, "field_confidences": one.field_confidences or {}, **more,
        }
        for one in outcomes
    ]  # fmt: skip
    files = {path: records}
    if minimum is not None:
        review, accepted = (path.with_stem(f"{path.stem}.{name}") for name in ("review", "accepted"))
        files = {review: [], accepted: []}
        for record in records:
            files[accepted if record["valid"] and record["confidence"] >= minimum else review].append(record)
    for file, part in files.items():
        write_lines(file, part)
    return {file: len(part) for file, part in files.items()}


def read_outcomes(path: Path) -> list[Outcome]:
    """Read outcomes; raise a UserError if the file is missing, or a line is not an outcome."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}; a finished run has it") from None
    outcomes: list[Outcome] = []
    try:
        for line in io.StringIO(text):  # not splitlines: an answer may contain other line separators
            outcomes.append(Outcome(**json.loads(line)))
    except (ValueError, TypeError):
        raise UserError(f"{path}:{len(outcomes) + 1}: not an outcome of a test row") from None
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


def worst_first(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The failed answers, in the order of their kinds in `KINDS`."""
    return sorted((one for one in outcomes if one.kind != "ok"), key=lambda one: KINDS.index(one.kind))
