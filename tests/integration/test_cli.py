"""The command line from YAML to adapter folder, and one line with exit code 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import SCHEMA, shared
from formtune.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(write_project):
    """A folder with a task in YAML; the working directory of the test."""
    return write_project({"max_epochs": 2}, lora={"r": 4})


def fit(*extra):
    return main(["train", "-c", "small.yaml", "--run", "one", *extra])


def test_fit_leaves_an_adapter_that_peft_loads_alone_and_metrics_before_and_after(project, base, capsys):
    assert fit("--trainer.val_check_interval", "2", "--model.optimizer.lr", "0.01") == 0
    run = project / "logs/small/one"
    result = json.loads((run / "metrics.json").read_text())
    names = set(result["before"])
    assert {
        "format/exact",
        "format/loose",
        "joint/exact",
        "content/field_f1",
        "content/field_acc/n",
        "val/loss",
    } <= names
    assert names == set(result["after"]) and result["rows"] == result["counts"]["after"]["format/exact"][1]
    assert sum(v for n, v in result["after"].items() if n.startswith("fail/")) == result["rows"]
    assert result["after"]["val/loss"] < result["before"]["val/loss"]
    assert len(list((run / "checkpoints").iterdir())) <= 2 and list(run.glob("events.*"))
    assert json.loads((run / "adapter/format.json").read_text())["init_args"]["schema"] == SCHEMA
    assert main(["compare", f"{run}:before", str(run), "--out", "gain.json"]) == 0
    output = capsys.readouterr().out
    assert f"\n{run} against {run}:before: format/exact " in output
    assert re.search(r"^few rows: \d\d to train on", output, re.M)
    for when, compared in zip(("before", "after"), json.loads(Path("gain.json").read_text())["runs"], strict=True):
        figures = {name: figure["value"] for name, figure in compared["metrics"].items()}
        assert figures == pytest.approx({name: result[when][name] for name in figures})

    code = (
        "import sys, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "base, folder = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\nassert tokenizer.chat_template\n"
        "assert 'formtune' not in sys.modules\n"
        "print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, base, run / "adapter"], capture_output=True, text=True, check=True
    )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    assert float(out.stdout) == pytest.approx(float(tuned(torch.tensor([[5, 6, 7]])).logits.double().sum()))


def test_the_best_checkpoint_gives_the_exported_metrics_again_and_predict_checks_answers(project, capsys):
    assert fit() == 0
    run = project / "logs/small/one"
    checkpoint = (
        f"{run}/checkpoints/step-{json.loads((run / 'metrics.json').read_text())['training']['best_step']}.ckpt"
    )
    capsys.readouterr()
    assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    after = json.loads((run / "metrics.json").read_text())["after"]
    assert f"{after['val/loss']:.4f}" in capsys.readouterr().out

    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (3, 9, 1)))
    arguments = ["--ckpt_path", checkpoint, "--data.prompts", "prompts.jsonl", "--answers", "new/out.jsonl"]
    assert main(["predict", "-c", str(run / "config.yaml"), *arguments]) == 0
    answers = [json.loads(line) for line in Path("new/out.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["xxx", "xxxxxxxxx", "x"]
    keys = {"where", "prompt", "answer", "valid", "kind", "detail", "confidence", "field_confidences"}
    assert all(a.keys() == keys and 0 <= a["confidence"] <= 1 for a in answers)
    assert not any(a["valid"] != (a["kind"] == "ok") for a in answers)
    assert main(["predict", str(run), "prompts.jsonl", "--min_confidence", "0.9"]) == 0
    parts = [Path(f"answers.{name}.jsonl").read_text().splitlines() for name in ("accepted", "review")]
    assert (
        f"{len(parts[1])} in answers.review.jsonl, {len(parts[0])} in answers.accepted.jsonl" in capsys.readouterr().out
    )
    assert all(json.loads(line)["confidence"] >= 0.9 for line in parts[0])
    assert sorted(a["where"] for a in map(json.loads, [*parts[0], *parts[1]])) == sorted(a["where"] for a in answers)
    assert len((run / "outcomes/validation.jsonl").read_text().splitlines()) == 5
    assert "Which answers to trust" in (run / "report.html").read_text()
    assert main(["predict", str(run), "prompts.jsonl", "--target_precision", "0.999"]) == 2
    assert "target_precision: no confidence gives 0.999 on the" in capsys.readouterr().err


def test_validation_counts_optimizer_steps_and_ends_with_the_last_step(project):
    assert fit("--data.rows_per_step", "5", "--trainer.val_check_interval", "4", "--trainer.max_epochs", "1") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(project / "logs/small/one"))
    events.Reload()
    steps = json.loads((project / "logs/small/one/metrics.json").read_text())["training"]["steps"]
    # Sorted: in one process that trains often, TensorBoard reads file 10 before file 9.
    assert steps % 4 and sorted(e.step for e in events.Scalars("val/loss")) == [*range(0, steps, 4), steps]
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "format/exact", "fail/syntax", "test/format/exact"} <= tags
    assert all(e.value > 0 for e in events.Scalars("train/tokens_per_second"))
    assert any(tag.startswith("answers/validation") for tag in events.Tags()["tensors"])
    assert sorted(e.step for e in events.Scalars("test/format/exact")) == [0, steps]


MISTAKES = {
    "nothing to judge by": (["--trainer.limit_val_batches", "0"], "limit_val_batches: 0 leaves no rows"),
    "clipping in the trainer": (["--trainer.gradient_clip_val", "1"], "set model.max_grad_norm instead"),
    "layers split otherwise": (["--trainer.strategy", "deepspeed"], "deepspeed shards the adapters too; use fsdp"),
    "spawned processes": (
        ["--trainer.strategy", "ddp_spawn"],
        "trainer.strategy: ddp_spawn cannot return the trained weights; use ddp",
    ),
    "spawned by a class": (
        ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.start_method", "spawn"],
        "cannot return the trained weights; use ddp",
    ),
    "layers split in 4 bits": (
        ["--trainer.strategy", "fsdp", "--model.quantize", "4bit"],
        "fsdp supports neither model.quantize nor model.compile",
    ),
    "beginning of a key": (["--trainer.max_step", "3"], "max_step"),
    "accumulation": (["--trainer.accumulate_grad_batches", "4"], "set data.rows_per_step instead"),
    "no such device": (["--trainer.accelerator", "cuda"], "trainer: .*CUDA"),
    "mistyped column": (["--data.columns.prompt", "Number {promt}"], "train.jsonl:1: no column `promt`"),
    "no data file": (["--data.train", "gone.jsonl"], "gone.jsonl: no such file"),
    "schema for a regex": (
        ["--data.format", "Regex", "--data.format.pattern", ".*", "--data.system", "{schema}"],
        "data.system: {schema} needs a JsonSchema",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(project, capfd, case):
    arguments, message = MISTAKES[case]
    assert fit(*arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in error if "error:" in line]) == 1 and re.search(message, error[-1]), error
    assert "Traceback" not in "\n".join(error)


@pytest.mark.parametrize("day", ["2026-13-01", "yesterday"])
def test_a_date_that_is_no_day_is_refused(project, capfd, day):
    assert fit(f"--data.date={day}") == 2
    assert "write it as YYYY-MM-DD" in capfd.readouterr().err


def test_help_says_how_the_untuned_base_is_measured(project, capfd):
    with pytest.raises(SystemExit):
        main(["test", "--help-all"])
    assert "base (the untuned base" in " ".join(capfd.readouterr().out.split())


def test_a_used_run_folder_is_not_overwritten(project, capfd):
    (project / "logs/small/one").mkdir(parents=True)
    (project / "logs/small/one/config.yaml").touch()
    assert fit() == 2
    assert "already has a run" in capfd.readouterr().err


def test_a_trial_run_of_one_batch_leaves_no_result_and_no_traceback(project):
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not (project / "logs/small/one/metrics.json").exists()


def test_a_run_without_a_logger_still_leaves_its_files(project):
    assert fit("--trainer.logger", "false", "--trainer.max_steps", "2") == 0
    assert {"adapter", "checkpoints", "metrics.json"} <= {p.name for p in (project / "logs/small/one").iterdir()}


def test_a_missing_checkpoint_is_refused_before_the_model_loads(project, capfd):
    assert main(["test", "-c", "small.yaml", "--ckpt_path", "gone.ckpt"]) == 2
    assert "gone.ckpt: no such file" in capfd.readouterr().err


@pytest.mark.slow
def test_python_dash_m_finds_a_format_and_a_source_of_ones_own_in_the_working_directory(project):
    Path("custom.py").write_text(
        "from formtune.data import Source\nfrom formtune.formats import Regex\n\n"
        "class Numbers(Source):\n    def records(self):\n"
        "        for n in range(60):\n            yield {'prompt': str(n), 'completion': '{%d}' % n}, f'numbers:{n}'\n\n"
        "class Braces(Regex):\n"
        "    def __init__(self) -> None:\n        super().__init__(r'\\{.*\\}')\n"
    )
    config = yaml.safe_load(Path("small.yaml").read_text())
    config["data"] = {"format": {"class_path": "custom.Braces"}, "train": {"class_path": "custom.Numbers"}}
    Path("small.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "formtune", "train", "-c", "small.yaml", "--trainer.max_steps", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "numpy")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "commands:"),
        (["--help"], 0, "commands:"),
        (["-h"], 0, "formtune fit -c configs/demo.yaml"),
        (["--version"], 0, r"formtune \d"),
        (["fti", "-c", "small.yaml"], 2, "unknown command 'fti'; did you mean fit?"),
        (
            ["quux"],
            2,
            "unknown command 'quux'; the first word must be a command: init, audit, train, fit, validate",
        ),
        (["-c", "small.yaml", "fit"], 2, "unknown command '-c'; the first word must be a command: init"),
        (["train", "-c"], 2, "-c: name the YAML of a task"),
        (["train", "-c", "gone.yaml"], 2, "gone.yaml: No such file"),
        (["train", "--config=broken.yaml"], 2, "broken.yaml:1: not valid YAML"),
        (["compare", "--help"], 0, "formtune compare RUN RUN"),
        (["export", "--help"], 0, "usage: formtune export "),
        (["export", "one", "--as", "onnx"], 2, "invalid choice: 'onnx'"),
        (["audit", "-c"], 2, "-c: name the YAML of a task"),
        (["compare", "one"], 2, "name two runs or more"),
        (["compare", "one", "two", "--ot", "x.json"], 2, "did you mean out?"),
        (["compare", "one", "two"], 2, "one/outcomes/after.jsonl: No such file or directory; a finished run has it"),
    ],
)
def test_help_and_mistakes_that_need_no_model_are_answered_without_importing_torch(tmp_path, arguments, code, message):
    (tmp_path / "broken.yaml").write_text("model: [")
    heavy = HEAVY[:3] if arguments[:1] in (["compare"], ["export"]) else HEAVY
    program = (
        "import sys\nfrom formtune.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as done:\n    code = done.code\n"
        f"assert not set({heavy!r}) & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stdout if code == 0 else done.stderr)
    assert "error:" not in done.stderr or len(done.stderr.splitlines()) == 1


# The shipped ones: a task of your own may also name what is the default.
CONFIGS = [ROOT / f"configs/{name}.yaml" for name in ("demo", "qwen3-0.6b", "qwen3-8b-qlora", "smollm2-135m")]


def leaves(tree, path=()):
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


def print_config(path, capfd) -> str:
    with pytest.raises(SystemExit) as done:
        main(["train", "-c", str(path), "--print_config"])
    assert not done.value.code
    return capfd.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_leaf_of_a_shipped_yaml_changes_the_parsed_configuration(path, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(path.read_text().splitlines()) < 25
    whole = print_config(path, capfd)
    tree = yaml.safe_load(path.read_text())
    for leaf in leaves(tree):
        if leaf[-1] in ("base", "class_path"):  # nothing parses without them
            continue
        less = yaml.safe_load(path.read_text())
        node = less
        for key in leaf[:-1]:
            node = node[key]
        del node[leaf[-1]]
        if leaf[-2:] == ("init_args", "schema"):
            continue
        shorter = tmp_path / path.name
        shorter.write_text(yaml.safe_dump(less))
        assert print_config(shorter, capfd) != whole, leaf


def test_the_guides_values_are_the_defaults(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(print_config(ROOT / "configs/smollm2-135m.yaml", capfd))
    lora, trainer = config["model"]["lora"], config["trainer"]
    assert (lora["r"], lora["alpha"], lora["dropout"], lora["targets"]) == (16, None, 0.05, "attention")
    assert (config["data"]["rows_per_step"], config["model"]["scheduler"]["init_args"]["warmup"]) == (16, 0.1)
    assert (trainer["max_epochs"], trainer["log_every_n_steps"], trainer["val_check_interval"]) == (3, 10, 100)


def test_real_rows_and_real_weights_go_through_the_whole_path(tmp_path, monkeypatch):
    weights, rows = shared("models/stories260K"), shared("data/snips/train.jsonl")
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:150]))
    text = {"type": "object", "additionalProperties": {"type": ["string", "array"]}}
    schema = {
        "type": "object",
        "properties": {"intent": {"type": "string"}, "slots": text},
        "required": ["intent", "slots"],
    }
    Path("schema.json").write_text(json.dumps(schema))
    arguments = ["--data.train", "train.jsonl", "--data.format", "JsonSchema", "--data.format.schema", "schema.json"]
    arguments += ["--trainer.max_steps", "4", "--model.max_new_tokens", "160", "--trainer.limit_test_batches", "1"]
    arguments += ["--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"]
    assert main(["train", "--model.base", str(weights), "--task", "real", "--run", "one", *arguments]) == 0
    result = json.loads(Path("logs/real/one/metrics.json").read_text())
    assert result["after"]["val/loss"] < result["before"]["val/loss"]
