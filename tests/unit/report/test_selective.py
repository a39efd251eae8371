"""Thresholds, risk, coverage and calibration by hand."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from test_confidence import HALF, PAIRS, rows

from conftest import SCHEMA
from formtune.evaluation.outcomes import confidences, read_outcomes, write_outcomes
from formtune.evaluation.statistics import wilson_interval
from formtune.formats import JsonSchema, Labels
from formtune.report.selective import (
    aurc,
    calibration,
    calibration_error,
    coverage_and_precision,
    selective_risk,
    summary,
)


def test_risk_and_coverage_by_hand_and_ties_in_no_order():
    assert selective_risk(PAIRS).tolist() == pytest.approx([0, 0.5 / 2, 1 / 3, 1 / 4, 2 / 5])
    assert aurc(PAIRS) == pytest.approx((0 + 1 / 4 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert selective_risk(PAIRS[::-1]).tolist() == selective_risk(PAIRS).tolist()
    assert selective_risk([(1.0, True), (1.0, False)] * 2).tolist() == [0.5] * 4


def test_calibration_by_hand():
    rows = [(1.0, True), (0.9, True), (0.9, False), (0.25, False), (0.0, False)]
    expected = [(1, 0.0, 0.0), (1, 0.25, 0.0), (3, 2.8 / 3, 2 / 3)]
    assert [pytest.approx(one) for one in calibration(rows)] == expected
    assert calibration_error(rows) == pytest.approx((0 + 0.25 + 3 * (2.8 / 3 - 2 / 3)) / 5)


def test_what_is_accepted_has_its_coverage_and_interval():
    figures = coverage_and_precision(PAIRS, 0.8)
    assert (figures["accepted"], figures["coverage"], figures["precision"]) == (3, 0.6, 2 / 3)
    assert figures["interval"] == wilson_interval(2, 3)
    assert coverage_and_precision(PAIRS, 0.95) == {
        "min_confidence": 0.95, "accepted": 0, "coverage": 0.0, "precision": None, "interval": (0.0, 1.0),
    }  # fmt: skip


def test_thresholds_come_from_the_validation_rows_and_all_else_from_the_test_rows(tmp_path):
    write_outcomes(tmp_path / "v.jsonl", rows(10))
    validation, test = read_outcomes(tmp_path / "v.jsonl"), rows(20)
    assert validation == rows(10)
    figures = summary(validation, test)
    by_target = {one["target"]: one for one in figures["accept"]}
    assert by_target[0.9]["min_confidence"] == 0.8 and by_target[0.9]["accepted"] == 200
    assert by_target[0.9]["precision"] == 180 / 200 and by_target[0.9]["interval"] == wilson_interval(180, 200)
    # 191 of the upper 192 or more: (190 + 1) / (192 + 2) > 0.98, but 193 rows would have 3 wrong ones.
    assert by_target[0.98]["min_confidence"] == 0.8 + 8 / 1000 and by_target[0.98]["precision"] == 180 / 192
    assert by_target[0.995] == {"target": 0.995}, "199 right ones would be needed"
    assert figures["fields"].keys() == {"n", "s"} - {"s"} and figures["fields"]["n"]["right"] == 180 / 201
    assert figures["fields"]["n"] == {"right": 180 / 201, "target": 0.99}, "its confidences are all the same"
    assert figures["validation_rows"] == 201 and figures["aurc"] == aurc(confidences(test))
    assert confidences([dataclasses.replace(test[0], confidence=None)]) == []


def load(path):
    spec = importlib.util.spec_from_file_location("confidence_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_ranks_the_same_answers_by_each_definition():
    pytest.importorskip("formtune.constrained.decoder")
    benchmark = load(Path(__file__).resolve().parents[3] / "benchmarks/confidence.py")
    format, text = JsonSchema(SCHEMA), '{"n":12,"s":"a"}'
    pieces = ['{"', "n", '":', "1", "2", ',"', "s", '":"', "a", '"}', "<|end|>"]
    assert benchmark.value_tokens(pieces, text, format) == [3, 4, 5, 7, 8, 9]
    assert benchmark.value_tokens(["yes", "<|end|>"], "yes", Labels(["yes"])) == [0, 1]
    sure = benchmark.definitions([HALF, 2 * HALF, 0.0, 0.0], [0, 3])
    assert sure == pytest.approx({
        "mean probability": 2.75 / 4, "minimum": 0.25, "mean log-probability": 3 * HALF / 4, "product": 0.125,
        "value product": 0.5, "value minimum": 0.5,
    })  # fmt: skip
    better = benchmark.definitions([0.0, HALF / 9, 0.0], [0])
    figures = benchmark.compared([(sure, False), (better, True), (None, False)])
    assert figures["product"]["aurc"] == pytest.approx((0 + 1 / 2 + 2 / 3) / 3)
    assert figures["random order"]["aurc"] == 2 / 3 and figures["a perfect order"]["aurc"] == figures["minimum"]["aurc"]
