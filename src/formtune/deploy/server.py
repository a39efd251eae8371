"""Serve an exported folder by `transformers serve` or llama.cpp, so that it answers as the evaluation did."""

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
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from formtune.base.folder import base_folder
from formtune.deploy.registry import Exported
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.export.gguf import FILE
from formtune.export.llama_cpp import HOST, LOCAL
from formtune.export.usage import example
from formtune.files import write_json

# The extra that brings a server, and its packages.
ENGINES = {"transformers": ("serve", ("fastapi", "uvicorn", "openai")), "llamacpp": ("gguf", ("xllamacpp",))}
DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # of the base under an adapter, by the run's precision
CHECK = "check it: formtune check-endpoint http://{}:{}/v1 -c TASK.yaml --served_model {}"
ENDING = 10  # seconds in which the server may end by itself


def serve(models: dict[str, Exported], engine: str, port: int) -> int:
    """Start the server of models by their names, print a request, and wait for the signal that ends it."""
    extra, packages = ENGINES[engine]
    if missing := [name for name in packages if find_spec(name) is None]:
        install = f"pip install -e '.[{extra}]'"
        raise UserError(f"--engine {engine} needs the extra ({', '.join(missing)} missing): {install}")
    for exported in models.values():
        if not exported.renderer.templated:  # the server would take another template
            remedy = "serve it with vLLM (--engine vllm) or llama-server, and ask for completions"
            raise UserError(f"{exported.folder}: {exported.renderer.note}; {remedy}")
    with socket.socket() as free:  # otherwise the server that is there already would seem to be this one
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            free.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port: {HOST}:{port}: {error.strerror}; choose another") from None
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        with tempfile.TemporaryDirectory(prefix="formtune-serve-") as links:
            for name, exported in models.items() if engine == "transformers" else ():
                link(exported, Path(links, name))  # the path is the model's name for clients
            process = subprocess.Popen(_command(models, engine, port), cwd=links, env=environment)
            try:
                _wait_until_loaded(process, port)
                for name, exported in models.items():
                    print(f"{exported.folder} is served as {name}; stop it with Ctrl-C")
                rows = read_outcomes(exported.outcomes) if exported.outcomes.is_file() else []
                body = example(exported.folder, rows[0].input if rows else "Hello") | {"model": name}
                data = shlex.quote(json.dumps(body, ensure_ascii=False))
                print(f"\ncurl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d {data}\n"
                      f"\n{CHECK.format(HOST, port, name)}", flush=True)  # fmt: skip
                code = process.wait()
            finally:
                _end(process)
    except KeyboardInterrupt:
        return 0
    raise UserError(f"the server exited with code {code}; its output above says why")


def loading(exported: Exported) -> list[str]:
    """Data type and quantization of what is served, as in training for an adapter's base, and whether it thinks."""
    reasoning = "on" if exported.renderer.thinking else "off"
    if exported.base is None:
        return ["auto", "", reasoning]
    dtype = DTYPES.get(str(exported.config["trainer"]["precision"]), "float32")
    return [dtype, "bnb-4bit" if exported.config["model"]["quantize"] else "", reasoning]


def _command(models: dict[str, Exported], engine: str, port: int) -> list[str]:
    name, exported = next(iter(models.items()))
    if engine == "llamacpp":
        request = json.loads((exported.folder / "request.json").read_text(encoding="utf-8"))
        words = [exported.folder.resolve() / FILE, request["options"]["num_ctx"], port, name]
        return [sys.executable, "-m", "formtune.export.llama_cpp", *map(str, words), str(exported.renderer.thinking)]
    return [sys.executable, "-m", "formtune.deploy.adapters", str(port), *loading(exported), *models]


def link(exported: Exported, folder: Path) -> None:
    """A folder that loads as a model: links to the exported files, and to the base's if they are an adapter."""
    folder.mkdir(parents=True)
    parts = [exported.folder] if exported.base is None else [base_folder(exported.base), exported.folder]
    for path in chain(*(part.iterdir() for part in parts)):
        target = folder / path.name
        target.unlink(missing_ok=True)  # the adapter's own tokenizer and template replace the base's
        target.symlink_to(path.resolve())
    # Servers stop at the tokens named here: those that end an answer in training must be among them.
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    greedy = {key: value for key, value in settings.items() if key not in ("temperature", "top_k", "top_p", "min_p")}
    generation.unlink(missing_ok=True)  # the link: the base's own file stays as it is
    write_json(generation, greedy | {"eos_token_id": list(exported.renderer.stop_ids), "do_sample": False})


def _wait_until_loaded(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server listens, which it does once the model is loaded, or has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError), LOCAL.open(f"http://{HOST}:{port}/health", timeout=5):
            return
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # does nothing if it has ended
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:  # a generation that does not check for it
        process.kill()
        process.wait()
