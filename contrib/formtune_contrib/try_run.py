"""`formtune try`: type a prompt; see the answers of the base and of the tuned model, each checked."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from formtune.commands import COMMANDS
from formtune.configuration.terminal import echo
from formtune.data.cleaning import repair
from formtune.data.columns import row_schema
from formtune.data.turns import read_tools
from formtune.errors import UserError
from formtune.evaluation.outcomes import check_answer
from formtune.formats import ToolCalls
from formtune.formats.json_schema import read_schema
from formtune.model.lora import load_base
from formtune.model.micro_batches import MicroBatches
from formtune.tasks.parsers import CommandParser, read_run


def run(command: str, args: list[str]) -> None:
    """Answer prompts until standard input ends."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run")
    parser.add_argument("--schema", type=str, help="File of the schema, or of the tools, if each row has its own")
    config = parser.parse_args(args)
    folder = config.run
    if not (folder / "adapter").is_dir():
        raise UserError(f"{folder}: no adapter/; name the folder of a finished run, such as logs/demo/RUN")
    task, settings = read_run(folder)
    if settings.format.per_row != bool(config.schema):
        raise UserError(f"--schema: needed if each row of {folder} has its own schema, and only then")
    value, tools = config.schema and read_schema(config.schema), None
    schema = row_schema(value)
    if isinstance(settings.format.inner or settings.format, ToolCalls):
        schema = tools = read_tools(value, "--schema", config.schema)
    settings.format.of_row(schema)  # refuses an invalid schema
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    base = load_base(task.model.base, dtype, task.model.quantize, device)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    without = " (without constrained decoding)" if task.model.constrained else ""
    echo(f"base and {folder}{without}; one prompt per line, Ctrl-D ends")
    with suppress(EOFError):
        while True:
            if prompt := input("> ").strip():
                _answer(model, settings, prompt, schema, tools)
    print(f"\nnext: formtune export {folder}")


def _answer(model: Any, settings: Any, prompt: str, schema: str | None, tools: str | None) -> None:
    turns = [{"role": "user", "content": prompt}]
    if system := settings.system_of(schema):
        turns.insert(0, {"role": "system", "content": system})
    [row] = settings.renderer.encode([(repair(turns, settings.clean), "the prompt", schema, tools)])
    if isinstance(row, Exception):
        return echo(f"the prompt cannot be rendered: {row}", "red")
    if len(row) >= settings.limit:
        return echo(f"too long: {len(row)} tokens, the limit is {settings.limit}", "red")
    stop, limit = settings.renderer.stop_ids, min(settings.max_new_tokens, settings.limit - len(row))
    for name in ("base", "tuned"):
        with model.disable_adapter() if name == "base" else nullcontext():
            micro_batches = MicroBatches(model)
            [decoded] = micro_batches.decode([row], micro_batches.split([row], 10**6), stop, [limit])
        answer = check_answer(row, decoded, settings.renderer, settings.format)
        detail = "valid format" if answer.exact else f"{answer.kind}: {answer.detail}"
        echo(f"{name}, confidence {answer.confidence:.4f}: {detail}", "green" if answer.exact else "red")
        print(answer.answer)
