"""One file per command: parse, call the library, print."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # its `run(command, args)` runs the command
    description: str


CONTRIB = "formtune_contrib"  # optional, with a table of its own

_ALL = {  # module of this package, and description
    "init": ("init", "Guess a task from rows: write its YAML and schema, ready to run."),
    "audit": ("audit", "Check the rows before training. Needs only the base's tokenizer."),
    "train": ("lightning", "The whole job: baselines, fit, test the best checkpoint, export the adapter, report."),
    "fit": ("lightning", "Lightning's fit: train and validate; keep the best checkpoint."),
    "validate": ("lightning", "Evaluate a run's best checkpoint, or the untuned base, on the validation rows."),
    "test": ("lightning", "Evaluate a run's best checkpoint, or the untuned base, on the test rows."),
    "predict": ("lightning", "Answer a file of prompts and check the format of each answer."),
    "sweep": ("sweep", "Grid search (default: ranks); choose the smallest model within one standard error."),
    "compare": ("compare", "Compare runs on the same test rows: better, worse, or cannot tell."),
    "export": ("export", "Merge or quantize a run's adapter; refused if answers get worse."),
}
# Without commands whose file was deleted with its optional folder. No command is imported for the list.
_FILES = {path.stem for path in Path(__file__).parent.glob("*.py")}
COMMANDS = {name: Command(f"{__name__}.{file}", text) for name, (file, text) in _ALL.items() if file in _FILES}
if find_spec(CONTRIB):
    more = import_module(CONTRIB).COMMANDS.items()
    COMMANDS |= {name: Command(f"{CONTRIB}.{file}", text) for name, (file, text) in more}
