"""Serve what a run or a deployment holds on this machine, or print the command for vLLM.

An adapter is served on its base without merging: a folder of links to the base's files and to the adapter's is a model
that transformers loads (measured with 5.23). It answers as the evaluation did: in the precision of the run, ended by
the tokens that end an answer there, with thinking off, greedy unless the client asks for something else.
"""

from __future__ import annotations

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
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from formtune.base.renderer import Renderer
from formtune.data.preparation import system_prompt
from formtune.deploy.served import Served
from formtune.errors import UserError
from formtune.files import write_json
from formtune.training.manifest import base_folder, verify

HOST = "127.0.0.1"
NEEDED = ("fastapi", "uvicorn", "openai")
DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # of the base under an adapter, by the run's precision
ENDING = 10  # seconds that the server has to end by itself
NO_THINKING = '{"enable_thinking": false}'


def serve(served: Served, manifest: dict[str, Any], port: int) -> int:
    """Start the server, say how to ask it, and wait for the signal that ends it.

    Raises:
        UserError: A package is missing, the port is taken, or the server ended by itself.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"formtune serve needs the extra ({', '.join(missing)} missing): pip install -e '.[serve]'")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            free.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port: {HOST}:{port}: {error.strerror}; choose another") from None
    with tempfile.TemporaryDirectory(prefix="formtune-serve-") as place:
        folder = Path(place) / served.task  # the model's name for clients: the server takes none but the path
        link(served.folder, manifest, folder)
        config = settings(served.folder)
        dtype, more = "auto", []
        if manifest["kind"] == "adapter":
            dtype = DTYPES.get(config["precision"], "float32")
            more = ["--quantization", "bnb-4bit"] if config["quantize"] else []
        command = [
            sys.executable, "-m", "transformers.cli.transformers", "serve", served.task,
            "--host", HOST, "--port", str(port), "--dtype", dtype, "--reasoning", "off",
            *more,
        ]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        stopped: list[int] = []
        # Before the server starts, so that no signal falls between.
        before = {
            one: signal.signal(one, lambda number, _: stopped.append(number)) for one in (signal.SIGINT, signal.SIGTERM)
        }
        process = subprocess.Popen(command, cwd=place, env=environment)
        try:
            if _healthy(process, port, stopped):
                print(f"{served.name} serves {served.folder} as {served.task}; end with Ctrl-C\n", flush=True)
                print(curl(served, config, port), flush=True)
                if config["date"]:
                    print(f"\n{own_day(config['date'])}", flush=True)
                while process.poll() is None and not stopped:
                    time.sleep(0.1)
        finally:
            code = _end(process)
            for one, handler in before.items():
                signal.signal(one, handler)
    if not stopped:
        raise UserError(f"the server ended by itself with exit code {code}; its own lines above say why")
    return 0


def link(exported: Path, manifest: dict[str, Any], folder: Path) -> None:
    """A folder that loads as a model: links to the exported files, and to the base's where these are an adapter."""
    folder.mkdir(parents=True)
    parts = [exported]
    if manifest["kind"] == "adapter":
        parts.insert(0, base_folder(manifest["base"]["path"]))
    for part in parts:
        for path in part.iterdir():
            target = folder / path.name
            target.unlink(missing_ok=True)  # the adapter's own tokenizer and template before the base's
            target.symlink_to(path.resolve())
    # Servers stop at the tokens named here: what ends an answer in training must be among them.
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    renderer = Renderer.load(str(exported.resolve()))
    if not renderer.templated:
        raise UserError(f"{exported}: the base has no chat template, without which a chat cannot be served")
    generation.unlink(missing_ok=True)
    greedy = {key: value for key, value in found.items() if key not in ("temperature", "top_k", "top_p", "min_p")}
    write_json(generation, greedy | {"eos_token_id": list(renderer.stop_ids), "do_sample": False})


def settings(folder: Path) -> dict[str, Any]:
    """Of an exported folder's configuration: `system`, `max_tokens`, `precision`, `quantize` and `date`."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    return {
        "system": system_prompt(config["data"].get("system"), contract),
        "max_tokens": config["model"].get("max_new_tokens", 256),
        "precision": str(config.get("trainer", {}).get("precision")),
        "quantize": config["model"].get("quantize"),
        "date": config["data"].get("date"),
    }


def curl(served: Served, config: dict[str, Any], port: int) -> str:
    """A request that works in a shell as it stands, with the task's system prompt."""
    system = [] if config["system"] is None else [{"role": "system", "content": config["system"]}]
    body = {
        "model": served.task,
        "temperature": 0,
        "max_tokens": config["max_tokens"],
        "messages": [*system, {"role": "user", "content": served.example()}],
    }
    text = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d {text}"


def own_day(date: str) -> str:
    """What a client should know of a template that writes the date."""
    return (
        f"the chat template writes the date: {date} in training, the server's own day here, unless the date is written "
        "into the chat_template.jinja that is served"
    )


def vllm_command(served: Served, manifest: dict[str, Any], port: int) -> str:
    """The command that serves the same by vLLM, the version before it beside it where there is one."""
    common = ["--host", HOST, "--port", str(port), "--default-chat-template-kwargs", NO_THINKING]
    if manifest["kind"] != "adapter":
        words = ["vllm", "serve", str(served.folder.resolve()), "--served-model-name", served.task, *common]
    else:
        base, adapters = manifest["base"]["path"], {served.task: served.folder}
        if served.previous:
            before = verify(served.previous)
            if before["kind"] == "adapter" and before["base"]["files"] == manifest["base"]["files"]:
                adapters[f"{served.task}-previous"] = served.previous  # a rollback is another name in the request
        allowed = max(_vllm_rank(base, folder) for folder in adapters.values())
        words = [
            "vllm", "serve", str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(len(adapters)),
            "--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in adapters.items()),
            "--chat-template", str((served.folder / "chat_template.jinja").resolve()), *common,
        ]  # fmt: skip
    date = settings(served.folder)["date"]
    dated = f"# {own_day(date)}\n" if date else ""
    return f"# not run here: formtune was not tested with vLLM; see formtune check-endpoint\n{dated}{shlex.join(words)}"


def _vllm_rank(base: str, folder: Path) -> int:
    """Value of --max-lora-rank that an adapter needs.

    Raises:
        UserError: vLLM cannot serve it; says why.
    """
    from peft import PeftConfig

    from formtune.export.plan import plan, skeleton
    from formtune.export.rules import VLLM_RANKS, refuse

    adapter = PeftConfig.from_pretrained(str(folder))
    refuse(plan(skeleton(base), adapter, qlora=False), ("vllm",))
    return next(one for one in VLLM_RANKS if one >= max(adapter.r, *adapter.rank_pattern.values(), 1))


def _healthy(process: subprocess.Popen[bytes], port: int, stopped: list[int]) -> bool:
    """Wait until the model is loaded: the server listens only then. False if it ended or a signal came before."""
    while process.poll() is None and not stopped:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:  # a generation that does not look up
            process.kill()
    return process.wait()
