"""Quantising and measuring in processes of their own, so that no package and no state of one reaches another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formtune.deploy import quantize
from formtune.deploy.manifest import installed
from formtune.deploy.measure import Request
from formtune.errors import UserError

EXTRAS = {"int8": "quantize", "nf4": "quantize", "gptq": "gptq", "awq": "gptq"}


def lacking(scheme: str) -> str | None:
    """What a scheme needs and is not installed, with the command that installs it; None if nothing is."""
    for package in quantize.PACKAGES.get(scheme, ()):
        if installed(package) is None:
            return f"needs {package}: pip install -e '.[{EXTRAS[scheme]}]'"
    return None


def run_quantizer(scheme: str, source: Path, target: Path, rows: Sequence[list[int]], group: int | None) -> None:
    """Quantise a folder into another; arguments as in `quantize.quantize`.

    Raises:
        UserError: It failed; the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request.json")
        request.write_text(json.dumps({"rows": list(rows), "group": group}), encoding="utf-8")
        _run(f"{scheme} cannot be made", ["-P", quantize.__file__, scheme, str(source), str(target), str(request)])


def run_measurement(request: Request) -> dict[str, Any]:
    """What `measure` finds, in a fresh process.

    Raises:
        UserError: The model does not load or does not answer; the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(json.dumps(asdict(request)), encoding="utf-8")
        words = ["-m", "formtune.deploy.measure", str(question), str(answer)]
        _run(f"{request.model.folder} does not load", words)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _run(what: str, words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        # Everything needed lies on this disk: a library that asks a hub for more has lost its way.
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode < 0:
        raise UserError(f"{what}: ended by signal {-done.returncode}, which for 9 means that memory ran out")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{what}: {said[-1] if said else f'exit code {done.returncode}'}")
