"""Lines in the terminal, and a progress bar."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

T = TypeVar("T")


def echo(line: str, style: str = "") -> None:
    """Print a line, in a style up to its colon; it is wrapped only in a terminal."""
    console, text = Console(highlight=False), Text(line)
    text.stylize(style, 0, line.find(":") + 1)
    console.print(text, soft_wrap=not console.is_terminal)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items unchanged, with a progress bar on standard error in a terminal, on one process only."""
    console = Console(stderr=True)
    hidden = not (console.is_terminal and sys.stdout.isatty()) or os.environ.get("LOCAL_RANK", "0") != "0"
    return iter(track(items, what, total, console=console, transient=True, disable=hidden))
