"""Serve exported folders with `transformers serve`, llama.cpp or vLLM, so that they answer as in evaluation."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from formtune.base.folder import base_folder, meta_model
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.export.exported import Exported
from formtune.export.gguf import FILE
from formtune.export.llama_cpp import HOST, LOCAL
from formtune.export.manifest import base_files
from formtune.export.quantize import missing_package
from formtune.export.rules import refuse, vllm_rank
from formtune.files import leaves_folder, write_json

DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # of the base under an adapter, by the run's precision
CHECK = "check it: formtune check-endpoint http://{}:{}/v1 -c TASK.yaml --served_model {}"


def named(runs: Sequence[str], models: Sequence[Exported]) -> dict[str, Exported]:
    """The models by their names for clients: the task, and for several models also the last part of RUN."""
    several, first = len(models) > 1, models[0]
    for model in models:
        base = model.manifest["base"]["files"]
        if model.base is not None and base_files(model.base) != base:
            raise UserError(f"{model.base}: not the base that {model.folder} was trained on; its files differ")
        same = base == first.manifest["base"]["files"] and model.manifest["template"] == first.manifest["template"]
        if several and (model.base is None or not same or loading(model) != loading(first)):
            group = f"adapters that share base, chat template, precision and thinking with {first.folder}"
            raise UserError(f"{model.folder}: only {group} are served together; start a server for each run")
    pairs = zip(runs, models, strict=True)
    names = [f"{model.task}-{Path(run).name}" if several else model.task for run, model in pairs]
    if any(map(leaves_folder, names)):  # of a stranger's config.yaml
        raise UserError(f"{first.folder}: its task is a path ({names[0]}); it cannot be served under this name")
    if len(set(names)) < len(names):
        raise UserError(f"{' '.join(runs)}: several would be called {max(names, key=names.count)}; rename one")
    return dict(zip(names, models, strict=True))


def serve(models: dict[str, Exported], engine: str, port: int) -> int:
    """Start the server, print a request, and wait for the signal that ends it."""
    if missing := missing_package(engine):
        raise UserError(f"--engine {engine} {missing}")
    exported = next(iter(models.values()))
    if not exported.renderer.templated:  # the server would use another template
        remedy = "serve it with vLLM (--engine vllm) or llama-server, and ask for completions"
        raise UserError(f"{exported.folder}: {exported.renderer.note}; {remedy}")
    # Otherwise a running server would seem to be this one.
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        raise UserError(f"--port: {HOST}:{port} is in use; choose another")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    with contextlib.ExitStack() as ended:
        links = ended.enter_context(tempfile.TemporaryDirectory(prefix="formtune-serve-"))
        for name, exported in models.items() if engine == "transformers" else ():
            link(exported, Path(links, name))  # the path is the model's name for clients
        ended.enter_context(contextlib.suppress(KeyboardInterrupt))
        process = subprocess.Popen(command(models, engine, port), cwd=links, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        ended.callback(process.wait)
        ended.callback(process.kill)
        while process.poll() is None:  # the server listens once the model is loaded
            with contextlib.suppress(OSError), LOCAL.open(f"http://{HOST}:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        if process.poll() is not None:
            raise UserError(f"the server exited with code {process.returncode}; its output above says why")
        for name, exported in models.items():
            print(f"{exported.folder} is served as {name}; stop it with Ctrl-C")
        rows = read_outcomes(exported.outcomes) if exported.outcomes.is_file() else []
        text, schema = (rows[0].input, rows[0].schema) if rows else ("Hello", None)
        body = exported.request(text, schema) | {"model": name}
        data = shlex.quote(json.dumps(body, ensure_ascii=False))
        print(f"\ncurl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d {data}\n"
              f"\n{CHECK.format(HOST, port, name)}", flush=True)  # fmt: skip
        raise UserError(f"the server exited with code {process.wait()}; its output above says why")
    return 0


def command(models: dict[str, Exported], engine: str, port: int) -> list[str]:
    name, exported = next(iter(models.items()))
    if engine == "vllm":
        return _vllm(models, port)
    if engine == "llamacpp":
        request = json.loads((exported.folder / "request.json").read_text(encoding="utf-8"))
        words = [exported.folder.resolve() / FILE, request["options"]["num_ctx"], port, name]
        return [
            sys.executable,
            "-m",
            "formtune_contrib.llama_server",
            *map(str, words),
            str(exported.renderer.thinking),
        ]
    return [sys.executable, "-m", "formtune_contrib.adapters", str(port), *loading(exported), *models]


def loading(exported: Exported) -> list[str]:
    """Data type and quantization, for an adapter's base as in training, and whether thinking is on."""
    reasoning = "on" if exported.renderer.thinking else "off"
    if exported.base is None:
        return ["auto", "", reasoning]
    dtype = DTYPES.get(str(exported.config["trainer"]["precision"]), "float32")
    return [dtype, "bnb-4bit" if exported.config["model"]["quantize"] else "", reasoning]


def _vllm(models: dict[str, Exported], port: int) -> list[str]:
    """The command line of vLLM, for adapters on their base or a merged model; refuses unsupported adapters."""
    folders = {name: str(exported.folder.resolve()) for name, exported in models.items()}
    [(name, folder), *_], first = folders.items(), next(iter(models.values()))
    base, thinking = first.base, str(first.renderer.thinking).lower()
    words = [folder, "--served-model-name", name]
    if base is not None:
        from peft import PeftConfig

        adapters = [PeftConfig.from_pretrained(folder) for folder in folders.values()]
        for adapter in adapters:
            refuse(meta_model(base), adapter, "vllm")
        template = f"{folder}/chat_template.jinja"
        words = [
            str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(vllm_rank(max(adapter.r for adapter in adapters))),
            "--max-loras", str(len(folders)), "--lora-modules", *map("=".join, folders.items()),
            *(["--chat-template", template] if Path(template).is_file() else []),  # completions need none
        ]  # fmt: skip
    # Greedy, without the sampling and penalties that a base ships; stop tokens still come from its file.
    words += ["--generation-config", "vllm", "--override-generation-config", '{"temperature": 0}']
    words += ["--host", HOST, "--port", str(port)]
    return ["vllm", "serve", *words, "--default-chat-template-kwargs", f'{{"enable_thinking": {thinking}}}']


def link(exported: Exported, folder: Path) -> None:
    """A folder that loads as a model: links to the exported files, and to the base's if they are an adapter."""
    folder.mkdir(parents=True)
    parts = [exported.folder] if exported.base is None else [base_folder(exported.base), exported.folder]
    for path in chain(*(part.iterdir() for part in parts)):
        target = folder / path.name
        target.unlink(missing_ok=True)  # the adapter's tokenizer and template replace the base's
        target.symlink_to(path.resolve())
    # As in evaluation: without sampling or penalties of the base, up to the stop tokens of training.
    generation = folder / "generation_config.json"
    generation.unlink(missing_ok=True)  # the link: the base's own file stays as it is
    write_json(generation, {"eos_token_id": list(exported.renderer.stop_ids), "do_sample": False})
