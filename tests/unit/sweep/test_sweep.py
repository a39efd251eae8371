"""A sweep takes the smallest point that is as good as the best, never by the test rows, and loses no finished run."""

import functools
import html
import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from conftest import pair
from formtune.cli import main
from formtune.commands import sweep as command
from formtune.errors import UserError
from formtune.sweep import points as sweep_points
from formtune.sweep.points import CONTENT, FORMAT, METRICS, Estimate, PointResult, choose, estimate, grid

ROWS = 200


def measured(parameters, exact, field_f1=0.9, error=0.01, loss=0.1):
    return point(parameters, Estimate(exact, error), Estimate(field_f1, error), loss)


def point(parameters, exact, field_f1, loss):
    return PointResult(f"p{parameters}", 1, parameters, ROWS, loss, {FORMAT: exact, CONTENT: field_f1}, {})


@pytest.mark.parametrize(
    ("points", "taken", "in_format", "in_content"),
    [
        ([measured(8, 0.90), measured(16, 0.95)], 1, (1,), (1,)),  # far below the best
        ([measured(8, 0.94), measured(16, 0.95), measured(32, 0.945)], 0, (0, 1, 2), (0, 1, 2)),  # just within
        ([measured(16, 0.95), measured(8, 0.94)], 1, (0, 1), (0, 1)),  # whatever the order
        ([measured(8, 0.90, 0.99), measured(16, 0.95, 0.5)], 1, (1,), (1,)),  # content does not make up for format
        ([measured(8, 0.94, 0.80), measured(16, 0.95, 0.9)], 1, (0, 1), (1,)),  # and decides among equal formats
        ([measured(8, 0.94, 0.89), measured(16, 0.95, 0.9)], 0, (0, 1), (0, 1)),
        ([measured(8, 0.94), measured(8, 0.945), measured(8, 0.93)], 1, (0, 1), (0, 1)),  # as small: better format
        ([measured(8, 0.94, 0.895), measured(8, 0.94, 0.9)], 1, (0, 1), (0, 1)),  # then field F1
        ([measured(8, 0.94, loss=0.2), measured(8, 0.94)], 1, (0, 1), (0, 1)),  # then the loss
        ([measured(8, 0.94), measured(8, 0.94)], 0, (0, 1), (0, 1)),  # then the order
        ([measured(8, 0.995, error=0), measured(16, 1.0, error=0)], 0, (0, 1), (0, 1)),  # one row never decides
        ([measured(8, 0.99, error=0), measured(16, 1.0, error=0)], 1, (1,), (1,)),  # two rows do
        ([measured(8, 0.90, error=0.2), measured(16, 0.95)], 1, (1,), (1,)),  # the best's error counts, not one's own
    ],
)
def test_the_smallest_within_one_standard_error_of_the_best_is_taken(points, taken, in_format, in_content):
    names = [f"p{number}" for number in range(len(points))]
    points = [replace(each, name=name) for each, name in zip(points, names, strict=True)]
    choice, why = choose(points)
    assert choice == names[taken]
    for metric, equal in (("format/exact", in_format), ("field F1", in_content)):
        assert f"the best {metric} ({', '.join(names[n] for n in equal)})" in why


shares = st.integers(0, ROWS).map(lambda n: n / ROWS)
estimates = st.builds(Estimate, shares, st.floats(0, 0.2))
POINTS = st.lists(st.builds(point, st.sampled_from([8, 16, 32]), estimates, estimates, st.floats(0, 9)), min_size=1)


@given(POINTS, st.randoms())
def test_the_choice_is_among_the_equals_the_smallest_of_them_and_the_same_in_any_order(points, random):
    points = [replace(each, name=str(number)) for number, each in enumerate(points)]
    if not any(each.validation[FORMAT].mean for each in points):
        assert choose(points)[0] is None
        return
    taken = points[int(choose(points)[0])]
    best = max(points, key=lambda each: each.validation[FORMAT].mean)
    margin = max(each.validation[FORMAT].standard_error for each in points) + 1 / ROWS + 1e-9
    assert taken.validation[FORMAT].mean >= best.validation[FORMAT].mean - margin
    again = points[int(choose(random.sample(points, len(points)))[0])]
    assert (again.trainable_parameters, again.loss) == (taken.trainable_parameters, taken.loss)
    assert all(again.validation[metric].mean == taken.validation[metric].mean for metric in METRICS)


@given(st.lists(shares, min_size=1, max_size=5))
def test_a_standard_error_is_that_of_the_seeds_and_of_the_rows_where_there_is_one_seed(figures):
    result = estimate(figures, ROWS)
    assert result.mean == pytest.approx(sum(figures) / len(figures)) and result.standard_error >= 0
    if len(figures) == 1:
        assert result.standard_error**2 == pytest.approx(figures[0] * (1 - figures[0]) / ROWS)
    else:
        squares = sum((figure - result.mean) ** 2 for figure in figures) / (len(figures) - 1) / len(figures)
        assert result.standard_error**2 == pytest.approx(squares, abs=1e-12)


@pytest.mark.parametrize(("exact", "warned"), [(0.0, True), (0.005, False)])
def test_a_choice_among_points_that_never_keep_the_format_says_so(exact, warned):
    chosen, why = choose([measured(8, exact), measured(16, exact)])
    assert (chosen is None) == why.startswith("Nothing chosen: no answer of any point has a valid format") == warned


def test_a_grid_is_all_combinations_with_the_values_as_they_are_written():
    points = grid(["model.lora.r=8,16", "model.optimizer.lr=1e-4,2e-4"])
    assert [*points] == ["r8-lr1e-4", "r8-lr2e-4", "r16-lr1e-4", "r16-lr2e-4"]
    assert points["r8-lr2e-4"] == {"model.lora.r": "8", "model.optimizer.lr": "2e-4"}
    targets = grid(["model.lora.targets=attention, [q_proj, v_proj], [q_proj v_proj]"])
    assert [it["model.lora.targets"] for it in targets.values()] == ["attention", "[q_proj, v_proj]", "[q_proj v_proj]"]
    assert next(iter(targets)) == "targets-attention"
    assert [*grid(["a.r=1,2", "a.r=3,4"])] == ["r1", "r2", "r3", "r4"]
    assert [*grid(["a.r=1,2", "b.r=3,4"])] == ["r1-r3", "r1-r4", "r2-r3", "r2-r4"]


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1), min_size=2, unique=True))
def test_no_two_values_share_a_folder_and_each_is_the_name_of_one(values):
    try:
        points = grid(["k=" + ",".join(values)])
    except UserError:
        return
    assert len(points) == len({*map(str.strip, (it["k"] for it in points.values()))}) and all(
        re.fullmatch(r"[\w.+-]+", name) for name in points
    )


# A fast replacement of `train` that can end in each way in which a run can end.
FAKE_TRAIN = f"""
import json, os, sys, time
from pathlib import Path
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
folder = Path("logs", sys.argv[sys.argv.index("--task") + 1], given["run"])
with open("ran.txt", "a") as file:
    print(folder.name, os.getpid(), given.get("data.date"), file=file)
mode, rank = os.environ.get("FAKE_TRAIN", ""), int(given["model.lora.r"])
if mode == "mistake":
    sys.exit(print("formtune: error: train.jsonl:3: no answer") or 2)
(folder / "outcomes").mkdir(exist_ok=True)
if rank == 8 and mode in ("breaks", "killed", "hangs"):
    if mode == "breaks":
        raise MemoryError("out of memory")
    os.kill(os.getpid(), 9) if mode == "killed" else time.sleep(60)
best = {{"step": 1, "exact": 150 + (rank > 2) * 40, "rows": {ROWS}, "field_f1": 0.9, "loss": 0.1}}
training = {{"trainable_parameters": 100 * rank, "seconds": 2.0, "best": best}}
after = {{"format/exact": rank / 10, "content/field_f1": 0.9}}
data = Path("train.jsonl").read_text()
(folder / "config.yaml").write_text(json.dumps({{"data": {{"date": given.get("data.date")}}}}))
(folder / "metrics.json").write_text(json.dumps({{"after": after, "rows": 100, "data": data, "training": training}}))
"""


@pytest.fixture
def project(write_project):
    """A folder with a task in YAML; the working directory of the test."""
    return write_project({"max_steps": 2})


def test_a_number_of_batches_stays_whole_in_the_configuration_that_is_taken(project):
    # One batch as 1.0 would be all of them.
    written = command._configuration(["-c", "small.yaml", "--trainer.limit_val_batches=1"])
    assert "limit_val_batches: 1\n" in written


@functools.cache
def parsed(words, configuration=command._configuration):
    """The configuration of a command line, parsed once for all tests: the task is the same in each."""
    return configuration(list(words))


@pytest.fixture
def fake_train(project, monkeypatch):
    """The same with a fake of `train`; the function returns the names of the runs so far."""
    monkeypatch.setattr(command, "_configuration", lambda words: parsed(tuple(words)))
    Path("fake_train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep_points, "TRAIN", [sys.executable, "fake_train.py"])
    return lambda: [line.split()[0] for line in Path("ran.txt").read_text().splitlines()]


def sweep(*extra, over="model.lora.r=2,4,8"):
    return main(["sweep", "-c", "small.yaml", "--over", over, *extra])


def folder():
    (only,) = Path("logs/small").iterdir()
    return only


def read():
    return json.loads((folder() / "sweep.json").read_text())


@pytest.mark.slow
def test_two_ranks_are_trained_from_the_command_line_to_a_configuration_that_train_takes(project, capsys, monkeypatch):
    # After two steps no answer has a valid format, so nothing would be chosen.
    monkeypatch.setattr(command, "choose", lambda points: (points[0].name, f"{points[0].name} is chosen"))
    arguments = ("--seeds", "3", "--data.rows_per_step", "8", "--baselines", "[]")
    assert sweep(*arguments, over="model.lora.r=2,4") == 0
    assert re.fullmatch(r"sweep-r-[0-9a-f]{8}", folder().name)
    summary, printed = read(), capsys.readouterr().out
    assert summary["chosen"] == "r2" and "r2 is chosen" in printed and str(folder() / "sweep.json") in printed
    small, large = summary["points"]
    assert large["trainable_parameters"] == 2 * small["trainable_parameters"] > 0
    runs = [folder() / "r2-seed3", folder() / "r4-seed3"]
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert first["before"] == second["before"] and first["data"] == second["data"]
    best = first["training"]["best"]
    assert 0 <= best["joint"] <= best["exact"] <= best["rows"]
    assert best["step"] == first["training"]["best_step"] and best["rows"] > 0 and best["loss"] > 0
    assert small["validation"][CONTENT]["mean"] == best["field_f1"]

    untouched = (runs[0] / "metrics.json").stat().st_mtime_ns
    (runs[1] / "metrics.json").unlink()
    assert sweep(*arguments, over="model.lora.r=2,4") == 0
    assert (runs[0] / "metrics.json").stat().st_mtime_ns == untouched
    again = json.loads((runs[1] / "metrics.json").read_text())
    assert again["after"] == second["after"] and again["training"]["best"] == second["training"]["best"]

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["train", "-c", str(folder() / "config.yaml"), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert not ended.value.code
    assert (config["task"], config["model"]["lora"]["r"], config["data"]["rows_per_step"]) == ("small", 2, 8)


@pytest.mark.slow
def test_each_seed_trains_all_points_and_a_larger_grid_keeps_what_is_finished(fake_train):
    assert sweep("--seeds", "0,1") == 0
    assert fake_train() == [f"r{r}-seed{seed}" for seed in (0, 1) for r in (2, 4, 8)]
    assert read()["chosen"] == "r4"  # 2 is too small, 8 no better; on the test rows 8 is better
    page = (folder() / "report.html").read_text()
    assert f'<p class="verdict">{html.escape(read()["reason"])}</p>' in page
    assert re.findall(r'<tr( class="best")?><th scope="row">([^<]*)<', page) == [
        ("", "r2"), (' class="best"', "r4, chosen"), ("", "r8"),
    ]  # fmt: skip
    assert (
        f'<pre class="command">formtune train -c {folder()}/config.yaml</pre>' in page
        and "http" not in page.partition("http-equiv")[2]
    )
    assert yaml.safe_load((folder() / "config.yaml").read_text())["model"]["lora"]["r"] == 4
    assert sweep("--seeds", "0,2", over="model.lora.r=4,8,16") == 0
    assert fake_train()[6:] == ["r16-seed0", "r4-seed2", "r8-seed2", "r16-seed2"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "why"), [("breaks", "MemoryError: out of memory"), ("killed", "ended by SIGKILL")])
def test_a_run_that_fails_is_named_with_its_log_and_the_others_count(fake_train, monkeypatch, capfd, mode, why):
    monkeypatch.setenv("FAKE_TRAIN", mode)
    assert sweep("--seeds", "0") == 1
    assert capfd.readouterr().err.strip() == f"r8-seed0 failed: {why} (see {folder()}/r8-seed0/output.log)"
    assert read()["chosen"] == "r4" and "r8-seed0 failed" in read()["failed"][0] and len(read()["points"]) == 2
    monkeypatch.setenv("FAKE_TRAIN", "")
    assert sweep("--seeds", "0") == 0 and fake_train()[3:] == ["r8-seed0"] and not read()["failed"]


def test_a_point_that_lost_a_seed_is_not_taken(fake_train, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert sweep("--seeds", "0", over="model.lora.r=8,16") == 0 and read()["chosen"] == "r8"
    monkeypatch.setenv("FAKE_TRAIN", "breaks")
    assert sweep("--seeds", "0,1", over="model.lora.r=8,16") == 1 and read()["chosen"] == "r16"
    assert ", 1 of 2 seeds, 800 trainable parameters\n" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_TRAIN", "mistake")
    assert sweep("--seeds", "0,4", over="model.lora.r=8,16") == 1
    assert read()["chosen"] is None and "no point has finished all seeds" in read()["reason"]
    assert '<p class="verdict blocked">Nothing chosen' in (folder() / "report.html").read_text()
    assert not (folder() / "config.yaml").exists()


def test_a_mistake_that_every_run_has_is_printed_once(fake_train, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_TRAIN", "mistake")
    assert sweep() == 2
    assert capfd.readouterr().err == "formtune: error: train.jsonl:3: no answer\n" and len(fake_train()) == 1


def test_an_interruption_ends_the_run_at_once_and_keeps_the_others(fake_train, monkeypatch):
    monkeypatch.setenv("FAKE_TRAIN", "hangs")

    def interrupt():
        while not Path("ran.txt").exists() or len(fake_train()) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert sweep("--seeds", "0") == 130
    thread.join()
    pid = int(Path("ran.txt").read_text().splitlines()[-1].split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    monkeypatch.setenv("FAKE_TRAIN", "")
    assert sweep("--seeds", "0") == 0 and fake_train()[3:] == ["r8-seed0"]


@pytest.mark.parametrize("write", ["write_json", "write_atomic"])
def test_a_kill_between_the_sweeps_files_leaves_no_folder_that_looks_like_a_run(fake_train, monkeypatch, write):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, write, killed)
        assert sweep("--seeds", "0") == 130
    assert not (folder() / "config.yaml").exists()
    assert sweep("--seeds", "0") == 0 and (folder() / "config.yaml").exists()


@pytest.mark.slow
def test_all_runs_of_a_sweep_write_the_date_of_its_first_day(fake_train, monkeypatch):
    def dates():
        return [line.split()[-1] for line in Path("ran.txt").read_text().splitlines()]

    monkeypatch.setattr(command, "today", lambda: "2026-11-25")
    assert sweep("--seeds", "0") == 0 and dates() == ["2026-11-25"] * 3
    monkeypatch.setattr(command, "today", lambda: "2026-12-01")
    assert sweep("--seeds", "0,1") == 0 and dates()[3:] == ["2026-11-25"] * 3
    assert sweep("--seeds", "0", "--data.date=2020-01-01") == 0 and set(dates()[6:]) == {"2020-01-01"}


def test_runs_from_before_a_change_of_the_rows_are_not_compared(fake_train, capfd):
    assert sweep("--seeds", "0") == 0
    Path("train.jsonl").write_text(Path("train.jsonl").read_text() + json.dumps(pair(99)) + "\n")
    assert sweep("--seeds", "0,1") == 2
    assert "the rows changed after its first runs" in capfd.readouterr().err


def test_other_settings_are_another_sweep_and_a_running_one_is_refused(fake_train, capfd):
    assert sweep("--seeds", "0") == 0
    lock = folder() / ".lock"
    assert sweep("--seeds", "0", "--trainer.max_steps", "3") == 0 and len(list(Path("logs/small").iterdir())) == 2
    with FileLock(lock):
        assert sweep("--seeds", "0") == 2
    assert "is already running" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "model.lora.rnak=8,16"], "did you mean model.lora.r"),
        (["--over", "model.lora.r=8,many"], "model.lora.r"),
        (["--model.lora.rnak", "8"], "did you mean model.lora.r"),
        (["--over", "model.lora.r"], "expected a key and two or more different values"),
        (["--over", "model.lora.r="], "expected a key and two or more different values"),
        (["--over", "model.lora.r=8"], "expected a key and two or more different values"),
        (["--over", "model.lora.r=[8,16]"], "expected a key and two or more different values"),
        (["--over", "model.lora.r=8,16,8"], "expected a key and two or more different values"),
        (
            ["--over", "model.lora.r=8,16", "--over", "model.lora.r=16,64"],
            "expected a key and two or more different values",
        ),
        (["--seeds", "0-2"], "expected integers"),
        (["--over", "seed_everything=0,1"], "seed_everything: not for a sweep"),
        (["--run", "r1"], "run: not for a sweep"),
        (["--dry_run"], "dry_run: not for a sweep"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run: not for a sweep"),
        (["--model.lora.r", "8"], "model.lora.r: the sweep sets it"),
        (["-c", "gone.yaml"], "gone.yaml: No such file"),
    ],
)
def test_a_mistake_gets_one_line_before_anything_runs(fake_train, capfd, arguments, message):
    assert main(["sweep", "-c", "small.yaml", *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("formtune: error: ") and message in line
    assert not Path("ran.txt").exists()
