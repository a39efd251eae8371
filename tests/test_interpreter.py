"""GPTQ and AWQ are made by the interpreter that is named and by nothing else, and loaded and judged here."""

import json
import os
import sys
from pathlib import Path

import pytest

from formtune.cli import main
from formtune.errors import UserError
from formtune.export import quantize
from formtune.export.fresh_process import Maker, find_maker, lacking
from formtune.training.manifest import installed, verify
from test_export import run, trained  # noqa: F401

# What llm-compressor is asked for, by its names, from something that changes no weight.
FAKE = {
    "__init__": """
import json, sys
from pathlib import Path
def oneshot(model, dataset, recipe, **rest):
    asked = {type(one).__name__: vars(one) for one in recipe} | {"rows": len(dataset), "formtune": "formtune" in sys.modules}
    Path(__file__).with_name("asked.json").write_text(json.dumps(asked))
""",
    "modifiers/__init__": "class Modifier:\n    def __init__(self, **what): self.__dict__ = what",
    "modifiers/gptq": "from . import Modifier\nclass GPTQModifier(Modifier): pass",
    "modifiers/quantization": "from . import Modifier\nclass QuantizationModifier(Modifier): pass",
    "modifiers/transform/__init__": "",
    "modifiers/transform/awq": "from .. import Modifier\nclass AWQModifier(Modifier): pass",
    "pipelines/__init__": "",
    "pipelines/cache": "class IntermediatesCache: pass",
}


def stand_in(folder, packages, options=""):
    """An interpreter that is this one, and has further packages."""
    for name, text in packages.items():
        path = folder / "packages" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/packages:$PYTHONPATH" exec "{sys.executable}" {options} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("has", "wanted"),
    [
        (["llmcompressor"], "llmcompressor"),
        (["gptqmodel"], "gptqmodel"),
        (["gptqmodel", "llmcompressor"], "llmcompressor"),
    ],
)
def test_llm_compressor_is_taken_before_gptqmodel(tmp_path, has, wanted):
    python = stand_in(tmp_path, dict.fromkeys(has, ""), "-S")  # without the packages of this environment
    assert find_maker(python, ["merge", "awq"]) == Maker(wanted, python)


def test_without_an_interpreter_it_is_gptqmodel_of_this_one():
    assert find_maker(None, ["int8"]) == Maker("gptqmodel", sys.executable)


def test_an_interpreter_that_is_none_or_has_neither_package_is_one_line(tmp_path, capsys):
    bare = stand_in(tmp_path, {}, "-S")
    silent, failing = tmp_path / "silent", tmp_path / "failing"
    silent.write_text("#!/bin/sh\n")
    failing.write_text("#!/bin/sh\necho has llmcompressor\nexit 3\n")
    silent.chmod(0o755)
    failing.chmod(0o755)
    for python, message in [
        (bare, f"has neither llmcompressor nor gptqmodel: {bare} -m pip install llmcompressor"),
        (str(tmp_path / "gone"), "gone: No such file or directory; name the python of an environment"),
        (str(tmp_path), "Permission denied"),
        (str(silent), "silent is no Python from 3.11 on"),
        (str(failing), "failing is no Python from 3.11 on"),
        ("/bin/echo", "echo is no Python from 3.11 on"),
    ]:
        assert main(["export", "logs/demo/RUN", "--as", "awq", "--interpreter", python]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said


def test_an_interpreter_is_for_gptq_and_awq_alone(capsys):
    assert main(["export", "logs/demo/RUN", "--as", "int8", "--interpreter", sys.executable]) == 2
    assert "--interpreter: makes gptq and awq; leave it out for int8" in capsys.readouterr().err
    with pytest.raises(UserError, match="leave it out for merge, vllm"):
        find_maker(sys.executable, ["merge", "vllm"])


def test_what_loads_the_result_must_be_here_and_int8_is_not_asked_of_the_other(monkeypatch):
    monkeypatch.setitem(quantize.PACKAGES, "llmcompressor", ("no-such-package",))
    monkeypatch.setitem(quantize.PACKAGES, "int8", ())
    other = Maker("llmcompressor", "elsewhere")
    assert lacking("awq", other) == "needs no-such-package: pip install -e '.[ct]'"
    assert lacking("int8", other) is None


@pytest.mark.parametrize(
    ("kind", "recipe"), [("gptq", {"GPTQModifier"}), ("awq", {"AWQModifier", "QuantizationModifier"})]
)
def test_the_other_interpreter_makes_it_and_it_is_loaded_and_judged_here(run, tmp_path, monkeypatch, kind, recipe):  # noqa: F811
    python = stand_in(tmp_path, {f"llmcompressor/{name}": text for name, text in FAKE.items()})
    monkeypatch.setitem(quantize.PACKAGES, "llmcompressor", ("numpy",))
    assert main(["export", str(run), "--as", kind, "--interpreter", python]) == 0
    asked = json.loads((tmp_path / "packages/llmcompressor/asked.json").read_text())
    assert recipe < asked.keys() and asked["rows"] > 10 and not asked["formtune"]
    what = asked["GPTQModifier" if kind == "gptq" else "QuantizationModifier"]
    assert what["ignore"] == ["lm_head"] and what["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
    }  # fmt: skip
    manifest = verify(run / kind)
    assert manifest["versions"]["numpy"] == installed("numpy") and manifest["verification"]["closeness"]["top1"] == 1


def test_preflight_tries_it_by_the_interpreter(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    python = stand_in(tmp_path, {f"llmcompressor/{name}": text for name, text in FAKE.items()})
    monkeypatch.setitem(quantize.PACKAGES, "llmcompressor", ())
    words = ["preflight", "-c", "small.yaml", "--for", "merge,gptq", "--interpreter"]
    assert main([*words, python]) == 0
    found = json.loads(Path("logs/small/preflight.json").read_text())
    trial = next(one for one in found["checks"] if (one["target"], one["check"]) == ("gptq", "trial"))
    assert trial["verdict"] == "ok" and (tmp_path / "packages/llmcompressor/asked.json").exists()
    capsys.readouterr()
    assert main([*words, "gone"]) == 2 and "--interpreter: gone: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_llm_compressor_itself_makes_a_model_that_loads_here(run, kind):  # noqa: F811
    python = os.environ.get("LLMCOMPRESSOR_PYTHON")
    if not python or not installed("compressed-tensors"):
        pytest.skip("needs the extra `ct`, and LLMCOMPRESSOR_PYTHON: the python of an environment with llm-compressor")
    assert main(["export", str(run), "--as", kind, "--interpreter", python, "--max_loss", "1"]) == 0
    manifest = verify(run / kind)
    assert "compressed-tensors" in manifest["versions"] and manifest["verification"]["closeness"]["top1"] >= 0.95
