"""What is exported answers as the adapter did, loads without formtune, and appears only when it is whole."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from command import fork_fresh_processes
from conftest import byte_tokenizer, pair, tiny_model, train_small
from formtune.base.row import Row
from formtune.cli import main
from formtune.errors import UserError
from formtune.export import exporter as exporting
from formtune.export import measure as measure_module
from formtune.export.exported import read_manifest, verify
from formtune.export.exporter import FinishedRun
from formtune.export.manifest import file_hash
from formtune.export.measure import (
    EXACT,
    QUANTIZED,
    ROUNDED,
    Closeness,
    Reference,
    call_fresh,
    compare,
    last_logits,
    load,
    measure,
    merge,
)
from formtune.model import lora

WIDE = {"hidden_size": 128, "intermediate_size": 256}
ROWS = [[(7 * i + 13 * j) % 250 for j in range(20)] for i in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a task that was trained once."""
    folder = tmp_path_factory.mktemp("task")
    tiny_model(**WIDE, tie_word_embeddings=True).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return train_small(folder, epochs=4)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it; the working directory of the test."""
    shutil.copytree(trained, tmp_path / "task")
    monkeypatch.chdir(tmp_path / "task")
    return Path("logs/small/one")


@pytest.fixture(autouse=True)
def forked(request, monkeypatch):
    if request.node.name != "test_a_model_that_does_not_load_is_one_line":
        fork_fresh_processes(monkeypatch)


def export(run, *words):
    return main(["export", str(run), *words])


PLAIN = """
import importlib.util, sys, torch
assert importlib.util.find_spec("formtune") is None, "this environment has formtune"
try:
    import formtune
    raise SystemExit("formtune was imported")
except ModuleNotFoundError:
    pass
from transformers import AutoModelForCausalLM, AutoTokenizer
kind, folder, base = sys.argv[1:]
if kind == "adapter":
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
assert AutoTokenizer.from_pretrained(folder).chat_template
print(model.eval()(torch.tensor([[5, 6, 7]])).logits.double().sum().item())
"""


def without_formtune(kind, folder, base="base"):
    """Load a folder where formtune is not: no `.pth` of an editable install is read, and no path leads to its source."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": os.pathsep.join(packages)}
    return subprocess.run(
        [sys.executable, "-S", "-c", PLAIN, kind, folder, base], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_plain_peft_and_transformers_load_what_was_exported_where_there_is_no_formtune(run, kind):
    if any((Path(path) / "formtune").is_dir() for path in sys.path if path.endswith("site-packages")):
        pytest.skip("formtune is installed as a copy, so there is no environment without it")
    assert kind == "adapter" or export(run, "--as", kind) == 0  # the adapter is there since fit
    process = without_formtune(kind, run / kind)
    assert process.returncode == 0, process.stderr
    base = AutoModelForCausalLM.from_pretrained("base")
    tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
    expected = float(tuned(torch.tensor([[5, 6, 7]])).logits.double().sum())
    assert float(process.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_an_export_holds_its_metrics_its_manifest_and_answers_that_compare_reads(run, capsys):
    assert export(run) == 0 and export(run, "--as", "merged") == 0
    output = capsys.readouterr().out
    assert "top-1 100.0%" in output and " tokens/s, one answer" in output
    result = json.loads((run / "metrics.json").read_text())
    for kind in ("adapter", "merged"):
        manifest = verify(run / kind)
        assert manifest["kind"] == kind and manifest["data"] == result["data"]
        assert manifest["format"] == file_hash(run / "adapter/format.json")
        figures = manifest["verification"]
        assert json.loads((run / f"outcomes/{kind}.json").read_text()) == figures and figures["refused"] is None
        assert figures["tokens_per_second"] > 0 and "constrained_tokens_per_second" not in figures
        exact = figures["format/exact"]
        assert exact["right"] / exact["rows"] == result["after"]["format/exact"]
        assert exact["gained"] == exact["lost"] == 0 and figures["closeness"]["top1"] == 1
        assert main(["compare", str(run), str(run / f"outcomes/{kind}.jsonl")]) == 0
    assert figures["bytes"] > 600_000
    assert AutoModelForCausalLM.from_pretrained(run / "merged").generation_config.eos_token_id == [2]
    assert not list(run.glob(".export-*"))
    assert export(run, "--as", "merged") == 2 and "exists; remove it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantized_export_is_loaded_in_a_fresh_process_and_checked(run, kind, package):
    pytest.importorskip(package, reason="an optional package")
    assert export(run, "--as", kind, "--max_loss", "0.99") == 0
    manifest = verify(run / kind)
    assert package in manifest["versions"] and manifest["verification"]["closeness"]["top1"] >= 0.95
    assert sum(path.stat().st_size for path in (run / kind).glob("*.safetensors")) < 600_000


def test_a_package_that_is_not_there_is_one_line_with_the_command(run, monkeypatch, capsys):
    from formtune.export import quantize

    monkeypatch.setitem(quantize.EXTRAS, "int8", ("quantize", ("no-such-package",)))
    assert export(run, "--as", "int8") == 2
    assert "needs no-such-package; pip install -e '.[quantize]'" in capsys.readouterr().err


def _edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _rewritten_adapter(**changes):
    """An adapter that PEFT loads without a word, in a folder whose manifest was written for it."""

    def change(run):
        from formtune.export.manifest import write_manifest

        data = read_manifest(run / "adapter")["data"]
        _edit(run / "adapter/adapter_config.json", lambda config: config | changes)
        write_manifest(run / "adapter", "adapter", "base", data)

    return change


def _append(path):
    return lambda run: Path(path.format(run=run)).open("a").write("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_append("{run}/adapter/adapter_config.json"), "adapter_config.json: changed since it was exported"),
        (_append("base/config.json"), "model.base: base is not the base of logs/small/one/adapter; its files differ"),
        (lambda run: Path("train.jsonl").write_text(json.dumps(pair(1)) + "\n"), "gives other test rows"),
        (lambda run: (run / "outcomes/after.jsonl").unlink(), "after.jsonl: No such file"),
        (lambda run: (run / "config.yaml").unlink(), "name the folder of a run"),
        (lambda run: (run / "adapter/manifest.json").unlink(), "manifest.json: No such file"),
        (
            _rewritten_adapter(layer_replication=[[0, 2], [1, 2]]),
            "the merged model is not the same model as the adapter",
        ),
        (_rewritten_adapter(lora_bias=True), "the adapter cannot be merged: Impossible to merge"),
        (_rewritten_adapter(target_modules=["lm_head"]), "shares between input and output"),
        (_rewritten_adapter(target_modules=["embed_tokens"]), "shares between input and output"),
    ],
)
def test_what_is_not_what_was_trained_or_cannot_be_merged_is_refused_in_one_line(run, capsys, change, message):
    change(run)
    capsys.readouterr()
    assert export(run, "--as", "merged") == 2
    output = capsys.readouterr().err
    assert message in output and len([line for line in output.splitlines() if "error" in line]) == 1
    assert not (run / "merged").exists() and not list(run.glob(".export-*"))


def test_a_merge_that_went_wrong_is_refused_and_nothing_appears(run, monkeypatch, capsys):
    monkeypatch.setattr(measure_module, "compare", lambda *_: Closeness(0.5, 0.0, 1.0))
    assert export(run, "--as", "merged") == 2
    assert "the merged model is not the same model as the adapter: logits 5.0e-01 apart" in capsys.readouterr().err
    assert not (run / "merged").exists()


@pytest.mark.slow
def test_answers_that_lose_the_format_are_refused_with_their_number_and_kept_to_look_at(run, monkeypatch, capsys):
    judged = FinishedRun(run)
    good = [replace(it, kind="ok") for it in judged.outcomes]
    (run / "outcomes/after.jsonl").write_text("".join(json.dumps(asdict(it)) + "\n" for it in good))
    valid = sum(it.exact for it in judged.outcomes)
    if valid == len(good):
        pytest.skip("the tiny model learnt the format")
    assert export(run, "--as", "merged") == 2
    assert f"format/exact falls from {len(good)} to {valid} of {len(good)} rows" in capsys.readouterr().err
    assert not (run / "merged").exists() and (run / "outcomes/merged.jsonl").is_file()
    assert "falls from" in json.loads((run / "outcomes/merged.json").read_text())["refused"]


def test_a_run_that_was_checked_on_some_of_its_test_rows_is_compared_on_them(run):
    path = run / "outcomes/after.jsonl"
    lines = path.read_text().splitlines(keepends=True)[1::2]
    path.write_text("".join(lines))
    assert [row.where for row in FinishedRun(run).tuned.rows] == [json.loads(line)["where"] for line in lines]


@pytest.mark.parametrize("share", ["1", "-0.1", "5"])
def test_a_loss_that_is_no_share_is_refused(run, capsys, share):
    assert export(run, "--as", "merged", f"--max_loss={share}") == 2
    assert "--max_loss: a fraction of the test rows" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_evaluated_under_constrained_decoding_is_measured_without_before_anything_is_compared_with_it(
    run, capsys
):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["constrained"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    after = FinishedRun(run).outcomes
    lines = [json.dumps(asdict(replace(it, kind="ok"))) + "\n" for it in after]
    (run / "outcomes/after.jsonl").write_text("".join(lines))
    assert export(run, "--as", "merged") == 2
    assert "evaluated with constrained decoding" in capsys.readouterr().err
    assert export(run) == 0 and export(run, "--as", "merged") == 0
    assert read_manifest(run / "merged")["verification"]["format/exact"]["lost"] == 0


def test_a_killed_export_leaves_no_folder_of_its_final_name(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "measured", killed)
    assert export(run, "--as", "merged") == 130
    assert not (run / "merged").exists() and not list(run.glob(".export-*"))


def test_tolerances_break_at_what_they_name_and_at_numbers_that_are_none():
    same = [torch.randn(5, 9)]
    assert EXACT.violation(compare(same, same)) is None
    assert "logits" in EXACT.violation(compare(same, [same[0] * 1.01]))
    assert "KL" in ROUNDED.violation(Closeness(0.01, 0.5, 1.0))
    assert "top-1 90.0%" in QUANTIZED.violation(Closeness(9.0, 0.01, 0.9))
    for value in (torch.nan, torch.inf):
        assert all(bounds.violation(compare(same, [same[0] * value])) for bounds in (EXACT, ROUNDED, QUANTIZED))


def measured(folder, reference):
    return call_fresh(
        measure, f"{folder} does not load", kind="nf4", folder=folder,
        tuned=Reference(reference, None, None, torch.float32, [], ROWS, [Row(ROWS[0], [], "", None, "")], [4], [0]),
    )  # fmt: skip


@pytest.mark.slow
def test_a_model_that_does_not_load_is_one_line(tmp_path):
    tiny_model().save_pretrained(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    with pytest.raises(UserError, match="bad does not load: ") as refused:
        measured(tmp_path / "bad", tmp_path / "good")
    assert len(str(refused.value).splitlines()) == 1


def confident(**changes):
    """A random model with logits apart from each other, as a trained one has."""
    model = tiny_model(**WIDE, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter *= 4
    return model


def four_bits(folder, double):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.slow
@pytest.mark.contrib
def test_nf4_weights_that_a_forward_pass_repacked_before_they_were_saved_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional package")
    from formtune_contrib import trial

    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("bitsandbytes repacks only on a CPU with AVX512-BF16")
    confident(dtype=torch.bfloat16).save_pretrained(tmp_path / "whole")
    measurements = []
    for repacked in (False, True):
        model = four_bits(tmp_path / "whole", double=False).eval()
        if repacked:
            last_logits(model, ROWS)
        model.save_pretrained(tmp_path / f"nf4-{repacked}")
        closeness, *_ = measured(tmp_path / f"nf4-{repacked}", tmp_path / "whole")
        measurements.append(closeness)
    right, wrong = measurements
    assert QUANTIZED.violation(wrong) and trial.ROUNDED.violation(wrong), measurements
    assert wrong.kl > 3 * right.kl and trial.ROUNDED.violation(right) is None, measurements


def test_an_adapter_merged_into_a_base_of_4_bits_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional package")
    from peft import LoraConfig, get_peft_model

    confident().save_pretrained(tmp_path / "whole")
    model = get_peft_model(four_bits(tmp_path / "whole", True), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    with pytest.raises(UserError, match="the merged model is not the same model as the adapter"):
        merge(model.eval(), ROWS)


def test_an_adapter_trained_on_4_bits_is_merged_into_the_whole_base(run, monkeypatch):
    """No weights in 4 bits are asked for, so none can be merged into."""
    loads, real = [], lora.load_base

    def watched(base, dtype, quantize, device):
        loads.append((dtype, quantize))
        return real(base, dtype, quantize, device)

    monkeypatch.setattr(exporting, "load_base", watched)
    finished = FinishedRun(run)
    folder = exporting.make(replace(finished.tuned, quantize="4bit"), "merged", run)
    assert loads == [(torch.float32, None)]
    assert load(folder).dtype == torch.float32
