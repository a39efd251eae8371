"""One file per command: parse, call the library, print.

`COMMANDS` lists them without importing any, so that help and mistakes answer at once. A command whose file was deleted
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Command:
    """What can follow `formtune`.

    Args:
        description: One line for the help.
        module: File in this folder; its `run(name, args)` runs the command.
    """

    description: str
    module: str


_ALL = {
    "audit": Command("Check the rows before training. Needs only the base's tokenizer.", "audit"),
    "synthesize": Command("Ask a teacher model for rows; keep those with a valid format.", "synthesize"),
    "preflight": Command("Check before training whether the result can be merged, quantized and served.", "preflight"),
    "train": Command(
        "The whole job: baselines, fit, test the best checkpoint, export the adapter, report.", "lightning"
    ),
    "fit": Command("Lightning's fit: train and validate; keep the best checkpoint.", "lightning"),
    "validate": Command("Evaluate a run's best checkpoint, or the untuned base, on the validation rows.", "lightning"),
    "test": Command("Evaluate a run's best checkpoint, or the untuned base, on the test rows.", "lightning"),
    "predict": Command("Answer a file of prompts and check the format of each answer.", "lightning"),
    "try": Command("Type a prompt; see the answers of base and tuned model side by side.", "try_run"),
    "sweep": Command("Train a grid of settings (ranks by default) and take the smallest that is as good.", "sweep"),
    "compare": Command("Say which run is better on the same test rows, or that the rows cannot tell.", "compare"),
    "export": Command("Merge or quantize a run's adapter; refuse it if its answers got worse.", "export"),
    "promote": Command("Point a name such as production to a run, if its test rows are not worse.", "promote"),
    "rollback": Command("Point the name to the previous version again.", "promote"),
    "deployments": Command("List what is deployed, and its history.", "promote"),
    "serve": Command("Serve a run or a deployment on this machine, or print the vLLM command.", "serve"),
    "check-endpoint": Command("Send the test rows to a server; judge its answers and its speed.", "check_endpoint"),
}
COMMANDS = {name: one for name, one in _ALL.items() if Path(__file__).with_name(f"{one.module}.py").is_file()}
