"""`formtune audit`: writes and prints what it finds."""

from __future__ import annotations

from formtune.audit.console import print_audit
from formtune.audit.findings import audit
from formtune.audit.html import write_report, write_tensorboard
from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.files import LOGS


def run(command: str, args: list[str]) -> int:
    """Audit, print, write `logs/<task>/audit/`; 1 if the rows must not be trained on.

    Raises:
        UserError: A mistake in the configuration, or a row that cannot be read.
    """
    config, preparation = read_task(task_parser(command, COMMANDS[command].description), args)
    found, splits = audit(preparation)
    folder = LOGS / config.task / "audit"
    write_report(found, folder)
    print_audit(found, splits, folder)
    write_tensorboard(found, folder)
    return int(found["verdict"] == "blocked")
