"""A bar with the time left over work that takes longer than a second; nothing where no one is watching."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 1.0  # seconds without a bar
EVERY = 64  # rows between two looks at the clock

T = TypeVar("T")


def shown(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items unchanged, with a bar on a terminal's standard error that goes away at the end.

    Args:
        items: Results as they are computed.
        total: How many there will be.
        what: Word before the bar.
    """
    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0":  # one bar, not one of each process
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=total)
    started = time.monotonic()
    try:
        for number, item in enumerate(items):
            if number % EVERY == 0 and time.monotonic() - started > PATIENCE:
                bar.start()  # again and again: only the first time counts
                bar.update(task, completed=number)
            yield item
    finally:
        bar.stop()
