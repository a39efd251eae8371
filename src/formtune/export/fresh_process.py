"""Call a function in a fresh process: a model measured where it was quantized would hold what it was made from."""

import logging
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from formtune.errors import UserError, first_line


def call_fresh(function: Callable[..., Any], failure: str, **arguments: Any) -> Any:
    """What a module's function returns in a fresh process; `failure` begins the message if it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet_and_offline) as pool:
        try:
            return pool.submit(function, **arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{failure}: its process was killed, usually because memory ran out") from None
        except Exception as error:
            raise UserError(f"{failure}: {first_line(error)}") from None


def _quiet_and_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # every file is on this disk already
    logging.disable(logging.WARNING)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
