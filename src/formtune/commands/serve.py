"""`formtune serve`: serve a run or a deployment on this machine, or print the command for vLLM."""

from __future__ import annotations

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy.server import find_served, serve, vllm_command
from formtune.errors import UserError
from formtune.training.manifest import base_files, verify


def run(command: str, args: list[str]) -> int:
    """Serve until a signal comes, or print the command for vLLM."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("what", metavar="RUN", help="Folder of a run, a deployment such as demo/production, or an "
                        "exported folder")  # fmt: skip
    parser.add_argument("--as", dest="kind", default="adapter", help="Which of a run's exported folders (default: "
                        "adapter)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="Port on this machine (default: 8000)")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="vllm: print the "
                        "command, for an environment that has it")  # fmt: skip
    config = parser.parse_args(args)
    served = find_served(config.what, config.kind)
    manifest = verify(served.folder)
    base = manifest["base"]
    if manifest["kind"] == "adapter" and base_files(base["path"]) != base["files"]:
        raise UserError(f"{base['path']}: not the base that {served.folder} was trained on; its files differ")
    if config.backend == "transformers":
        return serve(served, manifest, config.port)
    print(vllm_command(served, manifest, config.port))
    return 0
