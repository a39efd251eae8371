"""A mistake in a key, a value or a class is one line that names the whole key and leads to what was meant."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from formtune.cli import main
from formtune.configuration import parsing
from formtune.configuration.parsing import did_you_mean
from formtune.tasks import parsers

ROOT = Path(__file__).resolve().parents[3]

BROKEN = """
import nothing_here
"""
CLASSES = """
from lightning.pytorch.callbacks import Callback

class Raises(Callback):
    def __init__(self):
        raise KeyError("the table is empty")

class Other:
    pass
"""


@pytest.fixture
def refused(write_project, capsys, monkeypatch):
    """A function that runs a command line in a small task's folder and returns its one error line."""
    folder = write_project({"max_steps": 2})
    (folder / "broken.py").write_text(BROKEN)
    (folder / "classes.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(folder)

    def run(*words: str, command: str = "fit", **top) -> str:
        config = yaml.safe_load(Path("small.yaml").read_text())
        for key, value in top.items():
            config[key] = config[key] | value if key in config and value else value
        Path("changed.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        assert main([command, "-c", "changed.yaml", *words]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("formtune:")]
        assert not Path("logs").exists()
        return line.removeprefix("formtune: error: ")

    return run


NAMES = {
    "data.rows_per_step": "data.batch_size per_device_train_batch_size gradient_accumulation_steps",
    "model.optimizer.lr": "model.lr optimizer.lr learning_rate lr trainer.learning-rate",
    "model.base": "model.name model_name_or_path base_model",
    "model.lora.r": "lora_r lora.r model.lora.rank",
    "model.lora.alpha": "lora_alpha model.lora.lora_alpha",
    "trainer.devices": "trainer.gpus gpus nproc_per_node",
    "trainer.max_epochs": "epochs num_train_epochs",
    "trainer.max_steps": "max_steps train.max_steps",
    "trainer.val_check_interval": "eval_steps val_steps",
    "trainer.precision": "bf16 torch_dtype",
    "data.max_length": "max_seq_length cutoff_len",
    "seed_everything": "seed",
    "run": "output_dir",
    "resume": "resume_from_checkpoint",
}


@pytest.mark.parametrize(("key", "names"), NAMES.items(), ids=NAMES)
def test_a_name_of_another_tool_leads_to_the_key_of_the_same_meaning(refused, key, names):
    for name in names.split():
        assert f"did you mean {key}" in refused(f"--{name}", "1"), name


def test_in_a_yaml_too_with_file_and_line(refused):
    assert refused(batch_size=8).startswith("changed.yaml:1: unknown key batch_size; did you mean data.rows_per_step (")
    line = refused(zeal={"epochs": 1}, command="fit")
    assert (
        line
        == "changed.yaml:16: unknown key zeal.epochs; did you mean trainer.max_epochs (passes over the training rows)?"
    )
    assert "unknown key model.lr; did you mean model.optimizer.lr (peak" in refused(model={"lr": 1})


@pytest.mark.parametrize("key", ["save_best", "trainer.nope", "data.text_length", "x", "model.format_name"])
def test_no_key_of_another_meaning_is_named(refused, key):
    assert "did you mean" not in refused(f"--{key}", "1")


def test_a_mistyped_name_has_the_letters_of_the_right_one():
    names = {"max_steps", "data", "data.test", "trainer", "trainer.max_epochs", "labels"}
    assert did_you_mean("lables", names) == "; did you mean labels?"
    assert did_you_mean("trainer.max_epoch", names) == "; did you mean trainer.max_epochs?"
    assert did_you_mean("trianer.callbacks", names) == "; did you mean trainer?"
    assert did_you_mean("trainer.callbacks", names) == ""
    assert did_you_mean("val_ste", names) == did_you_mean("data.tail", names) == ""


VALUES = [
    ("model.optimizer.lr", "abc", "must be a number, not abc"),
    ("data.bad_rows", "x", "must be one of refuse, drop, not x"),
    ("trainer.max_epochs", "three", "must be an integer, not three"),
    ("data.max_length", "-4", "must be a positive integer"),
    ("model.scheduler.warmup", "abc", "must be a number from 0 to 1"),
    ("model.constrained", "maybe", "must be true or false, not maybe"),
    ("model.quantize", "3bit", "must be 4bit, not 3bit"),
    ("model.lora.targets", "q_proj,v_proj", "must be one of attention, all-linear or a list such as [a, b], not q_proj,v_proj"),
    ("data.clean", "[soap]", "must be one of encoding, unicode, control, html, spaces, edges, not soap"),
    ("data.format", "null", "Format needs a class; name one of JsonSchema, Labels, Reasoning, Regex, Tagged, ToolCalls, or MODULE.CLASS"),
]  # fmt: skip


def test_a_value_in_a_yaml_is_named_with_its_line_and_what_was_expected(refused):
    assert refused(model=None).endswith(": model.base: is missing; set it")
    assert refused(model={"base": None}).endswith(": model.base: must be a string, not null")
    expected = "must be a number from 0 to 1 or a list such as [a, b] or a string, not 1.5"
    assert refused(data={"validation": 1.5}).endswith(f": data.validation: {expected}")


@pytest.mark.parametrize(("key", "value", "reason"), VALUES, ids=[key for key, *_ in VALUES])
def test_a_wrong_value_is_named_with_its_whole_key_and_what_was_expected(refused, monkeypatch, key, value, reason):
    every = parsing._subclasses

    def own(*hints):  # without the classes that other tests have defined
        packages = ("formtune", "torch", "lightning", "torchmetrics")
        return (kind for kind in every(*hints) if kind.__module__.partition(".")[0] in packages)

    monkeypatch.setattr(parsing, "_subclasses", own)
    assert refused(f"--{key}={value}") == f"{key}: {reason}"


def test_a_value_of_a_class_in_a_yaml_is_named_with_its_line(refused):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": "abc"}}
    line = refused(model={"optimizer": optimizer}, data={"bad_rows": "drop"})
    where = next(n for n, text in enumerate(Path("changed.yaml").read_text().splitlines(), 1) if "lr: abc" in text)
    assert line == f"changed.yaml:{where}: model.optimizer.lr: must be a number, not abc"


@pytest.mark.parametrize("command", ["fit", "audit"])
def test_booleans_in_a_list_of_texts_are_to_be_quoted(refused, command):
    if command == "audit":
        pytest.importorskip("formtune.audit.findings")
    line = refused(data={"format": {"class_path": "Labels", "init_args": {"labels": [True, False]}}}, command=command)
    reason = "must be a string, not True; quote it (yes, no, on and off too)"
    assert line.endswith(f"data.format.labels: {reason}")


def test_a_number_without_a_point_is_a_number_in_every_command(refused, capsys):
    pytest.importorskip("formtune.audit.findings")
    for name, value in (("validation", "2e-1"), ("near_duplicates", "8e-1")):
        text = Path("small.yaml").read_text().replace("data:\n", f"data:\n  {name}: {value}\n")
        Path("small.yaml").write_text(text)
    assert main(["audit", "-c", "small.yaml"]) == 0
    Path("small.yaml").write_text(text.replace("model:\n", "model:\n  optimizer: {lr: 1e-4}\n"))
    with pytest.raises(SystemExit):
        main(["fit", "-c", "small.yaml", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out.partition("\nmodel:")[2].join(["model:", ""]))
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-4


NAMED = [
    (["--trainer.logger", "WandLogger"], "trainer.logger: no class 'WandLogger'; did you mean WandbLogger?"),
    (["--trainer.logger", "CometLogger"], "trainer.logger: CometLogger: "),
    (["--trainer.strategy", "ddpp"], "trainer.strategy: You selected an invalid strategy name: `strategy='ddpp'`"),
    (["--trainer.accelerator", "cud"], "trainer.accelerator: You selected an invalid accelerator name: `accelerator='cud'`"),
    (["--trainer.profiler", "simpel"], "trainer: When passing string value for the `profiler` parameter"),
    (["--trainer.devices", "abc"], "trainer: `devices` selected with"),
    (["--trainer.callbacks+=EarlyStoping"], "trainer.callbacks: no class 'EarlyStoping'; did you mean EarlyStopping?"),
    (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks: the argument monitor is missing"),
    (["--trainer.callbacks+=ModelSummary", "--trainer.callbacks.max_dept=1"], "did you mean trainer.callbacks.max_depth?"),
    (["--trainer.callbacks+=classes.Raises"], "trainer.callbacks: Raises: KeyError: 'the table is empty'"),
    (["--trainer.callbacks+=classes.Raise"], "module 'classes' has no attribute 'Raise'; did you mean Raises?"),
    (["--trainer.callbacks+=classes.Other"], "trainer.callbacks: must name a subclass of Callback"),
    (["--trainer.callbacks+=broken.Any"], "trainer.callbacks: No module named 'nothing_here'; pip install nothing_here, or"),
    (["--trainer.plugins+=nope"], "trainer.plugins: no class 'nope'"),
    (["--model.metrics", "[{class_path: torchmetrics.text.CharErrorRat}]"], "did you mean CharErrorRate?"),
    (["--model.metrics", "[{class_path: torchmetrics.text.BLEUScore, init_args: {n_gram: x}}]"], "model.metrics.n_gram: must be an integer, not x"),
    (["--data.format", "jsonschema"], "data.format: no class 'jsonschema'; did you mean JsonSchema?"),
    (["--trainer.min_steps", "10"], "trainer.min_steps: more than trainer.max_steps, 2"),
    (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches: 0 leaves nothing to train"),
    (["--trainer.use_distributed_sampler", "true"], "trainer.use_distributed_sampler: True would split the rows"),
    (["--trainer.check_val_every_n_epoch", "5"], "trainer.check_val_every_n_epoch: use null or 1"),
    (["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "9"], "with 1, it must be a fraction of an epoch"),
    (["--trainer.default_root_dir", "x"], "trainer.default_root_dir: runs are in logs/TASK/RUN; set task and run"),
    (["--model.scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.scheduler.max_lr", "1"], "model.scheduler: You must"),
    (["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "x"], "model.scheduler: "),
    (["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.fused=true", "--model.optimizer.foreach=true"], "model.optimizer: "),
    (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"], "did you mean val/loss?"),
    (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "trainer.max_epochs: with -1 the schedule has no last"),
    (["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"], "set this key or trainer.max_steps"),
    (["--trainer.val_check_interval", "00:00:10:00"], "trainer.val_check_interval: set steps, or a fraction of an epoch"),
    (["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"], "GradientAccumulationScheduler changes the rows of a step"),
    (["--model.optimizer", "torch.optim.LBFGS"], "model.optimizer: "),
    (["--model.optimizer", "torch.optim.SparseAdam"], "model.optimizer: SparseAdam does not support dense gradients"),
    (["--trainer.logger", "false", "--trainer.callbacks+=LearningRateMonitor"], "LearningRateMonitor needs a logger"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "part"), NAMED, ids=[" ".join(words) for words, _ in NAMED])
def test_a_class_that_cannot_be_used_is_one_line_with_key_reason_and_remedy(refused, words, part):
    assert part in refused(*words)


def test_a_folder_is_not_a_checkpoint(refused, tmp_path):
    assert "no such file; name a run before the flags" in refused("--ckpt_path", str(tmp_path), command="test")


def test_audit_refuses_unknown_keys_as_training_does(refused):
    pytest.importorskip("formtune.audit.findings")
    assert "did you mean data.train?" in refused(datas={"train": "x"}, command="audit")
    assert "unknown key model.lr; did you mean model.optimizer.lr" in refused(model={"lr": 1}, command="audit")


def test_audit_makes_nothing_that_only_training_needs(write_project, monkeypatch):
    pytest.importorskip("formtune.audit.findings")
    folder = write_project({"max_steps": 2, "callbacks": [{"class_path": "classes.Raises"}]})
    (folder / "classes.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(folder)
    assert main(["audit", "-c", "small.yaml"]) == 0


def test_the_keys_that_only_training_reads_are_complete():
    reference = yaml.safe_load((ROOT / "configs/reference.yaml").read_text())
    all_keys = parsers.TRAINING | {"model.base", "model.chat_template", "model.max_new_tokens", "model", "data", "task"}
    all_keys -= {"data.rows_per_step"}
    assert {*reference, *(f"model.{key}" for key in reference["model"])} | {"model.format"} == all_keys


def test_a_run_is_named_by_its_last_configuration(write_project, capsys):
    pytest.importorskip("formtune.audit.findings")
    folder = write_project({"max_steps": 2})
    (folder / "base.yaml").write_text("data: {near_duplicates: 1.0}\n")
    assert main(["audit", "-c", "base.yaml", "-c", "small.yaml"]) == 0
    assert (folder / "logs/small/audit").is_dir() and not (folder / "logs/base").exists()
    assert main(["fit", "-c", "base.yaml", "-c", "small.yaml", "--run", "r"]) == 0
    assert (folder / "logs/small/r/config.yaml").is_file() and not (folder / "logs/base").exists()


def test_no_name_of_another_tool_is_a_key_itself():
    own = set(parsing.KEYS)
    assert not own & set(parsing.MEANT) and {key for key, _ in parsing.MEANT.values()} <= own


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        ("test", ["--dry_run"], "dry_run: test does not use it, only train and fit"),
        (
            "test",
            ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x"],
            "trainer.logger: test does not use it, only train and fit",
        ),
        ("fit", ["--baseline_rows", "9"], "baseline_rows: fit does not use it, only train"),
        ("validate", ["--min_confidence", "0.5"], "min_confidence: validate does not use it, only predict"),
        ("test", ["--run", "typo"], "run: logs/changed/typo has no checkpoints; name another run, or train this one"),
        ("audit", ["--task", "../x"], "task: ../x is a path; give a name"),
    ],
)
def test_what_a_command_would_ignore_or_put_elsewhere_is_refused(refused, command, words, line):
    if command == "audit":
        pytest.importorskip("formtune.audit.findings")
    assert refused(*words, command=command) == line


def test_a_precision_has_lightnings_short_names_and_steps_alone_have_no_other_limit():
    from formtune.configuration import trainer_checks
    from formtune.configuration.yaml_file import LINES

    for words, precision, epochs in (
        (["--trainer.precision", "bf16", "--trainer.max_steps", "9"], "bf16-mixed", -1),
        (["--trainer.precision", "16", "--trainer.max_steps", "9", "--trainer.max_epochs", "2"], "16-mixed", 2),
    ):
        LINES.clear()
        LINES.update(dict.fromkeys((word.removeprefix("--") for word in words[::2]), ""))
        trainer = Namespace(
            precision=words[1],
            max_steps=9,
            max_epochs=2 if len(words) > 4 else 3,
            accelerator="cpu",
            min_steps=None,
            val_check_interval=9,
            check_val_every_n_epoch=None,
        )
        trainer_checks.complete_trainer(trainer)
        assert (trainer.precision, trainer.max_epochs) == (precision, epochs)
