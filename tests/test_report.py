"""Baselines are measured before training on the same rows, and a run's page says where it fails."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import SCHEMA, byte_tokenizer, pair
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.cli import main
from formtune.errors import UserError
from formtune.evaluation import baselines as baseline
from formtune.evaluation.baselines import choose_shots, constant_answer, few_shot_rows, prompting_verdict
from formtune.evaluation.outcomes import VIEWS, Outcome, field_f1, rate, read_outcomes, write_outcomes
from formtune.evaluation.probe import probe_lengths, probe_rows
from formtune.evaluation.report import Run, card, gallery, headline, page, pictures
from formtune.evaluation.slices import slices
from formtune.formats import KINDS, JsonSchema, Labels


def outcome(number, exact=True, kind="ok", tokens=10, origin="", target='{"n":1,"s":"a"}', answer=None):
    answer = target if answer is None else answer
    return Outcome(
        f"f:{number}", origin, tokens, 5, f"input {number}", target, answer, kind, "why", exact, exact, kind == "ok",
        2 if kind == "ok" else 1, 2, 2, {"n": kind == "ok", "s": True},
    )  # fmt: skip


def said(rows, exact, right):
    """The first ones in format, of these the first ones right, too."""
    kinds = ["ok"] * right + ["content"] * (exact - right) + ["syntax"] * (rows - exact)
    return [outcome(n, kind in ("ok", "content"), kind) for n, kind in enumerate(kinds)]


def test_outcomes_survive_the_disk_and_a_foreign_file_is_named(tmp_path):
    kept = [outcome(1), outcome(2, False, "syntax", answer="\ud800 lone")]
    write_outcomes(tmp_path / "o" / "a.jsonl", kept[:1])
    assert read_outcomes(tmp_path / "o" / "a.jsonl") == kept[:1]
    assert rate(kept, "exact") == (1, 2) and field_f1(kept) == 2 * 3 / 8
    (tmp_path / "b.jsonl").write_text('{"where": "f:1"}\n')
    with pytest.raises(UserError, match=r"b.jsonl:1: not an outcome"):
        read_outcomes(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no.jsonl: No such file"):
        read_outcomes(tmp_path / "no.jsonl")


def rows(renderer, number, contract):
    texts = [(f"text {n}", contract.labels[n % 3]) for n in range(number)]
    turns = [
        [
            {"role": "system", "content": "Label it."},
            {"role": "user", "content": t},
            {"role": "assistant", "content": a},
        ]
        for t, a in texts
    ]
    return list(renderer.encode([(t, f"f:{n}") for n, t in enumerate(turns)], contract.value_spans))


def test_shots_are_training_rows_that_show_every_label_and_depend_on_nothing_else():
    renderer, contract = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    train = rows(renderer, 30, contract)
    chosen = choose_shots(train, 3, contract)
    assert {row.gold for row in chosen} == {"yes", "no", "maybe"}
    assert choose_shots(train[::-1], 3, contract) == chosen
    assert len(choose_shots(train, 5, contract)) == 5 and choose_shots(train, 2, contract) == chosen[:2]


def test_shots_stand_between_system_prompt_and_question_and_as_many_as_fit_are_taken():
    renderer, contract = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 12, contract)
    few, count = few_shot_rows(encoded[:4], encoded[4:8], renderer, contract, 10**6)
    assert count == 4 and [row.target for row in few] == [row.target for row in encoded[:4]]
    text = renderer.tokenizer.decode(few[0].prompt)
    assert text.count("Label it.") == 1 and text.index("text 4") < text.index("text 7") < text.index("text 0")
    limit = max(map(len, few)) - 1
    fewer, count = few_shot_rows(encoded[:4], encoded[4:8], renderer, contract, limit)
    assert count == 3 and all(len(row) <= limit for row in fewer)
    assert few_shot_rows(encoded[:4], encoded[4:8], renderer, contract, len(encoded[0]) + 1) == ([], 0)


def test_an_answer_that_looks_at_no_input_is_counted():
    renderer, contract = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 30, contract)
    often = [replace(row, gold="no") for row in encoded[:20]]
    right = sum(row.gold == "no" for row in encoded)
    assert 0 < right < 30 and constant_answer([*encoded, *often], encoded, contract) == (right, 30)


def test_the_verdict_names_the_better_prompt_with_its_interval():
    base, shots = said(10, exact=5, right=5), said(10, exact=8, right=7)
    assert prompting_verdict({"without examples": base, "with 3 examples": shots}) == (
        "prompting, with 3 examples, reaches 80.0% in format (49.0% to 94.3%) and 70.0% right (39.7% to 89.2%): "
        "fine-tuning has at most 20.0 points of format and 30.0 of right answers to win"
    )
    assert "nothing is left to win" in prompting_verdict({"plain": said(1, exact=1, right=1)})
    # Right answers decide, and not the format alone.
    assert "prompting, b," in prompting_verdict({"a": said(10, exact=9, right=1), "b": said(10, exact=4, right=4)})


def test_a_grammar_that_gives_form_without_content_leaves_points_to_win():
    plain = {"without examples": said(100, exact=15, right=15)}
    assert prompting_verdict(plain, said(100, exact=100, right=20)).endswith(
        ". With a grammar it reaches 100.0% in format (96.3% to 100.0%) and 20.0% right (13.3% to 28.9%): "
        "fine-tuning has at most 0.0 points of format and 80.0 of right answers to win"
    )
    assert prompting_verdict(plain, said(100, exact=100, right=97)).endswith(
        "at most 0.0 points of format and 3.0 of right answers to win, so a grammar may be enough"
    )
    assert prompting_verdict({"p": said(100, exact=97, right=97)}).endswith("so prompting may be enough")
    cut = [outcome(n, False, "truncated") for n in range(7)]
    assert "right (0.0% to 35.4%), 7 of 7 answers cut for length: fine-tuning" in prompting_verdict(plain, cut)


CONTRACT = JsonSchema({"properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}})


def test_slices_hold_the_rows_that_they_name():
    found = [
        outcome(n, tokens=10 + n, origin="human" if n % 2 else "wise-1", target=f'{{"n":{n},"s":"{"ab"[n % 3 == 0]}"}}')
        for n in range(40)
    ]
    named = {(one.group, one.name): one.rows for one in slices(found, CONTRACT, longest=40, production_p95=45)}
    assert named["source", "human"] == tuple(range(1, 40, 2))
    assert named["s", "b"] == tuple(range(0, 40, 3))
    assert named["prompt tokens", "longer than any training row (40)"] == tuple(range(31, 40))
    assert named["prompt tokens", "from production's P95 (45) on"] == tuple(range(35, 40))
    buckets = [rows for (group, name), rows in named.items() if group == "prompt tokens" and " to " in name]
    assert len(buckets) == 4 and sorted(row for rows in buckets for row in rows) == list(range(40))
    assert not slices(found[:3], CONTRACT, longest=100)


def test_a_probe_lengthens_inputs_and_keeps_answers():
    renderer, contract = Renderer(byte_tokenizer()), Labels(["yes", "no", "maybe"])
    encoded = rows(renderer, 60, contract)
    lengths = probe_lengths([50, 60, 70], [100 + n for n in range(100)], context=190)
    assert lengths == {"production P50": 150, "twice the longest training row": 140}
    assert set(probe_lengths([50], [], 10**6)) == {
        "train P50",
        "train P95",
        "train P99",
        "twice the longest training row",
    }
    texts = [f"some other mail with number {n} in it" for n in range(50)]
    found = probe_rows(encoded, texts, {"a": 150, "b": 300}, renderer, contract)
    for name, tokens in (("a", 150), ("b", 300)):
        assert len(found[name]) == 48
        assert all(0.85 * tokens <= len(row.prompt) <= 1.1 * tokens for row in found[name])
        assert [row.gold for row in found[name]] == [row.gold for row in encoded[:48]]
        assert all(row.source.endswith(old.source) for row, old in zip(found[name], encoded, strict=False))


def run_of(before, after, **views):
    training = {"steps": 5, "seconds": 1.0, "best_step": 4, "best_reason": "best checkpoint: step 4 (why)"}
    result = {"rows": len(after), "training": training, "data": "abc", "after": {}, "probe": []}
    result["counts"] = {"after": {"val/parity": (41, 42)}}
    return Run(
        "task/one", result, {"before": before, "after": after} | views, CONTRACT, 20, None, {"format": 2}, "model: {}",
        "some/base",
    )  # fmt: skip


def test_the_headline_says_whether_training_was_worth_it():
    before = said(300, exact=50, right=50)
    assert headline(run_of(before, said(300, exact=280, right=240))) == [
        "93.3% of the answers keep the format (89.9% to 95.6%): against 16.7% (base) better",
        "80.0% of the answers are right (75.1% to 84.1%): against 16.7% (base) better",
    ]
    assert all("cannot tell" in line for line in headline(run_of(before, said(300, exact=51, right=51))))
    assert all("worse" in line for line in headline(run_of(before, said(300, exact=5, right=5))))
    run = run_of(before, said(300, exact=280, right=240))
    run.result["constant"] = (250, 300)
    assert headline(run)[1].endswith("better, against 83.3% by always giving the most frequent training answer")
    assert 'class="verdict blocked"' in page(run)  # right less often than without a look at the input
    assert 'class="verdict"' in page(run_of(before, said(300, exact=280, right=240)))
    assert 'class="verdict blocked"' in page(run_of(before, said(300, exact=51, right=51)))
    few, constrained = said(300, exact=60, right=60), said(300, exact=300, right=235)
    form, content = headline(
        run_of(before, said(300, exact=280, right=240), few_shot=few, before_constrained=constrained)
    )
    assert "against 20.0% (base with examples) better, against 100.0% (base under a grammar) worse" in form
    tuned = {"after_constrained": said(300, exact=300, right=270)}
    assert headline(run_of(before, said(300, exact=280, right=240), **tuned))[1].startswith(
        "80.0% of the answers are right (75.1% to 84.1%), 90.0% under a grammar (86.1% to 92.9%): against"
    )
    assert re.search(r"better, against 78.3% \(base under a grammar\) cannot tell with 300 rows", content)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = Counter(), []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_the_page_shows_failures_marked_and_escaped_and_loads_nothing():
    bad = outcome(3, False, "syntax", answer='{"n":1,"s":<script>alert(1)</script>')
    text = page(run_of([outcome(n) for n in range(9)], [*(outcome(n) for n in range(8)), bad]))
    seen = Page()
    seen.feed(text)
    assert not seen.tags["script"] and not seen.outside and seen.tags["svg"] == 1
    assert "<title>Run task/one</title>" in text and "on some/base" in text
    assert "5 steps in 1 s. Best checkpoint: step 4 (why).</p>" in text
    [(one, target, answer)] = gallery([outcome(1), bad])
    assert one is bad and "<del>" in target and "<ins>" in answer and "<script>" not in answer


@pytest.mark.parametrize("losses", [(9.3, 8.5), (0.06, 0.002)])
def test_losses_stand_at_their_axis_as_plain_numbers(losses):
    run = run_of([outcome(1)], [outcome(1)])
    points = [
        {"step": n, "train_loss": loss, "val_loss": loss, "exact": 1, "rows": 1, "field_f1": 1.0}
        for n, loss in enumerate(losses)
    ]
    run.result["training"]["history"] = points
    ((_, _, figure), _) = pictures(run)
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    marks = [tick.get_text() for tick in axis.get_ticklabels(which="both") if tick.get_text()]
    assert len(marks) >= 3 and all(float(mark) > 0 for mark in marks)


def test_no_two_kinds_of_failure_have_one_colour():
    failed = [outcome(n, kind == "content", kind) for n, kind in enumerate(KINDS)]
    ((_, _, figure),) = pictures(run_of(failed, failed))
    colors = {bars[0].get_facecolor() for bars in figure.axes[0].containers}
    assert len(colors) == len(KINDS)


def test_the_card_has_the_evidence_and_the_metadata():
    text = card(run_of([outcome(n, n < 2) for n in range(9)], [outcome(n) for n in range(9)]))
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "some/base" and head["library_name"] == "peft"
    assert "| format/exact | 22.2% (6.3% to 54.7%) | 100.0% (70.1% to 100.0%) |" in text


def edits(a, b):
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_fit_measures_the_prompted_base_first_and_only_once(task, base, monkeypatch, capsys):
    folder, write = task
    monkeypatch.chdir(folder)
    write("train.jsonl", [pair(n, f"number {n * 7919} of {n}") for n in range(60)])
    words = ["fit", "--model.base", base, "--data.train", "train.jsonl", "--data.format", "JsonSchema", "--task", "t"]
    words += ["--data.format.schema", "schema.json", "--trainer.max_steps", "2", "--model.max_new_tokens", "24"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    words += ["--model.metrics", "[{class_path: torchmetrics.text.CharErrorRate}]"]
    assert main([*words, "--run", "one"]) == 0
    said = capsys.readouterr().out
    assert ", reaches 0.0% in format" in said and ". With a grammar it reaches" in said
    assert said.index("prompting") < said.index("Result")
    run = folder / "logs/t/one"
    first = json.loads((run / "metrics.json").read_text())
    kept = {name: read_outcomes(run / "outcomes" / f"{name}.jsonl") for name in VIEWS}
    assert len({tuple(one.where for one in outcomes) for outcomes in kept.values()}) == 1
    assert VIEWS.keys() <= first.keys() and VIEWS.keys() == first["counts"].keys()
    for name, outcomes in kept.items():
        assert rate(outcomes, "exact") == tuple(first["counts"][name]["format/exact"])
        assert all(one.answer.lstrip()[0] == "{" for one in outcomes) == ("constrained" in name)
        characters = sum(len(one.target) for one in outcomes)
        wrong = sum(edits(one.answer, one.target) for one in outcomes)
        assert first[name]["own/CharErrorRate"] == pytest.approx(wrong / characters)
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"own/CharErrorRate", "test/own/CharErrorRate"} <= set(events.Tags()["scalars"])
    page_text = (run / "report.html").read_text()
    assert "own/CharErrorRate" in page_text and "tuned under a grammar" in page_text
    assert min(o.prompt_tokens for o in kept["few_shot"]) > max(o.prompt_tokens for o in kept["before"])
    train = {Path(place).name for place in first["shots"]}
    assert len(train) == len(first["shots"]) > 1 and not train & {Path(one.where).name for one in kept["before"]}
    assert (run / "report.html").is_file() and "some" not in (run / "adapter/README.md").read_text()[:10]

    asked = []
    monkeypatch.setattr(
        "lightning.pytorch.Trainer.test",
        lambda *args, __real=__import__("lightning.pytorch").pytorch.Trainer.test, **kw: (
            asked.append(1),
            __real(*args, **kw),
        )[1],
    )
    assert main([*words, "--run", "two"]) == 0
    second = json.loads((folder / "logs/t/two/metrics.json").read_text())
    assert len(asked) == 3  # the tuned model's, that under the grammar and the probe; the base's were found
    assert all(second[name] == first[name] for name in VIEWS)

    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main([*words, "--run", "three", "--baselines", "[constrained]"]) == 0
    why = "what a grammar would reach is not measured: needs llguidance; pip install 'formtune[constrained]'"
    assert why in capsys.readouterr().out.splitlines()
    third = json.loads((folder / "logs/t/three/metrics.json").read_text())
    assert third["counts"].keys() == {"before", "after"} and third["after"] == first["after"]
    assert "was not measured: needs llguidance" in (folder / "logs/t/three/report.html").read_text()


def test_another_base_or_contract_is_measured_anew(tmp_path):
    row = Row([1, 2], [3], [True], "s", "g", "f:1")
    (tmp_path / "config.json").write_text("{}")
    keys = {
        baseline.baseline_key(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema(SCHEMA)),
        baseline.baseline_key(str(tmp_path), [row], {"precision": "bf16-mixed"}, JsonSchema(SCHEMA)),
        baseline.baseline_key(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema({})),
        baseline.baseline_key(str(tmp_path), [row, row], {"precision": "32-true"}, JsonSchema(SCHEMA)),
    }
    (tmp_path / "config.json").write_text('{"a": 1}')
    keys.add(baseline.baseline_key(str(tmp_path), [row], {"precision": "32-true"}, JsonSchema(SCHEMA)))
    assert len(keys) == 5
