"""Baselines are measured before training on the same rows; outcomes are written, read and paired."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import SCHEMA, answers, byte_tokenizer, outcome, pair
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.cli import main
from formtune.errors import UserError
from formtune.evaluation import baselines as baseline
from formtune.evaluation.baselines import choose_shots, constant_answer, few_shot_rows, prompting_verdict
from formtune.evaluation.outcomes import (
    EVALUATIONS,
    field_f1,
    paired,
    rate,
    read_outcomes,
    worst_first,
    write_outcomes,
)
from formtune.evaluation.probe import probe_lengths, probe_rows
from formtune.formats import JsonSchema, Labels


def test_outcomes_survive_the_disk_and_a_foreign_file_is_named(tmp_path):
    outcomes = [outcome(1), outcome(2, "syntax", answer="\ud800 lone")]
    write_outcomes(tmp_path / "o" / "a.jsonl", outcomes[:1])
    assert read_outcomes(tmp_path / "o" / "a.jsonl") == outcomes[:1]
    assert rate(outcomes, "exact") == (1, 2) and field_f1(outcomes) == 2 * 3 / 8
    (tmp_path / "b.jsonl").write_text('{"where": "f:1"}\n')
    with pytest.raises(UserError, match=r"b.jsonl:1: not an outcome"):
        read_outcomes(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no.jsonl: No such file"):
        read_outcomes(tmp_path / "no.jsonl")


def test_the_worst_failures_come_first_and_right_answers_not_at_all():
    judged = [outcome(n, kind=kind) for n, kind in enumerate(("content", "ok", "syntax", "empty", "content"))]
    assert [one.where for one in worst_first(judged)] == ["f:3", "f:2", "f:0", "f:4"]


def rows(renderer, number, format):
    texts = [(f"text {n}", format.labels[n % 3]) for n in range(number)]
    turns = [
        [
            {"role": "system", "content": "Label it."},
            {"role": "user", "content": t},
            {"role": "assistant", "content": a},
        ]
        for t, a in texts
    ]
    return list(renderer.encode([(t, f"f:{n}") for n, t in enumerate(turns)]))


def test_shots_are_training_rows_that_show_every_label_and_depend_on_nothing_else():
    renderer, format = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    train = rows(renderer, 30, format)
    chosen = choose_shots(train, 3, format)
    assert {row.target for row in chosen} == {"yes", "no", "maybe"}
    assert choose_shots(train[::-1], 3, format) == chosen
    assert len(choose_shots(train, 5, format)) == 5 and choose_shots(train, 2, format) == chosen[:2]


def test_shots_stand_between_system_prompt_and_question_and_as_many_as_fit_are_taken():
    renderer, format = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 12, format)
    few, count = few_shot_rows(encoded[:4], {None: encoded[4:8]}, renderer, 10**6)
    assert count == 4 and [row.target_ids for row in few] == [row.target_ids for row in encoded[:4]]
    text = renderer.tokenizer.decode(few[0].prompt_ids)
    assert text.count("Label it.") == 1 and text.index("text 4") < text.index("text 7") < text.index("text 0")
    limit = max(map(len, few)) - 1
    fewer, count = few_shot_rows(encoded[:4], {None: encoded[4:8]}, renderer, limit)
    assert count == 3 and all(len(row) <= limit for row in fewer)
    assert few_shot_rows(encoded[:4], {None: encoded[4:8]}, renderer, len(encoded[0]) + 1) == ([], 0)


def test_an_answer_that_looks_at_no_input_is_counted():
    renderer, format = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 30, format)
    often = [replace(row, target="no") for row in encoded[:20]]
    right = sum(row.target == "no" for row in encoded)
    assert 0 < right < 30 and constant_answer([*encoded, *often], encoded, format) == (right, 30)


def test_the_verdict_names_the_better_prompt_with_its_interval():
    base, shots = answers(10, exact=5, right=5), answers(10, exact=8, right=7)
    assert prompting_verdict({"without examples": base, "with 3 examples": shots}) == (
        "prompting (with 3 examples) reaches 80.0% valid format (49.0% to 94.3%) and 70.0% right (39.7% to 89.2%): "
        "20.0 points of valid format and 30.0 of right answers to gain"
    )
    # Right answers decide, and not the format alone.
    assert "prompting (b) " in prompting_verdict(
        {"a": answers(10, exact=9, right=1), "b": answers(10, exact=4, right=4)}
    )


def test_constrained_decoding_that_gives_form_without_content_leaves_points_to_win():
    plain = {"without examples": answers(100, exact=15, right=15)}
    assert prompting_verdict(plain, answers(100, exact=100, right=20)).endswith(
        ". With constrained decoding it reaches 100.0% valid format (96.3% to 100.0%) and 20.0% right (13.3% to 28.9%): "
        "0.0 points of valid format and 80.0 of right answers to gain"
    )
    assert prompting_verdict(plain, answers(100, exact=100, right=97)).endswith(
        "0.0 points of valid format and 3.0 of right answers to gain, so constrained decoding may be enough"
    )
    assert prompting_verdict({"p": answers(100, exact=97, right=97)}).endswith("so prompting may be enough")
    cut = [outcome(n, "truncated") for n in range(7)]
    assert "right (0.0% to 35.4%), 7 of 7 answers truncated: 100.0 points" in prompting_verdict(plain, cut)


def test_a_probe_lengthens_inputs_and_keeps_answers():
    renderer, format = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 60, format)
    lengths = probe_lengths([50, 60, 70], [100 + n for n in range(100)], context=190)
    assert lengths == {"production P50": 150, "twice the longest training row": 140}
    assert set(probe_lengths([50], [], 10**6)) == {
        "train P50",
        "train P95",
        "train P99",
        "twice the longest training row",
    }
    texts = [f"some other mail with number {n} in it" for n in range(50)]
    longer = probe_rows(encoded, texts, {"a": 150, "b": 300}, renderer)
    for name, tokens in (("a", 150), ("b", 300)):
        assert len(longer[name]) == 48
        assert all(0.85 * tokens <= len(row.prompt_ids) <= 1.1 * tokens for row in longer[name])
        assert [row.target for row in longer[name]] == [row.target for row in encoded[:48]]
        assert all(row.input.endswith(old.input) for row, old in zip(longer[name], encoded, strict=False))


def test_rows_are_paired_by_place_and_those_that_only_one_evaluation_has_are_left_out():
    before, after = [outcome(n, kind="content") for n in (5, 1, 3, 9)], [outcome(n) for n in range(6)]
    assert paired(before, after) == [[before[0], before[1], before[2]], [after[5], after[1], after[3]]]
    assert paired(after, before, after[:4]) == [[after[1], after[3]], [before[1], before[2]], [after[1], after[3]]]
    assert paired(before[3:], after) == [[], []] and paired(after) == [after]


def edits(a, b):
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


@pytest.mark.slow
def test_fit_measures_the_prompted_base_first_and_only_once(task, base, monkeypatch, capsys):
    folder, write = task
    monkeypatch.chdir(folder)
    write("train.jsonl", [pair(n, f"number {n * 7919} of {n}") for n in range(60)])
    words = ["train", "--model.base", base, "--data.train", "train.jsonl", "--data.format", "JsonSchema", "--task", "t"]
    words += ["--data.format.schema", "schema.json", "--trainer.max_steps", "2", "--model.max_new_tokens", "24"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    own = ["--model.metrics", "[{class_path: torchmetrics.text.CharErrorRate}]"]
    assert main([*words, *own, "--run", "one"]) == 0
    output = capsys.readouterr().out
    assert ") reaches 0.0% valid format" in output and ". With constrained decoding it reaches" in output
    assert output.index("prompting") < output.index("Result")
    run = folder / "logs/t/one"
    first = json.loads((run / "metrics.json").read_text())
    names = EVALUATIONS.keys() - {"start"}  # the run does not begin from an adapter
    evaluations = {name: read_outcomes(run / "outcomes" / f"{name}.jsonl") for name in names}
    assert len({tuple(one.where for one in outcomes) for outcomes in evaluations.values()}) == 1
    assert names <= first.keys() and names == first["counts"].keys()
    for name, outcomes in evaluations.items():
        assert rate(outcomes, "exact") == tuple(first["counts"][name]["format/exact"])
        assert all(one.answer.lstrip()[0] == "{" for one in outcomes) == ("constrained" in name)
        characters = sum(len(one.target) for one in outcomes)
        wrong = sum(edits(one.answer, one.target) for one in outcomes)
        assert first[name]["custom/CharErrorRate"] == pytest.approx(wrong / characters)
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"custom/CharErrorRate", "test/custom/CharErrorRate"} <= set(events.Tags()["scalars"])
    page_text = (run / "report.html").read_text()
    assert "custom/<wbr>CharErrorRate" in page_text and "tuned constrained" in page_text
    assert min(o.prompt_tokens for o in evaluations["few_shot"]) > max(o.prompt_tokens for o in evaluations["before"])
    train = {Path(place).name for place in first["shots"]}
    assert len(train) == len(first["shots"]) > 1 and not train & {Path(one.where).name for one in evaluations["before"]}
    assert (run / "report.html").is_file() and "some" not in (run / "adapter/README.md").read_text()[:10]

    evaluations = []
    monkeypatch.setattr(
        "lightning.pytorch.Trainer.test",
        lambda *args, __real=__import__("lightning.pytorch").pytorch.Trainer.test, **kw: (
            evaluations.append(1),
            __real(*args, **kw),
        )[1],
    )
    assert main([*words, "--run", "two"]) == 0
    second = json.loads((folder / "logs/t/two/metrics.json").read_text())
    # The tuned model's: test rows, validation rows, test rows constrained; the base's were stored.
    assert len(evaluations) == 3 + len(second["probe"])
    for name in names:
        assert second[name] == {key: value for key, value in first[name].items() if key != "custom/CharErrorRate"}

    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main([*words, "--run", "three", "--baselines", "[constrained]"]) == 0
    why = "skipped constrained decoding: needs llguidance; pip install -e '.[constrained]'"
    assert why in capsys.readouterr().out.splitlines()
    third = json.loads((folder / "logs/t/three/metrics.json").read_text())
    assert third["counts"].keys() == {"before", "after"} and third["after"] == second["after"]
    assert (
        "was not measured with constrained decoding: needs llguidance"
        in (folder / "logs/t/three/report.html").read_text()
    )


def test_another_base_or_format_is_measured_anew(tmp_path):
    row = Row([1, 2], [3], "s", "g", "f:1")
    (tmp_path / "config.json").write_text("{}")
    keys = {
        baseline.cache_entry(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema(SCHEMA)),
        baseline.cache_entry(str(tmp_path), [row], {"precision": "bf16-mixed"}, JsonSchema(SCHEMA)),
        baseline.cache_entry(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema({"type": "object"})),
        baseline.cache_entry(str(tmp_path), [row, row], {"precision": "32-true"}, JsonSchema(SCHEMA)),
    }
    (tmp_path / "config.json").write_text('{"a": 1}')
    keys.add(baseline.cache_entry(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema(SCHEMA)))
    assert len(keys) == 5
