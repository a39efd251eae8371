"""Training that begins from a trained adapter: the same tensors, its own metrics beside the base's, exact resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer, tiny_model, train_small
from formtune.cli import main
from formtune.warm_start.adapter import TrainedAdapter

WEIGHTS = "adapter/adapter_model.safetensors"
FROM_ONE = ["-c", "next.yaml", "--model.adapter", "logs/small/one"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a task that was trained once, as `one`; `next.yaml` says nothing of `model.lora`."""
    folder = tmp_path_factory.mktemp("task")
    tiny_model().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    train_small(folder, epochs=2)
    config = yaml.safe_load((folder / "small.yaml").read_text())
    del config["model"]["lora"]
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2}
    (folder / "next.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / ".cache/baseline")
    return folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy of it; the working directory of the test."""
    shutil.copytree(trained, tmp_path / "task")
    monkeypatch.chdir(tmp_path / "task")
    monkeypatch.delenv("FORMTUNE_RUN", raising=False)
    return Path("logs/next")


def metrics(run):
    return json.loads(Path(run, "metrics.json").read_text())


@pytest.mark.slow
def test_training_begins_where_the_adapter_ended_and_compares_with_it_and_the_base(project, capfd):
    words = ["--run", "two", "--baselines", "[]", "--model.optimizer.lr", "0"]
    assert main(["train", *FROM_ONE, *words]) == 0
    one, two = metrics("logs/small/one"), metrics(project / "two")
    lora = yaml.safe_load((project / "two/config.yaml").read_text())["model"]["lora"]
    assert lora["r"] == 8 and lora["alpha"] is None and any(name.endswith("down_proj") for name in lora["targets"])
    start = two["training"]["history"][0]
    best = next(it for it in one["training"]["history"] if it["step"] == one["training"]["best_step"])
    assert start["step"] == 0 and start["val_loss"] == best["val_loss"]
    assert two["start"]["val/loss"] == one["after"]["val/loss"] == two["after"]["val/loss"]
    assert two["before"]["val/loss"] == one["before"]["val/loss"] != two["start"]["val/loss"]
    assert Path("logs/small/one", WEIGHTS).read_bytes() == (project / "two" / WEIGHTS).read_bytes()

    sha256 = json.loads((project / "two/adapter/manifest.json").read_text())["files"]["adapter_model.safetensors"]
    origin = {"path": "logs/small/one", "sha256": sha256}  # of the same weights
    assert two["training"]["adapter"] == origin
    assert json.loads((project / "two/adapter/manifest.json").read_text())["training"]["adapter"] == origin
    card = (project / "two/adapter/README.md").read_text()
    assert f"started from the adapter `logs/small/one` (SHA-256 of its weights `{sha256}`)" in card
    assert "| adapter, " in card and ">adapter, " in (project / "two/report.html").read_text()
    assert "evaluating: adapter, " in capfd.readouterr().out
    assert main(["compare", str(project / "two:start"), str(project / "two")]) == 0
    assert "cannot tell" in capfd.readouterr().out


@pytest.mark.slow
def test_an_adapter_is_measured_without_a_checkpoint_and_the_base_if_asked(project, capfd):
    loss = metrics("logs/small/one")["after"]["val/loss"]
    assert main(["test", *FROM_ONE]) == 0
    out = capfd.readouterr().out
    assert "evaluating: adapter logs/small/one\n" in out and f"{loss:.4f}" in out
    assert main(["test", *FROM_ONE, "--ckpt_path", "base"]) == 0
    out = capfd.readouterr().out
    assert "evaluating: untuned base\n" in out and f"{loss:.4f}" not in out
    assert main(["test", "logs/small/one", "--model.adapter", "logs/small/one"]) == 2
    assert "is evaluated; for an adapter, use -c TASK.yaml" in capfd.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_needs_the_adapter_it_began_with(project, capfd):
    assert main(["fit", *FROM_ONE, "--run", "a"]) == 0
    shutil.copytree(project / "a", project / "b")
    (project / "b/checkpoints/step-4.ckpt").unlink()
    assert main(["fit", *FROM_ONE, "--run", "b", "--resume"]) == 0
    a, b = (torch.load(project / run / "checkpoints/step-4.ckpt")["state_dict"] for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    start = load_file(Path("logs/small/one", WEIGHTS))
    assert not any(torch.equal(x, y) for x, y in zip(a.values(), start.values(), strict=True))

    shutil.rmtree("logs/small/one/adapter")
    assert main(["test", str(project / "a")]) == 0, "a run's checkpoint holds its whole adapter"
    capfd.readouterr()
    (project / "b/checkpoints/step-4.ckpt").unlink()
    shutil.copytree(foreign("other"), "logs/small/one/adapter")
    assert main(["fit", *FROM_ONE, "--run", "b", "--resume"]) == 2
    assert "model.adapter: the adapter has changed since this run began; start a new run" in capfd.readouterr().err


def foreign(name, base="base", weights=True, **options):
    """The folder of an adapter that PEFT alone wrote."""
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(name, save_embedding_layers=False)
    config = json.loads(Path(name, "adapter_config.json").read_text())
    Path(name, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return name


@pytest.mark.slow
def test_settings_come_from_the_adapter_unless_the_user_sets_them(project):
    foreign("own", r=4, lora_alpha=12, target_modules=r".*\.(q|v)_proj", use_rslora=True, use_dora=True)
    adapter = TrainedAdapter("own")
    assert adapter.settings == {
        "r": 4, "alpha": 12, "rslora": True, "dora": True, "targets": ["q_proj", "v_proj"],
    }  # fmt: skip
    words = ["-c", "next.yaml", "--model.adapter", "own", "--run", "own", "--model.optimizer.lr", "0"]
    assert main(["train", *words, "--baselines", "[]"]) == 0
    start, tuned = load_file("own/adapter_model.safetensors"), load_file(project / "own" / WEIGHTS)
    assert start.keys() == tuned.keys() and all(torch.equal(start[name], tuned[name]) for name in start)
    loss = metrics(project / "own")["before"]["val/loss"]
    assert loss == metrics("logs/small/one")["before"]["val/loss"], "the base is measured without the adapter"


@pytest.mark.slow
@pytest.mark.contrib
def test_preflight_knows_the_settings_of_the_adapter(project, capfd):
    foreign("own", use_dora=True)
    assert main(["preflight", "-c", "next.yaml", "--model.adapter", "own", "--for", "vllm"]) == 1
    assert "DoRA" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({}, ["--model.lora.r", "16"], "model.lora.r: own was trained with r: 8; set model.lora.r: 8"),
        (
            {},
            ["--model.lora.alpha", "8"],
            "model.lora.alpha: own was trained with lora_alpha: 16; set model.lora.alpha: 16",
        ),
        ({"use_rslora": True}, ["--model.lora.rslora", "false"], "set model.lora.rslora: true"),
        (
            {},
            ["--model.lora.targets", "[q_proj]"],
            "model.lora.targets: own has different layers (first base_",
        ),
        ({"bias": "all"}, [], "model.adapter: own is not plain LoRA (bias: all); merge it with PEFT"),
        (
            {"rank_pattern": {"q_proj": 2}},
            [],
            "model.adapter: own is not plain LoRA (rank_pattern: {'q_proj': 2}); merge",
        ),
        (
            {"init_lora_weights": "pissa"},
            [],
            "model.adapter: own is not plain LoRA (init_lora_weights: pissa); merge",
        ),
        (
            {"base": "owner/name"},
            [],
            "model.base: own was trained on owner/name, not on base; set model.base: owner/na",
        ),
        ({}, ["--model.adapter", "none"], "model.adapter: no folder none (Hub ids look like owner/name)"),
        (
            {},
            ["--model.adapter", "logs/small"],
            "model.adapter: logs/small cannot be read (Can't find 'adapter_config.json' at 'logs/small'); name a finished",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line_with_the_key(project, capfd, options, words, message):
    foreign("own", **options)
    assert main(["fit", "-c", "next.yaml", "--model.adapter", "own", *words]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert message in error


@pytest.mark.slow
def test_a_pickle_damaged_weights_and_another_base_are_refused(project, capfd):
    def refused(message, *words):
        assert main(["fit", "-c", "next.yaml", "--model.adapter", "own", *words]) == 2
        assert message in capfd.readouterr().err

    file = Path(foreign("own"), "adapter_model.safetensors")
    weights = load_file(file)
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, file)
    refused("model.adapter: own has non-finite weights")
    file.write_bytes(file.read_bytes()[:100])
    refused("model.adapter: own cannot be read (")
    file.unlink()
    torch.save(weights, "own/adapter_model.bin")
    refused("adapter_model.safetensors'); name a finished run, or a PEFT adapter saved as safetensors")
    tiny_model(seed=1).save_pretrained("other")
    byte_tokenizer().save_pretrained("other")
    refused("model.base: logs/small/one was trained on base, not on other", "--model.adapter", "logs/small/one",
            "--model.base", "other")  # fmt: skip
    shutil.copytree("base", "copy")
    assert main(["test", *FROM_ONE, "--model.base", "copy"]) == 0, "the base is known by its weights"


@pytest.mark.slow
def test_a_merged_export_of_a_continued_run_answers_as_its_adapter(project):
    assert main(["train", *FROM_ONE, "--run", "two", "--baselines", "[]"]) == 0
    assert main(["export", str(project / "two")]) == 0
    assert main(["export", str(project / "two"), "--as", "merged"]) == 0
    figures = json.loads((project / "two/outcomes/merged.json").read_text())
    assert figures["same_answers"] == figures["format/exact"]["rows"] and figures["refused"] is None
    for kind in ("adapter", "merged"):
        origin = json.loads((project / f"two/{kind}/manifest.json").read_text())["training"]["adapter"]
        assert origin["path"] == "logs/small/one"
