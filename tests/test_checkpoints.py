"""The best checkpoint is the one that keeps the format, and only the files that can still win are kept."""

import itertools
import math
import random

from formtune.callbacks.checkpoints import Score, best, contenders


def test_format_beats_loss():
    assert best([Score(1, 90, 0.9, 0.1), Score(2, 95, 0.5, 0.9)]).step == 2


def test_within_one_row_field_f1_decides_then_loss_then_the_earlier_step():
    assert best([Score(1, 100, 0.8, 0.1), Score(2, 99, 0.9, 0.5)]).step == 2
    assert best([Score(1, 100, 0.9, 0.5), Score(2, 99, 0.9, 0.4)]).step == 2
    assert best([Score(2, 100, 0.9, 0.4), Score(1, 99, 0.9, 0.4)]).step == 1


def test_within_one_row_is_a_set_and_not_a_chain():
    assert best([Score(1, 98, 1.0, 0.1), Score(2, 99, 0.9, 0.1), Score(3, 100, 0.8, 0.1)]).step == 2


def test_nan_is_never_best():
    assert best([Score(1, 9, 0.5, math.nan)]) is None
    assert best([Score(1, 9, 0.5, math.nan), Score(2, 1, 0.0, 3.0)]).step == 2


def test_keeping_only_contenders_never_loses_a_later_best():
    rng = random.Random(0)
    for _ in range(2000):
        scores = [
            Score(i, rng.randrange(4), rng.randrange(3) / 2, rng.choice([0.0, 1.0, 2.0, math.nan])) for i in range(6)
        ]
        kept: set[Score] = set()
        for seen, score in enumerate(scores, 1):
            kept = contenders(kept | {score})
            assert len(kept) <= 2 and best(kept) == best(scores[:seen])


def test_every_order_of_arrival_gives_the_same_best():
    scores = [Score(1, 5, 0.2, 1.0), Score(2, 6, 0.1, 1.0), Score(3, 4, 0.9, 0.1), Score(4, 5, 0.3, 0.5)]
    assert {best(order) for order in itertools.permutations(scores)} == {best(scores)}
