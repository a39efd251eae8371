"""`formtune serve`: serve a run or a deployment on this machine, or print the command for vLLM."""

import shlex
from pathlib import Path

from formtune.base.folder import skeleton
from formtune.base.renderer import Renderer
from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy.registry import Exported, find_exported
from formtune.deploy.server import HOST, serve
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.export.rules import Plan, refuse
from formtune.training.manifest import base_files


def run(command: str, args: list[str]) -> int:
    """Verify what is to be served, then serve it until a signal comes, or print the command for vLLM."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("what", metavar="RUN", help="Folder of a run, a deployment such as demo/production, or an "
                        "exported folder")  # fmt: skip
    parser.add_argument("--as", dest="kind", help="Which of a run's exported folders (default: adapter, and with "
                        "--engine llamacpp its GGUF file)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="Port on this machine (default: 8000)")
    parser.add_argument("--engine", choices=("transformers", "llamacpp", "vllm"), help="vllm: print the command, for "
                        "an environment that has it (default: llamacpp for GGUF, else transformers)")  # fmt: skip
    config = parser.parse_args(args)
    files = sorted(Path(config.what).glob("gguf-*")) if config.engine == "llamacpp" else []
    if len(files) > 1 and config.kind is None:
        raise UserError(f"--as: name one of {', '.join(file.name for file in files)}")
    exported = find_exported(config.what, config.kind or (files[0].name if files else "adapter"))
    if exported.base is not None and base_files(exported.base) != exported.manifest["base"]["files"]:
        raise UserError(f"{exported.base}: not the base that {exported.folder} was trained on; its files differ")
    gguf = exported.kind == "gguf"
    engine = config.engine or ("llamacpp" if gguf else "transformers")
    if gguf != (engine == "llamacpp"):
        remedy = "leave --engine out" if gguf else "formtune export RUN --as gguf makes one, then --as gguf-q8_0"
        raise UserError(f"--engine {engine}: llama.cpp, and only llama.cpp, serves a GGUF file here; {remedy}")
    if engine != "vllm":
        rows = read_outcomes(exported.outcomes) if exported.outcomes.is_file() else []
        return serve(exported, engine, config.port, rows[0].input if rows else "Hello")
    print(shlex.join(vllm_command(exported, config.port)))
    if note := Renderer.load(str(exported.folder.resolve())).note:
        print(f"# {note}")
    print(f"# check it: formtune check-endpoint http://{HOST}:{config.port}/v1 -c TASK.yaml")
    return 0


def vllm_command(exported: Exported, port: int) -> list[str]:
    """vLLM's command for an adapter on its base, or for a merged model; refuses an adapter that vLLM cannot serve."""
    base, folder, task = exported.base, str(exported.folder.resolve()), exported.task
    words = [folder, "--served-model-name", task]
    if base is not None:
        from peft import PeftConfig

        plan = Plan(skeleton(base), PeftConfig.from_pretrained(folder))
        refuse(plan, ["vllm"])
        template = f"{folder}/chat_template.jinja"
        words = [
            str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(plan.vllm_rank), "--lora-modules", f"{task}={folder}",
            *(["--chat-template", template] if Path(template).is_file() else []),  # completions need none
        ]  # fmt: skip
    words += ["--host", HOST, "--port", str(port)]
    return ["vllm", "serve", *words, "--default-chat-template-kwargs", '{"enable_thinking": false}']
