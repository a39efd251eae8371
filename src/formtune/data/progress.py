"""A progress bar over the rows."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items unchanged, with a bar on standard error if that is a terminal, on one process only."""
    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0"
    return iter(track(items, what, total, console=console, transient=True, disable=hidden))
