"""Call a function in a fresh process, so that no package and no memory of one step reaches the next.

A quantized model that is measured where it was made would still hold what it was made from, and answer from that.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formtune.errors import UserError


def call_fresh(function: Callable[..., Any], failure: str, **arguments: Any) -> Any:
    """What a module's function returns in a fresh process; arguments and result are plain data."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", __name__, function.__module__, function.__name__, str(result)],
            input=json.dumps(arguments), capture_output=True, text=True, errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1"},  # everything is on this disk already
        )  # fmt: skip
        if process.returncode < 0:
            raise UserError(f"{failure}: killed by signal {-process.returncode} (9 usually means out of memory)")
        if process.returncode:
            lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise UserError(f"{failure}: {lines[-1] if lines else f'exit code {process.returncode}'}")
        return json.loads(result.read_text(encoding="utf-8"))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    module, name, result = sys.argv[1:]
    answer = getattr(importlib.import_module(module), name)(**json.load(sys.stdin))
    Path(result).write_text(json.dumps(answer), encoding="utf-8")
