"""An adapter is served unmerged from a folder of links, and answers there as it does in PEFT."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from conftest import byte_tokenizer, tiny_model, write_run, write_splits
from formtune.cli import main
from formtune.export import quantize
from formtune.export.exported import Exported
from formtune.export.manifest import write_manifest
from formtune_contrib.server import link

SOURCE = Path(__file__).resolve().parents[3] / "src"
LACKING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose base lies beside it, so that a test may change it."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    return write_run(Path("logs/small/r4"), str(tmp_path / "base"), [("it's number 5", True)])


def linked(exported, folder):
    link(Exported(exported), folder)
    return folder


def test_a_folder_of_links_answers_as_the_adapter_on_its_base_and_ends_as_in_training(run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6, "do_sample": true}')
    folder = linked(run / "adapter", tmp_path / "linked")
    assert all(path.is_symlink() for path in folder.iterdir() if path.name != "generation_config.json")
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2], "do_sample": False}
    assert "0.6" in (tmp_path / "base/generation_config.json").read_text(), "the base's own is left as it is"
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained("base")
    plain = base(ids).logits
    expected = PeftModel.from_pretrained(base, run / "adapter")(ids).logits
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(logits, expected, atol=1e-5) and not torch.allclose(logits, plain, atol=1e-3)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_merged_model_is_served_by_itself(run, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.copytree(run / "adapter", run / "merged", ignore=shutil.ignore_patterns("adapter_*", "manifest.json"))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), run / "adapter").merge_and_unload()
    merged.save_pretrained(run / "merged")
    write_manifest(run / "merged", "merged", str(tmp_path / "base"), None)
    shutil.rmtree("base")
    ids = torch.arange(3, 40)[None]
    loaded = AutoModelForCausalLM.from_pretrained(linked(run / "merged", tmp_path / "linked"))
    assert torch.equal(loaded(ids).logits, merged(ids).logits)
    assert loaded.generation_config.eos_token_id == [2]
    assert main(["serve", str(run), "--as", "merged", "--engine", "vllm"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert words[:5] == ["vllm", "serve", str((run / "merged").resolve()), "--served-model-name", "small"]
    assert '{"temperature": 0}' in words and words[words.index("--generation-config") + 1] == "vllm"


@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_port_that_is_none_is_refused(run, capsys, port):
    assert main(["serve", str(run), "--port", port]) == 2
    assert f"--port {port}: expected a number from 1 to 65535" in capsys.readouterr().err


def test_another_base_or_a_changed_adapter_is_not_served(run, capsys):
    path = Path("base/config.json")
    path.write_text(path.read_text() + "\n")
    assert (
        main(["serve", str(run)]) == 2
        and "not the base that logs/small/r4/adapter was trained on" in capsys.readouterr().err
    )
    (run / "adapter/format.json").write_text("{}")
    assert main(["serve", str(run)]) == 2 and "changed since it was exported" in capsys.readouterr().err


def test_a_base_without_a_chat_template_is_served_by_no_chat_server(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantize, "EXTRAS", {})
    for folder in (run / "adapter", tmp_path / "base"):
        (folder / "chat_template.jinja").unlink()
    base = str(tmp_path / "base")
    for kind, engine in (("adapter", "transformers"), ("gguf", "llamacpp")):
        write_manifest(run / "adapter", kind, base, None)
        assert main(["serve", str(run), "--engine", engine, "--as", "adapter"]) == 2
        line = capsys.readouterr().err
        assert "has no chat template" in line and "followed by a blank line" in line and "ask for completions" in line
    write_manifest(run / "adapter", "adapter", base, None)
    assert main(["serve", str(run), "--engine", "vllm"]) == 0 and "--chat-template " not in capsys.readouterr().out


def test_llama_cpp_serves_the_gguf_folder_of_a_run_that_has_one(run, tmp_path, capsys, monkeypatch):
    served = []
    monkeypatch.setattr("formtune_contrib.server.serve", lambda models, *_: served.extend(models.values()))
    words = ["serve", str(run), "--engine", "llamacpp"]
    assert main(words) == 2 and "create one with formtune export RUN --as gguf" in capsys.readouterr().err
    for quant in ("q8_0", "q4_k_m"):
        shutil.copytree(run / "adapter", run / f"gguf-{quant}")
        write_manifest(run / f"gguf-{quant}", "gguf", str(tmp_path / "base"), None)
        assert main(words) == (0 if quant == "q8_0" else 2)
    assert [exported.folder.name for exported in served] == ["gguf-q8_0"]
    assert "choose --as from gguf-q4_k_m, gguf-q8_0" in capsys.readouterr().err


def test_missing_packages_and_a_port_in_use_are_one_line(run, capsys, monkeypatch):
    monkeypatch.setitem(quantize.EXTRAS, "transformers", ("serve", ("no_such_package",)))
    assert main(["serve", str(run)]) == 2
    assert "transformers needs no_such_package; pip install -e '.[serve]'" in capsys.readouterr().err
    monkeypatch.setitem(quantize.EXTRAS, "transformers", ("serve", ()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(run), "--port", port]) == 2
        assert f"--port: 127.0.0.1:{port} is in use; choose another" in capsys.readouterr().err


def test_a_server_that_ends_by_itself_is_an_error(run, capsys, monkeypatch):
    monkeypatch.setitem(quantize.EXTRAS, "transformers", ("serve", ()))
    monkeypatch.setattr(sys, "executable", "false")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert main(["serve", str(run), "--port", port]) == 2
    assert "the server exited with code 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_vllms_command_for_a_deployed_adapter_names_base_template_and_an_allowed_rank(run, capsys):
    write_run(Path("logs/small/r40"), str(Path("base").resolve()), [("it's number 5", True)], rank=40)
    assert main(["promote", "logs/small/r40", "--to", "production"]) == 0
    shutil.rmtree("logs")
    capsys.readouterr()
    assert main(["serve", "production", "--engine", "vllm"]) == 0
    command, note = capsys.readouterr().out.splitlines()
    words = shlex.split(command)
    folder = Path("deployments/small/versions/r40-adapter").resolve()
    assert words[:3] == ["vllm", "serve", str(Path("base").resolve())]
    assert words[words.index("--max-lora-rank") + 1] == "64"
    assert words[words.index("--lora-modules") + 1] == f"small={folder}"
    assert words[words.index("--chat-template") + 1] == str(folder / "chat_template.jinja")
    assert "check-endpoint" in note and note.startswith("# ")


def test_what_vllm_cannot_serve_is_refused(run, capsys):
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    write_manifest(run / "adapter", "adapter", str(Path("base").resolve()), None)
    assert main(["serve", str(run), "--engine", "vllm"]) == 2
    assert "is not supported by vLLM" in capsys.readouterr().err


def test_vllms_command_for_several_adapters_names_each_and_the_highest_rank(run, capsys):
    base = str(Path("base").resolve())
    write_run(Path("logs/small/r40"), base, [("it's number 5", True)], rank=40)
    assert main(["serve", str(run), "logs/small/r40", "--engine", "vllm"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[0])
    start = words.index("--lora-modules") + 1
    folders = [f"small-{name}={Path('logs/small', name, 'adapter').resolve()}" for name in ("r4", "r40")]
    assert words[start : start + 2] == folders and words[2] == base
    assert words[words.index("--max-lora-rank") + 1] == "64" and words[words.index("--max-loras") + 1] == "2"


def test_what_cannot_be_served_together_is_refused(run, tmp_path, capsys):
    tiny_model(seed=1).save_pretrained("other")
    byte_tokenizer().save_pretrained("other")
    second = write_run(Path("more/r4"), str(tmp_path / "other"), [("it's number 5", True)])
    assert main(["serve", str(run), str(second)]) == 2
    line = (
        "more/r4/adapter: only adapters that share base, chat template, precision and thinking with logs/small/r4/ada"
    )
    assert line in capsys.readouterr().err
    write_run(second, str(tmp_path / "base"), [("it's number 5", True)])
    assert main(["serve", str(run), str(second)]) == 2
    assert "several would be called small-r4; rename one" in capsys.readouterr().err
    write_manifest(second / "adapter", "gguf", str(tmp_path / "base"), None)
    assert main(["serve", str(run), str(second)]) == 2
    assert line in capsys.readouterr().err


def test_adapters_share_the_weights_of_their_base_and_answer_as_they_do_alone(run, tmp_path):
    from transformers import AutoModelForCausalLM

    from formtune_contrib.adapters import share_weights

    second = write_run(Path("logs/small/r40"), str(tmp_path / "base"), [("it's number 5", True)], rank=40)
    models = []
    for folder in (run, second):
        exported = Exported(folder / "adapter")
        link(exported, tmp_path / folder.name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / folder.name))
    ids = torch.arange(3, 40)[None]
    alone = [model(ids).logits for model in models]
    share_weights(models[1], models[0])
    assert all(torch.equal(model(ids).logits, logits) for model, logits in zip(models, alone, strict=True))
    assert not torch.allclose(*alone, atol=1e-3)
    stored = [{p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name} for model in models]
    assert stored[0] == stored[1]


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"needs the extra `serve` ({', '.join(LACKING)} missing)")
def test_a_deployment_is_served_answers_the_printed_request_passes_the_check_and_ends_on_a_signal(
    run, tmp_path, capsys
):
    write_splits("base", 24, train_rows=6, test_rows=6)
    assert main(["promote", str(run), "--to", "production"]) == 0
    shutil.rmtree("logs")
    write_run(Path("runs/r40"), str(Path("base").resolve()), [("it's number 5", True)], rank=40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "formtune", "serve", "production", "runs/r40", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("curl ")), None)
        assert line, "it ended before it was ready"
        words = shlex.split(line)
        body = words[words.index("-d") + 1]
        assert json.loads(body)["messages"] == [
            {"role": "system", "content": "Number it."}, {"role": "user", "content": "it's number 5"},
        ]  # fmt: skip
        request = urllib.request.Request(words[1], body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.load(reply)
            assert answer["choices"][0]["message"]["content"] and answer["model"].startswith("small-r40")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == ["small-production", "small-r40"]
        capsys.readouterr()
        check = ["check-endpoint", f"http://127.0.0.1:{port}/v1", "-c", "small.yaml", "--served_model"]
        assert main([*check, "/etc"]) == 2
        assert "the model's name and OPENAI_API_KEY" in capsys.readouterr().err
        assert main([*check, "small-production", "--min_exact", "0.5"]) == 1
        assert "prompts: same number of tokens as formtune's in every row" in capsys.readouterr().out
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
    assert not list(tmp_path.glob("formtune-serve-*"))
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
