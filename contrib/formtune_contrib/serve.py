"""`formtune serve`: serve runs or deployments on this machine, or print the command for vLLM."""

import shlex
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.errors import UserError
from formtune.tasks.parsers import CommandParser
from formtune_contrib import server
from formtune_contrib.registry import find_exported


def run(command: str, args: list[str]) -> int:
    """Verify the exports, then serve them until a signal comes, or print the command for vLLM."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="A run, a deployment such as demo/production, or an "
                        "exported folder; several adapters of one base are served together")  # fmt: skip
    parser.add_argument("--as", dest="kind", help="Folder of the export in RUN (default: adapter; with --engine "
                        "llamacpp the run's only GGUF file)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="Port on this machine (default: 8000)")
    parser.add_argument("--engine", choices=("transformers", "llamacpp", "vllm"), help="Default: llamacpp for GGUF, "
                        "else transformers; vllm prints the command")  # fmt: skip
    config = parser.parse_args(args)
    if not 0 < config.port < 65536:
        raise UserError(f"--port {config.port}: expected a number from 1 to 65535")
    files = sorted(path.name for path in Path(config.runs[0]).glob("gguf-*")) if config.engine == "llamacpp" else []
    kind = config.kind or (files[0] if len(files) == 1 else "adapter")
    models = server.named(config.runs, [find_exported(run, kind) for run in config.runs])
    name, exported = next(iter(models.items()))
    gguf = exported.kind == "gguf"
    engine = config.engine or ("llamacpp" if gguf else "transformers")
    if gguf != (engine == "llamacpp"):
        choice = f"choose --as from {', '.join(files)}" if files else "create one with formtune export RUN --as gguf"
        remedy = "remove --engine" if gguf else choice
        raise UserError(f"--engine {engine}: use llamacpp for GGUF files, and only for them; {remedy}")
    if engine != "vllm":
        return server.serve(models, engine, config.port)
    print(shlex.join(server.command(models, engine, config.port)))
    if note := exported.renderer.note:
        print(f"# {note}")
    print(f"# {server.CHECK.format(server.HOST, config.port, name)}")
    return 0
