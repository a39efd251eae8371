"""Failures in a report: marked words, the values that differ, and training rows with similar inputs."""

import random
from dataclasses import replace

from test_report import FORMAT, outcome

from formtune.base.row import Row
from formtune.formats import JsonSchema, Labels
from formtune.report import failures as gallery
from formtune.report.failures import differences, failures, marked, nearest


def row(text, number=0, target="t"):
    return Row([1], [1], text, target, f"train:{number}", number)


def test_whole_words_are_marked_and_the_rest_is_left():
    target, answer = marked('{"city":"Ghent","n":1}', '{"city":"Gent & co","n":1}')
    assert target == "{&#34;city&#34;:&#34;<del>Ghent</del>&#34;,&#34;n&#34;:1}"
    assert answer == "{&#34;city&#34;:&#34;<ins>Gent &amp; co</ins>&#34;,&#34;n&#34;:1}"
    assert marked("same", "same") == ("same", "same") and marked("", "x") == ("", "<ins>x</ins>")
    assert marked("<b>", "") == ("<del>&lt;b&gt;</del>", "")


def test_values_are_compared_path_by_path_with_their_types():
    wrong = outcome(1, "content", target='{"n":1,"s":"a"}', answer='{"n":"1","extra":[2]}')
    assert differences(wrong, FORMAT) == (
        [["n", "1", '"1"'], ["s", '"a"', ""], ["extra[0]", "", "2"]],
        ["n", "s", "extra"],
    )
    assert differences(outcome(1, "syntax", answer='{"n":1'), FORMAT) == ([], [])
    label = outcome(1, "content", target="yes", answer="no")
    assert differences(label, Labels(["yes", "no"])) == ([["answer", '"yes"', '"no"']], ["answer"])


def test_a_set_in_another_order_differs_in_nothing():
    format = JsonSchema({"properties": {"t": {"type": "array", "items": {"type": "string"}}}}, sets=["t"])
    assert differences(outcome(1, "content", target='{"t":["a","b"]}', answer='{"t":["b","a","c"]}'), format) == (
        [['t["c"#1]', "", '"c"']],
        ["t"],
    )


def test_the_nearest_training_rows_share_rare_words_and_come_in_a_fixed_order():
    train = [row("please play some music", 0), row("please book a table in Oslo", 1), row("Oslo weather please", 2)]
    [found] = nearest(["will the weather be fine in Oslo"], train)
    assert [near.number for _, near in found] == [2, 1] and 1 > found[0][0] > found[1][0] > 0
    assert nearest(["please play some music"], train)[0][0][0] > 0.999
    twins = [row("the same text", n) for n in range(5)]
    assert [near.number for _, near in nearest(["the same text"], twins)[0]] == [0, 1]
    shuffled = random.Random(0).sample(train, 3)
    assert nearest(["table in Oslo"], shuffled)[0][0][1].number == 1


def test_rows_that_share_nothing_are_not_named_and_without_rows_there_are_none():
    assert nearest(["abcd"], [row("wxyz")]) == [[]]
    assert nearest(["abcd"], []) == nearest(["abcd"], [row("  ")]) == [[]] and nearest([], [row("a")]) == []
    assert len(nearest(["", "a"], [row("a")])) == 2


def test_of_many_training_rows_evenly_spaced_ones_are_compared(monkeypatch):
    monkeypatch.setattr(gallery, "MAX_TRAINING_CHARACTERS", 200)
    train = [row(f"text number {n} of all", n) for n in range(95)]
    assert {near.number % 10 for _, near in nearest(["text number 7"], train)[0]} == {0}


def test_each_kind_is_among_the_failures_shown_and_the_worst_come_first(monkeypatch):
    monkeypatch.setattr(gallery, "MAX_FAILURES", 4)
    judged = [outcome(n, "syntax") for n in range(50)] + [
        outcome(50, "ok"),
        outcome(51, "content"),
        outcome(52, "empty"),
    ]
    shown = failures(judged, FORMAT, [row("input 51", 9)])
    assert [one.outcome.where for one in shown] == ["f:52", "f:0", "f:1", "f:51"]
    assert [near.number for _, near in shown[-1].nearest] == [9]
    assert failures([outcome(1)], FORMAT, []) == []


def test_long_texts_are_cut():
    [shown] = failures([replace(outcome(1, "syntax", answer="word " * 5000))], FORMAT, [row("in " * 9000)])
    assert len(shown.answer) < 3000
