"""Intervals and tests agree with closed formulas and with simulation, and `compare` says only what the rows can tell."""

import itertools
import json
import math
import random
import re
import warnings
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from formtune.cli import main
from formtune.evaluation.outcomes import Outcome, field_f1, read_outcomes, write_outcomes
from formtune.evaluation.statistics import wilson_interval
from formtune.report.comparison import read_runs, wrap
from formtune.report.paired_tests import (
    Difference,
    f1_difference,
    f1_interval,
    mcnemar,
    rate_difference,
    rows_needed,
    verdict,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


COUNTS = st.integers(0, 400).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows)))
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)
ROWS = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=2, max_size=12)


def counts(rows):
    """(matched, missed, too many) per row as the counts that F1 is computed from."""
    return np.array([[both, 2 * both + missed + surplus] for both, missed, surplus in rows]).T


@given(COUNTS)
def test_wilson_is_the_closed_formula_and_holds_the_rate(count):
    k, n = count
    low, high = wilson_interval(k, n)
    if not n:
        assert (low, high) == (0, 1)
        return
    p, z = k / n, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0 <= low <= p <= high <= 1
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_holds_the_true_rate_in_19_of_20_test_sets():
    rows, rate = 330, 0.97
    held = sum(
        stats.binom.pmf(k, rows, rate)
        for k in range(rows + 1)
        if wilson_interval(k, rows)[0] <= rate <= wilson_interval(k, rows)[1]
    )
    assert held == pytest.approx(0.95, abs=0.02)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_tail_of_fair_coins_and_does_not_care_which_run_comes_first(gained, lost):
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(lost, gained) == pytest.approx(mcnemar(gained, lost))


@given(PAIRS)
def test_runs_swapped_say_the_opposite(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = rate_difference(first, second), rate_difference(second, first)
    assert there.value == -back.value and (there.p, there.needed) == pytest.approx((back.p, back.needed))
    assert there.value == pytest.approx((sum(second) - sum(first)) / max(len(pairs), 1))
    assert {verdict(there), verdict(back)} in ({"better", "worse"}, {verdict(there)})
    assert there.significant == (there.p < 0.05)
    assert there.significant or there.needed is None or there.needed > there.rows
    same = rate_difference(first, first)
    assert (same.value, same.significant, same.needed, same.p) == (0, False, None, 1)


def power(gained, lost, rows, tries=2000):
    """Fraction of drawn test sets of `rows` rows on which the exact test is below 0.05."""
    drawn = np.random.default_rng(7).multinomial(rows, [gained, lost, 1 - gained - lost], tries)
    pairs, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    return sum(times[[stats.binomtest(int(g), int(g + n)).pvalue < 0.05 for g, n in pairs]]) / tries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gained", "lost", "rows"), [(20, 12, 330), (30, 20, 330), (10, 5, 100), (60, 40, 1000), (20, 12, 50), (8, 2, 330)]
)
def test_the_rows_needed_tell_the_difference_in_four_of_five_tries(gained, lost, rows):
    needed = rows_needed(gained, lost, rows)
    assert needed == rows_needed(lost, gained, rows) and needed > rows
    assert power(gained / rows, lost / rows, needed) == pytest.approx(0.8, abs=0.045)
    assert power(gained / rows, lost / rows, needed // 2) < 0.6


@pytest.mark.parametrize(("gained", "rows"), [(1, 330), (5, 330), (5, 12)])
def test_where_no_row_is_lost_the_rows_needed_are_enough(gained, rows):
    assert 0.8 <= power(gained / rows, 0, rows_needed(gained, 0, rows)) < 0.95


def test_the_formula_without_its_correction_is_connors():
    # 10 % gained, 5 % lost: (1.960 sqrt(0.15) + 0.842 sqrt(0.15 - 0.05^2))^2 / 0.05^2 = 468.4 by hand; then the
    # smallest n with 0.05 n - 1 = (1.960 sqrt(0.15) + 0.842 sqrt(0.1475)) sqrt(n).
    n = rows_needed(10, 5, 100)
    spread = 1.959964 * math.sqrt(0.15) + 0.841621 * math.sqrt(0.1475)
    assert (spread / 0.05) ** 2 == pytest.approx(468.4, abs=0.2)
    assert 0.05 * n - 1 >= spread * math.sqrt(n) and 0.05 * (n - 1) - 1 < spread * math.sqrt(n - 1)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_f1_intervals_are_finite_and_repeat(rows, dice):
    first, second = counts(rows), counts(dice.sample(rows, len(rows)))
    low, high = f1_interval(first)
    assert 0 <= low <= high <= 1 and (low, high) == f1_interval(first)
    there, back = f1_difference(first, second), f1_difference(second, first)
    assert there.value == -back.value == 0  # the same rows in another order
    assert there.p == pytest.approx(back.p)
    assert not f1_difference(first, first).significant


@pytest.mark.parametrize(
    ("first", "second", "value", "sure"),
    [
        ([(3, 0, 0)] * 5, [(3, 0, 0)] * 5, 0, False),  # all right
        ([(0, 3, 0)] * 6, [(3, 0, 0)] * 6, 1, True),  # the same in each row
        ([(0, 3, 0)] * 5, [(3, 0, 0)] * 5, 1, False),  # too few, as for a rate
        ([(0, 0, 0)] * 5, [(0, 0, 0)] * 5, 0, False),  # no value anywhere
        ([(3, 0, 0)], [(0, 3, 0)], -1, False),  # one row tells nothing
    ],
)
def test_f1_where_there_is_little_to_draw(first, second, value, sure):
    difference = f1_difference(counts(first), counts(second))
    assert (difference.value, difference.significant) == (value, sure)
    assert all(0 <= end <= 1 for end in f1_interval(counts(first)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 6), min_size=2, max_size=7))
def test_f1_is_tested_by_dealing_the_answers_in_every_way(rows):
    first, second = counts([one[:3] for one in rows]), counts([one[3:] for one in rows])

    def gain(swapped):
        left, right = np.where(swapped, second, first), np.where(swapped, first, second)
        scores = [Fraction(2 * int(a.sum()), int(max(b.sum(), 1))) for a, b in (left, right)]
        return scores[1] - scores[0]

    there = gain([False] * len(rows))
    deals = [gain(swapped) for swapped in itertools.product([False, True], repeat=len(rows))]
    tail = min(sum(one >= there for one in deals), sum(one <= there for one in deals)) / len(deals)
    difference = f1_difference(first, second)
    assert difference.p == pytest.approx(min(1, 2 * tail)) and difference.p == pytest.approx(
        f1_difference(second, first).p
    )
    assert difference.significant == (difference.p < 0.05) and (
        difference.significant or not difference.needed or difference.needed > difference.rows
    )


@pytest.mark.parametrize(("gained", "lost"), [(4, 0), (6, 0), (9, 2), (0, 1), (40, 20)])
def test_f1_of_one_value_a_row_is_tested_as_a_rate_is(gained, lost):
    first = counts([(0, 1, 0)] * gained + [(1, 0, 0)] * (330 - gained))
    second = counts([(1, 0, 0)] * (330 - lost) + [(0, 1, 0)] * lost)
    assert f1_difference(first, second).p == pytest.approx(mcnemar(gained, lost), abs=0.005)


@pytest.mark.slow
def test_f1_agrees_with_the_delta_method_and_tells_apart_by_chance_in_1_of_20():
    dice = np.random.default_rng(3)

    def run(wrong, rows=300):
        missed = dice.binomial(6, wrong, rows)
        return np.array([6 - missed, np.full(rows, 12)])  # so that F1 is a mean, whose standard error is known

    first, second = run(0.1), run(0.08)
    gain = (second[0] - first[0]) / 6
    difference = f1_difference(first, second)
    assert difference.value == pytest.approx(gain.mean())
    error = gain.std() / math.sqrt(300)
    assert difference.needed == pytest.approx(300 * (2.80 * error / gain.mean()) ** 2, rel=0.05)
    tries = 40
    assert sum(f1_difference(run(0.1, 100), run(0.1, 100)).significant for _ in range(tries)) <= stats.binom.ppf(
        0.999, tries, 0.05
    )


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Difference(0.03, True, 300, 100, 0.5), "better"),
        (Difference(-0.03, True, 300, 100, 0.5), "worse"),
        (Difference(0.03, False, 300, 1151, 0.5), "cannot tell with 300 rows: about 1,200 would"),
        (Difference(-0.03, False, 1300, 10001, 0.5), "cannot tell with 1,300 rows: about 11,000 would"),
        (Difference(0.2, False, 5, 9, 0.5), "cannot tell with 5 rows: about 9 would"),
        (Difference(0, False, 300, None, 0.5), "cannot tell with 300 rows"),
    ],
)
def test_the_verdict_in_words(difference, words):
    assert verdict(difference) == words


def row(number, right, text="in", fields=("a", "b"), **changes):
    """An outcome that is right, or breaks the format and has one of two values wrong."""
    values = {"where": f"test.jsonl:{number + 1}", "origin": "", "prompt_tokens": 3, "input": f"{text} {number}"}
    values |= {"target": '{"a":1,"b":2}', "answer": "", "kind": "ok" if right else "extra_text", "detail": ""}
    values |= {"loose": True, "matched": 1 + right, "values": 4}
    return Outcome(**(values | {"fields": {name: right or name == "a" for name in fields}} | changes))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Writes a run's outcomes: for each row, whether it is right, or the outcomes themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def write(name, rows, when="after"):
        rows = [one if isinstance(one, Outcome) else row(n, one) for n, one in enumerate(rows)]
        write_outcomes(Path("logs", name, "outcomes", f"{when}.jsonl"), rows)
        return f"logs/{name}"

    return write


def flags(wrong, rows=300):
    return [n >= wrong for n in range(rows)]


def test_a_run_against_itself_cannot_be_told(runs, capsys):
    one = runs("one", flags(30))
    assert main(["compare", one, one, "--out", "new/comparison.json"]) == 0
    output = capsys.readouterr().out
    assert (
        "logs/one against logs/one: format/exact cannot tell with 300 rows; joint/exact cannot tell with 300 rows"
        in output
    )
    assert re.search(r"format/exact .* 90.0% \(86.1 to 92.9\) ", output) and "cannot tell, p = 1.000" in output
    first, second = (run["metrics"].values() for run in json.loads(Path("new/comparison.json").read_text())["runs"])
    assert {figure["difference"]["verdict"] for figure in second} == {"cannot tell with 300 rows"}
    assert not any("difference" in figure for figure in first)
    assert [p.name for p in Path("new").iterdir()] == ["comparison.json"]


def test_clearly_better_and_worse_and_before_and_a_file(runs, capsys):
    one, two = runs("one", flags(30)), runs("two", flags(10))
    runs("two", flags(34), "before")
    assert main(["compare", one, two, "--out", "comparison.json", f"{two}:before", f"{two}/outcomes/after.jsonl"]) == 0
    output = capsys.readouterr().out
    assert (
        "\nlogs/two against logs/one: format/exact better by 6.7 points (p < 0.001); joint/exact better by 6.7"
        in output
    )
    assert (
        "\nlogs/two:before against logs/one: format/exact cannot tell with 300 rows: about 730 would; joint" in output
    )
    assert "\nlogs/two/outcomes/after.jsonl against logs/one: format/exact better" in output
    comparison = json.loads(Path("comparison.json").read_text())
    names = [
        "format/exact", "format/loose", "joint/exact", "content/field_f1", "content/field_acc/a", "content/field_acc/b",
    ]  # fmt: skip
    assert comparison["rows"] == 300 and [list(one["metrics"]) for one in comparison["runs"]] == [names] * 4
    assert [one["name"] for one in comparison["runs"]] == [one, two, f"{two}:before", f"{two}/outcomes/after.jsonl"]
    first = {name: figure["difference"] for name, figure in comparison["runs"][1]["metrics"].items()}
    assert first["format/exact"]["p"] == pytest.approx(2 / 2**20)
    assert first["format/loose"]["verdict"] == "cannot tell with 300 rows"
    assert first["content/field_acc/b"]["verdict"] == first["content/field_f1"]["verdict"] == "better"
    assert first["content/field_f1"]["value"] == pytest.approx(20 / 600)
    f1 = comparison["runs"][1]["metrics"]["content/field_f1"]
    assert f1["value"] == field_f1(read_outcomes(Path(two, "outcomes/after.jsonl"))) == pytest.approx(590 / 600)
    assert f1["interval"][0] < f1["value"] < f1["interval"][1]
    assert main(["compare", two, one]) == 0
    assert "logs/one against logs/two: format/exact worse by 6.7 points (p < 0.001)" in capsys.readouterr().out


def test_rows_are_paired_by_input_and_target_in_any_order_and_each_as_often_as_it_occurs(runs):
    rows = [row(n % 40, n % 3 > 0, where=f"x:{n}") for n in range(100)]
    shuffled = sorted(rows, key=lambda outcome: (random.Random(outcome.input).random(), int(outcome.where[2:])))
    (_, first), (_, second) = read_runs([runs("one", rows), runs("two", shuffled)])
    assert first == second == sorted(rows, key=lambda outcome: outcome.input) != shuffled


def test_different_rows_are_refused_in_one_line(runs, capsys):
    one = runs("one", flags(30))
    for rows, common, total in (
        ([row(n, True) for n in range(20, 320)], 280, 300),
        ([row(n, True) for n in range(299)], 299, 299),
        ([row(n, True) for n in (*range(300), 7)], 300, 301),
        ([row(n, True, text="other") for n in range(300)], 0, 300),
        ([row(n, True, target='{"a":1,"b":3}') for n in range(300)], 0, 300),
    ):
        assert main(["compare", one, runs("two", rows), "--out", "comparison.json"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"two/outcomes/after.jsonl: {common} of its {total} test rows are among the 300 of logs/one/" in line
        assert line.endswith("compare runs with the same data, splits and --quick")
    assert not Path("comparison.json").exists()


def test_fields_that_only_one_run_has_are_shown_and_not_compared(runs, capsys):
    one = runs("one", [row(n, n > 3, fields=("a", "b")) for n in range(50)])
    two = runs("two", [row(n, n > 2, fields=("a", "c")) for n in range(50)])
    assert main(["compare", one, two, "--out", "comparison.json"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"field b .* 92.0% \(.*\) │ +- │", output) and re.search(r"field c .* - │ +94.0% \(", output)
    figures = json.loads(Path("comparison.json").read_text())["runs"][1]["metrics"]
    assert [name for name in figures if "acc" in name and "difference" in figures[name]] == ["content/field_acc/a"]


def test_names_in_brackets_stay_readable(runs, capsys):
    one, two = runs("x/[bold]", flags(3)), runs("y/[bold]", flags(4))
    assert main(["compare", one, two]) == 0
    assert "\nlogs/y/[bold] against logs/x/[bold]: format/exact cannot tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "logs/two/outcomes/after.jsonl: No such file or directory; a finished run has it"),
        ("", "logs/two/outcomes/after.jsonl: no test rows"),
        ("GOOD{", "after.jsonl:2: not an outcome of a test row"),
        ("GOOD\n", "after.jsonl:2: not an outcome of a test row"),
        ('GOOD{"where":"x:1"}\n', "after.jsonl:2: not an outcome of a test row"),
        ("GOOD[]\n", "after.jsonl:2: not an outcome of a test row"),
        (b"\xff", "after.jsonl: not UTF-8"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(runs, capsys, content, message):
    one, path = runs("one", flags(1, 5)), Path("logs/two/outcomes/after.jsonl")
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content.replace("GOOD", json.dumps(asdict(row(0, True))) + "\n"))
    assert main(["compare", one, "logs/two"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("formtune: error: ") and message in line


def test_an_out_that_cannot_be_written_is_named(runs, capsys):
    one = runs("one", flags(1, 5))
    for path in (one, f"{one}/outcomes/after.jsonl/comparison.json", "."):
        assert main(["compare", one, one, "--out", path]) == 2
        assert f"--out: {path}: " in capsys.readouterr().err
    assert not list(Path("logs").rglob("*.part"))


def test_an_answer_may_hold_any_end_of_line(tmp_path):
    rows = [row(0, False, answer="a\u2028b\x85c\r\nd\x0be\rf")]
    write_outcomes(tmp_path / "after.jsonl", rows)
    assert read_outcomes(tmp_path / "after.jsonl") == rows


def test_a_name_is_broken_after_its_separators():
    assert str(wrap("logs/demo/final:after_constrained")) == "logs/demo/\nfinal:after_\nconstrained"
    assert str(wrap("r8")) == "r8"
