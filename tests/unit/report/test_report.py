"""A run's report says whether training was worth it and where the model fails."""

import base64
import dataclasses
import hashlib
import html
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from markupsafe import escape

from conftest import answers, outcome
from formtune.base.row import Row
from formtune.evaluation.baselines import best_prompt
from formtune.evaluation.console import HEADLINES, print_result
from formtune.evaluation.outcomes import EVALUATIONS
from formtune.formats import KINDS, JsonSchema
from formtune.report.failures import slices
from formtune.report.report import Run, card, conclusion, headline, page
from formtune.report.selective import summary
from formtune.training.loggers import _cell

FORMAT = JsonSchema({"properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}})


def test_slices_hold_the_rows_that_they_name():
    outcomes = [
        outcome(n, tokens=10 + n, origin="human" if n % 2 else "wise-1", target=f'{{"n":{n},"s":"{"ab"[n % 3 == 0]}"}}')
        for n in range(40)
    ]
    named = {(group, name): rows for group, name, rows in slices(outcomes, FORMAT, longest=40)}
    assert named["source", "human"] == list(range(1, 40, 2))
    assert named["s", "b"] == list(range(0, 40, 3))
    assert named["prompt tokens", "longer than any training row (40)"] == list(range(31, 40))
    buckets = [rows for (group, name), rows in named.items() if group == "prompt tokens" and " to " in name]
    assert len(buckets) == 4 and sorted(row for rows in buckets for row in rows) == list(range(40))
    assert not slices(outcomes[:3], FORMAT, longest=100)


def run_of(before, after, **views):
    training = {"steps": 5, "seconds": 1.0, "best_step": 4, "best_reason": "best checkpoint: step 4 (why)"}
    result = {"rows": len(after), "training": training, "data": "abc", "after": {}, "probe": []}
    result["counts"] = {"after": {"val/parity": (41, 42)}}
    return Run(
        "task/one", result, {"before": before, "after": after} | views, FORMAT, {"format": 2}, "model: {}", "some/base",
    )  # fmt: skip


def test_the_headline_says_whether_training_was_worth_it():
    before = answers(300, exact=50, right=50)
    assert headline(run_of(before, answers(300, exact=280, right=240))) == [
        "93.3% of the answers have a valid format (89.9% to 95.6%): against base 16.7% (better)",
        "80.0% of the answers are right (75.1% to 84.1%): against base 16.7% (better)",
    ]
    assert all("cannot tell" in line for line in headline(run_of(before, answers(300, exact=51, right=51))))
    assert all("worse" in line for line in headline(run_of(before, answers(300, exact=5, right=5))))
    run = run_of(before, answers(300, exact=280, right=240))
    run.result["constant"] = (250, 300)
    assert headline(run)[1].endswith("(better), majority answer 83.3%")
    few, constrained = answers(300, exact=60, right=60), answers(300, exact=300, right=235)
    form, content = headline(
        run_of(before, answers(300, exact=280, right=240), few_shot=few, before_constrained=constrained)
    )
    assert "against base few-shot 20.0% (better), base constrained 100.0% (worse)" in form
    tuned = {"after_constrained": answers(300, exact=300, right=270)}
    assert headline(run_of(before, answers(300, exact=280, right=240), **tuned))[1].startswith(
        "80.0% of the answers are right (75.1% to 84.1%), 90.0% constrained (86.1% to 92.9%): against"
    )
    assert re.search(r"\(better\), base constrained 78.3% \(cannot tell with 300 rows", content)


def test_a_baseline_measured_on_a_sample_is_compared_on_its_rows_and_shown_with_their_number(capsys, monkeypatch):
    after = [outcome(n, "ok" if n >= 10 else "syntax", tokens=10 + n, origin="ab"[n % 2]) for n in range(300)]
    right = [outcome(n) for n in range(200, 300)]
    run = run_of(right, after)
    # 100 % of 100 rows is not better than 96.7 % of 300: on the common rows both are right.
    assert headline(run)[0] == (
        "96.7% of the answers have a valid format (94.0% to 98.2%): "
        "against base 100.0% of 100 rows (cannot tell with 100 rows)"
    )
    wrong = [outcome(n, "syntax") for n in range(200, 220)]
    run = run_of(wrong, after, few_shot=[*wrong[:9], outcome(209)], before_constrained=right)
    for line in headline(run):
        assert re.search("base few-shot [0-9.]+% of 10 rows", line)  # the better one, on fewer rows
        assert re.search("base constrained [0-9.]+% of 100 rows .cannot tell with 100 rows.$", line)
    few = answers(100, exact=60, right=60)
    assert (
        best_prompt({"many": answers(300, exact=150, right=150)[::-1], "few": few}) == "many"
    )  # right on all of the 100
    text = page(run_of(wrong, after))
    assert '<th scope="row">base, 20 rows</th><td>0.0% <small>0.0 to 16.1</small>' in text  # the interval of 20 rows
    assert '<th scope="row">tuned, 300 rows</th>' in text
    assert '<th scope="row">a</th><td class="n">150 (base 10)</td><td class="n">0.0% → ' in text
    assert "| test rows | base, 20 rows | tuned, 300 rows |" in card(run_of(wrong, after))

    monkeypatch.setenv("COLUMNS", "80")
    figures = dict.fromkeys((*HEADLINES, "fail/syntax"), 0.5)
    counts = {name: {"format/exact": (1, rows)} for name, rows in (("before", 20), ("after", 300))}
    print_result({"rows": 300, "before": figures, "after": figures, "counts": counts}, None)
    header = capsys.readouterr().out.partition("format/exact")[0]
    assert "Result on 300 test rows" in header and re.search(r" base ?┃.*\n.* 20 rows ?┃ *tuned ?┃", header)
    six = dict.fromkeys(EVALUATIONS, figures) | {"counts": dict.fromkeys(EVALUATIONS, counts["after"]), "rows": 300}
    print_result(six, None)
    header = capsys.readouterr().out.partition("format/exact")[0]
    assert "…" not in header and max(map(len, header.splitlines())) <= 80 and "adapter" in header
    five = {view: figures for view in EVALUATIONS if view != "start"} | {
        "counts": dict.fromkeys(EVALUATIONS, counts["after"]),
        "rows": 300,
    }
    print_result(five, None)
    header = capsys.readouterr().out.partition("format/exact")[0]
    assert re.search(
        r" base .* base .* tuned.*\n.* base ?┃ ?few-shot ?┃ ?constrained ?┃ *tuned ?┃ ?constrained ?┃", header
    )
    assert "rows" not in header.replace("300 test rows", "")


@pytest.mark.parametrize("views", [("before", "after"), ("result",), tuple(EVALUATIONS)])
def test_of_many_fields_only_the_five_worst_of_the_tuned_model_are_printed(views, capsys):
    fields = {f"content/field_acc/f{n}": n / 40 for n in range(40)}
    figures = dict.fromkeys((*HEADLINES, "fail/syntax"), 0.5)
    result = {view: figures | {name: 1 - value for name, value in fields.items()} for view in views}
    result |= {views[-1]: figures | fields} if len(views) < 3 else {}
    print_result(result | {"rows": 9, "counts": {view: {"format/exact": (1, 9)} for view in views}}, None)
    printed = capsys.readouterr().out
    worst = [0, 1, 2, 3, 4] if len(views) < 3 else []
    assert [int(number) for number in re.findall(r"field f(\d+)", printed)] == worst
    assert len(printed.splitlines()) < 22


def test_the_page_begins_with_a_verdict_in_one_sentence_against_the_best_baseline():
    before, few, constrained = (answers(300, n, n) for n in (50, 60, 235))
    constrained = constrained[:235] + [outcome(n, "content") for n in range(235, 300)]
    for exact, right, views, helped, sentence in [
        (280, 240, {}, True, "Fine-tuning helped: 80.0% of the answers are right, against 16.7% before (base)."),
        (280, 240, {"few_shot": few}, True, "Fine-tuning helped: 80.0% of the answers are right, against 20.0% before (base few-shot)."),
        (280, 20, {}, False, "Fine-tuning made the answers worse: 6.7% of the answers are right, against 16.7% before (base)."),
        (280, 51, {}, True, "Fine-tuning helped the format: 93.3% of the answers have a valid format, against 16.7% before (base). "
                            "Right answers: cannot tell with 300 rows: about 3,000 would."),
        (280, 240, {"before_constrained": constrained}, False, "No gain can be shown: 80.0% of the answers are right, "
                            "against 78.3% before (base constrained); cannot tell with 300 rows: about 590 would."),
    ]:  # fmt: skip
        run = run_of(before, answers(300, exact, right), **views)
        assert conclusion(run) == (helped, sentence)
        assert f'<p class="verdict{"" if helped else " blocked"}">{sentence}</p>' in page(run)
    run = run_of(before, answers(300, exact=280, right=240))
    run.result["constant"] = (239, 300)  # within the interval of 240
    assert conclusion(run)[1].startswith(
        "No better than the majority answer: 80.0% of the answers are right, and the most"
    )
    run.result["constant"] = (250, 300)
    assert conclusion(run) == (
        False,
        "Do not use it: 80.0% of the answers are right, and the most frequent training answer alone is right in 83.3%.",
    )


def test_three_metrics_with_intervals_and_the_next_command_follow_the_verdict():
    run = run_of(answers(300, 50, 50), answers(300, 280, 240))
    run.result["training"]["next"] = "raise the rank: formtune train -c a.yaml"
    top = page(run).partition("<nav")[0]
    assert re.findall(r"<dt>(.*?)</dt>", top) == ["Valid format", "Right", "Field F1"]
    assert "16.7%" in top and "<b>93.3%</b>" in top and "95 %: 89.9 to 95.6 (base 12.9 to 21.3)" in top
    assert '<b>Next:</b> raise the rank</p><pre class="command">formtune train -c a.yaml</pre>' in top


class Page(HTMLParser):
    """The tags of a page, what it would load, its headings, and the text of its main part."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.outside, self.headings, self.roles, self.labelled = Counter(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.outside += [v for k, v in attrs if k in ("src", "href", "action", "data") and v and v[0] != "#"]
        self.outside += [k for k, _ in attrs if k.startswith("on") or k == "style"]
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th" and "scope" not in dict(attrs):
            self.labelled.append(attrs)
        if tag == "svg" and not {"aria-label", "aria-hidden", "overflow"} & dict(attrs).keys():
            self.labelled.append(attrs)


def full_run(**changes):
    """A run with all that its page can show."""
    bad = [
        outcome(3, "syntax", origin="a", answer='{"n":1,"s":<script>alert(1)</script>'),
        outcome(5, "content", origin="b", answer='{"n":2,"s":"a"}'),
    ]
    after = [outcome(n, tokens=10 + n % 7, origin="ab"[n % 2]) for n in range(40) if n not in (3, 5)] + bad
    run = run_of([outcome(n) for n in range(40)], after)
    run.result["training"] |= {"next": "what: formtune audit", "diagnosis": "learning: it improves"}
    run.result["training"]["history"] = [
        {"step": step, "train_loss": 1.0, "val_loss": 2.0, "exact": 4, "rows": 4, "field_f1": 0.5} for step in (0, 4)
    ]
    run.result["probe"] = [{"name": "twice", "tokens": 100, "rows": 9, "exact": 8}]
    return dataclasses.replace(run, **changes)


def test_the_page_loads_nothing_and_runs_its_own_script_alone():
    text = page(full_run())
    seen = Page(text)
    assert not seen.outside and seen.tags["script"] == seen.tags["style"] == 1
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    for tag in ("script", "style"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert "<title>Run task/one</title>" in text and "adapter for some/base" in text
    assert "5 steps in 1 s. Best checkpoint: step 4 (why).</p>" in text


def test_the_page_has_landmarks_headings_in_order_and_labels():
    seen = Page(page(full_run()))
    assert seen.tags["main"] == seen.tags["header"] == seen.tags["nav"] == seen.headings.count(1) == 1
    assert seen.headings[0] == 1 and all(b <= a + 1 for a, b in pairwise(seen.headings))
    assert not seen.labelled, "a header cell without a scope, or a picture without a text"
    assert seen.tags["svg"] > 5


@pytest.mark.parametrize(
    "attack", ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;"]
)
def test_every_text_is_escaped_wherever_it_comes_from(attack):
    row = Row([1], [1], f"input 3 {attack}", attack, attack)
    bad = replace(outcome(3, "syntax", answer=attack), input=f"input 3 {attack}", where=attack, detail=attack)
    wrong = replace(outcome(4, "content", answer=json.dumps({attack: attack})), origin=attack)
    run = run_of([outcome(n) for n in range(9)], [*(outcome(n, origin=attack) for n in range(6)), bad, wrong])
    run.result["training"]["next"] = f"{attack}: formtune train {attack}"
    text = page(replace(run, name=attack, base=attack, config=f"a: {json.dumps(attack)}", train=[row]))
    clean = page(replace(run_of([outcome(1)], [outcome(1)]), config="{}"))
    assert attack not in text and str(escape(attack)) in text
    seen = Page(text)
    assert not seen.outside and seen.tags["script"] == Page(clean).tags["script"] and not seen.tags["img"]


def test_filters_name_the_kinds_fields_and_slices_of_the_failures_shown():
    text = page(full_run())
    form = re.search(r'<form id="filters" hidden.*?</form>', text, re.S)[0]
    assert re.findall(r"<label>(.*?) <", form) == ["Kind", "Field", "Test rows by", "Text"]
    assert '<option value="content">wrong content (1)</option><option value="syntax">syntax (1)</option>' in form
    assert '<option value="0">n (1)</option>' in form and ">source: a</option>" in form
    items = re.findall(r'data-kind="(\w+)" data-field="([^"]*)" data-slice="([^"]*)"', text)
    groups = re.findall(r'<option value="(\d+)">([^<]*)</option>', form.partition('name="slice"')[2])
    source = {name: value for value, name in groups}
    assert [(kind, field) for kind, field, _ in items] == [("syntax", ""), ("content", "0 ")]
    assert source["source: a"] in items[0][2].split() and source["source: b"] not in items[0][2].split()
    assert source["source: b"] in items[1][2].split() and source["source: a"] not in items[1][2].split()


@pytest.mark.slow
def test_with_ten_thousand_rows_the_page_stays_small_and_says_what_it_leaves_out():
    long = '{"n":1,"s":"' + "<&>" * 3000 + '"}'
    after = [
        replace(outcome(n, "syntax" if n % 9 else "content", answer=long + str(n)), input=f"input {n} " + "x y " * 2000)
        for n in range(10_000)
    ]
    run = replace(run_of(after[:50], after), train=[Row([1], [1], "input " + "z" * 9000, "t", "f:1")])
    text = page(run)
    shown = len(re.findall(r'data-kind="content"', text)), len(re.findall(r'data-kind="syntax"', text))
    assert len(text.encode()) < 3_000_000 and 0 < shown[0] <= shown[1] + 1 <= shown[0] + 2
    assert f"10,000 of 10,000 answers of the tuned model are wrong; {sum(shown)} are shown here" in text


def test_curves_are_drawn_to_scale_once_there_are_two_validations():
    run = run_of([outcome(1)], [outcome(1)])
    assert "<figure" not in page(run) and "<polyline" not in page(run)
    run.result["training"]["history"] = [
        {"step": step, "train_loss": train, "val_loss": loss, "exact": step // 2, "rows": 4, "field_f1": 0.5}
        for step, train, loss in ((4, None, 2.0), (6, 0.1, 0.2), (8, 0.1, 0.02))
    ]
    text = page(run)
    assert re.findall(r'points="([^"]*)"', text) == [
        "198.0,25.0 277.0,77.5 356.0,130.0 ",  # a loss falls tenfold, and tenfold again
        "198.0,77.5 277.0,51.2 356.0,25.0 ",
        "198.0,77.5 277.0,77.5 356.0,77.5 ",
    ]
    assert ">2</text>" in text and ">0.02</text>" in text and ">8 steps</text>" in text and "● train" not in text
    assert 'aria-label="loss, nats per token, logarithmic: validation from 2 to 0.02 at step 8"' in text
    assert '<line class="axis" x1="198.0" x2="198.0" y1="25" y2="130" stroke-dasharray="4"/>' in text  # best: step 4
    assert "<title>step 6: 0.2</title>" in text
    assert '<th scope="row" class="n">8</th><td class="n">0.0200</td><td class="n">100.0%</td>' in text


def test_a_loss_that_is_no_number_leaves_the_page_readable():
    run = full_run()
    run.result["training"]["history"][1]["val_loss"] = float("nan")
    assert "</html>" in page(run)


def test_shares_of_right_wrong_and_invalid_answers_are_told_by_pattern_and_text():
    judged = [outcome(n, kind) for n, kind in enumerate(KINDS)]
    text = page(run_of(judged, judged))
    assert text.count('aria-label="8.3% right, 8.3% valid format but wrong content, 83.3% invalid format"') == 2
    assert text.count('<rect class="invalid" x="16.7%" width="83.3%"') == 2
    names = re.findall(r'<tr><th scope="row">([\w, ]+)</th><td class="n">8.3%</td><td class="n">8.3%</td></tr>', text)
    assert names == ["none, right", *(kind.replace("_", " ") for kind in KINDS[1:-1]), "wrong content"]


def test_a_cell_of_the_answer_table_is_shown_as_it_is_and_ends_no_column():
    cell = _cell('```json\n{"a|b": "*x* <b>"}\n```')
    shown = html.unescape(re.sub("</?code>", "", cell).replace("<br>", "\n"))
    assert shown == '```json\n{"a|b": "*x* <b>"}\n```'
    assert not set('|`*"') & set(cell) and cell.count("<") == 4
    assert _cell("x" * 500) == "<code>" + "x" * 400 + " &#46;&#46;&#46;</code>"


def test_the_card_has_the_evidence_and_the_metadata():
    text = card(run_of([outcome(n, "ok" if n < 2 else "syntax") for n in range(9)], [outcome(n) for n in range(9)]))
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "some/base" and head["library_name"] == "peft"
    from huggingface_hub import ModelCard

    results = {one.metric_type: one.metric_value for one in ModelCard(text).data.eval_results}
    assert results["format/exact"] == 1 and results["joint/exact"] == 1
    local = card(dataclasses.replace(run_of([outcome(0)], [outcome(0)]), base=str(Path(__file__).parent)))
    assert "base_model" not in local and str(Path(__file__).parent) not in local and "BASE is the folder" in local
    assert "| format/exact | 22.2% (6.3% to 54.7%) | 100.0% (70.1% to 100.0%) |" in text
    assert "as in training: the tokenizer's chat template with `enable_thinking=False`, with the system prompt" in text
    noted = card(dataclasses.replace(run_of([outcome(0)], [outcome(0)]), note="a prompt is plain"))
    assert "as in training, with the system prompt in `config.yaml`: a prompt is plain." in noted


def test_a_custom_figure_that_only_one_evaluation_has_is_left_empty(capsys):
    run = full_run()
    run.result["before"] = run.result.get("before", {})
    run.result["after"] |= {"custom/rarity": 0.5}
    assert "rarity" in card(run) and "rarity" in page(run)


def test_an_infinite_loss_leaves_the_curves_in_their_frame():
    run = full_run()
    run.result["training"]["history"][1]["val_loss"] = float("inf")
    assert ",nan" not in page(run) and ",inf" not in page(run)


def test_the_page_shows_what_to_accept_and_nothing_where_no_confidence_is_known():
    def confident(wrong):
        """Confidences from 0.8 up, of which the lowest `wrong` ones are wrong; one answer has an invalid format."""
        valid = [outcome(n, "ok" if n >= wrong else "content") for n in range(200)]
        sure = [
            replace(o, confidence=round(0.8 + n / 1000, 6), field_confidences={"n": 0.9, "s": round(0.8 + n / 1000, 6)})
            for n, o in enumerate(valid)
        ]
        return [*sure, replace(outcome(200, "syntax"), confidence=0.0)]

    plain = run_of(confident(20), confident(20))
    assert "Which answers to trust" not in page(plain)
    plain.result["confidence"] = summary(confident(10), confident(20))
    text = re.sub(r"\s+", " ", page(plain))
    assert "chosen on 201 validation rows" in text
    assert (
        '<th scope="row" class="n">98.0%</th><td class="n">0.808</td><td class="n">95.5%</td><td class="n">93.8% '
        "<small>89.4 to" in text
    )
    assert "On the validation rows, no confidence threshold reaches 99.5% right." in text
    assert '<th scope="row">n</th><td class="n">89.6%</td><td class="n" colspan="3">not reached on the' in text
    assert "--target_precision 0.99</pre>" in text
    points = re.search(r'<polyline class="curve1" points="([^"]*)"', text)[1].split()
    assert points[-1] == "356.0,25.0" and points[0].endswith(",130.0"), "all accepted; the most confident one is right"
    assert text.count("<circle") == 3
