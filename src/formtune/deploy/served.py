"""What a name on the command line of `formtune serve` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from formtune.deploy.registry import find_pointer, task_of
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.training.manifest import NAME


@dataclass(frozen=True, slots=True)
class Served:
    """An exported folder to serve.

    Args:
        name: What the user called it.
        task: Its task, the model's name for clients.
        folder: The folder.
        outcomes: File of its test rows.
        previous: The deployed version before it, None where there is none.
    """

    name: str
    task: str
    folder: Path
    outcomes: Path
    previous: Path | None = None

    def example(self) -> str:
        """An input to try, a test row's where they are there."""
        rows = read_outcomes(self.outcomes) if self.outcomes.is_file() else []
        return rows[0].input if rows else "Hello"


def find_served(name: str, kind: str) -> Served:
    """What `name` stands for.

    Args:
        name: An exported folder, the folder of a run, or a deployment.
        kind: Which of a run's exported folders.

    Raises:
        UserError: It is none of these.
    """
    for folder in (Path(name), Path(name, kind)):
        if (folder / NAME).is_file():
            return Served(name, task_of(folder), folder, folder.parent / "outcomes" / "after.jsonl")
    if Path(name).is_dir():
        raise UserError(f"{name}: neither an exported folder nor a run with {kind}/; formtune export makes one")
    pointer = find_pointer(name)
    version, before = pointer.stack[-1], pointer.stack[-2:-1]
    previous = pointer.version_folder(before[0]) if before else None
    return Served(pointer.name, pointer.task, pointer.verified(version), pointer.outcomes(version), previous)
