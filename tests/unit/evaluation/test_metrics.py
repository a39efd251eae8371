"""Figures are sums over all rows, as a plain loop computes them."""

import math
from dataclasses import replace

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.text import CharErrorRate

from formtune.base.row import Row
from formtune.errors import UserError
from formtune.evaluation.metrics import LossMetrics, Scores, count, ratios
from formtune.evaluation.outcomes import outcome
from formtune.formats import KINDS
from test_formats import CASES, FORMAT, TARGET

ROW = Row([], [], "Ann", TARGET, "f:1")


def answered(text, **how):
    return outcome(ROW, text, FORMAT.check(text, target=TARGET, **how), FORMAT)


OUTCOMES = [answered(text) for text, *_ in CASES]
OUTCOMES += [answered(text, finished=False) for text in (TARGET, TARGET[:9])]


def measured(outcomes):
    return ratios(count(outcomes, FORMAT))


def test_metrics_equal_a_plain_loop():
    values, n = measured(OUTCOMES), len(OUTCOMES)
    assert values["format/exact"] == pytest.approx(sum(v.kind in ("ok", "content") for v in OUTCOMES) / n)
    assert values["format/loose"] == pytest.approx(sum(v.loose for v in OUTCOMES) / n)
    assert values["joint/exact"] == pytest.approx(sum(v.kind == "ok" for v in OUTCOMES) / n)
    for kind in KINDS:
        assert values[f"fail/{kind}"] == sum(v.kind == kind for v in OUTCOMES)
    matched, both = (sum(getattr(v, name) for v in OUTCOMES) for name in ("matched", "values"))
    expected = 6 * n  # p, name, two items, n, d; the null is no value
    precision, recall = matched / (both - expected), matched / expected
    assert values["content/field_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert values["content/field_acc/c.name"] == pytest.approx(sum(v.fields["c.name"] for v in OUTCOMES) / n)


def test_failures_sum_to_the_rows():
    assert sum(value for name, value in measured(OUTCOMES).items() if name.startswith("fail/")) == len(OUTCOMES)


def test_an_unparseable_answer_lowers_every_rate():
    good = answered(TARGET)
    all_good, one_bad = measured([good] * 4), measured([good] * 3 + [answered("no")])
    for name, value in all_good.items():
        if value == 1:
            assert one_bad[name] < 1, name
    assert {name for name, value in all_good.items() if value == 1} >= {
        "format/exact",
        "joint/exact",
        "content/field_f1",
    }


def test_processes_get_the_loss_of_the_whole_and_continue_with_their_own():
    ranks = [LossMetrics(), LossMetrics()]
    for rank, nats in zip(ranks, (1.0, 3.0), strict=True):
        rank.update(torch.tensor([nats]))
    sums = [rank.sums.clone() for rank in ranks]
    for rank in ranks:
        rank.dist_sync_fn, rank.distributed_available_fn = (lambda tensor, group: sums), lambda: True
        assert ratios(rank.compute())["val/loss"] == 2.0
    assert [float(rank.sums[0, 0]) for rank in ranks] == [1.0, 3.0]


def test_counts_explain_every_rate():
    for name, (k, n) in count(OUTCOMES, FORMAT).items():
        assert measured(OUTCOMES)[name] == (k if name.startswith("fail/") else pytest.approx(k / n))


def test_no_rows_give_nan_and_no_value_gives_zero():
    assert all(math.isnan(value) for name, value in measured([]).items() if not name.startswith("fail/"))
    assert measured([answered("no")])["content/field_f1"] == 0


def test_loss_is_weighted_by_tokens():
    metrics = LossMetrics()
    metrics.update(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    metrics.compare([True, False, True])
    assert metrics.compute() == {"val/loss": (12.0, 4), "val/parity": (2, 3)}
    assert ratios(metrics.compute())["val/loss"] == 3.0


class Lengths(Metric):
    """Several figures by name; a state that is changed in place."""

    def __init__(self):
        super().__init__()
        self.add_state("characters", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions, targets):
        self.characters += sum(map(len, predictions))

    def compute(self):
        return {"characters": self.characters, "doubled": 2 * self.characters}


def own(scores, *pairs):
    """The figures of the user's own metrics for answers and their targets."""
    rows = [(replace(ROW, target=target), answer, FORMAT.check(answer)) for answer, target in pairs]
    outcomes = [outcome(*row, FORMAT) for row in rows]
    figures, _ = scores.compute(outcomes, outcomes)
    return {name: value for name, value in figures.items() if name.startswith("custom/")}


def test_metrics_of_ones_own_are_named_by_class_and_number_or_by_figure_and_begin_anew():
    scores = Scores(FORMAT, [Lengths(), CharErrorRate(), CharErrorRate()])
    lengths = {"custom/characters": 2, "custom/doubled": 4}
    assert own(scores, ("ab", "ac")) == lengths | {"custom/CharErrorRate-2": 0.5, "custom/CharErrorRate-3": 0.5}
    assert own(scores, ("x", "y"))["custom/characters"] == 1


class Broken(Metric):
    full_state_update = False

    def update(self, predictions, targets):
        return predictions["no"]

    def compute(self):
        return "many words"


def test_a_metric_of_ones_own_that_fails_is_named_in_one_line():
    scores = Scores(FORMAT, [Broken()])
    with pytest.raises(UserError, match=r"^model.metrics: a metric failed .list indices .*two lists"):
        own(scores, ("a", "b"))
    with pytest.raises(UserError, match="a metric failed .could not"):
        scores.compute([], [])  # a process may get no row


def test_a_network_within_a_metric_is_not_trained():
    class Network(Metric):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 2)

        def update(self, answers, targets):
            pass

        def compute(self):
            return 0.0

    assert not [p for p in Scores(FORMAT, [Network()]).parameters() if p.requires_grad]
