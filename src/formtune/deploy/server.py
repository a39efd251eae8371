"""Serve a run or a deployment on this machine by transformers, or print the command for vLLM.

An adapter is not merged for it: transformers loads a folder of links to the base's files and to the adapter's. It
answers as the evaluation did: in the run's precision, ended by the same tokens, without thinking, greedy by default.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from formtune.base.folder import base_folder, skeleton
from formtune.base.renderer import Renderer
from formtune.data.settings import system_prompt
from formtune.deploy.registry import find_pointer, task_of
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.files import write_json
from formtune.training.manifest import NAME, verify

HOST = "127.0.0.1"
NEEDED = ("fastapi", "uvicorn", "openai")
DTYPES = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # of the base under an adapter, by the run's precision
ENDING = 10  # seconds in which the server may end by itself
NO_THINKING = '{"enable_thinking": false}'


@dataclass(frozen=True, slots=True)
class Served:
    """An exported folder to serve."""

    name: str  # what the user called it
    task: str  # the model's name for clients
    folder: Path
    outcomes: Path  # of its test rows
    previous: Path | None = None  # the deployed version before it


def find_served(name: str, kind: str) -> Served:
    """What a name means: an exported folder, the folder of a run (its export of this kind), or a deployment."""
    for folder in (Path(name), Path(name, kind)):
        if (folder / NAME).is_file():
            return Served(name, task_of(folder), folder, folder.parent / "outcomes" / "after.jsonl")
    if Path(name).is_dir():
        raise UserError(f"{name}: neither an exported folder nor a run with {kind}/; formtune export makes one")
    pointer = find_pointer(name)
    version, before = pointer.stack[-1], pointer.stack[-2:-1]
    previous = pointer.version_folder(before[0]) if before else None
    return Served(pointer.name, pointer.task, pointer.verified(version), pointer.outcomes(version), previous)


def serve(served: Served, manifest: dict[str, Any], port: int) -> int:
    """Start the server, print a request, and wait for the signal that ends it."""
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
        link(served.folder, manifest, Path(place) / served.task)  # the path is the model's name for clients
        config = yaml.safe_load((served.folder / "config.yaml").read_text(encoding="utf-8"))
        dtype, quantization = "auto", []
        if manifest["kind"] == "adapter":
            dtype = DTYPES.get(str(config.get("trainer", {}).get("precision")), "float32")
            quantization = ["--quantization", "bnb-4bit"] if config["model"].get("quantize") else []
        command = [
            sys.executable, "-m", "transformers.cli.transformers", "serve", served.task, "--host", HOST,
            "--port", str(port), "--dtype", dtype, *quantization, "--reasoning", "off",
        ]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        stopped: list[int] = []
        # Before the server starts, so that no signal is lost in between.
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, lambda number, _: stopped.append(number)) for number in signals}
        process = subprocess.Popen(command, cwd=place, env=environment)
        try:
            if _healthy(process, port, stopped):
                print(f"{served.name} serves {served.folder} as {served.task}; end with Ctrl-C\n", flush=True)
                print(_curl(served, config, port), flush=True)
                if date := config["data"].get("date"):
                    print(f"\n{_own_day(date)}", flush=True)
                while process.poll() is None and not stopped:
                    time.sleep(0.1)
        finally:
            code = _end(process)
            for number, handler in handlers.items():
                signal.signal(number, handler)
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
            target.unlink(missing_ok=True)  # the adapter's own tokenizer and template replace the base's
            target.symlink_to(path.resolve())
    # Servers stop at the tokens named here: those that end an answer in training must be among them.
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    renderer = Renderer.load(str(exported.resolve()))
    if not renderer.templated:
        raise UserError(f"{exported}: the base has no chat template, without which a chat cannot be served")
    generation.unlink(missing_ok=True)
    greedy = {key: value for key, value in settings.items() if key not in ("temperature", "top_k", "top_p", "min_p")}
    write_json(generation, greedy | {"eos_token_id": list(renderer.stop_ids), "do_sample": False})


def _own_day(date: str) -> str:
    """What a client should know of a template that writes the date."""
    return (
        f"the chat template writes the date: {date} in training, the server's own day here, unless the date is written "
        "into the chat_template.jinja that is served"
    )


def vllm_command(served: Served, manifest: dict[str, Any], port: int) -> str:
    """The command that serves the same by vLLM, with the version before it; refuses what vLLM cannot serve."""
    from peft import PeftConfig

    from formtune.export.rules import Plan, refuse

    if manifest["kind"] != "adapter":
        words = [str(served.folder.resolve()), "--served-model-name", served.task]
    else:
        base, adapters = manifest["base"]["path"], {served.task: served.folder}
        if served.previous:
            before = verify(served.previous)
            if before["kind"] == "adapter" and before["base"]["files"] == manifest["base"]["files"]:
                adapters[f"{served.task}-previous"] = served.previous  # a rollback is another name in the request
        model = skeleton(base)
        plans = [Plan(model, PeftConfig.from_pretrained(str(folder)), qlora=False) for folder in adapters.values()]
        for plan in plans:
            refuse(plan, ["vllm"])
        words = [
            str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(max(plan.vllm_rank or 0 for plan in plans)),
            "--max-loras", str(len(adapters)),
            "--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in adapters.items()),
            "--chat-template", str((served.folder / "chat_template.jinja").resolve()),
        ]  # fmt: skip
    words += ["--host", HOST, "--port", str(port), "--default-chat-template-kwargs", NO_THINKING]
    notes = ["# not run here: formtune was not tested with vLLM; see formtune check-endpoint"]
    date = yaml.safe_load((served.folder / "config.yaml").read_text(encoding="utf-8"))["data"].get("date")
    notes += [f"# {_own_day(date)}"] if date else []
    return "\n".join([*notes, shlex.join(["vllm", "serve", *words])])


def _curl(served: Served, config: dict[str, Any], port: int) -> str:
    """A request to paste into a shell, with the task's system prompt and a test row's input where there is one."""
    format = json.loads((served.folder / "format.json").read_text(encoding="utf-8"))
    system = system_prompt(config["data"].get("system"), format)
    rows = read_outcomes(served.outcomes) if served.outcomes.is_file() else []
    messages = [] if system is None else [{"role": "system", "content": system}]
    body = {
        "model": served.task,
        "temperature": 0,
        "max_tokens": config["model"].get("max_new_tokens", 256),
        "messages": [*messages, {"role": "user", "content": rows[0].input if rows else "Hello"}],
    }
    text = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d {text}"


def _healthy(process: subprocess.Popen[bytes], port: int, stopped: list[int]) -> bool:
    """Wait until the server listens: the model is loaded then. False if it ended or a signal came before."""
    while process.poll() is None and not stopped:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()  # nothing where it has ended
    try:
        return process.wait(ENDING)
    except subprocess.TimeoutExpired:  # a generation that does not check for it
        process.kill()
        return process.wait()
