"""Quantising and measuring in processes of their own, so that no package and no state of one reaches another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formtune.errors import UserError
from formtune.export import quantize
from formtune.export.measure import Request
from formtune.export.quantize import CALIBRATED, MAKERS
from formtune.training.manifest import installed

EXTRAS = {"int8": "quantize", "nf4": "quantize", "gptq": "gptq", "awq": "gptq", "llmcompressor": "ct"}
PROBE = "import sys; from importlib.util import find_spec; print('has', *filter(find_spec, sys.argv[1:]))"


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes GPTQ and AWQ.

    Args:
        package: One of `quantize.MAKERS`.
        python: The interpreter that has it.
    """

    package: str = "gptqmodel"
    python: str = sys.executable


def find_maker(python: str | None, schemes: Sequence[str]) -> Maker:
    """The first of `quantize.MAKERS` that an interpreter has; GPTQModel of this one where none is named.

    Args:
        python: Path of the interpreter, as `--interpreter`.
        schemes: What it is named for.

    Raises:
        UserError: It does not run, has none of them, or nothing is asked for that needs it.
    """
    if python is None:
        return Maker()
    if not set(schemes) & set(CALIBRATED):
        raise UserError(f"--interpreter: makes {' and '.join(CALIBRATED)}; leave it out for {', '.join(schemes)}")
    try:
        done = subprocess.run(
            [python, "-P", "-c", PROBE, *MAKERS], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--interpreter: {python}: {error.strerror}; name the python of an environment") from None
    said = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode or said[:1] != ["has"]:
        raise UserError(f"--interpreter: {python} is no Python from 3.11 on; name that of an environment")
    if not said[1:]:
        raise UserError(
            f"--interpreter: {python} has neither {' nor '.join(MAKERS)}: {python} -m pip install llmcompressor"
        )
    return Maker(said[1], python)


def packages(scheme: str, maker: Maker) -> tuple[str, ...]:
    """What loads a scheme, and makes all but `quantize.CALIBRATED`, in this environment."""
    return quantize.PACKAGES.get(_key(scheme, maker), ())


def lacking(scheme: str, maker: Maker = Maker()) -> str | None:
    """What a scheme needs and is not installed, with the command that installs it; None if nothing is."""
    for package in packages(scheme, maker):
        if installed(package) is None:
            return f"needs {package}: pip install -e '.[{EXTRAS[_key(scheme, maker)]}]'"
    return None


def run_quantizer(
    scheme: str, source: Path, target: Path, rows: Sequence[list[int]], group: int | None, maker: Maker
) -> None:
    """Quantise a folder into another; arguments as in `quantize.quantize`.

    Raises:
        UserError: It failed; the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request.json")
        asked = {"rows": list(rows), "group": group, "maker": maker.package}
        request.write_text(json.dumps(asked), encoding="utf-8")
        words = ["-P", quantize.__file__, scheme, str(source), str(target), str(request)]
        _run(f"{scheme} cannot be made", words, maker.python if scheme in CALIBRATED else sys.executable)


def run_measurement(request: Request) -> dict[str, Any]:
    """What `measure` finds, in a fresh process.

    Raises:
        UserError: The model does not load or does not answer; the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(json.dumps(asdict(request)), encoding="utf-8")
        words = ["-m", "formtune.export.measure", str(question), str(answer)]
        _run(f"{request.model.folder} does not load", words)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _key(scheme: str, maker: Maker) -> str:
    return "llmcompressor" if scheme in CALIBRATED and maker.package == "llmcompressor" else scheme


def _run(what: str, words: Sequence[str], python: str = sys.executable) -> None:
    done = subprocess.run(
        [python, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        # Everything needed lies on this disk: a library that asks a hub for more has lost its way.
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode < 0:
        raise UserError(f"{what}: ended by signal {-done.returncode}, which for 9 means that memory ran out")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{what}: {said[-1] if said else f'exit code {done.returncode}'}")
