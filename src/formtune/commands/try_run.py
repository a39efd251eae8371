"""`formtune try`: type a prompt, and see the answers of base and tuned model side by side, each with its verdict."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.configuration.task import read_run
from formtune.data.cleaning import repair
from formtune.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Answer prompts from the terminal or from standard input until it ends.

    Raises:
        UserError: The run is not finished, or a prompt cannot be rendered.
    """
    parser = CommandParser(command, COMMANDS[command].description, "formtune try RUN")
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run")
    folder = parser.parse_args(args).run
    if not (folder / "adapter").is_dir():
        raise UserError(f"{folder}: no adapter/; name the folder of a finished run, such as logs/demo/RUN")
    task, settings = read_run(folder)
    model = _load(task.model.base, folder / "adapter")
    console = Console()
    console.print(f"base and {folder}; one prompt per line, Ctrl-D ends", highlight=False)
    while (prompt := _next_prompt()) is not None:
        if prompt.strip():
            console.print(_answers(model, settings, prompt))
    return 0


def _next_prompt() -> str | None:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n") or None
    try:
        return input("> ")
    except EOFError:
        return None


def _load(base: str, adapter: Path) -> Any:
    import torch
    from peft import PeftModel

    from formtune.model.lora import load_base

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return PeftModel.from_pretrained(load_base(base, torch.float32, None, device).to(device), adapter).eval()


def _answers(model: Any, settings: Any, prompt: str) -> Table:
    """A row for each model: its answer, and what the format says of it."""
    from formtune.model.length_buckets import LengthBuckets

    turns = [{"role": "user", "content": prompt}]
    if settings.system:
        turns.insert(0, {"role": "system", "content": settings.system})
    [row] = settings.renderer.encode([(repair(turns, settings.clean), "the prompt")])
    if isinstance(row, Exception):
        raise UserError(f"the prompt cannot be rendered: {row}")
    table = Table("model", "answer", "verdict", show_lines=True)
    stop, limit = settings.renderer.stop_ids, min(settings.max_new_tokens, settings.limit - len(row))
    for name in ("base", "tuned"):
        with model.disable_adapter() if name == "base" else nullcontext():
            micro_batches = LengthBuckets(model)
            [ids] = micro_batches.decode([row], micro_batches.split([row], 10**6), stop, [limit])
        text, finished = settings.renderer.answer(ids)
        verdict = settings.format.check(text, finished=finished, input=row.input)
        said = "valid format" if verdict.exact else f"{verdict.kind}: {verdict.detail}"
        table.add_row(name, Text(text), Text(said, style="green" if verdict.exact else "red"))
    return table
