"""Confidence is the probability of an answer's tokens; thresholds, risk, coverage and calibration by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml

from conftest import SCHEMA, byte_tokenizer
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError
from formtune.evaluation.outcomes import (
    Outcome,
    confidence,
    confidences,
    threshold,
    write_answers,
    write_outcomes,
)
from formtune.evaluation.outcomes import outcome as judge
from formtune.formats import JsonSchema, Labels, Regex, Tagged
from formtune.training.run_folder import minimum_confidence

HALF = math.log(0.5)


def sure(format, text, tokens, halves=(), verdict=None):
    """The confidence if the tokens at `halves` have probability one half, and all others 1."""
    logprobs = [HALF if i in halves else 0.0 for i in range(len(tokens))]
    return confidence(tokens, logprobs, text, verdict or format.check(text), format)


def test_an_answers_confidence_is_the_product_over_all_its_tokens_and_a_fields_over_those_of_its_value():
    format, text = JsonSchema(SCHEMA), '{"n":12,"s":"a"}'
    tokens = ['{"', "n", '":', "1", "2", ',"', "s", '":"', "a", '"}', "<|end|>"]
    assert sure(format, text, tokens) == (1.0, {"n": 1.0, "s": 1.0})
    assert sure(format, text, tokens, [1]) == (0.5, {"n": 1.0, "s": 1.0}), "a key"
    assert sure(format, text, tokens, [3, 4]) == (0.25, {"n": 0.25, "s": 1.0})
    assert sure(format, text, tokens, [5])[1] == {"n": 0.5, "s": 1.0}, "it says that the number has no more digits"
    assert sure(format, text, tokens, [7])[1] == {"n": 1.0, "s": 0.5}, "it begins the text"
    assert sure(format, text, tokens, [9])[1] == {"n": 1.0, "s": 0.5}, "it ends the text"
    assert sure(format, text, tokens, [10]) == (0.5, {"n": 1.0, "s": 1.0}), "the stop token"


def test_an_answer_that_is_one_token_and_an_invalid_one():
    format = Labels(["yes", "no"])
    assert sure(format, "yes", ["yes", "<|end|>"], [0]) == (0.5, {})
    assert sure(format, "yes", ["yes"], [0]) == (0.5, {}), "a server may leave out the stop token"
    assert sure(format, "maybe", ["maybe", "<|end|>"]) == (0.0, {})
    assert sure(Labels(["", "a"]), "", ["<|end|>"], [0]) == (0.5, {})


def test_a_field_that_the_answer_lacks_takes_the_tokens_of_the_object_around_it():
    person = {"type": ["object", "null"], "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    format = JsonSchema({"type": "object", "properties": {"who": person, "x": {"type": "array"}}})
    tokens = ['{"x"', ":", "[", "1", "]", ', "who" : ', "nu", "ll", " }", "<|end|>"]
    assert sure(format, "".join(tokens[:-1]), tokens, [6])[1] == {"who.name": 0.5, "who.age": 0.5, "x": 1.0}
    assert sure(format, "".join(tokens[:-1]), tokens, [3])[1] == {"who.name": 1.0, "who.age": 1.0, "x": 0.5}
    tokens = ["{", '"x"', ":[]", "}", "<|end|>"]
    assert sure(format, '{"x":[]}', tokens, [3])[1] == {"who.name": 0.5, "who.age": 0.5, "x": 1.0}


def test_the_fields_of_other_formats_and_white_space_before_every_answer():
    tokens = [" ", "<a>", "x", "</", "a>", "<b>", "y", "</b>", "<|end|>"]
    assert sure(Tagged(["a", "b"]), "<a>x</a><b>y</b>", tokens, [3])[1] == {"a": 0.5, "b": 1.0}
    assert sure(Tagged(["a", "b"]), "<a>x</a><b>y</b>", tokens, [6])[1] == {"a": 1.0, "b": 0.5}
    format = Regex(r"(?P<day>\d+)(?:-(?P<month>\w+))?")
    assert sure(format, "12-may", ["1", "2", "-", "may", "<|end|>"], [2])[1] == {"day": 0.5, "month": 1.0}
    assert sure(format, "12-may", ["1", "2", "-", "may", "<|end|>"], [4])[1] == {"day": 1.0, "month": 0.5}
    assert sure(format, "12", ["12", "<|end|>"], [1])[1] == {"day": 0.5, "month": 0.5}


def test_the_tokens_of_one_character_belong_to_it():
    renderer, format = Renderer(byte_tokenizer()), JsonSchema(SCHEMA)
    text = '{"n":1,"s":"é€"}'
    ids = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.stop_ids[0]]
    pieces = renderer.pieces(ids)
    assert "".join(pieces).startswith(text) and "" in pieces
    for byte in range(len(ids)):
        fields = sure(format, text, pieces, [byte])[1]
        assert fields["s"] == (0.5 if 11 <= byte <= 17 else 1.0), byte


PAIRS = [(0.9, True), (0.8, False), (0.8, True), (0.6, True), (0.3, False)]


def test_a_threshold_is_the_lowest_that_reaches_the_target_with_one_right_and_one_wrong_answer_more():
    assert threshold(PAIRS, 0.6) == 0.6, "(3 + 1) / (4 + 2)"
    assert threshold(PAIRS, 0.57) == 0.3, "(3 + 1) / (5 + 2), though 0.8 does not reach it"
    assert threshold(PAIRS, 2 / 3) == 0.6 and threshold(PAIRS, 0.67) is None, "0.9 alone has (1 + 1) / (1 + 2)"
    assert threshold(PAIRS, 0.5) == 0.3
    right = [(0.5 + n / 1000, True) for n in range(98)]
    assert threshold(right, 0.99) == 0.5 and threshold(right[1:], 0.99) is None and threshold(right, 1.0) is None
    assert threshold([(0.0, False), (0.7, True), (0.7, True)], 0.1) == 0.7, "an invalid format is never accepted"
    assert threshold([(0.7, True), (0.7, False), (0.7, True)], 0.75) is None, "a tie is accepted whole or not at all"
    assert threshold([], 0.5) is None


def outcome(number, sure, right=True, n=None):
    kind = "ok" if right else "content" if sure else "syntax"
    fields = {"n": n, "s": sure} if sure and n is not None else {"n": sure, "s": sure} if sure else None
    return Outcome(
        f"f:{number}",
        "",
        9,
        f"i {number}",
        "{}",
        "{}",
        kind,
        "",
        True,
        1,
        2,
        {"n": right, "s": True},
        None,
        sure,
        fields,
    )


def rows(wrong, count=200):
    """Confidences from 0.8 up, of which the lowest `wrong` ones are wrong; one answer has an invalid format."""
    return [outcome(n, round(0.8 + n / 1000, 6), n >= wrong, 0.9) for n in range(count)] + [outcome(count, 0.0, False)]


def written(path, minimum):
    """Four predictions, one of an invalid format, in files."""
    format, good, answers = JsonSchema(SCHEMA), '{"n":1,"s":"a"}', []
    for number, (text, probability) in enumerate([(good, 0.99), ("no", 0.0), (good, 0.5), (good, 0.97)]):
        row = Row([1], [], f"p {number}", None, f"f:{number}", number)
        sure = probability, {"n": probability}
        answers.append(judge(row, text, format.check(text), format, sure))
    return write_answers(path, answers, minimum, {})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_split_by_their_confidence(tmp_path):
    for minimum, numbers in ((0.97, [0, 3]), (0.0, [0, 2, 3]), (1.0, [])):
        files = written(tmp_path / "out.jsonl", minimum)
        good, rest = read(tmp_path / "out.accepted.jsonl"), read(tmp_path / "out.review.jsonl")
        assert [one["where"] for one in good] == [f"f:{n}" for n in numbers]
        assert [one["where"] for one in rest] == [f"f:{n}" for n in range(4) if n not in numbers]
        assert not (tmp_path / "out.jsonl").exists()
        assert files == {tmp_path / "out.review.jsonl": len(rest), tmp_path / "out.accepted.jsonl": len(good)}
    assert rest[3]["confidence"] == 0.97 and rest[3]["field_confidences"] == {"n": 0.97}


def test_a_target_precision_takes_the_threshold_of_the_runs_validation_rows(tmp_path):
    def minimum(run=tmp_path, target=0.98, given=None, ckpt=None, constrained=False):
        model = SimpleNamespace(constrained=constrained)
        config = SimpleNamespace(target_precision=target, min_confidence=given, ckpt_path=ckpt, model=model)
        return minimum_confidence(config, run)

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"constrained": False}}))
    needs = "needs a finished run, its best checkpoint, its value of model.constrained, and no min"
    with pytest.raises(UserError, match=needs):
        minimum()
    write_outcomes(tmp_path / "outcomes/validation.jsonl", rows(10))
    assert minimum() == minimum(ckpt="best") == 0.808 == threshold(confidences(rows(10)), 0.98)
    with pytest.raises(UserError, match=r"target_precision: no confidence gives 0.999 on the 201 validation rows of"):
        minimum(target=0.999)
    for wrong in ({"run": None}, {"given": 0.9}, {"ckpt": "last"}, {"ckpt": "base"}, {"constrained": True}):
        with pytest.raises(UserError, match=needs):
            minimum(**wrong)
