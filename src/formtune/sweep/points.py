"""The points of a grid, their runs, and the chosen point: the smallest within one standard error of the best (Breiman
et al. 1984) on the validation rows, so that the test metrics stay unbiased."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from formtune.errors import UserError

FORMAT, CONTENT = METRICS = ("format/exact", "content/field_f1")
RANKS = "model.lora.r=8,16,32,64"
TRAIN = [sys.executable, "-m", "formtune", "train"]


def grid(over: Sequence[str]) -> dict[str, dict[str, str]]:
    """The points, all combinations of `key=value,value,...`, by a name for their folder: `r8-lr1e-4`."""
    keys: dict[str, list[str]] = {}
    for text in over:
        key, _, values = text.partition("=")
        # Commas inside brackets belong to a value. Values stay strings: `train` reads 1e-4 as a number, YAML does not.
        keys[key] = keys.get(key, []) + [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not re.fullmatch(r"\w+(\.\w+)*", key) or not all(keys[key]) or len(set(keys[key])) < max(2, len(keys[key])):
            raise UserError(f"--over {text}: expected a key and two or more different values, as in --over {RANKS}")
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]
    return {"-".join(key.rpartition(".")[2] + _slug(value) for key, value in p.items()): p for p in points}


def _slug(value: str) -> str:
    plain = re.sub(r"[^\w.+]+", "-", value).strip("-")[:40]
    if plain != value:  # values that differ only in characters outside folder names need different names
        plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    return plain if plain[:1].isdigit() else f"-{plain}"


def result(run: Path) -> dict[str, Any] | None:
    """The `metrics.json` of a run; None if it is not finished."""
    path = run / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def train(run: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run `formtune train`, and return its exit code and why it failed, in one line; an interruption kills the run."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "output.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*TRAIN, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its own processes
        process.wait()
    last = path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    why = last.removeprefix("formtune: error: ") or f"exit code {code}"
    return code, f"ended by {signal.Signals(-code).name}" if code < 0 else why


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of a fraction over seeds, and its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {100 * self.standard_error:.1f}"


@dataclass(frozen=True, slots=True)
class PointResult:
    """The metrics of a point's finished runs: those of their best checkpoints, and the means on the test rows."""

    name: str
    seeds: int
    trainable_parameters: int
    rows: int  # for validation
    loss: float  # nats per token
    validation: dict[str, Estimate]  # by metric
    test: dict[str, float]


def summarize(name: str, results: Sequence[dict[str, Any]]) -> PointResult:
    training = [result["training"] for result in results]
    best, rows = [each["best"] for each in training], training[0]["best"]["rows"]
    fractions = {FORMAT: [b["exact"] / rows for b in best], CONTENT: [b["field_f1"] for b in best]}
    return PointResult(
        name, len(results), training[0]["trainable_parameters"], rows, fmean(b["loss"] for b in best),
        validation={metric: estimate(values, rows) for metric, values in fractions.items()},
        test={metric: fmean(result["after"][metric] for result in results) for metric in METRICS},
    )  # fmt: skip


def estimate(fractions: Sequence[float], rows: int) -> Estimate:
    """Mean and standard error over seeds; with one seed the error of a rate over rows, an approximation for F1."""
    mean = fmean(fractions)
    if len(fractions) > 1:
        return Estimate(mean, stdev(fractions) / math.sqrt(len(fractions)))
    return Estimate(mean, math.sqrt(mean * (1 - mean) / rows))


def choose(points: Sequence[PointResult]) -> tuple[str | None, str]:
    """The name of the chosen point, None if no point gives a valid format, and why."""
    if not any(point.validation[FORMAT].mean for point in points):
        return None, "Nothing chosen: no answer of any point has a valid format. Train longer first."
    valid = _within_one_standard_error(points, FORMAT)
    right = _within_one_standard_error(valid, CONTENT)

    def smallest(point: PointResult) -> tuple[float, ...]:
        return (point.trainable_parameters, *(-point.validation[metric].mean for metric in METRICS), point.loss)

    chosen = min(right, key=smallest)
    return chosen.name, (
        f"{chosen.name} is chosen: it has the fewest parameters ({chosen.trainable_parameters:,}) of those "
        f"within one standard error, or one row, of the best format/exact ({', '.join(p.name for p in valid)}) and "
        f"then of the best field F1 ({', '.join(p.name for p in right)})."
    )


def _within_one_standard_error(points: Sequence[PointResult], metric: str) -> list[PointResult]:
    best = max((p.validation[metric] for p in points), key=lambda e: (e.mean, e.standard_error))
    # One row never decides, as for checkpoints: seeds may agree by chance, with a standard error of 0.
    margin = max(best.standard_error, 1 / points[0].rows) + 1e-9  # a row's fraction is rounded
    return [point for point in points if point.validation[metric].mean >= best.mean - margin]
