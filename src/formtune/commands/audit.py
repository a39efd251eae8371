"""`formtune audit`."""

import shlex

from formtune.audit.findings import audit, print_audit, write_report
from formtune.commands import COMMANDS
from formtune.files import LOGS
from formtune.tasks.parsers import read_task, task_parser


def run(command: str, args: list[str]) -> int:
    """Audit, write `logs/<task>/audit/`, print; 1 if the rows must not be trained on."""
    config, settings = read_task(task_parser(command, COMMANDS[command].description), args)
    findings, splits = audit(settings)
    blocked = findings["verdict"] == "blocked"
    findings["next"] = shlex.join(["formtune", "audit" if blocked else "train", *args])
    folder = LOGS / config.task / "audit"
    write_report(findings, folder)
    print_audit(findings, settings, splits, folder)
    print(f"next: {'fix the rows, then ' * blocked}{findings['next']}")
    return int(blocked)
