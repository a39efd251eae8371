"""`formtune serve`: print the vLLM command that serves a run or a deployment as it was judged."""

from __future__ import annotations

import shlex
from pathlib import Path

from formtune.base.folder import skeleton
from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy.registry import check_exists, read_deployment, task_of
from formtune.errors import UserError
from formtune.export.rules import Plan, refuse
from formtune.training.manifest import NAME, base_files, verify


def run(command: str, args: list[str]) -> int:
    """Verify what is to be served, and print the command of the server and of its check."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("what", metavar="RUN", help="Folder of a run, a deployment such as demo/production, or an "
                        "exported folder")  # fmt: skip
    parser.add_argument("--as", dest="kind", default="adapter", help="Which of a run's exported folders (default: "
                        "adapter)")  # fmt: skip
    config = parser.parse_args(args)
    exported = find_exported(config.what, config.kind)
    manifest = verify(exported)
    base, is_adapter = manifest["base"], manifest["kind"] == "adapter"
    if is_adapter and base_files(base["path"]) != base["files"]:
        raise UserError(f"{base['path']}: not the base that {exported} was trained on; its files differ")
    print(shlex.join(vllm_command(exported, base["path"] if is_adapter else None)))
    print("# check it: formtune check-endpoint http://localhost:8000/v1 -c TASK.yaml")
    return 0


def find_exported(name: str, kind: str) -> Path:
    """What a name means: an exported folder, the folder of a run (its export of this kind), or a deployment."""
    for folder in (Path(name), Path(name, kind)):
        if (folder / NAME).is_file():
            return folder
    if Path(name).is_dir():
        raise UserError(f"{name}: neither an exported folder nor a run with {kind}/; formtune export makes one")
    check_exists(name)
    deployment = read_deployment(name)
    return deployment.version_folder(str(deployment.current))


def vllm_command(exported: Path, base: str | None) -> list[str]:
    """vLLM's command for an adapter on its base, or for a merged model; refuses an adapter that vLLM cannot serve."""
    folder, task = str(exported.resolve()), task_of(exported)
    words = [folder, "--served-model-name", task]
    if base is not None:
        from peft import PeftConfig

        plan = Plan(skeleton(base), PeftConfig.from_pretrained(str(exported)))
        refuse(plan, ["vllm"])
        words = [
            str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(plan.vllm_rank), "--lora-modules", f"{task}={folder}",
            "--chat-template", f"{folder}/chat_template.jinja",
        ]  # fmt: skip
    return ["vllm", "serve", *words, "--default-chat-template-kwargs", '{"enable_thinking": false}']
