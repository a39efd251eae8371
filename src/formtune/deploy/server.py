"""Serve an exported folder by `transformers serve` or llama.cpp, so that it answers as the evaluation did.

An adapter is not merged for it: transformers loads a folder of links to the base's files and to the adapter's.
"""

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from formtune.base.folder import base_folder
from formtune.base.renderer import Renderer
from formtune.deploy.registry import Exported
from formtune.errors import UserError
from formtune.export.gguf import FILE
from formtune.export.llama_cpp import HOST, LOCAL
from formtune.export.usage import example
from formtune.files import write_json

NEEDED = {"transformers": ("fastapi", "uvicorn", "openai"), "llamacpp": ("xllamacpp",)}
EXTRAS = {"transformers": "serve", "llamacpp": "gguf"}
DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # of the base under an adapter, by the run's precision
ENDING = 10  # seconds in which the server may end by itself


def serve(exported: Exported, engine: str, base: str | None, port: int, text: str) -> int:
    """Start the server, print a request with `text`, and wait for the signal that ends it. `base` is an adapter's."""
    if missing := [name for name in NEEDED[engine] if importlib.util.find_spec(name) is None]:
        extra = f"pip install -e '.[{EXTRAS[engine]}]'"
        raise UserError(f"--engine {engine} needs the extra ({', '.join(missing)} missing): {extra}")
    with socket.socket() as free:  # otherwise the server that is there already would seem to be this one
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            free.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port: {HOST}:{port}: {error.strerror}; choose another") from None
    task = exported.task
    command = (_llama_cpp if engine == "llamacpp" else _transformers)(exported.folder, task, base, port)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        with tempfile.TemporaryDirectory(prefix="formtune-serve-") as folder:
            if engine == "transformers":
                link(exported.folder, base, Path(folder, task))  # the path is the model's name for clients
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            process = subprocess.Popen(command, cwd=folder, env=environment)
            try:
                _wait_until_loaded(process, port)
                data = shlex.quote(json.dumps(example(exported.folder, text) | {"model": task}, ensure_ascii=False))
                print(f"{exported.folder} is served as {task}; end with Ctrl-C\n\ncurl http://{HOST}:{port}/v1/chat/"
                      f"completions -H 'Content-Type: application/json' -d {data}")  # fmt: skip
                sys.stdout.flush()
                code = process.wait()
            finally:
                _end(process)
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    raise UserError(f"the server ended by itself with exit code {code}; its own lines above say why")


def _transformers(exported: Path, task: str, base: str | None, port: int) -> list[str]:
    config = yaml.safe_load((exported / "config.yaml").read_text(encoding="utf-8"))
    dtype, quantization = "auto", []
    if base is not None:
        dtype = DTYPES.get(str(config.get("trainer", {}).get("precision")), "float32")
        quantization = ["--quantization", "bnb-4bit"] if config["model"].get("quantize") else []
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", task]
    return [*program, "--host", HOST, "--port", str(port), "--dtype", dtype, *quantization, "--reasoning", "off"]


def _templated(exported: Path, remedy: str) -> Renderer:
    """The renderer of a folder with a chat template: for one without, a server would take a template from elsewhere."""
    renderer = Renderer.load(str(exported.resolve()))
    if not renderer.templated:
        raise UserError(f"{exported}: {renderer.note}; {remedy}")
    return renderer


def _llama_cpp(exported: Path, task: str, base: str | None, port: int) -> list[str]:
    _templated(exported, "run llama-server and ask its /completion")  # its default would be ChatML
    context = json.loads((exported / "request.json").read_text(encoding="utf-8"))["options"]["num_ctx"]
    return [
        sys.executable,
        "-m",
        "formtune.export.llama_cpp",
        str(exported.resolve() / FILE),
        str(context),
        str(port),
        task,
    ]


def link(exported: Path, base: str | None, folder: Path) -> None:
    """A folder that loads as a model: links to the exported files, and to the base's if they are an adapter."""
    renderer = _templated(exported, "serve it by an engine with completions (--engine vllm)")
    folder.mkdir(parents=True)
    for part in [exported] if base is None else [base_folder(base), exported]:
        for path in part.iterdir():
            target = folder / path.name
            target.unlink(missing_ok=True)  # the adapter's own tokenizer and template replace the base's
            target.symlink_to(path.resolve())
    # Servers stop at the tokens named here: those that end an answer in training must be among them.
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    greedy = {key: value for key, value in settings.items() if key not in ("temperature", "top_k", "top_p", "min_p")}
    generation.unlink(missing_ok=True)  # the link: the base's own file stays as it is
    write_json(generation, greedy | {"eos_token_id": list(renderer.stop_ids), "do_sample": False})


def _wait_until_loaded(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server listens, which it does once the model is loaded, or has ended."""
    while process.poll() is None:
        try:
            with LOCAL.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # does nothing if it has ended
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:  # a generation that does not check for it
        process.kill()
        process.wait()
