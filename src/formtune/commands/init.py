"""`formtune init`: guess a task's YAML and schema from its rows, write them, audit, and estimate the training."""

import re
import shlex
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.commands.lightning import run as run_lightning
from formtune.errors import UserError
from formtune.files import optional, write_atomic
from formtune.start.proposal import propose, task_yaml
from formtune.tasks.parsers import CommandParser

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
GENERIC = ("train", "rows", "data")  # names that do not describe a task
FIRST = "--quick --trainer.max_steps 25"  # flags of a first run of minutes
MAX_CHARACTERS = 200  # of a printed value


def run(command: str, args: list[str]) -> int:
    """Guess, write, audit and estimate; 1 if the rows must not be trained on as they are."""
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("rows", metavar="ROWS", help="File, folder, glob or dataset of rows, as for data.train")
    parser.add_argument("--task", help="Name of configs/NAME.yaml and data/NAME/ (default: the name of ROWS)")
    parser.add_argument("--base", default=BASE, help=f"Folder or Hub id of the base model (default: {BASE})")
    parser.add_argument("--prompt", help="Column of the input, or a template over columns (default: guessed)")
    parser.add_argument("--completion", help="Column of the target (default: guessed)")
    config = parser.parse_args(args)
    path = Path(config.rows)
    names = [path.name.partition(".")[0], *(folder.name for folder in path.absolute().parents)]
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in names]
    task = config.task or next((n for n in names if re.fullmatch(r"\w[\w.-]*", n) and n not in GENERIC), "task")
    if Path(task).name != task:
        raise UserError(f"--task: {task} is a path; give a name such as invoices")
    task_file, schema_file = Path("configs", f"{task}.yaml"), Path("data", task, "schema.json")
    if not path.is_file() and schema_file.parent.resolve() in (path.resolve(), path.parent.resolve()):
        schema_file = task_file.with_suffix(".schema.json")  # not among the rows
    for file in (task_file, schema_file):
        if file.exists():
            raise UserError(f"{file}: already exists; choose another name with --task, or delete it")
    guesses, schema, prepared = propose(config.rows, schema_file, config.base, config.prompt, config.completion)
    head = f"Written by `formtune init {config.rows}`; configs/reference.yaml has every key, with its default."
    files = {schema_file: schema} if schema else {}
    for file, text in (files | {task_file: task_yaml(guesses, head)}).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    for key, value, why in guesses:
        print(f"{key}: {str(value)[:MAX_CHARACTERS]}  ({why})")
    print("wrote", *files, task_file, flush=True)
    words = ["-c", str(task_file)]
    if not prepared:
        print(f"not checked: {config.base} is not on this machine; bad rows, limits, time and memory are unknown")
        print(f"next: formtune audit -c {task_file} (it downloads the tokenizer; or set model.base to a folder)")
        return 0
    if audit := optional("audit.findings", "audit"):
        findings, _ = audit(*prepared)
        optional("audit.findings", "print_problems")(findings)
        if findings["blockers"]:
            print(f"next: fix the blockers, then formtune audit {shlex.join(words)}")
            return 1
    run_lightning("train", [*words, "--dry_run", "--trainer.devices=1"])
    print(f"next: formtune train {shlex.join(words)} {FIRST}")
    print(f"then: formtune train {shlex.join(words)}")
    return 0
