"""Two processes of one run stop together, resume to the same bits, and compute what one process computes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import byte_tokenizer, tiny_model
from interrupting import FIT, ROWS, TwoProcesses, assert_same, result, signalled, start, write_task


@pytest.fixture
def work(tmp_path, base):
    write_task(tmp_path, base)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The folder of a run on two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("two")
    write_task(folder, base)
    run = TwoProcesses(folder, *FIT)
    assert run.finish(180) == 0, run.output()
    return folder


def resume(folder: Path, strategy: str = "ddp") -> None:
    again = TwoProcesses(folder, *FIT, "--resume", strategy=strategy)
    assert again.finish(180) == 0, again.output()


@pytest.mark.case("75", "SIGTERM to the first, the second or both of two processes")
@pytest.mark.case("101", "validation rows that do not divide evenly")
@pytest.mark.parametrize(
    ("whom", "strategy"), [("first", "ddp"), ("second", "ddp"), ("both", "ddp"), ("second", "fsdp")]
)
def test_two_processes_stop_together_and_resume_to_the_same_bits(work, whole, whom, strategy):
    run = TwoProcesses(work, *FIT, strategy=strategy)
    run.wait_for_step(6)
    first, second = run.process.pid, run.second()
    for pid in {"first": [first], "second": [second], "both": [first, second]}[whom]:
        os.kill(pid, signal.SIGTERM)
    assert run.finish(60) == 143, run.output()  # a second on an idle machine
    assert run.output().count("formtune: SIGTERM: ") == 1 and "Traceback" not in run.output()
    resume(work, strategy)
    assert_same(work, whole)


@pytest.mark.case("76", "SIGKILL of one of two processes")
@pytest.mark.parametrize("whom", ["first", "second"])
def test_a_killed_process_ends_the_other_within_seconds(work, whole, whom):
    run = TwoProcesses(work, *FIT)
    run.wait_for_step(6)
    os.kill(run.process.pid if whom == "first" else run.second(), signal.SIGKILL)
    assert run.finish(30) != 0
    resume(work)
    assert_same(work, whole)


@pytest.mark.case("77", "an error in one of two processes: the cause is printed first")
def test_an_error_in_one_process_ends_both_and_is_printed_first(work):
    run = TwoProcesses(work, *FIT, "--trainer.callbacks+=interrupting.Breaking")
    assert run.finish(60) != 0
    output = run.output()
    assert "the second process has a mistake of its own" in output
    consequence = output.find("another process of this run")
    assert consequence < 0 or output.index("a mistake of its own") < consequence


@pytest.mark.case("102", "fewer rows than processes")
def test_one_row_to_validate_and_test_is_enough_for_two_processes(work):
    for name in ("validation", "test"):
        (work / f"{name}.jsonl").write_text(json.dumps(ROWS[55 if name == "test" else 50]) + "\n")
    run = TwoProcesses(work, *FIT, "--trainer.max_steps", "4")
    assert run.finish(180) == 0, run.output()
    assert result(work)["rows"] == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_dry_run_ends_on_two_processes_with_different_numbers_of_micro_batches(work, strategy):
    uneven = ("--data.rows_per_step", "5", "--model.tokens_per_micro_batch", "1")
    run = TwoProcesses(work, *FIT, "--dry_run", *uneven, strategy=strategy)
    assert run.finish(60) == 0, run.output()
    assert run.output().count("dry run: nothing was trained") == 1


CUSTOM = """
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

class Letters(Metric):
    def __init__(self):
        super().__init__()
        self.add_state('seen', torch.tensor(0), dist_reduce_fx='sum')
    def update(self, predictions, targets):
        self.seen += sum(map(len, predictions)) + 1000 * sum(map(len, targets))
    def compute(self):
        return self.seen

class Parts(Callback):
    def on_train_end(self, trainer, pl_module):
        layers = [p for name, p in pl_module.named_parameters() if ".layers." in name or ".h." in name]
        split = [isinstance(p, DTensor) for p in layers if not p.requires_grad]
        whole = sum(p.numel() for p in layers if isinstance(p, DTensor))
        part = sum(p.to_local().numel() for p in layers if isinstance(p, DTensor))
        assert all(split) and part < 0.51 * whole and not any(isinstance(p, DTensor) for p in layers if p.requires_grad)
        open(f"parts.{trainer.global_rank}", "w").close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "shape"),
    # The second decodes by transformers' own `generate`.
    [("ddp", "llama"), ("fsdp", "llama"), ("fsdp", "gpt2")],
)
def test_two_processes_train_and_measure_the_same_as_one(write_project, strategy, shape):
    # 5 rows a step are dealt as 3 and 2, and the last step of an epoch as 1 and 0 or near it.
    from safetensors.torch import load_file

    project = write_project({"max_epochs": 2}, lora={"r": 4})
    Path("custom.py").write_text(CUSTOM)
    tiny_model(shape).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    arguments = ["train", "-c", "small.yaml", "--data.rows_per_step", "5", "--model.lora.dropout", "0"]
    arguments += ["--model.base", "base", "--model.metrics", "[{class_path: custom.Letters}]"]
    arguments += ["--data.validation", "0.2", "--data.test", "0.2"]  # each process has rows to decode
    assert signalled(start(project, *arguments, "--run", "on1")) == 0, Path("output.log").read_text()[-3000:]
    shutil.rmtree(".cache/baseline")  # else the second run would read what the first measured
    arguments += ["--run", "on2"]
    if strategy == "fsdp":  # also with different numbers of micro-batches, and layers that compute twice
        arguments += ["--model.tokens_per_micro_batch", "64", "--model.gradient_checkpointing", "true"]
        arguments += ["--trainer.callbacks+=custom.Parts"]
    if strategy == "ddp":  # as a user starts it
        program = [sys.executable, "-m", "formtune", *arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run = TwoProcesses(project, *arguments, strategy=strategy)
        assert run.finish(180) == 0, run.output()[-3000:]
    (one, one_result), (two, two_result) = (
        (load_file(folder / "adapter/adapter_model.safetensors"), json.loads((folder / "metrics.json").read_text()))
        for folder in (project / "logs/small/on1", project / "logs/small/on2")
    )
    assert {path.name for path in Path().glob("parts.*")} == ({"parts.0", "parts.1"} if strategy == "fsdp" else set())
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert {"before", "after"} < one_result["counts"].keys()
    for view, counts in one_result["counts"].items():
        one_view, two_view, others = one_result[view], two_result[view], two_result["counts"][view]
        same, compared = counts.pop("val/parity")
        # Each process decodes two rows of its own in full.
        assert same == compared < others["val/parity"][1] and len(set(others.pop("val/parity"))) == 1
        (nats, tokens), (two_nats, two_tokens) = counts.pop("val/loss"), others.pop("val/loss")
        assert tokens == two_tokens and nats == pytest.approx(two_nats, rel=1e-5)
        assert counts == others and one_view.keys() == two_view.keys()
        for name, value in one_view.items():
            # Sums of floats depend on their order; all that is counted is the same to the last digit.
            near = pytest.approx(two_view[name], abs=1e-5, nan_ok=True) if "loss" in name else two_view[name]
            assert value == near, (view, name)
        texts = [json.loads(line) for line in Path(f"logs/small/on1/outcomes/{view}.jsonl").read_text().splitlines()]
        assert one_view["custom/Letters"] == sum(len(o["answer"]) + 1000 * len(o["target"]) for o in texts)
