"""How sure a model is of an answer, and of each field in it, from the log-probabilities of the answer's tokens."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from formtune.formats import Format, Verdict

DIGITS = 6  # of a probability


@dataclass(frozen=True, slots=True)
class Confidence:
    """The probability of an answer by the model's own account."""

    answer: float | None = None  # None if the log-probabilities are unknown; 0 for an invalid format
    fields: dict[str, float] = field(default_factory=dict)  # of each field's value; empty for an invalid format


UNKNOWN = Confidence()


def confidence(
    tokens: Sequence[str], logprobs: Sequence[float], answer: str, verdict: Verdict, format: Format
) -> Confidence:
    """The confidence in an answer and its fields: the product of the probabilities of its tokens, or of a field's.

    `tokens` are the texts that each token adds, the stop token's too. A field that the answer does not have takes the
    tokens of the nearest object around it. An answer with an invalid format is known to be wrong: its confidence is 0.
    """
    if not verdict.exact:
        return Confidence(0.0)
    spans = format.value_spans(answer) if format.fields else {}
    begin = "".join(tokens).find(answer)  # after white space that the template puts before every answer
    ends = list(accumulate(map(len, tokens), initial=-begin))
    fields = {}
    for name in format.fields if begin >= 0 else ():
        path = name
        while path and path not in spans:
            path = path.rpartition(".")[0]
        start, end = spans.get(path, (0, len(answer) + 1))
        # A token that is part of a character has no text: it belongs to the character that is completed later.
        inside = (p for p, a, b in zip(logprobs, ends, ends[1:], strict=False) if a < end and max(b, a + 1) > start)
        fields[name] = _product(inside)
    return Confidence(_product(logprobs), fields)


def _product(logprobs: Iterable[float]) -> float:
    return round(math.exp(math.fsum(logprobs)), DIGITS)
