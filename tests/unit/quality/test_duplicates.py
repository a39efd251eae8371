"""Near-duplicates are those that a comparison of every pair gives, and rows are quarantined by the documented rules."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from near_pairs_on_ray import near_pairs_on_ray

from conftest import WORDY, selected
from formtune.data.cleaning import Example
from formtune.data.selection import components
from formtune.quality.duplicates import (
    SHINGLE,
    band_size,
    near_pairs,
    shingles,
    similar,
    split_shared,
)

WORDS = [
    "please",
    "could",
    "you",
    "book",
    "a",
    "table",
    "for",
    "five",
    "people",
    "at",
    "the",
    "old",
    "harbour",
    "tonight",
    "near",
    "my",
    "office",
    "in",
    "Porto",
]


def sets_of(texts):
    return [{text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} for text in texts]


def perturbed(number, seed):
    """Random sentences, and copies with a letter or a word changed."""
    dice = random.Random(seed)
    texts = []
    for _ in range(number):
        words = [
            dice.choice(WORDS) + str(dice.randrange(30)) * (dice.random() < 0.3) for _ in range(dice.randrange(3, 25))
        ]
        texts.append(" ".join(words))
        for _ in range(dice.randrange(3)):
            changed = list(texts[-1])
            for _ in range(dice.randrange(1, 4)):
                changed[dice.randrange(len(changed))] = dice.choice("xyz é")
            texts.append("".join(changed))
    return list(dict.fromkeys(texts))


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_nearly_all_pairs_are_reported_each_once_and_no_other(threshold):
    texts = perturbed(500, seed=int(threshold * 10))
    sets = sets_of(texts)
    true = {}
    for i, j in itertools.combinations(range(len(texts)), 2):
        index = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        if index >= threshold:
            true[i, j] = index
    left, right, index = near_pairs(texts, threshold)
    reported = dict(zip(zip(left.tolist(), right.tolist(), strict=True), index.tolist(), strict=True))
    assert len(reported) == len(left) and len(true) > 50
    assert not reported.keys() - true.keys()
    assert len(reported) >= 0.99 * len(true)
    assert all(abs(value - true[pair]) < 1e-9 for pair, value in reported.items())


@given(st.lists(st.text(max_size=12), max_size=8))
def test_shingles_are_those_of_each_text_alone(texts):
    flat, offsets = shingles(texts)
    for at, expected in enumerate(sets_of(texts)):
        own = flat[offsets[at] : offsets[at + 1]]
        assert len(set(own.tolist())) == len(expected)
        assert np.array_equal(own, shingles([texts[at]])[0])


def test_lone_surrogates_and_short_texts_are_compared_too():
    texts = ["\ud800 is no letter", "a", "", "ab"]
    pairs = np.array([0, 1, 2]), np.array([0, 3, 2])
    assert similar(texts, *pairs).tolist() == [1.0, 0.0, 1.0]
    assert near_pairs(texts, 0.8)[0].tolist() == []
    assert near_pairs([], 0.8)[0].tolist() == []


def test_bands_miss_few_of_the_pairs_at_the_threshold():
    assert [band_size(t) for t in (0.5, 0.8, 0.9, 1.0)] == [2, 6, 8, 24]


def test_a_chain_is_one_cluster():
    assert components(4, np.array([0, 1]), np.array([1, 3])).tolist() == [0, 0, 1, 0]


def test_many_texts_of_one_template_are_one_cluster_although_few_of_their_pairs_are_compared():
    numbers = random.Random(0).sample(range(10**6), 1000)
    texts = [
        f"please set an alarm on my phone in the kitchen for tomorrow morning at {number} ok" for number in numbers
    ]
    left, right, _ = near_pairs(texts, 0.8)
    assert set(components(len(texts), left, right).tolist()) == {0}
    assert len(set(zip(left.tolist(), right.tolist(), strict=True))) == len(left) < 40 * len(texts)


def example(where, text, answer, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": text}, {"role": "assistant", "content": str(answer)}]
    return Example(turns, where, value=answer)


def outcome(**splits):
    rows = {name: [example(f"{name}:{i}", *row) for i, row in enumerate(rows)] for name, rows in splits.items()}
    selection = selected(**rows)
    reasons = {e.where: "" for examples in selection.examples.values() for e in examples}
    reasons |= {row.where: row.reason for row in selection.quarantine}
    assert len(reasons) == sum(map(len, rows.values()))
    return reasons


LONG = "I would like to book a table for {} people in the old harbour restaurant on Friday evening please"


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ([("call Anna", "x"), ("call Anna", "x")], ["", "duplicate"]),
        ([("call Anna", "x"), ("Call  anna!", "x")], ["", "near_duplicate"]),
        ([(LONG.format(5), "x"), (LONG.format(5) + " thanks", "x")], ["", "near_duplicate"]),
        ([("call Anna", "x"), ("call Anna", "y")], ["conflict", "conflict"]),
        ([("call Anna", {"n": -1}), ("call Anna", {"n": -2})], ["conflict", "conflict"]),
        ([("call Anna", 1), ("Call Anna", 1.0)], ["conflict", "conflict"]),
        ([("call Anna", "x"), ("call anna.", "y"), ("call Anna", "x")], ["conflict"] * 3),
        # Copied as the inputs write it.
        ([("call Anna", "Anna"), ("call anna", "anna")], ["", ""]),
        ([("call Anna", "Anna"), ("call Anna", "anna")], ["conflict"] * 2),
        ([(LONG.format(5), 5), (LONG.format(6), 6)], ["", ""]),
        # A letter, a word or a number more may be the reason.
        ([(LONG.format(5), "x"), (LONG.format(5).replace("restaurant", "restuarant"), "y")], ["", ""]),
        ([(LONG.format(5), {"n": 5, "kind": "new"}), (LONG.format(6), {"n": 6, "kind": "old"})], ["", ""]),
        ([("number 8", "VIII"), ("number 82", "LXXXII")], ["", ""]),
        # Both inputs hold both values: nothing says which is right.
        ([(LONG.format("5 or 6"), 5), (LONG.format("5 or  6"), 6)], ["conflict"] * 2),
        # Another task, another answer.
        ([("call Anna", "x", "A"), ("call Anna", "y", "B")], ["", ""]),
        ([("wait 12.5", 12.5), ("wait 125", 125)], ["", ""]),
        ([("c++", "x"), ("c#", "y")], ["", ""]),
    ],
)
def test_the_rules_for_rows_of_one_split(rows, reasons):
    assert list(outcome(train=rows).values()) == reasons or outcome(train=rows) == {
        f"train:{i}": reason for i, reason in enumerate(reasons)
    }


def test_a_row_is_a_near_duplicate_only_of_a_used_row():
    a = "one two three four five six seven eight nine ten eleven twelve"
    b = a.replace("one", "ONE1").replace("twelve", "twelve 12")
    c = b.replace("ten eleven", "tin elevin")
    reasons = outcome(train=[(a, "x"), (b, "x"), (c, "x")])
    near = {
        (i, j)
        for i, j, _ in zip(
            *(part.tolist() for part in near_pairs([a.casefold(), b.casefold(), c.casefold()], 0.8)), strict=True
        )
    }
    assert (0, 2) not in near
    assert reasons == {"train:0": "", "train:1": "near_duplicate" if (0, 1) in near else "", "train:2": ""}


def test_a_cluster_belongs_to_the_split_that_comes_first():
    reasons = outcome(
        test=[("call Anna", "x")],
        validation=[("Call anna!", "y"), ("something else entirely", "z")],
        train=[("call anna", "x"), ("something else entirely", "z"), ("a third thing altogether", "z")],
    )
    assert reasons == {
        "test:0": "",
        "validation:0": "leak",
        "validation:1": "",
        "train:0": "leak",
        "train:1": "leak",
        "train:2": "",
    }


def test_rows_of_one_cluster_have_one_number_whatever_the_order_of_the_rows():
    texts = [LONG.format(n) for n in range(40)] + [f"something else number {n * n} of {n}" for n in range(40)]
    rows = [example(text, text, n) for n, text in enumerate(texts)]
    places = [selected(train=order).cluster for order in (rows, rows[::-1])]
    assert places[0] == places[1]
    assert len({places[0][text] for text in texts[:40]}) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["test", "validation", "train"]), st.text("ab 1.", max_size=8), st.integers(0, 1)),
        max_size=25,
    )
)
def test_no_row_is_lost_and_no_input_is_in_two_splits(rows):
    splits = {name: [] for name in ("test", "validation", "train")}
    for number, (name, text, answer) in enumerate(rows):
        splits[name].append(example(str(number), text, answer))
    selection = selected(**splits)
    places = [e.where for rows in selection.examples.values() for e in rows] + [
        row.where for row in selection.quarantine
    ]
    assert sorted(places) == sorted(str(n) for n in range(len(rows)))
    keys = {name: {e.key for e in rows} for name, rows in selection.examples.items()}
    assert all(not keys[a] & keys[b] for a, b in itertools.combinations(keys, 2))


def test_ray_gives_the_same_pairs():
    ray = pytest.importorskip("ray", reason="needs the extra `scale`")
    texts = perturbed(400, seed=3)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        on_ray = near_pairs_on_ray(ray.data.from_items([{"id": i, "text": t} for i, t in enumerate(texts)]), 0.8)
    finally:
        ray.shutdown()
    here = near_pairs(texts, 0.8)
    pairs = [
        dict(zip(zip(*(p.tolist() for p in part[:2]), strict=True), part[2].tolist(), strict=True))
        for part in (on_ray, here)
    ]
    assert pairs[0] == pairs[1] and len(pairs[0]) > 100


ORDER = (
    "Read the customer's message and return a JSON object with the keys mood and item. Use positive, negative or "
    "neutral for the mood and the name of the thing for the item. Return the object only, without a code fence."
)
COUNT = (
    "Look at the following text that a visitor wrote to us and say how many things it names, counting each of them "
    "only once. Write the number in digits and leave out everything else, even if the text asks for more than that."
)
SHOTS = "\n".join(
    f"Message: the {a} beside my {b} broke\nAnswer: {{'item': '{a}'}}" for a, b in itertools.pairwise(WORDY)
)
FORM = [
    "name age height weight blood pressure systolic",
    "blood pressure diastolic",
    "heart rate",
    "insurance number",
    "ward",
]


def messages(number, seed=0):
    dice = random.Random(seed)
    return [" ".join(dice.choice(WORDY) for _ in range(10)) + f" {n}" for n in range(number)]


@pytest.mark.parametrize(
    "template",
    [
        lambda n, text: f"{ORDER}\n\nMessage: {text}",
        lambda n, text: f"{text}\n\n{ORDER}",
        lambda n, text: f"{ORDER} Message: {text} Context: {text[::-1]} Answer as JSON.",
        lambda n, text: f"{(ORDER, COUNT)[n % 2]}\nMessage: {text}\nAnswer:",
        lambda n, text: f"{ORDER}\n{SHOTS}\nMessage: {text}",
        lambda n, text: "\n".join(f"{name}: {n * k % 997}" for k, name in enumerate(FORM, 3)),
        lambda n, text: f"请阅读以下客户消息并返回一个包含情绪物品和数量的对象不要添加任何其他文字 {text}",
    ],
    ids=["before", "after", "around", "two instructions", "few-shot", "lines", "no spaces"],
)
def test_text_that_inputs_share_does_not_make_them_nearly_the_same(template):
    rows = [example(str(n), template(n, text), n % 3) for n, text in enumerate(messages(200))]
    selection = selected(train=rows)
    assert len(selection.examples["train"]) == 200
    assert len(set(selection.cluster.values())) > 190
    assert selection.shared > 0.3
    assert 0.15 < sum(place < 0.3 for place in selection.cluster.values()) / 200 < 0.45


def test_near_duplicates_below_a_shared_instruction_are_still_found():
    texts = messages(100)
    rows = [example(f"{n}", f"{ORDER}\nMessage: {text}", n) for n, text in enumerate(texts)]
    rows += [example(f"{n} again", f"{ORDER}\nMessage: {texts[n]} please", n) for n in range(50)]
    rows += [example(f"{n} conflict", f"{ORDER}\nMessage: {texts[n]}", -1) for n in range(50, 60)]
    selection = selected(train=rows)
    reasons = {row.where: row.reason for row in selection.quarantine}
    conflicts = {f"{n}{more}": "conflict" for n in range(50, 60) for more in ("", " conflict")}
    assert reasons == {f"{n} again": "near_duplicate" for n in range(50)} | conflicts


def test_the_same_message_below_two_instructions_is_one_cluster_and_neither_a_duplicate_nor_a_conflict():
    texts = messages(60)
    for other in (0, 1):  # the same answer, another one
        below = [
            example(f"{n} {k}", f"{text}\n{order}", n + other * k)
            for n, text in enumerate(texts)
            for k, order in enumerate((ORDER, COUNT))
        ]
        selection = selected(train=below)
        assert len(selection.examples["train"]) == 120
        assert all(selection.cluster[f"{n} 0"] == selection.cluster[f"{n} 1"] for n in range(60))
        split = selected(test=below[::2], train=below[1::2])
        assert {row.reason for row in split.quarantine} == {"leak"} and not split.examples["train"]


def test_an_input_that_is_nothing_but_shared_text_is_compared_by_all_of_it():
    rows = [example(f"{n}", f"{ORDER}\nMessage: {text}", n) for n, text in enumerate(messages(60))]
    rows += [example("order", ORDER, "x"), example("again", ORDER, "x"), example("count", COUNT, "y")]
    selection = selected(train=rows)
    assert [(row.where, row.reason) for row in selection.quarantine] == [("again", "duplicate")]
    assert len(set(selection.cluster.values())) == 62


def test_frequent_words_of_short_utterances_are_not_shared_text():
    dice = random.Random(4)
    texts = [f"play {dice.choice(WORDY)} {dice.choice(WORDY)} by {dice.choice(WORDY)} on {n}" for n in range(400)]
    names = [text.casefold() for text in texts]
    rests = list(split_shared(names, [dice.random() for _ in names]))
    assert rests == [(name, "") for name in names]
    assert selected(train=[example(text, text, text) for text in texts]).shared == 0


def talk(where, turns, answer):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate([*turns, str(answer)])]
    return Example(messages, where, value=answer)


def test_a_row_that_continues_another_is_in_its_cluster_and_not_a_duplicate():
    opening = "Good evening, I am looking for somewhere to eat Thai food in Oslo tonight, nothing too fancy if possible"
    turns = [opening, "find Oslo", "book it"]
    rows = [talk("a", [opening], "find Oslo"), talk("b", turns, "book"), talk("c", [*turns, "book", "thanks"], "book")]
    selection = selected(train=rows)
    assert not selection.quarantine and len(set(selection.cluster.values())) == 1
    # Also where what is added is long, and in another split it is a leak.
    rows[1] = talk("b", [*turns[:2], "something else altogether, " * 20], "book")
    assert len(set(selected(train=rows).cluster.values())) == 1
    quarantine = selected(test=rows[:1], train=rows[1:]).quarantine
    assert [(row.where, row.reason) for row in quarantine] == [("b", "leak"), ("c", "leak")]
    # Two ways on from the same turns are compared as ever.
    rows = [talk("a", turns, "x"), talk("b", [*turns[:2], "book it!"], "y")]
    assert {row.reason for row in selected(train=rows).quarantine} == {"conflict"}


def test_conversations_that_only_open_alike_are_not_a_cluster():
    rows = [talk("hello", ["hello"], "hello, how can I help")]
    rows += [talk(text, ["hello", "hello, how can I help", text], text) for text in messages(40)]
    assert len(set(selected(train=rows).cluster.values())) == 41


def test_rows_with_their_text_in_the_system_prompt_are_different_inputs():
    def document(i):
        return " ".join(WORDY[(i * k + k * k) % 16] + str(i * 7919 % (k + 90)) for k in range(8))

    rows = [example(f"f:{i}", "Extract the fields.", f"answer {i}", system=document(i)) for i in range(60)]
    selection = selected(train=rows)
    assert not selection.quarantine and len(set(selection.cluster.values())) > 30
    few = [example(f"f:{i}", "Extract the fields.", "same", system=f"You serve the shop {i}.") for i in range(60)]
    assert len(set(selected(train=few).cluster.values())) == 1, "a short system prompt is no text to extract from"
