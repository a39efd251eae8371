"""`formtune serve`: serve runs or deployments on this machine, or print the command for vLLM."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from formtune.base.folder import skeleton
from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy.registry import Exported, find_exported
from formtune.deploy.server import CHECK, HOST, loading, serve
from formtune.errors import UserError
from formtune.export.rules import refuse, vllm_rank
from formtune.training.manifest import base_files


def run(command: str, args: list[str]) -> int:
    """Verify what is to be served, then serve it until a signal comes, or print the command for vLLM."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Folder of a run, a deployment such as demo/production, "
                        "or an exported folder; several adapters of one base are served together")  # fmt: skip
    parser.add_argument("--as", dest="kind", help="Which of a run's exported folders (default: adapter, and with "
                        "--engine llamacpp its GGUF file)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="Port on this machine (default: 8000)")
    parser.add_argument("--engine", choices=("transformers", "llamacpp", "vllm"), help="vllm: print the command, for "
                        "an environment that has it (default: llamacpp for GGUF, else transformers)")  # fmt: skip
    config = parser.parse_args(args)
    files = sorted(Path(config.runs[0]).glob("gguf-*")) if config.engine == "llamacpp" else []
    if len(files) > 1 and config.kind is None:
        raise UserError(f"--as: name one of {', '.join(file.name for file in files)}")
    kind = config.kind or (files[0].name if files else "adapter")
    models = _named(config.runs, [find_exported(run, kind) for run in config.runs])
    exported = next(iter(models.values()))
    gguf = exported.kind == "gguf"
    engine = config.engine or ("llamacpp" if gguf else "transformers")
    if gguf != (engine == "llamacpp"):
        remedy = "leave --engine out" if gguf else "formtune export RUN --as gguf makes one, then --as gguf-q8_0"
        raise UserError(f"--engine {engine}: llama.cpp, and only llama.cpp, serves a GGUF file here; {remedy}")
    if engine != "vllm":
        return serve(models, engine, config.port)
    print(shlex.join(vllm_command(models, config.port)))
    if note := exported.renderer.note:
        print(f"# {note}")
    print(f"# {CHECK.format(HOST, config.port, next(iter(models)))}")
    return 0


def _named(runs: Sequence[str], models: Sequence[Exported]) -> dict[str, Exported]:
    """What is served by its name for clients: the task, and of several models also the last part of RUN."""
    several = len(models) > 1
    for model in models:
        manifest, first = model.manifest, models[0].manifest
        if model.base is not None and base_files(model.base) != manifest["base"]["files"]:
            raise UserError(f"{model.base}: not the base that {model.folder} was trained on; its files differ")
        if several and model.base is None:
            raise UserError(f"{model.folder}: only adapters are served together; start a server for each run")
        same = manifest["base"]["files"] == first["base"]["files"] and manifest["template"] == first["template"]
        if not same or loading(model) != loading(models[0]):
            what = f"another base, chat template, precision or switch for thinking than {models[0].folder}"
            raise UserError(f"{model.folder}: {what}; start a server for each run")
    names = [f"{it.task}-{Path(run).name}" if several else it.task for run, it in zip(runs, models, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"{' '.join(runs)}: several would be called {max(names, key=names.count)}; rename one")
    return dict(zip(names, models, strict=True))


def vllm_command(models: dict[str, Exported], port: int) -> list[str]:
    """vLLM's command for adapters on their base, or for a merged model; refuses an adapter that vLLM cannot serve."""
    folders = {name: str(exported.folder.resolve()) for name, exported in models.items()}
    [(name, folder), *_], first = folders.items(), next(iter(models.values()))
    base, thinking = first.base, str(first.renderer.thinking).lower()
    words = [folder, "--served-model-name", name]
    if base is not None:
        from peft import PeftConfig

        adapters = [PeftConfig.from_pretrained(folder) for folder in folders.values()]
        for adapter in adapters:
            refuse(skeleton(base), adapter, "vllm")
        template = f"{folder}/chat_template.jinja"
        words = [
            str(Path(base).resolve()) if Path(base).is_dir() else base,
            "--enable-lora", "--max-lora-rank", str(vllm_rank(max(adapter.r for adapter in adapters))),
            "--max-loras", str(len(folders)), "--lora-modules", *map("=".join, folders.items()),
            *(["--chat-template", template] if Path(template).is_file() else []),  # completions need none
        ]  # fmt: skip
    words += ["--host", HOST, "--port", str(port)]
    return ["vllm", "serve", *words, "--default-chat-template-kwargs", f'{{"enable_thinking": {thinking}}}']
