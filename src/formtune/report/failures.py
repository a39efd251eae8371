"""Where a model fails, for the report: slices of the test rows, and each failed answer beside its target."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from operator import attrgetter

import numpy as np
from markupsafe import Markup, escape

from formtune.base.row import Row
from formtune.evaluation.outcomes import Outcome, worst_first
from formtune.formats import Format
from formtune.formats.content import leaves, typed

MAX_FAILURES = 100
MAX_CHARACTERS, MAX_VALUES = 2000, 30  # of a text, and of its differences, that are compared and shown
NEAREST = 2  # training rows beside a failure
MAX_TRAINING_CHARACTERS = 10_000_000  # of rows, evenly spaced; comparing them takes ten seconds

BUCKETS = 4  # of prompt lengths, with equally many rows
MAX_LABELS = 12  # a field with more values is not a label
MIN_ROWS = 5  # of a slice

Slice = tuple[str, str, list[int]]  # what the rows are grouped by, the group's name, and its rows' indices


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed answer as the report shows it."""

    outcome: Outcome
    target: Markup  # with what only the target has as `<del>`
    answer: Markup  # with what only the answer has as `<ins>`
    differences: list[list[str]]  # path of a value, and the value in target and answer, "" for none
    fields: list[str]  # that differ, as paths in the format
    nearest: list[tuple[float, Row]]  # training rows, and how similar their inputs are


def failures(outcomes: Sequence[Outcome], format: Format, train: Sequence[Row]) -> list[Failure]:
    """The worst failures first, with each kind among them."""
    kinds = (list(same) for _, same in groupby(worst_first(outcomes), attrgetter("kind")))
    chosen = worst_first([outcome for turn in zip_longest(*kinds) for outcome in turn if outcome][:MAX_FAILURES])
    rows = nearest([outcome.input for outcome in chosen], train)
    return [
        Failure(one, *marked(one.target[:MAX_CHARACTERS], one.answer[:MAX_CHARACTERS]), *differences(one, format), near)
        for one, near in zip(chosen, rows, strict=True)
    ]


def marked(target: str, answer: str) -> tuple[Markup, Markup]:
    """Both texts with the words that only one of them has as `<del>` and `<ins>`."""
    first, second = (re.findall(r"\w+|\s+|[^\w\s]+", text) for text in (target, answer))
    target, answer = Markup(), Markup()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second).get_opcodes():
        missing, extra = "".join(first[a:b]), "".join(second[c:d])
        target += Markup("<del>{}</del>").format(missing) if missing and kind != "equal" else escape(missing)
        answer += Markup("<ins>{}</ins>").format(extra) if extra and kind != "equal" else escape(extra)
    return target, answer


def differences(outcome: Outcome, format: Format) -> tuple[list[list[str]], list[str]]:
    """The first values that differ, and the fields that they belong to; none if the answer contains no document."""
    row_format = format.of_row(outcome.schema)
    target, answer = (row_format.check(text).value for text in (outcome.target, outcome.answer))
    expected, got = (dict(leaves(value, row_format.sets)) for value in (target, answer))
    rows, fields = [], []
    for path in dict.fromkeys([*expected, *got]) if answer is not None else ():
        values = [side[path][0] if path in side else None for side in (expected, got)]
        if typed(values[0]) != typed(values[1]):
            texts = ("" if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values)
            rows.append([path or "answer", *(text[:MAX_CHARACTERS] for text in texts)])
            fields.append((expected.get(path) or got[path])[1] or "answer")
    return rows[:MAX_VALUES], list(dict.fromkeys(fields))


def nearest(texts: Sequence[str], train: Sequence[Row]) -> list[list[tuple[float, Row]]]:
    """For each text the training rows with the most similar inputs, by cosine of TF-IDF over character 4-grams."""
    every = sum(min(len(row.input), MAX_CHARACTERS) for row in train) // MAX_TRAINING_CHARACTERS + 1
    rows = [row for row in train[::every] if row.input.strip()]
    if not texts or not rows:
        return [[] for _ in texts]
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 4), sublinear_tf=True)
    vectors = vectorizer.fit_transform(row.input[:MAX_CHARACTERS] for row in rows)
    similar = (vectorizer.transform(text[:MAX_CHARACTERS] for text in texts) @ vectors.T).toarray()
    best = np.argsort(-similar, axis=1, kind="stable")[:, :NEAREST].tolist()
    return [[(line[i], rows[i]) for i in places if line[i]] for line, places in zip(similar, best, strict=True)]


def slices(outcomes: Sequence[Outcome], format: Format, longest: int) -> list[Slice]:
    """The slices with at least `MIN_ROWS` rows, but not all; `longest` is the length of the longest training prompt."""
    sizes = np.array([outcome.prompt_tokens for outcome in outcomes])
    edges = np.unique(np.percentile(sizes, np.linspace(0, 100, BUCKETS + 1), method="higher")).tolist()
    edges[-1] += 1  # the last bucket includes the longest
    lengths = {f"{low} to {high - 1}": (sizes >= low) & (sizes < high) for low, high in pairwise(edges)}
    lengths[f"longer than any training row ({longest})"] = sizes > longest
    parts: list[Slice] = [("prompt tokens", name, np.flatnonzero(rows).tolist()) for name, rows in lengths.items()]
    parts += _groups("source", [outcome.origin for outcome in outcomes])
    labels: dict[str, list[str]] = {}
    for number, outcome in enumerate(outcomes):
        row_format = format.of_row(outcome.schema)
        for _, (value, path) in leaves(row_format.check(outcome.target).value, row_format.sets):
            if path in row_format.derived:
                labels.setdefault(path, [""] * len(outcomes))[number] = str(value)
    for path, values in labels.items():
        if len(set(values)) <= MAX_LABELS:
            parts += _groups(path or "label", values)
    return [part for part in parts if MIN_ROWS <= len(part[2]) < len(outcomes)]


def _groups(group: str, names: Sequence[str]) -> list[Slice]:
    return [(group, name, [i for i, n in enumerate(names) if n == name]) for name in sorted(set(names) - {""})]
