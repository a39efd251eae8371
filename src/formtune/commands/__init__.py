"""One file per command: parse, call the library, print."""

from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # file in this folder; its `run(command, args)` runs the command
    description: str


_ALL = {
    "init": Command("init", "Guess a task from rows: write its YAML and schema, ready to run."),
    "audit": Command("audit", "Check the rows before training. Needs only the base's tokenizer."),
    "synthesize": Command("synthesize", "Ask a teacher model to answer prompts; keep the answers with a valid format."),
    "preflight": Command("preflight", "Check before training whether the result can be merged, quantized and served."),
    "train": Command(
        "lightning", "The whole job: baselines, fit, test the best checkpoint, export the adapter, report."
    ),
    "fit": Command("lightning", "Lightning's fit: train and validate; keep the best checkpoint."),
    "validate": Command("lightning", "Evaluate a run's best checkpoint, or the untuned base, on the validation rows."),
    "test": Command("lightning", "Evaluate a run's best checkpoint, or the untuned base, on the test rows."),
    "predict": Command("lightning", "Answer a file of prompts and check the format of each answer."),
    "try": Command("try_run", "Type a prompt; see the answers of base and tuned model side by side."),
    "sweep": Command("sweep", "Train a grid of settings (default: ranks); choose the smallest near the best."),
    "compare": Command("compare", "Compare runs on the same test rows: better, worse, or cannot tell."),
    "export": Command("export", "Merge or quantize a run's adapter; refused if answers get worse."),
    "promote": Command("promote", "Deploy a run under a name such as production, if it is not worse on the test rows."),
    "rollback": Command("promote", "Return a deployment to its previous version."),
    "deployments": Command("promote", "List deployments and their history."),
    "serve": Command("serve", "Serve a run or a deployment on this machine, or print the vLLM command."),
    "check-endpoint": Command("check_endpoint", "Send the test rows to a server; check its answers and speed."),
}
# Without commands whose file was deleted with its optional folder. Nothing is imported for the list.
COMMANDS = {name: one for name, one in _ALL.items() if Path(__file__).with_name(f"{one.module}.py").is_file()}
